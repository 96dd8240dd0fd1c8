"""What a run would do, said in seconds: `--dry_run`. Nothing is trained, and no run folder is written.

Of text that is large and not prepared yet, only the beginning is read, and the counts say "about".
"""

import os
import re
import shlex
from collections import Counter

import torch
import yaml

from ..data.sampler import micro_batches
from ..optim import hidden_matrices
from ..tasks.base import IGNORE_INDEX, show_tokens


def show(run, arguments):
    """Print what is about to happen; `arguments` are the command's own."""
    recipe, accelerator, section = run.recipe, run.accelerator, run.recipe.training
    print("dry run     nothing is trained, and no run folder is written\n")
    print(_without_defaults(recipe))
    print(f"model       {recipe.model}, {run.model.num_parameters():,} parameters: {_parts(run.model)}")
    trained = run.model.num_parameters(only_trainable=True)
    if trained < run.model.num_parameters():
        print(f"            {trained:,} of them are trained, with LoRA")
    about = "about " if run.scale > 1 else ""
    _show_tokens(run, about)
    steps = max(1, round(run.total_steps * (1 if section.max_steps else run.scale)))
    epochs = section.epochs or steps * section.total_batch_size / (len(run.train_rows) * run.scale)
    shape = (
        f"{accelerator.num_processes} processes x {section.batch_size} rows x {run.accumulation_steps} micro-batches"
    )
    of_steps, of_epochs = (about, "") if section.epochs else ("", about)
    epochs = "" if recipe.data.streaming else f"which is {of_epochs}{epochs:.2f} epochs; "
    print(f"steps       {of_steps}{steps:,}, {epochs}a step has", end=" ")
    print(f"{section.total_batch_size} rows: {shape}")
    print(f"memory      {_memory(run)}")
    if run.tokenizer is not None:
        _show_first_batch(run)
    command = ["accelerate", "launch", "-m", "hf_myllm.train", *_without_dry_run(arguments)]
    print(f"\nnext        {shlex.join(command)}")


def _without_defaults(recipe):
    """The recipe, resolved, without the words that nobody has given a value."""
    sections = {}
    for key, value in recipe.to_dict().items():
        if isinstance(value, dict):
            value = {name: one for name, one in value.items() if one is not None}
        if value:
            sections[key] = value
    sections["run"].pop("dry_run", None)
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _without_dry_run(arguments):
    kept, skipping = [], False
    for argument in arguments:
        if argument.replace("-", "_").startswith("__dry_run"):
            skipping = "=" not in argument
        elif skipping and not argument.startswith("--"):
            skipping = False
        else:
            kept.append(argument)
            skipping = False
    return kept


def _parts(model):
    """Where the parameters are: embeddings, layers, and what stands before and after them."""
    sizes, layers = Counter(), set()
    for name, parameter in model.named_parameters():
        name = name.replace(".modules_to_save.default", "").replace(".original_module", "")  # of peft's heads
        numbered = re.search(r"\.(\d+)\.", name)
        if numbered:
            layers.add(name[: numbered.end()])
        sizes["layers" if numbered else name.rsplit(".", 2)[-2]] += parameter.numel()
    each = sizes.pop("layers", 0) // max(1, len(layers))
    said = [f"{name} {size:,}" for name, size in sizes.items()]
    said.insert(min(2, len(said)), f"{len(layers)} layers of {each:,}")
    is_tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    tied = ", the head tied to the embeddings" if is_tied else ""
    return ", ".join(said) + tied


def _show_tokens(run, about):
    counts = run.data_stats.get("train", {})
    for name, rows in (("training", run.train_rows), ("validation", run.val_rows)):
        if rows is None:
            continue
        if name == "training" and run.recipe.data.streaming:
            print(f"training    {run.sources.name} as a stream, {run.recipe.data.streaming_window:,} tokens at a time")
            continue
        scale = run.scale if name == "training" or "held_out" not in run.data_stats else 1.0
        total, dropped = round(len(rows.tokens) * scale), round((len(rows.tokens) - rows.num_used_tokens()) * scale)
        is_whole = (
            name == "validation"
            or run.recipe.data.stride is None
            or run.recipe.data.stride >= getattr(rows, "length", 0)
        )
        verb, said = "trained on" if name == "training" else "validated on", about if scale > 1 else ""
        print(
            f"{name:<12}{said}{total:,} tokens = {total - dropped:,} {verb} + {dropped:,} dropped; "
            f"{said}{round(len(rows) * scale):,} rows{'' if is_whole else ' that overlap'}"
        )
    if counts.get("bytes"):
        documents, tokens = counts["documents"], counts["tokens"]
        print(
            f"            {about}{documents * run.scale:,.0f} documents of {tokens / max(1, documents):,.0f} tokens; "
            f"{counts['bytes'] / tokens:.2f} bytes per token"
        )
    for line in run.mixture():
        print(f"            {line}")


def _memory(run):
    """What a process needs, about: parameters, gradients and moments (AdamW's two, Muon's one); activations after
    Korthikanti et al. 2022, "Reducing Activation Recomputation" (34 bytes per token, layer and hidden unit in 16 bits,
    without the square part, which the attention kernel does not keep); and the logits with their gradient."""
    config, section = run.model.config, run.recipe.training
    half = run.accelerator.mixed_precision in ("fp16", "bf16", "fp8") or section.dtype == "bfloat16"
    width = 2 if section.dtype == "bfloat16" else 4
    trained = run.model.num_parameters(only_trainable=True)
    moments = 2 * trained
    if section.optimizer == "muon":
        moments -= sum(matrix.numel() for matrix in hidden_matrices(run.model) if matrix.requires_grad)
    state = (run.model.num_parameters() + trained + moments) * width  # of what is frozen, the weights alone
    if run.accelerator.is_fsdp2:
        state /= run.accelerator.num_processes
    tokens = section.batch_size * run.recipe.data.max_len
    per_layer = (2 if section.gradient_checkpointing else 34) * config.hidden_size * (1 if half else 2)
    activations = tokens * config.num_hidden_layers * per_layer
    predicted = tokens * run.task.logits_share
    # in fp32, and with their gradient; compiled, the loss is computed as it goes, from what the product gave
    each = (4 if half else 8) if section.compile else (10 if half else 12)
    logits = predicted * config.vocab_size * each
    total = state + activations + logits
    parts = f"weights and optimizer {_size(state)}, activations {_size(activations)}, logits {_size(logits)}"
    device = run.accelerator.device
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if has is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = f"; this {device.type} has {_size(has)}" if has else ""
    return f"about {_size(total)} a process: {parts}{there}"


def _size(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _show_first_batch(run):
    section = run.recipe.training
    rows = run.sampler.rows_of_step(0)
    share = micro_batches(rows, section.batch_size, 0, run.accelerator.num_processes, run.accumulation_steps)[0][1]
    batch = run.task.batch(run.train_rows, share, 0, section.batch_size)
    filled = f"{int((run.task.targets(batch) != IGNORE_INDEX).sum())} targets in {batch['input_ids'].numel()} positions"
    shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.items())
    print(f"first batch {shapes}; {filled}")
    print(f"  reads     {show_tokens(run.tokenizer, batch['input_ids'][0])}")
    print(f"  predicts  {run.task.describe_target(batch, 0)}")
