"""What a process owes to those around it: its launcher, the machine's cores, signals, and a quiet terminal."""

import ctypes
import importlib.util
import logging
import os
import re
import signal
import sys
import warnings
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import InputError, RankError, first_line

try:
    import resource
except ImportError:  # of Windows
    resource = None


def silence_libraries(log_level="info"):
    """Leave to the libraries only what a person must read; with "debug", they say all that they have to."""
    if log_level == "debug":
        transformers.utils.logging.set_verbosity_info()
        datasets.utils.logging.set_verbosity(logging.INFO)
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of peft's calls


def exit_with_parent(parent, number=signal.SIGKILL):
    """On Linux, let this process get a signal when the one that has started it ends, however; False when it has."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # 1: PR_SET_PDEATHSIG
    return os.getppid() == parent


def exit_with_launcher():
    """On Linux, take the death of a launcher for a SIGTERM: save and leave, rather than train on unseen.

    accelerate's launcher passes no signal on when it is itself told to end. A shell is not a launcher: what it started
    may outlive it.
    """
    parent = os.getppid()
    try:
        started_by = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return
    launchers = {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", "accelerate.commands.launch"}
    is_launcher = bool(launchers & {Path(argument).name for argument in started_by[:4]})
    if is_launcher:
        exit_with_parent(parent, signal.SIGTERM)
    is_orphan = os.getppid() != parent or (parent == 1 and not is_launcher and "TORCHELASTIC_RUN_ID" in os.environ)
    if is_orphan:
        raise InputError("the launcher has ended before its processes had begun")


def set_num_threads():
    """Let the processes of this machine share its cores.

    accelerate's launcher sets OMP_NUM_THREADS to 1 when it is not set, which halves the speed of two cores; so 1 is
    taken for nobody's wish, and any other number for somebody's.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def create_accelerator(is_compiled, log_with=None, folder=None):
    """The Accelerator of this process.

    Args:
        log_with: names of trackers, which write what they write to files under `folder`.
    """
    for name in log_with or ():
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log_with {name} needs its package: pip install {name}")
    os.environ.setdefault("WANDB_SILENT", "true")
    places = ProjectConfiguration(folder, logging_dir=folder and str(Path(folder) / "tensorboard"))
    # transformers would leave weights out on all but the first process, and expect accelerate to spread them
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"
    # who dies is seen at once; the time is for one process that works while the others wait, as on a large checkpoint
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    # one set of gradients, not two: a parameter's stands where it was received
    sending = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    compiler = TorchDynamoPlugin(backend="inductor") if is_compiled else None
    try:
        accelerator = Accelerator(
            dynamo_plugin=compiler, kwargs_handlers=[patience, sending], log_with=log_with, project_config=places
        )
    except torch.distributed.DistError as error:
        who = f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"
        message = f"{who}: the others cannot be reached ({first_line(error)[:200]}); the first may have said why"
        raise RankError(message) from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"the settings given to accelerate do not work here: {first_line(error)}") from None
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_sharding(accelerator)
    return accelerator


def _check_sharding(accelerator):
    if not accelerator.is_fsdp2:
        raise InputError("FSDP1 is not supported: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(f"{accelerator.mixed_precision} does not go with FSDP2: set mixed_precision: bf16")


def shard_model(accelerator, model, is_compiled):
    """Spread a model's parameters over the processes (FSDP2), each layer gathered as a whole when its turn comes.

    By torch's own fully_shard, as accelerate was configured. accelerate's way into it shards embeddings and head by
    themselves, and fails where they share more than one parameter, as BERT's do; it also adds up gradients in bfloat16,
    and gives the loss in it. What all layers stand on, the embeddings and the head, is gathered with the whole.
    """
    plugin = accelerator.state.fsdp_plugin
    # what bfloat16 is for: the layers' arithmetic. Gradients are added up in fp32
    computed_in = {"no": None, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    options = {"mp_policy": policy, "offload_policy": plugin.cpu_offload}
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        if is_compiled:
            layer.compile()
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)


def cast_to_bf16(model):
    """Let a model's layers hand bfloat16 to one another where autocast computes in it, as FSDP2's policy above does. By
    itself autocast leaves what goes past them in fp32: twice as much to read and write, around each of them."""
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        layer.register_forward_pre_hook(_to_bfloat16)


def _to_bfloat16(layer, inputs):
    hidden_states, *others = inputs
    if torch.is_autocast_enabled(hidden_states.device.type):
        return (hidden_states.bfloat16(), *others)


def end_training(accelerator):
    """End the trackers and the process group."""
    with redirect_stdout(None):
        try:
            accelerator.end_training()
        except Exception as error:
            if not accelerator.trackers:
                raise
            print(f"warning: a tracker did not end well: {first_line(error)[:200]}", file=sys.stderr)
            accelerator.trackers.clear()
            accelerator.end_training()
        if "trackio" in sys.modules:  # which would end once more when Python does, and say so
            with suppress(RuntimeError):  # it was never started
                sys.modules["trackio"].finish()


def is_first_failure():
    """Whether no other process has said before why the run ends: when one has failed, the others fail to reach it, and
    what they would say is no cause."""
    if not torch.distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("hf_myllm/failed", 1) == 1
    except Exception:  # who keeps the store has ended: it was he
        return os.environ.get("RANK", "0") == "0"


def is_peer_failure(error):
    """Whether an error says that other processes cannot be reached, and so that they have failed before."""
    said = r"closed by peer|connection reset|broken pipe|read error|remote worker|nccl .*(error|abort)|recvvalue"
    return isinstance(error, torch.distributed.DistError) or bool(re.search(said, str(error), re.IGNORECASE))


def install_signal_handlers():
    """A list that SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) put their numbers into, and a function that ends that.
    A second Ctrl-C stops at once; a second SIGTERM does not, for one may come from whoever ends the launcher, and one
    from its end."""
    received, before = [], {}

    def receive(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            before[getattr(signal, name)] = signal.signal(getattr(signal, name), receive)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    return received, restore


# ---- the device


# Dense 16-bit FLOP/s of a device, by its name, from NVIDIA's data sheets: A100 (2021), H100 (2023), H200 (2024), L4 and
# L40S (2023), A10 (2021), B200 (2024), and the architecture papers of Ada (RTX 4090), Ampere (RTX 3090), Blackwell (RTX
# 5090; fp32 accumulation). The first that a name contains.
_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def to_device(tensor, device):
    """A tensor of the host on the device. To one of CUDA's it is on its way while both go on, for which it must lie in
    memory that stays where it is (pinned)."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncHostCopy:
    """Numbers of some tensors of one device, on their way to the host while CUDA goes on with what comes next."""

    def __init__(self, *tensors):
        on_cuda = tensors[0].device.type == "cuda"
        self.tensors = [tensor.detach().to("cpu", non_blocking=on_cuda) for tensor in tensors]
        self.is_there = None
        if on_cuda:
            self.is_there = torch.cuda.Event()
            self.is_there.record()

    def read(self):
        """A list for each tensor, once the device has come that far."""
        if self.is_there is not None:
            self.is_there.synchronize()
        return [tensor.tolist() for tensor in self.tensors]


def peak_flops(accelerator):
    """16-bit floating-point operations that all devices can do in a second; 0 where that is not known."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return 0.0
    name = torch.cuda.get_device_name(accelerator.device)
    return accelerator.num_processes * next((flops for part, flops in _FLOPS.items() if part in name), 0.0)


def peak_memory(accelerator):
    """The most bytes that this process has used so far: of its GPU, or else of the machine; None where not known."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
