"""Train a model from a recipe: `accelerate launch -m hf_myllm.train recipes/quickstart.yaml`.

A run is a pure function of its recipe and its step: the learning rate, the rows and the dropout of step s are computed
from (recipe, s), never carried along. What a checkpoint holds is what training learned, the parameters and the
optimizer's moments, so that a run that was killed goes on bit for bit.
"""

import gc
import math
import os
import sys
import traceback
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast, gather_object
from filelock import FileLock, Timeout

from . import checkpoint
from .build import check_folder, fingerprints, is_first_process, prepare
from .data import sampler
from .data import tokenizer as tokenizers
from .distributed import (
    AsyncHostCopy,
    create_accelerator,
    end_training,
    exit_with_launcher,
    install_signal_handlers,
    is_first_failure,
    is_peer_failure,
    peak_flops,
    peak_memory,
    set_num_threads,
    shard_model,
    silence_libraries,
    to_device,
)
from .errors import InputError, RankError, exit_on_input_error, first_line
from .evaluation import evaluate_rows
from .files import write_text_atomically
from .hub import push as hub
from .models import FAMILIES, lora
from .optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors, step_if, to_full, to_local
from .recipe import parse
from .reporting import dry_run
from .reporting import html as page
from .reporting import plots as plot
from .reporting.console import Reporter, describe_loss
from .reporting.metrics_log import amend_run, best_evaluation, write_run
from .reporting.profiling import Profiler
from .reporting.summary import (
    launch_facts,
    print_result,
    print_summary,
    run_facts,
    skipped_rows,
)
from .reporting.trackers import start_trackers

MAX_STEPS_IN_FLIGHT = {
    "cuda": 1
}  # steps that are begun before it is known what the last one has come to, by the device's type


@exit_on_input_error
def main(argv):
    recipe = parse(argv, FAMILIES)
    silence_libraries(recipe.run.log_level)
    exit_with_launcher()
    before = checkpoint.snapshot(recipe.run.save_model)
    if is_first_process() and not (recipe.run.dry_run or recipe.evaluation.eval_only):
        if os.path.isfile(Path(recipe.run.save_model) / ".lock"):  # before anything is read that another may take away
            lock_folder(Path(recipe.run.save_model)).release()
        if recipe.hub.push_to_hub:
            hub.check_target(recipe.hub.push_to_hub)
    resume_from = check_folder(recipe)
    set_num_threads()
    accelerator = create_accelerator(recipe.training.compile, recipe.run.log_with, recipe.run.save_model)
    run = None
    try:
        run = prepare(recipe, accelerator, from_the_first_process(resume_from, recipe.run.save_model, accelerator))
        if recipe.run.dry_run:
            if accelerator.is_main_process:
                dry_run.show(run, argv)
            return 0
        code = evaluate_only(run) if recipe.evaluation.eval_only else train(run, before)
        # a sharded model knows of the process group, which must end before Python does
        run.model = run.optimizer = None
        gc.collect()
        end_training(accelerator)
        return code
    except Exception as error:
        if not is_first_failure():
            sys.exit(2)  # the cause has been said
        if run is not None and run.lock is not None:  # the first process, in its training
            with suppress(Exception):  # to see how it came to this
                plot.make(recipe.run.save_model)
        if isinstance(error, InputError):
            raise RankError(str(error)) from None  # whichever process was the first
        if isinstance(error, torch.OutOfMemoryError):
            problem = "out of memory: lower batch_size, which leaves a step as it is when total_batch_size is set"
            problem = f"{problem} ({error})"
        elif accelerator.num_processes == 1:
            raise
        else:
            goes_on = checkpoint.has_checkpoints(recipe.run.save_model)
            problem = first_line(error)[:300]
            if is_peer_failure(error):
                problem = "another process has ended without saying why: killed, or out of memory?"
            else:
                traceback.print_exc()
            problem += "; --init_from resume goes on from the newest checkpoint" * goes_on
        who = f"process {accelerator.process_index} of {accelerator.num_processes}"
        raise RankError(f"{who}, in {run.phase if run else 'its preparation'}: {problem}") from None
    finally:
        if run is not None:
            run.close()


