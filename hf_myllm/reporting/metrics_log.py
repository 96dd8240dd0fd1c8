"""metrics.jsonl and run.json: what a run logs, as files."""

import json
import re
import secrets
from pathlib import Path

from ..files import write_text_atomically


def read_metrics(folder):
    """The lines of a run's metrics.jsonl; one that a killed process left unfinished is passed over."""
    lines = []
    path = Path(folder) / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and 0 <= line["step"] < 1 << 53:
            lines.append(line)
    return lines


def best_evaluation(folder, metric, up_to, is_more=None):
    """The best of a run's evaluations: its step and its value, both None where none has a number, and how many came
    after it.

    Args:
        metric: a figure of metrics.jsonl.
        up_to: the last step to look at; the evaluation before the first step does not count.
        is_more: whether more of it is better; None: not of losses, errors and what follows from them.
    """
    if is_more is None:
        is_more = not re.search(r"loss|perplexity|bits_per_byte|error|(^|_)(rmse|mse|mae|wer|cer|ter)$", metric)
    best, since = None, 0
    for line in read_metrics(folder):
        if "train_loss" in line and metric in line and 0 < line["step"] <= up_to:
            value, since = line.get(metric), since + 1
            if value is not None and (best is None or (value > best[1] if is_more else value < best[1])):
                best, since = (line["step"], value), 0
    return (*(best or (None, None)), since)


def truncate_metrics(path, step, total_steps):
    """Drop what a killed run logged beyond the checkpoint that is being resumed: those steps are run again, and at the
    last step so is the evaluation, which follows its checkpoint. Returns the lines that stay."""
    lines = [line for line in read_metrics(path.parent) if line["step"] <= step] if step else []
    if step == total_steps:
        lines = [line for line in lines if line["step"] < step or "train_loss" not in line]
    write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def read_run(folder):
    """What RUN/run.json says of a run: what it trains on what, and each of its launches; {} where there is none."""
    try:
        found = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write_run(folder, facts, launch, goes_on):
    """Write RUN/run.json; a run that goes on keeps its earlier launches and its id in the trackers.

    Returns:
        the run's id.
    """
    before = read_run(folder) if goes_on else {}
    launches = [one for one in before.get("launches", []) if one["step"] <= launch["step"]]
    kept = {"id": before.get("id") or secrets.token_hex(4), "published_step": before.get("published_step")}
    _write_run(folder, facts | kept | {"launches": [*launches, launch]})
    return kept["id"]


def amend_run(folder, **facts):
    """Write more into RUN/run.json."""
    _write_run(folder, read_run(folder) | facts)


def _write_run(folder, found):
    write_text_atomically(Path(folder) / "run.json", json.dumps(found, indent=1) + "\n")
