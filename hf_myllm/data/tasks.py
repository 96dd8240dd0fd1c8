"""Labelled data: texts, or pairs of them, and what is to be said of each; tokenized once and memory-mapped."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .corpus import Tokens, cached_folder
from .sources import read_rows, source_key
from .tokenizer import end_of_document
from .tokenizer import fingerprint as tokenizer_fingerprint

_BATCH = 1000  # rows tokenized at once
UNLABELLED = -100  # no label: what fills a batch


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Args:
        label: the column of the label; or several, each 0 or 1, for classes of which a text may have any number.
    """

    text: str
    pair: str | None
    label: str | list


@dataclass(frozen=True)
class Labels:
    """What may be said of a text.

    Args:
        kind: "single_label_classification", "multi_label_classification" or "regression", as the stock configurations
            have it.
        names: of the classes, in the order of their numbers; none for a regression.
    """

    kind: str
    names: tuple = ()

    @property
    def count(self):
        return len(self.names) or 1

    def encode(self, value, where):
        """A label as numbers.

        Raises:
            InputError: it is none of the classes, no number, or missing.
        """
        if value is None or value == "":
            raise InputError(f"{where} has no label")
        if self.kind == "regression":
            return _number(value, where)
        if self.kind == "single_label_classification":
            if (name := _name(value, where)) not in self.names:
                raise InputError(f"{where}: the label {name!r} is not in the training data, which has {self._known()}")
            return self.names.index(name)
        chosen = value if isinstance(value, (list, dict)) else [value]
        if isinstance(chosen, dict):  # of several columns
            chosen = [name for name, held in chosen.items() if _number(held, where)]
        for name in chosen:
            if _name(name, where) not in self.names:
                raise InputError(f"{where}: the label {name!r} is not in the training data, which has {self._known()}")
        return [float(name in {_name(one, where) for one in chosen}) for name in self.names]

    def _known(self):
        return ", ".join(self.names[:10]) + (" ..." if len(self.names) > 10 else "")


def find_labels(source, columns, kind):
    """The labels of a training set, sorted; numbers by their size.

    Raises:
        InputError: a row has none, or labels of different types.
    """
    if kind == "regression":
        return Labels(kind)
    if isinstance(columns.label, list):
        return Labels("multi_label_classification", tuple(columns.label))
    seen, first = {}, None
    for where, row in read_rows(source):
        value = _label_of(row, where, columns)
        for one in value if isinstance(value, list) else [value]:
            if one is None or one == "":
                raise InputError(f"{where} has no label")
            first = first or (type(one), where)
            if type(one) is not first[0]:
                raise InputError(
                    f"{where}: the label {one!r} is of another type than that of {first[1]}; write all of them alike"
                )
            seen[_name(one, where)] = None
        if kind is None:
            kind = "multi_label_classification" if isinstance(value, list) else "single_label_classification"
    if len(seen) < 2:
        raise InputError(f"{source.name} has {len(seen)} label{'s' * (len(seen) != 1)}: there is nothing to tell apart")
    return Labels(kind, tuple(sorted(seen, key=lambda name: (0, int(name), "") if _is_int(name) else (1, 0, name))))


class Examples:
    """Tokenized texts with their labels.

    `tokens` are those of all texts, `lengths` those of some, as of the rows in packing.
    """

    parts = (0,)

    def __init__(self, folder, name):
        self.name = name
        self.ids, self.starts, self.second, self.labels = (
            np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("ids", "starts", "second", "labels")
        )
        self.account = json.loads((folder / "account.json").read_text())
        self.tokens = Tokens([self.ids], self.account["fingerprint"], self.account["max_id"])

    def __len__(self):
        return len(self.labels)

    def accounted(self):
        return len(self.ids)

    def lengths(self, rows):
        return self.starts[np.asarray(rows) + 1] - self.starts[rows]

    def read(self, row):
        """The ids of a text, and where its second part begins (its end, where there is none)."""
        return self.ids[int(self.starts[row]) : int(self.starts[row + 1])].astype(np.int64), int(self.second[row])


