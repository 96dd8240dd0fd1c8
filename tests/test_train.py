"""Train, look at the run's folder, use the model, stop, kill and resume."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, read_metrics, read_weights, run_command, train
from launching import accelerate_launch, has_reached, kill_at, start, wait_for
from patches import log_compilation
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_myllm.models.gpt import GPTForCausalLM
from hf_myllm.train import MAX_STEPS_IN_FLIGHT

NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stories):
    """Return the folder of a run by the real launcher, what it printed, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = {
        "model": "gpt",
        "config": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "data": {"train_file": str(stories), "tokenizer": {"train": "bpe", "vocab_size": 300}, "max_len": 32},
        "training": {
            "epochs": 3, "batch_size": 4, "total_batch_size": 8, "learning_rate": "3e-3", "warmup_steps": 5,
        },
        "evaluation": {"eval_freq": 20, "eval_iter": 2, "start_context": "Anna", "max_new_tokens": 10},
        "run": {"save_model": str(folder / "run"), "save_freq": 10},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = accelerate_launch("", folder / "recipe.yaml")
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    return folder / "run", subprocess.CompletedProcess(job.args, 0, out, err), folder / "recipe.yaml"


def test_the_files_of_the_run_folder(finished):
    run, _, _ = finished
    names = {path.name for path in run.iterdir()}
    expected = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected | {
        *(".lock", "recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "report.html", "README.md"),
        *("checkpoint-50", "checkpoint-52"),
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = {path.name for path in (run / "checkpoint-52" / "trainer_state").iterdir()}
    assert state == {"optimizer.safetensors", "state.json", "complete.json"}
    assert read_weights(run) == read_weights(run / "checkpoint-52")
    assert (run / "model.safetensors").stat().st_mode == (run / "config.json").stat().st_mode
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["training"]["total_batch_size"] == 8
    assert recipe["data"]["stride"] == 32
    assert not any(str(run.parent) in path.read_text() for path in run.glob("*config.json"))


def test_the_terminal_output(finished):
    _, result, _ = finished
    out = result.stdout
    for text in ("unigram loss", "bits per byte", "step  0: training loss", "step 20: training loss", "step 52:"):
        assert text in out
    assert out.count("  | ") >= 4  # a sample at each evaluation
    last = out.strip().splitlines()[-4:]
    assert [line[:12].strip() for line in last] == ["report", "generate", "continue", "load"]
    assert "Traceback" not in result.stderr


def test_the_loss_falls_and_is_logged(finished):
    run, _, _ = finished
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 53))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    # each epoch predicts every token of the corpus but the first, exactly once
    assert sum(line["tokens"] for line in steps) == 3 * (training_tokens(finished[1].stdout) - 1)
    assert {"learning_rate", "grad_norm", "tokens_per_second", "time"} <= set(steps[0])
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 20, 40, 52]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 1
    assert 0 < evaluations[-1]["val_bits_per_byte"] < evaluations[0]["val_bits_per_byte"]
    assert all(line["sample"].startswith("Anna") for line in evaluations)


def training_tokens(out):
    return int(re.search(r"training +([\d,]+) tokens", out)[1].replace(",", ""))


