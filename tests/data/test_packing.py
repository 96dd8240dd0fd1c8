"""No token is lost, whatever max_len and stride."""

import numpy as np
import pytest

from hf_myllm.data.corpus import Tokens
from hf_myllm.data.objectives import Causal
from hf_myllm.data.packing import Rows
from hf_myllm.errors import InputError


def stream(count, pieces=1):
    return Tokens(np.array_split(np.arange(count, dtype=np.uint16), pieces), "fingerprint", count - 1)


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("max_len", [1, 4, 16, 99])
@pytest.mark.parametrize("count", [100, 101, 113, 128])
def test_rows_that_do_not_overlap_predict_each_token_once(count, max_len, pieces):
    rows = Rows(stream(count, pieces), max_len, max_len, "x")
    batch = Causal().batch(rows, np.arange(len(rows)))
    inputs, labels = batch["input_ids"].numpy(), batch["shift_labels"].numpy()
    assert inputs.shape == labels.shape == (len(rows), max_len)
    assert np.array_equal(np.sort(labels[labels >= 0]), np.arange(1, count))
    assert np.array_equal(labels[labels >= 0], inputs[labels >= 0] + 1)  # each is the token after its input


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_overlapping_rows_cover_everything(stride):
    rows = Rows(stream(75), 16, stride, "x")
    windows, first = rows.read(np.arange(len(rows)))
    assert set(windows[:, 1:].ravel()) == set(range(1, 75))
    assert windows[:-1, 0].tolist() == list(range(0, stride * (len(rows) - 1), stride))
    assert first[:-1].max(initial=0) == 0
    assert windows[-1, -1] == 74


def test_a_stride_beyond_the_row_skips_what_it_says():
    rows = Rows(stream(100), 4, 10, "x")
    windows, first = rows.read(np.arange(len(rows)))
    kept = [int(token) for window, skip in zip(windows, first, strict=True) for token in window[1 + skip :]]
    assert kept == [start + offset for start in range(0, 99, 10) for offset in range(1, 5) if start + offset < 100]


def test_one_row_exactly_and_one_token_too_few():
    assert len(Rows(stream(17), 16, 16, "x")) == 1
    with pytest.raises(InputError, match="corpus.txt has 16 tokens"):
        Rows(stream(16), 16, 16, "corpus.txt")


def test_empty_rows_fill_a_batch_and_count_for_nothing():
    rows = Rows(stream(50), 8, 8, "x")
    batch = Causal().batch(rows, np.arange(2), size=5)
    assert batch["input_ids"].shape == (5, 8)
    assert (batch["shift_labels"][2:] == -100).all()
    assert Causal().batch(rows, np.arange(0), size=3)["input_ids"].shape == (3, 8)
