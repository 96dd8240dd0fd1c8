"""A stored model that is read by rows is the model that transformers loads."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import CASES
from models.stock_types import SIZES
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_myllm import checkpoint
from hf_myllm.errors import ModelError
from hf_myllm.models import FAMILIES, initialization, loading, lora, weights
from hf_myllm.models.export import weights_to_save
from hf_myllm.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from hf_myllm.saver import Saver
from hf_myllm.sharding import local_rows, shard_model, to_local

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


@pytest.fixture
def shard_as_rank():
    """Return a function that shards a model as a rank of 4 does, in this process, whose collectives do nothing."""

    def shard(rank, model):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=True)
        names = {"state": SimpleNamespace(fsdp_plugin=plugin), "mixed_precision": "no", "torch_device_mesh": None}
        names |= {"process_index": rank, "num_processes": 4}
        accelerator = SimpleNamespace(**names, device=torch.device("cpu"))
        shard_model(accelerator, model, False)
        return accelerator

    yield shard
    if dist.is_initialized():
        dist.destroy_process_group()


def contents(content):
    """Return the tensors of a file of a checkpoint."""
    return (content() if callable(content) else content).values()


def counted(function, counts):
    """Return a function that adds to `counts` how many numbers `function` returns."""

    def call(*arguments):
        rows = function(*arguments)
        counts.append(rows.numel())
        return rows

    return call


def test_a_rank_holds_its_share_of_a_model_and_of_a_checkpoint(tmp_path, shard_as_rank, monkeypatch):
    """Of a new model, a stored one, the stored state of the optimizer and the copies for the next checkpoint."""
    whole = CASES["llama"].make_model()
    whole.save_pretrained(tmp_path)
    state = {name: torch.randn_like(weight) for name, weight in whole.named_parameters()}
    (tmp_path / "trainer_state").mkdir()
    tensors = {f"{name}/{key}": value.clone() for name, value in state.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors |= {f"{name}/step": torch.tensor(1.0) for name in state}
    save_file(tensors, tmp_path / "trainer_state/optimizer.safetensors")
    monkeypatch.setattr(checkpoint, "_read_marker", lambda path: ["trainer_state/optimizer.safetensors"])
    config, counts, kept = whole.config, {name: [] for name in ("new", "stored", "state")}, []
    total = sum(weight.numel() for weight in whole.parameters())
    for rank in range(4):
        for name, folder in (("new", None), ("stored", tmp_path)):
            model, _ = loading.build_model("llama", "causal", config, folder, on_meta=True)
            model.read_rows = counted(model.read_rows, counts[name])
            accelerator = shard_as_rank(rank, model)
            if folder is None:
                dist.destroy_process_group()
        optimizer, files = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1), checkpoint.OptimizerFiles(tmp_path)
        files.rows = counted(files.rows, counts["state"])
        load_optimizer_tensors(model, optimizer, files)
        for name, parameter in model.named_parameters():
            start, stop = local_rows(parameter)
            assert torch.equal(to_local(parameter), whole.get_parameter(name)[start:stop]), name
            assert torch.equal(to_local(optimizer.state[parameter]["exp_avg"]), state[name][start:stop]), name
        saver, mailbox = Saver(accelerator), SimpleNamespace(rank=rank, world_size=4)
        files = saver.copy_state(model, weights_to_save(model), optimizer_tensors(model, optimizer), mailbox)
        kept += [tensor.numel() for content in files.values() for tensor in contents(content)]
        size = sum(len(memory._buffer) for memory in (saver._weights, saver._optimizer_state))
        assert size < 1.3 * 3 * 4 * total / 4  # bytes
        dist.destroy_process_group()
    scalars = 4 * len(state)  # the number of steps
    assert {name: sum(numbers) for name, numbers in counts.items()} == {
        "new": total,
        "stored": total,
        "state": 2 * total + scalars,
    }
    assert sum(kept) == 3 * total + scalars


@pytest.mark.parametrize("name", CASES)
def test_a_vocabulary_that_grows_is_read_by_rows_too(name, tmp_path, monkeypatch):
    """The new rows are those of one process, and close to the mean of the old ones."""
    monkeypatch.setattr(initialization, "_BLOCK", 500)  # several blocks
    case, task = CASES[name], next(iter(CASES[name].family.tasks))
    case.make_model().save_pretrained(tmp_path)
    size = case.make_config().vocab_size
    for dtype in (torch.float32, torch.bfloat16):
        (model, new), (read, read_new) = (
            loading.build_model(
                name, task, case.make_config(vocab_size=size + 5), tmp_path, seed=3, dtype=dtype, on_meta=on_meta
            )
            for on_meta in (False, True)
        )
        assert new == read_new
        assert "5 rows of the vocabulary" in new
        assert read.config.vocab_size == model.config.vocab_size == size + 5
        grown = 0
        for key, parameter in model.named_parameters():
            assert read.get_parameter(key).is_meta
            assert read.get_parameter(key).shape == parameter.shape, key
            pieces = [(0, 3), (3, size - 1), (size - 1, size + 2), (size + 2, size + 5)]
            if len(parameter) != size + 5:
                pieces = [(0, len(parameter))]
            grown += len(pieces) > 1
            rows = torch.cat([read.read_rows(key, *piece) for piece in pieces])
            assert rows.dtype == parameter.dtype
            assert torch.equal(rows, parameter), key
            assert torch.equal(read.read_rows(key), parameter), key
            if len(pieces) > 1 and dtype == torch.float32:
                old, added = parameter[:size], parameter[size:]
                assert ((added - old.mean(0)).abs() <= 3e-4 * old.std(0) + 1e-9).all()
                assert parameter.dim() == 1 or len(added.unique(dim=0)) == 5
        assert grown
        for key, buffer in model.named_buffers():
            assert torch.equal(read.get_buffer(key), buffer), key


@pytest.mark.parametrize(
    ("name", "task", "target_modules"),
    [
        ("llama", "causal", None),
        ("gpt", "causal", ["all-linear"]),
        ("bert", "classification", None),
        ("gpt", "classification", ["wte"]),
        ("bert", "question_answering", None),
    ],
)
def test_an_adapter_on_a_model_that_is_read_by_rows(name, task, target_modules, tmp_path):
    """New, and loaded: each parameter, frozen or trained, has the values that one process gives it."""
    case = CASES[name]
    case.make_model().save_pretrained(tmp_path / "base")
    settings = {"task": task, "seed": 3, "lora_settings": {"r": 2, "target_modules": target_modules}}
    for folder in (tmp_path / "base", tmp_path / "adapter"):
        is_trained = folder.name == "adapter"
        options = settings | {"pretrained": folder, "is_trained": is_trained, "replaces_head": not is_trained}
        model, read = (
            loading.build_model(name, config=loading.build_config(name, {}, folder), on_meta=on_meta, **options)[0]
            for on_meta in (False, True)
        )
        parameters = dict(read.named_parameters())
        assert list(parameters) == [key for key, _ in model.named_parameters()]
        for key, parameter in model.named_parameters():
            assert parameters[key].is_meta != parameter.requires_grad, key
            assert parameters[key].requires_grad == parameter.requires_grad, key
            middle = len(parameter) // 2
            rows = torch.cat([read.read_rows(key, 0, middle), read.read_rows(key, middle, len(parameter))])
            assert torch.equal(rows, parameter), key
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        lora.save(model, tmp_path / "adapter")
