"""The files that a run logs to: metrics.jsonl, one JSON object per logged step or evaluation, and run.json."""

import json
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ..errors import CheckpointError, library_errors
from ..files import write_text_atomically

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Number = Annotated[int | float, Field(ge=-1e15, le=1e15)]


class _Launch(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    step: _Count
    time: Annotated[float, Field(ge=0, le=1e11)]
    processes: Annotated[int, Field(ge=1, lt=1 << 31)]
    device: str
    precision: str
    system: str
    versions: dict[str, str]


class _Source(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    name: str
    is_hub: bool


class _Part(TypedDict):
    """The facts about the training or the validation data."""

    __pydantic_config__ = ConfigDict(extra="allow")
    sources: list[_Source]


class _BranchPoint(TypedDict):
    """The checkpoint that a run branched from."""

    __pydantic_config__ = ConfigDict(extra="allow")
    run: str
    step: _Count
    digest: str
    changed: list[str]


class _Averaged(TypedDict):
    """The models of which a folder holds the average, with its metrics and those of the last of them."""

    __pydantic_config__ = ConfigDict(extra="allow")
    models: list[str]
    ema: float | None
    average: dict[str, _Number | None]
    last: dict[str, _Number | None]


_FACTS = {  # key of run.json -> its type
    **dict.fromkeys(("model", "task", "class", "init_from", "base_model", "license", "language", "unit", "id"), str),
    **dict.fromkeys(("parameters", "trained_parameters", "lora_r", "total_steps", "tokens_per_step"), _Count),
    **{"published_step": _Count, "unigram_loss": _Number, "labels": list[str], "recipe": dict[str, Any]},
    **{
        "published_average": bool,
        "data": dict[str, _Part],
        "launches": list[_Launch],
        "branched_from": _BranchPoint,
        "averaged": _Averaged,
    },
}
_CONTAINERS = ("labels", "recipe", "data", "launches")  # every other fact may be null: unknown
_FACTS = {name: TypeAdapter(kind if name in _CONTAINERS else kind | None) for name, kind in _FACTS.items()}


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
        with library_errors(f"{path}: it cannot be written", CheckpointError, OSError):
            write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = open(path, "a", encoding="utf-8")

    def append(self, line):
        advice = "; continue with --init_from resume"
        with library_errors(f"{self._file.name}: it cannot be written", CheckpointError, OSError, advice=advice):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self):
        self._file.close()


def read_metrics(run_dir):
    """Return the lines of RUN/metrics.jsonl as dicts; [] without the file.

    Lines that are not complete are skipped, and so are values of a type that this package does not write.
    """
    path, lines = Path(run_dir) / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 1 << 53:
            lines.append({name: value for name, value in line.items() if _is_logged(name, value)})
    return lines


def _is_logged(name, value):
    is_number = value is None or (type(value) in (int, float) and abs(value) < 1e300)  # no NaN, no infinity
    return isinstance(value, str) if name == "sample" else is_number


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


def metrics_of_weights(metrics, is_average):
    """Return the metrics that were measured with the weights of a step or, without their prefix, with their average."""
    if is_average:
        return {name.removeprefix("ema_"): value for name, value in metrics.items() if name.startswith("ema_")}
    return {name: value for name, value in metrics.items() if not name.startswith("ema_")}


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
    """Return RUN/run.json: the model, the data and each launch of the run; {} without a valid file.

    Facts of a type that this package does not write are left out.
    """
    try:
        content = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    facts = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        with suppress(ValidationError):
            facts[name] = _FACTS[name].validate_python(value, strict=True) if name in _FACTS else value
    return facts


def write_run(run_dir, facts, launch, resumes):
    """Write RUN/run.json. A run that resumes keeps its earlier launches and its id in the trackers.

    Returns:
        the run's id.
    """
    before = read_run(run_dir) if resumes else {}
    launches = [earlier for earlier in before.get("launches", []) if earlier["step"] <= launch["step"]]
    kept = {"id": before.get("id") or secrets.token_hex(4)}
    kept |= {name: before.get(name) for name in ("published_step", "published_average")}
    if "base_model" in before:  # a folder may be gone by now, and its name looks like that of a model on the Hub
        kept["base_model"] = before["base_model"]
    _write_json(run_dir, facts | kept | {"launches": [*launches, launch]})
    return kept["id"]


def amend_run(run_dir, **facts):
    """Set keys of RUN/run.json."""
    _write_json(run_dir, read_run(run_dir) | facts)


def _write_json(run_dir, content):
    write_text_atomically(Path(run_dir) / "run.json", json.dumps(content, indent=1) + "\n")
