"""Start what reports a run: the terminal, metrics.jsonl, run.json and the trackers."""

import torch

from ..distributed import peak_memory, wait_for_ranks
from .console import Reporter
from .facts import launch_facts, run_facts
from .flops import flops_per_token, peak_flops
from .metrics_log import write_run
from .summary import print_summary
from .trackers import start_trackers


def start_reporting(run, state, on_log=None, on_evaluate=None):
    """Set `run.reporter` and print the summary of the run.

    Returns:
        the validation metrics of predicting tokens by their frequency, or None; see [`evaluation.unigram_loss`].
    """
    recipe, accelerator = run.recipe, run.accelerator
    run.reporter = reporter = Reporter(
        recipe.run.save_model,
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
    unigram = print_summary(run, reporter)
    if accelerator.is_main_process:
        run_dir, resumes = recipe.run.save_model, recipe.run.resume or not run.is_new
        run_id = write_run(run_dir, run_facts(run, unigram), launch_facts(run), resumes)
        names, project, config = recipe.run.log_with or (), recipe.run.project_name, recipe.identity()
        start_trackers(reporter, accelerator, names, project, run_dir, run_id, config, state.step)
    for line in run.resume_warnings:
        reporter.warning(line)
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
