"""Memory, communication, checkpoints and tokens a day of large models on many GPUs, computed without any.

    python benchmarks/scale.py --write       # the table of docs/scale.md

The models are built on the meta device by the package's own classes, and their sizes go through the formulas that the
package uses: memory as --dry_run estimates it, FLOPs as the MFU counts them. What is assumed is in `ASSUMED` and in
docs/scale.md. Nothing here is measured.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_myllm.models import FAMILIES
from hf_myllm.reporting.flops import flops_per_token, memory_per_rank, peak_flops, unsharded_units

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- benchmarks/scale.py -->\n", "<!-- end -->\n"
GPUS_PER_MACHINE = 8
ASSUMED = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "memory": 80e9 * 0.9,  # the rest: the CUDA context, NCCL's buffers, fragments
    "utilization": 0.4,  # of the peak, counting what is computed twice
    "nvlink": 450e9 * 0.8,  # bytes per second and direction of a GPU
    "network": 50e9 * 0.8,  # of each GPU's adapter
    "pcie": 25e9,  # to pinned memory of the host
    "disk": 2e9,  # a machine writes to the shared disk
    "shared_disk": 50e9,  # all machines together
}


@dataclass
class Job:
    """A model on a number of GPUs. `rows` are of a micro-batch of one GPU."""

    name: str
    gpus: int
    config: dict
    length: int
    rows: int
    rows_per_step: int

    def build(self):
        family = FAMILIES["llama"]
        with torch.device("meta"):
            return family.tasks["causal"](family.config(**self.config, max_position_embeddings=self.length))

    @property
    def micro_batches(self):
        return self.rows_per_step // (self.rows * self.gpus)


def llama(hidden_size, layers, heads, kv_heads, intermediate_size, vocab_size):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes |= {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "vocab_size": vocab_size}
    return sizes | {"tie_word_embeddings": False}


JOBS = (
    Job("1.1B", 8, llama(2048, 22, 32, 4, 5632, 32000), 2048, 8, 256),
    Job("8B", 64, llama(4096, 32, 32, 8, 14336, 128256), 8192, 1, 512),
    Job("70B", 512, llama(8192, 80, 64, 8, 28672, 128256), 8192, 1, 512),
)
LAYOUTS = ("DDP", "FSDP2", "HSDP")


def estimate(job, layout, model):
    """Return the numbers of a row of the table, in bytes, seconds and tokens."""
    shards = {"DDP": 1, "FSDP2": job.gpus, "HSDP": min(job.gpus, GPUS_PER_MACHINE)}[layout]
    recomputes = layout != "DDP"  # as accelerate_configs/fsdp2.yaml
    parameters = model.num_parameters()
    memory = memory_per_rank(
        model,
        job.rows * job.length,
        shards=shards,
        is_16_bit=True,
        checkpoints_layers=recomputes,
        compiles=True,
    )
    flops = flops_per_token(model, job.length) * (4 / 3 if recomputes else 1)
    compute = flops * job.rows_per_step * job.length / job.gpus
    compute /= peak_flops(ASSUMED["gpu"], "bf16") * ASSUMED["utilization"]
    sent, seconds = communication(model, job, shards)
    writers = 1 if shards == 1 else shards  # rank 0, or the ranks of one copy of the model
    checkpoint = 12 * parameters  # fp32 weights and two moments
    disk = min(ASSUMED["shared_disk"], ASSUMED["disk"] * -(-writers // GPUS_PER_MACHINE))
    gathering = 0 if shards == 1 else ring(shards) * 4 * parameters / bandwidth(shards)
    step = max(compute, seconds)
    return {
        "memory": sum(memory.values()),
        "fits": sum(memory.values()) <= ASSUMED["memory"],
        "sent": sent,
        "exposed": seconds / compute,
        "checkpoint": checkpoint,
        "pause": gathering + checkpoint / writers / ASSUMED["pcie"],
        "write": checkpoint / disk,
        "tokens_per_day": 86400 * job.rows_per_step * job.length / step,
        "tokens_per_day_unhidden": 86400 * job.rows_per_step * job.length / (compute + seconds),
    }


def ring(ranks):
    """Return the share of a tensor that a rank sends in a ring that gathers or reduces it."""
    return (ranks - 1) / ranks


def bandwidth(ranks):
    """Return the bytes per second of a GPU in a collective of whole machines: a ring per adapter, or NVLink alone."""
    across = ASSUMED["network"] * GPUS_PER_MACHINE
    return ASSUMED["nvlink"] if ranks <= GPUS_PER_MACHINE else min(ASSUMED["nvlink"], across)


def communication(model, job, shards):
    """Return the bytes that a GPU sends in a step, and the seconds that this takes.

    Gradients are summed in fp32: once per step under DDP, and after each micro-batch where they are sharded. Sharded
    weights are gathered in 16 bits: those of a layer in the forward and in the backward pass, the rest once.
    """
    parameters, copies = model.num_parameters(), job.gpus // shards
    if shards == 1:
        sent = 2 * ring(job.gpus) * 4 * parameters
        return sent, sent / bandwidth(job.gpus)
    _, root = unsharded_units(model)
    sharded = ring(shards) * (2 * (2 * (parameters - root) + root) + 4 * parameters) * job.micro_batches
    copied = 2 * ring(copies) * 4 * parameters / shards * job.micro_batches  # one GPU of each machine
    return sharded + copied, sharded / bandwidth(shards) + copied / ASSUMED["network"]


def render():
    """Return the table in Markdown."""
    lines = [
        "| model, GPUs, tokens per step | layout | GB per GPU | GB sent per GPU and step | sending / computing | "
        "checkpoint | pause, then writing | tokens a day | days for 10^12 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for job in JOBS:
        model = job.build()
        for layout in LAYOUTS:
            row = estimate(job, layout, model)
            tokens = job.rows_per_step * job.length
            name = f"{job.name} on {job.gpus}, {tokens / 1e6:.2g}M, {job.micro_batches} micro-batches of {job.rows} x "
            cells = [f"{name}{job.length}", layout, f"{row['memory'] / 1e9:.0f}"]
            if row["fits"]:
                cells += [f"{row['sent'] / 1e9:.0f}", f"{row['exposed']:.2f}", f"{row['checkpoint'] / 1e9:.0f} GB"]
                cells += [f"{row['pause']:.1f} s, {row['write']:.0f} s"]
                low, high = row["tokens_per_day_unhidden"] / 1e9, row["tokens_per_day"] / 1e9
                cells += [f"{low:.1f} to {high:.1f} billion", f"{1e3 / high:.0f} to {1e3 / low:.0f}"]
            else:
                cells += ["does not fit", "", "", "", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page, table):
    """Return the text of the page with another table."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda match: BEGIN + table + END, page, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/scale.md")
    table = render()
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table, end="")
