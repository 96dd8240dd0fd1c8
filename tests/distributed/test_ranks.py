"""The same run on any number of ranks, and what happens when some of them get a signal, fail or are killed.

The ranks are real processes on CPU (gloo): forked ones, or those of accelerate's launcher where it takes part.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run, read_metrics, read_weights, train
from families import CASES
from launching import GLOO, accelerate_launch, has_reached, ranks_of, run_ranks, start, start_ranks, wait_for
from models.stock_types import DECODERS, stock_flags
from patches import fail_in_step_4, fail_while_building, shard_on_cpu
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# Dropout is drawn per micro-batch, so it depends on the number of ranks that share a global batch.
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def is_saving(run):
    return lambda: any(run.glob("checkpoint-*.partial"))


def outputs(ranks, seconds=120):
    """Wait for ranks to end; return their output on stdout and on stderr, and their exit codes."""
    codes = [rank.wait(seconds) for rank in ranks]
    out, err = map("".join, zip(*(rank.output() for rank in ranks), strict=True))
    return out, err, codes


# ---- any number of ranks


@pytest.mark.parametrize("task", ["gpt", "mlm_nsp"])
def test_any_number_of_ranks_trains_the_same_run(tiny, tiny_bert, tmp_path, task):
    """A step has rows for one and a half micro-batches, and an epoch ends within a step."""
    sizes = {"epochs": 1, "eval_freq": 10, "total_batch_size": 6, "batch_size": 4}
    if task == "gpt":
        flags = tiny(**sizes, **NO_DROPOUT)
    else:
        flags = tiny_bert(**sizes, task=task, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    assert train(*flags, "--save_model", tmp_path / "1") == 0
    for count in (2, 3):
        run = tmp_path / str(count)
        result = run_ranks(count, *flags, "--save_model", run)
        assert result.returncode == 0, result.stderr
        assert f"{count} CPU" in result.stdout
        assert result.stdout.count("step 20: training loss") == 1
        assert_same_run(run, tmp_path / "1")


def test_two_ranks_train_what_one_process_does_with_dropout(tiny, tmp_path):
    assert train(*tiny(save_model=tmp_path / "one")) == 0
    assert run_ranks(2, *tiny(save_model=tmp_path / "two")).returncode == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.chaos
def test_two_machines_train_the_same_run(tiny, tmp_path):
    flags = tiny(epochs=1, eval_freq=10, total_batch_size=6, batch_size=4, **NO_DROPOUT)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"{GLOO} --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    words = [*shlex.split(options), "-m", "hf_myllm.train", *flags, "--save_model", tmp_path / "two"]
    # the launchers are forked, the ranks are not
    jobs = [start("--machine_rank", rank, *words, module="accelerate.commands.launch") for rank in (0, 1)]
    results = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], results
    assert "2 CPUs" in results[0][0]
    assert results[1][0] == ""  # only rank 0 prints
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_predictions_are_evaluated_once_and_the_best_checkpoint_is_the_same_on_two_ranks(tiny_bert, tmp_path):
    for name, count in (("train", 90), ("val", 61)):
        draw = random.Random(name)
        sentences = [
            [draw.choice(["anna", "rome", "the", "sees"]) for _ in range(draw.randint(1, 40))] for _ in range(count)
        ]
        labels = {"anna": "B-PER", "rome": "B-LOC"}
        text = ["".join(f"{word} {labels.get(word, 'O')}\n" for word in words) for words in sentences]
        (tmp_path / f"{name}.conll").write_text("\n".join(text))
    flags = {"task": "token_classification", "train_file": tmp_path / "train.conll", "val_file": tmp_path / "val.conll"}
    flags |= {"start_context": None, "eval_freq": 5, "metric_for_best": "f1", "patience": 3, "epochs": None}
    flags |= {"learning_rate": 1e-2, "warmup_steps": 0, "lr_schedule": "constant", "max_steps": 200}
    runs = tmp_path / "one", tmp_path / "two"
    assert train(*tiny_bert(**flags, save_model=runs[0])) == 0
    assert run_ranks(2, *tiny_bert(**flags, save_model=runs[1])).returncode == 0
    assert_same_run(runs[1], runs[0], 1e-5)
    for key in ("val_f1", "val_precision", "val_recall", "val_accuracy"):
        assert read_metrics(runs[1], key) == read_metrics(runs[0], key), key
    assert len(read_metrics(runs[0], "val_f1")) < 40  # patience ran out
    kept = [sorted(path.name for path in run.glob("checkpoint-*")) for run in runs]
    assert kept[0] == kept[1]


def test_a_run_resumes_on_other_numbers_of_ranks(tiny, tmp_path):
    """It starts on two ranks, whose global batch it keeps, and continues on three, on one, and on two again."""
    assert train(*tiny(**NO_DROPOUT, save_model=tmp_path / "one")) == 0
    run = tmp_path / "run"
    flags = [*tiny(**NO_DROPOUT, save_model=run, total_batch_size=None, save_freq=None), "--save_freq", "null"]
    flags += ["--init_from", "resume"]
    for count, step in ((2, 8), (3, 19), (1, 30)):
        ranks = start_ranks(count, *flags) if count > 1 else [start(*flags)]
        wait_for(ranks, has_reached(run, step))
        ranks[-1].send_signal(signal.SIGTERM)  # a signal to any rank stops all after the same step
        _, err, codes = outputs(ranks)
        assert codes == [128 + signal.SIGTERM] * count, err
    result = run_ranks(2, *flags)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, tmp_path / "one")


# ---- kill and resume


def kill(run, job, victim, draw):
    """Kill -9 one rank, all of them, or the launcher; the others must end by themselves."""
    pids = ranks_of(run)
    victims = {"one": draw.sample(pids, min(1, len(pids))), "all": pids, "launcher": [job.pid]}[victim]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=120)
    for pid in pids:
        end = time.monotonic() + 180  # a silent peer is noticed in 54 s, later on a machine with much to do
        while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < end, "a rank lives on after another was killed"
            time.sleep(0.05)


def launch_two_ranks(*flags):
    return accelerate_launch(f"{GLOO} --num_processes 2", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.chaos
def test_a_run_of_two_ranks_killed_in_any_way_ends_with_the_same_bytes(tiny, tmp_path):
    flags, reference, run = tiny(eval_freq=5, save_freq=4, save_total_limit=3), tmp_path / "reference", tmp_path / "run"
    assert run_ranks(2, *flags, "--save_model", reference).returncode == 0
    resume = [*flags, "--save_model", run, "--init_from", "resume"]
    job = launch_two_ranks(*resume)
    wait_for([job], has_reached(run, 6))
    kill(run, job, "launcher", random)
    kills = 1
    for victims, reached in (
        ([1], is_saving(run)),
        ([0], has_reached(run, 15)),
        ([0, 1], lambda: any(step % 5 == 0 for step in read_metrics(run, "step")[-1:])),  # in or before an evaluation
        ([1], has_reached(run, 30)),
        ([0, 1], is_saving(run)),
    ):
        ranks = start_ranks(2, *resume)
        while not reached() and all(rank.poll() is None for rank in ranks):
            time.sleep(0.001)
        if all(rank.poll() is None for rank in ranks):
            kills += 1
            for rank in victims:
                ranks[rank].send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait(60)  # a rank that was not killed must not wait for the other
    assert kills >= 4
    result = run_ranks(2, *resume)
    assert result.returncode == 0, result.stderr
    assert read_weights(run) == read_weights(reference)
    for key in ("loss", "rows", "val_loss"):
        assert read_metrics(run, key) == read_metrics(reference, key), key


@pytest.mark.chaos
def test_runs_killed_twenty_times_at_random_end_with_the_same_bytes(tiny, tiny_bert, tmp_path):
    kills = []
    for name, make_flags in (("gpt", tiny), ("bert", tiny_bert)):
        flags, reference = make_flags(eval_freq=5, save_freq=4, save_total_limit=3, epochs=6), tmp_path / name
        assert run_ranks(2, *flags, "--save_model", reference).returncode == 0
        for seed in range(2):
            run = tmp_path / f"{name}-{seed}"
            kills += kill_and_resume(flags, run, 8, seed)
            assert read_weights(run) == read_weights(reference)
            assert read_metrics(run, "loss") == read_metrics(reference, "loss")
    print(f"{len(kills)} kills:", {pair: kills.count(pair) for pair in sorted(set(kills))})
    assert len(kills) >= 20


def kill_and_resume(flags, run, count, seed):
    """Kill a run of two ranks at random moments so many times, then let it end; return (victim, moment) of each."""
    draw, kills, resume = random.Random(seed), [], [*flags, "--save_model", run, "--init_from", "resume"]
    while len(kills) < count:
        before = max(read_metrics(run, "step"), default=0)
        job = launch_two_ranks(*resume)
        victim, moment = draw.choice(["one", "all", "launcher"]), draw.choice(["step", "save", "evaluation", "start"])
        reached = {
            "step": has_reached(run, before + draw.randint(1, 6)),
            "save": is_saving(run),
            "evaluation": lambda: any(step % 5 == 0 for step in read_metrics(run, "step")[-1:]),
            "start": lambda: len(ranks_of(run)) == 2,
        }[moment]
        while job.poll() is None and not reached():
            time.sleep(0.001)
        if job.poll() is not None:
            break  # it ended before it could be killed
        kill(run, job, victim, draw)
        kills.append((victim, moment))
    result = run_ranks(2, *resume)
    assert result.returncode == 0, result.stderr
    return kills


# ---- signals and failures


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny, tmp_path, signum):
    run = tmp_path / "run"
    ranks = start_ranks(2, *tiny(epochs=1000, eval_freq=None, save_freq=None), "--save_freq", "null")
    wait_for(ranks, has_reached(run, 5))
    ranks[1].send_signal(signum)
    out, _, codes = outputs(ranks)
    assert codes == [128 + signum] * 2
    assert "and saved; to continue:" in out
    (saved,) = run.glob("checkpoint-*")
    assert (saved / "trainer_state" / "complete.json").exists()


def test_an_evaluation_that_a_signal_interrupts_is_done_after_the_resume(tiny, tmp_path):
    np.random.default_rng(0).integers(0, 90, 500_000).astype(np.uint16).tofile(tmp_path / "ids.bin")
    flags = {"train_file": tmp_path / "ids.bin", "tokenizer": None, "vocab_size": 90, "start_context": None}
    flags = tiny(**flags, eval_freq=10, eval_iter=3, max_steps=20, val_fraction=0.001, save_freq=10)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    run = tmp_path / "run"
    ranks = start_ranks(2, *flags, "--save_model", run, "--eval_iter", 2000)  # a long evaluation
    wait_for(ranks, (run / "metrics.jsonl").exists)
    time.sleep(1)  # in the evaluation before the first step
    assert not read_metrics(run, "loss")
    ranks[1].send_signal(signal.SIGTERM)
    out, _, _ = outputs(ranks)
    assert "stopped by a signal" in out, out
    assert train(*flags, "--save_model", run, "--init_from", "resume") == 0
    assert_same_run(run, tmp_path / "one")  # with all evaluations, that before the first step too
    assert len(read_metrics(run, "val_loss")) == 3


def errors(text):
    return [line for line in text.splitlines() if "error: " in line and "torch" not in line]


def test_an_error_on_one_rank_names_it_and_ends_all(tiny):
    _, err, codes = outputs(start_ranks(2, *tiny(eval_freq=None), patch=fail_in_step_4))
    assert all(codes)
    assert errors(err) == ["error: rank 1 of 2, in step 4: the disk is gone"]  # and not that rank 0 cannot reach it


def test_a_mistake_that_only_one_rank_meets_is_printed_by_it(tiny):
    _, err, codes = outputs(start_ranks(2, *tiny(), patch=fail_while_building))
    assert all(codes)
    assert errors(err) == ["error: the file is not here: copy it"]


def test_a_mistake_is_printed_once(tiny):
    result = run_ranks(2, *tiny(n_head=5))
    assert result.returncode != 0
    assert result.stderr.count("error: config of gpt: n_head (5) must divide n_embd (32)") == 1


# ---- sharding


def run_sharded(device, count, *flags, precision="no", config="accelerate_configs/fsdp2.yaml"):
    """Run ranks with FSDP2, as accelerate_configs/fsdp2.yaml sets it."""
    options = f"--config_file {config} --main_process_port 0 --mixed_precision {precision}"
    if device == "cpu":
        return run_ranks(count, *flags, options=options, patch=shard_on_cpu)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "False"}
    job = accelerate_launch(f"{options} --num_processes {count}", *flags, env=environment)
    out, err = job.communicate(timeout=300)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_sharded_training_is_the_same_run(tiny, tiny_bert, tmp_path, device):
    """FSDP2 gives the run of one process, in losses and in what stock transformers loads; resumed, it gives the same
    bytes, and resumed by one process, the same run again. Activation checkpointing draws the same dropout again."""
    count = 2 if device == "cpu" else torch.cuda.device_count()
    dropout = {} if device == "cpu" else NO_DROPOUT
    tolerance = 1e-6 if device == "cpu" else 1e-3
    flags, run, one = tiny(max_steps=16, save_freq=8, eval_freq=8, **dropout), tmp_path / "sharded", tmp_path / "one"
    assert train(*flags, "--save_model", one) == 0
    result = run_sharded(device, count, *flags, "--save_model", run)
    assert result.returncode == 0, result.stderr
    assert f"{count} {'CPU' if device == 'cpu' else 'GPU'}" in result.stdout
    assert_same_run(run, one, tolerance)
    assert read_metrics(run, "grad_norm") == pytest.approx(read_metrics(one, "grad_norm"), abs=tolerance)
    model, loading = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert load_weights(run).keys() == load_weights(one).keys()
    assert json.loads((run / "run.json").read_text())["class"] == "GPT2LMHeadModel"
    if count == 2:
        state = run / "checkpoint-16" / "trainer_state"
        parts = sorted(path.stat().st_size for path in state.glob("optimizer-0000*-of-00002.safetensors"))
        assert parts[0] == pytest.approx(parts[1], rel=0.1)
        parts = sorted(path.stat().st_size for path in run.glob("model-0000*-of-00002.safetensors"))
        assert parts[0] == pytest.approx(parts[1], rel=0.5)

    resumed = tmp_path / "resumed"
    copy_until_step_8(run, resumed)
    result = run_sharded(device, count, *flags, "--save_model", resumed, "--init_from", "resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(resumed, run, tolerance)
    if device == "cpu":
        assert read_weights(resumed) == read_weights(run)
    shutil.rmtree(resumed)
    copy_until_step_8(run, resumed)
    assert train(*flags, "--save_model", resumed, "--init_from", "resume") == 0
    assert_same_run(resumed, one, tolerance)

    # Muon steps on whole matrices; its bfloat16 amplifies differences of rounding.
    flags, run, one = tiny(max_steps=8, optimizer="muon", **dropout), tmp_path / "muon", tmp_path / "muon-one"
    assert train(*flags, "--save_model", one) == 0
    assert run_sharded(device, count, *flags, "--save_model", run).returncode == 0
    assert read_metrics(run, "loss") == pytest.approx(read_metrics(one, "loss"), abs=1e-3)

    # A BERT in bfloat16, resumed from the checkpoint of one process in float32.
    run = tmp_path / "bert"
    flags = tiny_bert(max_steps=8, save_freq=4, eval_freq=4, optimizer="muon")
    assert train(*flags, "--save_model", run) == 0
    exact = read_metrics(run, "loss")
    shutil.rmtree(run / "checkpoint-8")
    (run / "model.safetensors").unlink()
    result = run_sharded(device, count, *flags, "--save_model", run, "--init_from", "resume", precision="bf16")
    assert result.returncode == 0, result.stderr
    assert read_metrics(run, "loss") == pytest.approx(exact, abs=0.05)
    assert read_metrics(run, "loss")[4:] != exact[4:]
    assert "the precision changed from fp32 to bf16" in result.stdout
    result = run_sharded(device, count, *flags, "--load_model", run, "--eval_only", "true", precision="bf16")
    assert f"validation loss {read_metrics(run, 'val_loss')[-1]:.4f}" in result.stdout


@pytest.mark.chaos
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sizes_that_the_ranks_do_not_divide_and_replicas(tiny, tmp_path, optimizer):
    """A vocabulary of 301 rows on 4 ranks, biases of 3 rows; HSDP 2 x 2, resumed as FSDP2 on 3 and by one process."""
    flags = tiny(max_steps=12, save_freq=4, eval_freq=4, vocab_size=301, n_inner=3, total_batch_size=4, batch_size=1)
    flags += ["--save_total_limit", 9]
    flags = [*flags, "--optimizer", optimizer, *(f"--{name}=0" for name in NO_DROPOUT)]
    one, run = tmp_path / "one", tmp_path / "run"
    assert train(*flags, "--save_model", one) == 0
    replicas, fsdp2 = tmp_path / "hsdp.yaml", "accelerate_configs/fsdp2.yaml"
    text = (ROOT / "accelerate_configs" / "hsdp.yaml").read_text()
    for key, value in (("num_machines", 1), ("num_processes", 4), ("dp_shard_size", 2)):
        text = re.sub(rf"({key}:) \d+", rf"\1 {value}", text)
    replicas.write_text(text)
    resume = [*flags, "--save_model", run, "--init_from", "resume"]
    for count, config, step in ((4, replicas, 12), (3, fsdp2, 8), (4, fsdp2, 4), (1, None, 8), (4, replicas, 4)):
        for path in run.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        (run / "model.safetensors").unlink(missing_ok=True)
        if count == 1:
            assert train(*resume) == 0
        else:
            result = run_sharded("cpu", count, *resume, config=config)
            assert result.returncode == 0, result.stderr
        if step == 12:
            assert len(list((run / "checkpoint-4" / "trainer_state").glob("optimizer-*-of-00002.safetensors"))) == 2
        tolerance = 1e-5 if optimizer == "adamw" else 2e-3
        for key in ("loss", "grad_norm", "val_loss"):
            assert read_metrics(run, key) == pytest.approx(read_metrics(one, key), abs=tolerance), (count, key)


@pytest.mark.chaos  # compiles for a minute
def test_sharded_compiled_training_is_the_same_run(tiny, tmp_path):
    """The layers are compiled one by one, and the head with the loss."""
    flags = tiny(max_steps=6, save_freq=6, eval_freq=6, start_context=None, n_layer=1, **NO_DROPOUT)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    result = run_sharded("cpu", 2, *flags, "--compile", "true", "--save_model", tmp_path / "sharded")
    assert result.returncode == 0, result.stderr
    for key in ("loss", "grad_norm", "val_loss"):
        expected = pytest.approx(read_metrics(tmp_path / "one", key), abs=1e-6)
        assert read_metrics(tmp_path / "sharded", key) == expected


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_sharded_model_with_an_adapter_is_the_same_run(tiny_family, tmp_path, name):
    """Each rank reads rows of the base. Resumed by two ranks: the same bytes; by others: the same losses. peft reads
    the adapter, and merged it is the same model."""
    base, steps = tmp_path / "base", {"epochs": None, "max_steps": 16, "save_freq": 8, "eval_freq": 8}
    assert train(*tiny_family(name)(epochs=None, max_steps=8), "--save_model", base) == 0
    flags = tiny_family(name)(**steps, tokenizer=None, init_from=base, learning_rate=1e-2, r=4)
    flags += ["--lora_dropout", "0.1"] if name == "gpt" else []
    one, run, resumed = tmp_path / "one", tmp_path / "sharded", tmp_path / "resumed"
    assert train(*flags, "--save_model", one) == 0
    result = run_sharded("cpu", 2, *flags, "--save_model", run)
    assert result.returncode == 0, result.stderr
    assert "reads the whole model" not in result.stderr
    assert_same_run(run, one, 1e-6)
    for weights in (load_file(folder / "adapter_model.safetensors") for folder in (run, run / "checkpoint-16")):
        expected = load_file(one / "adapter_model.safetensors")
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, atol=1e-4, rtol=1e-3)
    assert not list(run.rglob("model*.safetensors"))
    names = ("adapter_config.json", "model_config.json", "adapter_model.safetensors")
    for count in (2, 1) if name == "gpt" else (2, 3, 1):  # three ranks have other micro-batches, and so other dropout
        copy_until_step_8(run, resumed)
        words = [*flags, "--save_model", resumed, "--init_from", "resume"]
        if count > 1:
            result = run_sharded("cpu", count, *words)
            assert result.returncode == 0, result.stderr
        else:
            assert train(*words) == 0
        assert_same_run(resumed, run, 1e-6)
        for file in names[: 2 + (count == 2)]:
            assert (resumed / file).read_bytes() == (run / file).read_bytes(), file
        shutil.rmtree(resumed)
    model = AutoPeftModelForCausalLM.from_pretrained(run).eval()
    merged = [*flags, "--merge_lora", "true", "--save_model", tmp_path / "merged"]
    result = run_sharded("cpu", 2, *merged)
    assert result.returncode == 0, result.stderr
    whole, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), torch.arange(9)[None]
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def load_weights(run):
    return {name: tensor for file in run.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def copy_until_step_8(run, target):
    """Copy a run as it was after step 8 of 16."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoint-16")
    for path in target.glob("*model*.safetensors*"):
        path.unlink()


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["qwen3_moe", "roberta"])
def test_a_sharded_stock_class_is_the_same_run(tiny, tmp_path, name):
    dropout = {} if name in DECODERS else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    flags = stock_flags(tiny, name, max_steps=6, save_freq=3, **dropout)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    result = run_sharded("cpu", 2, *flags, "--save_model", tmp_path / "sharded")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "sharded", tmp_path / "one", 1e-5)
    weights = [load_weights(tmp_path / folder) for folder in ("sharded", "one")]
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["t5", "bart", "gpt"])
def test_sharded_evaluations_generate_the_same_texts(tiny_family, tmp_path, name):
    """The ranks have different numbers of groups of sources of equal length, and texts that end at different tokens."""
    flags = {"max_steps": 8, "eval_freq": 4, "save_freq": 8, "max_len": 16, **CASES[name].no_dropout}
    if name != "gpt":
        draw = random.Random(0)
        words = ["".join(draw.choice("abcd") for _ in range(draw.randint(1, 3))) for _ in range(120)]
        rows = [json.dumps({"source": f"{word} {draw.choice(words)}", "target": word}) for word in words]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        flags |= {"task": "seq2seq", "train_file": tmp_path / "rows.jsonl", "max_target_len": 8, "max_new_tokens": None}
        flags |= {"start_context": "ab cd", "tokenizer": "{train: bpe, vocab_size: 300}", "learning_rate": 1e-2}
    flags = tiny_family(name)(**flags)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    result = run_sharded("cpu", 2, *flags, "--save_model", tmp_path / "sharded")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "sharded", tmp_path / "one", 1e-5)
    for key in ("sample", "val_token_error_rate", "val_exact_match"):
        assert read_metrics(tmp_path / "sharded", key) == read_metrics(tmp_path / "one", key), key
    assert len(read_metrics(tmp_path / "one", "sample")) >= 2
