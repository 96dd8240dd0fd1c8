"""Ranks, devices, signals and failures; the only module that configures `Accelerator`."""

import gc
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import datasets
import huggingface_hub
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather_object,
    parse_flag_from_env,
)

from .errors import InputError, PeerFailure, RankError, first_line, os_problem
from .peers import Peers
from .precision import allow_tf32, choose_precision, deterministic_algorithms, explain_nondeterminism, preserved_tf32

try:
    import resource
except ImportError:  # on Windows
    resource = None

PREPARATION = "its preparation"  # the phase of a run that has not written to its folder yet
# For a rank that hangs: see peers.py for one that has died, and for work of one rank that others wait for.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_RUN_LOCK = threading.RLock()  # held while a run is open: runs share torch's random state and accelerate's state

# ---- the process


def silence_libraries(log_level="info"):
    """Let the libraries log only errors; with log_level "debug", let them log everything."""
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # from peft's calls


def check_no_other_run():
    """Raise InputError if another thread of this process has a run open."""
    if not _RUN_LOCK.acquire(blocking=False):
        raise InputError(
            "another thread of this process has a run open, and both would use the random state of torch; wait for its "
            "end, or start another process"
        )
    _RUN_LOCK.release()


@contextmanager
def process_settings(log_level="info", deterministic=False):
    """Set log levels, threads, environment variables and determinism for a run, and restore them afterwards.

    Also restores the random state of torch and the state of accelerate. So a run can be started twice in one process,
    from a notebook, a thread, or beside an Accelerator of the caller.

    Yields:
        whether this is the first use of accelerate in the process.

    Raises:
        InputError: another thread has a run open.
    """
    check_no_other_run()
    is_first_use, has_accelerator = not PartialState._shared_state, bool(AcceleratorState._shared_state)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ExitStack() as restore:
        for context in (_RUN_LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices), preserved_tf32()):
            restore.enter_context(context)
        if not has_accelerator:
            restore.callback(AcceleratorState._reset_state, reset_partial_state=is_first_use)
        for state in (os.environ, GradientState._shared_state):
            restore.callback(_set_content, state, dict(state))
        restore.callback(torch.set_num_threads, torch.get_num_threads())
        for library in (transformers, huggingface_hub, datasets):
            restore.callback(library.utils.logging.set_verbosity, library.utils.logging.get_verbosity())
        if transformers.utils.logging.is_progress_bar_enabled():
            restore.callback(transformers.utils.logging.enable_progress_bar)
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
        silence_libraries(log_level)
        _set_num_threads()
        if deterministic:
            restore.enter_context(deterministic_algorithms())
        yield is_first_use


def _set_content(mapping, content):
    mapping.clear()
    mapping.update(content)


