"""What started this process: the launcher's command line, and its end."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from .errors import InputError
from .terminal import join_command


def train_command(num_processes):
    """Return the start of a command that trains, up to the recipe: as this process was started, if it is training."""
    words, program = _launcher_command(), Path(sys.argv[0])
    ends = [i for i, word in enumerate(words) if word.endswith(("hf_myllm.train", "hf_myllm/train.py"))]
    if num_processes > 1:
        return join_command(words[: ends[0] + 1]) if ends else "accelerate launch -m hf_myllm.train"
    module = f"{program.parent.name}.{program.stem}"
    if module in ("hf_myllm.train", "hf_myllm.cli"):
        return f"python -m {module}{' train' * module.endswith('cli')}"
    return "hf-myllm train"


def _launcher_command():
    """Return the words of the command line of this process' launcher, [] without one; a shell is none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
    launchers = {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", "accelerate.commands.launch"}
    index = next((i for i, word in enumerate(words[:4]) if Path(word).name in launchers), None)
    if index is None:
        return []
    if words[index - 1] == "-m":
        return ["python", *words[index - 1 :]]
    return [Path(words[index]).name, *words[index + 1 :]]


def exit_with_parent(parent, signum=9):
    """On Linux, make the kernel send a signal to this process when its parent exits. Return False if it has exited.

    Args:
        signum: default: SIGKILL, a name that Windows lacks.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signum)  # 1: PR_SET_PDEATHSIG
    return os.getppid() == parent


def exit_with_launcher():
    """On Linux, treat the death of the launcher as a SIGTERM: save and exit instead of training on unattended.

    accelerate's launcher does not forward a SIGTERM that it receives. A shell is not a launcher: a process that it
    started may outlive it.

    Raises:
        InputError: the launcher has already exited.
    """
    if not os.path.exists("/proc/self/cmdline"):
        return
    parent, has_launcher = os.getppid(), bool(_launcher_command())
    if has_launcher:
        exit_with_parent(parent, signal.SIGTERM)
    if os.getppid() != parent or (parent == 1 and not has_launcher and "TORCHELASTIC_RUN_ID" in os.environ):
        raise InputError("the launcher exited before its processes had started")