def from_the_first_process(resume_from, folder, accelerator):
    """The checkpoint that the first process has found and verified, for all."""
    if accelerator.num_processes == 1:
        return resume_from
    step = -1 if resume_from is None else checkpoint.step_of(resume_from)
    step = int(broadcast(torch.tensor(step, device=accelerator.device)))
    if step < 0:
        return None
    path = Path(folder) / f"checkpoint-{step}"
    if not path.exists():
        who = f"process {accelerator.process_index} of {accelerator.num_processes}"
        raise RankError(f"{who} does not see {path}, which the first does: {folder} must be on a disk that all share")
    return path


# ---- the loop


def train(run, before):
    """Train to the end, or to a signal; returns the exit code. `before` is what the run's folder held at the start."""
    recipe, accelerator = run.recipe, run.accelerator
    section, folder = recipe.training, Path(recipe.run.save_model)
    is_main = accelerator.is_main_process
    ends = run.start_step if run.resume_from and has_lost_patience(run, run.start_step) else run.total_steps
    if run.resume_from and run.start_step == ends and any_rank(run, is_main and is_published(run, ends)):
        if accelerator.is_main_process:
            more = "max_steps or epochs" if ends == run.total_steps else "patience"
            if not (folder / "report.html").exists():
                show(folder, lambda line: print(line, file=sys.stderr))
            print(f"{folder} is finished, after {ends} steps; raise {more} to go further")
        return 0
    run.signals, run.restore_signals = install_signal_handlers()
    problem = None
    if is_main:
        try:
            run.lock = lock_folder(folder)
            if checkpoint.snapshot(folder) != before:  # preparing may have taken hours
                problem = InputError(
                    f"another run has written into {folder} since this one was started; start it again"
                )
        except InputError as error:
            problem = error
    if any_rank(run, problem is not None):
        raise problem or InputError(f"the first process cannot use {folder}, and says why")
    digest = sampler.derive_seed(*sorted(fingerprints(run).items()), len(run.tokenizer or ()))
    digests = accelerator.gather(torch.tensor([digest], device=accelerator.device)).tolist()
    if len(set(digests)) > 1:
        raise InputError("the processes have not prepared the same tokens: give all machines the same files")
    if accelerator.is_fsdp2:  # before the optimizer, which then has this process's share only
        shard_model(accelerator, run.model, section.compile)
    optimizer = build_optimizer(
        run.model,
        section.learning_rate,
        (section.beta1, section.beta2),
        section.epsilon,
        section.weight_decay,
        section.optimizer,
    )
    if accelerator.is_fsdp2:
        model, run.optimizer = run.model, accelerator.prepare_optimizer(optimizer)
    else:
        model, run.optimizer = accelerator.prepare(run.model, optimizer)
    was = section.optimizer
    if run.resume_from is not None:
        state = checkpoint.load_state(run.resume_from)
        was = state["recipe"].get("optimizer", "adamw")
        try:
            if was == section.optimizer:
                load_optimizer_tensors(run.model, run.optimizer.optimizer, checkpoint.OptimizerFiles(run.resume_from))
        except (KeyError, ValueError) as error:
            raise InputError(f"the optimizer's state in {run.resume_from} is not of this model: {error}") from None
        run.skipped_steps, precision = state["skipped"], state.get("mixed_precision", accelerator.mixed_precision)
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.is_main_process:
        open_folder(run, folder)
    accelerator.wait_for_everyone()
    reporter = open_report(run, ends)
    reporter.pause()
    unigram = print_summary(run, reporter)
    if is_main:
        identity = write_run(
            folder, run_facts(run, unigram), launch_facts(run), run.start_step > 0 or recipe.run.resume
        )
        start_trackers(
            reporter,
            accelerator,
            recipe.run.log_with or [],
            recipe.run.project_name,
            folder,
            identity,
            recipe.identity(),
            run.start_step,
        )
        if (shared := recipe.hub).push_to_hub:
            run.uploads = hub.Uploads(folder, shared.push_to_hub, shared.hub_private_repo, shared.hub_revision)
    if was != section.optimizer:
        reporter.warning(
            f"            until now by {was}: {section.optimizer} begins with moments of its own, from nothing"
        )
    if run.resume_from is not None and precision != accelerator.mixed_precision:
        reporter.warning(
            f"            until now in precision {precision}: from here on it is another run than that would be"
        )

    validation = None
    if is_evaluation_due(run, reporter):
        validation = report_evaluation(run, model, reporter, run.start_step)
        if validation is None:
            reporter.info("stopped by a signal in the first evaluation; --init_from resume starts there again")
            return leave(run, reporter)
        if run.start_step and has_lost_patience(run, run.start_step):
            ends = run.start_step
    model.train()
    profiler = Profiler(folder, recipe.run.profile, ends - run.start_step)
    reporter.resume()
    under_way, ahead = [], MAX_STEPS_IN_FLIGHT.get(accelerator.device.type, 0)
    for step in range(run.start_step, ends):
        run.phase = f"step {step + 1}"
        rate = learning_rate(
            step,
            run.total_steps,
            section.learning_rate,
            section.min_lr,
            section.lr_schedule,
            section.warmup_steps,
            section.decay_steps,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        under_way.append((step, rate, training_step(run, model, step)))
        done = step + 1
        is_last = done == run.total_steps
        is_evaluated = recipe.evaluation.eval_freq and done % recipe.evaluation.eval_freq == 0 and not is_last
        is_saved = is_last or (recipe.run.save_freq and done % recipe.run.save_freq == 0)
        must_stop = bool(run.signals) and accelerator.num_processes == 1  # several stop by what they have said together
        while under_way and (len(under_way) > ahead or is_evaluated or is_saved or must_stop):
            must_stop = settle(run, reporter, *under_way.pop(0)) or must_stop

        reporter.pause()
        profiler.step(reporter)
        is_best = False
        if is_evaluated and not must_stop:
            validation = report_evaluation(run, model, reporter, done)
            must_stop = validation is None
            is_best = not must_stop and any_rank(run, is_main and best_step(run, done) == done)
            if not must_stop and has_lost_patience(run, done):
                ends, is_last = done, True
        if must_stop or is_last or is_saved or is_best:
            save_checkpoint(run, done)
            if run.uploads is not None and not must_stop and not is_last:
                run.uploads.begin(done)
        reporter.resume()
        if ends == done:
            break
        if must_stop and not is_last:
            reporter.info(f"stopped by a signal after step {done}, which is saved: --init_from resume goes on from it")
            return leave(run, reporter)
    profiler.close()
    # one that lost patience has just been evaluated on all rows
    if not finish(run, model, reporter, ends, unigram, validation if ends < run.total_steps else None):
        reporter.info("stopped by a signal in the last evaluation; --init_from resume goes on from it")
        return leave(run, reporter)
    return 0


def training_step(run, model, step):
    """One optimizer step over all processes; returns an [`AsyncHostCopy`]: its loss and gradient norm; its tokens, a
    digest of the rows that were read, and whether a process is to stop.

    The loss is the sum over all targets of the step divided by their number, however they are spread over
    micro-batches and processes. A step whose loss or gradient is not finite changes nothing. A GPU is not waited for:
    while it works on a step, the next one is made ready.
    """
    recipe, accelerator = run.recipe, run.accelerator
    section = recipe.training
    rows = run.sampler.rows_of_step(step)
    shares = sampler.micro_batches(
        rows, section.batch_size, accelerator.process_index, accelerator.num_processes, run.accumulation_steps
    )
    batches = [run.task.batch(run.train_rows, share, step, section.batch_size) for _, share in shares]
    counts = Counter()
    for batch in batches:
        counts.update(run.task.count_targets(batch))
    # all processes divide by the same numbers, and stop at the same step or none
    tokens, read = sum(map(run.task.count_tokens, batches)), sum(sampler.rows_digest(share) for _, share in shares)
    sums = torch.tensor([*counts.values(), tokens, read, bool(run.signals)])
    sums = accelerator.reduce(to_device(sums, accelerator.device))
    counts = {name: total.clamp(min=1) for name, total in zip(counts, sums, strict=False)}  # a step may have no target

    # DDP averages gradients over processes and accelerate divides by its own idea of accumulation; undo both
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, ((offset, _), batch) in enumerate(zip(shares, batches, strict=True)):
        torch.manual_seed(sampler.derive_seed(recipe.run.seed, "dropout", step, offset))
        is_last = number == len(batches) - 1
        # sharded, whole gradients would stay on each process until the last
        with nullcontext() if is_last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            inputs = {key: to_device(value, accelerator.device) for key, value in batch.items()}
            loss = run.task.forward(model, inputs, counts).loss
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), section.grad_clip or math.inf)  # inf: only measured
    measured = torch.stack([accelerator.reduce(loss_sum), to_full(norm).to(loss_sum.device)])
    if accelerator.scaler is not None:  # fp16's scaler must see what it scaled too far, and leaves the step out itself
        run.optimizer.step()
    else:
        step_if(run.optimizer, measured.isfinite().all())
    run.optimizer.zero_grad()
    return AsyncHostCopy(measured, sums[-3:])


