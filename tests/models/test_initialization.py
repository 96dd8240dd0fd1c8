"""Initial values: each parameter is drawn by its name, from the distribution that its class gives it."""

import pytest
import torch
from families import CASES
from models.stock_types import SIZES

from hf_myllm.models import FAMILIES, initialization, loading

FEW = ("qwen3_moe", "mamba", "deberta-v2")
STOCK = [name if name in FEW else pytest.param(name, marks=pytest.mark.chaos) for name in [*SIZES, "openai-gpt"]]


def stock_config(name):
    sizes = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **SIZES.get(name, {})}
    return FAMILIES[name].config(**sizes)


def describe(tensor):
    """Return which rows are constant, and the spread of the values."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return rows.std(1, correction=0) == 0, tensor.std(correction=0).item()


@pytest.mark.parametrize("name", [*CASES, *STOCK])
def test_each_parameter_has_the_distribution_of_its_class(name):
    config = CASES[name].make_config() if name in CASES else stock_config(name)
    for model_class in dict.fromkeys(FAMILIES[name].tasks.values()):
        torch.manual_seed(0)
        reference = model_class(config)
        weights = initialization.InitialWeights(initialization.make_on_meta(model_class, config), 0)
        model = weights.materialize()
        assert model.state_dict().keys() == reference.state_dict().keys()
        for key, expected in reference.named_parameters():
            value = model.get_parameter(key).detach()
            constant, spread = describe(expected.detach())
            assert torch.equal(describe(value)[0], constant), key
            if constant.all() and (key not in weights.made_whole):
                torch.testing.assert_close(value, expected.detach(), msg=key)
            elif value.numel() > 500:
                assert describe(value)[1] == pytest.approx(spread, rel=0.2), key
        for key, expected in reference.named_buffers():
            assert torch.equal(model.get_buffer(key), expected), key
        for key, other in reference.named_parameters(remove_duplicate=False):  # what is tied stays tied
            others = [k for k, p in reference.named_parameters(remove_duplicate=False) if p is other]
            assert len({id(model.get_parameter(k)) for k in others}) == 1, key


def test_rows_are_the_same_whichever_are_drawn(monkeypatch):
    """Values depend on the seed and the name, not on the order, the rows asked for or the layers beside."""
    monkeypatch.setattr(initialization, "_BLOCK", 200)
    config = CASES["gpt"].make_config()
    weights = [
        initialization.InitialWeights(
            initialization.make_on_meta(FAMILIES["gpt"].tasks["causal"], CASES["gpt"].make_config(**change)), seed
        )
        for change, seed in (({}, 0), ({"n_layer": 1}, 0), ({}, 1))
    ]
    for name in weights[1].shapes:
        whole = weights[0].rows(name)
        assert torch.equal(weights[1].rows(name), whole) or "c_proj" in name  # scaled by the number of layers
        assert torch.equal(weights[2].rows(name), whole) == (
            "wte" not in name and "wpe" not in name and whole.dim() < 2
        )
        pieces = [weights[0].rows(name, start, min(start + 7, len(whole))) for start in range(0, len(whole), 7)]
        assert torch.equal(torch.cat(pieces), whole)
    table = weights[0].rows("transformer.wte.weight")
    assert table.std() == pytest.approx(config.initializer_range, rel=0.05)
    assert len(table.unique(dim=0)) == len(table)


def test_a_new_head_is_drawn_by_its_name(tmp_path):
    case = CASES["bert"]
    case.make_model().save_pretrained(tmp_path)
    config = loading.build_config("bert", {"num_labels": 3}, tmp_path)
    build = loading.build_model("bert", "classification", config, tmp_path, seed=7)
    fresh, _ = loading.build_model("bert", "classification", config, seed=7)
    assert {"classifier.weight", "classifier.bias"} <= set(build[1])
    for name in build[1]:
        assert torch.equal(build[0].get_parameter(name), fresh.get_parameter(name)), name
