"""Which rows each step reads: computed from (seed, step), never stored and never carried along.

The rows of a run form one endless stream: epoch after epoch, each in an order of its own. Step s reads the positions
[s * total_batch_size, (s + 1) * total_batch_size) of that stream, whatever the number of processes; a step may begin
in one epoch and end in the next.
"""

import hashlib

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


def random_numbers(keys, count):
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


def rows_of_step(step, total_batch_size, num_rows, last_position, seed):
    """The rows that all processes together read at a step.

    Args:
        step: counted from 0.
        last_position: where the stream ends (epochs * num_rows), or None when only the number of steps ends the run.
    Returns:
        int64 array of at most total_batch_size row numbers; fewer only in the last step.
    """
    start = step * total_batch_size
    stop = start + total_batch_size
    positions = np.arange(start, stop if last_position is None else min(stop, last_position), dtype=np.int64)
    epochs, indices = np.divmod(positions, num_rows)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = shuffle(indices[epochs == epoch], num_rows, seed, int(epoch))
    return indices


def digest(rows):
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


def spread(count, num_rows):
    """`count` rows evenly spread over num_rows (all of them when there are no more), for an evaluation."""
    if count is None or count >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.arange(count, dtype=np.int64) * num_rows // count
