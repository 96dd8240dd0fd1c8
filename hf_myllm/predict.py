"""Predictions of a trained model for each row of a file: `hf-myllm predict RUN --input FILE`.

RUN is any folder whose model classifies texts or words, answers questions, or makes one text of another. The file is of
the kinds that training reads, without labels (labels are ignored); a .txt holds one text per line. The output is JSON
Lines. Generated texts are compared with the targets, where the file has them.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from .cli import main

    main(["predict", *sys.argv[1:]])

import json
import os
import sys
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch

from . import checkpoint, tasks
from .data.sources import file_source
from .errors import CONTROL, InputError, ModelError, library_errors
from .files import atomic_path, open_new
from .generate import load_tokenizer, read_recipe
from .models import loading
from .models.auto import num_positions
from .precision import inference_precision
from .recipe.sections import FIELDS
from .tasks import TASKS
from .tasks.labelled_rows import read_examples, rows_in_memory
from .terminal import plural

_TASKS = {  # the end of the stock class's name -> its task if there is no recipe
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "seq2seq",
    "MarianMTModel": "seq2seq",
}
_CHUNK = 1000  # examples read before the first is written


def load(run_dir, device="cpu"):
    """Return the model of a folder, its tokenizer, and the name of the task that its class is for.

    Raises:
        ModelError: there is no model, or it makes no predictions.
    """
    folder = checkpoint.find_model(run_dir)
    tokenizer = load_tokenizer(folder)
    architecture = loading.read_architecture(folder)
    task = next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), None)
    if task is None:
        raise ModelError(
            f"{run_dir} holds a {architecture or 'model of no class'}, which makes no predictions; to generate text: "
            f"hf-myllm generate {run_dir}"
        )
    return loading.load_stock_model(folder, torch.float32).to(device), tokenizer, task


@torch.no_grad()
def predict(model, task, rows, batch_size):
    """Return the task's predictions of each row, one array or text each."""
    if task.generates_predictions:
        groups = task.generation_groups(rows, np.arange(len(rows)), batch_size)
        texts = {
            int(row): text
            for group in groups
            for row, text in zip(group, task.generate(model, rows, group), strict=True)
        }
        return [texts[row] for row in range(len(rows))]
    order, predictions = task.sort_by_length(rows, np.arange(len(rows))), [None] * len(rows)
    for start in range(0, len(rows), batch_size):
        indices = order[start : start + batch_size]
        batch = task.batch(rows, indices)
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        for index, prediction in zip(indices, task.predictions(model(**inputs), rows, indices), strict=True):
            predictions[index] = prediction
    return predictions


def predict_file(run_dir, input, output=None, batch_size=32, max_len=None, **settings):
    """Write the predictions of a model for each example of a file as JSON Lines.

    Args:
        run_dir: folder of a run, a checkpoint or any model that makes predictions.
        input: a file, glob or folder, as `train_file` of a recipe.
        output: file to write, complete or not at all; default: stdout.
        batch_size: rows at once.
        max_len: tokens per row; default: the recipe's, or the model's positions.
        settings: fields of [`tasks.Settings`] that replace the recipe's; None keeps the recipe's.
    Returns:
        the number of examples, the messages of those that were left out, and the metrics of generated texts whose
        targets the file has ({} without).
    Raises:
        InputError: the model, the file or an option cannot be used.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    source = file_source(input)
    model, tokenizer, name = load(run_dir, device)
    recipe = read_recipe(run_dir)
    if (trained := TASKS.get(recipe["task"])) and (trained.has_predictions or trained.generates_predictions):
        name = recipe["task"]
    settings = _merge_options(recipe["settings"], settings, name)
    positions = num_positions(model.config)
    max_len = max_len if max_len is not None else settings.get("max_len") or positions or 512
    positions = positions or max_len
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {batch_size}")
    if not 4 <= max_len <= positions:
        raise InputError(f"--max_len must be from 4 to {positions}, the positions of the model, not {max_len}")
    files = list(filter(os.path.exists, source.files))  # without URLs
    if output and os.path.exists(output) and any(os.path.samefile(file, output) for file in files):
        raise InputError(f"--output {output} is the input: name another file")
    if model.config.pad_token_id is None:
        raise ModelError(f"{run_dir}/config.json has no pad_token_id to pad short rows with: set it there")
    task = tasks.build(name, tokenizer, settings, stored_config=model.config, is_trained=True)
    task.reads_labels = False
    task.configure(model.config, max_len)
    skipped, count, num_cut, compared = [], 0, 0, []
    examples = read_examples(source, task, skipped)
    with _opened(output) as file, inference_precision(recipe["precision"], device):
        escapes = (file.encoding or "utf-8").lower().replace("-", "") != "utf8"  # a terminal that lacks characters
        while chunk := list(islice(examples, _CHUNK)):
            rows = rows_in_memory(chunk, task, source.name, skipped)
            if rows is None:
                continue
            num_cut += rows.stats["cut"]
            predictions = predict(model, task, rows, batch_size)
            if task.generates_predictions:
                has_target = [row for row, record in enumerate(rows.records) if record["target"] is not None]
                texts = [predictions[row] for row in has_target]
                compared += zip(*task.metric_inputs(rows, np.array(has_target, dtype=int), texts), strict=True)
            for line in task.describe_predictions(rows, predictions):
                text = json.dumps(line, ensure_ascii=escapes)  # which leaves some control characters as they are
                file.write(CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")
                count += 1
    if num_cut and output:
        print(f"{plural(num_cut, 'text')} longer than max_len {max_len}: {task.cut_message}", file=sys.stderr)
    return count, skipped, task.compute_metrics(*zip(*compared, strict=True)) if compared else {}


def _merge_options(settings, options, task):
    """Return the settings of a recipe with those that replace them.

    Raises:
        InputError: a key has no effect with the task, or its value is out of range.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if "text_column" in options and isinstance(settings.get("template"), str):
        settings = {key: value for key, value in settings.items() if key != "template"}
    for key, value in options.items():
        if value and task not in FIELDS[key].json_schema_extra.get("tasks", [task]):
            raise InputError(f"--{key}: it has no effect with task {task}; leave it out")
        for limit in FIELDS[key].metadata:
            if not getattr(limit, "ge", value) <= value <= getattr(limit, "le", value):
                raise InputError(f"--{key}: {value} is out of range; docs/recipes.md has the limits")
    return settings | {"skip_bad_rows": False} | options


@contextmanager
def _opened(path):
    """Open stdout, or a file that appears when it is complete."""
    if path is None:
        yield sys.stdout
        return
    with (
        library_errors(f"--output {path} cannot be written", catches=OSError),
        atomic_path(path) as temporary,
        open_new(temporary) as file,
    ):
        yield file