def test_stock_classes_load_the_model(finished):
    run, _, _ = finished
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    ours = GPTForCausalLM.from_pretrained(run).eval()
    ids = torch.tensor([tokenizer("Anna likes the cat.")["input_ids"]])
    torch.testing.assert_close(stock(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    assert pipeline("text-generation", model=str(run))("Anna", max_new_tokens=5)[0]["generated_text"].startswith("Anna")


def test_the_printed_resume_command_continues_the_run(finished, tmp_path):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    longer = [tmp_path / "run" / "recipe.yaml", "--save_model", tmp_path / "run", "--init_from", "resume"]
    assert train(*longer) == 0  # finished: there is nothing to do
    assert read_weights(tmp_path / "run") == read_weights(run)
    assert train(*longer, "--allow_changed", "--max_steps", 60) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == list(range(1, 61))
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["max_steps"] == 60


def test_the_recipe_in_the_run_folder_repeats_the_run(finished, tmp_path):
    run, _, _ = finished
    assert train(run / "recipe.yaml", "--save_model", tmp_path / "again") == 0
    assert read_weights(tmp_path / "again") == read_weights(run)
    assert read_metrics(tmp_path / "again", "loss") == read_metrics(run, "loss")


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(finished, tmp_path):
    """With dropout, and epochs of 138 rows that end within steps of 8."""
    reference, _, recipe = finished
    run = tmp_path / "run"
    resume = [recipe, "--save_model", run, "--init_from", "resume"]
    moments = [
        lambda: (run / "recipe.yaml").exists(),  # before the first step
        has_reached(run, 7),  # before the first checkpoint
        lambda: any(run.glob("checkpoint-*.partial")),  # inside a save
        has_reached(run, 33),
        lambda: (run / "checkpoint-50").exists(),
        lambda: (run / "checkpoint-52").exists(),  # before the model is published
    ]
    assert kill_at(moments, *resume) >= 4
    assert run_command(*resume).returncode == 0
    assert read_weights(run) == read_weights(reference)
    assert read_metrics(run, "loss") == read_metrics(reference, "loss")
    assert [line["step"] for line in read_metrics(run) if "val_loss" in line] == [0, 20, 40, 52]
    assert not list(run.glob("*.partial"))


def test_an_extended_run_that_was_killed_before_it_published_its_model_is_not_finished(finished, tmp_path):
    run, _, recipe = finished
    shutil.copytree(run, tmp_path / "run")
    longer = [recipe, "--save_model", tmp_path / "run", "--init_from", "resume", "--allow_changed", "--max_steps", 60]
    assert train(*longer) == 0
    expected = read_weights(tmp_path / "run")
    assert expected != read_weights(run)
    (tmp_path / "run" / "model.safetensors").unlink()  # a hard link to the checkpoint's
    shutil.copy(run / "model.safetensors", tmp_path / "run" / "model.safetensors")  # as if it had been killed before
    assert read_weights(tmp_path / "run" / "checkpoint-60") == expected
    assert train(*longer) == 0
    assert read_weights(tmp_path / "run") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a child a signal when its parent ends")
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(os.kill, id="the launcher alone", marks=pytest.mark.chaos),
        pytest.param(os.killpg, id="the launcher and the run at once"),
    ],
)
def test_the_run_saves_and_ends_when_its_launcher_gets_sigterm(finished, tmp_path, kill):
    _, _, recipe = finished
    run = tmp_path / "run"
    arguments = [recipe, "--save_model", run, "--save_freq", "null", "--epochs", 1000]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = accelerate_launch("", *arguments, **quiet, start_new_session=True)
    wait_for([launcher], has_reached(run, 5))
    kill(launcher.pid, signal.SIGTERM)
    launcher.wait()
    end = time.monotonic() + 30
    while not list(run.glob("checkpoint-*/trainer_state/complete.json")):
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)


def test_editing_the_published_config_does_not_change_the_checkpoint(finished, tmp_path):
    run, _, _ = finished
    assert (run / "model.safetensors").samefile(run / "checkpoint-52" / "model.safetensors")
    assert not (run / "config.json").samefile(run / "checkpoint-52" / "config.json")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(finished, tmp_path, signum):
    reference, _, recipe = finished
    run = tmp_path / "run"
    arguments = [recipe, "--save_model", run, "--save_freq", "null"]
    process = start(*arguments)
    wait_for([process], has_reached(run, 5))
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "and saved; to continue:" in out
    (saved,) = run.glob("checkpoint-*")
    assert (saved / "trainer_state" / "complete.json").exists()
    assert not (run / "model.safetensors").exists()
    assert train(*arguments, "--init_from", "resume") == 0
    assert read_weights(run) == read_weights(reference)