def settle(run, reporter, step, rate, numbers):
    """Say and log what a step has come to; returns whether a process is to stop."""
    (loss, norm), (tokens, read, must_stop) = numbers.read()
    # in fp16 a gradient that is not finite only tells the scaler to scale less; all processes answer alike
    is_finite = math.isfinite(loss) and (math.isfinite(norm) or run.accelerator.scaler is not None)
    run.skipped_steps = 0 if is_finite else run.skipped_steps + 1
    if run.skipped_steps:
        report_skipped(run, reporter, step, loss, norm)
    is_logged = run.skipped_steps or step + 1 == run.total_steps or (step + 1) % run.recipe.run.log_freq == 0
    reporter.log_step(step + 1, loss, rate, tokens, norm, read, write=is_logged)
    return bool(must_stop)


def report_skipped(run, reporter, step, loss, norm):
    """Say which step was left out, or stop when it was one too many in a row."""
    section, rows = run.recipe.training, run.sampler.rows_of_step(step).tolist()
    shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    what = (
        f"the loss of step {step + 1} is {loss} and its gradient's norm {norm} (rows {shown} of {run.train_rows.name})"
    )
    if run.skipped_steps > section.max_skipped_steps:
        raise InputError(
            f"{what}{f', {run.skipped_steps} such in a row' * (run.skipped_steps > 1)}: lower learning_rate, raise "
            "warmup_steps or set grad_clip (--allow_changed goes on from the newest checkpoint with them), or let such "
            "steps be left out by max_skipped_steps"
        )
    reporter.warning(f"left out: {what}")


