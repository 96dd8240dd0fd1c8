"""The curves of one run, or of several on one plot: `hf-myllm plot RUN [RUN2 ...]`.

All data are read from RUN/metrics.jsonl, where a resumed run continues at its checkpoint: each run has one line. Time
is that of the training steps alone, without evaluations, saves and the time between a stop and a resume.
"""

import math
import os
import warnings
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, InputError
from ..files import atomic_path
from .metrics_log import read_metrics, read_run

AXES = {"step": "step", "tokens": "tokens", "time": "training time"}
_MAX_POINTS = 4000  # of a line: more cannot be distinguished, and make a slow picture
_DASHES = ("-", "--", "-.")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31")  # Okabe & Ito: color-blind safe
_TEXT, _RAW, _SMOOTH, _EVALUATED, _VALIDATION = "#24292f", "#9ecae1", "#08519c", "#4292c6", "#d94801"
_STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT)
_STYLE |= {"grid.color": "#e5e5e5", "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
_STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "hf_myllm", "font.family": ["DejaVu Sans", "sans-serif"]}


@dataclass
class Curves:
    """The curves of a run as arrays with one entry per logged step."""

    name: str
    axes: dict  # "step", "tokens", "time" (seconds) -> x
    loss: np.ndarray
    learning_rate: np.ndarray
    evaluations: dict  # "train_loss", "val_loss" and those of several validation sets -> (steps, values)
    unigram: float | None
    unit: str

    def at(self, steps, by):
        """Return the position of steps on an axis."""
        if by == "step" or not len(self.axes["step"]):
            return np.asarray(steps, dtype=float)
        return np.interp(steps, [0, *self.axes["step"]], [0, *self.axes[by]])


def read(run_dir):
    """Read the curves of a run.

    Raises:
        InputError: the run has logged nothing.
    """
    if not Path(run_dir).is_dir():
        raise InputError(f"{run_dir}: it is not a folder; give the folder of a run")
    lines, run = read_metrics(run_dir), read_run(run_dir)
    if not lines:
        raise InputError(f"{run_dir}: metrics.jsonl is missing or empty; train first")
    logged = [line for line in lines if "learning_rate" in line]
    keys = ("step", "loss", "learning_rate", "tokens", "train_seconds")
    columns = {key: np.array([_to_float(line.get(key)) for line in logged]) for key in keys}
    # With log_freq, a line stands for all steps since the line before it.
    tokens = np.cumsum(np.nan_to_num(columns["tokens"]) * np.diff(columns["step"], prepend=0))
    evaluations = {}
    sets = [name.removeprefix("validation ") for name in run.get("data", {}) if name.startswith("validation ")]
    for key in ("train_loss", "val_loss", "val_ema_loss", *(f"val_{name}_loss" for name in sets)):
        points = [(line["step"], _to_float(line[key])) for line in lines if key in line]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            evaluations[key] = np.array(points, dtype=float).T
    return Curves(
        Path(run_dir).resolve().name,
        {"step": columns["step"], "tokens": tokens, "time": columns["train_seconds"]},
        columns["loss"],
        columns["learning_rate"],
        evaluations,
        run.get("unigram_loss"),
        str(run.get("unit", "nats per token")),
    )


