"""Build a run from a recipe: find its data, tokenizer and model, check that they fit, and plan the steps.

Nothing is written but the cache. `hf-myllm prepare RECIPE` does the slow part ahead of a launch; see prepare.py.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from . import checkpoint, run_folder, tasks
from .build_data import (
    check_tokenizer,
    default_max_len,
    find_sources,
    find_tokenizer,
    keeps_old_split,
    load_data,
    make_rows,
    plan_mixture,
)
from .data import sampler
from .data import tokenizer as tokenizers
from .distributed import PREPARATION, create_accelerator, end_training, explain_failures, is_rank_zero, process_settings
from .errors import InputError, RecipeError
from .evaluation import load_metrics
from .hub import check_target
from .models import FAMILIES, loading, revisions
from .models.auto import num_positions
from .models.probe import check_class
from .optim import build_optimizer, load_optimizer_tensors
from .precision import cast_to_bf16, convert_to_fp8
from .recipe import Recipe
from .resume import check_resumable, check_same_data, check_same_recipe, find_branch_point, is_branch, start_average
from .saver import Saver
from .sharding import shard_model
from .tasks import TASKS
from .terminal import plural

_MAX_EPOCHS_PER_STEP = 1000  # more are a mistake


@dataclass
class Run:
    """The parts of a run, found and checked. What changes while it trains is in [`~hf_myllm.run_state.RunState`]."""

    recipe: Recipe  # resolved: no size is left open
    accelerator: Accelerator
    sources: object
    tokenizer: object  # None for token ids without a tokenizer
    task: object
    train_rows: object  # None if only evaluating
    val_sets: dict  # validation rows by name, "" if there is one set; {} without validation data
    model: torch.nn.Module
    newly_initialized: list  # names of weights that the model of init_from did not have
    resume_from: Path | None
    resume_state: dict | None  # trainer_state/state.json of resume_from
    data_stats: dict
    metrics: dict = field(default_factory=dict)  # of the library `evaluate`, loaded
    token_bytes: np.ndarray | None = None  # bytes of text per token id
    # the plan
    start_step: int = 0
    total_steps: int = 0
    sampler: object = None
    accumulation_steps: int = 1
    branched_from: dict | None = None  # see [`find_branch_point`]
    # held while training
    snapshot: dict | None = None  # of the run's folder before the data were prepared
    lock: object = None
    signals: list = ()
    reporter: object = None
    uploads: object = None
    saver: object = None
    weight_average: object = None  # see [`~hf_myllm.ema.WeightAverage`]
    resume_warnings: list = field(default_factory=list)
    phase: str = PREPARATION  # for error messages

    @property
    def run_dir(self):
        return Path(self.recipe.run.save_model)

    @property
    def is_new(self):
        """Whether this launch begins the run: from nothing, from a model or, as a branch, from another run."""
        return self.resume_from is None or is_branch(self.recipe, self.resume_from)

    @property
    def val_rows(self):
        """The validation rows, of several sets those of the first; None without."""
        return next(iter(self.val_sets.values()), None)

    @property
    def scale(self):
        """Return how much more text there is than was read: above 1 in a dry run that samples the beginning."""
        return 1 / max(1e-9, self.data_stats.get("share", 1.0))

    def data_parts(self):
        """Return the rows of the training and of the validation data by name."""
        parts = {"training data": self.train_rows}
        parts |= {f"validation data {name}".rstrip(): rows for name, rows in self.val_sets.items()}
        return {name: rows for name, rows in parts.items() if rows is not None}

    def data_fingerprints(self):
        """Return a digest of the tokens of the training and of the validation data."""
        return {name: rows.tokens.fingerprint for name, rows in self.data_parts().items()}

    def close(self):
        """Release the lock and stop uploads."""
        if self.uploads is not None:
            self.uploads.stop()
        if self.lock is not None:
            self.lock.release()


@contextmanager
def open_run(recipe, train_data=None, eval_data=None):
    """Yield the [`Run`] of a recipe, which stays as it is, and close the run when the block ends.

    Raises:
        InputError: the recipe, the data, the model or the folder cannot be used.
    """
    recipe.check_sources(train_data is not None, eval_data is not None)
    recipe, run = recipe.copy_checked(FAMILIES, train_data is not None, eval_data is not None), None
    recipe.check_task(TASKS[recipe.task], FAMILIES[recipe.family].takes_positions(recipe.task))
    with process_settings(recipe.run.log_level, recipe.training.deterministic) as owns_process_group:
        snapshot = checkpoint.snapshot(recipe.run.save_model)
        if is_rank_zero() and not (recipe.run.dry_run or recipe.evaluation.eval_only):
            run_folder.check_unlocked(recipe.run.save_model)
            if recipe.hub.push_to_hub:
                check_target(recipe.hub.push_to_hub)
        run_folder.check_run_dir(recipe)
        section, trains = recipe.training, not recipe.evaluation.eval_only
        log_with, run_dir = recipe.run.log_with, recipe.run.save_model
        accelerator = create_accelerator(section.precision, trains, section.compile, log_with, run_dir)
        with ExitStack() as cleanup:
            try:
                with explain_failures(accelerator, lambda: run.phase if run else PREPARATION):
                    resume_from = run_folder.find_checkpoint(recipe, accelerator)
                    run = build_run(recipe, accelerator, resume_from, cleanup, train_data, eval_data)
                    cleanup.callback(run.close)
                    run.saver, run.snapshot = cleanup.enter_context(Saver(accelerator)), snapshot
                    yield run
                    if accelerator.is_fsdp2:
                        run.model = run.weight_average = None
                    end_training(accelerator, owns_process_group)
            except BaseException:
                accelerator.peers.stop(failed=True)
                if accelerator.num_processes == 1:  # of several ranks, a failed one just exits
                    end_training(accelerator, owns_process_group)
                raise


def build_run(recipe, accelerator, resume_from, cleanup, train_data=None, eval_data=None):
    """Return the [`Run`] of a recipe, in which sizes that were left open are filled in.

    Args:
        cleanup: an ExitStack, which closes the stream of a streaming run, also if building it fails.
    """
    section, eval_only = recipe.run, recipe.evaluation.eval_only
    metrics = load_metrics(recipe.evaluation.metrics or [], recipe.evaluation.trust_metric_code)
    data_sources = find_sources(recipe, train_data, eval_data)
    pretrained = resume_from or (None if section.init_from == "scratch" else revisions.resolve(section.init_from))
    stored_config = loading.read_config(recipe.family, pretrained) if pretrained else None
    is_trained = resume_from is not None or eval_only
    tokenizer = find_tokenizer(recipe, data_sources, pretrained, is_trained)
    task = build_task(recipe, data_sources, tokenizer, stored_config, is_trained)
    config = build_config(recipe, tokenizer, pretrained, task)
    trainer_state = checkpoint.load_trainer_state(resume_from) if resume_from else None
    resolve_sizes(recipe, config, task, accelerator, None if is_branch(recipe, resume_from) else trainer_state)
    if trainer_state is not None and not eval_only:
        check_same_recipe(recipe, trainer_state, resume_from, tokenizer)
    if pretrained:
        loading.check_settings(recipe.config, stored_config, pretrained, is_trained)
    check_tokenizer(recipe, config, tokenizer, task)

    show_progress = accelerator.is_local_main_process
    training, validation, stats = load_data(
        recipe, data_sources, task, trainer_state, config.vocab_size, cleanup, show_progress
    )
    on_meta = accelerator.is_fsdp2
    model, newly_initialized = build_model(recipe, config, pretrained, stored_config, is_trained, task, on_meta)
    check_class(model, recipe.task, recipe.data.packing, task.isolates_documents, task.pads_rows)
    adapt_model(recipe, accelerator, model, task)
    train_rows, val_sets = make_rows(recipe, data_sources, task, training, validation)
    if train_rows is not None:
        task.update_generation_config(model, stats["train"])
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        sources=data_sources,
        tokenizer=tokenizer,
        task=task,
        train_rows=train_rows,
        val_sets=val_sets,
        model=model,
        newly_initialized=newly_initialized,
        resume_from=resume_from,
        resume_state=trainer_state,
        data_stats=stats,
        metrics=metrics,
    )
    if recipe.evaluation.metric_for_best and not run.val_sets:
        raise RecipeError("metric_for_best: there are no validation rows; give --val_file FILE, or a val_fraction")
    if tokenizer is not None and task.has_bits_per_byte:
        run.token_bytes = tokenizers.token_bytes(tokenizer, config.vocab_size)
    if not eval_only:
        plan_steps(run)
        run.branched_from = find_branch_point(run)
        check_same_data(run)
    return run


# ---- tokenizer, task and model


def adapt_model(recipe, accelerator, model, task):
    """Set gradient checkpointing, the dtype between and in layers, and the attention kernel for separate documents."""
    # The model's own checkpointing draws the same dropout when it recomputes a layer; accelerate's does not.
    fsdp_checkpoints_activations = accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing
    if recipe.training.gradient_checkpointing or fsdp_checkpoints_activations:
        if not model.supports_gradient_checkpointing:
            raise RecipeError(f"gradient_checkpointing: {model.config.model_type} does not support it; leave it out")
        # transformers renamed the method in 5.23
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    if accelerator.mixed_precision == "bf16" and not accelerator.is_fsdp2:
        cast_to_bf16(model)
    if accelerator.precision == "fp8":
        convert_to_fp8(model, emulate=accelerator.device.type != "cuda")
    if task.isolates_documents:
        loading.use_flex_attention(model, accelerator.device.type)


def build_task(recipe, data_sources, tokenizer, stored_config, is_trained):
    """Return the recipe's task, with the labels that the model was trained for, or those of the training data."""
    source = data_sources.training[0] if data_sources.training else None
    settings = {**vars(recipe.training), **vars(recipe.evaluation), **vars(recipe.data)}
    settings |= {"splits_by_position": is_trained and keeps_old_split(recipe)}
    return tasks.build(recipe.task, tokenizer, settings, recipe.run.seed, source, stored_config, is_trained)


