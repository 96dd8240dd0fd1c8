"""`hf-myllm average`: the arithmetic, what is refused, and a folder that is complete or absent."""

import importlib
import json
import shutil

import pytest
import torch
from conftest import run_cli, train
from safetensors.torch import load_file, save_file
from small_runs import flags as as_flags
from transformers import AutoModelForCausalLM

import hf_myllm
from hf_myllm.errors import CheckpointError


@pytest.fixture
def run(kept_run):
    return kept_run[0]


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def test_the_last_checkpoints_are_averaged_and_evaluated(run, tmp_path, capsys):
    output = tmp_path / "average"
    assert run_cli("average", str(run), "--last", "3", "--output", str(output)) == 0
    out = capsys.readouterr().out
    parts = [weights(run / f"checkpoint-{step}") for step in (6, 7, 8)]
    average = weights(output)
    assert average.keys() == parts[0].keys()
    assert all(torch.equal(value, (parts[0][n] + parts[1][n] + parts[2][n]) / 3) for n, value in average.items())
    # a stock folder, of which the evaluation is that of the command
    assert type(AutoModelForCausalLM.from_pretrained(output)).__name__ == "GPT2LMHeadModel"
    of_average, of_last = hf_myllm.evaluate(output), hf_myllm.evaluate(run / "checkpoint-8")
    assert f"loss{of_average['loss']:>32.4f}{of_last['loss']:>12.4f}\n" in out
    assert of_average["loss"] != of_last["loss"]
    card = (output / "README.md").read_text()
    assert "the average of `checkpoint-6`, `checkpoint-7`, `checkpoint-8` of the run" in card
    assert f"| loss | {of_average['loss']:.4f} | {of_last['loss']:.4f} |" in card
    assert f"| {of_average['tokens']:,} | {of_last['tokens']:,} |" in card
    assert "\n# average\n" in card
    assert ".partial" not in card
    assert "whose metrics are named ema" not in card  # of the run's own model
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("recipe.yaml", "run.json", "README.md"),
    }
    assert hf_myllm.generate(output, max_new_tokens=2)
    assert train(output / "recipe.yaml", "--save_model", output, "--resume") == 2  # it is no run


def test_an_exponential_average_takes_the_checkpoints_of_a_run_by_their_steps(run, tmp_path):
    folders = [run / f"checkpoint-{step}" for step in (1, 2, 4)]
    result = hf_myllm.average([folders[2], *folders[:2]], tmp_path / "average", ema=0.75)  # as a shell may order them
    expected = weights(folders[0])
    for folder in folders[1:]:
        expected = {name: value.lerp(weights(folder)[name], 0.25) for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "average").items())
    assert result["folders"] == folders
    shutil.copytree(folders[1], tmp_path / "other" / "checkpoint-9")
    hf_myllm.average([tmp_path / "other" / "checkpoint-9", folders[2]], tmp_path / "two")
    assert "the average of `other/checkpoint-9`, `run/checkpoint-4`.\n" in (tmp_path / "two" / "README.md").read_text()
    assert result["last"] == hf_myllm.evaluate(folders[-1])


def copy_of(folder, path, **config):
    """Copy a checkpoint's model, with other values in its configuration."""
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("trainer_state"))
    values = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.chaos
def test_bfloat16_is_summed_in_fp32_and_shards_keep_their_files(run, tmp_path):
    folders = [copy_of(run / f"checkpoint-{step}", tmp_path / str(step)) for step in (1, 2, 3)]
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
    result = hf_myllm.average(folders, tmp_path / "average")
    assert "is no run" in result["problem"]
    files = sorted(path.name for path in folders[0].glob("model-*.safetensors"))
    assert len(files) > 1
    for name in files:
        parts = [weights(folder, name) for folder in folders]
        for key, value in weights(tmp_path / "average", name).items():
            assert torch.equal(value, ((parts[0][key].float() + parts[1][key] + parts[2][key]) / 3).bfloat16())
    AutoModelForCausalLM.from_pretrained(tmp_path / "average")


