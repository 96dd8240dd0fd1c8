"""Each benchmark runs, at a small size, and says what it measures; how fast is nobody's business here."""

import json
import subprocess
import sys

from conftest import ROOT


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


def test_data(tmp_path, stories):
    result = run("data", "--text", stories, "--batches", 2, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ours"]["tokens"] == figures["map"]["tokens"] > 4000
    assert figures["ratio"] > 0
    assert figures["feed"]["ratio"] > 0
