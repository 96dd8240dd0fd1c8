"""The rows of a step are a pure function of (seed, step), a permutation each epoch, at the same cost for any step."""

import tracemalloc

import numpy as np
import pytest

from hf_myllm.data.mixture import Mixture, integer_weights
from hf_myllm.data.sampler import Sampler, derive_seed, evenly_spaced, micro_batches, shuffle


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_shuffle_is_a_permutation(size):
    indices = np.arange(size)
    first, second = shuffle(indices, size, 1, 0), shuffle(indices, size, 1, 1)
    assert sorted(first) == sorted(second) == list(range(size))
    if size >= 16:
        assert not np.array_equal(first, indices)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, shuffle(indices, size, 2, 0))


def test_shuffle_looks_random():
    # the correlations of position and row, and of neighbors, are within four standard deviations of zero
    size = 20_000
    shuffled = shuffle(np.arange(size), size, 7, 0)
    limit = 4 / size**0.5
    assert abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < limit
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < limit
    # about one fixed point is expected, and few neighbors stay neighbors
    assert (shuffled == np.arange(size)).sum() < 10
    assert (np.diff(shuffled) == 1).sum() < 10


def test_single_indices_are_shuffled_as_in_the_whole_range():
    shuffled = shuffle(np.arange(1000), 1000, 3, 2)
    assert [int(shuffle(np.array([i]), 1000, 3, 2)[0]) for i in range(0, 1000, 97)] == shuffled[::97].tolist()


def test_memory_does_not_grow_with_the_corpus():
    Sampler(10**3, 512, 1).rows_of_step(0)
    tracemalloc.start()
    rows = Sampler(10**13, 512, 1).rows_of_step(10**9)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert rows.min() >= 0
    assert rows.max() < 10**13
    assert len(set(rows.tolist())) == 512


def test_steps_read_each_row_once_per_epoch_across_epoch_ends():
    rows = np.concatenate([Sampler(21, 8, 5, 63).rows_of_step(step) for step in range(8)])
    assert len(rows) == 63
    for epoch in range(3):
        assert sorted(rows[21 * epoch : 21 * (epoch + 1)]) == list(range(21))
    assert len(Sampler(21, 8, 5, 63).rows_of_step(7)) == 7  # the last step has the rest


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_ranks_share_a_step_without_overlap(world_size, accumulation):
    rows = np.arange(100, 116)
    shares = [share for rank in range(world_size) for share in micro_batches(rows, 4, rank, world_size, accumulation)]
    assert sorted(np.concatenate([share for _, share in shares])) == rows.tolist()
    assert all(rows[offset : offset + 4].tolist() == share.tolist() for offset, share in shares)


def test_evenly_spaced_rows():
    assert evenly_spaced(None, 5).tolist() == [0, 1, 2, 3, 4] == evenly_spaced(9, 5).tolist()
    assert evenly_spaced(4, 8).tolist() == [0, 2, 4, 6]


def test_derived_seeds_depend_on_every_part():
    seeds = {derive_seed(a, b, c) for a in (1, 2) for b in ("x", "y") for c in range(50)}
    assert len(seeds) == 200
    assert derive_seed(1, "x", 2) == derive_seed(1, "x", 2) < 1 << 63


def test_a_mixture_gives_each_source_its_share_at_any_position():
    """Three sources of 7, 100 and 1000 rows; the smallest gets half of all rows."""
    parts = ((0, 7), (7, 100), (107, 1000))
    sampler = Sampler(1107, 6, 1, None, Mixture(parts, [(0, [3.0, 2.0, 1.0])]))
    rows = np.concatenate([sampler.rows_of_step(step) for step in range(100)])
    counts = [int(((rows >= first) & (rows < first + size)).sum()) for first, size in parts]
    assert counts == pytest.approx([300, 200, 100], abs=2)
    assert integer_weights([1, 30_000])[0] == 33
    for first, size in parts:  # each source is shuffled on its own, epoch after epoch
        mine = rows[(rows >= first) & (rows < first + size)]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(first, first + size))
        assert len(set(mine[:size])) == min(size, len(mine))
    late = sampler.rows_of_step(10**9 + 7)
    assert late.tolist() == sampler.rows_of_step(10**9 + 7).tolist()
    assert np.histogram(late, [0, 7, 107, 1108])[0].tolist() == pytest.approx([3, 2, 1], abs=1)


