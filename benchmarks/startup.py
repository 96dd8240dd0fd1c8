"""Time to the first step, from the command: `python benchmarks/startup.py [--recipe FILE] [flags of a run ...]`.

Cold: with an empty cache of prepared data and of compiled kernels. Warm: the same command again. For comparison, how
long it takes to import what the trainer stands on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args, flags = parser.parse_known_args()
    seconds = {"imports": [], "cold": [], "warm": []}
    for _ in range(args.repeats):
        began = time.time()
        subprocess.run([sys.executable, "-c", "import torch, transformers, accelerate, datasets"], check=True)
        seconds["imports"].append(time.time() - began)
        with tempfile.TemporaryDirectory() as home:
            for name in ("cold", "warm"):
                seconds[name].append(first_step(args.recipe, flags, Path(home), name))
    for name, times in seconds.items():
        print(f"{name:<8} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})")
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1))


def first_step(recipe, flags, home, name):
    """Seconds from the command to the end of the first step, which metrics.jsonl has the time of."""
    run = home / name
    environment = os.environ | {"HF_HOME": str(home / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
    words = ["--max_steps", "1", "--warmup_steps", "0", "--eval_freq", "null", "--save_model", str(run)]
    began = time.time()
    command = [sys.executable, "-m", "hf_myllm.train", recipe, *words, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["time"] for line in lines if "loss" in line) - began


if __name__ == "__main__":
    main()
