"""A checkpoint is written beside the training: it holds the state of its step, and its errors are not lost."""

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import read_weights
from safetensors.torch import load_file, save_file

import hf_myllm
from hf_myllm import checkpoint
from hf_myllm.errors import CheckpointError, InputError
from hf_myllm.models import export
from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.recipe import Recipe
from hf_myllm.saver import HostMemory, Saver

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def test_files_are_those_of_safetensors(tmp_path):
    tensors = {f"{index % 5}{dtype}": torch.arange(7).to(dtype) for index, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(1.5), 'é"\\': torch.zeros(0, 3), "view": torch.arange(12.0).view(3, 4).T}
    size, digest = export.write_safetensors(tmp_path / "ours", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert size == (tmp_path / "ours").stat().st_size
    assert digest == checkpoint.digest_file(tmp_path / "ours")


def test_host_memory_is_used_again():
    memory, tensors = HostMemory(), {"a": torch.arange(5.0), "b": torch.arange(6).view(2, 3).T, "c": torch.tensor(2)}
    copies = memory.copy(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
    tensors["a"] += 1
    assert copies["a"][0] == 0
    again = memory.copy(tensors, ["a"])
    assert list(again) == ["a"]
    assert torch.equal(again["a"], tensors["a"])
    assert memory.copy(tensors)["a"].data_ptr() == copies["a"].data_ptr()


def test_parts_of_the_weights_make_up_the_stock_weights(tmp_path):
    torch.manual_seed(0)
    model = GPTForCausalLM(
        GPTConfig(n_layer=3, n_embd=32, n_head=2, vocab_size=99, n_positions=64, bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(tmp_path)
    expected, weights = load_file(tmp_path / "model.safetensors"), export.weights_to_save(model)
    for count in (1, 2, 5, 50):
        parts = export.partition(weights, count)
        stored = [export.as_stored(model, {name: weights[name] for name in part}) for part in parts]
        assert len(parts) <= count
        assert sum(map(len, stored)) == len(expected)
        for part in stored:
            assert all(torch.equal(tensor, expected[name]) for name, tensor in part.items())
    sizes = [sum(weights[name].nbytes for name in part) for part in export.partition(weights, 3)]
    assert max(sizes) < 1.5 * min(sizes)


def test_a_run_in_a_thread_saves_after_the_main_thread_has_ended(monkeypatch):
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)  # as Python sets it while it waits for the thread
    written, accelerator = [], SimpleNamespace(num_processes=1)
    with Saver(accelerator) as saver:
        saver.begin(lambda: written.append(1))
        assert saver.wait() is None
    assert written == [1]


# ---- runs


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.txt").write_text("Anna sees the cat. A king finds my friend. " * 60)
    return Recipe(
        config={"n_layer": 1, "n_head": 2, "n_embd": 16},
        data={
            "train_file": str(tmp_path / "text.txt"),
            "tokenizer": {"train": "bpe", "vocab_size": 270},
            "max_len": 16,
        },
        training={"max_steps": 8, "batch_size": 4},
        evaluation={"eval_freq": None, "start_context": ""},
        run={"save_model": str(tmp_path / "run"), "save_freq": 2, "save_total_limit": 9},
    )


def state_of(path):
    return (path / "model.safetensors").read_bytes(), (path / "trainer_state/optimizer.safetensors").read_bytes()


def test_training_goes_on_while_a_checkpoint_is_written(recipe, tmp_path, monkeypatch):
    """The writing of checkpoint-2 begins after step 4. It holds the state of step 2, and checkpoint-4 follows it."""
    recipe.run.save_model = str(tmp_path / "reference")
    hf_myllm.train(recipe)
    save, reached, written = checkpoint.save, threading.Event(), []

    def save_after_step_4(run_dir, step, *arguments):
        assert reached.wait(60)
        written.append(step)
        return save(run_dir, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", save_after_step_4)
    recipe.run.save_model = str(tmp_path / "run")
    result = hf_myllm.train(recipe, on_log=lambda entry: reached.set() if entry.get("step") == 4 else None)
    assert written == [2, 4, 6, 8]
    assert result.step == 8
    for step in written:
        path = tmp_path / "run" / f"checkpoint-{step}"
        assert checkpoint.find_corruption(path) is None
        assert state_of(path) == state_of(tmp_path / "reference" / path.name)
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "reference")


def fail_at(monkeypatch, steps):
    """Let the disk be full while the checkpoints of some steps are written."""
    write = checkpoint.write_safetensors

    def write_or_fail(path, *arguments):
        if any(f"checkpoint-{step}." in str(path) for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_safetensors", write_or_fail)


def test_a_checkpoint_that_cannot_be_written_is_known_at_the_next(recipe, tmp_path, monkeypatch, capsys):
    """A warning if the next can be written, so that no training is lost; else an error."""
    fail_at(monkeypatch, {4})
    assert hf_myllm.train(recipe).step == 8
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 6, 8)]
    problem = f"{run / 'checkpoint-4'}: it cannot be saved: [Errno 28] No space left on device; checkpoint-2 stays"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-4" in line]
    assert problem in line
    assert line.endswith("checkpoint-6 is saved")

    fail_at(monkeypatch, {4, 6, 8})
    recipe.run.save_model = str(tmp_path / "failed")
    with pytest.raises(CheckpointError, match="checkpoint-6: it cannot be saved: .*checkpoint-2 stays; resume from it"):
        hf_myllm.train(recipe)
    assert [path.name for path in (tmp_path / "failed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "failed" / "model.safetensors").exists()
    monkeypatch.undo()
    recipe.run.resume = True
    hf_myllm.train(recipe)
    assert read_weights(tmp_path / "failed") == read_weights(run)


def test_the_last_checkpoint_that_cannot_be_written_is_an_error(recipe, tmp_path, monkeypatch):
    fail_at(monkeypatch, {8})
    with pytest.raises(CheckpointError, match="checkpoint-8: it cannot be saved: .*checkpoint-6 stays"):
        hf_myllm.train(recipe)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("error", [InputError("a mistake"), KeyboardInterrupt()], ids=["error", "second Ctrl-C"])
def test_an_error_completes_the_checkpoint_in_flight_and_an_interruption_gives_it_up(
    recipe, tmp_path, monkeypatch, error
):
    write, begun = checkpoint.write_safetensors, threading.Event()

    def write_slowly(path, tensors, must_stop):
        begun.set()
        for _ in range(30):
            if must_stop():
                break
            time.sleep(0.01)
        return write(path, tensors, must_stop)

    def fail(entry):
        if entry.get("step") == 3:
            assert begun.wait(60)
            raise error

    monkeypatch.setattr(checkpoint, "write_safetensors", write_slowly)
    with pytest.raises(type(error)):
        hf_myllm.train(recipe, on_log=fail)
    expected = ["checkpoint-2"] if isinstance(error, InputError) else []
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == expected
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hf_myllm")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_waits_for_the_checkpoint(recipe, tmp_path, monkeypatch, number):
    """Of the step that it interrupts, and of the one in flight."""
    write = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda *arguments: time.sleep(0.1) or write(*arguments))
    result = hf_myllm.train(recipe, on_log=lambda entry: os.kill(os.getpid(), number) if entry["step"] == 3 else None)
    assert result.stop_signal == number
    for path in (tmp_path / "run" / "checkpoint-2", tmp_path / "run" / f"checkpoint-{result.step}"):
        assert checkpoint.find_corruption(path) is None
