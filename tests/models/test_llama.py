"""What is Llama's own; what it shares with the other causal families is in test_causal.py."""

import pytest
import torch
from test_causal import FAMILY
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_myllm.models.llama import MyLlamaConfig, MyLlamaForCausalLM

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_bad_architectures_are_refused():
    for changed, message in (
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"hidden_act": "nope"}, "hidden_act"),
    ):
        with pytest.raises(Exception, match=message):
            MyLlamaConfig(**{**SIZES, **changed})


def test_every_rope_type_of_the_library_is_held_to_stock():
    tried = {
        variant["rope_parameters"]["rope_type"] for variant in FAMILY["llama"].variants if "rope_parameters" in variant
    }
    assert tried == {"default", *ROPE_INIT_FUNCTIONS}


def test_weights_start_as_stock_starts_them():
    torch.manual_seed(0)
    model = MyLlamaForCausalLM(MyLlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 512}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def test_a_real_trained_llama_says_its_known_words(assets):
    folder = assets / "weights" / "stories260K"
    ours, loading = MyLlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = ours.eval().generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)
    expected = (folder / "expected_greedy_200.txt").read_text()
    assert tokenizer.decode(said[0], skip_special_tokens=True).strip() == expected.strip()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(said, stock.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False))
