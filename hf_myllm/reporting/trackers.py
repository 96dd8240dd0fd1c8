"""Experiment trackers: TensorBoard, Weights & Biases, Trackio."""

from contextlib import redirect_stdout
from pathlib import Path

from ..errors import first_line


def start_trackers(reporter, accelerator, names, project_name, run_dir, run_id, config, start_step=0):
    """Start accelerate's trackers and send them what the reporter logs.

    A resumed run continues its run in each tracker. A tracker that cannot be started is reported; training continues,
    with the other trackers.

    Args:
        reporter: a [`Reporter`]; its `trackers` are set.
        names: of "tensorboard", "wandb" and "trackio", or None.
        run_id: the run's id in the trackers.
        config: a flat dict that is stored with the run.
        start_step: the step that training resumes from; 0 for a new run.
    """
    run_dir = Path(run_dir).absolute()
    settings = {
        "tensorboard": {"purge_step": start_step + 1} if start_step else {},
        "wandb": {"id": run_id, "name": run_dir.name, "resume": "allow", "dir": str(run_dir)},
        "trackio": {"name": f"{run_dir.name}-{run_id}", "resume": "allow", "embed": False},
    }
    config = {key: str(value) for key, value in config.items() if value is not None}
    started = []
    for name in names or ():  # one by one: init_trackers starts all or none
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            with redirect_stdout(None):  # Trackio prints an introduction
                accelerator.init_trackers(project_name, config, settings)
        except Exception as error:
            reporter.warning(f"warning: {name} cannot be used: {first_line(error)[:200]}")
            continue
        started += accelerator.trackers
        reporter.trackers[name] = accelerator.trackers[0].log
    accelerator.trackers = started
    if started:
        reporter.info(f"tracked     by {', '.join(reporter.trackers)}, as {run_id} of {project_name}")
