"""Train a model from a recipe: `accelerate launch -m hf_myllm.train recipes/quickstart.yaml`.

A run is a pure function of its recipe and its step: the learning rate, the rows and the dropout of step s are computed
from (recipe, s), never carried along. What a checkpoint holds is what training learned, the parameters and the
optimizer's moments, so that a run that was killed goes on bit for bit.
"""

import gc
import math
import shlex
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object
from filelock import FileLock, Timeout

from . import checkpoint, dry_run, lora
from .data import examples, objectives, order, tasks
from .data import tokenizer as tokenizers
from .errors import InputError, ProcessError, exit_on_input_error, first_line
from .evaluation import evaluate, unigram_level
from .generate import fill_in, generate_text
from .models import FAMILIES
from .optim import build_optimizer, learning_rate, load_optimizer_tensors, local, optimizer_tensors, whole
from .prepare import check_folder, fingerprints, prepare
from .processes import (
    end_with_the_launcher,
    listen_for_signals,
    make_accelerator,
    quiet_the_libraries,
    shard,
    use_all_cores,
)
from .recipe import parse
from .report import Report, best_evaluation, plot


@exit_on_input_error
def main(argv):
    recipe = parse(argv, FAMILIES)
    quiet_the_libraries()
    end_with_the_launcher()
    before = checkpoint.listing(recipe.run.save_model)
    resume_from = check_folder(recipe)
    use_all_cores()
    accelerator = make_accelerator(recipe.training.compile)
    run = prepare(recipe, accelerator, from_the_first_process(resume_from, recipe.run.save_model, accelerator))
    try:
        if recipe.run.dry_run:
            if accelerator.is_main_process:
                dry_run.show(run, argv)
            return 0
        code = evaluate_only(run) if recipe.evaluation.eval_only else train(run, before)
        # a sharded model knows of the process group, which must end before Python does
        run.model = run.optimizer = None
        gc.collect()
        accelerator.end_training()
        return code
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        problem = (
            f"out of memory: lower batch_size, which leaves a step as it is when total_batch_size is set ({error})"
        )
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        goes_on = "; --init_from resume goes on from the newest checkpoint" * checkpoint.has_checkpoints(
            recipe.run.save_model
        )
        problem = f"{first_line(error)[:300]}{goes_on}"
    finally:
        if recipe.data.streaming and run.training is not None:
            run.training.windows.close()
        if run.lock is not None:
            run.lock.release()
    raise ProcessError(f"process {accelerator.process_index} of {accelerator.num_processes}, in {run.doing}: {problem}")


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
        raise ProcessError(
            f"{who} does not see {path}, which the first does: {folder} must be on a disk that all share"
        )
    return path


# ---- the loop


