"""Average the weights of checkpoints: `hf-myllm average RUN --last 5 --output FOLDER`."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_NAME

from . import checkpoint
from .errors import CheckpointError, InputError, library_errors, printable
from .files import atomic_path, flush, write_text_atomically
from .hub import write_card
from .hub.push import SHARED
from .models import lora
from .models.export import weight_files
from .reporting.metrics_log import amend_run, read_run
from .terminal import plural
from .train import evaluate

_WEIGHTS = (lora.WEIGHTS, SAFE_WEIGHTS_NAME)  # of an adapter, of a model
_FREE_KEYS = ("transformers_version", "_name_or_path", "use_cache", "peft_version")  # of a configuration
_BESIDE = ("README.md", "loss.png")  # files of a model's folder that are about one model


def average(folders, output, last=None, ema=None):
    """Write the average of the weights of several models as a model's folder, and evaluate it.

    It is computed in fp32, tensor by tensor, in the memory of one tensor, and stored as the last of them stores it. Of
    adapters (LoRA) the matrices are averaged.

    Args:
        folders: the folder of a run, whose complete checkpoints are averaged, or a list of at least two folders of
            checkpoints or other models of one architecture; checkpoints of one run in the order of their steps.
        output: the new folder, which is complete or absent.
        last: of a run, how many of its newest checkpoints; default: all.
        ema: weigh them as an exponential moving average, the oldest or first folder first: 0.9 keeps nine tenths of the
            average at each next one. Default: all alike.

    Returns:
        {"folders": the paths, oldest first, "average": metrics of all validation rows of the run of the last one,
        "last": those of the last one, "problem": why there are no metrics, or None}.

    Raises:
        CheckpointError: there are not enough models, they differ in more than their weights, or `output` exists.
        ModelError: a folder holds no model.
    """
    if Path(output).resolve().name.startswith("checkpoint-"):
        raise CheckpointError(f"{output}: folders of this name are the checkpoints of a run; give another name")
    folders = _find_folders(folders, last)
    if ema is not None and not 0 < ema < 1:
        raise CheckpointError(f"ema: {ema} must be above 0 and below 1; leave it out to average all alike")
    if Path(output).exists():
        raise CheckpointError(f"{output}: it exists already; give another folder to write the average to")
    models = [_open_weights(folder) for folder in folders]
    _check_alike(folders, models)
    with library_errors(f"{output}: the average cannot be written", CheckpointError, OSError):
        Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as partial:
            partial.mkdir()
            _write_model(partial, folders[-1], models, ema)
            return {"folders": folders} | _describe_and_evaluate(partial, Path(output).resolve().name, folders, ema)


def _find_folders(folders, last):
    """Return the folders to average, oldest first."""
    folders = [Path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise CheckpointError(f"{absent[0]}: it is not a folder; give a run, or folders of models")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CheckpointError("average: a folder is given twice; give each once")
    if len(folders) == 1 and checkpoint.has_checkpoints(folders[0]):
        run_dir, folders = folders[0], checkpoint.complete_checkpoints(folders[0])
        if len(folders) < 2:
            raise CheckpointError(f"{run_dir}: it has {plural(len(folders), 'checkpoint')}; an average needs two")
        if last is not None and last > len(folders):
            raise CheckpointError(f"{run_dir}: it has {len(folders)} checkpoints; give --last {len(folders)} or less")
        folders = folders if last is None else folders[max(0, len(folders) - last) :]
    elif last is not None:
        raise CheckpointError("last: it chooses among the checkpoints of one run; give its folder alone")
    if len({folder.resolve().parent for folder in folders}) == 1 and min(map(checkpoint.step_of, folders)) >= 0:
        folders.sort(key=checkpoint.step_of)  # of one run: a shell lists checkpoint-10 before checkpoint-8
    if len(folders) < 2:
        raise CheckpointError("average: it needs at least two checkpoints; give a run that has them, or their folders")
    for folder in folders:
        if (folder / "trainer_state").is_dir() and (problem := checkpoint.find_corruption(folder)):
            raise CheckpointError(f"{folder}: it is damaged: {problem}; leave it out")
        if not checkpoint.has_model(folder):
            raise CheckpointError(f"{folder}: it holds no model in safetensors; give folders of models")
    return folders


def _open_weights(folder):
    """Return {tensor name: open file} of a folder's model; the files are memory-mapped."""
    weights = {}
    for path in weight_files(folder, _WEIGHTS):
        advice = f"; leave {folder} out"
        with library_errors(f"{path}: it cannot be read", CheckpointError, (OSError, SafetensorError), advice=advice):
            file = safe_open(path, framework="pt")
        weights |= dict.fromkeys(file.keys(), file)
    return weights


