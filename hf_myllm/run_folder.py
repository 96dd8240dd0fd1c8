"""The folder of a run: its lock, recipe.yaml, checkpoints, the published model, and the reports."""

import copy
import os
import re
import stat
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from . import checkpoint
from .data import tokenizer as tokenizers
from .distributed import any_rank, gather, rank_name, wait_for_ranks
from .errors import CheckpointError, RankError, first_line, library_errors
from .files import PARTIAL, read_yaml, refuse_link, write_text_atomically
from .hub import BackgroundUploads, write_card
from .launcher import train_command
from .models import lora
from .models.export import is_large
from .models.loading import load_stock_model
from .precision import restore_from_fp8
from .reporting import html, plots
from .reporting.metrics_log import amend_run, last_evaluation, metrics_of_weights
from .sharding import to_full
from .terminal import join_command, plural

_LOGS = (".log", ".out", ".err")  # a shell or a scheduler opens them before the run starts
_RECIPE_HEADER = "# to repeat this run:"  # the first line of the recipe.yaml that a run writes

# ---- before a run


def check_run_dir(recipe):
    """Refuse a folder that this run must not write to; take `init_from` of a run without checkpoints from its recipe.

    Raises:
        InputError: `save_model` is not a folder that can be written, or it holds another run.
    """
    section, eval_only, run_dir = recipe.run, recipe.evaluation.eval_only, Path(recipe.run.save_model)
    if eval_only and not section.resume:
        return
    _require_writable(run_dir)
    if foreign := _foreign_files(run_dir):
        raise CheckpointError(
            f"save_model: {run_dir} holds files of another origin ({foreign[0]}) and no run; name another folder"
        )
    has_checkpoints = checkpoint.has_checkpoints(run_dir)
    if section.resume and has_checkpoints:
        return
    if section.resume and eval_only:
        raise CheckpointError(f"{run_dir}: it holds no checkpoint to evaluate; give --load_model FOLDER")
    if section.resume and section.init_from == "scratch" and (run_dir / "recipe.yaml").exists():
        section.init_from, section.with_optimizer = _init_from_of(run_dir / "recipe.yaml")
    has_model = checkpoint.has_model(run_dir)
    if (has_model or has_checkpoints) and not (section.resume or section.dry_run):
        content = "already holds a finished run" if has_model else "holds the checkpoints of an unfinished run"
        choice = "resume it with --init_from resume, or write elsewhere with --save_model FOLDER"
        raise CheckpointError(f"{run_dir} {content}; {choice}")
    path = Path(section.init_from)
    if section.with_optimizer and (checkpoint.step_of(path) < 0 or not path.is_dir()):
        raise CheckpointError(f"with_optimizer: {path} is no checkpoint of a run; give --init_from RUN/checkpoint-500")


def find_checkpoint(recipe, accelerator):
    """Return on all ranks the checkpoint to go on from, of this run or of the one it branches from, or None.

    A collective: rank 0 verifies checkpoints, which reads them whole, while the others wait.

    Raises:
        CheckpointError: it is damaged, or all are.
        RankError: a rank does not see it.
    """
    section, path = recipe.run, None
    if accelerator.is_main_process:
        if section.resume:
            path = checkpoint.find_latest(section.save_model, lambda line: print(f"warning: {line}", file=sys.stderr))
        branches = section.with_optimizer and (section.resume or not recipe.evaluation.eval_only)
        if path is None and branches:
            path = Path(section.init_from)
            if problem := checkpoint.find_corruption(path):
                raise CheckpointError(f"with_optimizer: {path}: {problem}; give another checkpoint")
        elif path is None:
            checkpoint.check_weights(section.init_from)
    path = gather(accelerator, path)[0]
    if path is not None and not path.exists():
        rank = rank_name(accelerator)
        raise RankError(f"{rank} does not see {path}; {path.parent} must be on a disk that all ranks share")
    return path


