"""Show what a run would do, without training or writing to the run's folder: `--dry_run`.

For large data that is not tokenized yet it samples the beginning and reports estimates, marked "about".
"""

import re
from collections import Counter

import torch
import yaml

from ..data.sampler import micro_batches
from ..errors import hide_secrets
from ..launcher import train_command
from ..models import loading, lora
from ..tasks.base import IGNORE_INDEX, show_tokens
from ..terminal import join_command, plural
from .flops import memory_per_rank
from .summary import data_warnings, mixture_lines


def show(run, arguments):
    """Print the resolved recipe, the model, the data, the steps, the memory and the first batch.

    Args:
        arguments: of the command line, from which the command without --dry_run is printed.
    """
    print("dry run     nothing is trained; no run folder is written\n")
    recipe = run.recipe.relevant()
    recipe["run"].pop("dry_run", None)
    print(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    parameters, trained = run.model.num_parameters(), run.model.num_parameters(only_trainable=True)
    print(f"model       {run.recipe.model}, {parameters:,} parameters: {_parameter_shares(run.model)}")
    if lora.is_added(run.model):
        print(f"            {trained:,} of them are trained (LoRA)")
    about = "about " if run.scale > 1 else ""
    _show_data(run, about)
    _show_steps(run, about)
    print(f"memory      {_estimate_memory(run)}")
    if run.tokenizer is not None:
        _show_first_batch(run)
    command = train_command(run.accelerator.num_processes)
    print(hide_secrets(f"\nnext        {command} {join_command(_without_dry_run(arguments))}"))


def _without_dry_run(arguments):
    """Return the arguments without --dry_run, --dry_run true or --dry_run=true."""
    kept, is_value = [], False
    for argument in arguments:
        is_flag = argument.replace("-", "_").startswith("__dry_run")
        if not (is_flag or (is_value and not argument.startswith("--"))):
            kept.append(argument)
        is_value = is_flag and "=" not in argument
    return kept


def _parameter_shares(model):
    """Return the sizes of the embeddings, the layers and the other modules."""
    sizes, layers = Counter(), set()
    for name, parameter in model.named_parameters():
        name = name.replace(".modules_to_save.default", "").replace(".original_module", "")  # of peft
        layer = re.search(r"\.(\d+)\.", name)
        if layer:
            layers.add(name[: layer.end()])
        sizes["layers" if layer else name.rsplit(".", 2)[-2]] += parameter.numel()
    layer_size = sizes.pop("layers", 0) // max(1, len(layers))
    shares = [f"{name} {size:,}" for name, size in sizes.items()]
    shares.insert(min(2, len(shares)), f"{plural(len(layers), 'layer')} of {layer_size:,}")
    is_tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    return ", ".join(shares) + ("; the head is tied to the embeddings" if is_tied else "")


def _show_data(run, about):
    data, stats = run.recipe.data, run.data_stats.get("train", {})
    parts = {"training": run.train_rows} | {name or "validation": rows for name, rows in run.val_sets.items()}
    for part, rows in parts.items():
        if part == "training" and data.streaming:
            print(f"training    {run.sources.name}, streamed {data.streaming_window:,} tokens at a time")
            continue
        scale = run.scale if part == "training" or "held_out" not in run.data_stats else 1.0
        total = round(len(rows.tokens) * scale)
        dropped = round((len(rows.tokens) - rows.num_used_tokens()) * scale)
        overlaps = part == "training" and data.stride is not None and data.stride < getattr(rows, "length", 0)
        verb, estimate = "trained on" if part == "training" else "validated on", about if scale > 1 else ""
        print(
            f"{part:<12}{estimate}{total:,} tokens = {total - dropped:,} {verb} + {dropped:,} dropped; "
            f"{estimate}{plural(round(len(rows) * scale), 'row')}{' that overlap' if overlaps else ''}"
        )
        if part == "training" and stats.get("bytes"):
            documents, tokens = stats["documents"], stats["tokens"]
            count, length = plural(round(documents * run.scale), "document"), tokens / max(1, documents)
            print(f"            {about}{count} of {length:,.0f} tokens; {stats['bytes'] / tokens:.2f} bytes per token")
    lines = run.task.summary_lines(run.train_rows, run.val_rows, stats)
    for line in (*mixture_lines(run), *lines, *data_warnings(run)):
        print(f"            {line}")


def _show_steps(run, about):
    section = run.recipe.training
    steps = max(1, round(run.total_steps * (1 if section.max_steps else run.scale)))
    epochs = section.epochs or steps * section.total_batch_size / (len(run.train_rows) * run.scale)
    about_steps, about_epochs = (about, "") if section.epochs else ("", about)
    epochs = "" if run.recipe.data.streaming else f" ({about_epochs}{epochs:.2f} epochs)"
    count = run.accumulation_steps
    shape = f"{plural(run.accelerator.num_processes, 'rank')} x {count} micro-batch{'es' * (count != 1)}"
    shape += f" x {plural(section.batch_size, 'row')}"
    print(f"steps       {about_steps}{steps:,}{epochs}, each of {plural(section.total_batch_size, 'row')}: {shape}")


def _estimate_memory(run):
    """Return an estimate of the memory of a rank, in words; see [`memory_per_rank`]."""
    section, accelerator = run.recipe.training, run.accelerator
    parts = memory_per_rank(
        run.model,
        section.batch_size * run.recipe.data.max_len,
        run.task.logits_share,
        shards=accelerator.num_processes if accelerator.is_fsdp2 else 1,
        is_16_bit=accelerator.mixed_precision in ("fp16", "bf16") or section.dtype == "bfloat16",
        bytes_per_weight=2 if section.dtype == "bfloat16" else 4,
        optimizer=section.optimizer,
        has_average=run.recipe.evaluation.weight_averaging is not None,
        checkpoints_layers=section.gradient_checkpointing,
        compiles=section.compile,
    )
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    device, available = accelerator.device, loading.physical_memory()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    has = f"; this {'GPU' if device.type == 'cuda' else 'machine'} has {_size(available)}" if available else ""
    return f"about {_size(sum(parts.values()))} per rank in {accelerator.precision}: {shown}{has}"


def _size(num_bytes):
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= u or n == "kB")
    return f"{num_bytes / unit:.{1 if name == 'GB' else 0}f} {name}"


def _show_first_batch(run):
    """Print the shapes of the first micro-batch of rank 0, and what its first row reads and predicts."""
    batch_size, ranks = run.recipe.training.batch_size, run.accelerator.num_processes
    shares = micro_batches(run.sampler.rows_of_step(0), batch_size, 0, ranks, run.accumulation_steps)
    batch = run.task.batch(run.train_rows, shares[0][1], 0, batch_size)
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
    targets = int((run.task.targets(batch) != IGNORE_INDEX).sum())
    print(f"first batch {shapes}; {targets} targets in {batch['input_ids'].numel()} positions")
    print(f"  reads     {show_tokens(run.tokenizer, batch['input_ids'][0])}")
    target = run.task.describe_target(batch, 0)
    print(f"  predicts  {target}")
    if run.task.target_note[1] in target:
        print(f"            {run.task.target_note}")
