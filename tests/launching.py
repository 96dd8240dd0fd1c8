"""Start commands of the package as processes of their own.

Importing torch and transformers takes seconds. A process that is forked from a server with the imports done needs none
of them, and shares nothing else: it has its own modules, output, signals and exit code, and can be killed. `start`,
`start_ranks`, `run_command` and `run_in_a_terminal` fork. Use `accelerate_launch` where the launcher is tested, and
`command` with subprocess where an environment variable is read by an import.
"""

import fcntl
import multiprocessing
import os
import pty
import re
import runpy
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CAN_FORK = sys.platform == "linux"
IMPORTED_BEFORE = (
    "hf_myllm.train",
    "hf_myllm.cli",
    "hf_myllm.generate",
    "transformers.models.gpt2",
    "transformers.models.bert",
)
GLOO = "--multi_gpu --mixed_precision no --dynamo_backend no --main_process_port 0"


def command(*arguments, module="hf_myllm.train"):
    return [sys.executable, "-m", module, *map(str, arguments)]


def run_command(*arguments, module="hf_myllm.train", timeout=300, **options):
    """Run a command to its end, and return a `subprocess.CompletedProcess` with its output as text.

    Args:
        options: of `subprocess.run`, as `env`. With any, the command runs in a new interpreter.
    """
    if options or not CAN_FORK:
        options = {"capture_output": True, "text": True, "cwd": ROOT} | options
        return subprocess.run(command(*arguments, module=module), timeout=timeout, **options)
    process = start(*arguments, module=module)
    return subprocess.CompletedProcess(process.args, process.wait(timeout), *process.output())


def accelerate_launch(options, *arguments, **popen_options):
    """Start the training by accelerate's launcher."""
    line = ["accelerate", "launch", *shlex.split(options), "-m", "hf_myllm.train", *map(str, arguments)]
    popen_options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | popen_options
    return subprocess.Popen(line, **popen_options)


def ranks_of(run):
    """Return the process ids of the ranks that a launcher started for a run, by rank."""
    ranks = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (path / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if str(run).encode() in line and b"RANK" in variables:
            ranks.append((int(variables[b"RANK"]), int(path.name)))
    return [pid for _, pid in sorted(ranks)]


# ---- the state of a run


def has_reached(run, step):
    """Return a function that returns whether a run has logged a step, or a later one."""
    path = Path(run) / "metrics.jsonl"

    def reached():
        text = path.read_text(errors="ignore") if path.exists() else ""
        return any(int(logged) >= step for logged in re.findall(r'"step": (\d+),', text))

    return reached


def wait_for(processes, condition, seconds=120):
    """Wait for a state of a run; fail if one of its processes ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < end, "the run did not reach the state"
        time.sleep(0.005)


def kill_at(moments, *arguments):
    """Start a run once for each moment and kill it then, unless it ends before. Return how often it was killed.

    Args:
        moments: functions that return whether the moment has come.
    """
    kills = 0
    for moment in moments:
        process = start(*arguments)
        while process.poll() is None and not moment():
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
    return kills


# ---- forked processes


class Process:
    """A forked process, with the methods of `subprocess.Popen`; its output goes to files, or to a terminal."""

    def __init__(self, arguments, module, environment, patch, terminal):
        self.args, self._folder = [module, *arguments], tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        if terminal is not None:
            self._files = [terminal] * 2
        self._process = _server().Process(target=_run, args=(module, arguments, environment, patch, self._files))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
        return self.returncode

    def output(self):
        """Return what the process has written to stdout and to stderr."""
        return [file.read_text() for file in self._files]

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.output()


def start(*arguments, module="hf_myllm.train", environment=None, patch=None, terminal=None):
    """Start a command in a forked process.

    Args:
        environment: more environment variables.
        patch: a function that the process calls first; of a module that imports nothing of pytest.
        terminal: device that the output goes to.
    """
    environment = {**os.environ, **(environment or {})}
    return Process([str(argument) for argument in arguments], module, environment, patch, terminal)


def run_in_a_terminal(*arguments, columns=80, module="hf_myllm.train", in_new_process=False):
    """Run a command in a terminal.

    Args:
        in_new_process: start a new interpreter instead of a forked process.

    Returns:
        its output, as a list of the pieces that arrived, and its exit code.
    """
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    if in_new_process or not CAN_FORK:
        words = command(*arguments, module=module)
        process = subprocess.Popen(words, stdin=other, stdout=other, stderr=other, cwd=ROOT)
    else:
        process = start(*arguments, module=module, terminal=os.ttyname(other))
    pieces = []
    while (is_alive := process.poll() is None) or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1 if is_alive else 0)[0]:
            pieces.append(os.read(main, 65536))
    os.close(main)
    os.close(other)
    return pieces, process.returncode


def start_ranks(count, *arguments, options=GLOO, patch=None):
    """Start the ranks of a distributed run, each a forked process, with the environment that the launcher gives them.

    Args:
        options: of `accelerate launch`.
    """
    environment = launcher_environment(count, options)
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [start(*arguments, environment=environment | rank, patch=patch) for rank in ranks]


def launcher_environment(count, options):
    """Return the environment that `accelerate launch` with these options gives to all of its ranks on one machine."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = [*shlex.split(options), "--num_processes", str(count), "-m", "hf_myllm.train"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    environment = prepare_multi_gpu_env(launch)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.main_process_port)}
    return environment | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}


def run_ranks(count, *arguments, timeout=300, **how):
    """Run ranks to their end; see [`start_ranks`].

    Returns:
        a `subprocess.CompletedProcess` with the output of all ranks; its return code is 0 if that of all ranks is.
    """
    ranks = start_ranks(count, *arguments, **how)
    codes, outputs = [rank.wait(timeout) for rank in ranks], [rank.output() for rank in ranks]
    return subprocess.CompletedProcess(ranks[0].args, max(map(abs, codes)), *map("".join, zip(*outputs, strict=True)))


@cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_BEFORE))
    return context


def _run(module, arguments, environment, patch, files):
    """Run a module as `python -m` does. The body of a forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    skip_pictures()
    if patch is not None:
        patch()
    sys.argv[1:] = arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def skip_pictures():
    """Write empty pictures: drawing one takes longer than training a tiny model.

    Returns:
        the function that draws.
    """
    from hf_myllm.reporting import plots

    draw, plots.draw = plots.draw, lambda runs, files, by="step": [Path(file).write_bytes(b"") for file in files]
    return draw
