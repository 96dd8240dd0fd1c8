"""No weight of a checkpoint is lost or misread without a word."""

import math
import re
import shutil

import pytest
import torch
from families import CASES
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining

from hf_myllm.errors import InputError, ModelError
from hf_myllm.models import FAMILIES, loading
from hf_myllm.tasks.labels import Labels


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a model of a family, with its tensors changed; it returns the folder."""

    def save_changed(family, change, model_class=None, **changed):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        CASES[family].make_model(model_class, **changed).save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(change(tensors), file, metadata={"format": "pt"})
        return folder

    return save_changed


def warnings(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]


def build(family, folder, task="causal", **options):
    config = loading.build_config(family, {}, folder)
    return loading.build_model(family, task, config, folder, **options)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "layers"])
def test_the_names_that_wrappers_add_are_removed(save, tmp_path, capfd, prefix):
    def rename(tensors):
        if prefix == "layers":  # each layer was compiled by itself
            return {name.replace("layers.", "layers._orig_mod."): tensor for name, tensor in tensors.items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    folder = save("llama", rename)
    reference = CASES["llama"].make_model().state_dict()
    for model in (build("llama", folder, is_trained=True)[0], loading.load_stock_model(folder)):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reference.items())
        model.save_pretrained(tmp_path / "again")
        assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(reference)
    assert not warnings(capfd)


LOST = {
    "a bias": ("llama", lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, "q_proj.bias"),
    "a layer": ("llama", lambda t: t | {"model.layers.3.mlp.up_proj.weight": torch.ones(80, 48)}, "layers.3.mlp"),
    "a layer of a base model": ("gpt", lambda t: t | {"h.3.ln_1.weight": torch.ones(48)}, "h.3.ln_1.weight"),
    "the bias of a head": ("llama", lambda t: t | {"lm_head.bias": torch.ones(97)}, "lm_head.bias"),
    "integers": ("llama", lambda t: {name: (10 * x).to(torch.int8) for name, x in t.items()}, "holds I8 numbers"),
    "one tensor of integers": (
        "gpt", lambda t: t | {"transformer.wpe.weight": torch.ones(64, 48, dtype=torch.int64)}, "wpe.weight holds I64"
    ),
    "NaN": ("gpt", lambda t: t | {"transformer.wpe.weight": torch.full((64, 48), math.nan)}, "wpe.weight holds NaN"),
    "infinity": ("gpt", lambda t: t | {"transformer.wpe.weight": torch.full((64, 48), math.inf)}, "holds NaN or inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_weights_that_would_be_lost_or_misread_are_refused(save, case):
    family, change, message = LOST[case]
    folder = save(family, change)
    with pytest.raises(ModelError, match=message):
        build(family, folder)
    with pytest.raises(ModelError, match=message):
        loading.load_stock_model(folder)


def test_masks_of_early_checkpoints_are_passed_over_silently(save, capfd):
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    model, new = build("gpt", save("gpt", lambda tensors: tensors | masks), is_trained=True)
    assert new == []
    assert torch.equal(model.transformer.wpe.weight, CASES["gpt"].make_model().transformer.wpe.weight)
    assert not warnings(capfd)


def test_an_unused_head_is_named_in_one_line(tmp_path, capfd):
    config = FAMILIES["bert"].config(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    BertForPreTraining(config).save_pretrained(tmp_path)
    _, new = build("bert", tmp_path, "classification", replaces_head=True)
    assert new == ["classifier.bias", "classifier.weight"]
    expected = "weights of another head are not used: cls.predictions.bias, cls.predictions.transform.LayerNorm.bias"
    (line,) = warnings(capfd)
    assert expected in line
    assert line.endswith("and 4 more")
    assert type(loading.load_stock_model(tmp_path)) is BertForPreTraining
    assert not warnings(capfd)


def test_a_model_with_missing_weights_is_not_used(save):
    folder = save("llama", lambda tensors: {name: x for name, x in tensors.items() if "layers.1.mlp" not in name})
    with pytest.raises(ModelError, match="lacks weights: model.layers.1.mlp.down_proj.weight, "):
        loading.load_stock_model(folder)


HEADS = {family: ("lm_head.weight", "model.embed_tokens.weight") for family in ("llama", "qwen3")}
HEADS["gpt"] = "lm_head.weight", "transformer.wte.weight"
HEADS["bert"] = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_is_not_tied_as_the_config_says_is_refused(family, save):
    """Stock classes load it as two weights; tools that go by the config would lose one of them."""
    head, embeddings = HEADS[family]
    task = "mlm" if family == "bert" else "causal"
    model_class, tied = FAMILIES[family].tasks[task], {"tie_word_embeddings": True}

    def refuse(folder, message):
        for is_trained in (False, True):
            with pytest.raises(ModelError, match=message):
                build(family, folder, task, is_trained=is_trained)
        with pytest.raises(ModelError, match=message):
            loading.load_stock_model(folder)

    differs = save(family, lambda tensors: tensors | {head: 2 * tensors[embeddings]}, model_class, **tied)
    refuse(
        differs, f"ties {head} to {embeddings}, which differs .*; set tie_word_embeddings to false in its config.json"
    )
    larger = save(family, lambda tensors: tensors | {head: torch.ones(100, 48)}, model_class, **tied)
    refuse(larger, "cannot be loaded: its head has another size than the embeddings")
    without = save(
        family, lambda t: {name: x for name, x in t.items() if name != head}, model_class, tie_word_embeddings=False
    )
    refuse(without, f"does not tie {head} .* no such weight; set tie_word_embeddings to true in its config.json")

    same = save(family, lambda tensors: tensors | {head: tensors[embeddings].clone()}, model_class, **tied)
    model, new = build(family, same, task, is_trained=True)
    assert new == []
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt", "llama", "bert"])  # Qwen3 has heads of their own size
def test_a_configuration_that_stock_accepts_is_refused_only_by_the_model(family, tmp_path):
    """As transformers' own ConfigTester makes it: hidden_size 37 with the default heads."""
    config_class = FAMILIES[family].config
    config = config_class(hidden_size=37)
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).hidden_size == 37
    for model_class in FAMILIES[family].tasks.values():
        with pytest.raises(ValueError, match=r"\(37\)|must be even"):
            model_class(config)
    with pytest.raises(ModelError, match=r"\(37\)|must be even"):
        loading.build_config(family, {"hidden_size": 37})


