"""Train a model: `hf-myllm train RECIPE`, or `train(Recipe.load("recipe.yaml"))` from Python.

A run is a pure function of its recipe and its step: the learning rate, the rows and the dropout seed of step s are
computed from (recipe, s), never carried along. The only state is what training learned: the parameters and the
optimizer's moments. So a killed run resumes bit for bit.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from .cli import main

    main(["train", *sys.argv[1:]])

import math
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import run_folder
from .build import open_run, prepare_training
from .checkpoint import find_model, find_run_dir
from .data import sampler
from .distributed import AsyncHostCopy, signals_received, to_device
from .errors import RecipeError
from .evaluation import check_metric_for_best, evaluate_all, evaluate_run
from .optim import learning_rate, step_if
from .recipe import Recipe
from .reporting import plots
from .reporting.profiling import Profiler
from .reporting.start import start_reporting
from .reporting.summary import print_result, resume_command
from .run_state import RunState
from .saver import finish_save, save_checkpoint
from .sharding import to_full

# Steps queued on the device before the result of the oldest is read, by device type. Reading a result waits for it.
MAX_STEPS_IN_FLIGHT = {"cuda": 1}


@dataclass
class RunResult:
    """What [`train`] returns.

    Attributes:
        model: the model as published in `run_dir`; None after a signal, and if it is sharded (FSDP2).
        tokenizer: None if the data are token ids and no tokenizer was given.
        metrics: of the validation rows by `model`, as val_<name>; {} without validation data.
        run_dir: the run's folder, from which `from_pretrained` loads the published model.
        step: optimizer steps done.
        stop_signal: number of the signal that interrupted the run, or None.
    """

    model: torch.nn.Module | None
    tokenizer: object
    metrics: dict
    run_dir: Path
    step: int
    stop_signal: int | None = None


def train(recipe, train_data=None, eval_data=None, on_log=None, on_evaluate=None):
    """Train the model that a recipe describes and save it in `recipe.run.save_model`.

    Args:
        recipe: a [`Recipe`].
        train_data: in place of the recipe's `train_file`: a list of strings, a `datasets.Dataset` with the columns of
            the task, or files as in a recipe.
        eval_data: in place of the recipe's `val_file`, likewise, or a dict of several by name.
        on_log: called on rank 0 with each dict that is written to metrics.jsonl.
        on_evaluate: called on rank 0 with the metrics of each evaluation.

    Returns:
        a [`RunResult`].

    Raises:
        InputError: the recipe, the data, the model or the folder cannot be used. Mistakes in the recipe and the data
            are found before anything is written; a failure while training keeps the checkpoints.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: expected a Recipe, got {type(recipe).__name__}; use Recipe.load(...)")
    for name, callback in (("on_log", on_log), ("on_evaluate", on_evaluate)):
        if callback is not None and not callable(callback):
            raise RecipeError(f"{name}: expected a function, got {type(callback).__name__}; give one that takes a dict")
    if recipe.evaluation.eval_only or recipe.run.dry_run:
        raise RecipeError("eval_only and dry_run do not train; call evaluate(), or use the command line for a dry run")
    # When one rank dies, the launcher sends the others SIGTERM. Collect it until the curves are drawn.
    with open_run(recipe, train_data, eval_data) as run, signals_received() as run.signals:
        try:
            return fit(run, on_log, on_evaluate)
        except BaseException as error:
            if run.reporter is not None:  # an error begins on a line of its own
                run.reporter.close()
            # rank 0, while training: show how the loss went until here
            if run.lock is not None and isinstance(error, Exception):
                with suppress(Exception):
                    plots.write_plot(run.run_dir)
            raise


def fit(run, on_log=None, on_evaluate=None):
    """Run the training loop of a built run, from its first step or its checkpoint to the end; see [`train`]."""
    state = RunState(run)
    if run.resume_from is not None and state.must_stop and run_folder.is_complete(run, state):
        return result_of(run, state, run_folder.load_published(run))
    model, optimizer = prepare_training(run)
    check_metric_for_best(run, model)
    run_folder.lock(run)
    run_folder.write_recipe(run)
    unigram = start_reporting(run, state, on_log, on_evaluate)
    run_folder.open_uploads(run)
    profiler = Profiler(run.run_dir, run.recipe.run.profile, state.last_step - state.step)

    if state.first_evaluation_due():
        state.record_evaluation(evaluate_run(run, model, state.step))
    run.reporter.resume()
    model.train()
    in_flight = []
    while not state.must_stop:
        in_flight.append(training_step(run, model, optimizer, state.step))
        state.advance()
        log_steps(run, state, in_flight)
        run.reporter.pause()  # evaluations and saves do not count as training time
        profiler.step(run.reporter)
        if state.evaluation_due:
            state.record_evaluation(evaluate_run(run, model, state.step))
        if state.save_due:
            save_checkpoint(run, optimizer, state)
        run.reporter.resume()
    profiler.close()
    return finish(run, model, state, unigram)


class StepResult(NamedTuple):
    """A step whose numbers are on their way from the device."""

    step: int  # from 1
    learning_rate: float
    numbers: AsyncHostCopy  # (loss, gradient norm), (tokens, digest of the rows, ranks that must stop)