def train(run, before):
    """Train to the end, or to a signal; returns the exit code. `before` is what the run's folder held at the start."""
    recipe, accelerator = run.recipe, run.accelerator
    section, folder = recipe.training, Path(recipe.run.save_model)
    is_main = accelerator.is_main_process
    ends = run.start if run.resume_from and has_lost_patience(run, run.start) else run.total_steps
    if run.resume_from and run.start == ends and holds_for_any(run, is_main and is_published(run, ends)):
        if accelerator.is_main_process:
            more = "max_steps or epochs" if ends == run.total_steps else "patience"
            print(f"{folder} is finished, after {ends} steps; raise {more} to go further")
        return 0
    run.signals = listen_for_signals()
    problem = None
    if is_main:
        try:
            run.lock = lock_folder(folder)
            if checkpoint.listing(folder) != before:  # preparing may have taken hours
                problem = InputError(
                    f"another run has written into {folder} since this one was started; start it again"
                )
        except InputError as error:
            problem = error
    if holds_for_any(run, problem is not None):
        raise problem or InputError(f"the first process cannot use {folder}, and says why")
    digest = order.derive_seed(*sorted(fingerprints(run).items()), len(run.tokenizer or ()))
    digests = accelerator.gather(torch.tensor([digest], device=accelerator.device)).tolist()
    if len(set(digests)) > 1:
        raise InputError("the processes have not prepared the same tokens: give all machines the same files")
    if accelerator.is_fsdp2:  # before the optimizer, which then has this process's share only
        shard(accelerator, run.model, section.compile)
    optimizer = build_optimizer(
        run.model, section.learning_rate, (section.beta1, section.beta2), section.epsilon, section.weight_decay
    )
    if accelerator.is_fsdp2:
        model, run.optimizer = run.model, accelerator.prepare_optimizer(optimizer)
    else:
        model, run.optimizer = accelerator.prepare(run.model, optimizer)
    if run.resume_from is not None:
        try:
            load_optimizer_tensors(run.model, run.optimizer.optimizer, checkpoint.OptimizerFiles(run.resume_from))
        except (KeyError, ValueError) as error:
            raise InputError(f"the optimizer's state in {run.resume_from} is not of this model: {error}") from None
        state = checkpoint.load_state(run.resume_from)
        run.skipped, precision = state["skipped"], state.get("mixed_precision", accelerator.mixed_precision)
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.is_main_process:
        open_folder(run, folder)
    accelerator.wait_for_everyone()
    report = Report(folder, run.start, ends, accelerator.is_main_process)
    unigram = introduce(run, report)
    if run.resume_from is not None and precision != accelerator.mixed_precision:
        report.say(f"            until now in precision {precision}: from here on it is another run than that would be")

    validation = None
    report.pause()
    if is_evaluation_due(run, report):
        validation = report_evaluation(run, model, report, run.start)
        if validation is None:
            report.say("stopped by a signal in the first evaluation; --init_from resume starts there again")
            return leave(run, report)
        if run.start and has_lost_patience(run, run.start):
            ends = run.start
    model.train()
    report.resume()
    for step in range(run.start, ends):
        run.doing = f"step {step + 1}"
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
        loss, tokens, must_stop, norm, read = training_step(run, model, step)
        done = step + 1
        is_last = done == run.total_steps
        run.skipped = 0 if is_finite(run, loss, norm) else run.skipped + 1
        if run.skipped:
            report_skipped(run, report, step, loss, norm)
        is_logged = run.skipped or is_last or done % recipe.run.log_freq == 0
        report.step(done, loss, rate, tokens, norm, read, write=is_logged)

        report.pause()
        is_best = False
        if recipe.evaluation.eval_freq and done % recipe.evaluation.eval_freq == 0 and not is_last and not must_stop:
            validation = report_evaluation(run, model, report, done)
            must_stop = validation is None
            is_best = not must_stop and holds_for_any(run, is_main and best_step(run, done) == done)
            if not must_stop and has_lost_patience(run, done):
                ends, is_last = done, True
        if must_stop or is_last or is_best or (recipe.run.save_freq and done % recipe.run.save_freq == 0):
            save_checkpoint(run, done)
        report.resume()
        if ends == done:
            break
        if must_stop and not is_last:
            report.say(f"stopped by a signal after step {done}, which is saved: --init_from resume goes on from it")
            return leave(run, report)
    # one that lost patience has just been evaluated on all rows
    if not finish(run, model, report, ends, unigram, validation if ends < run.total_steps else None):
        report.say("stopped by a signal in the last evaluation; --init_from resume goes on from it")
        return leave(run, report)
    return 0