def is_evaluation_due(run, reporter):
    """Whether to evaluate before the first step: at the beginning, and where a signal had cut an evaluation short."""
    every = run.recipe.evaluation.eval_freq
    if not every or run.start_step % every or run.start_step == run.total_steps:
        return False
    return any_rank(run, run.accelerator.is_main_process and not reporter.has_evaluation(run.start_step))


def any_rank(run, condition):
    """Whether it holds for any process; all ask together, and get one answer."""
    if run.accelerator.num_processes > 1:
        return bool(run.accelerator.reduce(torch.tensor(int(condition), device=run.accelerator.device)))
    return condition


def leave(run, reporter):
    """The exit code of a run that a signal has stopped: 128 and the signal's number, the same of all processes."""
    reporter.close()
    if run.uploads is not None and (line := run.uploads.stop()):
        reporter.error(line)
    received = torch.tensor([run.signals[0] if run.signals else 0], device=run.accelerator.device)
    return 128 + int(run.accelerator.gather(received).max())


def best_step(run, up_to):
    """The step of the best evaluation so far, by the recipe's metric; None where there is none, or no metric."""
    return find_best(run, up_to)[0] if run.recipe.evaluation.metric_for_best else None


def find_best(run, up_to):
    section = run.recipe.evaluation
    return best_evaluation(run.recipe.run.save_model, section.metric_for_best, up_to, section.greater_is_better)


