"""Each benchmark runs at a small size and writes its measurements; their values are not checked."""

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
    result = run("checkpoint", *small, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["seconds"]) == 8
    assert all(seconds >= 0 for seconds in results["seconds"].values())
    assert all(name in result.stdout for name in results["seconds"])


def test_throughput(tmp_path):
    peers = ["ours", "isolated", "muon", "single-file", "stock", "Trainer"]
    small = ["tiny", "--steps", 3, "--warmup", 2, "--repeats", 1, "--peers", *peers]
    result = run("throughput", *small, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["works"]["tiny"]
    assert set(results) == set(peers)
    assert all(peer["tokens_per_second"][0] > 0 and peer["ours_over_it"] > 0 for peer in results.values())


def test_startup(tmp_path, stories):
    flags = ["--train_file", stories, "--n_layer", 1, "--n_embd", 16, "--n_head", 1, "--repeats", 1]
    result = run("startup", *flags, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(len(results[name]) == 1 and results[name][0] > 0 for name in ("imports", "cold", "warm"))


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


def test_data(tmp_path, stories):
    result = run("data", "--text", stories, "--batches", 2, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ours"]["tokens"] == results["map"]["tokens"] > 4000
    assert results["ratio"] > 0
    assert results["feed"]["ratio"] > 0
