"""RUN/report.html: a run on one page, in one file without scripts or links to other files.

It is rendered from report.html.jinja with what the run's folder holds: run.json and metrics.jsonl.
"""

import base64
import tempfile
import time
from pathlib import Path

import yaml

from ..errors import printable
from ..files import render_template, write_text_atomically
from ..launcher import train_command
from ..terminal import join_command
from . import plots
from .metrics_log import last_evaluation, metric_label, read_metrics, read_run, validation_metrics

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_MAX_SAMPLES = 12
_SUMMARY_METRICS = ("accuracy", "f1", "exact_match", "pearson", "matthews")


def write_report(run_dir):
    """Write RUN/report.html.

    Raises:
        InputError: the run has logged nothing yet.
        OSError: the file cannot be written.
    """
    run_dir = Path(run_dir)
    run, lines, last = read_run(run_dir), read_metrics(run_dir), last_evaluation(run_dir)
    metrics = validation_metrics(last)
    text = render_template(
        TEMPLATE,
        name=run_dir.resolve().name,
        run=run,
        summary=_summary(run, [line for line in lines if "learning_rate" in line], metrics),
        picture=_picture(run_dir),
        samples=_samples([line for line in lines if line.get("sample")]),
        evaluation=last,
        metrics=metrics,
        metric_label=metric_label,
        printable=_printable,
        format_time=lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
        count_names=list(dict.fromkeys(name for counts in run.get("data", {}).values() for name in counts)),
        recipe=yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True) if run.get("recipe") else "",
        run_dir=join_command([str(run_dir)]),
        train_command=train_command((run.get("launches") or [{}])[-1].get("processes", 1)),
    )
    write_text_atomically(run_dir / "report.html", text)


def _summary(run, steps, metrics):
    """Return the most important numbers of a run: label -> text.

    Args:
        steps: the logged training steps.
        metrics: the final validation metrics.
    """
    step, parameters, trained = steps[-1] if steps else {}, run.get("parameters"), run.get("trained_parameters")
    numbers = [
        (f"validation loss ({run.get('unit', 'nats per token')})", metrics.get("loss"), "{:.4f}"),
        *((metric_label(name), metrics.get(name), "{:.4f}") for name in _SUMMARY_METRICS),
        ("bits per byte", metrics.get("bits_per_byte"), "{:.3f}"),
        ("parameters", parameters, "{:,}"),
        ("trained parameters", trained if trained != parameters else None, "{:,}"),
        ("steps", step.get("step"), "{:,}"),
        ("training time", _duration(step.get("train_seconds")), "{}"),
        ("tokens per second", step.get("tokens_per_second"), "{:,.0f}"),
        ("peak memory", max((line.get("peak_memory_gb") or 0 for line in steps), default=0) or None, "{:.2f} GB"),
        ("model FLOPs utilization", step.get("mfu"), "{:.1%}"),
    ]
    return {label: text.format(value) for label, value, text in numbers if value is not None}


def _picture(run_dir):
    """Return the curves as a base64-encoded SVG."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "loss.svg"
        plots.draw([plots.read(run_dir)], [path])
        return base64.b64encode(path.read_bytes()).decode()


def _samples(evaluations):
    """Return at most 12 of the evaluations with a sample, evenly spaced from the first to the last."""
    last, count = len(evaluations) - 1, min(len(evaluations), _MAX_SAMPLES)
    return [evaluations[round(i * last / max(1, count - 1))] for i in range(count)]


def _duration(seconds):
    if seconds is None:
        return None
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _printable(text):
    return "\n".join(map(printable, text.splitlines()))