def build_config(recipe, tokenizer, pretrained, task):
    """Return the configuration of the model; see [`loading.build_config`]."""
    return loading.build_config(
        recipe.family,
        recipe.config,
        pretrained,
        tokenizer,
        task.config_settings(),
        max(recipe.data.max_len, task.num_target_positions) if recipe.data.max_len else None,
        use_tokenizer_ids=bool(recipe.data.tokenizer),
        add_tokens=bool(recipe.data.add_tokens),
    )


def build_model(recipe, config, pretrained, stored_config, is_trained, task, on_meta=False):
    """Return the model and the names of its newly initialized weights; see [`loading.build_model`]."""
    section, lora_settings = recipe.lora, None
    if section.r and not recipe.evaluation.eval_only:
        lora_settings = {"r": section.r, "alpha": section.lora_alpha, "dropout": section.lora_dropout}
        lora_settings["target_modules"] = section.target_modules
    labels_fit = not (task.labels and stored_config) or task.labels.fit_head(tasks.Labels.from_config(stored_config))
    return loading.build_model(
        recipe.family,
        recipe.task,
        config,
        pretrained,
        is_trained,
        replaces_head=task.is_labelled,
        labels_fit=labels_fit,
        use_config_ids=bool(recipe.data.tokenizer),
        seed=sampler.derive_seed(recipe.run.seed, "initial weights"),
        dtype=getattr(torch, recipe.training.dtype),
        lora_settings=lora_settings,
        on_meta=on_meta,
    )


