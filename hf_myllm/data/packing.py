"""Tokens into rows.

[`Rows`]: row k starts at token k * stride and goes on for a fixed length, over the ends of documents. No token is lost:
the last row reaches back so that it is full, and leaves out the targets that it would not have had in its own place.
[`Passages`]: each row is a piece of one document.
"""

import numpy as np

from ..errors import InputError


class Rows:
    """A token stream cut into rows of equal length.

    Args:
        tokens: a [`Tokens`].
        length: positions per row that predict something.
        stride: tokens from one row's start to the next; smaller than length, rows overlap; larger, tokens are skipped.
        name: what to call the data in messages.
        ahead: how many tokens to read beyond them: 1 where each position predicts the next token, 0 where its own.

    Raises:
        InputError: there are not enough tokens for one row.
    """

    def __init__(self, tokens, length, stride, name, ahead=1):
        if len(tokens) < length + ahead:
            raise InputError(
                f"{name} has {len(tokens)} tokens, fewer than one row of {length}{' and the token after' * ahead}; "
                "give more text or a smaller max_len"
            )
        self.tokens, self.length, self.stride, self.name, self.ahead = tokens, length, stride, name, ahead
        self.last_start = len(tokens) - ahead - length
        self.num_rows = -(-self.last_start // stride) + 1
        if stride > length:  # what would be a last row's new part may lie in a gap
            self.num_rows = (len(tokens) - ahead - 1) // stride + 1

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


class Passages:
    """A token stream cut into passages, each of one document: a document longer than `length` into equal parts.

    Args:
        tokens: a [`Tokens`].
        documents: (documents, 2) int64, where each document starts and stops, as [`corpus.find_documents`] gives it.
        length: tokens per passage, at most.
        name: what to call the data in messages.

    Raises:
        InputError: there are fewer than two documents.
    """

    def __init__(self, tokens, documents, length, name):
        if len(documents) < 2:
            raise InputError(
                f"{name} is one document, and pairs of sentences need a second to take some from: give more files, "
                "lines as documents (--document line) or a larger val_fraction, or learn without pairs (--task mlm)"
            )
        self.tokens, self.documents, self.length, self.name = tokens, documents, length, name
        counts = -(-(documents[:, 1] - documents[:, 0]) // length)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # the first passage of each document

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
