"""Windows and macOS, as far as Linux can be made to look like them. Nothing of this was run on either.

The simulated Windows refuses what Windows does: to open a folder, to flush what is not open for writing, and to rename,
replace or remove what this process has open or memory-mapped. It lacks the same signals, functions and modules.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import assert_same_run, read_weights, train
from launching import start
from patches import import_on_windows

from hf_myllm import checkpoint, distributed, files, launcher, terminal
from hf_myllm.errors import RecipeError
from hf_myllm.hub.push import BackgroundUploads
from hf_myllm.models import loading
from hf_myllm.optim import build_optimizer, step_if
from hf_myllm.precision import choose_precision
from hf_myllm.recipe import Recipe
from hf_myllm.reporting.facts import public_value

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def files_in_use():
    """Return the paths of the files that this process has open or memory-mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(None, 5)[5] for line in lines if line.count(" /")}
    for handle in os.listdir("/proc/self/fd"):
        try:
            paths.add(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:
            continue
    return paths


@pytest.fixture
def windows(monkeypatch):
    """Return the list of what was refused."""
    refused, read_only = [], set()
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "remove", "rmdir")}

    def refuse(path):
        refused.append(str(path))
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def open_file(path, flags, *arguments, **options):
        if not isinstance(path, int) and os.path.isdir(path) and not options:  # shutil opens folders, not on Windows
            refuse(path)
        handle = real["open"](path, flags, *arguments, **options)
        if flags & (os.O_WRONLY | os.O_RDWR):
            read_only.discard(handle)
        else:
            read_only.add(handle)
        return handle

    def fsync(handle):
        if handle in read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real["fsync"](handle)

    def unless_in_use(name):
        def change(path, *arguments, dir_fd=None, **options):
            whole = os.path.realpath(path if dir_fd is None else f"/proc/self/fd/{dir_fd}/{path}")
            is_lock = Path(whole).suffix == ".lock" or ".filelock" in whole  # the library has other locks on Windows
            for target in () if is_lock else (whole, *map(os.path.realpath, arguments)):
                if any(used == target or used.startswith(f"{target}/") for used in files_in_use()):
                    refuse(target)
            if name in ("rename", "replace") and os.path.isdir(arguments[0]):
                refuse(arguments[0])
            return real[name](path, *arguments, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return change

    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename", "unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, unless_in_use(name))
    for name in ("sched_getaffinity", "sysconf", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    for name in ("SIGUSR1", "SIGPIPE", "SIGKILL"):
        monkeypatch.delattr(signal, name)
    for module, name in ((files, "IS_WINDOWS"), (checkpoint, "IS_WINDOWS"), (terminal, "_IS_WINDOWS")):
        monkeypatch.setattr(module, name, True)
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(distributed, "resource", None)
    monkeypatch.setattr(launcher, "sys", SimpleNamespace(platform="win32", argv=sys.argv))
    return refused


@pytest.mark.chaos  # looks up the files in use at each change of the disk
def test_a_run_on_windows_saves_resumes_and_ends_with_the_same_bytes(tiny, tmp_path, windows, monkeypatch):
    """It removes old checkpoints, resumes from one, whose files stay mapped, and replaces the published model."""
    monkeypatch.setattr(files, "_RENAME_TRIES", 1)
    flags, run = tiny(max_steps=12, save_freq=4, save_total_limit=1, eval_freq=12), tmp_path / "run"
    assert train(*flags, "--save_model", run) == 0
    longer = [*flags, "--save_model", run, "--max_steps", 24, "--allow_changed", "--init_from", "resume"]
    assert train(*longer) == 0
    kept = [path.name for path in run.glob("checkpoint-*")]  # that of step 12 for the next launch to remove
    assert sorted(kept) == ["checkpoint-12", "checkpoint-24"]
    assert not list(run.glob("*.partial"))
    monkeypatch.undo()
    one = tmp_path / "one"
    assert train(*flags, "--save_model", one) == 0
    assert train(*[*longer, "--save_model", one]) == 0
    assert_same_run(run, one, 0)
    assert read_weights(run) == read_weights(one)
    assert not checkpoint.find_corruption(run / "checkpoint-24")


def test_what_is_mapped_is_removed_by_a_later_save(tmp_path, windows, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}" / "trainer_state"
        folder.mkdir(parents=True)
        for name in ("complete.json", "tensor"):
            (folder / name).write_bytes(b"x")
    with open(tmp_path / "checkpoint-1" / "trainer_state" / "tensor", "rb"):
        checkpoint.remove_old(tmp_path, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    checkpoint.remove_old(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert windows


def test_a_rename_is_tried_again(tmp_path, windows, monkeypatch):
    (tmp_path / "a").write_text("a")
    file = open(tmp_path / "a")  # as a virus scanner has it open for a moment
    monkeypatch.setattr(files.time, "sleep", lambda seconds: file.close())
    files.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


@pytest.mark.chaos  # imports everything again
def test_every_module_is_imported_without_what_windows_lacks():
    process = start(patch=import_on_windows)
    assert process.wait(60) == 0, process.output()
    assert "modules imported" in process.output()[0]


def test_an_upload_is_cancelled_and_commands_are_quoted_as_windows_does(monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "_IS_WINDOWS", True)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    signals, options = [], {}

    class Popen:
        returncode = 1

        def __init__(self, arguments, **given):
            options.update(given)

        def poll(self):
            return None

        def send_signal(self, signum):
            signals.append(signum)

        def wait(self, timeout):
            return 1

        def communicate(self):
            return "", None

    monkeypatch.setattr(subprocess, "Popen", Popen)
    uploads = BackgroundUploads(Path(r"C:\my runs\one"), "user/name")
    (tmp_path / "config.json").write_text("{}")
    uploads._start(tmp_path)
    line = uploads.stop()
    assert (signals, options["creationflags"]) == ([1], 512)
    assert line.endswith(r'hf-myllm push "C:\my runs\one" user/name')


def test_the_drive_of_a_mac_flushes_its_cache(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        files, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda handle, command: calls.append(command))
    )
    (tmp_path / "file").write_text("")
    files.flush(tmp_path / "file")
    files.flush(tmp_path)
    assert calls == [51, 51]


def test_the_gpu_of_a_mac(monkeypatch):
    """Its name decides; the optimizer is that of any device that has no fused one."""
    mps = torch.device("mps")
    assert [choose_precision(name, mps) for name in ("auto", "fp32", "bf16", "fp16")] == [
        "fp32",
        "fp32",
        "bf16",
        "fp16",
    ]
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    assert distributed.peak_memory(SimpleNamespace(device=mps)) == 7
    layer = torch.nn.Linear(2, 2, device="meta")
    optimizer = build_optimizer(layer, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    assert not optimizer.defaults["fused"]
    steps = []
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(1))
    step_if(optimizer, torch.tensor(False))
    step_if(optimizer, torch.tensor(True))
    assert steps == [1]
    model = SimpleNamespace(config=SimpleNamespace(to_dict=dict))  # sets no attention
    loading.use_flex_attention(model, mps.type)


# ---- paths


def test_paths_with_backslashes_are_values(tiny, stories, tmp_path, monkeypatch):
    """Here they are names of files in this folder, and of a glob; in flags, in YAML and in the recipe of the run."""
    monkeypatch.chdir(tmp_path)
    for index, path in enumerate(sorted(stories.iterdir())[:20]):
        shutil.copy(path, rf"C:\new texts\{index}.txt")
    run, glob = r"D:\runs\table", r"C:\new texts\*.txt"
    assert train(*tiny(max_steps=2, train_file=glob, save_model=run)) == 0
    assert Recipe.load(f"{run}/recipe.yaml").data.train_file == glob
    Path("recipe.yaml").write_text(f"data: {{val_file: {{a: {glob}, b: '{glob}'}}}}\nrun: {{save_model: {run}}}\n")
    recipe = Recipe.load("recipe.yaml", train_file=[glob])
    assert (recipe.data.val_file, recipe.data.train_file) == ({"a": glob, "b": glob}, [glob])
    assert recipe.run.save_model == run
    assert yaml.safe_load(recipe.to_yaml())["run"]["save_model"] == run
    assert public_value(r"C:\Users\me\secret\text.txt", "train_file") == "text.txt"
    assert train(f"{run}/recipe.yaml", "--init_from", "resume", "--save_model", run, "--quiet") == 0


@pytest.mark.parametrize("value", [r'"C:\new\table"', r'"D:\runs\two"'])
def test_a_path_in_double_quotes_is_refused(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text(f"run: {{save_model: {value}}}\n")
    with pytest.raises(RecipeError, match="without double quotes"):
        Recipe.load(tmp_path / "recipe.yaml")
