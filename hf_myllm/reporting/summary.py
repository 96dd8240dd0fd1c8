"""What a run says of itself in the terminal before its first step and after its last; it is handed a prepared run.

The same facts go into RUN/run.json, for whoever looks at the folder later: its report and its model card.
"""

import os
import platform
import re
import shlex
import time
from pathlib import Path

import accelerate
import datasets
import torch
import transformers

from .. import __version__
from ..evaluation import unigram_loss
from ..models import lora
from ..recipe import Recipe
from .console import describe_loss


def print_summary(run, reporter):
    """Say what is about to be trained on what; returns the figures of the unigram level, which it must beat, or
    None."""
    recipe, section = run.recipe, run.recipe.training
    model = run.model
    reporter.info(
        f"model       {recipe.model}, {model.num_parameters():,} parameters, {run.accelerator.num_processes} x "
        f"{run.accelerator.device.type}, precision {run.accelerator.mixed_precision}, task {recipe.task}"
    )
    if lora.is_added(model):
        count = model.num_parameters(only_trainable=True)
        reporter.info(f"            LoRA of rank {recipe.lora.r}: {count:,} of the parameters are trained")
    if run.newly_initialized:
        reporter.info(
            f"            not in {recipe.run.init_from}, and so starting fresh: {', '.join(run.newly_initialized)}"
        )
    up_to = "up to " * run.task.pads_rows
    tokens = f"{len(run.train_rows.tokens):,} tokens, {len(run.train_rows):,} rows of {up_to}{recipe.data.max_len}"
    if recipe.data.streaming:
        tokens = f"{run.sources.name}, {run.train_rows.windows.size:,} tokens at a time, {len(run.train_rows):,} rows"
    reporter.info(f"training    {tokens}")
    if repeated := sum(source.num_duplicates for source in run.sources.all):
        reporter.warning(f"            named more than once, and read once: {repeated} files")
    for line in run.mixture():
        reporter.info(f"            {line}")
    unknown = run.data_stats["train"].get("unknown", 0) / max(1, run.data_stats["train"].get("tokens", 0))
    if unknown > 0.001:
        name = run.tokenizer.unk_token
        reporter.warning(
            f"            {unknown:.1%} of the tokens are {name}: the tokenizer does not know all of the text"
        )
    unigram = None
    for line in skipped_rows(run):
        reporter.warning(f"            {line}")
    if run.task.is_labelled:
        if run.val_rows is not None:
            reporter.info(f"validation  {len(run.val_rows):,} rows")
        for line in run.task.summary_lines(run.train_rows, run.val_rows, run.data_stats["train"]):
            reporter.info(f"            {line}")
    elif run.val_rows is not None:
        part = f", held out: {run.data_stats['held_out']}" if "held_out" in run.data_stats else ""
        reporter.info(f"validation  {len(run.val_rows.tokens):,} tokens{part}")
        tokens = run.train_rows.tokens, run.val_rows.tokens
        unigram = unigram_loss(*tokens, model.config.vocab_size, run.token_bytes, run.task.never_predicted)
        unigram["loss"] += run.task.chance_loss
        reporter.info(f"unigram     {describe_loss(run.task, unigram)}: knowing only how often tokens occur")
    if recipe.run.resume and run.resume_from is None:
        reporter.warning(f"resume      {recipe.run.save_model} has no checkpoint yet: starting from the beginning")
    at = f"from step {run.start_step} " if run.start_step else ""
    reporter.info(
        f"steps       {at}to {run.total_steps:,}, each of {section.total_batch_size} rows "
        f"({section.total_batch_size * recipe.data.max_len:,} tokens{' at most' * run.task.pads_rows}), "
        f"{section.lr_schedule} learning rate"
    )
    reporter.info(f"run folder  {recipe.run.save_model}")
    return unigram


def skipped_rows(run):
    """A line for the training and the validation data, where they have rows that cannot be used."""
    for part, account in run.data_stats.items():
        if isinstance(account, dict) and account.get("skipped"):
            name = {"train": "training"}.get(part, part)
            yield f"left out of {name}: {account['skipped']:,} rows that cannot be used; {account['refused'][0]}"


def print_evaluation(run, metrics):
    """Print the metrics of all validation rows."""
    for line in skipped_rows(run):
        print(line)
    has_perplexity = "perplexity" in metrics
    count = f"{metrics['tokens']:,} tokens" if has_perplexity else f"{len(run.val_rows):,} rows"
    perplexity = f", perplexity {metrics['perplexity']:.3f}" if has_perplexity else ""
    print(f"validation loss {describe_loss(run.task, metrics)}{perplexity}")
    print(f"over all {count} of {run.val_rows.name}")