def _set_num_threads():
    """Share the machine's cores between its ranks.

    accelerate's launcher sets OMP_NUM_THREADS=1 if it is unset, which halves the speed of two cores. Treat 1 as unset
    (the launcher's default); respect any other value.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = max(cores, torch.get_num_threads())  # OMP_PROC_BIND leaves this thread one of the cores
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def signals_received():
    """Collect SIGINT, SIGTERM, SIGUSR1 (Slurm's warning) and Windows' SIGBREAK in the list that this yields.

    A second Ctrl-C stops at once. A second SIGTERM does not: the launcher and whoever stops the launcher may each send
    one. Outside the main thread Python cannot handle signals, and the list stays empty.
    """
    received, handlers = [], {}

    def receive(signum, frame):
        received.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK"):
            if hasattr(signal, name):
                handlers[getattr(signal, name)] = signal.signal(getattr(signal, name), receive)
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


# ---- ranks


def create_accelerator(precision="auto", trains=True, compile_model=False, log_with=None, run_dir=None):
    """Return the Accelerator of this process; its attribute `precision` is what [`choose_precision`] returned.

    Args:
        precision, trains: see [`choose_precision`].
        log_with, run_dir: names of trackers, and the folder of their files.

    Raises:
        InputError: a tracker's package is missing, or the precision or the launcher's settings do not work here.
        RankError: the other ranks cannot be reached.
    """
    for name in log_with or ():
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log_with: {name} needs its package; pip install {name}")
    os.environ.setdefault("WANDB_SILENT", "true")
    # With True, transformers loads weights on rank 0 only and expects accelerate to broadcast them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"
    timeout = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    # Gradients are views of DDP's buckets: one copy in memory instead of two.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        device = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), **timeout.to_kwargs()).device
        precision = choose_precision(precision, device, trains)
        accelerator = Accelerator(
            mixed_precision={"fp32": "no", "fp8": "bf16"}.get(precision, precision),  # fp8: see convert_to_fp8
            dynamo_plugin=TorchDynamoPlugin(backend="inductor") if compile_model else None,
            kwargs_handlers=[timeout, ddp],
            log_with=log_with,
            project_config=ProjectConfiguration(run_dir, logging_dir=run_dir and str(Path(run_dir) / "tensorboard")),
        )
    except torch.distributed.DistError as error:
        rank = f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"
        raise RankError(f"{rank} cannot reach the others ({first_line(error)[:200]}); see rank 0's error") from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"accelerate's settings do not work here: {first_line(error)}") from None
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise InputError("FSDP1 is not supported; set fsdp_version: 2, as in accelerate_configs/fsdp2.yaml")
        if precision == "fp16":
            raise InputError("precision: fp16 does not work with FSDP2; use bf16")
    accelerator.peers = _find_peers(accelerator)
    precisions = sorted(set(gather(accelerator, precision)))
    accelerator.peers.start()
    if len(precisions) > 1:
        raise InputError(f"precision: auto is {' on some GPUs and '.join(precisions)} on others; choose one")
    accelerator.precision = precision
    allow_tf32(accelerator.device)
    return accelerator


def is_rank_zero():
    """Return whether this is rank 0, before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def rank_name(accelerator):
    return f"rank {accelerator.process_index} of {accelerator.num_processes}"


# Collectives outside of a step: one rank may be hours behind the others, which wait for it in the store.


def wait_for_ranks(accelerator):
    """Wait until all ranks have come here, however long one of them takes."""
    if accelerator.num_processes > 1:
        accelerator.peers.wait()


def any_rank(accelerator, condition):
    """Return on all ranks whether the condition is true on any rank. A collective: all ranks must call it."""
    if accelerator.num_processes == 1:
        return bool(condition)
    wait_for_ranks(accelerator)
    return bool(accelerator.reduce(torch.tensor(int(condition), device=accelerator.device)))


def gather(accelerator, value):
    """Return a list of the values of all ranks, which are pickled. A collective."""
    if accelerator.num_processes == 1:
        return [value]
    wait_for_ranks(accelerator)
    return gather_object([value])


def sum_over_ranks(accelerator, values):
    """Return a dict of numbers summed over the ranks, in double precision. A collective."""
    if accelerator.num_processes == 1:
        return values
    wait_for_ranks(accelerator)
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(sums).tolist(), strict=True))


