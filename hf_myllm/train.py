"""Train a model from a recipe: `accelerate launch -m hf_myllm.train recipes/quickstart.yaml`.

A run is a pure function of its recipe and its step: the learning rate, the rows and the dropout of step s are computed
from (recipe, s), never carried along. What a checkpoint holds is what training learned, the parameters and the
optimizer's moments, so that a run that was killed goes on bit for bit.
"""

import math
import os
import signal
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin

from . import checkpoint
from .data import corpus, objectives, order, packing
from .data import tokenizer as tokenizers
from .errors import InputError, exit_on_input_error
from .evaluation import evaluate, unigram_level
from .generate import generate_text
from .models import FAMILIES
from .optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from .recipe import Recipe, parse
from .report import Report, plot


@dataclass
class Run:
    """What a run consists of, once everything that its recipe names has been found and fits together."""

    recipe: Recipe
    accelerator: Accelerator
    tokenizer: object  # None for a .bin without one
    training: packing.Rows  # None when only evaluating
    validation: packing.Rows  # None when there is nothing to validate on
    model: torch.nn.Module
    resume_from: Path | None
    account: dict
    token_bytes: np.ndarray | None = None
    optimizer: object = None
    start: int = 0
    total_steps: int = 0
    last_position: int | None = None
    accumulation: int = 1


@exit_on_input_error
def main(argv):
    recipe = parse(argv, {name: config for name, (config, _) in FAMILIES.items()})
    quiet_the_libraries()
    resume_from = check_folder(recipe)
    use_all_cores()
    accelerator = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor") if recipe.training.compile else None)
    run = prepare(recipe, accelerator, resume_from)
    if recipe.evaluation.eval_only:
        return evaluate_only(run)
    code = train(run)
    accelerator.end_training()
    return code


# ---- what the run needs: found, checked, put together; nothing is written before all of it fits


def check_folder(recipe):
    """The checkpoint to resume from, if any; and whether the run's folder may be written to."""
    folder = Path(recipe.run.save_model)
    if recipe.evaluation.eval_only and not recipe.run.resume:
        return None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save_model {folder} is a file; name a folder")
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"save_model {folder} cannot be written: no permission in {existing}")
    if recipe.run.resume:
        warn = (lambda line: print(f"warning: {line}", file=sys.stderr)) if is_first_process() else (lambda line: None)
        return checkpoint.find(folder, warn)
    if checkpoint.is_finished(folder):
        raise InputError(
            f"{folder} already holds a finished run: continue it with --init_from resume, or write elsewhere with "
            "--save_model FOLDER"
        )
    if checkpoint.find(folder) is not None:
        raise InputError(
            f"{folder} holds the checkpoints of an unfinished run: continue it with --init_from resume, or write "
            "elsewhere with --save_model FOLDER"
        )
    return None


def prepare(recipe, accelerator, resume_from):
    """Tokenizer, data and model of a recipe, resolved: sizes that were left open have their values afterwards."""
    data, section = recipe.data, recipe.run
    sources = find_sources(data, recipe.evaluation.eval_only)
    pretrained = resume_from or (None if section.init_from == "scratch" else section.init_from)
    tokenizer = find_tokenizer(data, sources, pretrained, resume_from is not None)
    config = build_config(recipe, tokenizer, pretrained)
    resolve(recipe, config, accelerator, resume_from)

    training, validation, account = load_data(data, sources, tokenizer, accelerator)
    for tokens, source in ((training, sources[0]), (validation, sources[1] or sources[0])):
        if tokens is not None and tokens.max_id >= config.vocab_size:
            raise InputError(
                f"{source.name} has the token id {tokens.max_id} (at position {tokens.position_of_max}), and the model "
                f"a vocabulary of {config.vocab_size}: raise vocab_size, or give the data's own tokenizer"
            )
    name = sources[0].name if sources[0] else ""
    held_out = f"the validation part of {name}" if sources[1] is None else sources[1].name
    run = Run(
        recipe,
        accelerator,
        tokenizer,
        training and packing.Rows(training, data.max_len, data.stride, name),
        # rows that do not overlap, whatever the stride: each token is predicted once
        validation and packing.Rows(validation, data.max_len, data.max_len, held_out),
        build_model(recipe, config, pretrained),
        resume_from,
        account,
    )
    if tokenizer is not None:
        run.token_bytes = tokenizers.token_bytes(tokenizer, config.vocab_size)
    if run.training is not None:
        plan(run)
    if resume_from is not None:
        check_same_run(run, checkpoint.load_state(resume_from))
    return run


