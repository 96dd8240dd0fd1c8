"""What a person sees of a run: the progress line, metrics.jsonl, and loss.png."""

import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from .errors import InputError


class Report:
    """The terminal and the metrics file of a run. Only the main process's speaks.

    Args:
        folder: the run's folder; None writes no file.
        start, total_steps: where the run begins and ends.
        is_main: whether this process speaks.
    """

    def __init__(self, folder, start, total_steps, is_main=True):
        self.is_main = is_main
        self.file = None
        self.lines_seconds = 10  # between progress lines where there is no terminal to redraw
        self.is_terminal = sys.stderr.isatty()
        self.bar = None
        self.last_line = time.monotonic()
        self.clock, self.clock_tokens = time.monotonic(), 0
        self.start, self.total_steps = start, total_steps
        if is_main and folder is not None:
            path = Path(folder) / "metrics.jsonl"
            try:
                _forget_after(path, start, total_steps)
                self.file = open(path, "a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {path}: {error}") from None
        if is_main and self.is_terminal and total_steps > start:
            self.bar = tqdm(
                total=total_steps,
                initial=start,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left",
                dynamic_ncols=True,
                leave=False,
            )

    def say(self, text=""):
        """A line for the reader, above the progress bar."""
        if self.is_main:
            if self.bar is not None:
                tqdm.write(text)
            else:
                print(text, flush=True)

    def step(self, step, loss, learning_rate, tokens, grad_norm, rows, write=True):
        """A training step done: `step` counts from 1; `tokens` and the digest of the `rows` are over all processes."""
        if not self.is_main:
            return
        self.clock_tokens += tokens
        elapsed = time.monotonic() - self.clock
        speed = self.clock_tokens / elapsed if elapsed else 0.0
        status = f"loss {loss:.4f}, lr {learning_rate:.2e}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_description_str(status, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.last_line > self.lines_seconds:
            self.last_line = time.monotonic()
            left = elapsed / max(1, step - self.start) * (self.total_steps - step)
            print(f"step {step}/{self.total_steps}, {status}, {tqdm.format_interval(left)} left", flush=True)
        if write:
            line = {"step": step, "loss": loss, "learning_rate": learning_rate, "tokens": tokens}
            line |= {"grad_norm": grad_norm, "rows": rows}
            self.write(line | {"tokens_per_second": round(speed, 1), "time": round(time.time(), 3)})

    def has_evaluation(self, step):
        """Whether metrics.jsonl holds the evaluation after this step."""
        lines = read_metrics(Path(self.file.name).parent) if self.file is not None else []
        return any(line["step"] == step and "train_loss" in line for line in lines)

    def pause(self):
        """Leave what follows, until [`resume`], out of the tokens per second."""
        self._paused = time.monotonic()

    def resume(self):
        self.clock += time.monotonic() - self._paused

    def write(self, line):
        """A line of metrics.jsonl."""
        if self.file is not None:
            # JSON has no NaN
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                raise InputError(f"cannot write {self.file.name}: {error}; --init_from resume goes on") from None

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.file is not None:
            self.file.close()
            self.file = None


def read_metrics(folder):
    """The lines of a run's metrics.jsonl; one that a killed process left unfinished is passed over."""
    lines = []
    path = Path(folder) / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
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


def _forget_after(path, step, total_steps):
    """Drop what a killed run logged beyond the checkpoint that is being resumed: those steps are run again, and at the
    last step so is the evaluation, which follows its checkpoint."""
    lines = [line for line in read_metrics(path.parent) if line["step"] <= step] if step else []
    if step == total_steps:
        lines = [line for line in lines if line["step"] < step or "train_loss" not in line]
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)


def plot(folder, unigram=None, unit="nats per token"):
    """Draw RUN/loss.png from RUN/metrics.jsonl: the training loss of each step, smoothed, and both evaluated losses.

    Args:
        unigram: a loss to draw as a level to compare with, in nats per token.
        unit: of the loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder)
    steps = [line for line in lines if line.get("loss") is not None]  # None: a step that was left out
    evaluations = [line for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    if steps:
        x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(x, y, color="#9ecae1", linewidth=0.7, label="training, each step")
        if len(y) >= 20:
            axes.plot(x, _smooth(y, reach=len(y) // 40), color="#08519c", linewidth=1.4, label="training, smoothed")
    for key, color, label in (("train_loss", "#6baed6", "training, evaluated"), ("val_loss", "#d94801", "validation")):
        points = [(line["step"], line[key]) for line in evaluations if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3.5, linewidth=1.2, label=label)
    if unigram is not None:
        axes.axhline(unigram, color="#737373", linestyle="--", linewidth=1, label="unigram level (validation)")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(Path(folder).resolve().name)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    aside = Path(folder) / "loss.png.partial"
    figure.savefig(aside, format="png")
    plt.close(figure)
    os.replace(aside, Path(folder) / "loss.png")


def _smooth(values, reach):
    """The mean over `reach` values on either side, and over fewer near the ends: without the lag of a running mean."""
    sums = [0.0, *itertools.accumulate(values)]
    smoothed = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)
        smoothed.append((sums[place + side + 1] - sums[place - side]) / (2 * side + 1))
    return smoothed
