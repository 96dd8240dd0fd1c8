"""Checkpoints: written whole or not at all, found, verified, retained.

RUN/checkpoint-200/ is the model folder of step 200, with trainer_state/ beside the weights:

    trainer_state/optimizer.safetensors   the optimizer's moments; from sharded training (FSDP2) one file per process,
                                          optimizer-00001-of-00004.safetensors, each with its rows of every tensor
    trainer_state/state.json              the step, the recipe, the data's fingerprints
    trainer_state/complete.json           every file's size and digest, written last: the marker

A checkpoint is written under another name, flushed to the disk, marked, and renamed, so that a folder by the name
checkpoint-N is complete even when the machine fails in the middle.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InputError
from .files import PARTIAL, atomic_path

_MARKER = "trainer_state/complete.json"
_STATE = "trainer_state/state.json"
_OPTIMIZER = "trainer_state/optimizer"
_OF_A_MODEL = {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"}
_OF_A_MODEL |= {"adapter_config.json", "adapter_model.safetensors", "model_config.json"}


class ShardError(InputError):
    """A process that is not the first could not write its part of a checkpoint; the first says that there was one."""


def save(
    run, step, write_model, optimizer_tensors, state, limit, shard=(0, 1), exchange=lambda value: [value], keep=None
):
    """Write RUN/checkpoint-<step>, then remove the oldest ones beyond `limit`.

    Args:
        write_model: called with a folder, writes the model into it.
        optimizer_tensors, state: a flat dict of tensors, and what else to remember, as JSON allows it.
        shard: (number, count) of the processes that call this together, each with its rows of the tensors; the first
            writes all the rest.
        exchange: gives each of them the values of all, in their order.
        keep: a step whose checkpoint stays, however old.
    Returns:
        the checkpoint's folder.
    Raises:
        InputError: it cannot be written (no space, no permission); the checkpoints before it are untouched.
    """
    final = Path(run) / f"checkpoint-{step}"
    aside = final.with_name(final.name + PARTIAL)
    number, count = shard
    theirs = OSError("another process could not write its part")
    part = aside / (_OPTIMIZER + (f"-{number + 1:05}-of-{count:05}" if count > 1 else "") + ".safetensors")

    def begin():
        if number == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "trainer_state").mkdir(parents=True)

    def write_part():
        save_file(optimizer_tensors, part)
        _flush(part)
        return str(part.relative_to(aside)), [part.stat().st_size, _digest(part)]  # each its own: it may be large

    def on_all(work):
        """What it gives on each process; an error on any is an error on all."""
        value = problem = None
        try:
            value = work()
        except (OSError, SafetensorError) as error:
            problem = error
        found = exchange((problem is not None, value))
        if problem or any(is_bad for is_bad, _ in found):
            raise problem or theirs
        return [value for _, value in found]

    try:
        on_all(begin)
        parts = dict(on_all(write_part))
        if number > 0:
            return final
        write_model(aside)
        (aside / _STATE).write_text(json.dumps(state, indent=1))
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        mode = (aside / _STATE).stat().st_mode
        for path in files:
            path.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask
        names = {str(path.relative_to(aside)): path for path in files}
        content = {name: parts.get(name) or [path.stat().st_size, _digest(path)] for name, path in names.items()}
        (aside / _MARKER).write_text(json.dumps({"step": step, "files": content}, indent=1))
        for path in [
            *(path for name, path in names.items() if name not in parts),
            aside / _MARKER,
            aside / "trainer_state",
            aside,
        ]:
            _flush(path)
        if final.exists():  # a damaged one, which find() passed over
            _remove(final)
        aside.rename(final)
        _flush(final.parent)
        for path in Path(run).glob("checkpoint-*"):
            if step_of(path) > step:  # damaged, or find() would have gone on from it
                _remove(path)
    except (OSError, SafetensorError) as error:
        if number == 0:
            shutil.rmtree(aside, ignore_errors=True)
        before = [path.name for _, path in _complete(run)]
        kept = f"{before[0]} stays, and --init_from resume goes on from it" if before else "there is none before it"
        raise (InputError if number == 0 or error is theirs else ShardError)(
            f"cannot save {final}: {error}; {kept}"
        ) from None
    for path in [path for old, path in _complete(run)[limit:] if old != keep]:
        try:
            _remove(path)
        except OSError as error:
            raise InputError(
                f"cannot remove {path}: {error}; {final} is saved, and --init_from resume goes on"
            ) from None
    return final


def find_latest(run, warn=lambda message: None):
    """The newest checkpoint of a run that is whole, or None when there is none at all.

    Args:
        warn: called with a line for each damaged checkpoint passed over.
    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    problems = []
    for path in sorted(Path(run).glob("checkpoint-*"), key=step_of, reverse=True):
        if step_of(path) < 0:
            continue
        problem = find_corruption(path)
        if problem is None:
            for line in problems:
                warn(f"passed over {line}")
            return path
        problems.append(f"{path}: {problem}")
    if problems:
        raise InputError(f"no checkpoint in {run} is whole: {'; '.join(problems)}")
    return None


