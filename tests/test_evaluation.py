"""Evaluation counts each target once, whatever the batch size."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_myllm.data.corpus import TokenStream
from hf_myllm.data.packing import StridedRows
from hf_myllm.evaluation import evaluate_rows, unigram_loss
from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.tasks import CausalLM


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0))
    ids = np.random.default_rng(0).integers(0, 50, 333).astype(np.uint16)
    rows = StridedRows(TokenStream([ids], "f", 49), 16, 16, "x")
    return model, ids, rows


def evaluate(setting, batch_size, token_bytes=None):
    model, _, rows = setting
    indices = np.arange(len(rows))
    return evaluate_rows(model.train(), CausalLM(), rows, indices, batch_size, Accelerator(), token_bytes)


def test_the_batch_size_does_not_matter(setting):
    reference = evaluate(setting, 1)
    assert reference["tokens"] == 332
    for batch_size in (2, 5, 21, 64):
        other = evaluate(setting, batch_size)
        assert other["tokens"] == 332
        assert other["loss"] == pytest.approx(reference["loss"], abs=1e-6)
    assert reference["perplexity"] == pytest.approx(math.exp(reference["loss"]))
    assert setting[0].training  # as it was found, and without dropout in between: the metrics agree


def test_it_is_the_mean_over_targets(setting):
    model, ids, rows = setting
    with torch.no_grad():
        windows, first = rows.read(np.arange(len(rows)))
        total = 0.0
        for window, skip in zip(torch.from_numpy(windows), first, strict=True):
            logits = model.eval()(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits[skip:], window[1 + skip :], reduction="sum").item()
    assert evaluate(setting, 7)["loss"] == pytest.approx(total / 332, abs=1e-6)


def test_bits_per_byte(setting):
    result = evaluate(setting, 8, np.full(50, 3))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) / 3)
    assert evaluate(setting, 8)["bits_per_byte"] is None


def test_the_unigram_loss_is_the_cross_entropy_of_frequencies():
    training, validation = np.array([0, 0, 0, 1], dtype=np.uint16), np.array([1, 0, 1], dtype=np.uint16)
    metrics = unigram_loss(TokenStream([training], "f", 1), TokenStream([validation], "g", 1), 3, np.array([1, 1, 1]))
    # counts plus one: 4, 2, 1 of 7; the first token of the data is no target
    assert metrics["loss"] == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7)) / 2)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2))
