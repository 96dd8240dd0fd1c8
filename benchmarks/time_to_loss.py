"""Training time to a validation loss, one setting beside another:

    python benchmarks/time_to_loss.py recipes/quickstart.yaml --target 3.9 --eval_freq 50 \\
        --setting "--optimizer adamw" --setting "--optimizer muon --learning_rate 2e-3"

Each setting is a run of the recipe with those flags, one after the other. What counts is the time of the training steps
alone up to the first evaluation at or below the target (`train_seconds` of metrics.jsonl): not of compiling before the
first step, nor of evaluations. On the novels of the anchors the target is 4.06.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--target", type=float, required=True, help="validation loss, nats per token")
    parser.add_argument("--setting", action="append", default=[], help="flags of one run; give it several times")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args, flags = parser.parse_known_args()
    figures = []
    for setting in args.setting or [""]:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "hf_myllm.train", args.recipe, *flags, *shlex.split(setting)]
            command += ["--save_model", str(run), "--save_freq", "null", "--log_freq", "1", "--quiet"]
            # all validation rows each time, and hardly any of training
            command += ["--metric_for_best", "loss", "--final_model", "last", "--eval_iter", "1"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            figures.append({"setting": setting} | reached(run, args.target))
            print(describe(figures[-1], args.target), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def reached(run, target):
    """When a run came to the target: seconds, steps and tokens; and how far it came at all."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = [line for line in lines if line.get("val_loss") is not None]
    first = next((line for line in evaluations if line["val_loss"] <= target), None)
    compiling = steps[min(steps)]["train_seconds"]  # the first step's time, in which it is done
    found = {"best": min(line["val_loss"] for line in evaluations), "seconds": None}
    if first is not None and first["step"] == 0:
        found |= {"seconds": 0.0, "step": 0, "tokens": 0, "val_loss": first["val_loss"]}
    elif first is not None:
        at = steps[first["step"]]
        tokens = sum(line["tokens"] for step, line in steps.items() if step <= first["step"])
        found |= {"seconds": at["train_seconds"] - compiling, "step": first["step"], "tokens": tokens}
        found["val_loss"] = first["val_loss"]
    return found


def describe(figure, target):
    name = figure["setting"] or "as the recipe says"
    if figure["seconds"] is None:
        return f"{name}: not at {target}; the best was {figure['best']:.4f}"
    return (
        f"{name}: {figure['val_loss']:.4f} after {figure['seconds']:.1f} s, {figure['step']:,} steps, "
        f"{figure['tokens']:,} tokens; the best was {figure['best']:.4f}"
    )


if __name__ == "__main__":
    main()
