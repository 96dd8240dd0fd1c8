"""Evaluation: exact sums over all rows and ranks, divided once."""

import math
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from .data.sampler import derive_seed, evenly_spaced, micro_batches
from .distributed import StopQuestion, gather, sum_over_ranks, to_device, wait_for_ranks
from .errors import InputError, RecipeError, library_errors
from .sharding import shard_model
from .tasks.base import language_metrics
from .terminal import Status


class EvaluationStopped(Exception):
    """A signal came while rows were evaluated."""


@contextmanager
def _evaluation_mode(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate_rows(run, model, rows, indices, check=lambda done, total: None, with_predictions=True, max_generated=None):
    """Return the metrics of some rows, each counted once, whatever the batch size and the number of ranks.

    Args:
        run: a [`~hf_myllm.build.Run`].
        indices: array of the rows to evaluate.
        check: called before each batch, by all ranks together, with the number of batches done and their total. It may
            raise [`EvaluationStopped`].
        with_predictions: whether to compute the metrics of the task's predictions too, if it has any.
        max_generated: of a task that generates its predictions, the number of rows for which it does; default: all.
    Returns:
        dict of loss and the task's metrics. Tasks on text have perplexity, tokens (the number of targets) and
        bits_per_byte (None if the run does not know the bytes of its tokens).
    Raises:
        InputError: see [`library_metrics`].
    """
    task, accelerator, batch_size = run.task, run.accelerator, run.recipe.training.batch_size
    by_length, losses, sums, predictions = task.sort_by_length(rows, indices), [], Counter(tokens=0, bytes=0), []
    rounds = math.ceil(len(indices) / (batch_size * accelerator.num_processes))
    # every rank takes part in every round, with an empty batch once its rows have run out
    shares = micro_batches(by_length, batch_size, accelerator.process_index, accelerator.num_processes, rounds)
    with _evaluation_mode(model):
        for done, (_, share) in enumerate(shares):
            check(done, rounds)
            batch = task.batch(rows, share, size=batch_size)
            inputs = {name: to_device(value, accelerator.device) for name, value in batch.items()}
            counts = task.count_targets(batch)
            outputs = task.forward(model, inputs, dict.fromkeys(counts, 1))  # divided by 1: sums
            losses.append(outputs.loss.clone())  # a CUDA graph may overwrite it
            sums.update(tokens=counts["num_items_in_batch"], **task.batch_sums(inputs, outputs))
            if with_predictions and task.has_predictions:
                predictions += zip(share.tolist(), task.predictions(outputs, rows, share), strict=True)
            if run.token_bytes is not None:
                targets = task.targets(batch)
                sums["bytes"] += int(run.token_bytes[targets[targets >= 0].numpy()].sum())
    sums["loss"] = sum(torch.stack(losses).tolist()) if losses else 0.0  # read once, so that no batch waits for it
    if with_predictions and task.generates_predictions:
        indices = indices[evenly_spaced(max_generated, len(indices))]
        predictions = generate_rows(run, model, rows, indices, check)
    elif with_predictions and task.has_predictions:
        predictions = list(chain.from_iterable(gather(accelerator, predictions)))
    return _all_metrics(run, rows, sum_over_ranks(accelerator, sums), predictions)


def _all_metrics(run, rows, sums, predictions):
    """Return the metrics of the sums and the (row, prediction) pairs from all ranks."""
    task, metrics = run.task, run.task.loss_metrics(sums)
    if predictions:
        indices, predictions = zip(*sorted(predictions, key=lambda pair: pair[0]), strict=True)
        metrics |= task.example_metrics(rows, np.array(indices), predictions)
        inputs = task.metric_inputs(rows, np.array(indices), predictions)
        metrics |= task.compute_metrics(*inputs)
        metrics |= library_metrics(run.metrics, *inputs, metrics)
    return metrics


def generate_rows(run, model, rows, indices, check=lambda done, total: None):
    """Return (row, prediction) of some rows from all ranks; see [`evaluate_rows`].

    The groups of rows that are generated together do not depend on the number of ranks, and so neither do the texts.
    """
    task, accelerator, world_size, predictions = run.task, run.accelerator, run.accelerator.num_processes, []
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    groups = task.generation_groups(rows, indices, run.recipe.training.batch_size)
    rounds = math.ceil(len(groups) / world_size)
    for done in range(rounds):
        check(done, rounds)
        position = done * world_size + accelerator.process_index
        has_group = position < len(groups)
        if has_group or accelerator.is_fsdp2:  # sharded weights need all ranks
            group = groups[min(position, len(groups) - 1)]
            texts = task.generate(model, rows, group)
            predictions += zip(group.tolist(), texts, strict=True) if has_group else ()
    return list(chain.from_iterable(gather(accelerator, predictions)))


def load_metrics(names, trusts_code):
    """Return metrics of the library `evaluate` as {name: metric}. A metric is a program, which runs when it is loaded.

    Args:
        names: Hub ids or paths.
        trusts_code: whether to run programs beside those that the library's authors publish.
    Raises:
        InputError: there is none by that name, it needs a package that is not installed, or its code is not trusted.
    """
    for name in names:
        path = Path(name)
        is_here = path.is_file() or (path / f"{path.name}.py").is_file()  # as the library looks it up
        if not trusts_code and (is_here or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
            owner = "is a file or folder here" if is_here else "belongs to a user of the Hub"
            raise InputError(
                f"metrics: {name} {owner}, and its code is not run; give --trust_metric_code if you have read it"
            )
    if not names:
        return {}
    import evaluate  # slow to import, and only a recipe's `metrics` need it

    metrics = {}
    for name in names:
        with library_errors(f"metric {name} cannot be loaded", InputError):
            metrics[name] = evaluate.load(name, keep_in_memory=True)
    return metrics


def library_metrics(loaded, predictions, references, known=()):
    """Return the values of metrics of the library `evaluate`.

    Args:
        loaded: what [`load_metrics`] returned.
        known: names of metrics that exist already; another metric's value with such a name is called NAME_KEY.
    Raises:
        InputError: a metric does not accept the task's predictions.
    """
    metrics = {}
    for name, metric in loaded.items():
        problem = f"metric {name} does not accept the task's predictions"
        with library_errors(problem, InputError, advice="; leave it out"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values that a few rows do not define
            values = metric.compute(predictions=predictions, references=references)
        for key, value in values.items():
            if isinstance(value, (int, float, np.number)):
                metrics[f"{Path(name).stem}_{key}" if key in {*known, *metrics} else key] = float(value)
    return metrics


def unigram_loss(training, validation, vocab_size, token_bytes=None, never=(), limit=20_000_000):
    """Return the validation metrics of predicting each token by its frequency alone: what any use of context must beat.

    Frequencies are the training data's, plus one for each id so that none is impossible.

    Args:
        training, validation: [`TokenStream`]s.
        never: ids that are never a target, such as the special tokens in masked language modeling.
        limit: tokens to read of each.
    """
    frequencies = np.bincount(training.read(0, min(limit, len(training))), minlength=vocab_size) + 1.0
    targets = np.asarray(validation.read(0, min(limit, len(validation))))[1:]
    if len(never):
        frequencies[never], targets = 0.0, targets[~np.isin(targets, never)]
    loss_sum = float(-np.log(frequencies[targets] / frequencies.sum()).sum())
    return language_metrics(loss_sum, len(targets), 0 if token_bytes is None else int(token_bytes[targets].sum()))


# ---- the evaluations of a run


def evaluate_run(run, model, step, is_final=False):
    """Evaluate a run after a step; print and log the metrics, and a sample if the recipe asks for one.

    Training rows: `eval_iter` batches. Validation rows: all of them at the end of the run, with metric_for_best, and
    of labelled data without `eval_iter`; else `eval_iter` batches.

    Returns:
        the metrics of the validation rows, {} without any, or None if a signal came in between.
    """
    section, run.phase = run.recipe.evaluation, f"the evaluation after step {step}"
    count = (section.eval_iter or 20) * run.recipe.training.total_batch_size
    needs_predictions, val_metrics = run.task.has_windows, {}  # for the loss
    try:
        train_metrics = _evaluate_some(run, model, run.train_rows, count, max(0, step - 1), needs_predictions)
        if run.val_sets:
            reads_all = is_final or section.metric_for_best or (run.task.has_predictions and section.eval_iter is None)
            val_metrics = _evaluate_with_average(run, model, None if reads_all else count, max_generated=count)
    except EvaluationStopped:
        return None
    line = {"step": step, "train_loss": train_metrics["loss"]}
    line |= {f"val_{name}": value for name, value in val_metrics.items()}
    if val_metrics:
        _require_metric_for_best(run, val_metrics)
    details = describe_sets(run, val_metrics) if val_metrics else ""
    run.reporter.show_evaluation(step, train_metrics, val_metrics, details)
    generates = run.accelerator.is_main_process or run.accelerator.is_fsdp2  # sharded weights need all ranks
    if section.start_context is not None and run.tokenizer is not None and generates:
        line["sample"] = run.task.sample(
            run.accelerator.unwrap_model(run.model, keep_torch_compile=False),
            section.start_context,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_k=section.top_k,
            seed=derive_seed(run.recipe.run.seed, "sample", step),
        )
        run.reporter.show_sample(line["sample"])
    run.reporter.log(line)
    return val_metrics


def check_metric_for_best(run, model):
    """Raise RecipeError if `metric_for_best` is not a metric of a few validation rows."""
    if run.recipe.evaluation.metric_for_best in (None, "val_loss"):
        return
    try:
        metrics = _evaluate_with_average(run, model, run.recipe.training.total_batch_size)
    except (InputError, EvaluationStopped):  # a metric of the library `evaluate` may need more rows
        return
    _require_metric_for_best(run, metrics)


def _require_metric_for_best(run, metrics):
    metric = run.recipe.evaluation.metric_for_best
    if metric and metric.removeprefix("val_") not in metrics:
        known = ", ".join(f"val_{name}" for name in metrics)
        if metric.startswith("val_ema_") and run.weight_average is None:
            known += "; of an average of the weights there are more: weight_averaging {ema: 0.999}"
        raise RecipeError(f"metric_for_best: {metric} is not a metric of task {run.recipe.task}; choose one of {known}")


def evaluate_all(run):
    """Return the metrics of all validation rows of a run that is opened for evaluation only."""
    if not run.val_sets:
        raise InputError("val_file: there is nothing to evaluate on; give --val_file (eval_data) or a val_fraction")
    wait_for_ranks(run.accelerator)  # the data of one machine may take longer
    if run.accelerator.is_fsdp2:
        shard_model(run.accelerator, run.model, run.recipe.training.compile)
        model = run.model
    else:
        model = run.accelerator.prepare_model(run.model, evaluation_mode=True)
    with Status(run.accelerator.is_local_main_process) as status:
        return _evaluate_sets(run, model, None, status=status)


def _evaluate_with_average(run, model, count, **options):
    """Return what [`_evaluate_sets`] does and, as ema_<metric>, the metrics of the average of the weights."""
    metrics = _evaluate_sets(run, model, count, **options)
    if run.weight_average is None:
        return metrics
    with run.weight_average.applied():
        of_average = _evaluate_sets(run, model, count, **options)
    return metrics | {f"ema_{name}": value for name, value in of_average.items()}


def _evaluate_sets(run, model, count, **options):
    """Return the metrics of `count` rows of each validation set (None: all).

    Of several sets, each metric is its mean over the sets, and NAME_METRIC its value of one set.

    Args:
        options: see [`_evaluate_some`].
    """
    sets = {name: _evaluate_some(run, model, rows, count, **options) for name, rows in run.val_sets.items()}
    if len(sets) == 1 and "" in sets:
        return sets[""]
    metrics = {}
    for name, first in next(iter(sets.values())).items():
        values = [own.get(name) for own in sets.values()]
        if isinstance(first, int):  # a number of tokens or rows
            metrics[name] = sum(values)
        else:
            metrics[name] = None if None in values else sum(values) / len(values)
    of_sets = {f"{name}_{metric}": value for name, own in sets.items() for metric, value in own.items()}
    if len(of_sets) < sum(map(len, sets.values())):
        names = sorted(sets)
        raise RecipeError(f"val_file: the sets {' and '.join(names)} have metrics of the same name; rename one")
    if shared := [name for name in of_sets if name in metrics]:
        raise RecipeError(f"val_file: {shared[0]} is a metric of a set and of the task; give the set another name")
    return metrics | of_sets


def describe_sets(run, metrics):
    """Return the metrics beside the loss in a few words: the task's, and the loss of each named validation set."""
    names = [name for name in run.val_sets if name]
    of_sets = {f"{name}_{metric}" for name in names for metric in metrics}
    own = {name: value for name, value in metrics.items() if name not in of_sets and not name.startswith("ema_")}
    losses = [f"{name} {metrics[f'{name}_loss']:.4f}" for name in names]
    if "ema_loss" in metrics:
        losses.append(f"average {metrics['ema_loss']:.4f}")
    return ", ".join(filter(None, [run.task.describe_metrics(own), *losses]))


def _evaluate_some(run, model, rows, count, at_step=None, with_predictions=True, status=None, max_generated=None):
    """Return the metrics of `count` rows, evenly spaced (None: all); see [`evaluate_rows`].

    Args:
        at_step: for training rows, which are those of the windows at this step if they are streamed.
        status: called with a text about the progress; default: the reporter's, if there is one.
    Raises:
        EvaluationStopped: a signal came.
    """
    show = status or (run.reporter.status if run.reporter else lambda text: None)

    questions = {}  # by the number of batches: those of the loss and those that generate take other times

    def check(done, total):
        show(f"evaluating {done}/{total}")
        if done == 0:
            questions["current"] = StopQuestion(run.accelerator, run.signals)
        if questions["current"].ask():
            raise EvaluationStopped

    indices = run.task.choose_rows(rows, count)
    indices = indices if at_step is None else run.sampler.current_rows(indices, at_step)
    return evaluate_rows(run, model, rows, indices, check, with_predictions, max_generated)
