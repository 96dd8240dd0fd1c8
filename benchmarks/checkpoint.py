"""Time a checkpoint and a restart: `python benchmarks/checkpoint.py` (GPT-2's 124M parameters by default).

Compares our checkpoints with accelerate's save_state followed by save_pretrained, in turns in one process, on the same
model, optimizer and disk. `pause` is the time until training goes on, `total` until the checkpoint is complete. Ours
also flushes to the disk and computes digests; `sync` is the cost of flushing for the other. The steps of a training
(forward and backward of a matrix product) are timed alone and while a checkpoint is written. The restart runs real
commands, from the launch to the end of the first step.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_myllm import checkpoint
from hf_myllm.distributed import silence_libraries
from hf_myllm.models import export
from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.optim import all_finite, build_optimizer, load_optimizer_tensors, optimizer_tensors
from hf_myllm.saver import Saver


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def median(work, repeats):
    """Return the median time of `work` (seconds) and its last result."""
    runs = [timed(work) for _ in range(repeats)]
    return sorted(seconds for seconds, _ in runs)[repeats // 2], runs[-1][1]


def time_saves(config, folder, repeats):
    accelerator, model = Accelerator(cpu=True), GPTForCausalLM(config)
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    prepared, _ = accelerator.prepare(model, optimizer)
    saver, steps, small = Saver(accelerator), itertools.count(1), {"config.json": b"{}", checkpoint.STATE: b"{}"}

    def begin():
        saver.wait()
        assert all_finite(model.parameters())
        weights, tensors, step = export.weights_to_save(model), optimizer_tensors(model, optimizer), next(steps)
        files = saver.copy_state(model, weights, tensors) | small

        def write():
            checkpoint.save(folder / "ours", step, files)
            checkpoint.remove_old(folder / "ours", 2)

        saver.begin(write)

    timed(begin)  # allocates the memory for the copies
    saver.wait()
    saves = {"pause": [], "total": [], "save_state": [], "save_pretrained after it": [], "sync": []}
    for _ in range(repeats):
        pause, _ = timed(begin)
        rest, problem = timed(saver.wait)
        if problem is not None:
            raise problem
        saves["pause"].append(pause)
        saves["total"].append(pause + rest)
        saves["save_state"].append(timed(lambda: accelerator.save_state(folder / "state"))[0])
        saves["save_pretrained after it"].append(
            timed(lambda: accelerator.unwrap_model(prepared).save_pretrained(folder / "state" / "model"))[0]
        )
        saves["sync"].append(timed(os.sync)[0])
    rows = {name: sorted(seconds)[repeats // 2] for name, seconds in saves.items()}
    path = checkpoint.find_latest(folder / "ours")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    rows["checkpoint.find_latest, with digests"], _ = median(lambda: checkpoint.find_latest(folder / "ours"), repeats)
    rows["load the optimizer"], _ = median(
        lambda: load_optimizer_tensors(model, optimizer, checkpoint.OptimizerFiles(path)), repeats
    )
    rows["accelerate's load_state"], _ = median(lambda: accelerator.load_state(folder / "state"), repeats)
    rows |= time_steps_beside(begin, saver)
    saver.__exit__(None)
    return rows, size


def time_steps_beside(begin, saver, seconds=5):
    """Return the time of a step alone and while checkpoints are written."""
    weights = torch.randn(512, 512, requires_grad=True)

    def step():
        for _ in range(8):
            (torch.randn(512, 512) @ weights).sum().backward()

    times = {"a step alone": [], "a step beside a checkpoint": []}
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end:
        saver.wait()
        times["a step alone"].append(timed(step)[0])
        begin()
        while saver.is_writing():
            times["a step beside a checkpoint"].append(timed(step)[0])
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def time_restarts(sizes, folder):
    """Return the seconds from the command to the end of its first step, for a new run and for a resumed one."""
    (folder / "text.txt").write_text("The cat sees my friend. " * 2000)
    flags = {"train_file": folder / "text.txt", "save_model": folder / "run", "max_len": 32, "batch_size": 1}
    flags |= {"tokenizer": "{train: bpe, vocab_size: 300}", "eval_freq": "null", "allow_changed": "true"} | sizes
    command = [sys.executable, "-m", "hf_myllm.train", *(f"--{key}={value}" for key, value in flags.items())]
    rows = {}
    for name, more in (("first start", ["--max_steps=2"]), ("resume", ["--max_steps=3", "--init_from=resume"])):
        start = time.time()
        subprocess.run([*command, *more], check=True, capture_output=True)
        entries = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        first = next(entry for entry in entries if entry.get("time", 0) > start)
        rows[f"{name}, to the end of its first step"] = first["time"] - start
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the results to")
    arguments = parser.parse_args()
    silence_libraries()
    sizes = {name: getattr(arguments, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
    with tempfile.TemporaryDirectory() as folder:
        rows, size = time_saves(GPTConfig(**sizes), Path(folder), arguments.repeats)
        rows |= time_restarts(sizes, Path(folder))
    peer = rows["save_state"] + rows["save_pretrained after it"]
    ratios = {
        "pause / (save_state + save_pretrained)": rows["pause"] / peer,
        "total / (save_state + save_pretrained + sync)": rows["total"] / (peer + rows["sync"]),
        "a step beside a checkpoint / alone": rows["a step beside a checkpoint"] / rows["a step alone"],
    }
    print(f"{size / 1e9:.2f} GB per checkpoint, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, seconds in rows.items():
        print(f"{name:<50}{seconds:8.2f} s")
    for name, ratio in ratios.items():
        print(f"{name:<50}{ratio:8.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"bytes": size, "seconds": rows, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
