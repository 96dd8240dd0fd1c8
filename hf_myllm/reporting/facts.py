"""What RUN/run.json records: the model, the data and each launch. The report and the model card are made of it.

It may be published, so it holds no path of this machine: files and folders appear by their names.
"""

import os
import platform
import re
import time
from pathlib import Path

import accelerate
import datasets
import torch
import transformers

from .. import __version__
from ..data import remote
from ..errors import hide_secrets
from ..models import lora
from ..recipe import Recipe
from ..terminal import plural


def run_facts(run, unigram):
    """Return the facts about a run; those about its launches are in [`launch_facts`].

    Args:
        unigram: the metrics of a unigram model, or None.
    """
    recipe, model, init_from = run.recipe, run.model, run.recipe.run.init_from
    whole_model = model.get_base_model() if lora.is_added(model) else model
    is_merged = recipe.lora.merge_lora
    return {
        "model": recipe.model,
        "task": recipe.task,
        "class": whole_model._get_name().removeprefix("FSDP"),  # of a sharded stock class
        "parameters": sum(p.numel() for name, p in model.named_parameters() if not (is_merged and ".lora_" in name)),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "lora_r": None if is_merged else recipe.lora.r,
        "init_from": init_from,
        "init_from_commit": getattr(whole_model.config, "_commit_hash", None),
        "base_model": None if init_from == "scratch" or Path(init_from).exists() else init_from.partition("@")[0],
        "branched_from": run.branched_from,
        "license": recipe.hub.license,
        "language": recipe.hub.language,
        "recipe": _public_recipe(recipe),
        "total_steps": run.total_steps,
        "tokens_per_step": recipe.training.total_batch_size * recipe.data.max_len,
        "unit": run.task.unit,
        "unigram_loss": None if unigram is None else unigram["loss"],
        "labels": list(run.task.labels.names) if run.task.labels else [],
        "data": _data_facts(run),
        "held_out_by": "position" if run.task.settings.splits_by_position else "hash",
    }


def launch_facts(run):
    """Return the facts about this launch of a run: time, hardware and versions."""
    device = run.accelerator.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(run.accelerator.device)
    elif device == "cpu":
        device = f"CPU ({platform.machine()}, {plural(torch.get_num_threads(), 'thread')})"
    packages = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "datasets": datasets}
    versions = {"python": platform.python_version(), "hf_myllm": __version__}
    return {
        "step": run.start_step,
        "time": round(time.time()),
        "processes": run.accelerator.num_processes,
        "device": device,
        "precision": run.accelerator.precision,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {name: package.__version__ for name, package in packages.items()},
    }


def _data_facts(run):
    """Return counts and sources of the training and of the validation data."""
    facts, stats, sources = {}, run.data_stats, run.sources
    parts = {"training": (run.train_rows, stats.get("train", {}), sources.training)}
    for name, rows in run.val_sets.items():
        counts = stats.get(f"validation {name}", stats.get("validation", {}) if name not in sources.names else {})
        parts[f"validation {name}".rstrip()] = rows, counts, sources.val_sources(name)
    left_out = {"max_id"}
    if {"held_out", "is_limited"} & set(stats):  # token ids that were split have counts of the whole
        left_out |= {"documents", "bytes", "unknown"}
    for part, (rows, counts, part_sources) in parts.items():
        is_window = run.recipe.data.streaming and part == "training"
        facts[part] = {
            "unknown_tokens" if name == "unknown" else name: value
            for name, value in counts.items()
            if isinstance(value, int) and value and name not in left_out
        }
        facts[part] |= {
            "tokens": run.recipe.data.streaming_window if is_window else len(rows.tokens),
            "rows": len(rows),
            "sources": [facts for source in part_sources for facts in _source_facts(source)],
        }
    fraction = f"{run.recipe.data.val_fraction:.1%} of the documents"
    for name in set(run.val_sets) - set(sources.validation):
        facts[f"validation {name}".rstrip()]["held_out"] = stats.get("held_out", fraction)
    return facts


def _source_facts(source):
    """Return the names of a source's files or, of many, their number and the name of their folder."""
    if source.format == "hub":
        return [{"name": source.name.split(" ")[0], "is_hub": True}]
    if source.format == "memory" or "{stdlib}" in source.name:
        return [{"name": source.name, "is_hub": False}]
    if source.format == "shards":
        return [{"name": source.data.text_name, "is_hub": False}]
    names = [remote.file_name(file) for file in source.files]
    if len(names) > 4:
        paths = [file.partition("://")[2] if remote.is_remote(file) else os.path.abspath(file) for file in source.files]
        folder = Path(os.path.commonpath(paths)) if len({path[:1] == "/" for path in paths}) == 1 else Path()
        names = [f"{len(names)} files{f' in {folder.name}' * bool(folder.name)}"]
    return [{"name": name, "is_hub": False} for name in names]


def _public_recipe(recipe):
    """Return the keys of a recipe that differ from the defaults, with files and folders by their names."""
    defaults, public = Recipe().to_dict(), {}
    for section, values in recipe.to_dict().items():
        if not isinstance(values, dict):
            public[section] = values
        elif section != "hub":
            changed = {
                name: public_value(value, name)
                for name, value in values.items()
                if name not in ("save_model", "project_name")
                and (name not in defaults[section] or value != defaults[section][name])
            }
            public |= {section: changed} if changed else {}
    return public


def public_value(value, key=""):
    """Return a value of a recipe; of a path only its last part."""
    if isinstance(value, list):
        return [public_value(item, key) for item in value]
    if isinstance(value, dict):
        return {name: public_value(item, key if key == "val_file" else name) for name, item in value.items()}
    if not isinstance(value, str) or key == "start_context" or value.startswith("{stdlib}"):
        return value
    value = hide_secrets(value)
    is_path = key in ("train_file", "val_file", "chat_template") or (value != "scratch" and Path(value).exists())
    if is_path or value.startswith(("/", "~", ".")) or "\\" in value or ":/" in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
