"""Rows of labelled examples, in Arrow files in the cache of `datasets`.

An *example* is one labelled item of the data; a *row* is one training sequence. A long example may become several rows.
"""

import hashlib
import json
from functools import cached_property

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter

from ..data.cache import cached_folder
from ..data.corpus import TokenStream
from ..data.hold_out import HoldOut, text_hash
from ..data.sources import source_key
from ..data.tokenization import document_digest
from ..errors import InputError

_BATCH = 1000  # examples tokenized at once


class LabelledRows:
    """Rows of tokens with their labels.

    Args:
        dataset: a `datasets.Dataset` with the columns input_ids, second_text (where the second text of a pair begins;
            the row's length if there is none), labels (of the row or of each token), example (index of the example)
            and, if answers are spans of the text, offsets (the start and stop of each token in the text, flat).
        records: the `record` of each example: a list or a `datasets.Dataset`, by index.
        stats: statistics of the data.
        name: what to call the data in messages.
        documents: see [`TokenStream`]; each row is one.
    """

    source_starts = (0,)

    def __init__(self, dataset, records, stats, name, documents=None):
        self.dataset, self.records, self.stats, self.name = dataset, records, stats, name
        column = dataset.data.column
        self._lengths = pc.list_value_length(column("input_ids")).to_numpy().astype(np.int64)
        self.starts = np.cumsum([0, *self._lengths])
        ids = _chunks(column("input_ids"))
        self.tokens = TokenStream(ids, stats["fingerprint"], stats["max_id"], documents=documents)
        self.second_text, self.example = column("second_text").to_numpy(), column("example").to_numpy()
        self.labels = TokenStream(_chunks(column("labels")), "", 0)
        self.has_label_lists = pa.types.is_list(column("labels").type)
        has_offsets = "offsets" in dataset.column_names
        self.offsets = TokenStream(_chunks(column("offsets")), "", 0) if has_offsets else None

    def __len__(self):
        return len(self._lengths)

    def lengths(self, indices):
        return self._lengths[indices]

    def num_used_tokens(self):
        return len(self.tokens)

    def read(self, index):
        """Return the token ids of a row, and where its second text begins."""
        ids = self.tokens.read(int(self.starts[index]), int(self._lengths[index]))
        return ids.astype(np.int64), int(self.second_text[index])

    def token_labels(self, index):
        """Return the labels of a row's tokens, if each token has one: (tokens,) int64."""
        return self.labels.read(int(self.starts[index]), int(self._lengths[index])).astype(np.int64)

    @cached_property
    def row_labels(self):
        """The labels of all rows, if each row has one or a list of them: (rows,) or (rows, labels)."""
        return self.all_labels.reshape(len(self), -1) if self.has_label_lists else self.all_labels

    @property
    def all_labels(self):
        """The labels of all rows or tokens, flat."""
        return self.labels.read(0, len(self.labels))

    def token_offsets(self, index):
        """Return the start and stop of each token in the text: (tokens, 2) int32, -1 outside of the text."""
        return self.offsets.read(2 * int(self.starts[index]), 2 * int(self._lengths[index])).reshape(-1, 2)

    @property
    def num_examples(self):
        return int(self.example[-1]) + 1

    @cached_property
    def num_windows(self):
        """The number of rows of each row's example: (rows,) int64."""
        return np.bincount(self.example)[self.example]

    @property
    def example_labels(self):
        """The labels of each example, if all rows of an example have its label; flat, as `all_labels`."""
        return self.all_labels if self.has_label_lists else self.all_labels[self.first_rows]

    @property
    def first_rows(self):
        """The first row of each example: (examples,) int64."""
        return np.flatnonzero(np.diff(self.example, prepend=-1))

    def first_examples(self, count):
        """Return the rows of the first examples, at most `count`."""
        num_rows = int(np.searchsorted(self.example, count))
        stats = self.stats | {"fingerprint": f"{self.stats['fingerprint']}[:{num_rows}]"}
        documents = None if self.tokens.documents is None else self.tokens.documents[:num_rows]
        return LabelledRows(self.dataset.select(range(num_rows)), self.records, stats, self.name, documents)

    def rows_of_examples(self, examples):
        """Return the rows of some examples, one example after another."""
        return np.flatnonzero(np.isin(self.example, examples))

    def group_by_example(self, indices, values):
        """Return a dict of an example's index to the values of its rows, in the order of the rows."""
        groups = {}
        for example, value in zip(self.example[indices].tolist(), values, strict=True):
            groups.setdefault(example, []).append(value)
        return groups


def _chunks(column):
    """Return the numbers of an Arrow column, chunk by chunk and without a copy; those of lists flat."""
    is_list = pa.types.is_list(column.type)
    return [(chunk.flatten() if is_list else chunk).to_numpy() for chunk in column.chunks]


def load_rows(source, task, val_fraction=0.0):
    """Return the rows of a source, and those held out (None without val_fraction), tokenized or from the cache.

    Args:
        val_fraction: share of the examples to hold out.
    Raises:
        BadRowError: an example cannot be used, and skip_bad_rows is off.
    """
    key = ["labelled", 8, source_key(source), task.cache_key(), val_fraction, task.settings.splits_by_position]
    folder = cached_folder(key, lambda partial: _write_rows(source, task, val_fraction, partial))
    held_out = _open_rows(folder / "validation", f"the validation part of {source.name}") if val_fraction else None
    return _open_rows(folder / "train", source.name), held_out


