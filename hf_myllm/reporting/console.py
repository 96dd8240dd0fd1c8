"""The terminal output of a run. What is logged also goes to metrics.jsonl, the trackers and the callbacks."""

import math
import shutil
import sys
import textwrap
import time
import unicodedata
from collections import deque

from tqdm import tqdm

from ..errors import first_line, printable
from ..terminal import PIPE_INTERVAL, Status, showable
from .metrics_log import MetricsLog, read_metrics

UNTRACKED = ("step", "rows", "time")  # keys of a logged dict that are not metrics
SPEED_WINDOW = 50  # steps over which tokens per second are averaged
COLUMNS = 80
INDENT = " " * 12  # of lines below one with a label


class Reporter:
    """Prints the progress of a run and logs its metrics. Only rank 0 prints and writes.

    Args:
        run_dir: the run's folder; None writes no file.
        start_step, total_steps: optimizer steps done already, and those at the end.
        is_main: whether this is rank 0.
        log_level: "debug" and "info" print everything, "warning" only warnings, "error" nothing.
        flops: FLOPs per token divided by the peak FLOP/s of all devices, to compute the model FLOPs utilization (MFU;
            Chowdhery et al. 2022, "PaLM"); 0 if unknown.
        memory: a function that returns the peak memory of this process in bytes, or None.
        on_log: called with each dict that is logged. Its exceptions propagate.
        on_evaluate: called with each dict of an evaluation, likewise.

    Attributes:
        trackers: name -> function called as `log(metrics, step=step)`; see [`start_trackers`].
    """

    def __init__(
        self,
        run_dir,
        start_step,
        total_steps,
        is_main=True,
        log_level="info",
        flops=0.0,
        memory=lambda: None,
        on_log=None,
        on_evaluate=None,
    ):
        self.start_step, self.total_steps, self.is_main = start_step, total_steps, is_main
        self.prints_info = is_main and log_level in ("debug", "info")
        self.prints_warnings = is_main and log_level != "error"
        self.flops, self.memory, self.on_log, self.on_evaluate = flops, memory, on_log, on_evaluate
        self.trackers, self.bar, self.status_line = {}, None, Status(self.prints_info)
        self.is_terminal = sys.stderr.isatty()
        writes_file = is_main and run_dir is not None
        self.metrics_log = MetricsLog(run_dir, start_step, total_steps) if writes_file else None
        self.clock = self.last_line = time.monotonic()
        self.tokens = 0
        self.history = deque([(0.0, 0)], maxlen=SPEED_WINDOW + 1)  # (seconds, tokens) after each of the last steps
        if self.prints_info and self.is_terminal and total_steps > start_step:
            self.bar = tqdm(
                total=total_steps,
                initial=start_step,
                desc="starting",
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
                dynamic_ncols=True,
                leave=False,
            )

    # ---- lines

    def info(self, text=""):
        """Print a line above the progress bar."""
        if self.prints_info:
            self._print(text)

    def warning(self, text):
        """Print a line that a user should see: something may be wrong."""
        if self.prints_warnings:
            self._print(text)

    def error(self, text):
        """Print a line on stderr: a request failed, but the run did not."""
        if self.is_main:
            tqdm.write(showable(text, sys.stderr), file=sys.stderr)

    def status(self, text, is_slow=False):
        """Show what goes on between steps, such as an evaluation; see [`Status`]."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        else:
            self.status_line(text, is_slow)

    def show_evaluation(self, step, train_metrics, val_metrics, details=""):
        """Print the losses of an evaluation, and its metrics, in lines of at most 80 columns.

        Args:
            train_metrics, val_metrics: as [`~hf_myllm.evaluation.evaluate_rows`] returns them; the second may be empty.
            details: the task's other metrics in words.
        """
        line = f"step {step:{len(str(self.total_steps))}}: training loss {format_loss(train_metrics['loss'], 7)}"
        if val_metrics:
            line += f", validation {format_loss(val_metrics['loss'], 7)}"
        if details and len(line) + len(details) + 3 <= COLUMNS:
            line, details = f"{line} ({details})", ""
        self.info(line)
        for more in indent(details):
            self.info(more)

    def show_sample(self, sample):
        """Print text that the model generated, wrapped to the terminal's width, each line marked with a bar."""
        width = max(8, shutil.get_terminal_size().columns - 5) if self.is_terminal else 1 << 30
        lines = sample.splitlines()
        # several empty lines are shown as one
        lines = [line for line, before in zip(lines, ["-", *lines], strict=False) if line.strip() or before.strip()]
        for line in lines:
            for piece in _wrap(printable(line), width):
                self.info(f"  | {piece}".rstrip())

    def _print(self, text):
        text = showable(text, sys.stdout)
        self.status_line.clear()
        if self.bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    # ---- metrics

    def log_step(self, step, loss, learning_rate, tokens, grad_norm, rows, write=True):
        """Report a training step.

        Args:
            step: the number of the step, from 1.
            tokens: read in this step by all ranks.
            rows: a digest of the rows that all ranks read.
            write: whether to log the step, beside the progress line.
        """
        if not self.is_main:
            return
        self.tokens += tokens
        seconds = time.monotonic() - self.clock
        self.history.append((seconds, self.tokens))
        seconds_before, tokens_before = self.history[0]
        speed = (self.tokens - tokens_before) / (seconds - seconds_before) if seconds > seconds_before else 0.0
        self._show_progress(step, seconds, loss, learning_rate, speed)
        if not write:
            return
        line = {"step": step, "loss": loss, "learning_rate": learning_rate, "tokens": tokens}
        line |= {"grad_norm": grad_norm, "rows": rows, "tokens_per_second": round(speed, 1)}
        line["train_seconds"] = round((self.metrics_log.train_seconds if self.metrics_log else 0.0) + seconds, 3)
        if self.flops:
            line["mfu"] = round(speed * self.flops, 4)
        if (memory := self.memory()) is not None:
            line["peak_memory_gb"] = round(memory / 1e9, 3)
        self.log(line | {"time": round(time.time(), 3)})

    def _show_progress(self, step, seconds, loss, learning_rate, speed):
        """Update the progress bar or, without a terminal, print a line every few seconds."""
        left = tqdm.format_interval(seconds / max(1, step - self.start_step) * (self.total_steps - step))
        status = f"{left} left, loss {format_loss(loss)}, lr {learning_rate:.2e}, {tqdm.format_sizeof(speed)} tokens/s"
        status += f", {speed * self.flops:.0%} MFU" if self.flops else ""
        if self.bar is not None:
            self.bar.set_description_str(status, refresh=False)
            self.bar.update()
        elif self.prints_info and time.monotonic() - self.last_line > PIPE_INTERVAL:
            self.last_line = time.monotonic()
            print(f"step {step:{len(str(self.total_steps))}}/{self.total_steps}, {status}", flush=True)

    def log(self, line):
        """Write a dict to metrics.jsonl and the trackers, and call the callbacks. A NaN or infinity becomes None."""
        if not self.is_main:
            return
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        if self.metrics_log is not None:
            self.metrics_log.append(line)
        metrics = {key: value for key, value in line.items() if value is not None and key not in UNTRACKED}
        for name, track in list(self.trackers.items()):
            try:
                track(metrics, step=line["step"])
            except Exception as error:
                self.warning(f"warning: {name} failed and is not used any more: {first_line(error)[:200]}")
                del self.trackers[name]
        if self.on_log is not None:
            self.on_log(dict(line))
        if self.on_evaluate is not None and "train_loss" in line:
            self.on_evaluate(dict(line))

    def has_evaluation(self, step):
        """Return whether metrics.jsonl holds the evaluation after this step."""
        lines = read_metrics(self.metrics_log.run_dir) if self.metrics_log is not None else []
        return any(line["step"] == step and "train_loss" in line for line in lines)

    # ---- time

    def pause(self):
        """Stop the clock of the training time, for an evaluation or a save."""
        self._paused = time.monotonic()

    def resume(self):
        self.clock += time.monotonic() - self._paused

    def close(self):
        """Close the progress bar and metrics.jsonl."""
        self.status_line.clear()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.metrics_log is not None:
            self.metrics_log.close()
            self.metrics_log = None


def describe_loss(task, metrics):
    """Return the loss of an evaluation, with the task's other metrics in parentheses."""
    details = task.describe_metrics(metrics)
    return format_loss(metrics["loss"]) + (f" ({details})" if details else "")


def indent(text):
    """Return a text as lines of at most 80 columns, below the column of labels."""
    return textwrap.wrap(text, COLUMNS, initial_indent=INDENT, subsequent_indent=INDENT)


def format_loss(value, width=0):
    """Return a loss with four decimals, or in scientific notation where that would not fit."""
    return f"{value:{width}.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:{width}.2e}"


def _wrap(line, width):
    """Yield a line in pieces of at most `width` columns; wide East Asian characters take two (Unicode annex 11)."""
    piece, used = "", 0
    for character in line:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > width:
            yield piece
            piece, used = "", 0
        piece, used = piece + character, used + columns
    yield piece
