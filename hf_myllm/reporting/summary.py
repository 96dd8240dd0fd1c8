"""What a run prints before its first step and after its last."""

import textwrap
from pathlib import Path

from ..data.shards import INDEX
from ..evaluation import describe_sets, unigram_loss
from ..launcher import train_command
from ..models import lora
from ..precision import describe_fp8, describe_precision
from ..terminal import join_command, plural
from .console import COLUMNS, INDENT, describe_loss, format_loss, indent


def print_summary(run):
    """Print what is trained, on which data, for how long.

    Returns:
        the metrics of a unigram model on the validation data (see [`~hf_myllm.evaluation.unigram_loss`]), or None.
    """
    _print_model(run)
    _print_training_data(run)
    reporter, recipe, unigram = run.reporter, run.recipe, None
    held_out = f", held out: {run.data_stats['held_out']}" if "held_out" in run.data_stats else ""
    sizes = {
        name: plural(len(rows), "row") if run.task.is_labelled else f"{len(rows.tokens):,} tokens"
        for name, rows in run.val_sets.items()
    }
    if sizes:
        shown = ", ".join(f"{name} {size}".strip() for name, size in sizes.items())
        reporter.info(f"validation  {shown}{held_out}")
    if list(sizes) == [""] and not run.task.is_labelled:
        vocab_size, tokens = run.model.config.vocab_size, (run.train_rows.tokens, run.val_rows.tokens)
        unigram = unigram_loss(*tokens, vocab_size, run.token_bytes, run.task.never_predicted)
        unigram["loss"] = unigram["loss"] * run.task.text_share + run.task.chance_loss
        reporter.info(f"unigram     loss {describe_loss(run.task, unigram)} from token frequencies alone")
    for line in run.task.summary_lines(run.train_rows, run.val_rows, run.data_stats["train"]):
        reporter.info(INDENT + line)
    if branch := run.branched_from:
        reporter.info(f"branched    from step {branch['step']:,} of {branch['run']}, with its optimizer state")
        reporter.info(f"{INDENT}SHA-256 {branch['digest']}")
        for change in branch["changed"]:
            reporter.info(INDENT + change)
    if recipe.run.resume and run.resume_from is None:
        reporter.warning(f"resume      {recipe.run.save_model} has no checkpoint yet; starting from the beginning")
    rows = recipe.training.total_batch_size
    steps = f"{run.start_step:,} to {run.total_steps:,}" if run.start_step else f"{run.total_steps:,}"
    tokens = f"{'up to ' * run.task.pads_rows}{rows * recipe.data.max_len:,} tokens"
    reporter.info(f"steps       {steps}, each of {plural(rows, 'row')} ({tokens})")
    reporter.info(f"run folder  {recipe.run.save_model}")
    return unigram


def _print_model(run):
    recipe, model, accelerator, reporter = run.recipe, run.model, run.accelerator, run.reporter
    reporter.info(f"model       {recipe.model}, {model.num_parameters():,} parameters, task {recipe.task}")
    if lora.is_added(model):
        count = model.num_parameters(only_trainable=True)
        reporter.info(f"{INDENT}LoRA of rank {recipe.lora.r}: {count:,} parameters are trained")
    if names := run.newly_initialized:
        reporter.info(f"{INDENT}not in {recipe.run.init_from}, newly initialized: {', '.join(names)}")
    if averaging := recipe.evaluation.weight_averaging:
        reporter.info(f"{INDENT}moving average of the weights with a decay of {averaging['ema']}")
    precision = describe_precision(accelerator, recipe.training.precision)
    if recipe.training.dtype != "float32":
        precision += f", weights in {recipe.training.dtype}"
    device = {"cuda": "GPU", "cpu": "CPU"}.get(accelerator.device.type, accelerator.device.type)
    reporter.info(f"hardware    {plural(accelerator.num_processes, device)}, precision {precision}")
    if accelerator.precision == "fp8":
        for line in indent(describe_fp8(model)):
            reporter.info(line)