def training_step(run, model, step):
    """One optimizer step over all processes; returns its loss, tokens, whether to stop, gradient norm, and a digest of
    the rows that were read.

    The loss is the sum over all targets of the step divided by their number, however they are spread over
    micro-batches and processes. A step whose loss or gradient is not finite changes nothing.
    """
    recipe, accelerator = run.recipe, run.accelerator
    section = recipe.training
    rows = run.order.rows_of_step(step)
    shares = order.micro_batches(
        rows, section.batch_size, accelerator.process_index, accelerator.num_processes, run.accumulation
    )
    batches = [run.objective.batch(run.training, share, step, section.batch_size) for _, share in shares]
    counts = Counter()
    for batch in batches:
        counts.update(objectives.counts(batch))
    # all processes divide by the same numbers, and stop at the same step or none
    tokens, read = sum(map(objectives.tokens_read, batches)), sum(order.digest(share) for _, share in shares)
    sums = torch.tensor([*counts.values(), tokens, read, bool(run.signals)], device=accelerator.device)
    *sums, tokens, read, must_stop = accelerator.reduce(sums)
    counts = {name: total.clamp(min=1) for name, total in zip(counts, sums, strict=True)}  # a step may have no target

    # DDP averages gradients over processes and accelerate divides by its own idea of accumulation; undo both
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, ((offset, _), batch) in enumerate(zip(shares, batches, strict=True)):
        torch.manual_seed(order.derive_seed(recipe.run.seed, "dropout", step, offset))
        is_last = number == len(batches) - 1
        # sharded, whole gradients would stay on each process until the last
        with nullcontext() if is_last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            inputs = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
            loss = run.objective.forward(model, inputs, counts).loss
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), section.grad_clip or math.inf)  # inf: only measured
    norm = whole(norm).item()
    loss = accelerator.reduce(loss_sum).item()
    if is_finite(run, loss, norm) or accelerator.scaler is not None:  # fp16's scaler must see what it scaled too far
        run.optimizer.step()
    run.optimizer.zero_grad()
    must_stop = bool(must_stop) or (bool(run.signals) and accelerator.num_processes == 1)
    return loss, int(tokens), must_stop, norm, int(read)


def is_finite(run, loss, norm):
    """Whether a step can be taken; all processes answer alike. In fp16 a gradient that is not finite only tells the
    scaler to scale less, which then leaves the step out itself."""
    return math.isfinite(loss) and (math.isfinite(norm) or run.accelerator.scaler is not None)


def report_skipped(run, report, step, loss, norm):
    """Say which step was left out, or stop when it was one too many in a row."""
    section, rows = run.recipe.training, run.order.rows_of_step(step).tolist()
    shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    what = f"the loss of step {step + 1} is {loss} and its gradient's norm {norm} (rows {shown} of {run.training.name})"
    if run.skipped > section.max_skipped_steps:
        raise InputError(
            f"{what}{f', {run.skipped} such in a row' * (run.skipped > 1)}: lower learning_rate, raise warmup_steps "
            "or set grad_clip (--allow_changed goes on from the newest checkpoint with them), or let such steps be "
            "left out by max_skipped_steps"
        )
    report.say(f"left out: {what}")


def is_evaluation_due(run, report):
    """Whether to evaluate before the first step: at the beginning, and where a signal had cut an evaluation short."""
    every = run.recipe.evaluation.eval_freq
    if not every or run.start % every or run.start == run.total_steps:
        return False
    return holds_for_any(run, run.accelerator.is_main_process and not report.has_evaluation(run.start))


def holds_for_any(run, condition):
    """Whether it holds for any process; all ask together, and get one answer."""
    if run.accelerator.num_processes > 1:
        return bool(run.accelerator.reduce(torch.tensor(int(condition), device=run.accelerator.device)))
    return condition


def leave(run, report):
    """The exit code of a run that a signal has stopped: 128 and the signal's number, the same of all processes."""
    report.close()
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
    return holds_for_any(run, lost)


# ---- evaluation, checkpoints, the end


def evaluate_rows(run, model, rows, count, first=0, is_judged=True):
    """The loss of `count` rows, evenly spread (None: all rows) from a first one on; of labelled data with all rows of
    each item."""
    if isinstance(rows, examples.Examples):
        numbers = rows.rows_of(order.spread(count, rows.num_items))
    else:
        numbers = order.spread(count, len(rows)) + first
    return evaluate(
        model,
        run.objective,
        rows,
        numbers,
        run.recipe.training.batch_size,
        run.accelerator,
        run.token_bytes,
        lambda: holds_for_any(run, bool(run.signals)),
        is_judged,
        run.recipe.evaluation.metrics or (),
    )


