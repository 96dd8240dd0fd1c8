"""A checkpoint is complete or absent, wherever its writing ends."""

import errno
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from hf_myllm import checkpoint, files
from hf_myllm.errors import CheckpointError


class Killed(BaseException):
    """Stands in for kill -9: no handler of an Exception catches it."""


def save(run_dir, step, limit=2):
    tensors = {"a/exp_avg": torch.full((4, 3), float(step)), "a/step": torch.tensor(float(step))}
    files = {"config.json": b"{}", "model.safetensors": {"a": torch.full((4, 3), 2.0 * step)}}
    files |= {"trainer_state/optimizer.safetensors": tensors, checkpoint.STATE: b"{}"}
    path = checkpoint.save(run_dir, step, files)
    checkpoint.remove_old(run_dir, limit)
    return path


class FailingDisk:
    """Counts the disk operations of a save and raises an error at operation number `at`."""

    NAMES = ["shutil.rmtree", "os.fsync", "os.open", "pathlib.Path.mkdir", "os.replace"]

    def __init__(self, monkeypatch, error, at):
        self.error, self.at, self.count, self.done = error, at, 0, set()
        for name in self.NAMES:
            self.patch(monkeypatch, name)
        monkeypatch.setattr(files, "open", self.open, raising=False)

    def fail(self, name):
        self.count += 1
        self.done.add(name)
        if self.count == self.at:
            raise self.error

    def patch(self, monkeypatch, name):
        owner, _, attribute = name.rpartition(".")
        module, _, last = owner.rpartition(".")
        owner = getattr(__import__(module), last) if last == "Path" else __import__(owner, fromlist=["."])
        original = getattr(owner, attribute)

        def operation(*args, **options):
            try:
                self.fail(name)
            except OSError:
                if not options.get("ignore_errors"):
                    raise
                return None
            return original(*args, **options)

        monkeypatch.setattr(owner, attribute, operation)

    def open(self, path, mode="r"):
        self.fail("open")
        file = open(path, mode)
        disk = self

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, block):
                disk.fail("write")
                return file.write(block)

            def flush(self):
                disk.fail("flush")
                file.flush()

            def fileno(self):
                return file.fileno()

        return File() if "x" in mode else file


ERRORS = [Killed(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")]
ERRORS += [OSError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system")]


@pytest.mark.parametrize(
    "error",
    [*ERRORS[:2], *(pytest.param(error, marks=pytest.mark.chaos) for error in ERRORS[2:])],
    ids=["killed", "full", "broken", "forbidden", "read-only"],
)
def test_a_save_that_fails_anywhere_leaves_a_complete_checkpoint(tmp_path, monkeypatch, error):
    """At each disk operation in turn: a resume gets the checkpoint before or the new one, and saving again works."""
    at, resumed_from, messages = 0, set(), set()
    for step in (10, 20):
        save(tmp_path / "before", step)
    while True:
        at += 1
        run_dir = shutil.copytree(tmp_path / "before", tmp_path / str(at))
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, error, at)
            try:
                save(run_dir, 30)
                if disk.count < at:
                    break
            except Killed:
                messages.add("")
            except CheckpointError as end:
                number = "" if isinstance(error, Killed) else error.errno
                messages.add(re.search(rf": it cannot be (?:saved|removed): \[Errno {number}\]", str(end))[0][:14])
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
    assert at > 30  # disk operations of a save
    assert disk.done == {*disk.NAMES, "open", "write", "flush"}
    assert resumed_from == {"checkpoint-20", "checkpoint-30"}
    assert messages == {"" if isinstance(error, Killed) else ": it cannot be"}


@pytest.mark.parametrize("error", ERRORS[:2], ids=["killed", "full"])
def test_a_publication_that_fails_anywhere_can_be_repeated(tmp_path, monkeypatch, error):
    """In place of the shards of a larger model; no file of theirs stays."""
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    at = 0
    while True:
        at += 1
        for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            (tmp_path / shard).write_bytes(b"old")
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, error, at)
            try:
                checkpoint.publish(second, tmp_path)
                if disk.count < at:
                    break
            except (Killed, CheckpointError):
                pass
        assert not checkpoint.has_model(tmp_path) or checkpoint.is_published(second, tmp_path)
        checkpoint.publish(second, tmp_path)
        checkpoint.publish(first, tmp_path)
    assert at > 5  # disk operations
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"config.json", "model.safetensors"}


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
    for step, seconds in ((10, 2_000_000_000), (20, 1_000_000_000), (30, 0)):
        path = save(tmp_path, step, limit=3)
        for file in [path, *path.rglob("*")]:
            os.utime(file, (seconds, seconds))
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
    assert torch.equal(load_file(staged / "model.safetensors")["a"], torch.full((4, 3), 20.0))
    assert all(checkpoint.find_corruption(tmp_path / name) is None for name in kept)


class ThreadMailbox:
    """Stands in for the store of a process group: messages between the threads of ranks."""

    def __init__(self, rank, world_size, messages):
        self.rank, self.world_size, self.messages = rank, world_size, messages

    def put(self, name, value):
        self.messages[name, self.rank] = json.loads(json.dumps(value))

    def get(self, name, rank):
        while (name, rank) not in self.messages:
            time.sleep(0.001)
        return self.messages[name, rank]


def save_sharded(run_dir, step, shards):
    """Save with one rank per shard, in threads; return the error of rank 0, or None."""
    count, messages = len(shards), {}

    def run_rank(rank):
        part = f"{rank + 1:05}-of-{count:05}.safetensors"
        files = {f"model-{part}": {f"weight{rank}": torch.full((2, 2), float(rank))}}
        files[f"trainer_state/optimizer-{part}"] = {"a/exp_avg": shards[rank], "a/step": torch.tensor(5.0)}
        files |= {"config.json": b"{}", checkpoint.STATE: b"{}"} if rank == 0 else {}
        return checkpoint.save(run_dir, step, files, ThreadMailbox(rank, count, messages))

    with ThreadPoolExecutor(count) as executor:
        first, *others = [executor.submit(run_rank, rank) for rank in range(count)]
    assert all(future.exception() is None for future in others)
    return first.exception()


def test_rows_of_the_optimizer_state_are_read_from_all_files(tmp_path):
    """Written by three ranks, of which the last has no rows, as torch.chunk shards two rows."""
    full = torch.arange(8.0).reshape(2, 4)
    assert save_sharded(tmp_path, 5, [*torch.chunk(full, 3), full[:0]]) is None
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


def test_weights_of_all_ranks_have_an_index(tmp_path):
    assert save_sharded(tmp_path, 5, [torch.zeros(2, 2)] * 3) is None
    path = checkpoint.find_latest(tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 16
    assert index["weight_map"] == {f"weight{i}": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(path / file)[name], torch.full((2, 2), float(name[-1])))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_cannot_be_written_fails_the_save(tmp_path, monkeypatch, rank):
    write = checkpoint.write_safetensors

    def write_until_full(path, *arguments):
        if f"0000{rank + 1}-of" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "write_safetensors", write_until_full)
    error = save_sharded(tmp_path, 5, list(torch.chunk(torch.zeros(6, 2), 3)))
    assert f"rank {rank}: [Errno 28] No space left on device; checkpoint-3 stays" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_folder_that_cannot_be_made_fails_the_save_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    assert "Permission denied; start again" in str(save_sharded(tmp_path, 5, [torch.zeros(2, 2)] * 3))
    assert not list(tmp_path.iterdir())