@pytest.mark.chaos
def test_adapters_are_averaged(gpt, tmp_path):
    (tmp_path / "text.txt").write_text("Anna sees the cat. A king finds my friend. " * 60)
    flags = {
        "init_from": gpt,
        "train_file": tmp_path / "text.txt",
        "max_len": 32,
        "max_steps": 2,
        "r": 2,
        "save_freq": 1,
    }
    assert train(*as_flags(**flags, batch_size=4, save_model=tmp_path / "run")) == 0
    result = hf_myllm.average(tmp_path / "run", tmp_path / "average")
    parts = [weights(tmp_path / "run" / f"checkpoint-{step}", "adapter_model.safetensors") for step in (1, 2)]
    average = weights(tmp_path / "average", "adapter_model.safetensors")
    assert all(torch.equal(value, (parts[0][name] + parts[1][name]) / 2) for name, value in average.items())
    assert hf_myllm.evaluate(tmp_path / "average") == result["average"]
    with pytest.raises(CheckpointError, match="is an adapter, and the other a model"):
        hf_myllm.average([gpt, tmp_path / "run"], tmp_path / "mixed")


def test_what_cannot_be_averaged_is_one_line_and_nothing_is_written(run, tmp_path):
    first, second = run / "checkpoint-1", run / "checkpoint-2"
    other_shape = copy_of(first, tmp_path / "shape")
    tensors = weights(first)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, other_shape / "model.safetensors", {"format": "pt"})
    torn = copy_of(first, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"torn")
    other_words = copy_of(first, tmp_path / "words")
    (other_words / "tokenizer.json").write_text("{}")
    damaged = tmp_path / "checkpoint-9"
    shutil.copytree(first, damaged)
    (damaged / "model.safetensors").write_bytes(b"torn")
    one = tmp_path / "one"
    shutil.copytree(first, one / "checkpoint-1")
    before = sorted(path.name for path in tmp_path.iterdir())
    for folders, options, message in (
        ([first, copy_of(first, tmp_path / "family", model_type="llama")], {}, "model_type is 'gpt2', and 'llama' in"),
        ([first, copy_of(first, tmp_path / "head", n_head=4)], {}, "n_head is 2, and 4 in"),
        ([first, other_shape], {}, f"{name} is F32"),
        ([first, torn], {}, "model.safetensors: it cannot be read: "),
        ([first, other_words], {}, "its tokenizer.json is not that of"),
        ([first, damaged], {}, "it is damaged: model.safetensors has 4 bytes"),
        ([first], {}, "it needs at least two checkpoints"),
        (run, {"last": 1}, "it needs at least two checkpoints"),
        ([first, second, first], {}, "a folder is given twice"),
        (tmp_path / "nope", {"last": 2}, "nope: it is not a folder"),
        (one, {"last": 2}, "one: it has 1 checkpoint; an average needs two"),
        (run, {"last": 9}, "it has 8 checkpoints; give --last 8 or less"),
        ([first, second], {"last": 2}, "last: it chooses among the checkpoints of one run"),
        ([first, second], {"ema": 1.0}, "ema: 1.0 must be above 0 and below 1"),
        ([first, tmp_path], {}, "it holds no model in safetensors"),
    ):
        with pytest.raises(CheckpointError) as error:
            hf_myllm.average(folders, tmp_path / "output", **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="it exists already"):
        hf_myllm.average(run, tmp_path / "words")
    with pytest.raises(CheckpointError, match="checkpoint-99: folders of this name are the checkpoints of a run"):
        hf_myllm.average(run, run / "checkpoint-99")
    assert set(before) | {"family", "head"} == {path.name for path in tmp_path.iterdir()}


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()], ids=["disk full", "killed"])
def test_an_average_is_complete_or_absent(run, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    output = tmp_path / "average"
    for name in ("_average_tensor", "flush", "write_card"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("hf_myllm.average"), name, fail)
            with pytest.raises((CheckpointError, Killed)):
                hf_myllm.average(run, output, last=2)
        assert not output.exists()
    hf_myllm.average(run, output, last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["average"]