def find_model(run):
    """The folder with a run's model: its root or, while there is none yet, its newest checkpoint.

    Raises:
        InputError: there is neither, or no checkpoint is whole.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run} is not a folder; give the folder of a run, or one of its checkpoints")
    if not has_model(folder):
        folder = find_latest(folder)
        if folder is None:
            raise InputError(f"{run} holds no trained model: no model.safetensors and no checkpoint")
    return folder


def find_corruption(path):
    """What is wrong with a checkpoint, in a few words, or None when every file is as it was written."""
    try:
        content = {name: (size, digest) for name, (size, digest) in _read_marker(path).items()}
    except FileNotFoundError:
        return f"incomplete, it has no {_MARKER}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MARKER} cannot be read"
    missing = {_STATE} - set(content)
    if not {"config.json", "adapter_config.json"} & set(content):
        missing.add("config.json")
    parts = [name for name in content if name.startswith(_OPTIMIZER)]
    if not parts or any(f"-of-{len(parts):05}" not in name for name in parts if "-of-" in name):
        missing.add(f"{_OPTIMIZER}*.safetensors, all parts")
    if missing:
        return f"its {_MARKER} does not list {', '.join(sorted(missing))}"
    for name, (size, digest) in content.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != digest:
            return f"{name} has other bytes than were written"
    return None


def load_state(path):
    return json.loads((Path(path) / _STATE).read_text())


class OptimizerFiles:
    """The optimizer's tensors of a checkpoint, of one file or of several, each with some rows of every tensor."""

    def __init__(self, path):
        files = sorted(name for name in _read_marker(path) if name.startswith(_OPTIMIZER))  # and no other that is there
        self._parts = [safe_open(Path(path) / file, framework="pt") for file in files]

    def __iter__(self):
        return iter(self._parts[0].keys())

    def rows(self, name, start=0, stop=None):
        """Rows [start, stop) of a tensor, wherever they lie; of a number, the number."""
        found, before = [], 0
        for part in self._parts:
            rows = part.get_slice(name)
            if not rows.get_shape():
                return part.get_tensor(name)
            first, length = max(0, start - before), rows.get_shape()[0]
            last = length if stop is None else min(length, stop - before)
            if first < last or not found:  # of an empty piece, the shape
                found.append(rows[first : max(first, last)])
            before += length
        return found[0] if len(found) == 1 else torch.cat(found)


def remove_partial(run):
    """Remove what a killed process left half-written or half-removed."""
    for path in Path(run).glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def stage(checkpoint):
    """Return a folder beside a checkpoint with a copy of its model, kept until [`unstage`] or [`remove_partial`]."""
    aside = checkpoint.with_name(f"{checkpoint.name}.upload{PARTIAL}")
    unstage(aside)
    aside.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            link_or_copy(path, aside / path.name)
    return aside


def unstage(aside):
    shutil.rmtree(aside, ignore_errors=True)


def link_or_copy(path, name):
    """Give a file that is not written to any more another name, in another folder even."""
    if not _link(path, name):
        shutil.copyfile(path, name)


def publish(checkpoint, run):
    """Make the model of a checkpoint the model at the run's root.

    The weights are linked rather than copied where the disk can; the small files, which people edit, are copied.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        files = sorted(path for path in Path(checkpoint).iterdir() if path.is_file())
        # the weights last, and after them their index: what has_model() looks for means that all is there
        files.sort(key=lambda path: (path.name.endswith(".index.json"), path.suffix == ".safetensors"))
        for name in _OF_A_MODEL - {path.name for path in files}:  # of a model of the other kind: whole, or an adapter
            (Path(run) / name).unlink(missing_ok=True)
        for path in files:
            with atomic_path(Path(run) / path.name) as partial:
                if path.suffix != ".safetensors" or not _link(path, partial):
                    shutil.copyfile(path, partial)
                    _flush(partial)
        _flush(run)
    except OSError as error:
        raise InputError(f"cannot write the model into {run}: {error}; {checkpoint} has it whole") from None


def publish_new(write_model, run):
    """Make what `write_model(folder)` writes the model at the run's root; see [`publish`]."""
    aside = Path(run) / f"checkpoint-merged{PARTIAL}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_model(aside)
        mode = (aside / "config.json").stat().st_mode
        for path in aside.iterdir():
            path.chmod(mode)  # see save
            _flush(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the model into {run}: {error}") from None
    publish(aside, run)
    shutil.rmtree(aside, ignore_errors=True)


def is_published(checkpoint, run):
    """Whether the model at the run's root is this checkpoint's, and not that of a shorter run before it."""
    model = {name: record for name, record in _read_marker(checkpoint).items() if "/" not in name}
    return all(
        (Path(run) / name).is_file() and _digest(Path(run) / name) == digest for name, (_, digest) in model.items()
    )


def has_checkpoints(run):
    return any(step_of(path) >= 0 for path in Path(run).glob("checkpoint-*"))


def snapshot(run):
    """What tells whether a run has been written to since: its checkpoints and weights, and when they were made."""
    found = {}
    with suppress(OSError, ValueError):  # of a folder that cannot be, more is said elsewhere
        for path in [*Path(run).glob("checkpoint-*"), *Path(run).glob("*.safetensors")]:
            found[path] = path.stat().st_mtime_ns
    return found


def has_model(run):
    names = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
    return any((Path(run) / name).exists() for name in names)


def step_of(path):
    """The step of a checkpoint's folder, by its name; -1 of any other."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def _read_marker(path):
    return json.loads((Path(path) / _MARKER).read_text())["files"]


def _complete(run):
    """(step, folder) of the checkpoints that have a marker, newest first."""
    found = [(step_of(path), path) for path in Path(run).glob("checkpoint-*") if (path / _MARKER).exists()]
    return sorted((pair for pair in found if pair[0] >= 0), reverse=True)


def _remove(path):
    # renamed first: a removal that is cut short leaves nothing by a checkpoint's name
    doomed = path.with_name(path.name + ".old" + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _link(path, name):
    try:
        os.link(path, name)
        return True
    except OSError:
        return False


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
