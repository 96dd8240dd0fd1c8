"""A stored model that is read by rows is the model that transformers loads."""

import pytest
import torch
from families import CASES
from models.stock_types import SIZES

from hf_myllm.errors import ModelError
from hf_myllm.models import FAMILIES, loading, weights

STOCK = [name if name == "roberta" else pytest.param(name, marks=pytest.mark.chaos) for name in SIZES]


def assert_same(model_class, folder, config, dtype=torch.float32):
    """Assert that all rows, read apart, and the loading info are what the library loads."""
    expected, info = weights.load(model_class, folder, config, dtype)
    model, read = weights.load(model_class, folder, config, dtype, seed=0)
    for key in ("missing_keys", "mismatched_keys", "unused"):
        assert sorted(read[key]) == sorted(info[key]), key
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    new = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    for name, parameter in expected.named_parameters():
        assert model.get_parameter(name).is_meta
        if name not in new:
            middle = len(parameter) // 2
            rows = torch.cat([model.read_rows(name, 0, middle), model.read_rows(name, middle, len(parameter))])
            assert rows.dtype == parameter.dtype
            assert torch.equal(rows, parameter), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    if expected.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_stored_model(name, tmp_path):
    """Of several files, in another dtype, of a model without a head, with a head of other labels."""
    case = CASES[name]
    model = case.make_model()
    model.save_pretrained(tmp_path / "whole")
    assert_same(type(model), tmp_path / "whole", case.make_config())
    model.bfloat16().save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(type(model), tmp_path / "parts", case.make_config(), dtype)
    if case.family.is_decoder or name == "bert":
        (model.model if hasattr(model, "model") else model.base_model).save_pretrained(tmp_path / "body")
        assert_same(case.family.tasks["classification"], tmp_path / "body", case.make_config(num_labels=3))


@pytest.mark.parametrize("name", STOCK)
def test_rows_of_a_stored_stock_class(name, tmp_path, capfd):
    family = FAMILIES[name]
    sizes = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **SIZES[name]}
    model_class = next(iter(family.tasks.values()))
    model_class(family.config(**sizes)).save_pretrained(tmp_path)
    config = family.config.from_pretrained(tmp_path)
    model, _ = weights.load(model_class, tmp_path, config, torch.float32, seed=0)
    if "read_rows" in vars(model):
        assert_same(model_class, tmp_path, config)
    else:
        assert "each rank reads the whole model, because the library converts" in capfd.readouterr().err


def test_a_new_head_and_an_infinite_weight(tmp_path):
    case = CASES["bert"]
    case.make_model().save_pretrained(tmp_path)
    config = loading.build_config("bert", {"num_labels": 3}, tmp_path)
    options = {"task": "classification", "config": config, "pretrained": tmp_path, "seed": 7}
    model, new = loading.build_model("bert", **options)
    read, read_new = loading.build_model("bert", **options, on_meta=True)
    assert new
    assert read_new == new
    for name, parameter in model.named_parameters():
        assert torch.equal(read.read_rows(name), parameter), name
    broken = case.make_model()
    broken.bert.embeddings.word_embeddings.weight.data[3, 4] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    model, _ = weights.load(type(broken), tmp_path / "broken", case.make_config(), torch.float32, seed=0)
    model.read_rows("bert.embeddings.word_embeddings.weight", 5, 9)
    with pytest.raises(ModelError, match="NaN or infinity"):
        model.read_rows("bert.embeddings.word_embeddings.weight", 0, 9)