def print_result(run, reporter, last, figures, unigram):
    """Say how the run ended, and what can be done with it now.

    Args:
        last: the step after which training has ended.
        figures: of the last evaluation, of all validation rows; {} when there are none.
        unigram: of the unigram level, or None.
    """
    recipe, folder = run.recipe, run.recipe.run.save_model
    if figures and run.task.has_predictions:
        shown = describe_loss(run.task, figures)
        reporter.info(f"done        validation loss {shown} on all {len(run.val_rows):,} rows")
    elif figures:
        reporter.info(f"done        validation loss {describe_loss(run.task, figures)}")
        level = "" if unigram is None else f"; the unigram level is {unigram['loss']:.4f}"
        reporter.info(f"            on all {figures['tokens']:,} {run.task.target_name}{level}")
    if (Path(folder) / "report.html").is_file():
        reporter.info(f"look at     {folder}/report.html")
    name, prompt = shlex.quote(str(folder)), recipe.evaluation.start_context
    if run.tokenizer is not None:
        label, command = run.task.usage(name, shlex.quote(prompt) if prompt else None)
        reporter.info(f"{label:<12}{command}")
    longer = f"--max_steps {2 * run.total_steps} --resume --allow_changed"
    if last < run.total_steps:
        longer = f"--patience {2 * recipe.evaluation.patience} --resume"
    reporter.info(f"go on       accelerate launch -m hf_myllm.train {name}/recipe.yaml {longer}")
    reporter.info(f"load        {lora.how_to_load(folder)}")


def run_facts(run, unigram):
    """What RUN/run.json says of the run, but for its launches: see [`launch_facts`]."""
    recipe, model = run.recipe, run.model
    whole = model.get_base_model() if lora.is_added(model) else model
    parts = {"training": run.data_stats.get("train", {}), "validation": run.data_stats.get("validation", {})}
    is_local, is_merged, data = _is_path(recipe.run.init_from), recipe.lora.merge_lora, {}
    for part, rows in (("training", run.train_rows), ("validation", run.val_rows)):
        if rows is None:
            continue
        is_streamed = recipe.data.streaming and part == "training"
        counts = {name: value for name, value in parts[part].items() if isinstance(value, int) and value}
        for name in ("max_id", *(("documents", "bytes", "unknown") if "held_out" in run.data_stats else ())):
            counts.pop(name, None)  # of a text that was divided, they are of the whole
        if "unknown" in counts:
            counts["unknown_tokens"] = counts.pop("unknown")
        given = (
            run.sources.training if part == "training" or run.sources.validation is None else [run.sources.validation]
        )
        data[part] = counts | {
            "tokens": recipe.data.streaming_window if is_streamed else len(rows.tokens),
            "rows": len(rows),
            "sources": [source for one in given for source in _sources(one)],
        }
    if run.val_rows is not None and run.sources.validation is None:
        data["validation"]["held_out"] = run.data_stats.get(
            "held_out", f"{recipe.data.val_fraction:.1%} of the documents"
        )
    return {
        "model": recipe.model,
        "task": recipe.task,
        "class": whole._get_name(),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not (is_merged and ".lora_" in name)),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "lora_r": None if is_merged else recipe.lora.r,
        "init_from": recipe.run.init_from,
        "base_model": None if is_local or recipe.run.init_from == "scratch" else recipe.run.init_from,
        "license": recipe.hub.license,
        "language": recipe.hub.language,
        "recipe": _given(recipe),
        "total_steps": run.total_steps,
        "tokens_per_step": recipe.training.total_batch_size * recipe.data.max_len,
        "unit": run.task.unit,
        "unigram_loss": None if unigram is None else unigram["loss"],
        "labels": list(run.task.labels.names) if run.task.labels else [],
        "data": data,
    }


def _sources(source):
    """A source by names that tell nobody where it lies: of files their own, where they are few."""
    if source.format == "hub":
        return [{"name": source.name.split(" ")[0], "is_hub": True}]
    if source.format == "memory" or "{stdlib}" in source.name:
        return [{"name": source.name, "is_hub": False}]
    names = [Path(file).name for file in source.files]
    if len(names) > 4:
        names = [f"{len(names)} files in {Path(os.path.commonpath(source.files)).name}"]
    return [{"name": name, "is_hub": False} for name in names]


def _given(recipe):
    """What a recipe says that is not so anyway, for others to read: files and folders by their names."""
    plain, shown = Recipe().to_dict(), {}
    for section, words in recipe.to_dict().items():
        if not isinstance(words, dict):
            shown[section] = words
        elif section != "hub":
            usual = plain[section]
            words = {key: value for key, value in words.items() if key not in usual or value != usual[key]}
            words = {
                key: _named(value, key) for key, value in words.items() if key not in ("save_model", "project_name")
            }
            shown |= {section: words} if words else {}
    return shown


def _named(value, key=""):
    if isinstance(value, list):
        return [_named(one, key) for one in value]
    if isinstance(value, dict):
        return {name: _named(one, name) for name, one in value.items()}
    if not isinstance(value, str) or key == "start_context" or value.startswith("{stdlib}"):
        return value
    is_path = key in ("train_file", "val_file", "chat_template") or _is_path(value)
    if is_path or value.startswith(("/", "~", ".")) or "\\" in value or ":/" in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _is_path(name):
    return isinstance(name, str) and name != "scratch" and Path(name).exists()


def launch_facts(run):
    """What RUN/run.json says of this start of the run: where it runs, and on what."""
    accelerator = run.accelerator
    device = accelerator.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    elif device == "cpu":
        device = f"{platform.machine()} CPU ({torch.get_num_threads()} threads)"
    return {
        "step": run.start_step,
        "time": round(time.time()),
        "processes": accelerator.num_processes,
        "device": device,
        "precision": accelerator.mixed_precision,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "hf_myllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "datasets": datasets.__version__,
        },
    }