def resolve_sizes(recipe, config, task, accelerator, trainer_state):
    """Fill in the sizes that follow from others."""
    data, training = recipe.data, recipe.training
    positions = num_positions(config)
    data.max_len = data.max_len or default_max_len(config, task.tokenizer)
    if positions and data.max_len > positions:
        raise RecipeError(f"max_len {data.max_len} is more than the {positions} positions of the model")
    task.configure(config, data.max_len)
    if task.has_stride and not data.streaming:
        data.stride = data.stride or data.max_len - task.num_special_tokens
    if training.total_batch_size is None:
        micro = training.gradient_accumulation_steps or 1
        training.total_batch_size = training.batch_size * micro * accelerator.num_processes
        asked = training.gradient_accumulation_steps is not None
        if trainer_state is not None and not (asked and trainer_state["num_processes"] == accelerator.num_processes):
            # on another number of processes, the step stays what it was
            training.total_batch_size = trainer_state["recipe"]["total_batch_size"]
    training.gradient_accumulation_steps = None
    recipe.check_batch()
    if training.epochs is None and training.max_steps is None:
        training.epochs = 1.0


def plan_steps(run):
    """Set the run's first and last step, its micro-batches and its sampler."""
    section, world_size = run.recipe.training, run.accelerator.num_processes
    section.batch_size = min(section.batch_size, math.ceil(section.total_batch_size / world_size))
    run.accumulation_steps = math.ceil(section.total_batch_size / (section.batch_size * world_size))
    total_rows = None
    if section.max_steps:
        run.total_steps = section.max_steps
    else:
        total_rows = max(1, int(section.epochs * len(run.train_rows)))
        run.total_steps = math.ceil(total_rows / section.total_batch_size)
    mixture = plan_mixture(run.recipe, run.sources, run.train_rows, run.data_stats)
    if mixture is not None and mixture.end is not None:
        total_rows = min(mixture.end, total_rows or run.total_steps * section.total_batch_size)
        run.total_steps = math.ceil(total_rows / section.total_batch_size)
    ramps = {"warmup_steps": section.warmup_steps}
    if section.lr_schedule == "wsd" and section.decay_steps:
        ramps["decay_steps"] = section.decay_steps
    if sum(ramps.values()) > run.total_steps:
        given = " and ".join(f"{name} {steps}" for name, steps in ramps.items())
        raise InputError(f"{given} are more than the run's {run.total_steps} steps; lower them")
    if section.total_batch_size > _MAX_EPOCHS_PER_STEP * len(run.train_rows):
        raise InputError(
            f"total_batch_size: a step of {section.total_batch_size:,} rows reads each of the "
            f"{plural(len(run.train_rows), 'training row')} over {_MAX_EPOCHS_PER_STEP:,} times; lower it, or "
            "gradient_accumulation_steps"
        )
    run.sampler = sampler.Sampler(
        len(run.train_rows),
        section.total_batch_size,
        run.recipe.run.seed,
        total_rows,
        mixture,
        run.recipe.data.streaming,
        run.task.length_keys(run.train_rows),
        run.task.length_group_steps,
    )
    if run.resume_state is not None:
        run.start_step = run.resume_state["step"]
        if run.recipe.data.streaming:
            run.train_rows.current = run.sampler.windows(run.start_step).tolist()
        check_resumable(run)