class StopQuestion:
    """Has any rank received a signal? To be asked before each batch of an evaluation, by all ranks together.

    A collective for each batch would make all ranks wait for the slowest one, batch after batch. They ask each other
    about every two seconds: each question also sums how long their batches took, from which all of them know how many
    batches to go on before the next one.
    """

    def __init__(self, accelerator, signals, clock=time.monotonic):
        self.accelerator, self.signals, self.clock = accelerator, signals, clock
        self.calls, self.next_call, self.asked_at = 0, 1, (0, clock())

    def ask(self):
        """Return whether to stop: on all ranks the same."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals)
        self.calls += 1
        if self.calls <= self.next_call:
            return False
        calls, now = self.calls - self.asked_at[0], self.clock()
        answers = torch.tensor([len(self.signals), (now - self.asked_at[1]) / calls], dtype=torch.float32)
        stopping, seconds = self.accelerator.reduce(answers.to(self.accelerator.device)).tolist()
        each = max(1e-9, seconds / self.accelerator.num_processes)
        self.asked_at, self.next_call = (self.calls, now), self.calls + max(0, min(63, int(2 / each) - 1))
        return stopping > 0


def _find_peers(accelerator):
    if accelerator.num_processes == 1:
        return Peers(None)
    store = torch.distributed.distributed_c10d._get_default_store()
    return Peers(store, accelerator.process_index, accelerator.num_processes)


def end_training(accelerator, owns_process_group=True):
    """Close the trackers, and destroy the process group if this run created it."""
    if accelerator.num_processes > 1:
        accelerator.peers.leave()
        gc.collect()  # a sharded model refers to the process group, which must go before the interpreter exits
    with redirect_stdout(None):
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                print(f"warning: {tracker.name} did not close: {first_line(error)[:200]}", file=sys.stderr)
        accelerator.trackers.clear()
        if owns_process_group:
            accelerator.end_training()
        if "trackio" in sys.modules:  # else it prints at interpreter exit
            with suppress(RuntimeError):  # raised if it never started
                sys.modules["trackio"].finish()


@contextmanager
def explain_failures(accelerator, phase):
    """Turn an error of one rank into one line that names the rank and what it was doing.

    Args:
        phase: called for what this rank was doing.

    Raises:
        RankError: the cause, on the rank that failed first.
        PeerFailure: on the other ranks, which fail only because they cannot reach that one.
    """
    peers, is_single = accelerator.peers, accelerator.num_processes == 1
    peers.phase = phase
    try:
        yield
    except Exception as error:
        if peers.problem is not None:
            raise (error if isinstance(error, RankError) else peers.error()) from None
        if not peers.is_first_failure():
            raise PeerFailure("another rank failed first") from None
        if isinstance(error, InputError):
            if is_single:
                raise
            raise RankError(str(error)) from None  # printed by this rank, whichever it is
        if isinstance(error, torch.OutOfMemoryError):
            problem = f"out of memory; lower batch_size and set total_batch_size to keep the step's size ({error})"
        elif message := explain_nondeterminism(error):
            problem = message
        elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # of the output
            problem = os_problem(error, can_resume=phase() != PREPARATION)
            if is_single:
                raise InputError(problem) from None
        elif is_single:
            raise
        elif _is_peer_failure(error):
            problem = f"{peers.find_dead()}; --init_from resume continues from the newest checkpoint"
        else:
            traceback.print_exc()
            problem = first_line(error)[:300]
        raise RankError(f"{rank_name(accelerator)}, in {phase()}: {problem}") from None


def _is_peer_failure(error):
    """Return whether an error means that another rank cannot be reached."""
    pattern = r"closed by peer|connection reset|broken pipe|read error|remote worker|nccl .*(error|abort)|recvvalue"
    return isinstance(error, torch.distributed.DistError) or bool(re.search(pattern, str(error), re.IGNORECASE))


# ---- the device


def to_device(tensor, device):
    """Copy a host tensor to the device. To CUDA the copy is asynchronous, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncHostCopy:
    """Copies of device tensors on their way to the host, while CUDA goes on with the next step."""

    def __init__(self, *tensors):
        is_cuda = tensors[0].device.type == "cuda"
        self.tensors = [tensor.detach().to("cpu", non_blocking=is_cuda) for tensor in tensors]
        self.event = None
        if is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self):
        """Wait for the copies and return a list of numbers for each tensor."""
        if self.event is not None:
            self.event.synchronize()
        return [tensor.tolist() for tensor in self.tensors]


def peak_memory(accelerator):
    """Return the peak memory of this process in bytes: of its GPU, else of the host; None if unknown."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    if accelerator.device.type == "mps":  # which keeps no peak, but seldom returns memory
        return torch.mps.driver_allocated_memory()
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
