"""What is specific to GPT; test_causal.py tests what all decoder families share."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM, GPTModel

SIZES = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 1}


def test_initialization_follows_the_gpt2_paper():
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(vocab_size=4000, n_positions=512, n_embd=256, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif ".ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / (2 * 8) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < expected / 50, name


def test_invalid_configurations_are_rejected():
    for changed, message in (
        ({"n_head": 5}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"resid_pdrop": 1.0}, "resid_pdrop"),
        ({"activation_function": "nope"}, "activation_function"),
        ({"add_cross_attention": True}, "cross"),
    ):
        with pytest.raises(Exception, match=message):
            GPTConfig(**{**SIZES, **changed}).check_architecture()


def test_config_contains_n_ctx_for_converters(tmp_path):
    GPTConfig(**SIZES).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 64


def test_masks_of_the_first_checkpoints_are_ignored(tmp_path):
    GPTForCausalLM(GPTConfig(**SIZES)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, loading = GPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())


def test_a_model_without_head_loads_under_a_head(tmp_path):
    torch.manual_seed(0)
    body = GPTModel(GPTConfig(**SIZES)).eval()
    body.save_pretrained(tmp_path)
    headed, loading = GPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    ids = torch.arange(20)[None]
    torch.testing.assert_close(headed.transformer(ids).last_hidden_state, body(ids).last_hidden_state)
    stock = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
    torch.testing.assert_close(stock, body(ids).last_hidden_state, atol=1e-5, rtol=0)
