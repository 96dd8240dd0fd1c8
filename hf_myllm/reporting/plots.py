"""The curves of a run, or of several over each other: `python -m hf_myllm.plot RUN [RUN2 ...]`.

All of it is read from RUN/metrics.jsonl, in which a run that was stopped goes on where its checkpoint was, so that
there is one line, whatever happened on the way. Time is that of the training steps alone: not of evaluations, saves,
and the hours between a stop and what went on from it.
"""

import itertools
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, Parser, exit_on_input_error
from ..files import atomic_path
from .metrics_log import read_metrics, read_run

AXES = {"step": "step", "tokens": "tokens", "time": "training time"}
_POINTS = 4000  # of a line: more than these cannot be told apart, and make a slow picture
_LOGGED = ("loss", "learning_rate", "tokens")
_DASHES = ("-", "--", "-.")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31")  # Okabe & Ito: for all eyes
_LIGHT = {
    "text": "#24292f",
    "grid": "#e5e5e5",
    "raw": "#9ecae1",
    "line": "#08519c",
    "eval": "#4292c6",
    "val": "#d94801",
}
_DARK = {"text": "#c9d1d9", "grid": "#30363d", "raw": "#2f5d83", "line": "#79c0ff", "eval": "#4292c6", "val": "#ffa657"}


@dataclass
class Curves:
    """What metrics.jsonl says of a run, as arrays: where each point lies on each axis, and how high."""

    name: str
    axes: dict  # "step", "tokens", "time" (seconds) of each logged step
    loss: np.ndarray
    rate: np.ndarray
    evaluations: dict  # "train_loss" and "val_loss": (steps, values)
    unigram: float | None
    unit: str

    def at(self, steps, by):
        """Where steps lie on an axis."""
        if by == "step" or not len(self.axes["step"]):
            return np.asarray(steps, dtype=float)
        return np.interp(steps, [0, *self.axes["step"]], [0, *self.axes[by]])


def read(folder):
    """The curves of a run.

    Raises:
        InputError: it has none.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a run")
    lines, about = read_metrics(folder), read_run(folder)
    if not lines:
        raise InputError(f"{folder} has no curves: its metrics.jsonl is missing or empty")
    logged = [line for line in lines if "learning_rate" in line]
    steps = np.array([line["step"] for line in logged], dtype=float)
    since = np.diff(steps, prepend=0)  # with log_freq, a line stands for the steps since the one before
    numbers = {key: np.array([_number(line.get(key)) for line in logged]) for key in (*_LOGGED, "train_seconds")}
    tokens = np.cumsum(np.nan_to_num(numbers["tokens"]) * since)
    evaluations = {}
    for key in ("train_loss", "val_loss"):
        points = [(line["step"], _number(line[key])) for line in lines if key in line]
        points = [point for point in points if np.isfinite(point[1])]
        if points:
            evaluations[key] = np.array(points, dtype=float).T
    return Curves(
        Path(folder).resolve().name,
        {"step": steps, "tokens": tokens, "time": numbers["train_seconds"]},
        numbers["loss"],
        numbers["learning_rate"],
        evaluations,
        about.get("unigram_loss"),
        str(about.get("unit", "nats per token")),
    )


def _number(value):
    """A number of metrics.jsonl; of a step that was left out, and of what is none, not a number."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


def make(folder):
    """Draw RUN/loss.png."""
    draw([read(folder)], [Path(folder) / "loss.png"])