def has_lost_patience(run, step):
    """Whether the evaluations up to a step have gone without a better one for too long; all processes ask together."""
    section, lost = run.recipe.evaluation, False
    if section.patience is None:
        return False
    if run.accelerator.is_main_process:
        best, _, since = find_best(run, step)
        lost = since >= section.patience + (best is None)
    return any_rank(run, lost)


# ---- evaluation, checkpoints, the end


def evaluate(run, model, rows, count, first=0, with_predictions=True):
    """Return the metrics of `count` rows, evenly spaced (None: all rows), or of all rows of `count` examples; the rows
    are counted from `first`."""
    return evaluate_rows(
        model,
        run.task,
        rows,
        run.task.choose_rows(rows, count) + first,
        run.recipe.training.batch_size,
        run.accelerator,
        run.token_bytes,
        lambda: any_rank(run, bool(run.signals)),
        with_predictions,
        run.recipe.evaluation.metrics or (),
    )


def report_evaluation(run, model, reporter, step, is_final=False):
    """Evaluate, print and log; in the middle of a run on `eval_iter` batches, at its end on all validation rows; where
    the best is kept, and of labelled data where the recipe says nothing, each time on all of them.

    Returns the figures of the validation rows, {} when there are none, or None when a signal came in between.
    """
    recipe, run.phase = run.recipe, f"the evaluation after step {step}"
    count, metric = (recipe.evaluation.eval_iter or 20) * recipe.training.total_batch_size, None
    first = run.sampler.first_row(max(0, step - 1))
    training = evaluate(run, model, run.train_rows, count, first, with_predictions=False)
    validation = {}
    if training is not None and run.val_rows:
        metric = recipe.evaluation.metric_for_best
        is_whole = is_final or metric or (run.task.has_predictions and recipe.evaluation.eval_iter is None)
        validation = evaluate(run, model, run.val_rows, None if is_whole else count)
    if training is None or validation is None:
        return None
    line = {"step": step, "train_loss": training["loss"]}
    if validation:
        line |= {f"val_{key}": value for key, value in validation.items()}
        if metric and metric not in line:
            known = ", ".join(key for key in line if key.startswith("val_"))
            raise InputError(f"metric_for_best {metric} is no figure of task {recipe.task}, which has {known}")
    details = run.task.describe_metrics(validation) if validation else ""
    reporter.evaluation(step, run.total_steps, training, validation, details)
    speaks = run.accelerator.is_main_process or run.accelerator.is_fsdp2  # whose weights only all have together
    if recipe.evaluation.start_context is not None and run.tokenizer is not None and speaks:
        line["sample"] = sample(run, step)
        reporter.show_sample(line["sample"])
    reporter.log(line)
    return validation


def sample(run, step):
    section = run.recipe.evaluation
    model = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return run.task.sample(
        model,
        section.start_context,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        seed=sampler.derive_seed(run.recipe.run.seed, "sample", step),
    )


