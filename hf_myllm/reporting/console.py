"""The terminal output of a run; what is logged also goes to metrics.jsonl and the trackers."""

import json
import math
import shutil
import sys
import time
import unicodedata
from collections import deque
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError, first_line, printable
from .metrics_log import read_metrics, truncate_metrics

UNTRACKED = ("step", "rows", "time")  # of a line of metrics.jsonl: a number that is no measure


class Reporter:
    """The terminal, the metrics file and the trackers of a run. Only the main process's speaks.

    Args:
        folder: the run's folder; None writes no file.
        start, total_steps: where the run begins and ends.
        is_main: whether this process speaks.
        log_level: what it says: "debug" and "info" all, "warning" what may be wrong, "error" nothing.
        flops: floating-point operations per token over what all devices can do in a second, from which follows what
            share of that is used (MFU; Chowdhery et al. 2022, "PaLM"); 0: not known.
        memory: gives the most bytes that this process has used so far, or None.
    """

    def __init__(
        self,
        folder,
        start,
        total_steps,
        is_main=True,
        log_level="info",
        flops=0.0,
        memory=lambda: None,
    ):
        self.is_main, self.is_quiet, self.warns = is_main, log_level in ("warning", "error"), log_level != "error"
        self.file, self.flops, self.memory = None, flops, memory
        self.trackers = {}  # name -> what is called with the numbers of each line of metrics.jsonl, and its step
        self.lines_seconds = 10  # between progress lines where there is no terminal to redraw
        self.is_terminal = sys.stderr.isatty()
        self.bar = None
        self.last_line = time.monotonic()
        self.clock, self.tokens, self.seconds_before = time.monotonic(), 0, 0.0
        self.recent = deque([(0.0, 0)], maxlen=51)  # seconds and tokens after each of the last 50 steps
        self.start, self.total_steps = start, total_steps
        if is_main and folder is not None:
            path = Path(folder) / "metrics.jsonl"
            try:
                kept = truncate_metrics(path, start, total_steps)
                self.seconds_before = max((line.get("train_seconds", 0.0) for line in kept), default=0.0)
                self.file = open(path, "a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {path}: {error}") from None
        if is_main and self.is_terminal and total_steps > start and not self.is_quiet:
            self.bar = tqdm(
                total=total_steps,
                initial=start,
                desc="starting",
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
                dynamic_ncols=True,
                leave=False,
            )

    def info(self, text=""):
        """A line for the reader, above the progress bar."""
        if self.is_main and not self.is_quiet:
            self._print(text)

    def warning(self, text):
        """A line that a reader must see: something may be wrong."""
        if self.is_main and self.warns:
            self._print(text)

    def error(self, text):
        """A line on stderr: what was asked for was not done, although the run has ended well."""
        if self.is_main:
            print(printable(text), file=sys.stderr, flush=True)

    def show_sample(self, sample):
        """A text of the model's, each line marked as such and no wider than the terminal."""
        room = max(8, shutil.get_terminal_size().columns - 5) if self.is_terminal else 1 << 30
        for line in sample.splitlines():
            for piece in _pieces(printable(line), room):
                self.info(f"  | {piece}".rstrip())

    def _print(self, text):
        text = printable(text)
        if self.bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def log_step(self, step, loss, learning_rate, tokens, grad_norm, rows, write=True):
        """A training step done: `step` counts from 1; `tokens` and the digest of the `rows` are over all processes."""
        if not self.is_main:
            return
        self.tokens += tokens
        elapsed = time.monotonic() - self.clock
        self.recent.append((elapsed, self.tokens))
        then, tokens_then = self.recent[0]
        speed = (self.tokens - tokens_then) / (elapsed - then) if elapsed > then else 0.0
        used = f", {speed * self.flops:.0%} MFU" if self.flops else ""
        left = tqdm.format_interval(elapsed / max(1, step - self.start) * (self.total_steps - step))
        status = f"{left} left, loss {format_loss(loss)}, lr {learning_rate:.2e}, {_short(speed)} tokens/s{used}"
        if self.bar is not None:
            self.bar.set_description_str(status, refresh=False)
            self.bar.update()
        elif not self.is_quiet and time.monotonic() - self.last_line > self.lines_seconds:
            self.last_line = time.monotonic()
            print(f"step {step:{len(str(self.total_steps))}}/{self.total_steps}, {status}", flush=True)
        if write:
            line = {"step": step, "loss": loss, "learning_rate": learning_rate, "tokens": tokens}
            line |= {"grad_norm": grad_norm, "rows": rows}
            line |= {"tokens_per_second": round(speed, 1), "train_seconds": round(self.seconds_before + elapsed, 3)}
            if self.flops:
                line["mfu"] = round(speed * self.flops, 4)
            if (memory := self.memory()) is not None:
                line["peak_memory_gb"] = round(memory / 1e9, 3)
            self.log(line | {"time": round(time.time(), 3)})

    def has_evaluation(self, step):
        """Whether metrics.jsonl holds the evaluation after this step."""
        lines = read_metrics(Path(self.file.name).parent) if self.file is not None else []
        return any(line["step"] == step and "train_loss" in line for line in lines)

    def pause(self):
        """Leave what follows, until [`resume`], out of the tokens per second."""
        self._paused = time.monotonic()

    def resume(self):
        self.clock += time.monotonic() - self._paused

    def log(self, line):
        """A line of metrics.jsonl, and of the trackers."""
        # JSON has no NaN
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if self.file is not None:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                raise InputError(f"cannot write {self.file.name}: {error}; --init_from resume goes on") from None
        values = {key: value for key, value in line.items() if value is not None and key not in UNTRACKED}
        for name, track in list(self.trackers.items()):
            try:
                track(values, step=line["step"])
            except Exception as error:  # whatever befalls a tracker, the run goes on
                self.warning(f"warning: {name} failed, and gets nothing more: {first_line(error)[:200]}")
                del self.trackers[name]

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.file is not None:
            self.file.close()
            self.file = None


def format_loss(value, width=0):
    """A loss as people read it, whatever its size."""
    return f"{value:{width}.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:{width}.2e}"


def _pieces(line, room):
    """A line in pieces of so many columns; characters of East Asia take two (Unicode annex 11)."""
    piece, used = "", 0
    for character in line:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > room:
            yield piece
            piece, used = "", 0
        piece, used = piece + character, used + columns
    yield piece


def _short(number):
    """Three digits that matter, and k or M: so that a line keeps its width."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"