def draw(runs, files, by="step", is_dark=False):
    """Draw the training loss of each step, smoothed, both evaluated losses and the learning rate; of several runs, the
    smoothed and the validation loss.

    Args:
        runs: curves; see [`read`].
        files: what to write: paths that end in .png or .svg.
        by: what the runs lie over: "step", "tokens" or "time".
        is_dark: whether for a dark page; the background is then that of the page.
    """
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    if by == "time" and (old := [run.name for run in runs if np.isnan(run.axes["time"]).any()]):
        raise InputError(f"{old[0]} has no training times: an earlier version has logged none; lay it over steps")
    color = _DARK if is_dark else _LIGHT
    style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), color["text"])
    style |= {"axes.edgecolor": color["text"], "grid.color": color["grid"], "svg.fonttype": "none"}
    style |= {"svg.hashsalt": "hf_myllm", "font.family": ["DejaVu Sans", "sans-serif"]}
    with matplotlib.rc_context(style):
        below = 0.17 * sum(2 if "val_loss" in run.evaluations else 1 for run in runs) if len(runs) > 1 else 0
        figure = Figure(figsize=(8, 5.8 + below), dpi=150, layout="constrained")  # the names of several are below
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        scale, label = _scale(runs, by)
        for number, run in enumerate(runs):
            shade, dashes = _COLORS[number % len(_COLORS)], _DASHES[number // len(_COLORS) % len(_DASHES)]
            own = (shade, dashes) if len(runs) > 1 else None
            _draw_loss(top, run, by, scale, color, own)
            bottom.plot(*_thin(run.axes[by] / scale, run.rate), **_look(own, color["line"]), linewidth=1.2)
        if len(runs) == 1 and by == "step":
            _tokens_above(top, runs[0])
        bottom.set_xlabel(label)
        bottom.set_ylabel("learning rate")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        bottom.set_ylim(bottom=0)
        units = sorted({run.unit for run in runs})
        top.set_ylabel(f"loss ({' or '.join(units)})")
        figure.suptitle(_label(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs", fontsize=11)
        for axes in (top, bottom):
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_facecolor("none")
        if len(runs) > 1:
            figure.legend(loc="outside lower center", frameon=False, fontsize=8)
        elif top.get_legend_handles_labels()[0]:
            top.legend(frameon=False, fontsize=9)
        try:
            for path in map(Path, files):
                kind = path.suffix[1:].lower()
                metadata = {"Date": None} if kind == "svg" else None  # the same run, the same file
                with atomic_path(path) as aside, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of characters that no font here has
                    figure.savefig(aside, format=kind, metadata=metadata, facecolor="none" if is_dark else "white")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None


def _matplotlib():
    """The library, without the backend that a notebook asks of all that it starts, and may not have for them."""
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    return matplotlib


def _label(name):
    """A run's name as it stands: not as markup, not left out for its first character, and not too long."""
    name = name if len(name) <= 60 else f"{name[:28]} ... {name[-28:]}"
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _look(own, color):
    """The colour and dashes of one of several runs, or of the only one."""
    return {"color": color} if own is None else {"color": own[0], "linestyle": own[1]}


def _draw_loss(axes, run, by, scale, color, own):
    """The losses of a run; with a look of its own, as one of several."""
    x, finite = run.axes[by] / scale, np.isfinite(run.loss)
    name = "" if own is None else f"{_label(run.name)}: "
    if own is None and finite.any():
        each = "each step" if run.axes["step"][-1] == len(x) else "logged steps"
        marker = "." if finite.sum() < 3 else None
        how = {"color": color["raw"], "linewidth": 0.7, "marker": marker, "label": f"training, {each}"}
        axes.plot(*_thin(x, run.loss), **how)
    if finite.sum() >= 20:
        smooth = np.full(len(x), np.nan)
        smooth[finite] = _smooth(run.loss[finite], reach=max(3, int(finite.sum()) // 40))
        how = {"linewidth": 1.4} if own is None else {"linewidth": 1.0, "alpha": 0.5}
        axes.plot(*_thin(x, smooth), **_look(own, color["line"]), **how, label=f"{name}training, smoothed")
    for key, label in (("train_loss", "training, evaluated"), ("val_loss", "validation")):
        if key not in run.evaluations or (own is not None and key == "train_loss"):
            continue
        steps, values = run.evaluations[key]
        how = _look(own, color["val" if key == "val_loss" else "eval"])
        how |= {"marker": "o", "markersize": 3.5, "linewidth": 1.2, "label": name + label}
        axes.plot(run.at(steps, by) / scale, values, **how)
    if own is not None:
        return
    if run.unigram is not None:
        axes.axhline(run.unigram, color="#737373", linestyle="--", linewidth=1, label="unigram level (validation)")
    if (~finite).any():  # on the lower edge
        edge = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "x", "color": "#cf222e"}
        axes.plot(x[~finite], np.full((~finite).sum(), 0.02), **edge, label="left out: not finite")
    usual = 3 * np.quantile(run.loss[finite], 0.99) if finite.any() else 0
    if usual > 0 and (above := int((run.loss[finite] > usual).sum())):
        top = max(usual, *(values.max() * 1.05 for _, values in run.evaluations.values()), run.unigram or 0)
        axes.set_ylim(top=top)
        axes.plot([], [], linestyle="none", label=f"{above} steps are higher, up to {np.nanmax(run.loss):.3g}")


def _tokens_above(axes, run):
    """A second axis with the tokens that were trained on up to a step."""
    steps, tokens = run.axes["step"], run.axes["tokens"]
    if not len(steps) or not tokens[-1]:
        return
    steps, tokens = np.array([0, *steps]), np.array([0, *tokens])
    each = tokens[-1] / steps[-1]

    def forth(x):  # beyond the ends, as steeply as on the whole
        return np.interp(x, steps, tokens) + each * (np.minimum(x, 0) + np.maximum(x - steps[-1], 0))

    def back(y):
        return np.interp(y, tokens, steps) + (np.minimum(y, 0) + np.maximum(y - tokens[-1], 0)) / each

    size, unit = _unit_of_count(tokens[-1])
    above = axes.secondary_xaxis("top", functions=(lambda x: forth(x) / size, lambda y: back(y * size)))
    above.set_xlabel(f"{unit}tokens".strip(), fontsize=9)
    above.tick_params(labelsize=8)
    above.spines["top"].set_visible(False)


def _scale(runs, by):
    """What to divide an axis by, and its label with the unit."""
    most = max((run.axes[by][-1] for run in runs if len(run.axes[by])), default=1)
    if by == "time":
        size, unit = next(
            (s, u) for s, u in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if most >= 2 * s or s == 1
        )
        return size, f"training time ({unit}; without evaluations and saves)"
    if by == "tokens":
        size, unit = _unit_of_count(most)
        return size, f"{unit}tokens"
    return 1, "step"


def _unit_of_count(most):
    return next(
        (s, u) for s, u in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1, "")) if most >= s or s == 1
    )


def _smooth(values, reach):
    """The mean over `reach` values on either side; near the start over fewer on both, for a loss falls fast there, and
    near the end over those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(0, places - reach), np.minimum(len(values), places + np.minimum(places, reach) + 1)
    return (sums[high] - sums[low]) / (high - low)


def _thin(x, y):
    """A line of very many points as its lowest and highest of each small stretch, which look the same."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(y), _POINTS // 2 + 1).astype(int)
    kept = {0, len(y) - 1}
    for low, high in itertools.pairwise(edges):
        piece = y[low:high]
        kept |= {low + int(np.argmin(piece)), low + int(np.argmax(piece))}  # of a gap, a place in it
        if np.isfinite(piece).any():
            kept |= {low + int(np.nanargmin(piece)), low + int(np.nanargmax(piece))}
    kept = sorted(kept)
    return x[kept], y[kept]


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--by", default="step", choices=AXES, help="what the curves lie over (default: step)")
    parser.add_argument(
        "--output",
        nargs="+",
        help=".png or .svg files to write (default: loss.png and loss.svg in the folder of one run, curves.png and "
        "curves.svg here for several)",
    )
    args = parser.parse_args(argv)
    stem = Path(args.runs[0]) / "loss" if len(args.runs) == 1 else Path("curves")
    files = args.output or [f"{stem}.png", f"{stem}.svg"]
    if odd := [file for file in files if Path(file).suffix.lower() not in (".png", ".svg")]:
        raise InputError(f"--output {odd[0]}: give a file that ends in .png or .svg")
    folders = {Path(folder).resolve(): folder for folder in reversed(args.runs)}  # each once
    runs = [read(folder) for folder in reversed(folders.values())]
    names = [run.name for run in runs]
    for run, folder in zip(runs, reversed(folders.values()), strict=True):
        if names.count(run.name) > 1:  # a/run and b/run
            run.name = folder
    draw(runs, files, args.by)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    sys.exit(main())