def _to_float(value):
    """Return a number as a float, and anything else (a skipped step logs null) as NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def write_plot(run_dir):
    """Draw RUN/loss.png."""
    draw([read(run_dir)], [Path(run_dir) / "loss.png"])


def plot(run_dirs, by="step", output=None):
    """Draw one or several runs and return the files written.

    Args:
        run_dirs: folders of runs.
        by: the x axis; a key of [`AXES`].
        output: .png or .svg files; default: loss.png and loss.svg in the folder of one run, curves.png and curves.svg
            in the current folder for several.
    """
    stem = Path(run_dirs[0]) / "loss" if len(run_dirs) == 1 else Path("curves")
    files = output or [f"{stem}.png", f"{stem}.svg"]
    if invalid := [file for file in files if Path(file).suffix.lower() not in (".png", ".svg")]:
        raise InputError(f"--output: {invalid[0]} is not a picture; give a file that ends in .png or .svg")
    unique = {Path(run_dir).resolve(): run_dir for run_dir in run_dirs}
    runs = {run_dir: read(run_dir) for run_dir in unique.values()}
    names = [run.name for run in runs.values()]
    for run_dir, run in runs.items():
        if names.count(run.name) > 1:  # a/run and b/run
            run.name = str(run_dir)
    draw(list(runs.values()), files, by)
    return files


def draw(runs, files, by="step"):
    """Draw the losses and the learning rate of runs (a list of [`Curves`]); see [`plot`].

    Several runs share the axes, each with its smoothed and its validation loss.
    """
    matplotlib = _import_matplotlib()
    from matplotlib.figure import Figure

    if by == "time" and (old := [run.name for run in runs if np.isnan(run.axes["time"]).any()]):
        raise InputError(f"--by: {old[0]} has no training times, from an earlier version; use --by step")
    size, label = _unit_of_axis(runs, by)
    with matplotlib.rc_context(_STYLE):
        # room for the legend of several runs below the axes
        below = 0.17 * sum(2 if "val_loss" in run.evaluations else 1 for run in runs) if len(runs) > 1 else 0
        figure = Figure(figsize=(8, 5.8 + below), dpi=150, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        for index, run in enumerate(runs):
            look = {"color": _COLORS[index % len(_COLORS)], "linestyle": _DASHES[index // len(_COLORS) % len(_DASHES)]}
            if len(runs) == 1:
                look = {"color": _SMOOTH}
                _draw_run(top, run, by, size)
            else:
                _draw_compared(top, run, by, size, look)
            bottom.plot(*_thin(run.axes[by] / size, run.learning_rate), **look, linewidth=1.2)
        bottom.set_xlabel(label)
        bottom.set_ylabel("learning rate")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        bottom.set_ylim(bottom=0)
        top.set_ylabel(f"loss ({' or '.join(sorted({run.unit for run in runs}))})")
        figure.suptitle(_escape(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs", fontsize=11)
        if len(runs) > 1:
            figure.legend(loc="outside lower center", fontsize=8)
        elif top.get_legend_handles_labels()[0]:
            top.legend(fontsize=9)
        for path in map(Path, files):
            _save(figure, path)


def _save(figure, path):
    file_format = path.suffix[1:].lower()
    metadata = {"Date": None} if file_format == "svg" else None  # the same run gives the same bytes
    try:
        with atomic_path(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that the font does not have
            figure.savefig(temporary, format=file_format, metadata=metadata)
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be written: {error}") from None


def _import_matplotlib():
    """Import matplotlib without MPLBACKEND: a notebook sets it for its child processes, which may lack that backend."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def _escape(name):
    """Return a run's name as matplotlib shows it literally: no math text, no hidden legend entry, not too long."""
    name = name if len(name) <= 60 else f"{name[:28]} ... {name[-28:]}"
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _draw_run(axes, run, by, size):
    """Draw the losses of a single run, its unigram loss and its skipped steps."""
    x, finite = run.axes[by] / size, np.isfinite(run.loss)
    if finite.any():
        label = "training, each step" if run.axes["step"][-1] == len(x) else "training, logged steps"
        marker = "." if finite.sum() < 3 else None
        axes.plot(*_thin(x, run.loss), color=_RAW, linewidth=0.7, marker=marker, label=label)
    _draw_smoothed(axes, run, x, label="training, smoothed", color=_SMOOTH, linewidth=1.4)
    _draw_evaluations(axes, run, by, size, "train_loss", label="training, evaluated", color=_EVALUATED)
    _draw_evaluations(axes, run, by, size, "val_loss", label="validation", color=_VALIDATION)
    sets = [key for key in run.evaluations if key not in ("train_loss", "val_loss")]
    for key, color in zip(sets, cycle(_COLORS[2:]), strict=False):
        name = "average of the weights" if key == "val_ema_loss" else key.removeprefix("val_").removesuffix("_loss")
        label = f"validation: {_escape(name)}"
        _draw_evaluations(axes, run, by, size, key, label=label, color=color, linestyle=":")
    if run.unigram is not None:
        label = "unigram loss: token frequencies alone"
        axes.axhline(run.unigram, color="#737373", linestyle="--", linewidth=1, label=label)
    if (~finite).any():  # on the lower edge
        edge = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "x", "color": "#cf222e"}
        axes.plot(x[~finite], np.full((~finite).sum(), 0.02), **edge, label="skipped steps: loss not finite")
    # Spikes must not compress the rest of the curve.
    limit = 3 * np.quantile(run.loss[finite], 0.99) if finite.any() else 0
    if limit > 0 and (count := int((run.loss[finite] > limit).sum())):
        axes.set_ylim(top=max(limit, *(v.max() * 1.05 for _, v in run.evaluations.values()), run.unigram or 0))
        steps = "1 step is" if count == 1 else f"{count} steps are"
        axes.plot([], [], linestyle="none", label=f"{steps} higher, up to {np.nanmax(run.loss):.3g}")
    if by == "step" and len(x) and run.axes["tokens"][-1]:
        tokens_per_step = run.axes["tokens"][-1] / run.axes["step"][-1]
        unit_size, unit = _unit_of_count(run.axes["tokens"][-1])
        scale = tokens_per_step / unit_size
        above = axes.secondary_xaxis("top", functions=(lambda steps: steps * scale, lambda tokens: tokens / scale))
        above.set_xlabel(f"{unit}tokens", fontsize=9)
        above.tick_params(labelsize=8)
        above.spines["top"].set_visible(False)


