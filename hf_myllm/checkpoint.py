"""Write checkpoints so that they are complete or absent; find, verify, load, publish and remove them.

RUN/checkpoint-200/ is the model folder of step 200, with trainer_state/ beside the weights. Sharded training (FSDP2)
writes the weights as shards with an index, one per rank:

    trainer_state/optimizer.safetensors   the optimizer's state; from sharded training (FSDP2) one file per rank,
                                          optimizer-00001-of-00004.safetensors, with its rows of every tensor
    trainer_state/state.json              the step, the recipe, the data's fingerprints
    trainer_state/complete.json           the marker, written last: size and SHA-256 digest of every other file

A checkpoint is written under a temporary name, hashed while it is written, flushed to disk, marked, and renamed. So a
folder named checkpoint-N is complete even if the machine fails while it is written. The training goes on meanwhile: see
saver.py.
"""

import json
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from typing_extensions import Required, TypedDict

from .errors import CheckpointError, first_line, library_errors
from .files import (
    IS_WINDOWS,
    PARTIAL,
    atomic_path,
    digest_file,
    flush,
    link_or_copy,
    regular_files,
    rename,
    share_mode,
    write_and_digest,
)
from .models.export import SHARD, write_safetensors
from .models.revisions import resolve

_MARKER = "trainer_state/complete.json"
STATE = "trainer_state/state.json"
_OPTIMIZER = "trainer_state/optimizer"
_WEIGHTS = {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "adapter_model.safetensors"}
_MODEL_FILES = _WEIGHTS | {"config.json", "generation_config.json", "adapter_config.json", "model_config.json"}
_WRITE_ERRORS = (OSError, SafetensorError)