def test_a_size_of_zero_is_named_for_every_family():
    for family in FAMILIES:
        for name in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
            field = FAMILIES[family].config.attribute_map.get(name, name)
            with pytest.raises(ModelError, match=f"{field} is 0; it must be at least 1"):
                loading.build_config(family, {field: 0})


ROPE = {
    "rope_type 'lineer' is unknown; choose default, linear": {"rope_type": "lineer", "factor": 2.0},
    "rope_type None is unknown; choose default, linear": {"rope_type": None},
    "truncate must be true or false, not 'maybe'": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": "maybe",
    },
    "rope_type linear needs factor": {"rope_type": "linear"},
    "factor must be a finite number of at least 1, not 'two'": {"rope_type": "linear", "factor": "two"},
    "factor must be a finite number of at least 1, not 0.5": {"rope_type": "dynamic", "factor": 0.5},
    "factor must be a finite number of at least 1, not inf": {"rope_type": "dynamic", "factor": math.inf},
    "rope_theta must be a finite number above 0, not 0": {"rope_theta": 0},
    "rope_theta must be a finite number above 0, not -1": {"rope_theta": -1.0},
    "rope_theta must be a finite number above 0, not nan": {"rope_theta": math.nan},
    "rope_type default has no key 'factr'": {"factr": 2.0},
    "short_factor must be a list of 6 numbers above 0": {
        "rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 6,
        "original_max_position_embeddings": 32,
    },
    "long_factor must be a list of 6 numbers above 0": {
        "rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0] * 5 + ["x"],
        "original_max_position_embeddings": 32,
    },
    "needs low_freq_factor and high_freq_factor": {"rope_type": "llama3", "factor": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("message", ROPE)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_parameters_are_checked_completely(message, family):
    settings = CASES[family].sizes | {"rope_parameters": ROPE[message]}
    settings |= {"head_dim": 12} if family == "qwen3" else {}
    with pytest.raises(ModelError, match=re.escape(message)):
        loading.build_config(family, settings)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_partial_rotary_factor_of_one_is_the_whole(family):
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    ids = torch.arange(12)[None]
    expected = CASES[family].make_model(rope_parameters=rope).eval()(ids).logits
    whole = CASES[family].make_model(rope_parameters=rope | {"partial_rotary_factor": 1.0})
    assert torch.equal(whole.eval()(ids).logits, expected)
    settings = CASES[family].sizes | {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}
    with pytest.raises(ModelError, match="rope_type default has no key 'partial_rotary_factor'"):
        loading.build_config(family, settings)


def test_a_config_that_is_no_mapping_or_names_a_label_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json is not a model's configuration"):
        loading.read_config("gpt", tmp_path)
    config = FAMILIES["bert"].config(id2label={0: "a", 1: "a"})
    with pytest.raises(InputError, match="id2label of the model's config.json has a name twice: a, a"):
        Labels.from_config(config)
