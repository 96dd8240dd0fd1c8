"""What is printed outside of a run's own lines: warnings, and a line that says what goes on."""

import os
import shlex
import shutil
import subprocess
import sys
import time

from .errors import hide_secrets, printable

PIPE_INTERVAL = 10  # seconds between the lines of a [`Status`] if the output is not a terminal
_IS_WINDOWS = os.name == "nt"


def warn(text):
    """Print a warning on stderr, once per machine of a launch."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {printable(hide_secrets(text))}", file=sys.stderr, flush=True)


def showable(text, stream):
    """Return a text with a replacement for control characters, and for characters that a stream cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, errors="replace").decode(encoding)


def plural(count, noun):
    """Return a count with its noun: "1 row", "2 rows"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def first_of(names, limit=3):
    """Return the first names of a list, and how many more there are."""
    return ", ".join(map(str, names[:limit])) + f" and {len(names) - limit} more" * (len(names) > limit)


def join_command(words):
    """Return a command line of some words, quoted as the shell of this system reads them."""
    return subprocess.list2cmdline(words) if _IS_WINDOWS else shlex.join(words)


def _clear_line():
    """Return what clears a line of the terminal: on Windows by spaces, because its older consoles show the sequence."""
    return f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r" if _IS_WINDOWS else "\r\033[K"


class Status:
    """One line on a terminal, which the next one replaces; without a terminal, a line every few seconds.

    Args:
        is_shown: False shows nothing.
    """

    def __init__(self, is_shown=True):
        self.is_shown, self.is_terminal, self.has_line = is_shown, sys.stderr.isatty(), False
        self.phase, self.shown_at = None, 0.0

    def __call__(self, text, is_slow=False):
        """Show a text; without a terminal, at once only if what it says is slow."""
        if not self.is_shown:
            return
        text = showable(text, sys.stderr)
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"{_clear_line()}{text[:width]}", end="", file=sys.stderr, flush=True)
            self.has_line = True
        elif (phase := text.split(" ")[0]) != self.phase and not is_slow:
            self.phase, self.shown_at = phase, time.monotonic()
        elif is_slow or time.monotonic() - self.shown_at > PIPE_INTERVAL:
            print(text, file=sys.stderr, flush=True)
            self.shown_at = time.monotonic()

    def clear(self):
        """Remove the line from the terminal."""
        self.phase = None
        if self.has_line:
            print(_clear_line(), end="", file=sys.stderr, flush=True)
            self.has_line = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.clear()
