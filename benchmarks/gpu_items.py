"""What gpu.py runs beside its correctness checks, and the list of all items in their order, which is their priority."""

import importlib
import os
import shutil
import statistics
import subprocess
import sysconfig
import time
from functools import partial
from pathlib import Path

import gpu_checks as checks
import numpy as np
import torch
from peers import WORKS, by_ours, flops_per_token, run_peer, shrink, write_corpus
from processes import Item
from throughput import versions
from time_to_loss import run_one, time_to_target

importlib.import_module("hf_myllm.train")  # before the processes of the items are forked
ROOT = Path(__file__).parent.parent
WARMUP, STEPS = 8, 25
TARGET = 4.06  # validation loss of the novels, nats per token
CHECKS = [  # name, budget in seconds, function
    ("gradients", 60, checks.check_gradients),
    ("isolation", 60, checks.check_isolation),
    ("skipped step", 30, checks.check_skipped_step),
    ("muon", 30, checks.check_muon),
    ("dropout", 60, checks.check_dropout),
    ("waiting", 90, checks.check_waiting),
    ("compiled gradients", 120, partial(checks.check_gradients, compiled=True)),
    ("compiled isolation", 120, partial(checks.check_isolation, compiled=True)),
    ("deterministic resume", 120, partial(checks.check_resume, deterministic=True)),
    ("resume", 120, partial(checks.check_resume, deterministic=False)),
    ("fp8", 120, checks.check_fp8),
    ("fsdp2", 120, partial(checks.check_launched, kind="fsdp2")),
    ("ddp", 120, partial(checks.check_launched, kind="ddp")),
    ("fp16", 90, checks.check_fp16),
]
TIMED = [  # work, peer, precision, GiB of the device, budget in seconds
    ("gpt", "ours", "bf16", 16, 60),
    ("gpt", "single-file", "bf16", 24, 60),
    ("gpt", "ours", "bf16", 16, 30),
    ("llama", "ours", "bf16", 17, 45),
    ("llama", "stock", "bf16", 20, 45),
    ("gpt", "isolated", "bf16", 18, 45),
    ("bert", "ours", "bf16", 14, 45),
    ("bert", "stock-eager", "bf16", 26, 45),
    ("llama_1b", "ours", "bf16", 38, 60),
    ("llama_1b", "ours", "fp8", 38, 60),
    ("llama_1b", "stock", "bf16", 45, 60),
    ("gpt", "muon", "bf16", 16, 45),
    ("gpt", "deterministic", "bf16", 16, 45),
]
LATER = [("gpt", "Trainer", "bf16", 24, 60), ("gpt", "stock", "bf16", 24, 60)]
NOVELS = """--max_len 1024 --precision bf16 --compile true --optimizer muon --learning_rate 3e-3 --min_lr 3e-4
    --warmup_steps 50 --total_batch_size 16 --batch_size 16 --max_steps 1200 --eval_freq 100"""


def all_items():
    """Return all items in the order of their priority."""
    items = [Item("hardware", 60, hardware)]
    items += [Item(name, budget, function, "check") for name, budget, function in CHECKS]
    warmed = {timed[:3]: timed for timed in TIMED if not timed[1].endswith("-eager")}.values()
    items += [
        Item(f"warm: {name(*timed[:3])}", 150, partial(time_steps, *timed[:3], warms=True), "warm", timed[3])
        for timed in warmed
    ]
    items.append(Item("warm: novels", 150, partial(time_novels, warms=True), "warm", 12))
    items.append(Item("forget autotuning", 10, forget_autotuning))
    seen = []
    for work, peer, precision, _, budget in TIMED:
        again = " again" if (work, peer, precision) in seen else ""
        seen.append((work, peer, precision))
        items.append(Item(name(work, peer, precision) + again, budget, partial(time_steps, work, peer, precision)))
    items.append(Item("novels", 120, time_novels))
    items += [Item(name(*later[:3]), later[4], partial(time_steps, *later[:3])) for later in LATER]
    return [*items, Item("profile", 60, profile)]


def name(work, peer, precision):
    return f"{work} {peer}" + (f" {precision}" if precision != "bf16" else "")


