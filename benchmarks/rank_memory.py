"""Measure the host memory of each rank of FSDP2: `python benchmarks/rank_memory.py` (4 gloo processes on a CPU).

Each rank makes its rows of a Llama, of nothing or of a stock folder, and reports the memory that only it holds
(RssAnon of /proc/self/status): after the imports, its peak while the model is made, and after a step of AdamW.
The peak is sampled by a thread every 2 ms. Pages of memory-mapped files are shared, and told apart.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from hf_myllm.models import FAMILIES, loading
from hf_myllm.optim import build_optimizer
from hf_myllm.sharding import shard_model

SIZES = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 15, "num_attention_heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16},
}


def resident(kind="RssAnon"):
    """Return the resident memory of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{kind}:")[1].split()[0]) * 1024


class Peak:
    """The largest RssAnon in a `with` block."""

    def __enter__(self):
        self.value, self._ends = resident(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while not self._ends.wait(0.002):
            self.value = max(self.value, resident())

    def __exit__(self, *_):
        self._ends.set()
        self._thread.join()


def measure(rank, world_size, port, size, folder, with_step, results):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=True)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        torch_device_mesh=None,
    )
    config = FAMILIES["llama"].config(vocab_size=32000, num_key_value_heads=4, **SIZES[size])
    start = resident()
    with Peak() as peak:
        model, _ = loading.build_model("llama", "causal", config, folder, on_meta=True)
        shard_model(accelerator, model, False)
    total = sum(parameter.numel() for parameter in model.parameters()) * 4
    row = {
        "rank": rank,
        "parameters": total // 4,
        "share": total / world_size,
        "start": start,
        "peak": peak.value - start,
    }
    row |= {"after": resident() - start, "file": resident("RssFile")}
    if with_step:
        optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        row["with_adamw"] = resident() - start
    Path(results, f"{rank}.json").write_text(json.dumps(row))
    dist.barrier()
    os._exit(0)


def run(size, world_size, folder, with_step):
    """Return what each rank measured."""
    with tempfile.TemporaryDirectory() as results:
        port = 20000 + os.getpid() % 20000
        multiprocessing.spawn(measure, (world_size, port, size, folder, with_step, results), world_size)
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(world_size)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", help="a stock folder of this size, which is read; default: a new model")
    parser.add_argument("--no_step", action="store_true", help="without AdamW's state")
    arguments = parser.parse_args()
    started = time.process_time()
    for row in run(arguments.size, arguments.ranks, arguments.folder, not arguments.no_step):
        share = row.pop("share")
        print(
            f"rank {row.pop('rank')} of {row.pop('parameters') / 1e6:.0f}M parameters, share {share / 1e9:.3f} GB:",
            end=" ",
        )
        print(", ".join(f"{name} {value / 1e9:.3f} GB ({value / share:.2f})" for name, value in row.items()))
    print(f"{time.process_time() - started:.0f} s of CPU time in the parent")


if __name__ == "__main__":
    main()
