"""Changes that a test makes to the program in a process of its own; see launching.py. Nothing of pytest is imported."""

import importlib
import os
import sys
import time


def log_compilation():
    """Log graph breaks and recompilations of torch.compile on stderr, as TORCH_LOGS does when torch is imported."""
    import torch

    torch._logging.set_logs(graph_breaks=True, recompiles=True)


def shard_on_cpu():
    """Make accelerate shard on a CPU, where it uses DDP otherwise.

    torch's fully_shard works on a CPU with gloo; only accelerate's choice between DDP and FSDP asks for a GPU.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_and_shard(self, *arguments, fsdp_plugin=None, **options):
        init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init_and_shard


def fail_in_step_4():
    """Raise an error on rank 1 in the fourth step."""
    train = importlib.import_module("hf_myllm.train")
    set_learning_rate = train.set_learning_rate

    def fail(run, optimizer, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("the disk is gone")
        return set_learning_rate(run, optimizer, step)

    train.set_learning_rate = fail


def fail_while_building():
    """Raise an InputError on rank 1 while it reads the data."""
    from hf_myllm import build
    from hf_myllm.errors import InputError

    build_run = build.build_run

    def failing_build(*arguments, **options):
        if os.environ["RANK"] == "1":
            raise InputError("the file is not here: copy it")
        return build_run(*arguments, **options)

    build.build_run = failing_build


def train_online_and_slowly():
    """Use the network, and leave the processor to the process that pushes."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    train = importlib.import_module("hf_myllm.train")
    step = train.training_step

    def slow_step(*arguments):
        time.sleep(0.1)
        return step(*arguments)

    train.training_step = slow_step


def import_again(script):
    """Run a script that imports the package, as if nothing had imported it before, and end the process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_myllm"]:
        del sys.modules[name]
    exec(script, {"__name__": "__main__"})
    sys.exit()


def sleep_while_building():
    """Give collectives two seconds, and let rank 1 sleep for five while it reads the data."""
    from datetime import timedelta

    from hf_myllm import build, distributed

    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=2)
    load_data = build.load_data

    def load_slowly(*arguments, **options):
        time.sleep(5 * int(os.environ["RANK"]))
        return load_data(*arguments, **options)

    build.load_data = load_slowly


def block_in_collectives():
    """Let a collective whose other rank is gone block forever, as NCCL's do, and not raise, as gloo's do."""
    from accelerate import Accelerator

    from hf_myllm.peers import Peers

    def blocking(function):
        def call(*arguments, **options):
            try:
                return function(*arguments, **options)
            except RuntimeError:
                time.sleep(1e6)

        return call

    for name in ("reduce", "backward", "clip_grad_norm_"):
        setattr(Accelerator, name, blocking(getattr(Accelerator, name)))
    if os.environ.get("HF_MYLLM_TEST_SEES") == "0":
        Peers._has_exited = lambda self, rank: False


def slow_disk():
    """Let each flush of a file or a folder take 30 ms, so that a save takes longer than a step."""
    fsync = os.fsync

    def flush(handle):
        time.sleep(0.03)
        fsync(handle)

    os.fsync = flush


def shard_on_slow_disks():
    shard_on_cpu()
    slow_disk()


def shard_on_a_disk_that_fills():
    """Shard; the disk of rank 1 is full while checkpoint-8 is written."""
    shard_on_cpu()
    from hf_myllm import checkpoint

    write = checkpoint.write_safetensors

    def write_until_full(path, *arguments):
        if os.environ["RANK"] == "1" and "checkpoint-8." in str(path):
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    checkpoint.write_safetensors = write_until_full


def import_on_windows():
    """Import every module of the package without the modules, functions and signals that Windows lacks."""
    import pkgutil
    import signal

    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for name in ("sched_getaffinity", "sysconf", "getuid", "register_at_fork", "O_NOFOLLOW", "mkfifo"):
        delattr(os, name)
    for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGPIPE", "SIGHUP", "SIGALRM"):
        delattr(signal, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_myllm"]:
        del sys.modules[name]
    package = importlib.import_module("hf_myllm")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "hf_myllm.")]
    for name in names:
        if not name.endswith(("__main__", "run_stock_model")):
            importlib.import_module(name)
    print(len(names), "modules imported", flush=True)
    os._exit(0)