# ---- training


def prepare_training(run):
    """Wrap the model for its ranks and devices, and create the optimizer; restore it when the run resumes.

    Returns:
        (model, optimizer), prepared by accelerate.
    """
    section, accelerator, trainer_state = run.recipe.training, run.accelerator, run.resume_state
    if accelerator.is_fsdp2:  # before the optimizer, which then holds this rank's shard only
        shard_model(accelerator, run.model, section.compile)
    optimizer = build_optimizer(
        run.model,
        section.learning_rate,
        (section.beta1, section.beta2),
        section.epsilon,
        section.weight_decay,
        section.optimizer,
        compile_updates=section.compile and accelerator.device.type == "cuda",
    )
    if accelerator.is_fsdp2:
        model, optimizer = run.model, accelerator.prepare_optimizer(optimizer)
    else:
        model, optimizer = accelerator.prepare(run.model, optimizer)
    start_average(run)
    if trainer_state is None:
        return model, optimizer
    previous = trainer_state["recipe"].get("optimizer", "adamw")
    if previous == section.optimizer:
        files = checkpoint.OptimizerFiles(run.resume_from)
        try:
            load_optimizer_tensors(run.model, optimizer.optimizer, files)
        except (KeyError, ValueError) as error:
            raise InputError(f"{run.resume_from}: its optimizer state is not of this model: {error}") from None
    else:
        run.resume_warnings.append(
            f"the optimizer changed from {previous} to {section.optimizer}; its state starts empty"
        )
    before = trainer_state.get("precision") or trainer_state.get("mixed_precision", "fp32").replace("no", "fp32")
    if before != accelerator.precision:
        run.resume_warnings.append(
            f"the precision changed from {before} to {accelerator.precision}, so the result differs"
        )
    if accelerator.scaler is not None and "scaler" in trainer_state:
        accelerator.scaler.load_state_dict(trainer_state["scaler"])
    return model, optimizer
