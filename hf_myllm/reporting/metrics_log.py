"""The files that a run logs to: metrics.jsonl, one JSON object per logged step or evaluation, and run.json."""

import json
import re
import secrets
from pathlib import Path

from ..errors import CheckpointError
from ..files import write_text_atomically


class MetricsLog:
    """Appends to RUN/metrics.jsonl.

    When a run resumes, the lines after its checkpoint are dropped: those steps run again. At the last step so does the
    evaluation, which follows the checkpoint.

    Attributes:
        train_seconds: training time before this launch.
    """

    def __init__(self, run_dir, start_step, total_steps):
        self.run_dir, path = Path(run_dir), Path(run_dir) / "metrics.jsonl"
        lines = [line for line in read_metrics(run_dir) if line["step"] <= start_step] if start_step else []
        if start_step == total_steps:
            lines = [line for line in lines if line["step"] < start_step or "train_loss" not in line]
        self.train_seconds = max((line.get("train_seconds", 0.0) for line in lines), default=0.0)
        try:
            write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: it cannot be written: {error}") from None

    def append(self, line):
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: it cannot be written: {error}; continue with --init_from resume"
            ) from None

    def close(self):
        self._file.close()


def read_metrics(run_dir):
    """Return the lines of RUN/metrics.jsonl as dicts; [] without the file. Lines that are not complete are skipped."""
    path, lines = Path(run_dir) / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and 0 <= line["step"] < 1 << 53:
            lines.append(line)
    return lines


def last_evaluation(run_dir, step=None):
    """Return the logged dict of the last evaluation up to a step (None: of all); {} without any."""
    lines = [line for line in read_metrics(run_dir) if "train_loss" in line and (step is None or line["step"] <= step)]
    return lines[-1] if lines else {}


def validation_metrics(evaluation):
    """Return the validation metrics of a logged evaluation that have a value, without the prefix "val_"."""
    return {
        key.removeprefix("val_"): value
        for key, value in evaluation.items()
        if key.startswith("val_") and isinstance(value, int | float)
    }


def metric_label(name):
    return "predicted tokens" if name == "tokens" else name.replace("_", " ")


def best_evaluation(run_dir, metric, last_step, greater_is_better=None, first_step=1):
    """Find the best evaluation of a run.

    Args:
        metric: a key of metrics.jsonl.
        first_step, last_step: the steps to consider. An evaluation before the first step does not count.
        greater_is_better: None derives it from the name: False for losses, perplexities and error rates.
    Returns:
        (step, value, number of evaluations since); step and value are None if no evaluation has a value.
    """
    if greater_is_better is None:
        lower = r"loss|perplexity|bits_per_byte|error|(^|_)(rmse|mse|mae|wer|cer|ter)$"
        greater_is_better = not re.search(lower, metric)
    best, since = None, 0
    for line in read_metrics(run_dir):
        if "train_loss" in line and metric in line and first_step <= line["step"] <= last_step:
            value, since = line[metric], since + 1
            if value is not None and (best is None or (value > best[1] if greater_is_better else value < best[1])):
                best, since = (line["step"], value), 0
    return (*(best or (None, None)), since)


def read_run(run_dir):
    """Return RUN/run.json: the model, the data and each launch of the run; {} without a valid file."""
    try:
        content = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def write_run(run_dir, facts, launch, resumes):
    """Write RUN/run.json. A run that resumes keeps its earlier launches and its id in the trackers.

    Returns:
        the run's id.
    """
    before = read_run(run_dir) if resumes else {}
    launches = [earlier for earlier in before.get("launches", []) if earlier["step"] <= launch["step"]]
    kept = {"id": before.get("id") or secrets.token_hex(4), "published_step": before.get("published_step")}
    _write_json(run_dir, facts | kept | {"launches": [*launches, launch]})
    return kept["id"]


def amend_run(run_dir, **facts):
    """Set keys of RUN/run.json."""
    _write_json(run_dir, read_run(run_dir) | facts)


def _write_json(run_dir, content):
    write_text_atomically(Path(run_dir) / "run.json", json.dumps(content, indent=1) + "\n")
