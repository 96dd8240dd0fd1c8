"""What is specific to Llama; test_causal.py tests what all decoder families share."""

import json

import pytest
import torch
from families import CASES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_myllm.models.llama import MyLlamaConfig, MyLlamaForCausalLM

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_invalid_configurations_are_rejected():
    for changed, message in (
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"hidden_act": "nope"}, "hidden_act"),
    ):
        with pytest.raises(Exception, match=message):
            MyLlamaConfig(**{**SIZES, **changed}).check_architecture()


def test_every_rope_type_of_the_library_is_compared_with_stock():
    tested = {
        variant["rope_parameters"]["rope_type"] for variant in CASES["llama"].variants if "rope_parameters" in variant
    }
    assert tested == {"default", *ROPE_INIT_FUNCTIONS}


def test_initialization_equals_stock():
    torch.manual_seed(0)
    model = MyLlamaForCausalLM(MyLlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 512}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def test_a_real_checkpoint_generates_the_expected_text(assets):
    folder = assets / "weights" / "stories260K"
    ours, loading = MyLlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generated = ours.eval().generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)
    expected = (folder / "expected_greedy_200.txt").read_text()
    assert tokenizer.decode(generated[0], skip_special_tokens=True).strip() == expected.strip()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(generated, stock.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False))


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_rope_is_saved_for_transformers_4_too(tmp_path, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 500000.0}
    if rope_type == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 32}
    config = MyLlamaConfig(**SIZES, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 500000.0
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written.get("rope_scaling") == (scaling if rope_type == "llama3" else None)
    for read in (MyLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert read.rope_parameters == config.rope_parameters
    config.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
