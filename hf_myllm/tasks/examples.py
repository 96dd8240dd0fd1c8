"""The rows that labelled data comes to: tokenized once, kept in the cache and memory-mapped; see data/tasks."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from ..data.cache import cached_folder
from ..data.corpus import TokenStream, is_held_out
from ..data.sources import source_key
from ..errors import InputError

_BATCH = 1000  # rows tokenized at once


class BadRow(InputError):
    """A row that cannot be learned from; a recipe may have such rows left out."""


class Example(NamedTuple):
    """A row to train on.

    Args:
        ids: of its tokens.
        second: where the second of two texts begins; the row's length where there is one.
        labels: a number, or several, of the row; or one of each token.
        spans: where each token stands in the text that answers are taken from, (start, stop); -1 outside of it.
    """

    ids: list
    second: int
    labels: object
    spans: object = None


class Examples:
    """What comes of a source: rows of tokens with their labels, of one or more rows for each item.

    `tokens` are those of all rows, `lengths` those of some, as of the rows in packing.

    Args:
        arrays: ids; starts, second, labels (of the rows, or of the tokens), first (row of each item, and the number of
            rows); spans.
    """

    source_starts = (0,)

    def __init__(self, arrays, account, records, name):
        self.ids, self.starts, self.second, self.labels, self.first = (
            arrays[part] for part in ("ids", "starts", "second", "labels", "first")
        )
        self.spans = arrays.get("spans")
        self.account, self.name, self._records = account, name, records
        self.tokens = TokenStream([self.ids], account["fingerprint"], account["max_id"])

    def __len__(self):
        return len(self.starts) - 1

    @property
    def num_items(self):
        return len(self.first) - 1

    def rows_of(self, items):
        """The rows of some items, one item after another."""
        return np.concatenate([np.arange(self.first[item], self.first[item + 1]) for item in items])

    def items_of(self, rows):
        """The item that each of some rows comes of."""
        return (np.searchsorted(self.first, rows, side="right") - 1).tolist()

    def by_item(self, rows, values):
        """item -> what some rows of it have, in their order."""
        found = {}
        for item, value in zip(self.items_of(rows), values, strict=True):
            found.setdefault(item, []).append(value)
        return found

    def num_used_tokens(self):
        return len(self.ids)

    def lengths(self, rows):
        return self.starts[np.asarray(rows) + 1] - self.starts[rows]

    def read(self, row):
        """The ids of a row, and where its second text begins."""
        return self.ids[self._slice(row)].astype(np.int64), int(self.second[row])

    def labels_of(self, row):
        """(tokens,) int64, where each token has one."""
        return self.labels[self._slice(row)]

    def spans_of(self, row):
        return self.spans[self._slice(row)]

    def _slice(self, row):
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def record(self, item):
        """What the task keeps of an item to judge it by."""
        if isinstance(self._records, list):
            return self._records[item]
        self._records = [json.loads(line) for line in self._records.read_text(encoding="utf-8").splitlines()]
        return self._records[item]


def load_examples(source, task, val_fraction=0.0, skip=False):
    """The examples of a source, and those held out, tokenized now or found in the cache.

    Args:
        val_fraction: share of the items to hold out, evenly spread.
        skip: whether rows that cannot be learned from are left out, and counted, rather than refused.
    Raises:
        BadRow: a row lacks something, or has what cannot be.
    """
    key = ["examples", 2, source_key(source), task.key(), val_fraction, skip]
    folder = cached_folder(key, lambda aside: _write(source, task, val_fraction, skip, aside))
    training = _open(folder / "train", source.name)
    return training, _open(folder / "validation", f"the validation part of {source.name}") if val_fraction else None


def make_examples(items, task, name, skip=False, refused=None):
    """The examples of some items, in memory; None where there are none. For the rest see [`load_examples`] and
    [`items_of`]."""
    made = _Maker(task, skip, refused)
    made.add(items)
    return Examples(*made.whole(name), name) if made.rows else None


def items_of(source, task, skip=False, refused=None):
    """The items of a source, checked.

    Args:
        refused: a list that gets the message of each row that is left out.
    """
    for where, row in task.read(source):
        try:
            item = task.item(row, where)
        except BadRow as problem:
            if not skip:
                raise
            refused.append(str(problem))
        else:
            yield item


def _write(source, task, val_fraction, skip, folder):
    refused = []
    parts = {"train": _Maker(task, skip, refused)}
    if val_fraction:
        parts["validation"] = _Maker(task, skip, refused)
    held, units = {name: [] for name in parts}, {}
    for count, item in enumerate(items_of(source, task, skip, refused)):
        unit = task.unit(item)
        number = count if unit is None else units.setdefault(unit, len(units))
        name = "validation" if is_held_out(number, val_fraction) else "train"
        held[name].append(item)
        if len(held[name]) == _BATCH:
            parts[name].add(held[name])
            held[name] = []
    for name, part in parts.items():
        part.add(held[name])
    if val_fraction and not all(part.rows for part in parts.values()) and any(part.rows for part in parts.values()):
        few = f"{source.name} has too few rows to hold out {val_fraction:g} of them"
        raise InputError(f"{few}: give --val_file FILE, or --val_fraction 0")
    for name, part in parts.items():
        arrays, account, records = part.whole(source.name)
        (folder / name).mkdir()
        for key, values in arrays.items():
            np.save(folder / name / f"{key}.npy", values)
        (folder / name / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        (folder / name / "account.json").write_text(json.dumps(account))


def _open(folder, name):
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    return Examples(arrays, json.loads((folder / "account.json").read_text()), folder / "records.jsonl", name)


class _Maker:
    """Items into arrays."""

    def __init__(self, task, skip, refused):
        self.task, self.skip, self.refused = task, skip, refused
        self.rows, self.counts, self.records, self.cut = [], [], [], 0

    def add(self, items):
        for item, code in zip(items, self.task.encode(items) if items else [], strict=True):
            try:
                examples, is_cut = self.task.examples(item, code)
            except BadRow as problem:
                if not self.skip:
                    raise
                self.refused.append(str(problem))
                continue
            self.rows += [
                (np.array(one.ids, dtype=np.uint32), one.second, np.array(one.labels), one.spans) for one in examples
            ]
            self.counts.append(len(examples))
            self.records.append(self.task.record(item))
            self.cut += is_cut

    def whole(self, name):
        if not self.rows:
            raise InputError(f"{name} has no rows to work with{f': {self.refused[0]}' if self.refused else ''}")
        ids, second, labels, spans = zip(*self.rows, strict=True)
        labels = np.concatenate(labels) if self.task.per_token else np.stack(labels)
        arrays = {
            "ids": np.concatenate(ids),
            "starts": np.cumsum([0, *map(len, ids)]),
            "second": np.array(second),
            "labels": labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64),
            "first": np.cumsum([0, *self.counts]),
        }
        if spans[0] is not None:
            arrays["spans"] = np.concatenate(spans).astype(np.int32)
        digest = hashlib.sha256(b"".join(arrays[part].tobytes() for part in ("ids", "starts", "labels"))).hexdigest()
        account = {"max_id": int(arrays["ids"].max()), "fingerprint": digest, "rows": len(ids), "cut": self.cut}
        account |= {"skipped": len(self.refused), "refused": self.refused[:3]}
        return arrays, account | self.task.account(self.records), self.records
