"""Save beside the training: copy tensors to host memory, and write them in a thread while the next steps run.

One checkpoint is in flight at a time. Hashing and writing release the interpreter's lock, so a thread is enough: the
copy need not be passed to another process.
"""

import itertools
import json
import math
import threading
import time
import weakref
from contextlib import suppress

import torch

from . import checkpoint
from .data import tokenizer as tokenizers
from .distributed import any_rank, gather
from .errors import CheckpointError, InputError
from .models import export, lora
from .optim import all_finite, optimizer_tensors
from .sharding import num_shards, to_full, to_local

_ALIGNMENT = 64  # bytes
_PEER_SECONDS = 10  # to wait for the parts of other ranks after a failure
_COUNTER = itertools.count()  # of the checkpoints of this process, the same on all ranks


class HostMemory:
    """Host memory for copies of tensors, which the next copy overwrites. It is pinned if the tensors are on a GPU."""

    def __init__(self):
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors, names=None):
        """Return {name: copy} of tensors, or of the named ones.

        With sharded tensors (DTensor) a collective that all ranks call: the rows of each are gathered on all ranks, one
        tensor after the other, and only the named ones are kept.
        """
        names = set(tensors if names is None else names)
        ends = itertools.accumulate(
            -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT if name in names else 0 for name, tensor in tensors.items()
        )
        offsets = dict(zip(tensors, [0, *ends], strict=False))
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        self._reserve(sum(tensors[name].nbytes + _ALIGNMENT for name in names), device)
        copies = {}
        for name, tensor in tensors.items():
            tensor = to_full(tensor.detach())
            if name in names:
                flat = self._buffer[offsets[name] : offsets[name] + tensor.nbytes].view(tensor.dtype)
                copies[name] = flat.view(tensor.shape).copy_(tensor, non_blocking=True)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _reserve(self, size, device):
        if len(self._buffer) >= size:
            return
        self._buffer = torch.empty(size, dtype=torch.uint8)
        if device is not None:  # torch's pinned memory would be rounded up to a power of two
            runtime, address = torch.cuda.cudart(), self._buffer.data_ptr()
            if int(runtime.cudaHostRegister(address, size, 0)) == 0:
                weakref.finalize(self._buffer, runtime.cudaHostUnregister, address)
            else:  # copies are slower; the next launch of a kernel reports the error
                with suppress(RuntimeError):
                    torch.zeros(1, device=device)


class Saver:
    """Writes one checkpoint at a time in a thread.

    At the end of its `with` block it completes the checkpoint in flight, also after an error; after an interruption
    (Ctrl-C) it gives it up, as if the process had been killed.

    Args:
        accelerator: of the run.

    Attributes:
        model_files: the files of the model and the tokenizer but the weights, as bytes by name, once they are known.
    """

    def __init__(self, accelerator):
        self.accelerator, self.model_files, self._in_flight = accelerator, None, None
        self._weights, self._optimizer_state = HostMemory(), HostMemory()
        self._must_stop, self._peer_deadline = False, math.inf

    def must_stop(self):
        return self._must_stop

    def copy_state(self, model, weights, tensors, mailbox=None):
        """Return copies of the weights and of the optimizer's state as files of a checkpoint; see [`checkpoint.save`].

        Args:
            weights: of [`~hf_myllm.models.export.weights_to_save`].
            tensors: of the optimizer's state, the rows of this rank.
            mailbox: if each rank writes a part, so that all call this.
        """
        part, name, suffix = None, export.weights_file(model), ""
        if mailbox is not None:
            parts = export.partition(weights, 1 if lora.is_added(model) else mailbox.world_size)
            part = parts[mailbox.rank] if mailbox.rank < len(parts) else []
            if len(parts) > 1:
                name = f"model-{mailbox.rank + 1:05}-of-{len(parts):05}.safetensors"
            shards = num_shards(model)
            suffix = f"-{mailbox.rank + 1:05}-of-{shards:05}" if shards > 1 else ""
            if mailbox.rank >= shards:  # HSDP: one of the first ranks has the same rows
                tensors = {}
        copies = self._weights.copy(weights, part)
        files = {name: lambda: export.as_stored(model, copies)} if copies else {}
        if tensors:
            files[f"trainer_state/optimizer{suffix}.safetensors"] = self._optimizer_state.copy(tensors)
        return files

    def begin(self, write):
        """Call `write` in a thread. Call [`wait`] before."""

        def call():
            try:
                write()
            except BaseException as error:
                self._error = error

        # no executor: those take no work once the main thread has ended, and a run may be in another thread
        self._in_flight, self._error = threading.Thread(target=call, name="hf_myllm.saver"), None
        self._in_flight.start()

    def is_writing(self):
        return self._in_flight is not None and self._in_flight.is_alive()

    def wait(self):
        """Wait for the checkpoint in flight. A collective.

        Returns:
            CheckpointError if it could not be written, on all ranks; else None.
        """
        problem = None
        if self._in_flight is not None:
            self._in_flight.join()
            if self._error is not None and not isinstance(self._error, CheckpointError):
                raise self._error
            problem, self._in_flight = self._error and str(self._error), None
        problem = next(filter(None, gather(self.accelerator, problem)), None)
        return CheckpointError(problem) if problem else None

    def mailbox(self):
        """Return the [`Mailbox`] of the next checkpoint. All ranks call this."""
        accelerator, key = self.accelerator, f"hf_myllm/save/{next(_COUNTER)}"
        return Mailbox(key, accelerator.process_index, accelerator.num_processes, self._gives_up)

    def _gives_up(self):
        return self._must_stop or time.monotonic() > self._peer_deadline

    def __enter__(self):
        if self.accelerator.num_processes > 1:
            self.accelerator.peers.before_exit = self._complete
        return self

    def __exit__(self, error_type, *_):
        if error_type is not None:
            self._must_stop = not issubclass(error_type, Exception)
        self._complete(math.inf if error_type is None else _PEER_SECONDS)

    def _complete(self, seconds=_PEER_SECONDS):
        self._peer_deadline = time.monotonic() + seconds
        if self._in_flight is not None:
            self._in_flight.join()  # of its error and that of the training, the first one is reported


