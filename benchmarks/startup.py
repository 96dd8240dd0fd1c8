"""Time from the command to the end of the first step: `python benchmarks/startup.py [--recipe FILE] [flags ...]`.

cold: with empty caches of tokenized data and compiled kernels. warm: the same command again. imports: importing torch
and the libraries, for comparison.
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
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args, flags = parser.parse_known_args()
    seconds = {"imports": [], "cold": [], "warm": []}
    for _ in range(args.repeats):
        start = time.time()
        subprocess.run([sys.executable, "-c", "import torch, transformers, accelerate, datasets"], check=True)
        seconds["imports"].append(time.time() - start)
        with tempfile.TemporaryDirectory() as home:
            for name in ("cold", "warm"):
                seconds[name].append(first_step(args.recipe, flags, Path(home), name))
    for name, times in seconds.items():
        print(f"{name:<8} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})")
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1))


def first_step(recipe, flags, home, name):
    """Return the seconds from the command to the end of the first step, which metrics.jsonl records."""
    run = home / name
    environment = os.environ | {"HF_HOME": str(home / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
    flags_of_one_step = ["--max_steps", "1", "--warmup_steps", "0", "--eval_freq", "null", "--save_model", str(run)]
    start = time.time()
    command = [sys.executable, "-m", "hf_myllm.train", recipe, *flags_of_one_step, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["time"] for line in lines if "loss" in line) - start


if __name__ == "__main__":
    main()
