"""The curves of a run, or of several over each other: `python -m hf_myllm.plot RUN [RUN2 ...]`.

All of it is read from RUN/metrics.jsonl, in which a run that was stopped goes on where its checkpoint was, so that
there is one line, whatever happened on the way. Time is that of the training steps alone: not of evaluations, saves,
and the hours between a stop and what went on from it.
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError, Parser, exit_on_input_error
from .report import read_metrics, read_run

AXES = {"step": "step", "tokens": "tokens", "time": "training time"}
_POINTS = 4000  # of a line: more than these cannot be told apart, and make a slow picture
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
    tokens = np.cumsum([line.get("tokens", 0) for line in logged] * since) if logged else steps
    start = lines[0].get("time", 0)
    seconds = np.array([line.get("train_seconds", line.get("time", 0) - start) for line in logged], dtype=float)
    evaluations = {}
    for key in ("train_loss", "val_loss"):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            evaluations[key] = np.array(points, dtype=float).T
    return Curves(
        Path(folder).resolve().name,
        {"step": steps, "tokens": tokens, "time": seconds},
        np.array([np.nan if line["loss"] is None else line["loss"] for line in logged], dtype=float),  # one left out
        np.array([line["learning_rate"] for line in logged], dtype=float),
        evaluations,
        about.get("unigram_loss"),
        about.get("unit", "nats per token"),
    )


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    color = _DARK if is_dark else _LIGHT
    style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), color["text"])
    style |= {"axes.edgecolor": color["text"], "grid.color": color["grid"], "svg.fonttype": "none"}
    style |= {"svg.hashsalt": "hf_myllm", "font.family": ["DejaVu Sans", "sans-serif"]}
    with matplotlib.rc_context(style):
        below = 0.2 * len(runs) if len(runs) > 1 else 0  # inches for the names of several
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 5.8 + below), dpi=150, layout="constrained", sharex=True, height_ratios=(4, 1)
        )
        scale, label = _scale(runs, by)
        for number, run in enumerate(runs):
            _draw_loss(top, run, by, scale, color, None if len(runs) == 1 else _COLORS[number % len(_COLORS)])
            x, rates = _thin(run.axes[by] / scale, run.rate)
            bottom.plot(
                x, rates, color=color["line"] if len(runs) == 1 else _COLORS[number % len(_COLORS)], linewidth=1.2
            )
        if len(runs) == 1 and by == "step":
            _tokens_above(top, runs[0])
        bottom.set_xlabel(label)
        bottom.set_ylabel("learning rate")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        bottom.set_ylim(bottom=0)
        units = sorted({run.unit for run in runs})
        top.set_ylabel(f"loss ({' or '.join(units)})")
        figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", fontsize=11)
        for axes in (top, bottom):
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_facecolor("none")
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        elif top.get_legend_handles_labels()[0]:
            top.legend(frameon=False, fontsize=9)
        try:
            for path in map(Path, files):
                aside = path.with_name(path.name + ".partial")
                metadata = {"Date": None} if path.suffix == ".svg" else None  # the same run, the same file
                ground = "none" if is_dark else "white"
                figure.savefig(aside, format=path.suffix[1:], metadata=metadata, facecolor=ground)
                os.replace(aside, path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        finally:
            plt.close(figure)


def _draw_loss(axes, run, by, scale, color, own):
    """The losses of a run; with a colour of its own, as one of several."""
    x, finite = run.axes[by] / scale, np.isfinite(run.loss)
    if own is None and finite.any():
        axes.plot(*_thin(x[finite], run.loss[finite]), color=color["raw"], linewidth=0.7, label="training, each step")
    if finite.sum() >= 20:
        smooth = np.array(_smooth(run.loss[finite].tolist(), reach=int(finite.sum()) // 40))
        how = {"color": color["line"], "linewidth": 1.4, "label": "training, smoothed"}
        if own is not None:
            how = {
                "color": own,
                "linewidth": 0.9,
                "alpha": 0.7,
                "linestyle": ":" if "val_loss" in run.evaluations else "-",
            }
            how["label"] = f"{run.name}: training, smoothed"
        axes.plot(*_thin(x[finite], smooth), **how)
    for key, label in (("train_loss", "training, evaluated"), ("val_loss", "validation")):
        if key not in run.evaluations or (own is not None and key == "train_loss"):
            continue
        steps, values = run.evaluations[key]
        shade = own or color["val" if key == "val_loss" else "eval"]
        label = label if own is None else f"{run.name}: {label}"
        axes.plot(
            run.at(steps, by) / scale, values, color=shade, marker="o", markersize=3.5, linewidth=1.2, label=label
        )
    if own is None and run.unigram is not None:
        axes.axhline(run.unigram, color="#737373", linestyle="--", linewidth=1, label="unigram level (validation)")


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
    """The mean over `reach` values on either side, and over fewer near the ends: without the lag of a running mean."""
    sums = [0.0, *itertools.accumulate(values)]
    smoothed = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)
        smoothed.append((sums[place + side + 1] - sums[place - side]) / (2 * side + 1))
    return smoothed


def _thin(x, y):
    """A line of very many points as its lowest and highest of each small stretch, which look the same."""
    if len(x) <= _POINTS:
        return x, y
    edges = np.linspace(0, len(y), _POINTS // 2 + 1).astype(int)
    kept = {0, len(y) - 1}
    for low, high in itertools.pairwise(edges):
        kept |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
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
    if odd := [file for file in files if Path(file).suffix not in (".png", ".svg")]:
        raise InputError(f"--output {odd[0]}: give a file that ends in .png or .svg")
    runs = [read(folder) for folder in dict.fromkeys(args.runs)]
    names = [run.name for run in runs]
    for run, folder in zip(runs, dict.fromkeys(args.runs), strict=True):
        if names.count(run.name) > 1:  # a/run and b/run
            run.name = folder
    draw(runs, files, args.by)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    sys.exit(main())
