"""Real processes on CPU (gloo). `accelerate launch --cpu --num_processes 2` silently starts one, so: --multi_gpu with
ACCELERATE_USE_CPU, and the number of processes is asserted."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, train

LAUNCH = "accelerate launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes"


def launch(processes, *arguments):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    line = [*LAUNCH.split(), str(processes), "-m", "hf_myllm.train", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)


def metrics(run, key):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_two_processes_train_what_one_does_dropout_included(tiny, tmp_path):
    assert train(*tiny(save_model=tmp_path / "one")) == 0
    result = launch(2, *tiny(save_model=tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    assert result.stdout.count("step 20: training loss") == 1
    assert metrics(tmp_path / "two", "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=1e-4)
    assert metrics(tmp_path / "two", "val_loss") == pytest.approx(metrics(tmp_path / "one", "val_loss"), abs=1e-4)
    assert metrics(tmp_path / "two", "tokens") == metrics(tmp_path / "one", "tokens")
    assert metrics(tmp_path / "two", "learning_rate") == metrics(tmp_path / "one", "learning_rate")


def test_two_processes_train_a_bert_as_one_does(tiny_bert, tmp_path):
    """The masked tokens and the pairs of the step are counted over both."""
    flags = tiny_bert(task="mlm_nsp", max_steps=12, eval_freq=6, total_batch_size=7, batch_size=4)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    result = launch(2, *flags, "--save_model", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    for key in ("loss", "val_loss", "val_nsp_loss", "val_nsp_accuracy"):
        assert metrics(tmp_path / "two", key) == pytest.approx(metrics(tmp_path / "one", key), abs=1e-4), key


def test_a_run_of_two_processes_goes_on_with_one(tiny, tmp_path):
    assert train(*tiny(save_model=tmp_path / "one")) == 0
    flags = tiny(save_model=tmp_path / "two", total_batch_size=None)  # 4 rows x 2 processes, kept in the checkpoint
    result = launch(2, *flags)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "two"
    for path in (run / "model.safetensors", *(run / "checkpoint-52").rglob("complete.json")):
        path.unlink()
    (run / "checkpoint-52").rename(run / "gone")
    assert train(*flags, "--init_from", "resume") == 0  # from step 50
    assert metrics(run, "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=1e-4)


def test_a_mistake_is_said_once(tiny):
    result = launch(2, *tiny(n_head=5))
    assert result.returncode != 0
    assert result.stderr.count("error: config of gpt: n_head (5) must divide n_embd (32)") == 1