def _print_training_data(run):
    recipe, reporter, rows, stats = run.recipe, run.reporter, run.train_rows, run.data_stats["train"]
    size = f"{len(rows.tokens):,} tokens" if not recipe.data.streaming else run.sources.name
    if names := [source.data.text_name for source in run.sources.training if source.format == "shards"]:
        size += f", token shards of {', '.join(names[:3])}{' ...' if names[3:] else ''}"
    row_length = f"{'up to ' * run.task.pads_rows}{recipe.data.max_len} tokens"
    window = ""
    if recipe.data.streaming:
        several = " of each source" if run.sampler.mixture else ""
        window = f" per window of {rows.windows.size:,} tokens{several}"
    reporter.info(f"training    {size}; {plural(getattr(rows, 'num_rows', len(rows)), 'row')} of {row_length}{window}")
    if duplicates := sum(source.num_duplicates for source in run.sources.all):
        reporter.warning(f"{INDENT}{plural(duplicates, 'file')} named more than once, read once")
    for line in mixture_lines(run):
        reporter.info(INDENT + line)
    if stats.get("repeated"):
        reporter.info(f"{INDENT}{plural(stats['repeated'], 'equal document')} left out")
    for line in data_warnings(run):
        reporter.warning(INDENT + line)


def data_warnings(run):
    """Yield a line for each thing that is missing from the data or the plan, or wrong with it, and does not stop the
    run."""
    rows, stats, data = run.train_rows, run.data_stats.get("train", {}), run.recipe.data
    limits = {"max_train_rows": data.max_train_rows, "max_eval_rows": data.max_eval_rows}
    for file in (file for source in run.sources.training if source.format == "bin" for file in source.files):
        if Path(file).with_suffix(".documents").exists():
            index = Path(file).with_name(INDEX)
            missing = "" if index.exists() else " (missing: go on with hf-myllm prepare --to)"
            yield f"{file} is a token shard, read without its documents and tokenizer; give {index}{missing}"
            break
    if limited := [f"{name} {count:,}" for name, count in limits.items() if count]:
        yield f"{', '.join(limited)}: a trial, of the first rows only"
    unknown = stats.get("unknown", 0) / max(1, stats.get("tokens", 0))
    if unknown > 0.001:
        yield f"{unknown:.1%} of the tokens are {run.tokenizer.unk_token}: the tokenizer does not cover the text"
    stride, length = getattr(rows, "stride", 0), getattr(rows, "length", 0)  # passages of sentences have no stride
    if stride > length:
        between = len(rows.tokens) - rows.num_used_tokens()
        yield f"stride {stride} is above the {length} tokens of a row: {between:,} tokens between are left out"
    for name, (count, total) in run.data_stats.get("shared", {}).items():
        if count:
            kind = "row" if run.task.is_labelled else "document"
            yield (
                f"{count:,} of {plural(total, f'validation {kind}')} {name}".rstrip() + " are in the training data too"
            )
    for stage in data.mixture_schedule or ():
        if stage["step"] >= run.total_steps:
            yield f"mixture_schedule: step {stage['step']:,} is never reached; the run has {run.total_steps:,} steps"
    if (every := run.recipe.run.keep_every) and every > run.total_steps:
        yield f"keep_every: {every:,} is more than the {run.total_steps:,} steps of the run; it keeps no milestone"
    yield from skipped_rows(run)


def mixture_lines(run):
    """Yield what a run reads of each source of a mixture, and how its shares change."""
    mixture, batch = run.sampler.mixture, run.recipe.training.total_batch_size
    if mixture is None:
        return
    total, names = run.sampler.total_rows or run.total_steps * batch, [source.name for source in run.sources.training]
    shares = run.data_stats.get("shares", [1.0] * len(names))
    for name, (_, rows), count, share in zip(names, mixture.parts, mixture.rows_before(total), shares, strict=True):
        rows = round(rows / max(1e-9, share))
        times = "" if run.recipe.data.streaming else f"its {plural(rows, 'row')} {count / rows:.2f} times, "
        tokens = f"{'up to ' * run.task.pads_rows}{count * run.recipe.data.max_len:,} tokens"
        yield f"{count / total:6.1%} from {name}: {times}{tokens}"
    for stage in mixture.stages[1:]:
        if stage.first < total:
            weights = zip(names, stage.weights, strict=True)
            parts = [f"{weight / sum(stage.weights):.1%} from {name}" for name, weight in weights if weight]
            yield f"after step {stage.first // batch}: {', '.join(parts)}"
    if mixture.end is not None and mixture.end <= total:
        yield f"the run ends when max_epochs leaves no source, after step {run.total_steps}"