def test_a_mixture_follows_its_schedule_and_its_limits():
    """Three sources of 10, 20 and 100 rows: the first for 1.5 epochs, the second from step 5 on, once."""
    parts, batch = ((0, 10), (10, 20), (30, 100)), 4
    schedule = [(0, [1.0, 0.0, 1.0]), (5 * batch, [1.0, 2.0, 1.0])]
    mixture = Mixture(parts, schedule, [15, 20, None])
    sampler = Sampler(130, batch, 1, None, mixture)
    rows = np.concatenate([sampler.rows_of_step(step) for step in range(40)])
    counts = np.cumsum([(rows >= first) & (rows < first + size) for first, size in parts], axis=1)
    assert counts[:, -1].tolist() == [15, 20, 40 * batch - 35]
    assert counts[:, 5 * batch - 1].tolist() == [10, 0, 10]  # half and half
    for position in range(0, len(rows), 7):  # as many as are said to come before a position
        assert mixture.rows_before(position) == ([0, 0, 0] if not position else counts[:, position - 1].tolist())
    assert [stage.weights[:2] for stage in mixture.stages][-2:] == [(0, 500_000), (0, 0)]  # the first is used up first
    assert sorted(rows[(rows >= 10) & (rows < 30)]) == list(range(10, 30))
    assert mixture.end is None

    ending = Mixture(parts, schedule, [18, 20, 3])
    assert ending.end == 41
    with pytest.raises(ValueError, match=r"6, 20"):  # nothing is left for positions 6 to 19
        Mixture(parts, schedule, [3, 20, 3])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_ranks_share_the_steps_of_a_mixture(is_streamed):
    parts = ((0, 50), (1, 50)) if is_streamed else ((0, 50), (50, 70))
    mixture = Mixture(parts, [(0, [1.0, 3.0]), (60, [1.0, 0.0]), (90, [2.0, 1.0])], [None, 80])
    sampler = Sampler(100 if is_streamed else 120, 12, 1, None, mixture, is_streamed)
    for step in (0, 4, 7, 19):
        rows = sampler.rows_of_step(step)
        for world_size in (2, 3):
            shares = [micro_batches(rows, 2, rank, world_size, 6 // world_size) for rank in range(world_size)]
            assert sorted(np.concatenate([part for share in shares for _, part in share])) == sorted(rows)
    if is_streamed:  # every row is new
        rows = np.concatenate([sampler.rows_of_step(step) for step in range(20)])
        assert len(set(rows.tolist())) == len(rows)
        assert sampler.windows(19).tolist() == [count // 50 for count in mixture.rows_before(19 * 12)]


def test_rows_of_similar_length_are_batched_and_none_is_lost():
    lengths = np.random.default_rng(0).integers(1, 1000, 2003)
    sampler = Sampler(2003, 8, 1, 2003 * 2, lengths=lambda rows: lengths[rows])
    steps = [sampler.rows_of_step(step) for step in range(-(-2003 * 2 // 8))]
    assert sorted(np.concatenate(steps)) == sorted([*range(2003)] * 2)
    padding = [lengths[rows].max() * len(rows) - lengths[rows].sum() for rows in steps]
    plain = [Sampler(2003, 8, 1, 2003 * 2).rows_of_step(step) for step in range(len(steps))]
    assert sum(padding) < 0.15 * sum(lengths[rows].max() * len(rows) - lengths[rows].sum() for rows in plain)
    means = [lengths[rows].mean() for rows in steps[:32]]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.6  # not sorted by length