def report_evaluation(run, model, report, step, is_final=False):
    """Evaluate, print and log; in the middle of a run on `eval_iter` batches, at its end on all validation rows; where
    the best is kept, and of labelled data where the recipe says nothing, each time on all of them.

    Returns the figures of the validation rows, {} when there are none, or None when a signal came in between.
    """
    recipe, run.doing = run.recipe, f"the evaluation after step {step}"
    count, metric = (recipe.evaluation.eval_iter or 20) * recipe.training.total_batch_size, None
    training = evaluate_rows(run, model, run.training, count, run.order.first_row(max(0, step - 1)), is_judged=False)
    validation = {}
    if training is not None and run.validation:
        metric = recipe.evaluation.metric_for_best
        is_labelled = isinstance(run.validation, examples.Examples) and recipe.evaluation.eval_iter is None
        validation = evaluate_rows(run, model, run.validation, None if is_final or metric or is_labelled else count)
    if training is None or validation is None:
        return None
    line = {"step": step, "train_loss": training["loss"]}
    shown = f"step {step}: training loss {training['loss']:.4f}"
    if validation:
        flat = {key: value for key, value in validation.items() if key not in ("metrics", "tokens")}
        line |= {f"val_{key}": value for key, value in (flat | validation.get("metrics", {})).items()}
        shown += f", validation loss {describe(validation)}"
        if metric and metric not in line:
            known = ", ".join(key for key in line if key.startswith("val_"))
            raise InputError(f"metric_for_best {metric} is no figure of task {recipe.task}, which has {known}")
    report.say(shown)
    speaks = run.accelerator.is_main_process or run.accelerator.is_fsdp2  # whose weights only all have together
    if recipe.evaluation.start_context is not None and run.tokenizer is not None and speaks:
        line["sample"] = sample(run, step)
        report.say("\n".join(f"  | {printable(text)}" for text in line["sample"].splitlines()))
    report.write(line)
    return validation


def describe(figures):
    more = "" if figures.get("bits_per_byte") is None else f" ({figures['bits_per_byte']:.3f} bits per byte)"
    if "nsp_loss" in figures:
        pair_loss, right = figures["nsp_loss"], figures["nsp_accuracy"]
        more = f" (masked tokens {figures['loss'] - pair_loss:.4f}, next sentence {pair_loss:.4f}, {right:.1%} right)"
    if "metrics" in figures:
        more = f" ({', '.join(f'{name} {value:.4f}' for name, value in figures['metrics'].items())})"
    return f"{figures['loss']:.4f}{more}"


def printable(text):
    """What an untrained model says may move a terminal's cursor: show such characters instead of sending them."""
    return "".join(character if character.isprintable() or character == "\t" else "\ufffd" for character in text)


def sample(run, step):
    section = run.recipe.evaluation
    model = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    if run.recipe.task in ("mlm", "mlm_nsp"):
        return fill_in(model, run.tokenizer, section.start_context)
    return generate_text(
        model,
        run.tokenizer,
        section.start_context,
        section.max_new_tokens,
        section.temperature,
        section.top_k,
        seed=order.derive_seed(run.recipe.run.seed, "sample", step),
    )


