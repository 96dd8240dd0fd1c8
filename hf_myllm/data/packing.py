"""Tokens into rows.

[`StridedRows`]: row k starts at token k * stride and has a fixed length, across the ends of documents. No token is
lost: the last row starts earlier so that it is full, and its repeated targets are left out.
[`DocumentRows`]: each row is one whole document, or several that fit, with padding.
[`SentencePassages`]: each row is a piece of one document, for pairs of sentences.

All have `tokens`, `name`, a length in rows, `source_starts` (the first row of each source), `lengths` (a function from
row numbers to row lengths; None if all are equal) and `num_used_tokens()`, how many tokens are targets or in a row.
"""

import bisect

import numpy as np

from ..errors import DataError


class StridedRows:
    """A token stream cut into rows of equal length.

    Args:
        tokens: a [`TokenStream`].
        length: positions per row that predict something.
        stride: tokens from one row's start to the next; smaller than length, rows overlap; larger, tokens are skipped.
        name: what to call the data in messages.
        ahead: how many tokens to read beyond them: 1 where each position predicts the next token, 0 where its own.

    Raises:
        DataError: there are not enough tokens for one row.
    """

    def __init__(self, tokens, length, stride, name, ahead=1):
        if len(tokens) < length + ahead:
            raise DataError(
                f"{name} has {len(tokens)} tokens, fewer than one row of {length}{' and the token after' * ahead}; "
                "give more text (of a part held out, a --val_file or a larger --val_fraction) or a smaller max_len"
            )
        self.tokens, self.length, self.stride, self.name, self.ahead = tokens, length, stride, name, ahead
        self.last_start = len(tokens) - ahead - length
        self.num_rows = -(-self.last_start // stride) + 1
        if stride > length:  # what would be a last row's new part may lie in a gap
            self.num_rows = (len(tokens) - ahead - 1) // stride + 1
        self.source_starts = [min(-(-start // stride), self.num_rows - 1) for start in tokens.source_starts]

    lengths = None

    def num_used_tokens(self):
        if self.stride <= self.length:
            return len(self.tokens) - self.ahead
        whole = (self.num_rows - 1) * self.length  # with gaps between rows
        return whole + min(self.length, len(self.tokens) - self.ahead - (self.num_rows - 1) * self.stride)

    def __len__(self):
        return self.num_rows

    def read(self, rows):
        """The windows of some rows.

        Returns:
            windows: (rows, length + ahead) int64 token ids.
            first: (rows,) int64, how many targets at the start of a row do not count, because it reaches back.
        """
        windows = np.empty((len(rows), self.length + self.ahead), dtype=np.int64)
        starts = np.asarray(rows, dtype=np.int64) * self.stride
        first = np.maximum(starts - self.last_start, 0)
        for window, start in zip(windows, starts - first, strict=True):
            window[:] = self.tokens.read(int(start), self.length + self.ahead)
        return windows, first


class DocumentRows:
    """Rows of one or more whole documents; a document longer than a row is cut.

    Args:
        tokens: a [`TokenStream`].
        spans: (spans, 2) int64, where each document, or piece of one, starts and stops, in the order of the rows.
        first: (rows + 1,) int64, the first span of each row, and the number of spans.
        edges: how many positions of a row each span takes beyond its tokens.
        name: what to call the data in messages.
        source_starts: the first row of each source.

    Raises:
        DataError: there is no document.
    """

    loss_mask = None  # of each token, where not all are targets

    def __init__(self, tokens, spans, first, edges, name, source_starts=(0,)):
        if len(spans) == 0:
            raise DataError(f"{name} has no document in its {len(tokens)} tokens; give more text")
        self.tokens, self.spans, self.first, self.edges, self.name = tokens, spans, first, edges, name
        self.source_starts = list(source_starts)
        self.lengths = self._lengths if len(self) == len(spans) else None

    def __len__(self):
        return len(self.first) - 1

    def num_used_tokens(self):
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def _lengths(self, rows):
        return self.spans[rows, 1] - self.spans[rows, 0] + self.edges

    def read(self, row):
        """Where the documents of a row start and stop."""
        return [(int(a), int(b)) for a, b in self.spans[int(self.first[row]) : int(self.first[row + 1])]]


def split_spans(spans, length):
    """Spans of at most `length` tokens, in the order of the text."""
    counts = -(-(spans[:, 1] - spans[:, 0]) // length)
    owner = np.repeat(np.arange(len(spans)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = spans[owner, 0] + number * length
    return np.stack([starts, np.minimum(starts + length, spans[owner, 1])], axis=1)


def group_offsets(row_of):
    """Where each row begins, and where the last ends, in a sorted array of row numbers."""
    return np.append(np.flatnonzero(np.diff(row_of, prepend=-1)), len(row_of))


def best_fit(lengths, room):
    """Which row each of some documents goes into: the longest first, each into the row that it fills best (best-fit
    decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

    Args:
        lengths: (documents,) int64, none above `room`.
    Returns:
        (documents,) int64, row numbers from 0.
    """
    rows_with = [[] for _ in range(room + 1)]  # by how much room they have left
    open_sizes = []  # those that some row has, sorted
    row_of = np.empty(len(lengths), dtype=np.int64)
    count = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(open_sizes, length)
        if place < len(open_sizes):
            left = open_sizes[place]
            row = rows_with[left].pop()
            if not rows_with[left]:
                open_sizes.pop(place)
        else:
            row, left, count = count, room, count + 1
        row_of[document] = row
        if left := left - length:
            if not rows_with[left]:
                bisect.insort(open_sizes, left)
            rows_with[left].append(row)
    return row_of


class SentencePassages:
    """A token stream cut into passages, each of one document: a document longer than `length` into equal parts.

    Args:
        tokens: a [`TokenStream`].
        documents: (documents, 2) int64, where each document starts and stops, as [`corpus.find_documents`] gives it.
        length: tokens per passage, at most.
        name: what to call the data in messages.

    Raises:
        DataError: there are fewer than two documents.
    """

    def __init__(self, tokens, documents, length, name):
        if len(documents) < 2:
            raise DataError(
                f"{name} is one document, and pairs of sentences need a second to take some from: give more files, "
                "lines as documents (--document line) or a larger val_fraction, or learn without pairs (--task mlm)"
            )
        self.tokens, self.documents, self.length, self.name = tokens, documents, length, name
        counts = -(-(documents[:, 1] - documents[:, 0]) // length)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # the first passage of each document
        self.source_starts = self.first[np.searchsorted(documents[:, 0], tokens.source_starts)].tolist()

    lengths = None

    def num_used_tokens(self):
        return int((self.documents[:, 1] - self.documents[:, 0]).sum())

    def __len__(self):
        return int(self.first[-1])

    def document_of(self, number):
        return int(np.searchsorted(self.first, number, side="right")) - 1

    def read(self, number):
        """The tokens of a passage, int64."""
        document = self.document_of(number)
        start, stop = (int(place) for place in self.documents[document])
        parts, part = int(self.first[document + 1] - self.first[document]), number - int(self.first[document])
        low, high = (start + (stop - start) * edge // parts for edge in (part, part + 1))
        return self.tokens.read(low, high - low).astype(np.int64)
