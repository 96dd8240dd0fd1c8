"""Compare training throughput: this trainer and its alternatives.

    python benchmarks/throughput.py quickstart                       # GPT of 0.94M, 16 x 128, on a CPU
    python benchmarks/throughput.py busy --peers ours Trainer        # the same, beside a busy process of low priority
    python benchmarks/throughput.py laptop --precision bf16          # GPT of 14M, 16 x 256, on a CPU with bf16
    python benchmarks/throughput.py gpt --compile --precision bf16 \\                       # on a GPU
        --peers ours isolated single-file stock Trainer Trainer-eager
    python benchmarks/throughput.py llama llama_1b --compile --precision bf16
    python benchmarks/throughput.py bert --compile --precision bf16 --peers ours stock stock-eager

Peers:
    ours           this trainer
    isolated       this trainer with `packing: documents`; documents have 300 tokens on average
    muon           this trainer with `optimizer: muon`
    deterministic  this trainer with `deterministic: true`
    single-file    a GPT and its loop in plain torch, in nanoGPT's published setting: no biases, autocast, fused AdamW,
                   a loss read every 10 steps
    stock          the stock model in a plain accelerate loop that reads its loss at each step
    Trainer        the transformers Trainer
    stock-eager, Trainer-eager   the same, not compiled when --compile is given

The peers run in turn, several times, each in its own process, on the same rows of random tokens, with clipping at 1.0
and fused AdamW. Steps are timed after a warmup. No peer saves its model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from peers import PEERS, ROOT, WORKS, child_environment, run_peer, write_corpus


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "works", nargs="*", default=["quickstart"], choices=WORKS, metavar="WORK", help=", ".join(WORKS)
    )
    parser.add_argument("--peers", nargs="+", default=["ours", "stock", "Trainer"], choices=PEERS)
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each peer")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16", "fp8"))
    parser.add_argument("--compile", action="store_true", help="compile all peers")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the CPU time of one thread, where other work disturbs"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    results = {"versions": versions(), "precision": args.precision, "compile": args.compile, "works": {}}
    for work in args.works:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(WORKS[work], folder, args.steps + args.warmup)
            runs = {peer: [] for peer in args.peers}
            for _ in range(args.repeats):
                for peer in args.peers:
                    runs[peer].append(measure(peer, work, folder, args))
        results["works"][work] = show(work, runs)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(peer, work, folder, args):
    """Return tokens per second and peak memory (bytes) of one run in its own process."""
    clock = "cpu" if args.cpu_time else "wall"
    options = [args.precision, "compile" if args.compile else "eager", args.warmup, args.steps, clock]
    command = [sys.executable, __file__, "--peer", peer, work, folder, *options]
    environment = child_environment() | {"HF_HUB_OFFLINE": "1"}
    with busy_process() if WORKS[work].is_shared else nullcontext():
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy_process(niceness=5):
    """Keep a core busy with a process of lower priority and of another session, as other programs are.

    Linux may share the cores between sessions first (sched_autogroup), whatever the priorities.
    """
    script = f"import os\nos.nice({niceness})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def run_one(peer, work, folder, precision, mode, warmup, steps, clock):
    """Train one peer in this process; print the result as JSON."""
    if clock == "cpu":
        import torch

        torch.set_num_threads(1)
        torch.set_num_threads = lambda count: None  # all peers ask for all cores
        time.perf_counter = time.monotonic = time.process_time
    result = run_peer(peer, WORKS[work], folder, precision, mode == "compile", int(warmup), int(steps))
    print(json.dumps(result))


def show(work, runs_of):
    """Print medians over the rounds, of speeds and of their ratios to ours; return the measurements of each peer."""
    shape = WORKS[work]
    print(f"\n{work}: {shape.family}, {shape.task}, {shape.rows} x {shape.length} tokens per step")
    result, ours = {}, [tokens for tokens, _ in runs_of.get("ours", [])]
    for peer, runs in runs_of.items():
        speeds, memory = [tokens for tokens, _ in runs], max(memory for _, memory in runs) / 1e9
        ratio = statistics.median(a / b for a, b in zip(ours or speeds, speeds, strict=True))
        result[peer] = {"tokens_per_second": speeds, "peak_memory_gb": memory, "ours_over_it": ratio}
        print(
            f"  {peer:<13} {statistics.median(speeds):>12,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
            f"{memory:.2f} GB; ours is {ratio:.2f} times as fast"
        )
    return result


def versions():
    import accelerate
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    names = {"torch": torch, "transformers": transformers, "accelerate": accelerate}
    return {name: module.__version__ for name, module in names.items()} | {"device": device}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        run_one(*sys.argv[2:])
    else:
        main()