class _RecipeIdentity(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    total_batch_size: PositiveInt


class _TrainerState(TypedDict, total=False):
    """The keys of trainer_state/state.json that resuming reads."""

    __pydantic_config__ = ConfigDict(extra="allow")
    step: Required[PositiveInt]
    num_processes: Required[PositiveInt]
    recipe: Required[_RecipeIdentity]
    data: Required[dict[str, str]]
    skipped: Required[NonNegativeInt]
    mixed_precision: str
    best_since: NonNegativeInt
    milestone: bool
    scaler: dict
    stream: dict


_STATE_TYPE = TypeAdapter(_TrainerState)


# ---- writing


def save(run_dir, step, files, mailbox=None, must_stop=lambda: False):
    """Write checkpoint-<step> and return its folder.

    With sharded parameters all ranks call this together, each with files of its own; rank 0 adds the index of the
    weights' shards. An error while a rank writes is raised on rank 0.

    Args:
        files: the content by name in the folder: bytes, a flat dict of tensors on the host, or a function that returns
            one of them.
        mailbox: see [`~hf_myllm.saver.Mailbox`]; None if one rank writes all files.
        must_stop: called repeatedly; True ends the writing as an error of the disk would.
    Raises:
        CheckpointError: the checkpoint cannot be written; earlier checkpoints are unchanged.
    """
    final = Path(run_dir) / f"checkpoint-{step}"
    partial = final.with_name(final.name + PARTIAL)
    if mailbox is not None and mailbox.rank > 0:
        if mailbox.get("folder", 0)["problem"] is None:
            mailbox.put("files", _attempt(lambda: _write_files(partial, files, must_stop)))
        return final
    try:
        shutil.rmtree(partial, ignore_errors=True)
        created = _attempt(lambda: (partial / "trainer_state").mkdir(parents=True))
        if mailbox is not None:
            mailbox.put("folder", created)
        _raise_first([created])
        written = [_attempt(lambda: _write_files(partial, files, must_stop))]
        for rank in range(1, mailbox.world_size if mailbox is not None else 1):  # even after an error: no rank may
            received = _attempt(lambda rank=rank: mailbox.get("files", rank))  # go on writing
            written.append(received["result"] or received)
        _raise_first(written)
        _complete(partial, step, [outcome["result"] for outcome in written])
        if final.exists():  # damaged: find_latest skipped it
            _remove(final)
        rename(partial, final)
        flush(final.parent)
        for newer_step, path in _list(run_dir):
            if newer_step > step:  # damaged: otherwise the run would have resumed from it
                _remove(path)
    except _WRITE_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        previous = [path.name for _, path in _list(run_dir, with_marker=True)]
        advice = f"{previous[0]} stays; resume from it with --init_from resume" if previous else "start again"
        raise CheckpointError(f"{final}: it cannot be saved: {error}; {advice}") from None
    return final


def remove_old(run_dir, limit, keep=None, keep_every=None):
    """Remove all checkpoints but the newest `limit`, that of step `keep`, and the milestones.

    Args:
        limit: None keeps all.
        keep_every: steps between milestones. Those of an earlier value stay milestones.

    Raises:
        CheckpointError: one cannot be removed.
    """
    for step, path in _list(run_dir, with_marker=True)[limit:] if limit else ():
        if step == keep or (keep_every and step % keep_every == 0) or _was_milestone(path):
            continue
        try:
            _remove(path)
        except OSError as error:
            if IS_WINDOWS and isinstance(error, PermissionError):
                continue  # this run resumed from it and still maps a file; the next save tries again
            raise CheckpointError(f"{path}: it cannot be removed: {error}; remove it, then resume") from None


def _attempt(function):
    """Return what a function returns, or its error in words, as a dict that can be sent to another rank."""
    try:
        return {"problem": None, "result": function()}
    except (*_WRITE_ERRORS, torch.distributed.DistError) as error:
        return {"problem": str(error), "result": None}


def _raise_first(outcomes):
    """Raise the error of the first rank that had one."""
    for rank, outcome in enumerate(outcomes):
        if outcome["problem"] is not None:
            raise OSError(f"rank {rank}: {outcome['problem']}" if len(outcomes) > 1 else outcome["problem"])


def _write_files(folder, files, must_stop):
    """Write and flush files; return {name: [size, digest, {tensor: bytes}]}."""
    records = {}
    for name, content in files.items():
        content, sizes = content() if callable(content) else content, {}
        if isinstance(content, dict):
            sizes = {tensor: value.nbytes for tensor, value in content.items()}
            record = write_safetensors(folder / name, content, must_stop)
        else:
            record = write_and_digest(folder / name, [content], must_stop)
        records[name] = [*record, sizes]
    return records


def _complete(folder, step, written):
    """Write the index of the weights' shards, and the marker; flush the folders.

    Args:
        written: what [`_write_files`] returned on each rank.
    """
    records = {name: record for records in written for name, record in records.items()}
    shards = {name: sizes for name, (_, _, sizes) in records.items() if SHARD.fullmatch(name)}
    if shards:
        weight_map = {tensor: name for name, sizes in shards.items() for tensor in sizes}
        total = sum(size for sizes in shards.values() for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        content = json.dumps(index, indent=2).encode() + b"\n"
        records |= _write_files(folder, {SAFE_WEIGHTS_INDEX_NAME: content}, lambda: False)
    files = {name: [size, digest] for name, (size, digest, _) in sorted(records.items())}
    write_and_digest(folder / _MARKER, [json.dumps({"step": step, "files": files}, indent=1).encode()])
    for path in (folder / "trainer_state", folder):
        flush(path)


def _remove(path):
    # Renamed first, so that an interrupted removal leaves no folder with the name of a checkpoint.
    doomed = path.with_name(path.name + ".old" + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(run_dir):
    """Remove what a killed process left half-written or half-removed."""
    for path in Path(run_dir).glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


# ---- finding and verifying


def find_latest(run_dir, warn=lambda message: None):
    """Return the newest complete checkpoint of a run, or None if there are no checkpoints.

    Args:
        warn: called with a line for each damaged checkpoint that is skipped.
    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    problems = []
    for _, path in _list(run_dir):
        if not (problem := find_corruption(path)):
            for line in problems:
                warn(f"skipped {line}")
            return path
        problems.append(f"{path}: {problem}")
    if problems:
        raise CheckpointError(
            f"{run_dir}: no checkpoint is complete; remove them to start again ({'; '.join(problems)})"
        )
    return None


def find_model(run_dir, verify=True):
    """Return the folder of the model of a run (its own, else its newest checkpoint), or of `id@revision` on the Hub.

    Raises:
        CheckpointError: there is none, or all checkpoints are damaged, or with `verify` the weights are.
    """
    folder = Path(resolve(run_dir))
    if not folder.is_dir():
        raise CheckpointError(f"{run_dir}: it is not a folder; give the folder of a run or of one of its checkpoints")
    if not has_model(folder):
        if (folder := find_latest(folder)) is None:
            raise CheckpointError(f"{run_dir}: it holds no trained model and no checkpoint; give the folder of a run")
    elif verify:
        check_weights(folder)
    return folder


def check_weights(path):
    """Raise CheckpointError if a folder is a checkpoint whose weights are not as they were written."""
    if (Path(path) / _MARKER).is_file() and (problem := find_corruption(Path(path), only_weights=True)):
        raise CheckpointError(f"{path}: it is damaged: {problem}; give another checkpoint")


def find_run_dir(path):
    """Return the folder of a run: the path, or its parent if it is a checkpoint or one staged for an upload."""
    path = Path(path)
    return path if (path / "run.json").is_file() or not path.name.startswith("checkpoint-") else path.parent


def find_corruption(path, only_weights=False):
    """Return what is wrong with a checkpoint, in a few words, or None if every file, or the weights, are as written."""
    try:
        files = {name: (size, digest) for name, (size, digest) in _read_marker(path).items()}
    except FileNotFoundError:
        return f"it is incomplete, without {_MARKER}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MARKER} cannot be read"
    missing = {STATE} - set(files)
    if not {"config.json", "adapter_config.json"} & set(files):
        missing.add("config.json")
    parts = [name for name in files if name.startswith(_OPTIMIZER)]
    if not parts or any(f"-of-{len(parts):05}" not in name for name in parts if "-of-" in name):
        missing.add(f"{_OPTIMIZER}*.safetensors of all ranks")
    if missing:
        return f"{_MARKER} does not list {', '.join(sorted(missing))}"
    for name, (size, digest) in files.items():
        if only_weights and ("/" in name or not name.endswith(".safetensors")):  # a user may have edited the others
            continue
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if digest_file(file) != digest:
            return f"{name} differs from what was written"
    return None


def digest(path):
    """Return the SHA-256 digest of a checkpoint's marker, which holds the digests of all its other files."""
    return digest_file(Path(path) / _MARKER)


def step_of(path):
    """Return the step of a checkpoint from its folder's name; -1 for any other folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def has_checkpoints(run_dir):
    return bool(_list(run_dir))


def has_model(run_dir):
    return any((Path(run_dir) / name).exists() for name in _WEIGHTS)


def snapshot(run_dir):
    """Return the modification times of a run's checkpoints and weights; they differ once another run wrote there."""
    times = {}
    with suppress(OSError, ValueError):  # an invalid folder is reported elsewhere
        for path in [*Path(run_dir).glob("checkpoint-*"), *Path(run_dir).glob("*.safetensors")]:
            times[path] = path.stat().st_mtime_ns
    return times


def complete_checkpoints(run_dir):
    """Return the folders of the checkpoints that were complete when written, oldest first."""
    return [path for _, path in reversed(_list(run_dir, with_marker=True))]


def _list(run_dir, with_marker=False):
    """Return (step, folder) of the checkpoints, newest first: all, or those that were complete when written."""
    folders = [path for path in Path(run_dir).glob("checkpoint-*") if not with_marker or (path / _MARKER).exists()]
    return sorted(((step_of(path), path) for path in folders if step_of(path) >= 0), reverse=True)


def _read_marker(path):
    return json.loads((Path(path) / _MARKER).read_text())["files"]


# ---- loading


def load_trainer_state(path):
    """Return the trainer's state of a checkpoint, as it was passed to [`save`].

    Raises:
        CheckpointError: the file has another content than this package writes.
    """
    try:
        return _STATE_TYPE.validate_json((Path(path) / STATE).read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}/{STATE}: it cannot be used: {_problem(error)}; remove {path}") from None


def _was_milestone(path):
    """Return whether a checkpoint was a milestone when it was saved."""
    with suppress(CheckpointError):
        return load_trainer_state(path).get("milestone", False)
    return False


def _problem(error):
    """Return the first problem of a file's content in words."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class OptimizerFiles:
    """The optimizer's tensors of a checkpoint. Iterating yields their names."""

    def __init__(self, path):
        names = sorted(name for name in _read_marker(path) if name.startswith(_OPTIMIZER))  # no stray files
        self._files = [safe_open(Path(path) / name, framework="pt") for name in names]

    def __iter__(self):
        return iter(self._files[0].keys())

    def rows(self, name, start=0, stop=None):
        """Return rows [start, stop) of a tensor, whichever files hold them; a scalar tensor is returned as it is."""
        pieces, offset = [], 0  # offset: rows in the files before
        for file in self._files:
            stored = file.get_slice(name)
            if not stored.get_shape():
                return file.get_tensor(name)
            length = stored.get_shape()[0]
            first = max(0, start - offset)
            last = length if stop is None else min(length, stop - offset)
            if first < last or not pieces:  # an empty first piece keeps the shape
                pieces.append(stored[first : max(first, last)])
            offset += length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


# ---- the model at the run's root


def publish(checkpoint, run_dir):
    """Make the model of a checkpoint the model at the run's root.

    Weights are hard links where the file system allows it. Small files, which people edit, are copied.

    Raises:
        CheckpointError: a file cannot be written.
    """
    with _publishing(run_dir):
        files = regular_files(checkpoint)
        # The weights last, then their index: has_model() must not be true before everything is there.
        files.sort(key=lambda path: (path.name.endswith(".index.json"), path.suffix == ".safetensors"))
        old = {path.name for path in Path(run_dir).glob("model-*.safetensors") if SHARD.fullmatch(path.name)}
        for name in (_MODEL_FILES | old) - {path.name for path in files}:  # an adapter's, a whole model's, or shards
            (Path(run_dir) / name).unlink(missing_ok=True)
        for path in files:
            with atomic_path(Path(run_dir) / path.name) as partial:
                (link_or_copy if path.suffix == ".safetensors" else shutil.copyfile)(path, partial)
                flush(partial)
        flush(run_dir)


def publish_new(write_model, run_dir):
    """Make what `write_model(folder)` writes the model at the run's root; see [`publish`]."""
    with _publishing(run_dir), tempfile.TemporaryDirectory(PARTIAL, "checkpoint-", run_dir) as folder:
        write_model(Path(folder))
        share_mode(Path(folder), next(Path(folder).glob("*config.json")))  # or adapter_config.json
        publish(folder, run_dir)


def _publishing(run_dir):
    advice = "; try again with --init_from resume"
    return library_errors(f"{run_dir}: the model cannot be written", CheckpointError, _WRITE_ERRORS, advice=advice)


def is_published(checkpoint, run_dir):
    """Return whether the model at the run's root is this checkpoint's, not that of a shorter run before it."""
    records = {name: record for name, record in _read_marker(checkpoint).items() if "/" not in name}
    return all(
        (Path(run_dir) / name).is_file() and digest_file(Path(run_dir) / name) == digest
        for name, (_, digest) in records.items()
    )


def stage(checkpoint):
    """Return a new folder with a checkpoint's model, which stays when the checkpoint is removed.

    [`remove_partial`] removes the folder if the caller does not.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}.upload{PARTIAL}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in regular_files(checkpoint):
        link_or_copy(path, folder / path.name)
    return folder