def test_the_newest_checkpoints_are_kept_and_hold_the_model(tiny, tmp_path):
    assert train(*tiny(save_freq=10, save_total_limit=3)) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-40", "checkpoint-50", "checkpoint-52"}
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoint-40").config.n_embd == 32


def test_accumulation_does_not_change_the_loss(tiny, tmp_path):
    for name, sizes in (
        ("whole", {"batch_size": 8}),
        ("halves", {"batch_size": 4}),
        ("uneven", {"batch_size": 3}),  # the last micro-batch has two rows of three
        ("steps", {"batch_size": 4, "total_batch_size": None, "gradient_accumulation_steps": 2}),
    ):
        assert train(*tiny(**NO_DROPOUT, **sizes, max_steps=10, save_model=tmp_path / name)) == 0
    whole = read_metrics(tmp_path / "whole", "loss")
    for name in ("halves", "uneven", "steps"):
        assert read_metrics(tmp_path / name, "loss") == pytest.approx(whole, abs=1e-5), name
        last = [line["val_loss"] for line in read_metrics(tmp_path / name) if "val_loss" in line][-1]
        assert last == pytest.approx(read_metrics(tmp_path / "whole")[-1]["val_loss"], abs=1e-5)


def test_gradient_checkpointing_changes_nothing_with_dropout(tiny, tmp_path):
    for name in ("false", "true"):
        flags = tiny(max_steps=4, save_model=tmp_path / name, eval_freq=None)
        assert train(*flags, "--gradient_checkpointing", name) == 0
    assert read_weights(tmp_path / "true") == read_weights(tmp_path / "false")


def test_the_learning_rate_follows_its_schedule(tiny, tmp_path):
    flags = {"lr_schedule": "wsd", "decay_steps": 4, "warmup_steps": 3, "max_steps": 12, "learning_rate": 1e-3}
    assert train(*tiny(**flags, min_lr=1e-4)) == 0
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[3:9] == pytest.approx([1e-3] * 6)
    assert rates[9:] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4])


