"""A checkpoint is complete or absent, wherever its writing ends."""

import json
import os
import re
import shutil
import threading

import pytest
import torch

from hf_myllm import checkpoint
from hf_myllm.errors import CheckpointError


class Killed(BaseException):
    """Stands in for kill -9: no handler of an Exception catches it."""


def write_model(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))


def save(run_dir, step, limit=2):
    tensors = {"a/exp_avg": torch.full((4, 3), float(step)), "a/step": torch.tensor(float(step))}
    path = checkpoint.save(run_dir, step, write_model, tensors, {"step": step})
    checkpoint.remove_old(run_dir, limit)
    return path


class FailingDisk:
    """Counts the disk operations of a save and raises an error at operation number `at`."""

    NAMES = ["shutil.rmtree", "os.fsync", "pathlib.Path.mkdir", "pathlib.Path.write_text", "pathlib.Path.rename"]
    NAMES += ["pathlib.Path.chmod", "hf_myllm.checkpoint.save_file", "hf_myllm.checkpoint.digest_file"]

    def __init__(self, monkeypatch, error, at):
        self.error, self.at, self.count = error, at, 0
        for name in self.NAMES:
            self.patch(monkeypatch, name)

    def patch(self, monkeypatch, name):
        owner, _, attribute = name.rpartition(".")
        module, _, last = owner.rpartition(".")
        owner = getattr(__import__(module), last) if last == "Path" else __import__(owner, fromlist=["."])
        original = getattr(owner, attribute)

        def operation(*args, **options):
            self.count += 1
            if self.count == self.at:
                if options.get("ignore_errors") and isinstance(self.error, OSError):
                    return None
                raise self.error
            return original(*args, **options)

        monkeypatch.setattr(owner, attribute, operation)


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_a_save_that_fails_anywhere_leaves_a_complete_checkpoint(tmp_path, monkeypatch, error):
    """At each disk operation in turn: a resume gets the checkpoint before or the new one, and saving again works."""
    at, resumed_from, messages = 0, set(), set()
    while True:
        at += 1
        run_dir = tmp_path / str(at)
        for step in (10, 20):
            save(run_dir, step)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, error, at)
            try:
                save(run_dir, 30)
                if disk.count < at:
                    break
            except Killed:
                messages.add("")
            except CheckpointError as end:
                messages.add(re.search(r": it cannot be (?:saved|removed): \[Errno 28\]", str(end))[0][:14])
            except OSError:
                pytest.fail("a disk error is not turned into a CheckpointError")
        newest = checkpoint.find_latest(run_dir)
        resumed_from.add(newest.name)
        assert checkpoint.find_corruption(newest) is None
        checkpoint.remove_partial(run_dir)
        assert not list(run_dir.glob("*.partial"))
        save(run_dir, 30)
        assert checkpoint.find_latest(run_dir).name == "checkpoint-30"
        assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-20", "checkpoint-30"]
    assert at > 20  # disk operations of a save
    assert resumed_from == {"checkpoint-20", "checkpoint-30"}
    assert messages == {"" if isinstance(error, Killed) else ": it cannot be"}


def test_any_torn_file_is_detected(tmp_path):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    intact = tmp_path / "intact"
    shutil.copytree(newest, intact)
    for file in sorted(path.relative_to(intact) for path in intact.rglob("*") if path.is_file()):
        content = (intact / file).read_bytes()
        for torn in (None, b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            (newest / file).unlink()
            if torn is not None:
                (newest / file).write_bytes(torn)
            warnings = []
            assert checkpoint.find_latest(tmp_path, warnings.append).name == "checkpoint-10", (file, torn)
            assert len(warnings) == 1
            assert "checkpoint-20" in warnings[0]
            (newest / file).write_bytes(content)
    assert checkpoint.find_latest(tmp_path) == newest


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_clock(tmp_path):
    for step, time in ((10, 2_000_000_000), (20, 1_000_000_000), (30, 0)):
        path = save(tmp_path, step, limit=3)
        for file in [path, *path.rglob("*")]:
            os.utime(file, (time, time))
    assert checkpoint.find_latest(tmp_path).name == "checkpoint-30"
    save(tmp_path, 40, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]


def test_retention_keeps_milestones_the_best_and_what_is_uploaded(tmp_path):
    for step in range(5, 60, 5):
        save(tmp_path, step, limit=None)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"checkpoint-{step}" for step in range(5, 60, 5)}
    staged = checkpoint.stage(tmp_path / "checkpoint-10")
    checkpoint.remove_old(tmp_path, 2, keep=35, keep_every=20)
    kept = {"checkpoint-20", "checkpoint-35", "checkpoint-40", "checkpoint-50", "checkpoint-55"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {staged.name}
    assert (staged / "model.safetensors").read_bytes() == bytes(1000)
    assert all(checkpoint.find_corruption(tmp_path / name) is None for name in kept)


def save_sharded(run_dir, step, shards):
    """Save with one rank per shard, in threads; return the error of each rank, or None."""
    world_size = len(shards)
    barrier, values, errors = threading.Barrier(world_size), {}, [None] * world_size

    def run_rank(rank):
        def all_gather(value):
            values[rank] = value
            barrier.wait()
            gathered = [values[other] for other in range(world_size)]
            barrier.wait()
            return gathered

        tensors = {"a/exp_avg": shards[rank].contiguous(), "a/step": torch.tensor(5.0)}
        try:
            checkpoint.save(run_dir, step, write_model, tensors, {}, rank, world_size, all_gather)
        except CheckpointError as error:
            errors[rank] = error

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_rows_of_the_optimizer_state_are_read_from_all_files(tmp_path):
    """Written by three ranks, of which the last has no rows, as torch.chunk shards two rows."""
    full = torch.arange(8.0).reshape(2, 4)
    assert save_sharded(tmp_path, 5, [*torch.chunk(full, 3), full[:0]]) == [None] * 3
    path = checkpoint.find_latest(tmp_path)
    stray = path / "trainer_state" / "optimizer-00004-of-00004.safetensors"
    shutil.copy(path / "trainer_state" / "optimizer-00001-of-00003.safetensors", stray)  # not listed in the marker
    files = checkpoint.OptimizerFiles(path)
    assert sorted(files) == ["a/exp_avg", "a/step"]
    assert files.rows("a/step") == 5
    for start, stop in ((0, None), (0, 1), (1, 2), (0, 2), (2, 2), (1, None)):
        assert torch.equal(files.rows("a/exp_avg", start, stop), full[start:stop])
    name = "trainer_state/optimizer-00002-of-00003.safetensors"
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        checkpoint.find_latest(tmp_path)
    marker = json.loads((path / "trainer_state" / "complete.json").read_text())
    del marker["files"][name]
    (path / "trainer_state" / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="does not list .*of all ranks"):
        checkpoint.find_latest(tmp_path)


def test_a_shard_that_cannot_be_written_fails_the_save_on_all_ranks(tmp_path, monkeypatch):
    save_file = checkpoint.save_file

    def save_until_full(tensors, path):
        if "00002-of" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "save_file", save_until_full)
    first, second, third = save_sharded(tmp_path, 5, list(torch.chunk(torch.zeros(6, 2), 3)))
    assert "rank 1: [Errno 28] No space left on device; checkpoint-3 stays" in str(first)
    assert str(first) == str(second) == str(third)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