def _require_writable(run_dir):
    try:
        if not stat.S_ISDIR(os.stat(run_dir).st_mode):
            raise CheckpointError(f"save_model: {run_dir} is a file; name a folder")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"save_model: {str(run_dir)[:100]!r} cannot be a folder: {error}") from None
    existing = next(path for path in [run_dir, *run_dir.absolute().parents] if path.exists())
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"save_model: {run_dir} cannot be written; no permission in {existing}")


def _foreign_files(run_dir):
    """Return the names of the files in a folder that no run has written to; [] if one has."""
    recipe = run_dir / "recipe.yaml"
    if not run_dir.is_dir() or checkpoint.has_checkpoints(run_dir):
        return []
    if recipe.is_file() and recipe.read_text(encoding="utf-8", errors="replace").startswith(_RECIPE_HEADER):
        return []
    names = [path.name for path in run_dir.iterdir() if path.is_symlink() or not path.is_dir()]
    own = (PARTIAL, *_LOGS)
    return sorted(name for name in names if not name.startswith(".") and not name.endswith(own))


def _init_from_of(path):
    """Return `init_from` and `with_optimizer` of a run that was stopped before its first checkpoint."""
    try:
        section = read_yaml(path.read_text(encoding="utf-8"))["run"]
        return str(section["init_from"]), section.get("with_optimizer", False)
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not the recipe that the run wrote; remove it to start again") from None


def acquire_lock(run_dir):
    """Keep other runs out of the folder. The operating system releases the lock when this process ends."""
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in run_dir.iterdir():  # a link to another folder, such as latest, is not written to
            if not path.is_dir() or re.match(r"checkpoint-|profile$|tensorboard$|wandb$", path.name):
                refuse_link(path)
        lock = FileLock(run_dir / ".lock", thread_local=False)
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        raise CheckpointError(f"{run_dir}: another run is using it; write elsewhere with --save_model") from None
    except OSError as error:
        raise CheckpointError(f"{run_dir}: the run's folder cannot be written: {error}") from None


def check_unlocked(run_dir):
    """Raise CheckpointError if another run holds the folder's lock."""
    if os.path.isfile(Path(run_dir) / ".lock"):
        acquire_lock(run_dir).release()


def lock(run):
    """Lock the folder on rank 0 for the time of the training.

    Raises:
        CheckpointError: on all ranks, if rank 0 cannot lock the folder, or another run wrote to it while the data were
            prepared, which may take hours.
    """
    run_dir, problem, run.phase = run.run_dir, None, "the start of its training"
    if run.accelerator.is_main_process:
        try:
            run.lock = acquire_lock(run_dir)
            if checkpoint.snapshot(run_dir) != run.snapshot:
                problem = CheckpointError(f"{run_dir}: another run wrote to it since this one started; start again")
        except CheckpointError as error:
            problem = error
    if any_rank(run.accelerator, problem is not None):
        raise problem or CheckpointError(f"{run_dir}: rank 0 cannot write it; see its error above")


def write_recipe(run):
    """Write recipe.yaml with all sizes resolved, and remove what a killed process left half-written."""
    run_dir = run.run_dir
    if run.accelerator.is_main_process:
        with library_errors(f"{run_dir}: the run's folder cannot be written", CheckpointError, OSError):
            checkpoint.remove_partial(run_dir)
            if run.is_new:
                (run_dir / "metrics.jsonl").unlink(missing_ok=True)
            if run.is_new or run.recipe.run.allow_changed:
                recipe, path = copy.deepcopy(run.recipe), run_dir / "recipe.yaml"
                recipe.run.resume = recipe.run.allow_changed = False
                recipe.evaluation.trust_metric_code = False  # who gets this recipe decides anew
                command = f"{train_command(run.accelerator.num_processes)} {join_command([str(path)])}"
                write_text_atomically(
                    path, f"{_RECIPE_HEADER} {command} --save_model ANOTHER_FOLDER\n{recipe.to_yaml()}"
                )
    wait_for_ranks(run.accelerator)


# ---- after a run