def introduce(run, report):
    """Say what is about to be trained on what; returns the unigram level that it must beat, or None."""
    recipe, section = run.recipe, run.recipe.training
    model = run.model
    report.say(
        f"model       {recipe.model}, {model.num_parameters():,} parameters, {run.accelerator.num_processes} x "
        f"{run.accelerator.device.type}, precision {run.accelerator.mixed_precision}, task {recipe.task}"
    )
    if lora.is_added(model):
        count = model.num_parameters(only_trainable=True)
        report.say(f"            LoRA of rank {recipe.lora.r}: {count:,} of the parameters are trained")
    if run.fresh:
        report.say(f"            not in {recipe.run.init_from}, and so starting fresh: {', '.join(run.fresh)}")
    is_padded = recipe.task in ("mlm_nsp", *tasks.TASKS) or recipe.data.packing in ("pad", "best_fit")
    up_to = "up to " * is_padded
    tokens = f"{len(run.training.tokens):,} tokens, {len(run.training):,} rows of {up_to}{recipe.data.max_len}"
    if recipe.data.streaming:
        tokens = f"{run.given.name}, {run.training.windows.size:,} tokens at a time, {len(run.training):,} rows"
    report.say(f"training    {tokens}")
    if repeated := sum(source.repeated for source in run.given.all):
        report.say(f"            named more than once, and read once: {repeated} files")
    for line in run.mixture():
        report.say(f"            {line}")
    unknown = run.account["train"].get("unknown", 0) / max(1, run.account["train"].get("tokens", 0))
    if unknown > 0.001:
        name = run.tokenizer.unk_token
        report.say(f"            {unknown:.1%} of the tokens are {name}: the tokenizer does not know all of the text")
    unigram = None
    for line in left_out(run):
        report.say(f"            {line}")
    if recipe.task in tasks.TASKS:
        introduce_labels(run, report)
    elif run.validation is not None:
        part = f", held out: {run.account['held_out']}" if "held_out" in run.account else ""
        report.say(f"validation  {len(run.validation.tokens):,} tokens{part}")
        never = [] if recipe.task == "causal" else tokenizers.special_ids(run.tokenizer)
        sizes = model.config.vocab_size, run.token_bytes
        level = unigram_level(run.training.tokens, run.validation.tokens, *sizes, never)
        if recipe.task == "mlm_nsp":
            level["loss"] += math.log(2)  # of a guess whether a sentence follows
        unigram = level["loss"]
        report.say(f"            {describe(level)}: unigram level, the loss of knowing only how often tokens occur")
    if recipe.run.resume and run.resume_from is None:
        report.say(f"resume      {recipe.run.save_model} has no checkpoint yet: starting from the beginning")
    at = f"from step {run.start} " if run.start else ""
    report.say(
        f"steps       {at}to {run.total_steps:,}, each of {section.total_batch_size} rows "
        f"({section.total_batch_size * recipe.data.max_len:,} tokens{' at most' * is_padded}), "
        f"{section.lr_schedule} learning rate"
    )
    report.say(f"run folder  {recipe.run.save_model}")
    return unigram


def left_out(run):
    """A line for the training and the validation data, where they have rows that cannot be used."""
    for part, account in run.account.items():
        if isinstance(account, dict) and account.get("skipped"):
            name = {"train": "training"}.get(part, part)
            yield f"left out of {name}: {account['skipped']:,} rows that cannot be used; {account['refused'][0]}"


def introduce_labels(run, report):
    """Say what is to be learned from labelled rows, and the level of saying always the same."""
    labels, account = getattr(run.objective, "labels", None), run.account["train"]
    if run.validation is not None:
        report.say(f"validation  {len(run.validation):,} rows")
    for rows in (run.training, run.validation):
        if rows is not None and labels and labels.kind == tasks.CLASSIFICATION:
            counts = np.bincount(rows.labels[rows.labels != objectives.IGNORED], minlength=labels.count)
            name, shares = "training" if rows is run.training else "validation", counts / counts.sum()
            often = np.argsort(-shares, kind="stable")
            said = ", ".join(f"{labels.names[number]} {shares[number]:.1%}" for number in often[:8])
            more = f" and {len(often) - 8} more" * (len(often) > 8)
            report.say(f"{'':<12}labels of the {name}: {said}{more}")
    if cut := account.get("cut"):
        does = "were cut" if run.recipe.task == "classification" else "make several rows"
        report.say(f"            {cut:,} texts are longer than max_len and {does}")
    if account.get("unlearned"):
        report.say(
            f"            {account['unlearned']:,} of the assistant's turns are read, and not learned: the chat "
            "template writes them otherwise when others follow"
        )
    if account.get("unanswerable"):
        report.say(f"            {account['unanswerable']:,} questions have no answer")


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
        checkpoint.sweep(folder)
        if run.start == 0 or run.recipe.run.allow_changed:
            kept = replace(run.recipe, run=replace(run.recipe.run, resume=False, allow_changed=False))
            aside = folder / "recipe.yaml.partial"
            aside.write_text(
                f"# to repeat: accelerate launch -m hf_myllm.train {folder / 'recipe.yaml'} --save_model ANOTHER\n"
                + kept.to_yaml(),
                encoding="utf-8",
            )
            aside.replace(folder / "recipe.yaml")
    except OSError as error:
        raise InputError(f"the run's folder {folder} cannot be written: {error}") from None


