"""Which source of a mixture each position of a run reads: a pure function of the position, with no state.

The positions of a run are divided into stages, in each of which every source has a weight. A stage begins where the
recipe says, or where a source is used up and leaves its share to the others. Within a stage, of the positions that the
sources before it left, a source takes every one at which its share of the count reaches the next integer. So the number
of rows that a source has read before any position is known without counting, and with it the row that comes next.
"""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
    first: int  # position
    weights: tuple  # of each source, integers; 0: it is not read
    taken: tuple  # rows of each source that were read before


class Mixture:
    """A plan of which source each position reads.

    Args:
        parts: (first row, number of rows) of each source.
        schedule: (first position, weight of each source) of each stage of the recipe; the first one begins at 0.
        limits: the number of rows that are read of each source at most; None: no limit.
    Attributes:
        end: the position at which all sources are used up; None: never.
    Raises:
        ValueError: a stage has no source left; the arguments are its first position and that of the next stage.
    """

    def __init__(self, parts, schedule, limits=None):
        self.parts, self.end = tuple(parts), None
        limits, taken, self.stages = limits or [None] * len(self.parts), (0,) * len(self.parts), []
        following = [first for first, _ in schedule[1:]] + [None]
        for (first, weights), after in zip(schedule, following, strict=True):
            weights = integer_weights(weights)
            while after is None or first < after:
                used_up = [limit is not None and count >= limit for count, limit in zip(taken, limits, strict=True)]
                left = tuple(0 if is_out else weight for weight, is_out in zip(weights, used_up, strict=True))
                if not any(left):
                    if after is not None:
                        raise ValueError(first, after)
                    self.end = first
                    return
                self.stages.append(Stage(first, left, taken))
                lengths = [
                    _find_position(left, i, limit - taken[i])
                    for i, limit in enumerate(limits)
                    if limit is not None and left[i]
                ]
                if after is not None:
                    lengths.append(after - first)
                if not lengths:
                    return
                taken = tuple(a + b for a, b in zip(taken, _counts(left, min(lengths)), strict=True))
                first += min(lengths)

    def rows_before(self, position):
        """Return how many rows of each source are read before a position."""
        stage = next(stage for stage in reversed(self.stages) if stage.first <= position)
        counts = _counts(stage.weights, position - stage.first)
        return [a + b for a, b in zip(stage.taken, counts, strict=True)]

    def split(self, positions):
        """Yield (source, indices, rows read before) for positions in order: which of them read a source, and the number
        of rows of that source that are read before each."""
        firsts = [stage.first for stage in self.stages]
        stages = np.searchsorted(firsts, positions, side="right") - 1
        for number in np.unique(stages):
            stage, indices = self.stages[number], np.flatnonzero(stages == number)
            left, total = positions[indices] - stage.first, sum(stage.weights)
            for source, weight in enumerate(stage.weights):
                if weight:
                    taken = left * weight // total
                    mine = (left + 1) * weight // total > taken
                    yield source, indices[mine], stage.taken[source] + taken[mine]
                    indices, left, total = indices[~mine], (left - taken)[~mine], total - weight


def _counts(weights, length):
    """Return how many of the first `length` positions of a stage each source takes."""
    counts, total = [], sum(weights)
    for weight in weights:
        counts.append(length * weight // total if weight else 0)
        length, total = length - counts[-1], total - weight
    return counts


def _find_position(weights, source, count):
    """Return the first position of a stage before which a source takes `count` rows."""
    low, high = 0, 1
    while _counts(weights, high)[source] < count:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _counts(weights, middle)[source] < count else (low, middle)
    return low


def integer_weights(weights):
    """Scale weights to integers that sum to about a million: exact in int64 arithmetic for positions below 10^12."""
    return [max(1, round(weight / sum(weights) * 1_000_000)) if weight else 0 for weight in weights]
