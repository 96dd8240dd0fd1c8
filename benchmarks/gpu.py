"""Check and measure the trainer on one GPU, in one run of eight minutes:

    python benchmarks/gpu.py --output FOLDER [--wheels FOLDER] [--data FOLDER] [--budget 480]

Items run in the order of their priority: the card's ceilings; correctness, while the compiler's caches are filled; the
training steps of this trainer and its alternatives, one at a time; the time to a loss on novels; the rest. Each has a
budget and is skipped, which the output says, if too little time is left. After each item, FOLDER holds everything so
far: results.json, results.md with the tables, and log.txt.

`--rehearse` runs everything at a tiny size, on a GPU or without one. gpu_pack.py makes the folders of wheels (packages
that the machine lacks) and data (the novels) on a machine with a network; see docs/speed.md.
"""

import argparse
import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from processes import Forked, run_items, tail

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pyarrow", "pandas", "xxhash", "numpy", "torch", "transformers", "accelerate")
MARGIN = 4  # seconds at the end
TORCHAO = "torchao"  # the folder that it is installed into, within the work folder


def main():
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--data", type=Path, help="folder with the novels' train.bin and val.bin")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which it ends")
    parser.add_argument("--rehearse", action="store_true", help="run everything at a tiny size")
    parser.add_argument("--only", nargs="+", help="run only the items whose names begin like this")
    # Run one item in this process: its name, the work folder and the device.
    parser.add_argument("--item", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None:
        args.data = args.data.resolve()  # items run in folders of their own
        if not (args.data / "train.bin").exists():
            parser.error(f"--data: no train.bin in {args.data}; gpu_pack.py makes it")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not installed here, and not among the wheels; install it first")
    if args.item:
        return execute(find_items([args.item[0]])[0], Path(args.item[1]), args, args.item[2])
    args.output.mkdir(parents=True, exist_ok=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    code = 1
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
        set_up(Path(work), args.wheels)
        report = Report(args.output, Path(work), args.rehearse)
        run_all(find_items(args.only), Path(work), args, start + args.budget - MARGIN, report)
        code = report.exit_code()
    return code


def set_up(work, wheels):
    """Install the wheels, and set the environment of all processes. Nothing that imports torch may come before."""
    paths = [str(ROOT), os.getenv("PYTHONPATH", "")]
    if wheels is not None:
        files = sorted(wheels.glob("*.whl"))
        if not files:
            raise SystemExit(f"--wheels: no wheel in {wheels}; make them with gpu_pack.py")
        # transformers imports torchao where it can, and that starts CUDA: only the items of fp8 see it.
        torchao = [file for file in files if file.name.startswith("torchao-")]
        install([file for file in files if file not in torchao], work / "site")
        install(torchao, work / TORCHAO)
        paths.insert(0, str(work / "site"))
    sys.path[:0] = paths[:-1]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks for a GPU without starting CUDA, which would bar forking
    threads = str(max(1, (os.cpu_count() or 1) // 4))  # the cache does not depend on the number
    defaults = {"TORCHINDUCTOR_CACHE_DIR": work / "inductor", "TRITON_CACHE_DIR": work / "triton"}
    defaults |= {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))


def install(wheels, folder):
    """Install wheels into a folder that need not exist."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(folder), *map(str, wheels)]
    subprocess.run(command, check=True, timeout=120)


def find_items(names):
    from gpu_items import all_items

    items = all_items()
    chosen = [item for item in items if names is None or any(item.name.startswith(name) for name in names)]
    if not chosen:
        raise SystemExit(f"--only: no such item; there are {', '.join(item.name for item in items)}")
    return chosen


def run_all(items, work, args, deadline, report):
    """Run the items, each in a forked process, and report each when it ends."""
    cores = os.cpu_count() or 1
    limits = {"check": max(1, cores // 4), "warm": max(1, cores // 2), "memory": 60.0}
    # Asked in a process of its own: the others could not use CUDA after it was started in this one.
    probe = Forked(probe_device, work / "probe.log", has_group=True)
    device = "cuda" if probe.wait(60) == 0 else "cpu"

    def start(item):
        return Forked(partial(execute, item, work, args, device), work / f"{slug(item.name)}.log", has_group=True)

    def done(item, status, seconds):
        left = max(0.0, deadline - time.monotonic())
        reason = f"{left:.0f} s are left, and it may take {item.budget:.0f}; raise --budget"
        report.add(item.name, status, seconds, reason if status == "skipped" else None)
        if item.name == "hardware" and "memory" in report.hardware():
            limits["memory"] = 0.9 * report.hardware()["memory"] / 2**30

    if args.rehearse:  # on a slow machine
        items = [item._replace(budget=4 * item.budget) for item in items]
    run_items(items, deadline, limits, start, done)


def probe_device():
    """Exit with 0 if there is a GPU."""
    import torch

    sys.exit(not torch.cuda.is_available())


def execute(item, work, args, device):
    """Run an item in this process; its rows go to a file."""
    if "fp8" in item.name and (work / TORCHAO).exists():
        sys.path.insert(0, str(work / TORCHAO))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(work / TORCHAO), os.getenv("PYTHONPATH", "")])
    import torch
    from gpu_checks import Place

    faulthandler.dump_traceback_later(item.budget - 1)  # what it was doing when its time was up
    if torch.cuda._is_in_bad_fork():  # an import has started CUDA: begin in a new process
        command = [sys.executable, __file__, "--output", str(args.output), "--item", item.name, str(work), device]
        command += ["--data", str(args.data)] if args.data else []
        os.execv(sys.executable, command + ["--rehearse"] * args.rehearse)
    folder = work / slug(item.name)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    with open(work / f"{slug(item.name)}.jsonl", "a") as file:
        write = partial(print_row, file=file)
        item.function(Place(folder, device, args.rehearse, args.data, write))


def print_row(row, file):
    print(json.dumps(row), file=file, flush=True)


def slug(name):
    return "".join(letter if letter.isalnum() else "-" for letter in name)


class Report:
    """The results so far, in results.json, results.md and log.txt of a folder; written after every item."""

    def __init__(self, folder, work, is_rehearsal):
        self.folder, self.work, self.is_rehearsal, self.items = folder, work, is_rehearsal, []
        self.start = time.monotonic()
        (folder / "log.txt").write_text("")

    def add(self, name, status, seconds, reason=None):
        path, log = self.work / f"{slug(name)}.jsonl", self.work / f"{slug(name)}.log"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        item = {"item": name, "status": status, "seconds": round(seconds, 1), "rows": rows}
        if status in ("failed", "timed out"):
            reason = tail(log, 30)
        if reason:
            item["error"] = reason
        self.items.append(item)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"==== {name}: {status}, {seconds:.1f} s\n{tail(log, 200)}")
        for file, text in (("results.json", json.dumps(self.items, indent=1)), ("results.md", self.markdown())):
            partial_file = self.folder / f".{file}"
            partial_file.write_text(text)
            partial_file.replace(self.folder / file)
        shutil.rmtree(self.work / slug(name), ignore_errors=True)
        print(
            f"{time.monotonic() - self.start:6.1f} s  {name}: {status}, {seconds:.1f} s{self.summary(item)}", flush=True
        )

    def summary(self, item):
        bad = [row["check"] for row in item["rows"] if row.get("ok") is False]
        text = "".join(f"\n          WRONG: {check}" for check in bad)
        last = item.get("error", "").strip().splitlines()[-1:]
        return text + "".join(f"\n          {line[:200]}" for line in last)

    def rows(self, key):
        return [row for item in self.items for row in item["rows"] if key in row]

    def hardware(self):
        return (self.rows("versions") or [{}])[0]

    def exit_code(self):
        is_wrong = any(row["ok"] is False for row in self.rows("ok"))
        return int(is_wrong or any(item["status"] in ("failed", "timed out") for item in self.items))

    def markdown(self):
        parts = [self.describe_hardware(), self.describe_speed(), self.describe_novels(), self.describe_checks()]
        parts += [f"```\n{row['profile']}```\n" for row in self.rows("profile")]
        others = [item for item in self.items if item["status"] != "done"]
        parts += [f"- {item['item']}: {item['status']}{self.summary(item)}\n" for item in others]
        return "\n".join(filter(None, parts))

    def describe_hardware(self):
        row = self.hardware()
        if not row:
            return ""
        names = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        driver = f", driver {row['driver']}" if row.get("driver") else ""
        note = "A rehearsal: the numbers mean nothing.\n\n" if self.is_rehearsal else ""
        return (
            f"{note}{names}{driver}, {row['cores']} cores. Copy within the device "
            f"{row['copy_bytes_per_second'] / 1e12:.2f} TB/s, matrix product in bf16 "
            f"{row['matmul_flops'] / 1e12:.0f} TFLOP/s.\n"
        )

    def describe_speed(self):
        rows, ceiling = self.rows("tokens_per_second"), self.hardware().get("matmul_flops")
        if not rows:
            return ""
        lines = [
            "| work | who | tokens/s | ms per step | TFLOP/s | of the matrix product | peak GiB | ours / it |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            same = [r for r in rows if (r["work"], r["peer"], r["precision"]) == (row["work"], "ours", "bf16")]
            ours = sum(r["tokens_per_second"] for r in same) / len(same) if same else None
            speed = row["tokens_per_second"]
            flops = speed * row["flops_per_token"]
            cells = [row["work"], row["peer"] + ("" if row["precision"] == "bf16" else f", {row['precision']}")]
            cells += [f"{speed:,.0f}", f"{1e3 * row['step_tokens'] / speed:.2f}", f"{flops / 1e12:.1f}"]
            cells += [f"{flops / ceiling:.0%}" if ceiling else "", f"{row['peak_bytes'] / 2**30:.1f}"]
            cells.append(f"{ours / speed:.2f}" if ours else "")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def describe_novels(self):
        lines = []
        for row in self.rows("target"):
            losses = ", ".join(f"{loss:.3f} after {step}" for step, loss in row["losses"].items())
            reached = "did not reach" if row["seconds"] is None else f"{row['seconds']:.1f} s of training to"
            lines.append(
                f"Novels: {reached} a validation loss of {row['target']}; {row['total_seconds']:.1f} s for all "
                f"{row['steps']:,} steps; {losses}.\n"
            )
        return "\n".join(lines)

    def describe_checks(self):
        rows = self.rows("ok")
        if not rows:
            return ""
        lines = ["| check | expected | got | ok |", "|---|---|---|---|"]
        for row in rows:
            mark = {True: "yes", False: "**no**", None: "-"}[row["ok"]]
            got = " ".join(str(row["got"]).split()).replace("|", "/")
            lines.append(f"| {row['check']} | {row['expected']} | {got} | {mark} |")
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    code = main() or 0
    sys.stdout.flush()
    os._exit(code)  # a process that cannot be ended must not hold up this one
