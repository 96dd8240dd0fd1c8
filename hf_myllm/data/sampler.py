"""Which rows each step reads: computed from (seed, step), never stored and never carried along.

The rows of a run form one endless stream: epoch after epoch, each in an order of its own. Step s reads the positions
[s * total_batch_size, (s + 1) * total_batch_size) of that stream, whatever the number of processes; a step may begin
in one epoch and end in the next.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6


def derive_seed(*parts):
    """A 63-bit seed that is a pure function of the parts (numbers and text), for torch.manual_seed and the like."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffle(indices, size, seed, epoch):
    """Where a random permutation of range(size) puts these indices, in memory that does not depend on size.

    A Feistel network permutes the next power of four (Luby and Rackoff 1988), and an index that lands outside
    range(size) is sent through again until it lands inside, which keeps it a permutation (cycle walking: Black and
    Rogaway 2002). At most four tries are expected.

    Args:
        indices: int64 array with values in range(size).
    Returns:
        int64 array of the same shape.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)  # bits of each half
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(derive_seed(seed, epoch, "order", number)) for number in range(_ROUNDS)]
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
    """`count` random 64-bit numbers for each key, which depend on nothing else (SplitMix64, as [`_mix`]).

    Args:
        keys: (rows,) seeds, as [`derive_seed`] makes them.
    Returns:
        (rows, count) uint64.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(np.asarray(keys, dtype=np.uint64)[:, None] + steps)


def _mix(x):
    # the finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Sampler:
    """The order in which a run reads its rows.

    Args:
        num_rows: of all sources together, which are numbered one after another.
        total_rows: where the stream ends (epochs * num_rows), or None when only the number of steps ends the run.
        mixture: of several sources, (first row, number of rows, weight) of each; a weight is the share of the positions
            that the source gets, each time in an order of its own.
        is_streamed: whether each epoch has rows of its own, numbered on, as the windows of a stream have.
        lengths: called with row numbers, gives the length of each, where rows of like length are to come together;
            None where all are equal.
        group_steps: steps whose rows are sorted by length together.
    """

    num_rows: int
    total_batch_size: int
    seed: int
    total_rows: int | None = None
    mixture: tuple = ()
    is_streamed: bool = False
    lengths: object = None
    group_steps: int = 32

    def rows_of_step(self, step):
        """The rows that all processes together read at a step, counted from 0.

        Returns:
            int64 array of at most total_batch_size row numbers; fewer only at the end.
        """
        if self.lengths is None:
            return self._rows_at(step * self.total_batch_size, (step + 1) * self.total_batch_size)
        # rows of some steps sorted by length, and dealt out to these steps in random order
        group, place = divmod(step, self.group_steps)
        first = group * self.group_steps * self.total_batch_size
        rows = self._rows_at(first, first + self.group_steps * self.total_batch_size)
        rows = rows[np.argsort(self.lengths(rows), kind="stable")]
        steps = -(-len(rows) // self.total_batch_size)
        chunk = int(shuffle(np.array([place]), steps, self.seed, f"group {group}")[0])
        return rows[chunk * self.total_batch_size : (chunk + 1) * self.total_batch_size]

    def first_row(self, step):
        """The first row of those among which a step's are."""
        return step * self.total_batch_size // self.num_rows * self.num_rows if self.is_streamed else 0

    def _rows_at(self, start, stop):
        """The rows at these positions of the stream."""
        stop = stop if self.total_rows is None else min(stop, self.total_rows)
        positions = np.arange(start, stop, dtype=np.int64)
        if not self.mixture:
            rows = _reshuffled(positions, self.num_rows, self.seed)
            return rows + positions // self.num_rows * self.num_rows if self.is_streamed else rows
        rows = np.empty_like(positions)
        left = sum(weight for _, _, weight in self.mixture)
        places, at = np.arange(len(positions)), positions
        for number, (first, count, weight) in enumerate(self.mixture):
            # of each stretch of positions, this source gets weight / left, and those after it the rest: its k-th is
            # where k first reaches that share, which is found without counting
            before = at * weight // left
            is_mine = (at + 1) * weight // left > before
            rows[places[is_mine]] = first + _reshuffled(before[is_mine], count, derive_seed(self.seed, number))
            places, at, left = places[~is_mine], (at - before)[~is_mine], left - weight
        return rows


def _reshuffled(positions, num_rows, seed):
    """The rows of one source at these positions of its own endless stream."""
    epochs, indices = np.divmod(positions, num_rows)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = shuffle(indices[epochs == epoch], num_rows, seed, int(epoch))
    return indices


def integer_weights(weights):
    """Weights of any unit as whole numbers that add up to about a million, small enough for exact arithmetic on any
    position below 10^12."""
    return [max(1, round(weight / sum(weights) * 1_000_000)) for weight in weights]


def rows_digest(rows):
    """A number that tells sets of rows apart, whatever their order; those of a set's parts add up to the whole's."""
    return int((_mix(np.asarray(rows, dtype=np.uint64) + np.uint64(1)) >> np.uint64(40)).sum())


def micro_batches(rows, batch_size, rank, world_size, accumulation):
    """This process's share of a step's rows, a list of (offset in the step, rows) per micro-batch.

    The offset of a micro-batch's first row, and so everything derived from it, does not depend on how many processes
    share the step. A share is shorter than batch_size, or empty, where the rows run out.
    """
    shares = []
    for micro in range(accumulation):
        offset = (micro * world_size + rank) * batch_size
        shares.append((offset, rows[offset : offset + batch_size]))
    return shares


def evenly_spaced(count, num_rows):
    """`count` rows evenly spread over num_rows (all of them when there are no more), for an evaluation."""
    if count is None or count >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.arange(count, dtype=np.int64) * num_rows // count