def find_sources(data, eval_only):
    """Where training and validation text come from; either may be None."""
    files = {"text_column": data.text_column, "document": data.document}
    training = validation = None
    if data.val_file:
        validation = corpus.file_source(data.val_file, **files)
    if data.dataset and not (eval_only and validation):
        training = corpus.hub_source(
            data.dataset, data.dataset_config, data.dataset_split, data.dataset_revision, data.text_column
        )
    elif data.train_file and not (eval_only and validation):
        training = corpus.file_source(data.train_file, **files)
    return training, validation


def find_tokenizer(data, sources, pretrained, is_resumed):
    """The recipe's tokenizer: loaded, trained, or the one of the model that the run starts from."""
    if is_resumed and (Path(pretrained) / "tokenizer_config.json").exists():
        return tokenizers.load(str(pretrained))
    if isinstance(data.tokenizer, str):
        return tokenizers.load(data.tokenizer)
    source = sources[0] or sources[1]
    if isinstance(data.tokenizer, dict):
        size = data.tokenizer["vocab_size"]

        def train_tokenizer(folder):
            tokenizers.train_bpe(corpus.read_documents(source), size).save_pretrained(folder)

        return tokenizers.load(str(corpus.cached_folder(["bpe", size, corpus.source_key(source)], train_tokenizer)))
    if pretrained and not is_resumed:
        return tokenizers.load(str(pretrained))
    if any(source and source.kind != "bin" for source in sources):
        raise InputError(
            "text needs a tokenizer: give --tokenizer a folder, a Hub id, or '{train: bpe, vocab_size: 8192}'"
        )
    return None


def build_config(recipe, tokenizer, pretrained):
    """The model's configuration: that of the checkpoint it starts from, or the family's own, with the recipe's
    `config` over it."""
    config_class, _ = FAMILIES[recipe.model]
    settings = dict(recipe.config)
    try:
        if pretrained:
            stored, _ = config_class.get_config_dict(str(pretrained))
            if stored.get("model_type") not in (None, config_class.model_type):
                raise InputError(
                    f"{pretrained} is a {stored['model_type']} model, and the recipe's model is {recipe.model} "
                    f"({config_class.model_type})"
                )
            config = config_class.from_pretrained(str(pretrained), **settings)
        else:
            if tokenizer is not None:
                for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                    settings.setdefault(name, getattr(tokenizer, name))
                settings.setdefault("vocab_size", len(tokenizer))
            positions = config_class.attribute_map["max_position_embeddings"]
            if recipe.data.max_len and not {positions, "max_position_embeddings"} & set(settings):
                settings[positions] = recipe.data.max_len  # positions that no row reaches would never be trained
            config = config_class(**settings)
    except (ValueError, TypeError, OSError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        where = f"the model {pretrained}" if pretrained else f"config of {recipe.model}"
        raise InputError(f"{where}: {cause[-1] if cause else type(error).__name__}") from None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the model's vocab_size {config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens: "
            "raise vocab_size, or give the model's own tokenizer"
        )
    return config


