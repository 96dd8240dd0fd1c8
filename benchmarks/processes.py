"""Run functions in forked processes, which start at once because everything is imported already."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

ALONE = "alone"  # the lane of items beside which nothing runs


class Forked:
    """A function in a forked process; its output goes to a file.

    Args:
        function: called without arguments.
        log: path of a file that its output is added to.
        environment: more environment variables.
        has_group: whether it and the processes that it starts are a group of their own, which [`stop`] ends.
    """

    def __init__(self, function, log, environment=None, has_group=False):
        sys.stdout.flush()
        sys.stderr.flush()
        self.log, self.has_group, self.code, self.started = log, has_group, None, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, environment or {})

    def _run(self, function, environment):
        code = 1
        try:
            if self.has_group:
                os.setpgid(0, 0)
                for signum in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(signum, signal.SIG_DFL)
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(file, number)
                setattr(sys, name, open(number, "w", buffering=1, closefd=False))
            os.environ.update(environment)
            function()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
            if code and not isinstance(exit.code, int):
                print(exit.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        """Return the exit code, negative after a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def stop(self, signum=signal.SIGKILL):
        """Send a signal to the process, and to its group if it has one."""
        try:
            (os.killpg if self.has_group else os.kill)(self.pid, signum)
        except ProcessLookupError:
            return

    def wait(self, seconds):
        """Wait for the end and return the exit code; after `seconds`, stop it and raise TimeoutError."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.stop()
                raise TimeoutError(f"not done after {seconds} seconds: {tail(self.log)}")
            time.sleep(0.01)
        return self.code


def tail(log, lines=20):
    """Return the last lines of a log."""
    if not os.path.exists(log):
        return ""
    with open(log, errors="replace") as file:
        return "".join(file.readlines()[-lines:])


class Item(NamedTuple):
    """A piece of work that runs in a process of its own."""

    name: str
    budget: float  # seconds after which it is stopped
    function: Callable
    lane: str = ALONE  # items of other lanes run side by side, so many of each at once as the lanes say
    memory: float = 2.0  # GiB of the device


def run_items(items, deadline, limits, start, done):
    """Run items in their order, which is their priority.

    An item that runs alone waits for all before it, and those after it wait for it. An item is skipped if less than
    half of its budget is left, and stopped after its budget or at the deadline.

    Args:
        deadline: of `time.monotonic()`.
        limits: lane -> how many of its items run at once, and "memory" -> GiB that all may use together. It may change.
        start: called with an item; returns a [`Forked`].
        done: called with an item, "done", "failed", "timed out" or "skipped", and its seconds.
    """
    waiting, running = list(items), {}
    try:
        while waiting or running:
            for item, process in list(running.items()):
                seconds = time.monotonic() - process.started
                is_late = seconds > item.budget or time.monotonic() > deadline
                if process.poll() is None and not is_late:
                    continue
                process.stop()  # and what it left running
                del running[item]
                done(item, "timed out" if process.code is None else "failed" if process.code else "done", seconds)
            for item in find_startable(waiting, list(running), limits):
                waiting.remove(item)
                if deadline - time.monotonic() < item.budget / 2:
                    done(item, "skipped", 0.0)
                else:
                    running[item] = start(item)
            time.sleep(0.02)
    finally:
        for process in running.values():
            process.stop()


def find_startable(waiting, running, limits):
    """Return the items that can start beside those that run; see [`run_items`]."""
    if waiting and waiting[0].lane == ALONE:
        return [] if running else waiting[:1]
    if any(item.lane == ALONE for item in running):
        return []
    chosen, full = [], set()
    for item in waiting:
        if item.lane == ALONE:
            break
        others = [*running, *chosen]
        has_slot = sum(other.lane == item.lane for other in others) < limits[item.lane]
        has_memory = not others or sum(other.memory for other in others) + item.memory <= limits["memory"]
        if item.lane not in full and has_slot and has_memory:
            chosen.append(item)
        else:
            full.add(item.lane)  # the next ones of its lane do not overtake it
    return chosen
