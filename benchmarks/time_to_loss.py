"""Compare the training time of several settings to a validation loss:

    python benchmarks/time_to_loss.py recipes/quickstart.yaml --target 3.9 --eval_freq 50 \\
        --setting "--optimizer adamw" --setting "--optimizer muon --learning_rate 2e-3"

Each setting is a run of the recipe with these flags, one after the other, each in its own process. The result is the
time of the training steps up to the first evaluation at or below the target (`train_seconds` in metrics.jsonl), without
compilation and evaluations. Nothing is saved: a checkpoint takes the host seconds, while the GPU waits.
"""

import argparse
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from peers import ROOT, Finished, child_environment, run_recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--target", type=float, required=True, help="validation loss, nats per token")
    parser.add_argument("--setting", action="append", default=[], help="flags of one run; may be repeated")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args, flags = parser.parse_known_args()
    results = []
    for setting in args.setting or [""]:
        command = [sys.executable, __file__, "--one", args.recipe, *flags, *shlex.split(setting)]
        done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        lines = json.loads(done.stdout.splitlines()[-1])
        results.append({"setting": setting} | time_to_target(lines, args.target))
        print(describe(results[-1], args.target), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def run_one(argv):
    """Train the recipe of a command line in this process, saving nothing; return the lines of its metrics.jsonl."""
    from hf_myllm import run_folder
    from hf_myllm.models import FAMILIES
    from hf_myllm.recipe.flags import parse

    loop = importlib.import_module("hf_myllm.train")  # not the function of this name
    lines = []
    # evaluate all validation rows, and hardly any training rows
    flags = ["--metric_for_best", "loss", "--eval_iter", "1", "--log_freq", "1", "--save_freq", "null", "--quiet"]
    with (
        tempfile.TemporaryDirectory() as run_dir,
        mock.patch.object(loop, "save_checkpoint"),  # it would be called at each better evaluation
        mock.patch.object(run_folder, "publish_model", side_effect=Finished),
    ):
        run_recipe(parse([*argv, *flags, "--save_model", run_dir], FAMILIES), on_log=lines.append)
    return lines


def time_to_target(lines, target):
    """Return the seconds, steps and tokens that a run needed to reach the target, and its best loss."""
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = [line for line in lines if line.get("val_loss") is not None]
    first = next((line for line in evaluations if line["val_loss"] <= target), None)
    compiling = steps[min(steps)]["train_seconds"]  # the first step includes the compilation
    result = {"best": min(line["val_loss"] for line in evaluations), "seconds": None}
    if first is not None and first["step"] == 0:
        result |= {"seconds": 0.0, "step": 0, "tokens": 0, "val_loss": first["val_loss"]}
    elif first is not None:
        at = steps[first["step"]]
        tokens = sum(line["tokens"] for step, line in steps.items() if step <= first["step"])
        result |= {"seconds": at["train_seconds"] - compiling, "step": first["step"], "tokens": tokens}
        result["val_loss"] = first["val_loss"]
    return result


def describe(result, target):
    name = result["setting"] or "the recipe's own settings"
    if result["seconds"] is None:
        return f"{name}: did not reach {target}; best loss {result['best']:.4f}"
    return (
        f"{name}: {result['val_loss']:.4f} after {result['seconds']:.1f} s, {result['step']:,} steps, "
        f"{result['tokens']:,} tokens; best loss {result['best']:.4f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(sys.argv[2:])))
    else:
        main()
