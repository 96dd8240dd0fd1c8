"""The order of rows is a pure function of (seed, step), a permutation each epoch, and costs the same anywhere."""

import tracemalloc

import numpy as np
import pytest

from hf_myllm.data.order import derive_seed, micro_batches, rows_of_step, shuffle, spread


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_shuffle_is_a_permutation(size):
    everything = np.arange(size)
    first, second = shuffle(everything, size, 1, 0), shuffle(everything, size, 1, 1)
    assert sorted(first) == sorted(second) == list(range(size))
    if size >= 16:
        assert not np.array_equal(first, everything)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, shuffle(everything, size, 2, 0))


def test_shuffle_looks_random():
    # the correlation of place and row, and of neighbours, within four standard deviations of chance
    size = 20_000
    shuffled = shuffle(np.arange(size), size, 7, 0)
    limit = 4 / size**0.5
    assert abs(np.corrcoef(np.arange(size), shuffled)[0, 1]) < limit
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < limit
    # about one fixed point is expected, and few neighbours stay neighbours
    assert (shuffled == np.arange(size)).sum() < 10
    assert (np.diff(shuffled) == 1).sum() < 10


def test_any_element_alone_is_as_in_the_whole():
    whole = shuffle(np.arange(1000), 1000, 3, 2)
    assert [int(shuffle(np.array([i]), 1000, 3, 2)[0]) for i in range(0, 1000, 97)] == whole[::97].tolist()


def test_memory_does_not_grow_with_the_corpus():
    rows_of_step(0, 512, 10**3, None, 1)
    tracemalloc.start()
    rows = rows_of_step(10**9, 512, 10**13, None, 1)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert rows.min() >= 0
    assert rows.max() < 10**13
    assert len(set(rows.tolist())) == 512


def test_steps_read_each_row_once_an_epoch_and_cross_epochs():
    rows = np.concatenate([rows_of_step(step, 8, 21, 63, 5) for step in range(8)])
    assert len(rows) == 63
    for epoch in range(3):
        assert sorted(rows[21 * epoch : 21 * (epoch + 1)]) == list(range(21))
    assert len(rows_of_step(7, 8, 21, 63, 5)) == 7  # the last step has what is left


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_processes_share_a_step_without_overlap(world_size, accumulation):
    rows = np.arange(100, 116)
    shares = [share for rank in range(world_size) for share in micro_batches(rows, 4, rank, world_size, accumulation)]
    assert sorted(np.concatenate([share for _, share in shares])) == rows.tolist()
    assert all(rows[offset : offset + 4].tolist() == share.tolist() for offset, share in shares)


def test_spread_is_even_and_whole():
    assert spread(None, 5).tolist() == [0, 1, 2, 3, 4] == spread(9, 5).tolist()
    assert spread(4, 8).tolist() == [0, 2, 4, 6]


def test_seeds_differ_in_every_part():
    seeds = {derive_seed(a, b, c) for a in (1, 2) for b in ("x", "y") for c in range(50)}
    assert len(seeds) == 200
    assert derive_seed(1, "x", 2) == derive_seed(1, "x", 2) < 1 << 63