def publish_model(run, state):
    """Make the last or the best checkpoint the model at the folder's root, with LoRA merged if the recipe says so.

    All ranks call it.

    Returns:
        the published model; None if it is sharded (FSDP2).
    """
    accelerator, run_dir = run.accelerator, run.run_dir
    run.reporter.status("publishing the model", is_large(run.model))
    chosen = gather(accelerator, _choose_checkpoint(run, state))[0]
    model = accelerator.unwrap_model(run.model, keep_fp32_wrapper=False, keep_torch_compile=False).eval()
    restore_from_fp8(model)
    merges = lora.is_added(model) and run.recipe.lora.merge_lora
    is_last = chosen is not None and checkpoint.step_of(chosen) == state.step
    stays_merged = chosen is None and merges
    source = chosen or run_dir
    # another machine may not see the disk of rank 0
    if not (is_last or stays_merged or accelerator.is_fsdp2) and source.exists():
        load_weights(model, source)
    averages, weights = chosen is not None and run.recipe.evaluation.publishes_average, None
    if averages:
        if not is_last and source.exists():
            run.weight_average.load(checkpoint.OptimizerFiles(source))
        run.weight_average.apply()
        weights = _gather_weights(run) if accelerator.is_fsdp2 else None
    if merges and not accelerator.is_fsdp2:
        model = lora.merge(model)
    if accelerator.is_main_process and chosen is not None:
        if merges and accelerator.is_fsdp2:
            checkpoint.publish_new(lambda folder: _write_merged(run, model, folder, weights, chosen), run_dir)
        elif merges or averages:
            checkpoint.publish_new(lambda folder: _write_model(run, model, folder, weights), run_dir)
        else:
            checkpoint.publish(chosen, run_dir)
        amend_run(run_dir, published_step=checkpoint.step_of(chosen), published_average=averages)
        if run.tokenizer is not None and tokenizers.differs_when_loaded(run.tokenizer, run_dir):
            run.reporter.warning(
                f"tokenizer   AutoTokenizer.from_pretrained({str(run_dir)!r}) splits text in another way than the "
                "training did; load it with PreTrainedTokenizerFast"
            )
    return None if accelerator.is_fsdp2 else model


def _gather_weights(run):
    """Return the weights of a sharded model, gathered on rank 0; elsewhere {}. A collective.

    Of a model with an adapter only the trained weights.
    """
    if lora.is_added(run.model):
        return {name: to_full(p.detach()).cpu() for name, p in run.model.named_parameters() if p.requires_grad}
    weights = run.accelerator.get_state_dict(run.model)
    return weights | {tied: weights[source] for tied, source in run.model.all_tied_weights_keys.items() if weights}