def load_examples(source, tokenizer, columns, labels, max_len, val_fraction=0.0):
    """The examples of a source, and those held out, tokenized now or found in the cache.

    Args:
        max_len: tokens of a text, beyond which it is cut.
        val_fraction: share of the rows to hold out, evenly spread.
    Raises:
        InputError: a row has no text or label, or a label that is not known.
    """
    key = ["examples", source_key(source), tokenizer_fingerprint(tokenizer), end_of_document(tokenizer), max_len]
    key += [columns.text, columns.pair, columns.label, labels.kind, labels.names, val_fraction]
    folder = cached_folder(
        key, lambda aside: _tokenize(source, tokenizer, columns, labels, max_len, val_fraction, aside)
    )
    training = Examples(folder / "train", source.name)
    held_out = Examples(folder / "validation", f"the validation part of {source.name}") if val_fraction else None
    return training, held_out


def _tokenize(source, tokenizer, columns, labels, max_len, val_fraction, folder):
    parts = {part: _Writer(folder / part, labels) for part in ("train", *(["validation"] if val_fraction else []))}
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    filler = end_of_document(tokenizer)[:1]  # of a text of no tokens
    for first, batch in _batches(source, columns, labels):
        backend.enable_truncation(max_len)
        encoded = backend.encode_batch([texts for texts, _ in batch])
        backend.no_truncation()
        for number, ((_, label), encoding) in enumerate(zip(batch, encoded, strict=True), start=first):
            is_held_out = int((number + 1) * val_fraction + 0.5) > int(number * val_fraction + 0.5)
            types = encoding.type_ids
            second = types.index(1) if 1 in types else len(types)
            part = parts["validation" if is_held_out else "train"]
            part.write(encoding.ids or filler, second, label, is_cut=bool(encoding.overflowing))
    for part in parts.values():
        part.close(source.name)


def _batches(source, columns, labels):
    """(number of the first row, list of (text or pair, label))."""
    batch, first = [], 0
    for where, row in read_rows(source):
        text = _text(row, where, columns.text)
        texts = (text, _text(row, where, columns.pair)) if columns.pair else text
        batch.append((texts, labels.encode(_label_of(row, where, columns), where)))
        if len(batch) == _BATCH:
            yield first, batch
            batch, first = [], first + _BATCH
    if batch:
        yield first, batch


class _Writer:
    def __init__(self, folder, labels):
        folder.mkdir()
        self.folder, self.kind = folder, labels.kind
        self.ids, self.lengths, self.second, self.labels, self.cut = [], [], [], [], 0

    def write(self, ids, second, label, is_cut):
        self.ids.append(np.array(ids, dtype=np.uint32))
        self.lengths.append(len(ids))
        self.second.append(second)
        self.labels.append(label)
        self.cut += is_cut

    def close(self, name):
        if not self.ids:
            raise InputError(f"{name} has no rows to learn from, or val_fraction leaves none")
        ids = np.concatenate(self.ids)
        labels = np.array(self.labels, dtype=np.int64 if self.kind == "single_label_classification" else np.float32)
        np.save(self.folder / "ids.npy", ids)
        np.save(self.folder / "starts.npy", np.cumsum([0, *self.lengths]))
        np.save(self.folder / "second.npy", np.array(self.second))
        np.save(self.folder / "labels.npy", labels)
        digest = hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest()
        account = {"max_id": int(ids.max()), "fingerprint": digest, "rows": len(labels), "cut": self.cut}
        (self.folder / "account.json").write_text(json.dumps(account))


def _text(row, where, column):
    if column not in row:
        raise InputError(
            f"{where} has no column {column!r}, but {', '.join(map(repr, row))}; name it with --text_column"
        )
    if not isinstance(row[column], str):
        raise InputError(f"{where}: column '{column}' does not hold text: {row[column]!r:.80}")
    return row[column]


def _label_of(row, where, columns):
    names = columns.label if isinstance(columns.label, list) else [columns.label]
    for name in names:
        if name not in row:
            raise InputError(
                f"{where} has no column {name!r}, but {', '.join(map(repr, row))}; name it with --label_column"
            )
    return {name: row[name] for name in names} if isinstance(columns.label, list) else row[columns.label]


def _name(value, where):
    if isinstance(value, float) or not isinstance(value, (str, int)):
        raise InputError(
            f"{where}: the label {value!r:.80} is not the name or number of a class; problem_type says more"
        )
    return str(value)


def _number(value, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < 1e30 or number == UNLABELLED:
        raise InputError(f"{where}: the label {value!r:.80} is not a number to come close to")
    return number


def _is_int(name):
    return name.removeprefix("-").isdecimal()