def save_checkpoint(run, step):
    """The whole state at a step, written by the main process while the others wait; in sharded training (FSDP2) each
    writes its rows of the optimizer's state."""
    accelerator, recipe, run.doing = run.accelerator, run.recipe, f"the save after step {step}"
    is_sharded = accelerator.is_fsdp2
    if holds_for_any(run, not all(bool(local(weight).isfinite().all()) for weight in run.model.parameters())):
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
        "skipped": run.skipped,
    }
    if recipe.data.streaming:
        state["stream"] = run.training.windows.recent_places()
    if accelerator.scaler is not None:  # fp16's loss scale is learned too
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process or is_sharded:
        tensors, limit = optimizer_tensors(run.model, run.optimizer.optimizer), recipe.run.save_total_limit
        together["keep"] = best_step(run, step)
        try:
            checkpoint.save(recipe.run.save_model, step, write_model, tensors, state, limit, **together)
        except checkpoint.ShardError as error:
            who = f"process {accelerator.process_index} of {accelerator.num_processes}"
            raise ProcessError(f"{who}, in {run.doing}: {error}") from None
    accelerator.wait_for_everyone()


def finish(run, model, report, last, unigram, validation=None):
    """The last evaluation, the model at the run's root, the curve, and what to do next; False when a signal came.

    Args:
        last: the step after which training has ended.
        validation: its figures, where it has been evaluated on all rows.
    """
    recipe, folder = run.recipe, Path(run.recipe.run.save_model)
    if validation is None:
        validation = report_evaluation(run, model, report, last, is_final=True)
    if validation is None:
        return False
    if run.accelerator.is_main_process:
        publish(run, report, last)
    report.close()
    if not run.accelerator.is_main_process:
        return True
    rows = tasks.TASKS.get(recipe.task) and recipe.task != "instruction"
    try:
        plot(folder, unigram, unit="nats per label" if rows else "nats per token")
    except OSError as error:
        report.say(f"loss.png could not be drawn: {error}")
    if validation and rows:
        report.say(f"done        validation loss {describe(validation)} on all {len(run.validation):,} rows")
    elif validation:
        what = {"mlm": "masked ", "mlm_nsp": "masked ", "instruction": "learned "}.get(recipe.task, "")
        level = "" if unigram is None else f"; unigram level {unigram:.4f}"
        report.say(
            f"done        validation loss {describe(validation)} on all {validation['tokens']:,} {what}tokens{level}"
        )
    name, prompt = shlex.quote(str(folder)), recipe.evaluation.start_context
    if rows:
        report.say(f"predict     python -m hf_myllm.predict {name} --input FILE")
    elif run.tokenizer is not None:
        is_masked = recipe.task in ("mlm", "mlm_nsp")
        prompt = prompt or (f"Once upon a {run.tokenizer.mask_token}" if is_masked else "Once upon a time")
        does = "fill in " if is_masked else "generate"
        report.say(f"{does}    python -m hf_myllm.generate {name} --prompt {shlex.quote(prompt)}")
    longer = f"--max_steps {2 * run.total_steps} --init_from resume --allow_changed"
    if last < run.total_steps:
        longer = f"--patience {2 * recipe.evaluation.patience} --init_from resume"
    recipe_file = shlex.quote(str(folder / "recipe.yaml"))
    report.say(f"resume      accelerate launch -m hf_myllm.train {recipe_file} {longer}")
    kind = {
        "mlm": "MaskedLM",
        "mlm_nsp": "PreTraining",
        "classification": "SequenceClassification",
        "token_classification": "TokenClassification",
        "question_answering": "QuestionAnswering",
    }.get(recipe.task, "CausalLM")
    labels = getattr(run.objective, "labels", None)
    if (base := lora.base_of(folder)) and kind in ("MaskedLM", "PreTraining", "QuestionAnswering"):
        whole = f'AutoModelFor{kind}.from_pretrained("{base}")'
        report.say(f'load        PeftModel.from_pretrained({whole}, "{folder}") in Python, with stock peft')
    elif base:
        more = f", num_labels={labels.count}" if labels else ""
        more += f", pad_token_id={run.model.config.pad_token_id}" if labels and recipe.model != "bert" else ""
        report.say(f'load        AutoPeftModelFor{kind}.from_pretrained("{folder}"{more}) in Python, with stock peft')
    else:
        report.say(f'load        AutoModelFor{kind}.from_pretrained("{folder}") in Python, with stock transformers')
    return True


