"""A checkpoint is whole or absent, wherever its writing ends."""

import json
import os
import shutil
import threading

import pytest
import torch

from hf_myllm import checkpoint
from hf_myllm.errors import InputError


class Killed(BaseException):
    """Stands in for kill -9: no handler of an Exception may tidy up after it."""


def write_model(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))


def save(run, step, limit=2, **options):
    tensors = {"a/exp_avg": torch.full((4, 3), float(step)), "a/step": torch.tensor(float(step))}
    return checkpoint.save(run, step, write_model, tensors, {"step": step}, limit, **options)


class Stages:
    """Counts what a save does to the disk, and lets an error through at one of them."""

    NAMES = ["shutil.rmtree", "os.fsync", "pathlib.Path.mkdir", "pathlib.Path.write_text", "pathlib.Path.rename"]
    NAMES += ["pathlib.Path.chmod", "hf_myllm.checkpoint.save_file", "hf_myllm.checkpoint._digest"]

    def __init__(self, monkeypatch, error, at):
        self.error, self.at, self.count = error, at, 0
        for name in self.NAMES:
            self.put_before(monkeypatch, name)

    def put_before(self, monkeypatch, name):
        owner, _, leaf = name.rpartition(".")
        module, _, kind = owner.rpartition(".")
        owner = getattr(__import__(module), kind) if kind == "Path" else __import__(owner, fromlist=["."])
        original = getattr(owner, leaf)

        def stage(*arguments, **options):
            self.count += 1
            if self.count == self.at:
                if options.get("ignore_errors") and isinstance(self.error, OSError):
                    return None
                raise self.error
            return original(*arguments, **options)

        monkeypatch.setattr(owner, leaf, stage)


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_wherever_a_save_ends_there_is_a_whole_checkpoint(tmp_path, monkeypatch, error):
    """At each of its steps in turn: what resumes is the checkpoint before or the new one, and saving again works."""
    at, found, said = 0, set(), set()
    while True:
        at += 1
        run = tmp_path / str(at)
        for step in (10, 20):
            save(run, step)
        with monkeypatch.context() as patch:
            stages = Stages(patch, error, at)
            try:
                save(run, 30)
                if stages.count < at:
                    break
            except (Killed, InputError) as end:
                said.add(str(end)[:7])
            except OSError:
                pytest.fail("an error of the disk is not said in a line")
        newest = checkpoint.find_latest(run)
        found.add(newest.name)
        assert checkpoint.find_corruption(newest) is None
        checkpoint.remove_partial(run)
        assert not list(run.glob("*.partial"))
        save(run, 30)
        assert checkpoint.find_latest(run).name == "checkpoint-30"
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-20", "checkpoint-30"]
    assert at > 20  # it does as much to the disk
    assert found == {"checkpoint-20", "checkpoint-30"}
    assert said == {"" if isinstance(error, Killed) else "cannot "}


def test_any_file_that_is_torn_is_seen(tmp_path):
    save(tmp_path, 10)
    whole = save(tmp_path, 20)
    aside = tmp_path / "aside"
    shutil.copytree(whole, aside)
    for file in sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file()):
        content = (aside / file).read_bytes()
        for torn in (None, b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            (whole / file).unlink()
            if torn is not None:
                (whole / file).write_bytes(torn)
            warnings = []
            assert checkpoint.find_latest(tmp_path, warnings.append).name == "checkpoint-10", (file, torn)
            assert len(warnings) == 1
            assert "checkpoint-20" in warnings[0]
            (whole / file).write_bytes(content)
    assert checkpoint.find_latest(tmp_path) == whole


def test_the_clock_has_no_say(tmp_path):
    """A machine whose clock is behind wrote the newer one."""
    for step, when in ((10, 2_000_000_000), (20, 1_000_000_000), (30, 0)):
        path = save(tmp_path, step, limit=3)
        for file in [path, *path.rglob("*")]:
            os.utime(file, (when, when))
    assert checkpoint.find_latest(tmp_path).name == "checkpoint-30"
    save(tmp_path, 40, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]


def save_in_parts(run, step, shares):
    """A save by as many processes as there are shares, in threads that wait for each other as processes would."""
    barrier, values, ends = threading.Barrier(len(shares)), {}, [None] * len(shares)

    def process(number):
        def exchange(value):
            values[number] = value
            barrier.wait()
            found = [values[other] for other in range(len(shares))]
            barrier.wait()
            return found

        tensors = {"a/exp_avg": shares[number].contiguous(), "a/step": torch.tensor(5.0)}
        try:
            checkpoint.save(run, step, write_model, tensors, {}, 1, (number, len(shares)), exchange)
        except InputError as error:
            ends[number] = error

    threads = [threading.Thread(target=process, args=(number,)) for number in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_rows_of_the_optimizer_are_found_in_whichever_file(tmp_path):
    """Written by three processes of which one has nothing, as torch.chunk deals out two rows."""
    whole = torch.arange(8.0).reshape(2, 4)
    assert save_in_parts(tmp_path, 5, [*torch.chunk(whole, 3), whole[:0]]) == [None] * 3
    path = checkpoint.find_latest(tmp_path)
    stray = path / "trainer_state" / "optimizer-00004-of-00004.safetensors"
    shutil.copy(path / "trainer_state" / "optimizer-00001-of-00003.safetensors", stray)  # not of this checkpoint
    files = checkpoint.OptimizerFiles(path)
    assert sorted(files) == ["a/exp_avg", "a/step"]
    assert files.rows("a/step") == 5
    for start, stop in ((0, None), (0, 1), (1, 2), (0, 2), (2, 2), (1, None)):
        assert torch.equal(files.rows("a/exp_avg", start, stop), whole[start:stop])
    name = "trainer_state/optimizer-00002-of-00003.safetensors"
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        checkpoint.find_latest(tmp_path)
    marker = json.loads((path / "trainer_state" / "complete.json").read_text())
    del marker["files"][name]
    (path / "trainer_state" / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(InputError, match="does not list .*all parts"):
        checkpoint.find_latest(tmp_path)


def test_a_part_that_cannot_be_written_ends_the_save_of_all(tmp_path, monkeypatch):
    write = checkpoint.save_file

    def full(tensors, path):
        if "00002-of" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "save_file", full)
    first, second, third = save_in_parts(tmp_path, 5, list(torch.chunk(torch.zeros(6, 2), 3)))
    assert isinstance(second, checkpoint.ShardError)
    assert "No space left" in str(second)
    assert "another process could not write its part; checkpoint-3 stays" in str(first) == str(third)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
