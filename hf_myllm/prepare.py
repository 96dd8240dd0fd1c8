"""From a recipe to a run: everything that it names is found, checked and put together, before anything is written."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError

from . import checkpoint
from .data import corpus, order, packing
from .data import tokenizer as tokenizers
from .errors import InputError
from .models import FAMILIES
from .recipe import Recipe


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
        started_from = folder / "recipe.yaml"
        if recipe.run.init_from == "scratch" and started_from.exists():  # in case no checkpoint was reached
            recipe.run.init_from = yaml.safe_load(started_from.read_text(encoding="utf-8"))["run"]["init_from"]
        warn = (lambda line: print(f"warning: {line}", file=sys.stderr)) if is_first_process() else (lambda line: None)
        return checkpoint.find(folder, warn)
    if checkpoint.is_finished(folder):
        raise InputError(
            f"{folder} already holds a finished run: continue it with --init_from resume, or write elsewhere with "
            "--save_model FOLDER"
        )
    if checkpoint.has_checkpoints(folder):
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
    if recipe.evaluation.eval_only and pretrained is None:
        raise InputError(f"{section.save_model} holds no checkpoint to evaluate; give --load_model FOLDER")
    tokenizer = find_tokenizer(data, sources, pretrained, resume_from is not None or recipe.evaluation.eval_only)
    config = build_config(recipe, tokenizer, pretrained)
    state = checkpoint.load_state(resume_from) if resume_from else None
    resolve(recipe, config, accelerator, state)
    if state is not None and not section.allow_changed and not recipe.evaluation.eval_only:
        check_same_recipe(recipe, state, resume_from)

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
    if not recipe.evaluation.eval_only:
        plan(run, state)
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


def find_tokenizer(data, sources, pretrained, keep):
    """The recipe's tokenizer: loaded, trained, or the one of the model that the run starts from.

    Args:
        keep: whether the model's own goes before the recipe's, as it must when training goes on or is judged.
    """
    if keep and (Path(pretrained) / "tokenizer_config.json").exists():
        return tokenizers.load(str(pretrained))
    if isinstance(data.tokenizer, str):
        try:
            return tokenizers.load(data.tokenizer)
        except InputError as error:
            if not data.dataset:
                raise
            raise InputError(f"{error}; and without the Hub, pass --train_file FILE in place of the data set") from None
    source = sources[0] or sources[1]
    if isinstance(data.tokenizer, dict):
        size = data.tokenizer["vocab_size"]

        def train_tokenizer(folder):
            tokenizers.train_bpe(corpus.read_documents(source), size).save_pretrained(folder)

        return tokenizers.load(str(corpus.cached_folder(["bpe", size, corpus.source_key(source)], train_tokenizer)))
    if pretrained and not keep:
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
            positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
            if recipe.data.max_len and not {positions, "max_position_embeddings"} & set(settings):
                settings[positions] = recipe.data.max_len  # positions that no row reaches would never be trained
            config = config_class(**settings)
    except (StrictDataclassError, ValueError, TypeError, OSError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if not pretrained or (Path(pretrained) / "config.json").exists():
            raise InputError(f"config of {pretrained or recipe.model}: {reason}") from None
        raise InputError(
            f"the model {pretrained} cannot be found: it is not a folder with a config.json here, and the Hugging Face "
            f"Hub did not give it ({reason[:200]})"
        ) from None
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


def resolve(recipe, config, accelerator, state):
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
        if state is not None:  # on another number of processes, the step stays what it was
            training.total_batch_size = state["recipe"]["total_batch_size"]
    training.gradient_accumulation_steps = None
    if training.epochs is None and training.max_steps is None:
        training.epochs = 1.0


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


def plan(run, state):
    """From which step to which, of how many micro-batches; `state` is that of the checkpoint to go on from."""
    section = run.recipe.training
    run.accumulation = math.ceil(section.total_batch_size / (section.batch_size * run.accelerator.num_processes))
    if section.max_steps:
        run.total_steps = section.max_steps
    else:
        run.last_position = max(1, int(section.epochs * len(run.training)))
        run.total_steps = math.ceil(run.last_position / section.total_batch_size)
    if section.warmup_steps > run.total_steps:
        raise InputError(f"warmup_steps ({section.warmup_steps}) must not be above the run's {run.total_steps} steps")
    if state is not None:
        run.start = state["step"]
        changed = [name for name, value in fingerprints(run).items() if state["data"].get(name) != value]
        if changed and not run.recipe.run.allow_changed:
            raise InputError(
                f"{run.resume_from} was trained on other data: the {' and the '.join(changed)} has other tokens now. "
                "Give the data that it had, or --allow_changed to go on with the new"
            )
        if run.start > run.total_steps:
            raise InputError(
                f"{run.resume_from} is beyond the {run.total_steps} steps of this recipe: raise max_steps or epochs"
            )


def fingerprints(run):
    return {
        name: rows.tokens.fingerprint
        for name, rows in (("training data", run.training), ("validation data", run.validation))
        if rows is not None
    }


def check_same_recipe(recipe, state, resume_from):
    """Refuse to go on from a checkpoint of another recipe: the run would be neither of the two."""
    then, now = state["recipe"], recipe.identity()
    keys = [key for key in now | then if then.get(key) != now.get(key)]
    changed = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in keys]
    if changed:
        raise InputError(
            f"{resume_from} belongs to another recipe: {'; '.join(changed)}. Give what it had, or --allow_changed to "
            "go on with the new, or --save_model FOLDER for a run of its own"
        )


def is_first_process():
    return os.environ.get("RANK", "0") == "0"