def publish(run, report, last):
    """The last model, or the best, at the run's root; LoRA's merged into it where the recipe says so."""
    recipe, folder = run.recipe, Path(run.recipe.run.save_model)
    chosen, best = folder / f"checkpoint-{last}", best_step(run, last)
    if best is not None:
        metric = recipe.evaluation.metric_for_best
        value = find_best(run, last)[1]
        holds = recipe.evaluation.final_model if best != last else "last, which is the best"
        if recipe.evaluation.final_model == "best" and checkpoint.damage(folder / f"checkpoint-{best}"):
            if checkpoint.is_finished(folder):
                report.say(f"best        {folder}/checkpoint-{best} is gone or damaged, and {folder} stays as it is")
                return
            holds = f"last, for {folder}/checkpoint-{best} is gone or damaged"
        elif recipe.evaluation.final_model == "best":
            chosen = folder / f"checkpoint-{best}"
        report.say(f"best        {metric} {value:.4f} after step {best}; {folder} holds the {holds}")
    if not (lora.is_added(run.model) and recipe.lora.merge_lora):
        checkpoint.publish(chosen, folder)
        return
    merged = lora.merge(run.accelerator.unwrap_model(run.model), chosen)

    def write_model(aside):
        merged.save_pretrained(aside)
        tokenizers.save(run.tokenizer, aside)

    checkpoint.publish_made(write_model, folder)


def is_published(run, last):
    """Whether the model at the run's root is what this run ends with."""
    folder = Path(run.recipe.run.save_model)
    if lora.is_added(run.model) and run.recipe.lora.merge_lora:
        return False  # whose it is, a merged model does not say: it is made again
    best = best_step(run, last) if run.recipe.evaluation.final_model == "best" else None
    path = folder / f"checkpoint-{last if best is None else best}"
    if checkpoint.damage(path):
        return best is not None and checkpoint.is_finished(folder)  # which then stays as it is
    return checkpoint.is_published(path, folder)


def evaluate_only(run):
    if run.validation is None:
        raise InputError("there is nothing to evaluate on: give --val_file FILE, or a val_fraction above 0")
    if run.accelerator.is_fsdp2:
        shard(run.accelerator, run.model, run.recipe.training.compile)
    else:
        run.model = run.accelerator.prepare_model(run.model, evaluation_mode=True)
    figures = evaluate_rows(run, run.model, run.validation, None)
    if run.accelerator.is_main_process:
        print("".join(f"{line}\n" for line in left_out(run)), end="")
    if run.accelerator.is_main_process and "metrics" in figures:
        print(f"validation loss {describe(figures)}\nover all {len(run.validation):,} rows of {run.validation.name}")
    elif run.accelerator.is_main_process:
        print(f"validation loss {describe(figures)}, perplexity {figures['perplexity']:.3f}")
        print(f"over all {figures['tokens']:,} tokens of {run.validation.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
