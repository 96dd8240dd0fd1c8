"""Rows of a token stream.

[`StridedRows`]: rows of a fixed length at a fixed stride, across the ends of documents.
[`DocumentRows`]: each row is one whole document, or as many as fit.
[`SentencePassages`]: each row is a part of one document, for pairs of sentences.

Each has `tokens` (a [`TokenStream`]), `name` (of the data, for messages), `len()`, `source_starts` (the first row of
each source), `lengths` (a function from row numbers to row lengths; None if all are equal) and `num_used_tokens()` (the
tokens that are targets or inputs of some row). [`streaming.StreamedRows`] has all but num_used_tokens.
"""

import bisect

import numpy as np

from ..errors import DataError
from .cache import cached_folder


class StridedRows:
    """Rows of equal length; row k starts at token k * stride.

    No token is lost: the last row starts earlier if it would not be full, and its repeated targets do not count.

    Args:
        length: predictions per row.
        stride: tokens between the starts of two rows: rows overlap if it is below length, and skip tokens if above.
        ahead: tokens read after a row's positions: 1 if each position predicts the next token, 0 if its own.
    Raises:
        DataError: there are too few tokens for one row.
    """

    lengths = None

    def __init__(self, tokens, length, stride, name, ahead=1):
        if len(tokens) < length + ahead:
            raise DataError(
                f"{name} has {len(tokens)} tokens, fewer than one row of {length}{' and the token after' * ahead}; "
                "give more text (of a part held out, a --val_file or a larger --val_fraction) or a smaller max_len"
            )
        if length < stride >= len(tokens):
            raise DataError(f"stride {stride} is beyond the {len(tokens)} tokens of {name}; lower it")
        self.tokens, self.length, self.stride, self.name, self.ahead = tokens, length, stride, name, ahead
        self.last_start = len(tokens) - ahead - length
        self.num_rows = -(-self.last_start // stride) + 1
        if stride > length:  # the tokens after the last full row may all lie in a gap
            self.num_rows = (len(tokens) - ahead - 1) // stride + 1
        self.source_starts = [min(-(-start // stride), self.num_rows - 1) for start in tokens.source_starts]

    def __len__(self):
        return self.num_rows

    def num_used_tokens(self):
        num_targets = len(self.tokens) - self.ahead
        if self.stride <= self.length:
            return num_targets
        last_row = self.num_rows - 1
        return last_row * self.length + min(self.length, num_targets - last_row * self.stride)

    def read(self, rows):
        """Read some rows.

        Returns:
            windows: (rows, length + ahead) int64 token ids.
            first: (rows,) int64, the first target of each row that counts; above 0 for a last row that starts earlier.
        """
        windows = np.empty((len(rows), self.length + self.ahead), dtype=np.int64)
        starts = np.asarray(rows, dtype=np.int64) * self.stride
        first = np.maximum(starts - self.last_start, 0)
        for window, start in zip(windows, starts - first, strict=True):
            window[:] = self.tokens.read(int(start), self.length + self.ahead)
        return windows, first


class DocumentRows:
    """Rows of one or more whole documents; a document longer than a row is split.

    Args:
        spans: (spans, 2) int64, where each document, or part of one, starts and stops, in the order of the rows.
        first: (rows + 1,) int64, the first span of each row, and the number of spans.
        num_special: positions that each span takes in a row beyond its tokens.
        loss_mask: a [`TokenStream`] of 0 and 1, which tokens are targets; None: all.
    Raises:
        DataError: there is no document.
    """

    def __init__(self, tokens, spans, first, num_special, name, source_starts=(0,), loss_mask=None):
        if len(spans) == 0:
            raise DataError(f"{name} has no document in its {len(tokens)} tokens; give more text")
        self.tokens, self.spans, self.first, self.num_special, self.name = tokens, spans, first, num_special, name
        self.source_starts, self.loss_mask = list(source_starts), loss_mask
        self.lengths = self._lengths if len(self) == len(spans) else None

    def __len__(self):
        return len(self.first) - 1

    def num_used_tokens(self):
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def _lengths(self, rows):
        return self.spans[rows, 1] - self.spans[rows, 0] + self.num_special

    def read(self, row):
        """Return the (start, stop) positions of the documents of a row."""
        return [(int(start), int(stop)) for start, stop in self.spans[int(self.first[row]) : int(self.first[row + 1])]]


class SentencePassages:
    """Passages of one document each; a document longer than `length` is split into equal parts.

    Args:
        separators: the token ids that stand between documents.
        length: tokens per passage, at most.
        documents, max_rows: use the first of these documents, with at most so many passages.
    Raises:
        DataError: there are fewer than two documents.
    """

    lengths = None

    def __init__(self, tokens, separators, length, name, documents=None, max_rows=None):
        documents = find_documents(tokens, separators) if documents is None else documents
        counts = -(-(documents[:, 1] - documents[:, 0]) // length)
        if max_rows:
            num_documents = max(2, np.searchsorted(np.cumsum(counts), max_rows, side="right"))
            documents, counts = documents[:num_documents], counts[:num_documents]
        if len(documents) < 2:
            raise DataError(
                f"{name} is one document, and pairs of sentences need a second to take some from: give more files, "
                "lines as documents (--document line) or a larger val_fraction, or learn without pairs (--task mlm)"
            )
        self.tokens, self.documents, self.length, self.name = tokens, documents, length, name
        self.first = np.concatenate([[0], np.cumsum(counts)])  # the first passage of each document
        self.source_starts = self.first[np.searchsorted(documents[:, 0], tokens.source_starts)].tolist()

    def __len__(self):
        return int(self.first[-1])

    def num_used_tokens(self):
        return int((self.documents[:, 1] - self.documents[:, 0]).sum())

    def document_of(self, row):
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def read(self, row):
        """Return the token ids of a passage, int64."""
        document = self.document_of(row)
        first, num_parts = int(self.first[document]), int(self.first[document + 1] - self.first[document])
        start, stop = map(int, self.documents[document])
        low, high = (start + (stop - start) * part // num_parts for part in (row - first, row - first + 1))
        return self.tokens.read(low, high - low).astype(np.int64)


def first_rows(rows, count):
    """Return the first rows of some rows, at most `count`. Those of several sources, of which each has its share of the
    tokens, are more where documents are shorter than a row."""
    if len(rows) <= count:
        return rows
    if len(rows.source_starts) > 1:
        rows.num_rows = min(count, len(rows))  # of StridedRows
        return rows
    if isinstance(rows, StridedRows):
        tokens, _ = rows.tokens.split((count - 1) * rows.stride + rows.length + rows.ahead)
        return StridedRows(tokens, rows.length, rows.stride, rows.name, rows.ahead)
    if isinstance(rows, DocumentRows):
        first = rows.first[: count + 1]
        spans = rows.spans[: int(first[-1])]
        return DocumentRows(rows.tokens, spans, first, rows.num_special, rows.name, (0,), rows.loss_mask)
    return SentencePassages(rows.tokens, None, rows.length, rows.name, rows.documents, count)


def find_documents(tokens, separators):
    """Return where each document of a stream starts and stops, memory-mapped from the cache.

    Args:
        separators: the token ids that stand between documents.
    Returns:
        (documents, 2) int64; a document without tokens is left out.
    """

    def find(folder):
        positions = [np.flatnonzero(np.isin(ids, separators)) + start for start, ids in tokens.blocks()]
        starts, stops = np.concatenate([[-1], *positions]) + 1, np.concatenate([*positions, [len(tokens)]])
        spans = np.stack([starts, stops], axis=1)
        np.save(folder / "documents.npy", spans[starts < stops])

    folder = cached_folder(["documents", tokens.fingerprint, list(separators)], find)
    return np.load(folder / "documents.npy", mmap_mode="r")


def pack_documents(tokens, name, separators, length, num_special, is_packed, ahead):
    """Return the documents of a stream as [`DocumentRows`], memory-mapped from the cache.

    Args:
        separators: the token ids that stand between documents.
        length: positions per row.
        num_special: positions that each document takes in a row beyond its tokens.
        is_packed: whether a row holds as many documents as fit, instead of one.
        ahead: 1 if the tokens are targets: the separator after a document is one, the first token of the stream is not.
    """

    def pack(folder):
        documents = np.array(find_documents(tokens, separators))
        if ahead:
            documents = np.stack([np.maximum(documents[:, 0], 1), np.minimum(documents[:, 1] + 1, len(tokens))], axis=1)
            documents = documents[documents[:, 0] < documents[:, 1]]
        spans = split_spans(documents, length - num_special)
        sources = np.searchsorted(tokens.source_starts, spans[:, 0], side="right") - 1  # of each span
        rows, num_rows = np.arange(len(spans)), 0
        for source in np.unique(sources) if is_packed else ():  # a row has documents of one source only
            indices = np.flatnonzero(sources == source)
            row_of = best_fit(spans[indices, 1] - spans[indices, 0] + num_special, length)
            order = np.argsort(row_of, kind="stable")
            spans[indices], rows[indices] = spans[indices[order]], row_of[order] + num_rows
            num_rows += int(row_of.max()) + 1
        first = group_offsets(rows)
        np.save(folder / "spans.npy", spans)
        np.save(folder / "first.npy", first)
        starts = np.searchsorted(first, np.searchsorted(sources, np.arange(len(tokens.source_starts))))
        np.save(folder / "source_starts.npy", starts)

    key = ["spans", tokens.fingerprint, list(separators), length, num_special, is_packed, ahead]
    folder = cached_folder(key, pack)
    names = ("spans", "first", "source_starts")
    spans, first, starts = (np.load(folder / f"{array}.npy", mmap_mode="r") for array in names)
    return DocumentRows(tokens, spans, first, num_special, name, starts)


def split_spans(spans, length):
    """Split spans into spans of at most `length` tokens, in the order of the text."""
    counts = -(-(spans[:, 1] - spans[:, 0]) // length)
    owners = np.repeat(np.arange(len(spans)), counts)
    parts = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = spans[owners, 0] + parts * length
    return np.stack([starts, np.minimum(starts + length, spans[owners, 1])], axis=1)


def group_offsets(row_of):
    """Return where each row begins in a sorted array of row numbers, and the length of the array."""
    return np.append(np.flatnonzero(np.diff(row_of, prepend=-1)), len(row_of))


def best_fit(lengths, capacity):
    """Assign documents to rows, the longest first, each to the row with the least room that it fits in.

    This is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

    Args:
        lengths: (documents,) int64, none above `capacity`.
        capacity: positions per row.
    Returns:
        (documents,) int64, row numbers from 0.
    """
    rows_by_room = [[] for _ in range(capacity + 1)]
    rooms = []  # those that at least one row has, sorted
    row_of = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        index = bisect.bisect_left(rooms, length)
        if index < len(rooms):
            room = rooms[index]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms.pop(index)
        else:
            row, room, num_rows = num_rows, capacity, num_rows + 1
        row_of[document] = row
        if room := room - length:
            if not rows_by_room[room]:
                bisect.insort(rooms, room)
            rows_by_room[room].append(row)
    return row_of