def open_report(run, ends):
    """The report of a run that goes to step `ends`."""
    recipe, accelerator, model = run.recipe, run.accelerator, run.model
    peak, flops = peak_flops(accelerator), 0.0
    if peak:  # a token's share: Chowdhery et al. 2022, appendix B; of what is frozen, no gradient is computed
        config, trained = model.config, model.num_parameters(only_trainable=True)
        flops = 4 * model.num_parameters() + 2 * trained
        flops += 12 * config.num_hidden_layers * config.hidden_size * recipe.data.max_len
    return Reporter(
        recipe.run.save_model,
        run.start_step,
        ends,
        accelerator.is_main_process,
        recipe.run.log_level,
        flops=flops / peak if peak else 0.0,
        memory=lambda: peak_memory(accelerator),
    )


def lock_folder(folder):
    """Keep other runs out of the folder; the operating system lets go of the lock when this process ends, however."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        raise InputError(f"{folder} is in use by a run that is going on; write elsewhere with --save_model") from None
    except OSError as error:
        raise InputError(f"the run's folder {folder} cannot be written: {error}") from None


def open_folder(run, folder):
    """The run's folder with its resolved recipe, free of what a killed process left half-written."""
    try:
        checkpoint.remove_partial(folder)
        if run.start_step == 0 or run.recipe.run.allow_changed:
            kept = replace(run.recipe, run=replace(run.recipe.run, resume=False, allow_changed=False))
            write_text_atomically(
                folder / "recipe.yaml",
                f"# to repeat: accelerate launch -m hf_myllm.train {folder / 'recipe.yaml'} --save_model ANOTHER\n"
                + kept.to_yaml(),
            )
    except OSError as error:
        raise InputError(f"the run's folder {folder} cannot be written: {error}") from None


def save_checkpoint(run, step):
    """The whole state at a step, written by the main process while the others wait; in sharded training (FSDP2) each
    writes its rows of the optimizer's state."""
    accelerator, recipe, run.phase = run.accelerator, run.recipe, f"the save after step {step}"
    is_sharded = accelerator.is_fsdp2
    if any_rank(run, not all(bool(to_local(weight).isfinite().all()) for weight in run.model.parameters())):
        raise InputError(
            f"the weights after step {step} are not all finite, and not saved: lower learning_rate, or set grad_clip"
        )
    weights, together = None, {}
    if is_sharded:
        weights = accelerator.get_state_dict(run.model)  # gathered on the main process
        if weights:
            weights |= {tied: weights[source] for tied, source in run.model.all_tied_weights_keys.items()}
        together["shard"] = accelerator.process_index, accelerator.num_processes
        together["exchange"] = lambda value: gather_object([value])

    def write_model(folder):
        if lora.is_added(run.model):
            lora.save(run.model, folder)
        else:
            run.model.save_pretrained(folder, state_dict=weights)
        if run.tokenizer is not None:
            tokenizers.save(run.tokenizer, folder)

    state = {
        "step": step,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "recipe": recipe.identity(),
        "data": fingerprints(run),
        "skipped": run.skipped_steps,
    }
    if recipe.data.streaming:
        state["stream"] = run.train_rows.windows.recent_positions()
    if accelerator.scaler is not None:  # fp16's loss scale is learned too
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process or is_sharded:
        tensors, limit = optimizer_tensors(run.model, run.optimizer.optimizer), recipe.run.save_total_limit
        together["keep"] = best_step(run, step)
        try:
            checkpoint.save(recipe.run.save_model, step, write_model, tensors, state, limit, **together)
        except checkpoint.ShardError as error:
            who = f"process {accelerator.process_index} of {accelerator.num_processes}"
            raise RankError(f"{who}, in {run.phase}: {error}") from None
    accelerator.wait_for_everyone()


