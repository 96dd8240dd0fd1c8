"""Time a checkpoint and a restart: `python benchmarks/checkpoint.py` (GPT-2's 124M parameters by default).

Compares our checkpoints with accelerate's save_state followed by save_pretrained, in one process, on the same model,
optimizer and disk. Ours also flushes to the disk and reads every byte again for its digest; `sync` is the cost of
flushing for the other. Loading memory-maps the files, so bytes are read on use. The restart runs real commands, from
the launch to the end of the first step.
"""

import argparse
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
from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors


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
    steps = iter(range(1, 1000))

    def save():
        tensors = optimizer_tensors(model, optimizer)
        path = checkpoint.save(folder / "ours", next(steps), model.save_pretrained, tensors, {"step": 1})
        checkpoint.remove_old(folder / "ours", 2)
        return path

    rows = {}
    rows["checkpoint.save"], path = median(save, repeats)
    rows["checkpoint.find, with digests"], _ = median(lambda: checkpoint.find_latest(folder / "ours"), repeats)
    rows["load the optimizer"], _ = median(
        lambda: load_optimizer_tensors(model, optimizer, checkpoint.OptimizerFiles(path)), repeats
    )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)

    def save_state():
        accelerator.save_state(folder / "state")
        accelerator.unwrap_model(prepared).save_pretrained(folder / "state" / "model")

    rows["accelerate's save_state and save_pretrained"], _ = median(save_state, repeats)
    rows["sync"], _ = timed(os.sync)
    rows["accelerate's load_state"], _ = median(lambda: accelerator.load_state(folder / "state"), repeats)
    return rows, size


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
    ratio = rows["checkpoint.save"] / (rows["accelerate's save_state and save_pretrained"] + rows["sync"])
    print(f"{size / 1e9:.2f} GB per checkpoint, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, seconds in rows.items():
        print(f"{name:<50}{seconds:8.2f} s")
    print(f"{'checkpoint.save / (save_state + save_pretrained + sync)':<58}{ratio:.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"bytes": size, "seconds": rows, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