class Mailbox:
    """Messages between the threads that write the parts of a checkpoint, through the store of the process group.

    They need no collective: the training is using those.
    """

    def __init__(self, key, rank, world_size, gives_up):
        self.rank, self.world_size = rank, world_size
        self._key, self._gives_up = key, gives_up
        self._store = torch.distributed.distributed_c10d._get_default_store()

    def put(self, name, value):
        self._store.set(f"{self._key}/{name}/{self.rank}", json.dumps(value))

    def get(self, name, rank):
        """Wait for what a rank has put there, and return it.

        Raises:
            OSError: the training has ended with an error, and the rank has put nothing there.
        """
        key, delay = f"{self._key}/{name}/{rank}", 0.01
        while not self._store.check([key]):
            if self._gives_up():
                raise OSError(f"rank {rank} has ended")
            time.sleep(delay)
            delay = min(1, delay * 1.5)
        return json.loads(self._store.get(key))


# ---- the checkpoints of a run


def save_checkpoint(run, optimizer, state):
    """Copy the model and the optimizer's state to host memory, and begin to write checkpoint-<step>.

    The training goes on while a thread writes. Rank 0 writes; with FSDP2 each rank writes a part of the weights and its
    rows of the optimizer's state. If the checkpoint before could not be written, wait for this one.

    Raises:
        InputError: a weight is not finite, or neither checkpoint can be written.
    """
    accelerator, model, step = run.accelerator, run.model, state.step
    run.phase = f"the save after step {step}"
    run.reporter.status(f"saving checkpoint-{step}", export.is_large(model))
    problem = run.saver.wait()
    if any_rank(accelerator, not all_finite(to_local(parameter) for parameter in model.parameters())):
        raise InputError(
            f"step {step}: a weight is not finite, so this step is not saved; lower learning_rate, or set grad_clip"
        )
    if accelerator.is_main_process or accelerator.is_fsdp2:
        section, mailbox = run.recipe.run, run.saver.mailbox() if accelerator.is_fsdp2 else None
        weights = export.weights_to_save(model)  # first: it shards what the evaluation left gathered
        tensors = optimizer_tensors(model, optimizer.optimizer)
        if run.weight_average is not None:
            tensors |= run.weight_average.tensors()
        files = run.saver.copy_state(model, weights, tensors, mailbox)
        if accelerator.is_main_process:
            files |= _other_files(run, state)
        is_main, uploads = accelerator.is_main_process, None if state.must_stop else run.uploads
        best_step = state.best_step() if is_main else None

        def write():
            checkpoint.save(section.save_model, step, files, mailbox, run.saver.must_stop)
            if is_main:
                checkpoint.remove_old(section.save_model, section.save_total_limit, best_step, section.keep_every)
            if uploads is not None:
                uploads.begin(step)

        run.saver.begin(write)
    if problem is not None:
        finish_save(run)
        run.reporter.warning(f"{problem}; checkpoint-{step} is saved")


def finish_save(run):
    """Wait until the last checkpoint is complete, on all ranks.

    Raises:
        CheckpointError: it cannot be written.
    """
    run.reporter.status("writing the checkpoint", export.is_large(run.model))
    if (problem := run.saver.wait()) is not None:
        raise problem


def _other_files(run, state):
    """Return the files of a checkpoint that hold no tensors, as bytes by name."""

    def write(folder):
        export.save_without_weights(run.model, folder)
        if run.tokenizer is not None:
            tokenizers.save(run.tokenizer, folder)

    if run.saver.model_files is None:  # they are the same in each checkpoint
        run.saver.model_files = export.read_small_files(write, run.recipe.run.save_model)
    return run.saver.model_files | {checkpoint.STATE: json.dumps(_trainer_state(run, state), indent=1).encode()}


def _trainer_state(run, state):
    """Return trainer_state/state.json as a dict."""
    accelerator = run.accelerator
    content = {
        "step": state.step,
        "num_processes": accelerator.num_processes,
        "precision": accelerator.precision,
        "recipe": run.recipe.identity(),
        "data": run.data_fingerprints(),
        "skipped": state.skipped_steps,
        "best_since": state.best_since,
    }
    if run.recipe.run.keep_every is not None:
        content["milestone"] = state.step % run.recipe.run.keep_every == 0
    if run.branched_from is not None:
        content["branched_from"] = run.branched_from
    if run.recipe.data.streaming:
        content["stream"] = run.train_rows.windows.recent_positions()
    if accelerator.scaler is not None:  # the loss scale of fp16 is learned too
        content["scaler"] = accelerator.scaler.state_dict()
    return content