def build_model(recipe, config, pretrained):
    """The model in fp32, with fresh weights that only the seed decides, or with those of a checkpoint."""
    _, model_class = FAMILIES[recipe.model]
    if not pretrained:
        torch.manual_seed(order.derive_seed(recipe.run.seed, "initial weights"))
        return model_class(config)
    try:
        model, loading = model_class.from_pretrained(
            str(pretrained), config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"the model {pretrained} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if missing := sorted({*loading["missing_keys"], *loading["mismatched_keys"]}, key=str):
        raise InputError(f"the model {pretrained} does not fit its configuration: {missing[0]} (of {len(missing)})")
    return model


def resolve(recipe, config, accelerator, resume_from):
    """Fill in the sizes that follow from others."""
    data, training = recipe.data, recipe.training
    positions = config.max_position_embeddings
    data.max_len = data.max_len or positions
    if data.max_len > positions:
        raise InputError(f"max_len {data.max_len} is more than the {positions} positions of the model")
    data.stride = data.stride or data.max_len
    if training.total_batch_size is None:
        micro = training.gradient_accumulation_steps or 1
        training.total_batch_size = training.batch_size * micro * accelerator.num_processes
        if resume_from is not None:  # on another number of processes, the step stays what it was
            training.total_batch_size = checkpoint.load_state(resume_from)["recipe"]["total_batch_size"]
    training.gradient_accumulation_steps = None


def load_data(data, sources, tokenizer, accelerator):
    show = accelerator.is_local_main_process
    training_source, validation_source = sources
    training = validation = None
    account = {}
    if training_source is not None:
        fraction = 0.0 if validation_source else data.val_fraction
        training, validation, account = corpus.load_tokens(
            training_source, tokenizer, fraction, data.bin_dtype, show_progress=show
        )
    if validation_source is not None:
        validation, _, account["validation"] = corpus.load_tokens(
            validation_source, tokenizer, 0.0, data.bin_dtype, show_progress=show
        )
        account["validation"] = account["validation"]["train"]
    return training, validation, account


def plan(run):
    """How many steps, of how many micro-batches."""
    section = run.recipe.training
    run.accumulation = math.ceil(section.total_batch_size / (section.batch_size * run.accelerator.num_processes))
    if section.max_steps:
        run.total_steps = section.max_steps
    else:
        run.last_position = max(1, int(section.epochs * len(run.training)))
        run.total_steps = math.ceil(run.last_position / section.total_batch_size)
    if section.warmup_steps > run.total_steps:
        raise InputError(f"warmup_steps ({section.warmup_steps}) must not be above the run's {run.total_steps} steps")


def fingerprints(run):
    return {
        name: rows.tokens.fingerprint
        for name, rows in (("training data", run.training), ("validation data", run.validation))
        if rows is not None
    }


def check_same_run(run, state):
    """Refuse to go on from a checkpoint whose recipe or data is another's."""
    if run.recipe.run.allow_changed or run.training is None:
        return
    then, now = state["recipe"], run.recipe.identity()
    changed = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in now | then if then.get(key) != now.get(key)]
    data = fingerprints(run)
    changed += [f"the {key} has other tokens" for key in data if state["data"].get(key) != data[key]]
    if changed:
        raise InputError(
            f"{run.resume_from} belongs to another recipe: {'; '.join(changed)}. Give what it had, or --allow_changed "
            "to go on with the new, or --save_model FOLDER for a run of its own"
        )


# ---- the loop


def train(run):
    recipe, accelerator = run.recipe, run.accelerator
    section, folder = recipe.training, Path(recipe.run.save_model)
    stop = listen_for_signals()

    run.model.config.use_cache = True  # for those who generate; training passes use_cache=False
    optimizer = build_optimizer(
        run.model, section.learning_rate, (section.beta1, section.beta2), section.epsilon, section.weight_decay
    )
    model, run.optimizer = accelerator.prepare(run.model, optimizer)
    if run.resume_from is not None:
        load_optimizer_tensors(run.model, run.optimizer.optimizer, checkpoint.load_optimizer(run.resume_from))
        run.start = checkpoint.load_state(run.resume_from)["step"]
    if accelerator.is_main_process:
        open_folder(run, folder)
    accelerator.wait_for_everyone()
    report = Report(folder, run.start, run.total_steps, accelerator.is_main_process)
    unigram = introduce(run, report)

    if run.start == 0 and recipe.evaluation.eval_freq:
        report_evaluation(run, model, report, 0)
    model.train()
    for step in range(run.start, run.total_steps):
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
        loss, tokens, must_stop, norm = training_step(run, model, step, stop)
        done = step + 1
        is_last = done == run.total_steps
        report.step(done, loss, rate, tokens, norm, write=done % recipe.run.log_freq == 0 or is_last)

        report.pause()
        if recipe.evaluation.eval_freq and done % recipe.evaluation.eval_freq == 0 and not is_last and not must_stop:
            report_evaluation(run, model, report, done)
        if must_stop or is_last or (recipe.run.save_freq and done % recipe.run.save_freq == 0):
            save_checkpoint(run, done)
        report.resume()
        if must_stop and not is_last:
            report.say(f"stopped by a signal after step {done}, which is saved: --init_from resume goes on from it")
            report.close()
            return 128 + stop[0] if stop else 128 + signal.SIGTERM
    finish(run, model, report, folder, unigram)
    return 0