def skipped_rows(run):
    """Yield a line for the training and for the validation data if rows of them cannot be used."""
    for part, stats in run.data_stats.items():
        if isinstance(stats, dict) and stats.get("skipped"):
            name = "training" if part == "train" else part
            reason = stats["skip_reasons"][0]
            yield f"skipped {plural(stats['skipped'], 'row')} of the {name} data, for example {reason}"


def print_evaluation(run, metrics):
    """Print the metrics of all validation rows."""
    for line in skipped_rows(run):
        print(line)
    perplexity = f", perplexity {metrics['perplexity']:.3f}" if "perplexity" in metrics else ""
    precision = run.accelerator.precision
    names = ", ".join(rows.name for rows in run.val_sets.values())
    lines = [f"validation loss {describe_loss(run.task, metrics)}{perplexity}"]
    lines += [f"{_over_all(run, metrics)} of {names}{'' if precision == 'fp32' else f', in {precision}'}"]
    lines += [f"{name}: loss {metrics[f'{name}_loss']:.4f}" for name in run.val_sets if name]
    for line in lines:
        print("\n".join(textwrap.wrap(line, COLUMNS, break_long_words=False, break_on_hyphens=False)))


def _over_all(run, metrics):
    """Return in words how many targets were evaluated, or rows of the data: a long text may be several windows."""
    sets = len(run.val_sets)
    if not run.task.has_predictions:
        targets = f"{metrics['tokens']:,} {run.task.target_name}"
    else:
        targets = plural(sum(rows.num_examples for rows in run.val_sets.values()), "row")
    return f"over all {targets}" if sets < 2 else f"means of {sets} sets with {targets}"


def resume_command(run):
    """Return the command that continues a run, started as this one was."""
    recipe = str(run.run_dir / "recipe.yaml")
    if run.sources.in_memory:
        return f"train(Recipe.load({recipe!r}, resume=True), train_data=...)"
    return f"{train_command(run.accelerator.num_processes)} {join_command([recipe])} --resume"


def print_result(run, result, unigram):
    """Print the final metrics, and commands to use the model.

    Args:
        result: a [`~hf_myllm.train.RunResult`].
        unigram: the metrics of a unigram model, or None.
    """
    recipe, reporter, step, run_dir = run.recipe, run.reporter, result.step, run.recipe.run.save_model
    metrics = {name.removeprefix("val_"): value for name, value in result.metrics.items()}
    if step < run.total_steps:
        evaluations = plural(recipe.evaluation.patience, "evaluation")
        reporter.info(f"stopped     early, after step {step} of {run.total_steps}: {evaluations} without improvement")
    if metrics:
        compared = "" if unigram is None else f"; unigram loss {unigram['loss']:.4f}"
        details = describe_sets(run, metrics)
        reporter.info(f"done        validation loss {format_loss(metrics['loss'])} {run.task.unit}")
        for line in indent(f"{details + ', ' if details else ''}{_over_all(run, metrics)}{compared}"):
            reporter.info(line)
    if (Path(run_dir) / "report.html").is_file():
        reporter.info(f"report      {run_dir}/report.html")
    name, prompt = join_command([str(run_dir)]), recipe.evaluation.start_context
    if run.tokenizer is not None:
        label, command = run.task.usage(name, join_command([prompt]) if prompt else None)
        reporter.info(f"{label:<12}{command}")
    longer = f"--max_steps {2 * run.total_steps} --allow_changed"
    if step < run.total_steps:
        longer = f"--patience {2 * recipe.evaluation.patience}"
    if not run.sources.in_memory:
        reporter.info(f"continue    {resume_command(run)} {longer}")
    reporter.info(f"load        {lora.how_to_load(run_dir)}")
