"""Each benchmark runs at a small size and writes its measurements; their values are not checked."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
# Everything but what takes a minute: compiling for a CPU.
SLOW_ITEMS = ("resume", "deterministic", "fsdp2", "ddp", "waiting", "fp8", "fp16", "warm", "forget", "gpt", "llama")
sys.path.append(str(BENCHMARKS))
import rank_memory  # noqa: E402
from gpu import Report  # noqa: E402
from processes import ALONE, Forked, Item, run_items  # noqa: E402


def run(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


@pytest.mark.benchmark
def test_checkpoint(tmp_path):
    small = ["--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--vocab_size", 300, "--repeats", 1]
    result = run("checkpoint", *small, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["seconds"]) == 12
    assert all(seconds >= 0 for seconds in results["seconds"].values())
    assert all(name in result.stdout for name in results["seconds"])


@pytest.mark.benchmark
def test_throughput(tmp_path):
    peers = ["ours", "isolated", "muon", "single-file", "stock", "Trainer"]
    small = ["tiny", "--steps", 3, "--warmup", 2, "--repeats", 1, "--peers", *peers]
    result = run("throughput", *small, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["works"]["tiny"]
    assert set(results) == set(peers)
    assert all(peer["tokens_per_second"][0] > 0 and peer["ours_over_it"] > 0 for peer in results.values())


@pytest.mark.benchmark
def test_finetune(tmp_path, assets):
    small = ["g2p", "--seeds", 0, "--threads", 1, "--words", 300, "--flags", "--max_steps 3 --warmup_steps 1"]
    result = run("finetune", *small, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["g2p"]
    assert set(results) == {"ours", "Trainer"}
    assert all(values["CPU seconds"][0] > 0 and values["token errors, %"][0] > 0 for values in results.values())


@pytest.mark.benchmark
def test_startup(tmp_path, stories):
    flags = ["--train_file", stories, "--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--repeats", 1]
    result = run("startup", *flags, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(len(results[name]) == 1 and results[name][0] > 0 for name in ("imports", "cold", "warm"))


@pytest.mark.benchmark
def test_time_to_loss(tmp_path, stories):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"config: {{n_layer: 1, n_head: 2, n_embd: 32}}\ndata: {{train_file: {stories}, max_len: 32, "
        "tokenizer: {train: bpe, vocab_size: 300}}\ntraining: {max_steps: 40, learning_rate: 3.0e-3}\n"
    )
    options = ["--target", 5, "--eval_freq", 10, "--json", tmp_path / "results.json"]
    settings = ["--setting", "--optimizer muon", "--setting", "--learning_rate 1e-9"]
    result = run("time_to_loss", recipe, *options, *settings)
    assert result.returncode == 0, result.stderr
    first, second = json.loads((tmp_path / "results.json").read_text())
    assert first["val_loss"] <= 5
    assert first["seconds"] > 0
    assert second["seconds"] is None


@pytest.mark.benchmark
def test_data(tmp_path, stories):
    result = run("data", "--text", stories, "--batches", 2, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ours"]["tokens"] == results["map"]["tokens"] > 4000
    assert results["ratio"] > 0
    assert results["feed"]["ratio"] > 0


def rehearse(folder, items, *arguments):
    """Rehearse items of the GPU benchmark on this CPU; return what it wrote, by item."""
    result = run("gpu", "--output", folder, "--rehearse", *arguments, "--only", *items)
    results = {item["item"]: item for item in json.loads((folder / "results.json").read_text())}
    return result, results


def assert_all_right(result, results):
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(item["status"] == "done" for item in results.values())
    assert all(row.get("ok") is not False for item in results.values() for row in item["rows"])


@pytest.mark.benchmark
def test_the_gpu_benchmark_checks_and_measures(tmp_path):
    items = ["hardware", "gradients", "isolation", "skipped step", "muon", "dropout", "bert", "novels"]
    result, results = rehearse(tmp_path, items)
    assert_all_right(result, results)
    assert [item for item in results if not item.startswith("bert")] == [*items[:-2], "novels"]
    assert sum(row["ok"] for row in results["gradients"]["rows"]) == 18  # 3 families, 2 precisions, 3 errors
    table = (tmp_path / "results.md").read_text()
    assert "| bert | stock-eager |" in table
    assert "| muon: tensors unchanged by a skipped step |" in table
    assert "==== novels: done" in (tmp_path / "log.txt").read_text()


@pytest.mark.chaos
def test_the_gpu_benchmark_in_full(tmp_path):
    result, results = rehearse(tmp_path, [*SLOW_ITEMS, "profile"])
    assert_all_right(result, results)
    assert "| fsdp2: validation loss of the stock class |" in (tmp_path / "results.md").read_text()


@pytest.mark.chaos
def test_a_rank_of_fsdp2_needs_no_more_host_memory_than_its_share():
    """44M parameters in four ranks: a tensor that each of them loads, gathers or copies whole would be seen."""
    results = rank_memory.run("0.04B", 4, with_step=True)
    assert len(results) == 6
    for phase, sizes in results.items():
        assert sizes["peak"] < 1.3 * sizes["share"] + 2e7, phase


def test_the_gpu_benchmark_reports_what_was_skipped_or_is_wrong(tmp_path, capsys):
    report = Report(tmp_path, tmp_path, is_rehearsal=True)
    (tmp_path / "muon.jsonl").write_text('{"check": "error of Muon", "expected": "0", "got": "1", "ok": false}\n')
    report.add("muon", "done", 1.0)
    report.add("novels", "skipped", 0.0)
    assert report.exit_code() == 1
    text = (tmp_path / "results.md").read_text()
    assert "| error of Muon | 0 | 1 | **no** |" in text
    assert "- novels: skipped" in text
    assert [item["status"] for item in json.loads((tmp_path / "results.json").read_text())] == ["done", "skipped"]
    printed = capsys.readouterr().out
    assert "WRONG: error of Muon" in printed
    assert "novels: skipped" in printed


def test_items_that_hang_or_fail_end_and_the_others_run(tmp_path):
    """In lanes, with what runs alone between them."""
    times, ended = {}, {}

    def start(item):
        times[item.name] = [time.monotonic()]
        return Forked(item.function, tmp_path / "log.txt", has_group=True)

    def done(item, status, seconds):
        times.setdefault(item.name, []).append(time.monotonic())
        ended[item.name] = status

    def hang():
        (tmp_path / "child").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)

    def fail():
        raise RuntimeError("out of luck")

    items = [
        Item("hang", 0.5, hang, "check"),
        Item("fail", 9, fail, "check"),
        Item("side", 9, lambda: time.sleep(0.2), "warm"),
        Item("large", 9, lambda: None, "warm", memory=9),
        Item("alone", 9, lambda: None, ALONE),
        Item("after", 9, lambda: None, "warm"),
        Item("long", 99, hang, "warm"),
    ]
    run_items(items, time.monotonic() + 20, {"check": 1, "warm": 2, "memory": 10}, start, done)
    assert ended == {
        **dict.fromkeys(("side", "large", "alone", "after"), "done"), "hang": "timed out", "fail": "failed",
        "long": "skipped",
    }  # fmt: skip
    assert times["fail"][0] >= times["hang"][1]  # one check at once
    assert times["side"][0] < times["hang"][1]  # beside the other lane
    assert times["large"][0] >= times["side"][1]  # both together need too much memory
    assert max(times[name][1] for name in ("hang", "fail", "side", "large")) <= times["alone"][0]
    assert times["alone"][1] <= times["after"][0]
    assert "out of luck" in (tmp_path / "log.txt").read_text()
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"  # stopped with its group