def training_step(run, model, step, stop):
    """One optimizer step over all processes; returns its loss, target tokens, whether to stop, and gradient norm.

    The loss is the sum over all targets of the step divided by their number, however they are spread over
    micro-batches and processes.
    """
    recipe, accelerator = run.recipe, run.accelerator
    section = recipe.training
    rows = order.rows_of_step(
        step, section.total_batch_size, len(run.training), run.last_position, recipe.run.seed
    )
    shares = order.micro_batches(
        rows, section.batch_size, accelerator.process_index, accelerator.num_processes, run.accumulation
    )
    batches = [read_batch(run.training, share, section.batch_size) for _, share in shares]
    targets = sum(int((batch["shift_labels"] != objectives.IGNORED).sum()) for batch in batches)
    counts = torch.tensor([targets, bool(stop)], dtype=torch.float32, device=accelerator.device)
    targets, must_stop = accelerator.reduce(counts)  # all processes stop at the same step, or none

    # DDP averages gradients over processes and accelerate divides by its own idea of accumulation; undo both
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, ((offset, _), batch) in enumerate(zip(shares, batches, strict=True)):
        torch.manual_seed(order.derive_seed(recipe.run.seed, "dropout", step, offset))
        is_last = number == len(batches) - 1
        with accelerator.no_sync(model) if not is_last else accelerator.autocast():
            inputs = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
            loss = model(**inputs, num_items_in_batch=targets, use_cache=False).loss
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), section.grad_clip) if section.grad_clip else None
    run.optimizer.step()
    run.optimizer.zero_grad()
    loss = accelerator.reduce(loss_sum).item()
    return loss, int(targets), bool(must_stop), None if norm is None else norm.item()


def read_batch(rows, numbers, size):
    return objectives.causal(*rows.read(numbers), size=size)


def listen_for_signals():
    """A list that the first SIGINT or SIGTERM puts its number into; a second one stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


# ---- evaluation, checkpoints, the end


def evaluate_rows(run, model, rows, count):
    """The loss of `count` rows, evenly spread (None: all rows)."""
    return evaluate(
        model,
        lambda numbers, size: read_batch(rows, numbers, size),
        order.spread(count, len(rows)),
        run.recipe.training.batch_size,
        run.accelerator,
        run.token_bytes,
    )


def report_evaluation(run, model, report, step, is_final=False):
    """Evaluate, print and log; in the middle of a run on `eval_iter` batches, at its end on all validation rows."""
    recipe = run.recipe
    count = (recipe.evaluation.eval_iter or 20) * recipe.training.total_batch_size
    training = evaluate_rows(run, model, run.training, count)
    validation = evaluate_rows(run, model, run.validation, None if is_final else count) if run.validation else None
    line = {"step": step, "train_loss": training["loss"]}
    shown = f"step {step}: training loss {training['loss']:.4f}"
    if validation is not None:
        line |= {"val_loss": validation["loss"], "val_perplexity": validation["perplexity"]}
        line |= {"val_bits_per_byte": validation["bits_per_byte"]}
        shown += f", validation loss {describe(validation)}"
    report.say(shown)
    if recipe.evaluation.start_context is not None and run.tokenizer is not None and run.accelerator.is_main_process:
        line["sample"] = sample(run, step)
        report.say("\n".join(f"  | {text}" for text in line["sample"].splitlines()))
    report.write(line)
    return validation


def describe(figures):
    bits = "" if figures["bits_per_byte"] is None else f" ({figures['bits_per_byte']:.3f} bits per byte)"
    return f"{figures['loss']:.4f}{bits}"


def sample(run, step):
    section = run.recipe.evaluation
    return generate_text(
        run.accelerator.unwrap_model(run.model, keep_torch_compile=False),
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
        f"{run.accelerator.device.type}, precision {run.accelerator.mixed_precision}"
    )
    tokens = f"{len(run.training.tokens):,} tokens, {len(run.training):,} rows of {recipe.data.max_len}"
    report.say(f"training    {tokens}")
    unigram = None
    if run.validation is not None:
        part = f", held out: {run.account['held_out']}" if "held_out" in run.account else ""
        report.say(f"validation  {len(run.validation.tokens):,} tokens{part}")
        level = unigram_level(
            run.training.tokens, run.validation.tokens, model.config.vocab_size, run.token_bytes
        )
        unigram = level["loss"]
        report.say(f"            {describe(level)} is the unigram level: the loss of knowing only how often each token occurs")
    at = f"from step {run.start} " if run.start else ""
    report.say(
        f"steps       {at}to {run.total_steps:,}, each of {section.total_batch_size} rows "
        f"({section.total_batch_size * recipe.data.max_len:,} tokens), {section.lr_schedule} learning rate"
    )
    report.say(f"run folder  {recipe.run.save_model}")
    return unigram


def open_folder(run, folder):
    """The run's folder with its resolved recipe, free of what a killed process left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(folder)
        if run.start == 0 or run.recipe.run.allow_changed:
            kept = replace(run.recipe, run=replace(run.recipe.run, resume=False, allow_changed=False))
            aside = folder / "recipe.yaml.partial"
            aside.write_text(
                f"# repeat this run: accelerate launch -m hf_myllm.train {folder / 'recipe.yaml'} --save_model ANOTHER\n"
                + kept.to_yaml(),
                encoding="utf-8",
            )
            aside.replace(folder / "recipe.yaml")
    except OSError as error:
        raise InputError(f"the run's folder {folder} cannot be written: {error}") from None