def hardware(place):
    """Measure the ceilings: a copy within the device's memory, and a matrix product in bf16 on random data."""
    if not (place.on_gpu or place.is_rehearsal):
        raise SystemExit("there is no GPU here; add --rehearse to try everything at a tiny size")
    tools = {"a C compiler": shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")}
    tools["Python.h"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    for name, found in tools.items():
        got, ok = "found" if found else "missing", found if place.on_gpu else None
        place.report(f"{name}, which Triton needs", "found", got, ok)
    row = {"versions": versions(), "cores": os.cpu_count()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        row["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    size, count = (8192, 1 << 31) if place.on_gpu else (256, 1 << 16)
    source = torch.randint(0, 100, (count,), dtype=torch.uint8, device=place.device)
    row["copy_bytes_per_second"] = 2 * count / time_operation(place, partial(torch.empty_like(source).copy_, source))
    left, right = (torch.randn(size, size, device=place.device).bfloat16() for _ in range(2))
    row["matmul_flops"] = 2 * size**3 / time_operation(place, lambda: left @ right)
    if place.on_gpu:
        row["memory"] = torch.cuda.get_device_properties(0).total_memory
    place.write(row)


def time_operation(place, operation, repeats=20):
    """Return the median seconds of an operation."""
    times = []
    for _ in range(3 + repeats):
        if place.on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            operation()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            operation()
            times.append(time.perf_counter() - begin)
    return max(1e-9, statistics.median(times[3:]))


def time_steps(work_name, peer, precision, place, warms=False):
    """Time the steps of a peer. To fill the compiler's caches, take two steps and report nothing."""
    work = WORKS[work_name]
    warmup, steps = (1, 1) if warms or place.is_rehearsal else (WARMUP, STEPS)
    if place.is_rehearsal:
        work = shrink(work, place.on_gpu)
        if not place.on_gpu and precision == "fp8":
            return
    write_corpus(work, place.folder, warmup + steps)
    is_compiled = place.on_gpu  # compiling for a CPU takes a minute
    speed, peak = run_peer(peer, work, place.folder, precision, is_compiled, warmup, steps)
    if not warms:
        row = {"work": work_name, "peer": peer, "precision": precision, "tokens_per_second": speed, "peak_bytes": peak}
        row |= {"step_tokens": work.rows * work.length, "flops_per_token": flops_per_token(work)}
        place.write(row)


def forget_autotuning(place):
    """Remove the choices that the compiler timed while other processes used the device: timed items choose anew."""
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        path.unlink()


def time_novels(place, warms=False):
    """Train a tied Llama of 124M with Muon on 95 novels, and report the time to the target on 5 others."""
    if place.data is None and not place.is_rehearsal:
        raise SystemExit("--data: give the folder of the novels; gpu_pack.py makes it")
    files = [(place.data or place.folder) / name for name in ("train.bin", "val.bin")]
    if place.data is None:
        np.random.default_rng(0).integers(0, 90, 1 << 16).astype(np.uint16).tofile(files[0])
    if place.is_rehearsal:
        files[1] = place.folder / "val.bin"
        np.fromfile(files[0], dtype=np.uint16)[:4200].tofile(files[1])
    flags = [*NOVELS.split(), "--train_file", str(files[0]), "--val_file", str(files[1])]
    flags += ["--tokenizer", "null", "--start_context", "null"]
    if place.is_rehearsal:
        flags += ["--max_steps", "4", "--eval_freq", "2", "--warmup_steps", "2", "--num_hidden_layers", "2"]
    if place.is_rehearsal and not place.on_gpu:
        flags += ["--hidden_size", "32", "--intermediate_size", "64", "--num_attention_heads", "2", "--max_len", "32"]
        flags += ["--num_key_value_heads", "2", "--compile", "false"]
    if warms:
        flags += ["--max_steps", "2", "--eval_freq", "2", "--warmup_steps", "2"]
    lines = run_one([str(ROOT / "recipes" / "llama_small.yaml"), *flags])
    if warms:
        return
    losses = {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}
    seconds = [line["train_seconds"] for line in lines if "train_seconds" in line]
    row = {"target": TARGET, "losses": losses, "total_seconds": seconds[-1] - seconds[0], "steps": max(losses)}
    place.write(row | time_to_target(lines, TARGET))


def profile(place):
    """Report the time of a step by category."""
    work = shrink(WORKS["gpt"], place.on_gpu) if place.is_rehearsal else WORKS["gpt"]
    write_corpus(work, place.folder, 24)
    settings = {"precision": "bf16", "profile": 5, "save_model": str(place.folder / "run")}
    by_ours(work, place.folder, settings, warmup=12, steps=8, is_compiled=place.on_gpu)
    place.write({"profile": (place.folder / "run" / "profile" / "summary.txt").read_text()})
