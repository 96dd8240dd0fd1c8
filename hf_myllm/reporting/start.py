"""Start what reports a run: the terminal, metrics.jsonl, run.json and the trackers."""

from contextlib import redirect_stdout

import torch

from ..distributed import peak_memory, wait_for_ranks
from ..errors import first_line
from .console import INDENT, Reporter
from .facts import launch_facts, run_facts
from .flops import flops_per_token, peak_flops
from .metrics_log import write_run
from .summary import print_summary


def start_reporting(run, state, on_log=None, on_evaluate=None):
    """Set `run.reporter` and print the summary of the run.

    Returns:
        the validation metrics of predicting tokens by their frequency, or None; see [`evaluation.unigram_loss`].
    """
    recipe, accelerator = run.recipe, run.accelerator
    run.reporter = reporter = Reporter(
        run.run_dir,
        state.step,
        state.last_step,
        accelerator.is_main_process,
        recipe.run.log_level,
        flops=_utilization_per_speed(run),
        memory=lambda: peak_memory(accelerator),
        on_log=on_log,
        on_evaluate=on_evaluate,
    )
    reporter.pause()  # until the first step
    unigram = print_summary(run)
    if accelerator.is_main_process:
        resumes = recipe.run.resume or not run.is_new
        run_id = write_run(run.run_dir, run_facts(run, unigram), launch_facts(run), resumes)
        start_trackers(run, run_id, state.step)
    for line in run.resume_warnings:
        reporter.warning(INDENT + line)
    wait_for_ranks(accelerator)  # for rank 0, whose trackers may wait for the network
    return unigram


def _utilization_per_speed(run):
    """Return the model FLOPs utilization (MFU) divided by the tokens per second.

    0 if the GPU's peak or the FLOPs of the model are unknown.
    """
    accelerator, peak = run.accelerator, None
    if accelerator.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(accelerator.device), accelerator.precision)
    if peak is None:
        return 0.0
    head_share = run.task.logits_share or 1.0  # other heads are small
    length = run.recipe.data.max_len
    flops_per_row = (flops_per_token(run.model, length, head_share) or 0.0) * length
    return flops_per_row / run.task.row_tokens / (peak * accelerator.num_processes)


def start_trackers(run, run_id, start_step):
    """Start the experiment trackers of a run (TensorBoard, Weights & Biases, Trackio), which get what is logged.

    A resumed run continues its run in each tracker. A tracker that cannot be started is reported; training continues,
    with the other trackers.

    Args:
        run_id: the run's id in the trackers.
        start_step: the step that training resumes from; 0 for a new run.
    """
    reporter, accelerator, section, run_dir = run.reporter, run.accelerator, run.recipe.run, run.run_dir.absolute()
    settings = {
        "tensorboard": {"purge_step": start_step + 1} if start_step else {},
        "wandb": {"id": run_id, "name": run_dir.name, "resume": "allow", "dir": str(run_dir)},
        "trackio": {"name": f"{run_dir.name}-{run_id}", "resume": "allow", "embed": False},
    }
    config = {key: str(value) for key, value in run.recipe.identity().items() if value is not None}
    started = []
    for name in section.log_with or ():  # one by one: init_trackers starts all or none
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            with redirect_stdout(None):  # Trackio prints an introduction
                accelerator.init_trackers(section.project_name, config, settings)
        except Exception as error:
            reporter.warning(f"warning: {name} cannot be used: {first_line(error)[:200]}")
            continue
        started += accelerator.trackers
        reporter.trackers[name] = accelerator.trackers[0].log
    accelerator.trackers = started
    if started:
        reporter.info(f"tracked     by {', '.join(reporter.trackers)}, as {run_id} of {section.project_name}")