def rows_in_memory(examples, task, name, skipped):
    """Return the rows of some examples without a cache, or None if none of them can be used.

    Args:
        skipped: list that receives the message of each example that is left out.
    """
    writer = _RowWriter(task, None, skipped)
    writer.add(examples)
    return writer.finish(name) if writer.lengths else None


def read_examples(source, task, skipped):
    """Yield the examples of a source, checked; `skipped` receives the message of each one that is left out."""
    for where, record in task.read_first(source):
        with task.skipping_bad_rows(skipped):
            yield task.parse(record, where)


def _write_rows(source, task, val_fraction, folder):
    skipped, positions, pending = [], {}, {}
    by_position = task.settings.splits_by_position
    keys = ((example.get("group"), text_hash(example["key"])) for example in read_examples(source, task, []))
    if task.is_split_by_context and val_fraction:
        keys = dict.fromkeys(keys)  # each context once
    hold_out = HoldOut(keys, val_fraction, by_position)
    writers = {"train": _RowWriter(task, folder / "train", skipped)}
    if val_fraction:
        writers["validation"] = _RowWriter(task, folder / "validation", skipped)
    for count, example in enumerate(read_examples(source, task, skipped)):
        position = positions.setdefault(example["key"], len(positions)) if task.is_split_by_context else count
        item = np.array([text_hash(example["key"])], dtype=np.uint64)
        part = "validation" if hold_out.choose(position, item, example.get("group"))[0] else "train"
        pending.setdefault(part, []).append(example)
        if len(pending[part]) == _BATCH:
            writers[part].add(pending.pop(part))
    for part, examples in pending.items():
        writers[part].add(examples)
    has_rows = [bool(writer.lengths) for writer in writers.values()]
    if any(has_rows) and not all(has_rows):
        few = f"{source.name} has too few rows to hold out {val_fraction:g} of them"
        raise InputError(f"{few}: give --val_file FILE, or --val_fraction 0")
    for writer in writers.values():
        writer.finish(source.name)


def _open_rows(folder, name):
    records = folder / "records.arrow"
    records = datasets.Dataset.from_file(str(records)) if records.exists() else None
    dataset = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    stats, documents = json.loads((folder / "stats.json").read_text()), np.load(folder / "documents.npy", mmap_mode="r")
    return LabelledRows(dataset, records, stats, name, documents)


class _RowWriter:
    """Tokenizes examples and writes their rows to Arrow files in a folder, or to memory if there is no folder."""

    def __init__(self, task, folder, skipped):
        self.task, self.folder, self.skipped = task, folder, skipped
        self.lengths, self.labels, self.num_examples = [], [], 0
        self.stats = {"cut": 0, "tokens": 0, "unknown": 0}
        tokenizer = task.tokenizer  # GPT-2 has one token for unknown text and for the end of a document
        self.unknown_id = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
        self.max_id, self.digest, self.records, self.documents = 0, hashlib.sha256(), [], []
        if folder is None:
            self.buffer = pa.BufferOutputStream()
            self.rows = ArrowWriter(stream=self.buffer, features=task.row_features())
        else:
            folder.mkdir()
            self.rows = ArrowWriter(path=str(folder / "rows.arrow"), features=task.row_features())

    def add(self, examples):
        """Write the rows of some examples, at most _BATCH."""
        rows = []
        for example, encoding in zip(examples, self.task.tokenize(examples) if examples else [], strict=True):
            with self.task.skipping_bad_rows(self.skipped):
                example_rows, is_cut = self.task.example_rows(example, encoding)
                rows += [row | {"example": self.num_examples} for row in example_rows]
                self.num_examples += 1
                self.stats["cut"] += is_cut
                self.task.update_stats(self.stats, example)
                if self.folder is None or self.task.record_features:
                    self.records.append(example["record"])
        for row in rows:
            ids = np.array(row["input_ids"], dtype=np.uint32)
            self.digest.update(ids)
            self.documents.append(document_digest(ids).digest())
            self.max_id = max(self.max_id, int(ids.max()))
            self.stats["tokens"] += len(ids)
            self.stats["unknown"] += int((ids == self.unknown_id).sum()) if self.unknown_id is not None else 0
            self.lengths.append(len(ids))
            self.labels.append(np.array(row["labels"]))
        if rows:
            self.rows.write_batch({name: [row[name] for row in rows] for name in rows[0]})

    def finish(self, name):
        """Close the files; in memory, return the [`LabelledRows`].

        Raises:
            InputError: there are no rows.
        """
        if not self.lengths:
            first = f": {self.skipped[0]}" if self.skipped else ""
            raise InputError(f"{name} has no rows that can be used{first}")
        self.rows.finalize(close_stream=self.folder is not None)
        labels = np.concatenate([np.atleast_1d(row_labels) for row_labels in self.labels])
        self.digest.update(np.cumsum([0, *self.lengths]))
        self.digest.update(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))
        stats = {"max_id": self.max_id, "fingerprint": self.digest.hexdigest(), "rows": len(self.lengths)}
        stats |= self.stats | {
            "examples": self.num_examples,
            "skipped": len(self.skipped),
            "skip_reasons": self.skipped[:3],
        }
        if self.folder is None:
            return LabelledRows(datasets.Dataset.from_buffer(self.buffer.getvalue()), self.records, stats, name)
        if self.task.record_features:
            writer = ArrowWriter(path=str(self.folder / "records.arrow"), features=self.task.record_features)
            for record in self.records:
                writer.write(record)
            writer.finalize()
        np.save(self.folder / "documents.npy", np.frombuffer(b"".join(self.documents), dtype=np.uint64))
        (self.folder / "stats.json").write_text(json.dumps(stats))