def save_checkpoint(run, step):
    """The whole state at a step, written by the main process while the others wait."""
    accelerator, recipe = run.accelerator, run.recipe
    if run.resume_from is not None and step == run.start:
        return
    if accelerator.is_main_process:

        def write_model(folder):
            run.model.save_pretrained(folder)
            if run.tokenizer is not None:
                run.tokenizer.save_pretrained(folder)

        state = {"step": step, "recipe": recipe.identity(), "data": fingerprints(run)}
        tensors = optimizer_tensors(run.model, run.optimizer.optimizer)
        checkpoint.save(recipe.run.save_model, step, write_model, tensors, state, recipe.run.save_total_limit)
    accelerator.wait_for_everyone()


def finish(run, model, report, folder, unigram):
    """The last evaluation, the model at the run's root, the curve, and what to do next."""
    validation = report_evaluation(run, model, report, run.total_steps, is_final=True)
    if run.accelerator.is_main_process:
        checkpoint.publish(folder / f"checkpoint-{run.total_steps}", folder)
    report.close()
    if not run.accelerator.is_main_process:
        return
    plot(folder, unigram)
    if validation is not None:
        report.say(
            f"done        validation loss {describe(validation)} on all {validation['tokens']:,} tokens; "
            f"unigram level {unigram:.4f}"
        )
    prompt = run.recipe.evaluation.start_context or "Once upon a time"
    report.say(f"generate    python -m hf_myllm.generate {folder} --prompt {prompt!r}")
    report.say(
        f"resume      accelerate launch -m hf_myllm.train {folder / 'recipe.yaml'} --init_from resume --allow_changed "
        f"--max_steps {2 * run.total_steps}"
    )
    report.say(f'load        AutoModelForCausalLM.from_pretrained("{folder}") in Python, with stock transformers')


def evaluate_only(run):
    if run.validation is None:
        raise InputError("there is nothing to evaluate on: give --val_file FILE, or a val_fraction above 0")
    run.model = run.accelerator.prepare_model(run.model, evaluation_mode=True)
    figures = evaluate_rows(run, run.model, run.validation, None)
    if run.accelerator.is_main_process:
        print(f"validation loss {describe(figures)}, perplexity {figures['perplexity']:.3f}, {figures['tokens']:,} tokens")
    return 0


def is_first_process():
    return os.environ.get("RANK", "0") == "0"


def use_all_cores():
    """Let the processes of this machine share its cores, where nobody has asked for a number of threads.

    accelerate's launcher sets OMP_NUM_THREADS to 1 when it is not set, which halves the speed of two cores.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def quiet_the_libraries():
    """Leave to the libraries only what a person must read."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


if __name__ == "__main__":
    sys.exit(main())