def _check_alike(folders, models):
    """Raise CheckpointError if models differ in more than the values of their weights."""
    last, expected = folders[-1], _layout(folders[-1], models[-1])
    for folder, model in zip(folders[:-1], models, strict=False):
        if bool(lora.base_of(folder)) != bool(lora.base_of(last)):
            raise CheckpointError(f"{folder}: one of it and {last} is an adapter, and the other a model; give one kind")
        tokenizers = [path / "tokenizer.json" for path in (folder, last)]
        if len({path.read_bytes() if path.is_file() else b"" for path in tokenizers}) > 1:
            raise CheckpointError(
                f"{folder}: its tokenizer.json is not that of {last}; average models of one tokenizer"
            )
        layout = _layout(folder, model)
        for name in layout | expected:
            here, there = layout.get(name, "absent"), expected.get(name, "absent")
            if here != there:
                raise CheckpointError(
                    f"{folder}: {name} is {here:.80}, and {there:.80} in {last}; average models of one architecture"
                )


def _layout(folder, model):
    """Return the configuration of a model, and the data type and the shape of each of its tensors, as text by name."""
    config = lora.read_config(folder)
    if lora.base_of(folder):
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {key: sorted(value) if isinstance(value, list) else value for key, value in adapter.items()}
    layout = {key: repr(value) for key, value in config.items() if value is not None and key not in _FREE_KEYS}
    for name, file in model.items():
        layout[name] = f"{file.get_slice(name).get_dtype()} {file.get_slice(name).get_shape()}"
    return layout


def _write_model(folder, last, models, ema):
    """Write the files of the last model, with the average in place of its weights."""
    for path in last.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name in SHARED and path.name not in _BESIDE:
            shutil.copyfile(path, folder / path.name)
    for source in weight_files(last, _WEIGHTS):
        with open(source, "rb") as file:
            start = file.read(8)
            header = file.read(int.from_bytes(start, "little"))
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        with open(folder / source.name, "xb") as file:
            file.write(start + header)
            for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
                file.write(_average_tensor(name, models, ema).reshape(-1).view(torch.uint8).numpy())
    for path in folder.iterdir():
        flush(path)


def _average_tensor(name, models, ema):
    """Return the average of a tensor in its own data type; integers are those of the last model."""
    dtype = models[-1][name].get_tensor(name).dtype
    if not dtype.is_floating_point:
        return models[-1][name].get_tensor(name)
    total = None
    for model in models:
        tensor = model[name].get_tensor(name).to(torch.promote_types(dtype, torch.float32))
        if total is None:
            total = tensor.clone()
        elif ema is None:
            total += tensor
        else:
            total.lerp_(tensor, 1 - ema)
    return (total if ema is not None else total.div_(len(models))).to(dtype)


def _describe_and_evaluate(folder, name, folders, ema):
    """Write run.json, recipe.yaml and the card beside an average of a run's checkpoints; return its evaluation.

    Args:
        name: of the folder when it is complete.
    """
    last, run_dir = folders[-1], checkpoint.find_run_dir(folders[-1])
    facts, result = read_run(run_dir), {"average": {}, "last": {}, "problem": f"{run_dir} is no run"}
    if facts and (run_dir / "recipe.yaml").is_file():
        lines = (run_dir / "recipe.yaml").read_text(encoding="utf-8").split("\n", 1)
        is_of_one_run = len({checkpoint.find_run_dir(path.resolve()) for path in folders}) == 1
        names = [path.resolve() for path in folders]
        names = [
            path.name if is_of_one_run or checkpoint.step_of(path) < 0 else f"{path.parent.name}/{path.name}"
            for path in names
        ]
        note = f"# The recipe of {run_dir.resolve().name}; the weights here are the average of {', '.join(names)}."
        write_text_atomically(folder / "recipe.yaml", f"{printable(note)}\n{lines[1]}")
        step = max(0, checkpoint.step_of(last)) or facts.get("published_step")
        averaged = {"models": names, "is_of_one_run": is_of_one_run, "ema": ema}
        facts |= {"published_step": step, "published_average": False, "averaged": averaged}
        amend_run(folder, **facts)
        try:
            metrics = {
                "average": evaluate(run_dir, init_from=str(folder)),
                "last": evaluate(run_dir, init_from=str(last)),
            }
            amend_run(folder, averaged=facts["averaged"] | metrics)
            result = metrics | {"problem": None}
        except InputError as error:
            result["problem"] = str(error)
    write_card(folder, name)
    return result