def _draw_compared(axes, run, by, size, look):
    """Draw the smoothed and the validation loss of one of several runs."""
    name = _escape(run.name)
    _draw_smoothed(axes, run, run.axes[by] / size, label=f"{name}: training, smoothed", **look, linewidth=1, alpha=0.5)
    _draw_evaluations(axes, run, by, size, "val_loss", label=f"{name}: validation", **look)


def _draw_smoothed(axes, run, x, **look):
    finite = np.isfinite(run.loss)
    if finite.sum() >= 20:
        smooth = np.full(len(x), np.nan)
        smooth[finite] = _smooth(run.loss[finite], reach=max(3, int(finite.sum()) // 40))
        axes.plot(*_thin(x, smooth), **look)


def _draw_evaluations(axes, run, by, size, key, **look):
    if key in run.evaluations:
        steps, values = run.evaluations[key]
        axes.plot(run.at(steps, by) / size, values, **look, marker="o", markersize=3.5, linewidth=1.2)


def _unit_of_axis(runs, by):
    """Return what to divide the x values by, and the label of the axis with its unit."""
    longest = max((run.axes[by][-1] for run in runs if len(run.axes[by])), default=1)
    if by == "time":
        units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        size, unit = next((size, unit) for size, unit in units if longest >= 2 * size or size == 1)
        return size, f"training time ({unit}; without evaluations and saves)"
    if by == "tokens":
        size, unit = _unit_of_count(longest)
        return size, f"{unit}tokens"
    return 1, "step"


def _unit_of_count(count):
    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1, ""))
    return next((size, unit) for size, unit in units if count >= size or size == 1)


def _smooth(values, reach):
    """Return the mean over `reach` values on either side.

    Near the start over fewer on both sides, because the loss falls fast there; near the end over those that exist.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    indices = np.arange(len(values))
    low, high = np.maximum(0, indices - reach), np.minimum(len(values), indices + np.minimum(indices, reach) + 1)
    return (sums[high] - sums[low]) / (high - low)


def _thin(x, y):
    """Reduce a long line to the lowest and highest point of each short stretch, which looks the same."""
    if len(x) <= _MAX_POINTS:
        return x, y
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), _MAX_POINTS // 2):
        values = y[stretch]
        kept |= {stretch[np.argmin(values)], stretch[np.argmax(values)]}  # a NaN is both: gaps stay visible
        if np.isfinite(values).any():
            kept |= {stretch[np.nanargmin(values)], stretch[np.nanargmax(values)]}
    kept = sorted(kept)
    return x[kept], y[kept]