def test_eval_only_prints_the_run_s_last_metrics_and_writes_nothing(finished, tmp_path, capsys, monkeypatch):
    run, _, recipe = finished
    last = [line for line in read_metrics(run) if "val_loss" in line][-1]["val_loss"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.chdir(tmp_path)
    for source in (["--load_model", run], ["--init_from", "resume"], ["--load_model", run / "checkpoint-52"]):
        capsys.readouterr()
        assert train(recipe, "--eval_only", *source) == 0
        out = capsys.readouterr().out
        assert f"validation loss {last:.4f}" in out
        assert "bits per byte" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_training_starts_from_the_weights_of_another_run(finished, tiny, tmp_path):
    run, _, _ = finished
    flags = {"n_layer": None, "n_head": None, "n_embd": None, "tokenizer": None, "load_model": run, "max_steps": 5}
    assert train(*tiny(**flags)) == 0
    assert read_metrics(tmp_path / "run")[0]["val_loss"] < 3  # far below an untrained model's 5.7
    assert read_metrics(tmp_path / "run", "loss")[0] < read_metrics(run, "loss")[0] - 1


def test_another_tokenizer_sets_the_end_of_text_token(finished, tiny, tmp_path, assets):
    run, _, _ = finished
    flags = {"n_layer": None, "n_head": None, "n_embd": None, "load_model": run, "max_steps": 5}
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(7)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert train(*tiny(**flags, tokenizer=tmp_path / "tokenizer")) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["eos_token_id"] == 7


def test_the_flags_of_single_file_trainers_work_on_bin_files(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "gpt2")
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()
    ids = np.array(tokenizer(text[:4000])["input_ids"], dtype=np.uint16)
    ids[:500].tofile(tmp_path / "train.bin")
    ids[500:1000].tofile(tmp_path / "val.bin")
    flags = (
        f"--model gpt --train_file {tmp_path}/train.bin --val_file {tmp_path}/val.bin --epochs 1 --learning_rate 1e-4 "
        f"--batch_size 4 --max_len 32 --stride 16 --eval_freq 20 --eval_iter 1 --tokenizer {assets}/tokenizers/gpt2 "
        f"--save_model {tmp_path}/out --n_layer 1 --n_head 2 --n_embd 16 --max_new_tokens 5"
    )
    assert train(*flags.split(), "--start_context", "") == 0
    lines = read_metrics(tmp_path / "out")
    assert len(read_metrics(tmp_path / "out", "loss")) == 8  # 30 rows, 16 tokens apart, 4 per step
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([15496]) == "Hello"


def test_a_bin_without_a_tokenizer(tmp_path, capsys):
    np.random.default_rng(0).integers(0, 90, 3000).astype(np.uint32).tofile(tmp_path / "a.bin")
    flags = "--n_layer 1 --n_head 2 --n_embd 16 --max_len 16 --max_steps 5 --vocab_size 90 --val_fraction 0.2"
    assert train(*flags.split(), "--train_file", tmp_path / "a.bin", "--save_model", tmp_path / "run") == 0
    assert read_metrics(tmp_path / "run")[-1]["val_bits_per_byte"] is None
    assert "generate  " not in capsys.readouterr().out
    result = run_command(tmp_path / "run", module="hf_myllm.generate")
    assert result.returncode == 2
    assert "holds no tokenizer" in result.stderr


@pytest.mark.chaos
@pytest.mark.skipif(os.name == "nt", reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_the_same_losses(tiny, tmp_path):
    flags = partial(tiny, **NO_DROPOUT, max_steps=6, start_context=None, n_layer=1)
    assert train(*flags(save_model=tmp_path / "eager")) == 0
    compiled = flags(save_model=tmp_path / "compiled", save_freq=4, compile=True)
    for resume in ([], ["--resume"]):
        process = start(*compiled, *resume, patch=log_compilation)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Graph break" not in err
        # The second graph is that of evaluations, which need no gradient; the rows at the end of an epoch need none.
        assert err.count("Recompiling") == err.count("grad_mode") == 1, err
        shutil.rmtree(tmp_path / "compiled" / "checkpoint-6")  # as if it had been killed before
    assert read_metrics(tmp_path / "compiled", "loss") == pytest.approx(
        read_metrics(tmp_path / "eager", "loss"), abs=1e-4
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_waits_for_the_gpu(tiny, tmp_path, optimizer):
    (tmp_path / "watching.py").write_text(
        "import importlib, sys, torch\n"
        "from hf_myllm.cli import main\n"
        "train = importlib.import_module('hf_myllm.train')\n"
        "training_step = train.training_step\n"
        "def watched_step(run, model, optimizer, step):\n"
        "    torch.cuda.set_sync_debug_mode('error' if step > 2 else 'default')\n"
        "    result = training_step(run, model, optimizer, step)\n"
        "    torch.cuda.set_sync_debug_mode('default')\n"
        "    return result\n"
        "train.training_step = watched_step\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    env = {**os.environ, "ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}
    flags = tiny(max_steps=8, optimizer=optimizer)
    result = subprocess.run([sys.executable, tmp_path / "watching.py", *flags], cwd=ROOT, env=env, text=True)
    assert result.returncode == 0


def test_steps_in_flight_do_not_change_the_run(tiny, tmp_path, monkeypatch):
    """As on a GPU, where the result of a step is read while the next one runs."""
    flags = {"max_steps": 14, "eval_freq": 5, "save_freq": 4, "log_freq": 1}
    for limit in (0, 1):
        monkeypatch.setitem(MAX_STEPS_IN_FLIGHT, "cpu", limit)
        assert train(*tiny(**flags, save_model=tmp_path / str(limit))) == 0
    keys = ("step", "loss", "learning_rate", "tokens", "grad_norm", "rows", "train_loss", "val_loss", "sample")
    at_once, in_flight = (
        [{key: line[key] for key in keys if key in line} for line in read_metrics(tmp_path / name)] for name in "01"
    )
    assert at_once == in_flight
    assert read_weights(tmp_path / "0") == read_weights(tmp_path / "1")


def test_the_launcher_s_environment_sets_mixed_precision(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(*tiny(max_steps=5)) == 0
    assert "precision bf16 (set by the launcher)" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto").dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run(tiny, capsys):
    assert train(*tiny(learning_rate=1e9, grad_clip=0, warmup_steps=0)) == 2
    assert "lower learning_rate" in capsys.readouterr().err


@pytest.fixture
def make_step_3_non_finite(monkeypatch):
    """Return a function that makes the loss of step 3, or its gradient, not finite in both micro-batches."""

    def patch(part):
        calls = []

        def loss(logits, labels, vocab_size, **kwargs):
            if torch.is_grad_enabled():
                calls.append(1)
                if len(calls) in (5, 6):
                    if part == "loss":
                        return logits.sum() * math.nan
                    logits.register_hook(lambda gradient: gradient * math.inf)
            return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

        monkeypatch.setattr(GPTForCausalLM, "_loss_function", staticmethod(loss), raising=False)

    return patch


@pytest.mark.parametrize(("part", "optimizer", "in_flight"), [("loss", "adamw", 1), ("gradient", "muon", 0)])
def test_a_step_that_is_not_finite_stops_the_run_or_is_skipped(
    tiny, tmp_path, capsys, monkeypatch, make_step_3_non_finite, part, optimizer, in_flight
):
    monkeypatch.setitem(MAX_STEPS_IN_FLIGHT, "cpu", in_flight)
    make_step_3_non_finite(part)
    tiny = partial(tiny, optimizer=optimizer)
    assert train(*tiny(max_steps=6)) == 2
    error = capsys.readouterr().err
    assert "step 3: loss" in error
    assert re.search(r"rows \d+, \d+, .* of ", error)
    assert "max_skipped_steps" in error
    make_step_3_non_finite(part)
    assert train(*tiny(max_steps=6, max_skipped_steps=1, save_model=tmp_path / "on")) == 0
    assert "skipped step 3: loss" in capsys.readouterr().out
    lines = [line for line in read_metrics(tmp_path / "on") if "loss" in line]
    assert [line["step"] for line in lines if line["loss"] is None or line["grad_norm"] is None] == [3]
    assert len(lines) == 6
    make_step_3_non_finite(part)
    assert train(*tiny(max_steps=3, max_skipped_steps=1, save_freq=1, save_model=tmp_path / "at")) == 0
    before, after = (tmp_path / "at" / f"checkpoint-{step}" for step in (2, 3))
    assert read_weights(before) == read_weights(after)  # the step changed nothing


def test_too_many_consecutive_steps_that_are_not_finite_stop_the_run(tiny, capsys):
    assert train(*tiny(learning_rate=1e9, grad_clip=0, warmup_steps=0, max_skipped_steps=3)) == 2
    assert "4 skipped steps in a row" in capsys.readouterr().err


def test_milestones_are_saved_and_kept(tiny, tmp_path):
    flags = tiny(max_steps=11, save_freq=4, save_total_limit=1, eval_freq=None)
    assert train(*flags, "--keep_every", 3) == 0
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (3, 6, 9, 11)}
    assert train(*flags, "--init_from", "resume", "--allow_changed", "--max_steps", 15, "--keep_every", 7) == 0
    kept = {f"checkpoint-{n}" for n in (3, 6, 9, 14, 15)}  # the milestones of the first value stay
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == kept
    assert train(*flags, "--save_model", tmp_path / "all", "--save_total_limit", "null") == 0
    assert {path.name for path in (tmp_path / "all").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 8, 11)}
