"""Measure the host memory of each rank of FSDP2: `python benchmarks/rank_memory.py` (4 gloo processes on a CPU).

The ranks make a new Llama, take a step of AdamW with gradients of zero, and save a checkpoint. Then other ranks resume:
they read the weights and the optimizer's state of that checkpoint, and take a step. For each phase a rank reports the
bytes that it has to hold by its end, and its largest resident memory, less that after the imports: what only it holds,
and with pages of files, of which memory-mapped weights are read (RssAnon and RssFile of /proc/self/status, sampled by a
thread every 2 ms).
"""

import argparse
import ctypes
import json
import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from hf_myllm import checkpoint
from hf_myllm.models import FAMILIES, export, loading
from hf_myllm.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from hf_myllm.saver import Saver
from hf_myllm.sharding import shard_model

SIZES = {
    "0.04B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
    | {"vocab_size": 4000},
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 15, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16},
}


def resident():
    """Return the resident memory of this process in bytes: what only it holds, and with pages of files."""
    text = Path("/proc/self/status").read_text()
    own, files = (int(text.split(f"{kind}:")[1].split()[0]) * 1024 for kind in ("RssAnon", "RssFile"))
    return own, own + files


class Phases:
    """Measures the largest resident memory in each `with` block, less that at the start."""

    def __init__(self):
        self.start, self.rows = resident(), {}

    @contextmanager
    def measured(self, name, share):
        """Measure a block, at whose end the rank has to hold `share()` bytes."""
        ctypes.CDLL(None).malloc_trim(0)
        peak, ends = [resident()], threading.Event()

        def sample():
            while not ends.wait(0.002):
                peak[0] = tuple(map(max, peak[0], resident()))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:  # a process does not end before its threads
            ends.set()
            thread.join()
        own, with_files = (value - start for value, start in zip(peak[0], self.start, strict=True))
        self.rows[name] = {"share": share(), "peak": own, "peak with file pages": with_files}


def join(rank, world_size, port):
    """Join the process group; return what stands for accelerate's Accelerator."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=True)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        torch_device_mesh=None,
        process_index=rank,
        num_processes=world_size,
    )


def measure(rank, world_size, port, size, run_dir, resumes, with_step):
    accelerator, phases = join(rank, world_size, port), Phases()
    config = FAMILIES["llama"].config(**{"vocab_size": 32000, "num_key_value_heads": 4} | SIZES[size])
    folder = Path(run_dir, "checkpoint-1") if resumes else None
    share = 0

    def shares(count):
        return lambda: count * share

    with phases.measured("stored model" if resumes else "new model", lambda: share):
        model, _ = loading.build_model("llama", "causal", config, folder, is_trained=resumes, on_meta=True)
        share = sum(parameter.numel() for parameter in model.parameters()) * 4 / world_size
        shard_model(accelerator, model, False)
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    if resumes and with_step:
        with phases.measured("and AdamW's stored state", shares(3)):
            load_optimizer_tensors(model, optimizer, checkpoint.OptimizerFiles(folder))
    if with_step:
        with phases.measured("a step of AdamW, resumed" if resumes else "a step of AdamW", shares(4)):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
    if not resumes:
        with phases.measured("the save", shares(6 if with_step else 2)):
            save(accelerator, model, optimizer, run_dir)
    Path(run_dir, f"{resumes}-{rank}.json").write_text(json.dumps(phases.rows))
    dist.barrier()
    os._exit(0)


def save(accelerator, model, optimizer, run_dir):
    """Do what `save_checkpoint` does."""
    saver = Saver(accelerator)
    mailbox, tensors = saver.mailbox(), optimizer_tensors(model, optimizer)
    files = saver.copy_state(model, export.weights_to_save(model), tensors, mailbox)
    if accelerator.process_index == 0:
        config = json.dumps(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}).encode()
        state = json.dumps({"step": 1}).encode()
        files |= {"config.json": config, checkpoint.STATE: state}
    saver.begin(lambda: checkpoint.save(run_dir, 1, files, mailbox))
    saver._in_flight.join()
    if saver._error is not None:
        raise saver._error


def run(size, world_size, with_step, folder=None):
    """Return {phase: bytes by name}, of each the largest of all ranks.

    Args:
        folder: on the disk that the checkpoint is written to.
    """
    results = {}
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        for resumes in (False, True):
            port = 20000 + (os.getpid() + resumes) % 20000
            arguments = (world_size, port, size, run_dir, resumes, with_step)
            multiprocessing.spawn(measure, arguments, world_size)
            for path in Path(run_dir).glob(f"{resumes}-*.json"):
                for phase, row in json.loads(path.read_text()).items():
                    largest = results.setdefault(phase, row)
                    largest |= {name: max(value, largest[name]) for name, value in row.items()}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--no_step", action="store_true", help="without AdamW's state")
    parser.add_argument("--folder", help="for the checkpoint; default: that of temporary files")
    parser.add_argument("--json", help="file for the measurements")
    arguments = parser.parse_args()
    results = run(arguments.size, arguments.ranks, not arguments.no_step, arguments.folder)
    for phase, sizes in results.items():
        columns = (f"{name} {size / 1e9:.3f} GB ({size / sizes['share']:.2f})" for name, size in sizes.items())
        print(f"{phase}: {', '.join(columns)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(vars(arguments) | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
