"""The sliding window of the shared decoder, in Qwen3; test_causal.py tests what all decoder families share."""

import pytest
import torch
from families import CASES
from test_causal import batch

from hf_myllm.models import decoder

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_window_equals_stock(tmp_path, cache):
    ours, stock = CASES["qwen3"].make_pair(tmp_path, **WINDOW)
    settings = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(batch(2, 9), **settings), stock.generate(batch(2, 9), **settings))


def test_a_window_is_applied_and_keeps_documents_apart(tmp_path):
    ours, stock = CASES["qwen3"].make_pair(tmp_path, **WINDOW)
    assert not torch.equal(ours(batch()).logits, CASES["qwen3"].make_model().eval()(batch()).logits)
    inputs = {"input_ids": batch(), "position_ids": torch.cat([torch.arange(20), torch.arange(13)]).expand(2, -1)}
    torch.testing.assert_close(
        ours(**inputs, use_cache=False).logits, stock(**inputs, use_cache=False).logits, atol=1e-5, rtol=0
    )


def test_a_window_as_wide_as_the_row_builds_no_mask(monkeypatch):
    monkeypatch.setattr(decoder, "create_sliding_window_causal_mask", None)
    model = CASES["qwen3"].make_model(**{**WINDOW, "sliding_window": 33})
    model(batch(), labels=batch(), use_cache=False).loss.backward()
    with pytest.raises(TypeError):
        model(batch(length=34), use_cache=False)


def test_keys_of_other_families_are_ignored(tmp_path):
    ours, stock = CASES["llama"].make_pair(tmp_path, sliding_window=8, layer_types=["sliding_attention"] * 3)
    assert ours.config.sliding_window == 8  # as in a Qwen model that was converted to Llama
    torch.testing.assert_close(ours(batch()).logits, stock(batch()).logits, atol=1e-5, rtol=0)


def test_invalid_configurations_are_rejected():
    for changed, message in (
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"layer_types": ["sliding_attention"] * 3}, "set sliding_window"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ):
        with pytest.raises(Exception, match=message):
            CASES["qwen3"].make_config(**changed).check_architecture()
