"""Which rows each step reads: a pure function of (seed, step), with no state.

The rows of a run form one endless stream, epoch after epoch, each epoch in its own random order. Step s reads positions
[s * total_batch_size, (s + 1) * total_batch_size) of that stream, on any number of ranks. A step may begin in one epoch
and end in the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..seeds import derive_seed
from .mixture import Mixture

_FEISTEL_ROUNDS = 6


def shuffle(indices, size, seed, epoch):
    """Apply a random permutation of range(size) to indices, in memory that does not depend on size.

    A Feistel network permutes the next power of four (Luby and Rackoff 1988). An index that lands outside range(size)
    goes through it again until it lands inside, so the result is a permutation (cycle walking: Black and Rogaway 2002).
    The expected number of passes is at most four.

    Args:
        indices: int64 array with values in range(size).
    Returns:
        int64 array of the same shape.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)  # bits of each half
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(derive_seed(seed, epoch, "order", i)) for i in range(_FEISTEL_ROUNDS)]
    values = np.array(indices, dtype=np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def random_uint64(keys, count):
    """Return `count` random 64-bit integers for each key, a pure function of the key (SplitMix64).

    Args:
        keys: (rows,) seeds, as returned by [`derive_seed`].
    Returns:
        (rows, count) uint64.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(np.asarray(keys, dtype=np.uint64)[:, None] + steps)


def _mix(x):
    # the finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Sampler:
    """Map each step of a run to the rows of its global batch.

    Args:
        num_rows: rows of all sources together, numbered one source after another.
        total_rows: rows that the run reads (epochs * num_rows); None if only the number of steps ends the run.
        mixture: the [`Mixture`] of several sources, each of which is shuffled on its own; None for a single one.
        is_streamed: whether each epoch has new rows with new numbers, as the windows of a stream have. Row k of source
            i of n sources then has the number k * n + i.
        lengths: a function from row numbers to their lengths, or to other keys that sort rows of similar length
            together, to batch them; None if all are equally long.
        group_steps: the number of steps over which rows are sorted by length.
    """

    num_rows: int
    total_batch_size: int
    seed: int
    total_rows: int | None = None
    mixture: Mixture | None = None
    is_streamed: bool = False
    lengths: Callable | None = None
    group_steps: int = 32
    _last_group: dict = field(default_factory=dict, compare=False, repr=False)  # its sorted rows, for its other steps

    def rows_of_step(self, step):
        """Return the rows that all ranks together read at a step, counted from 0.

        Returns:
            int64 array of total_batch_size row numbers; fewer at the end of the run.
        """
        if self.lengths is None:
            return self._rows_at(step * self.total_batch_size, (step + 1) * self.total_batch_size)
        # sort the rows of a group of steps by length, split them into batches, and give each step a random batch
        group, index = divmod(step, self.group_steps)
        if group not in self._last_group:
            self._last_group.clear()
            group_size = self.group_steps * self.total_batch_size
            rows = self._rows_at(group * group_size, (group + 1) * group_size)
            self._last_group[group] = rows[np.argsort(self.lengths(rows), kind="stable")]
        rows = self._last_group[group]
        num_batches = -(-len(rows) // self.total_batch_size)
        batch = int(shuffle(np.array([index]), num_batches, self.seed, f"group {group}")[0])
        return rows[batch * self.total_batch_size : (batch + 1) * self.total_batch_size]

    def windows(self, step):
        """Return the window of each source that the first row of a step is in, if the sources are streamed."""
        position = step * self.total_batch_size
        if self.mixture is None:
            return np.array([position // self.num_rows])
        return np.array(self.mixture.rows_before(position)) // self.mixture.parts[0][1]

    def current_rows(self, rows, step):
        """Return the numbers at a step of rows that are counted from 0 in each epoch: of a stream, in its windows."""
        if not self.is_streamed:
            return rows
        windows = self.windows(step)
        return rows + windows[rows % len(windows)] * self.num_rows

    def _rows_at(self, start, stop):
        """Return the rows at positions [start, stop) of the stream."""
        stop = stop if self.total_rows is None else min(stop, self.total_rows)
        positions = np.arange(start, stop, dtype=np.int64)
        if self.mixture is None:
            rows = _shuffled_rows(positions, self.num_rows, self.seed)
            return rows + positions // self.num_rows * self.num_rows if self.is_streamed else rows
        rows, num_sources = np.empty_like(positions), len(self.mixture.parts)
        for source, indices, taken in self.mixture.split(positions):
            first, num_rows = self.mixture.parts[source]
            own = _shuffled_rows(taken, num_rows, derive_seed(self.seed, source))
            if self.is_streamed:
                own = (own + taken // num_rows * num_rows) * num_sources
            rows[indices] = first + own
        return rows


def _shuffled_rows(positions, num_rows, seed):
    """Return the rows of one source at positions of its own endless stream, which are in order."""
    epochs, indices = np.divmod(positions, num_rows)
    for part in np.split(np.arange(len(epochs)), np.flatnonzero(np.diff(epochs)) + 1):
        if len(part):
            indices[part] = shuffle(indices[part], num_rows, seed, int(epochs[part[0]]))
    return indices


def rows_digest(rows):
    """Return a number that identifies a set of rows in any order; digests of disjoint sets add up to their union's."""
    return int((_mix(np.asarray(rows, dtype=np.uint64) + np.uint64(1)) >> np.uint64(40)).sum())


def micro_batches(rows, batch_size, rank, world_size, accumulation):
    """Return one rank's share of a step's rows as (offset in the step, rows) per micro-batch.

    The offset of a micro-batch's first row, and so everything derived from it, does not depend on how many ranks share
    the step. A micro-batch is shorter than batch_size, or empty, where the rows run out.
    """
    offsets = [(step * world_size + rank) * batch_size for step in range(accumulation)]
    return [(offset, rows[offset : offset + batch_size]) for offset in offsets]


def evenly_spaced(count, num_rows):
    """Return `count` rows evenly spaced over num_rows, or all rows if there are no more, for an evaluation."""
    if count is None or count >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.arange(count, dtype=np.int64) * num_rows // count