def _write_model(run, model, folder, weights=None):
    """Write a model or an adapter with the run's tokenizer; of a sharded model, its gathered weights."""
    if lora.is_added(model):
        lora.save(model, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    if run.tokenizer is not None:
        tokenizers.save(run.tokenizer, folder)


def _write_merged(run, model, folder, weights, adapter):
    """Write the whole model of a sharded one with an adapter, which is loaded and merged on this rank.

    Args:
        weights: of the adapter; None: those in the folder `adapter`.
    """
    if weights is not None:
        adapter = folder / "adapter"
        lora.save(model, adapter, weights)
    merged = lora.merge(load_stock_model(adapter, getattr(torch, run.recipe.training.dtype)))
    _write_model(run, merged, folder)


def _choose_checkpoint(run, state):
    """Return the checkpoint to publish, on rank 0; None if the best is damaged and the model at the root stays."""
    recipe, run_dir = run.recipe, run.run_dir
    last = run_dir / f"checkpoint-{state.step}"
    if not run.accelerator.is_main_process:
        return None
    step, value, _ = state.best()
    if step is None:
        return last
    name = recipe.evaluation.final_model.replace("ema", "last")
    chosen, content = last, name if step != state.step else "last, which is the best"
    if recipe.evaluation.final_model == "best":
        chosen = run_dir / f"checkpoint-{step}"
        if checkpoint.find_corruption(chosen):
            if checkpoint.has_model(run_dir):
                run.reporter.warning(f"best        {chosen.name} is missing or damaged; {run_dir} stays unchanged")
                return None
            content, chosen = f"last, because {chosen.name} is missing or damaged", last
    if recipe.evaluation.publishes_average:
        content += ", as the average of its weights"
    metric = recipe.evaluation.metric_for_best
    run.reporter.info(f"best        {metric} {value:.4f} after step {step}; {run_dir} holds the {content}")
    return chosen


def load_published(run):
    """Return the model at the folder's root, which a finished run published before; None if it is sharded (FSDP2)."""
    if run.accelerator.is_fsdp2:
        return None
    model = run.accelerator.unwrap_model(run.model).eval()
    load_weights(model, run.run_dir)
    return model


def published_metrics(run, state):
    """Return the validation metrics of the model that the run's folder holds: the best or the last, or an average."""
    section, is_published = run.recipe.evaluation, not state.was_interrupted
    best_step = state.best_step() if section.final_model == "best" and is_published else None
    evaluation = last_evaluation(run.run_dir, best_step or state.step)
    metrics = {name.removeprefix("val_"): value for name, value in evaluation.items() if name.startswith("val_")}
    return metrics_of_weights(metrics, section.publishes_average and is_published)


def load_weights(model, path):
    """Load the weights of a checkpoint, or of its adapter, into a model of the same architecture."""
    if lora.is_added(model):
        lora.load_weights(model, path)
    else:
        model.load_state_dict(type(model).from_pretrained(path, config=model.config, dtype=model.dtype).state_dict())


def is_complete(run, state):
    """Return on all ranks whether a resumed run has nothing left to do, and print so. A collective."""
    is_main, run_dir = run.accelerator.is_main_process, run.run_dir
    if not any_rank(run.accelerator, is_main and _is_published(run, state)):
        return False
    if is_main:
        if not (run_dir / "report.html").exists():
            write_reports(run_dir, lambda line: print(line, file=sys.stderr))
        keys = "max_steps or epochs with --allow_changed" if state.step == run.total_steps else "patience"
        print(f"{run_dir} is finished, after {plural(state.step, 'step')}; raise {keys} to train longer")
    return True


def _is_published(run, state):
    """Return whether the model at the folder's root is the one that this run ends with."""
    run_dir = run.run_dir
    if (lora.is_added(run.model) and run.recipe.lora.merge_lora) or run.recipe.evaluation.publishes_average:
        return False  # a merged or averaged model does not record its step: make it again
    best = state.best_step() if run.recipe.evaluation.final_model == "best" else None
    path = run_dir / f"checkpoint-{state.step if best is None else best}"
    if checkpoint.find_corruption(path):
        return best is not None and checkpoint.has_model(run_dir)
    return checkpoint.is_published(path, run_dir)


def write_reports(run_dir, warn):
    """Write loss.png, report.html and README.md. A failure is a warning: the model is already saved."""
    for name, write in (("loss.png", plots.write_plot), ("report.html", html.write_report), ("README.md", write_card)):
        try:
            write(run_dir)
        except Exception as error:
            warn(f"warning: {name} could not be written: {first_line(error)[:200]}")


def open_uploads(run):
    """Push checkpoints in the background while training, if the recipe asks for it."""
    section = run.recipe.hub
    if section.push_to_hub and run.accelerator.is_main_process:
        options = section.push_to_hub, section.hub_private_repo, section.hub_revision
        run.uploads = BackgroundUploads(run.run_dir, *options)


def finish_uploads(run, state):
    """Push the published model if the recipe asks for it; after a signal, stop the push that is running."""
    if run.uploads is None:
        return
    if state.was_interrupted:
        if line := run.uploads.stop():
            run.reporter.error(line)
        return
    run.reporter.info(f"push        to {run.uploads.repo} ... (Ctrl-C cancels)")
    line, is_pushed = run.uploads.finish(lambda: bool(run.signals))
    (run.reporter.info if is_pushed else run.reporter.error)(line)