def finish(run, model, reporter, last, unigram, validation=None):
    """The last evaluation, the model at the run's root, the curve, and what to do next; False when a signal came.

    Args:
        last: the step after which training has ended.
        validation: its figures, where it has been evaluated on all rows.
    """
    folder = Path(run.recipe.run.save_model)
    if validation is None:
        validation = report_evaluation(run, model, reporter, last, is_final=True)
    if validation is None:
        return False
    if run.accelerator.is_main_process:
        amend_run(folder, published_step=publish(run, reporter, last))
    reporter.close()
    if not run.accelerator.is_main_process:
        return True
    show(folder, reporter.warning)
    print_result(run, reporter, last, validation, unigram)
    if run.uploads is not None:
        reporter.info(f"push        to {run.uploads.repo} ... (Ctrl-C leaves it)")
        said, is_there = run.uploads.finish(lambda: bool(run.signals))
        (reporter.info if is_there else reporter.error)(said)
    return True


def show(folder, warn):
    """Draw the curves, and write the report and the model card."""
    for name, make in (("loss.png", plot.make), ("report.html", page.make), ("README.md", hub.write_card)):
        try:
            make(folder)
        except Exception as error:  # the model is there, and that is what counts
            warn(f"warning: {name} could not be written: {first_line(error)[:200]}")


def publish(run, reporter, last):
    """The last model, or the best, at the run's root; LoRA's merged into it where the recipe says so. Returns the step
    that it is of."""
    recipe, folder = run.recipe, Path(run.recipe.run.save_model)
    chosen, best = folder / f"checkpoint-{last}", best_step(run, last)
    if best is not None:
        metric = recipe.evaluation.metric_for_best
        value = find_best(run, last)[1]
        holds = recipe.evaluation.final_model if best != last else "last, which is the best"
        if recipe.evaluation.final_model == "best" and checkpoint.find_corruption(folder / f"checkpoint-{best}"):
            if checkpoint.has_model(folder):
                reporter.warning(
                    f"best        {folder}/checkpoint-{best} is gone or damaged, and {folder} stays as it is"
                )
                return best
            holds = f"last, for {folder}/checkpoint-{best} is gone or damaged"
        elif recipe.evaluation.final_model == "best":
            chosen = folder / f"checkpoint-{best}"
        reporter.info(f"best        {metric} {value:.4f} after step {best}; {folder} holds the {holds}")
    if not (lora.is_added(run.model) and recipe.lora.merge_lora):
        checkpoint.publish(chosen, folder)
        return checkpoint.step_of(chosen)
    merged = lora.merge(run.accelerator.unwrap_model(run.model), chosen)

    def write_model(aside):
        merged.save_pretrained(aside)
        tokenizers.save(run.tokenizer, aside)

    checkpoint.publish_new(write_model, folder)
    return checkpoint.step_of(chosen)


def is_published(run, last):
    """Whether the model at the run's root is what this run ends with."""
    folder = Path(run.recipe.run.save_model)
    if lora.is_added(run.model) and run.recipe.lora.merge_lora:
        return False  # whose it is, a merged model does not say: it is made again
    best = best_step(run, last) if run.recipe.evaluation.final_model == "best" else None
    path = folder / f"checkpoint-{last if best is None else best}"
    if checkpoint.find_corruption(path):
        return best is not None and checkpoint.has_model(folder)  # which then stays as it is
    return checkpoint.is_published(path, folder)


def evaluate_only(run):
    if run.val_rows is None:
        raise InputError("there is nothing to evaluate on: give --val_file FILE, or a val_fraction above 0")
    if run.accelerator.is_fsdp2:
        shard_model(run.accelerator, run.model, run.recipe.training.compile)
    else:
        run.model = run.accelerator.prepare_model(run.model, evaluation_mode=True)
    metrics = evaluate(run, run.model, run.val_rows, None)
    if run.accelerator.is_main_process:
        print("".join(f"{line}\n" for line in skipped_rows(run)), end="")
        has_perplexity = "perplexity" in metrics
        count = f"{metrics['tokens']:,} tokens" if has_perplexity else f"{len(run.val_rows):,} rows"
        perplexity = f", perplexity {metrics['perplexity']:.3f}" if has_perplexity else ""
        print(f"validation loss {describe_loss(run.task, metrics)}{perplexity}")
        print(f"over all {count} of {run.val_rows.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
