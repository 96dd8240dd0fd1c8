"""Each benchmark runs, at a small size, and says what it measures; how fast is nobody's business here."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.benchmark


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_checkpoint(tmp_path):
    small = ["--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--vocab_size", 300, "--repeats", 1]
    result = run("checkpoint", *small, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["seconds"]) == 8
    assert all(seconds >= 0 for seconds in figures["seconds"].values())
    assert all(name in result.stdout for name in figures["seconds"])


def test_throughput(tmp_path):
    peers = ["ours", "isolated", "single-file", "stock", "Trainer"]
    small = ["tiny", "--steps", 3, "--warmup", 2, "--repeats", 1, "--peers", *peers]
    result = run("throughput", *small, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["workloads"]["tiny"]
    assert set(figures) == set(peers)
    assert all(one["tokens_per_second"][0] > 0 and one["ours_over_it"] > 0 for one in figures.values())


def test_startup(tmp_path, stories):
    flags = ["--train_file", stories, "--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--repeats", 1]
    result = run("startup", *flags, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(len(figures[name]) == 1 and figures[name][0] > 0 for name in ("imports", "cold", "warm"))


def test_time_to_loss(tmp_path, stories):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"config: {{n_layer: 1, n_head: 2, n_embd: 32}}\ndata: {{train_file: {stories}, max_len: 32, "
        "tokenizer: {train: bpe, vocab_size: 300}}\ntraining: {max_steps: 40, learning_rate: 3.0e-3}\n"
    )
    settings = [
        "--setting",
        "--optimizer muon",
        "--setting",
        "--learning_rate 1e-9",
        "--json",
        tmp_path / "figures.json",
    ]
    result = run(
        "time_to_loss", recipe, "--target", 5, "--eval_freq", 10, *settings, "--json", tmp_path / "figures.json"
    )
    assert result.returncode == 0, result.stderr
    first, second = json.loads((tmp_path / "figures.json").read_text())
    assert first["val_loss"] <= 5
    assert first["seconds"] > 0
    assert second["seconds"] is None


def test_data(tmp_path, stories):
    result = run("data", "--text", stories, "--batches", 2, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ours"]["tokens"] == figures["map"]["tokens"] > 4000
    assert figures["ratio"] > 0
    assert figures["feed"]["ratio"] > 0