def training_step(run, model, optimizer, step):
    """Do one optimizer step over all ranks, and return its [`StepResult`] without waiting for the device.

    The loss is the sum over all targets of the global batch divided by their number, whatever the micro-batches and
    ranks. A step whose loss or gradient norm is not finite changes nothing.

    Args:
        step: from 0.
    """
    recipe, accelerator, run.phase = run.recipe, run.accelerator, f"step {step + 1}"
    rate = set_learning_rate(run, optimizer, step)
    shares = sampler.micro_batches(
        run.sampler.rows_of_step(step),
        recipe.training.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        run.accumulation_steps,
    )
    batches = [run.task.batch(run.train_rows, rows, step, recipe.training.batch_size) for _, rows in shares]
    counts = Counter()
    for batch in batches:
        counts.update(run.task.count_targets(batch))
    # Sum everything in one all-reduce, so that all ranks divide by the same counts and stop at the same step.
    tokens = sum(run.task.count_tokens(batch) for batch in batches)
    digest = sum(sampler.rows_digest(rows) for _, rows in shares)
    sums = torch.tensor([*counts.values(), tokens, digest, bool(run.signals)])
    sums = accelerator.reduce(to_device(sums, accelerator.device))
    counts = {name: total.clamp(min=1) for name, total in zip(counts, sums, strict=False)}

    # DDP averages gradients over ranks, and accelerate divides by its own count of micro-batches: undo both.
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step, ((offset, _), batch) in enumerate(zip(shares, batches, strict=True)):
        torch.manual_seed(sampler.derive_seed(recipe.run.seed, "dropout", step, offset))
        is_last = micro_step == len(batches) - 1
        # Under FSDP2, no_sync would keep unsharded gradients on every rank.
        with nullcontext() if is_last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            inputs = {name: to_device(tensor, accelerator.device) for name, tensor in batch.items()}
            loss = run.task.forward(model, inputs, counts).loss
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.training.grad_clip or math.inf)  # inf: only measure
    measured = torch.stack([accelerator.reduce(loss_sum), to_full(norm).to(loss_sum.device)])
    is_finite = measured.isfinite().all()
    if accelerator.scaler is not None:  # the scaler of fp16 skips such steps itself, and learns its scale from them
        optimizer.step()
    else:
        step_if(optimizer, is_finite)
    if run.weight_average is not None:
        run.weight_average.update(step, is_finite)
    optimizer.zero_grad()
    return StepResult(step + 1, rate, AsyncHostCopy(measured, sums[-3:]))


def set_learning_rate(run, optimizer, step):
    """Set and return the learning rate of a step, a pure function of the recipe and the step."""
    section = run.recipe.training
    rate = learning_rate(
        step,
        run.total_steps,
        section.learning_rate,
        section.min_lr,
        section.lr_schedule,
        section.warmup_steps,
        section.decay_steps,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def log_steps(run, state, in_flight):
    """Log the oldest steps in flight: so many that the device stays busy with the rest, or all before a stop or a save.

    Raises:
        InputError: too many consecutive steps were not finite.
    """
    limit = MAX_STEPS_IN_FLIGHT.get(run.accelerator.device.type, 0)
    while in_flight and (len(in_flight) > limit or state.needs_all_results):  # a result may bring a request to stop
        result = in_flight.pop(0)
        (loss, grad_norm), (tokens, digest, ranks_stopping) = result.numbers.read()
        state.record_step(result.step, loss, grad_norm, bool(ranks_stopping))
        is_last = result.step == run.total_steps
        write = state.skipped_steps > 0 or is_last or result.step % run.recipe.run.log_freq == 0
        run.reporter.log_step(result.step, loss, result.learning_rate, tokens, grad_norm, digest, write=write)


def finish(run, model, state, unigram):
    """Evaluate on all validation rows, publish the model and write the reports; or leave after a signal.

    Returns:
        a [`RunResult`].
    """
    reporter, published = run.reporter, None
    if not state.was_interrupted and state.val_metrics is None:
        state.record_final(evaluate_run(run, model, state.step, is_final=True))
    finish_save(run)
    prints_result = run.accelerator.is_main_process and not state.was_interrupted
    if state.was_interrupted:
        where = "in an evaluation" if state.step in (run.start_step, state.last_step) else "and saved"
        reporter.info(f"stopped by a signal after step {state.step}, {where}; to continue:")
        reporter.info(f"resume      {resume_command(run)}")
    else:
        published = run_folder.publish_model(run, state)
        reporter.status("drawing loss.png and report.html")
    if prints_result:
        run_folder.write_reports(run.run_dir, reporter.warning)
    reporter.close()
    result = result_of(run, state, published)
    if prints_result:
        print_result(run, result, unigram)
    run_folder.finish_uploads(run, state)
    return result


def result_of(run, state, model):
    """Return the [`RunResult`] of a run that has ended or was interrupted."""
    stop_signal = None
    if state.was_interrupted:  # the same on all ranks, so that their exit codes agree
        received = torch.tensor([run.signals[0] if run.signals else 0], device=run.accelerator.device)
        stop_signal = int(run.accelerator.gather(received).max())
    metrics = {f"val_{name}": value for name, value in run_folder.published_metrics(run, state).items()}
    return RunResult(model, run.tokenizer, metrics, run.run_dir, state.step, stop_signal)


def evaluate(run_dir, eval_data=None, **overrides):
    """Evaluate the model of a run's folder on all validation rows; of a run without one, its newest checkpoint.

    Args:
        run_dir: the folder of a run, or of one of its checkpoints.
        eval_data: data in place of the run's own validation data; see [`train`].
        overrides: keys of the recipe with other values, such as `batch_size=32`.

    Returns:
        a dict of metrics: `loss` (nats per token or label) and those of the task.

    Raises:
        InputError: the folder holds no model, there is nothing to evaluate on, or a key has no effect.
    """
    model_dir, run_dir = str(find_model(run_dir, verify=False)), find_run_dir(run_dir)
    keys = {"save_model": str(run_dir), "init_from": model_dir, "eval_only": True} | overrides
    recipe = Recipe.load(run_dir / "recipe.yaml", **keys).check_evaluation()
    with open_run(recipe, eval_data=eval_data) as run:
        return evaluate_all(run)
