"""Tokens into rows.

Row k starts at token k * stride and holds max_len inputs and the token after each, its target. No token is lost: the
last row reaches back so that it is full, and leaves out the targets that it would not have had in its own place.
"""

import numpy as np

from ..errors import InputError


class Rows:
    """A token stream cut into rows of equal length.

    Args:
        tokens: a [`Tokens`].
        max_len: inputs per row.
        stride: tokens from one row's start to the next; smaller than max_len, rows overlap; larger, tokens are skipped.
        name: what to call the data in messages.

    Raises:
        InputError: there are not enough tokens for one row.
    """

    def __init__(self, tokens, max_len, stride, name):
        if len(tokens) < max_len + 1:
            raise InputError(
                f"{name} has {len(tokens)} tokens, fewer than one row: max_len {max_len} inputs and the token after "
                f"the last; give more text or a smaller max_len"
            )
        self.tokens, self.max_len, self.stride, self.name = tokens, max_len, stride, name
        self.last_start = len(tokens) - 1 - max_len
        self.num_rows = -(-self.last_start // stride) + 1
        if stride > max_len:  # what would be a last row's new part may lie in a gap
            self.num_rows = (len(tokens) - 2) // stride + 1

    def __len__(self):
        return self.num_rows

    def read(self, rows):
        """The windows of some rows.

        Returns:
            windows: (rows, max_len + 1) int64 token ids; inputs are [:, :-1] and targets [:, 1:].
            first: (rows,) int64, how many targets at the start of a row do not count, because it reaches back.
        """
        windows = np.empty((len(rows), self.max_len + 1), dtype=np.int64)
        starts = np.asarray(rows, dtype=np.int64) * self.stride
        first = np.maximum(starts - self.last_start, 0)
        for window, start in zip(windows, starts - first, strict=True):
            window[:] = self.tokens.read(int(start), self.max_len + 1)
        return windows, first
