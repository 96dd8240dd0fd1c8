"""The same run on any number of processes, and what becomes of it when some of them die.

Real processes on CPU (gloo). `accelerate launch --cpu --num_processes 2` silently starts one, so: --multi_gpu with
ACCELERATE_USE_CPU, and the number of processes is asserted.
"""

import json
import os
import random
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
from conftest import ROOT, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# port 0: one that is free, for other tests launch at the same time
LAUNCH = "accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no --main_process_port 0 "
LAUNCH += "--num_processes {} --num_machines {}"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def start(processes, arguments, machines=1, extra="", launcher=LAUNCH, program="-m hf_myllm.train", **options):
    line = [*launcher.format(processes, machines).split(), *extra.split(), *program.split(), *map(str, arguments)]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(line, cwd=ROOT, **options)


def launch(processes, *arguments, **how):
    job = start(processes, arguments, **how)
    out, err = job.communicate(timeout=300)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def launch_two_machines(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"--main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank"
    jobs = [start(2, arguments, machines=2, extra=f"{where} {rank}") for rank in (0, 1)]
    results = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], results
    assert results[1][0] == ""  # the second machine has nothing to say
    return results[0][0]


def metrics(run, key):
    path = Path(run) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line[key] for line in lines if key in line]


def weights(run):
    return (Path(run) / "model.safetensors").read_bytes()


def assert_same_run(run, reference, tolerance=1e-6):
    """The same rows and learning rates at each step, and the same losses but for rounding."""
    for key in ("rows", "tokens", "learning_rate"):
        assert metrics(run, key) == metrics(reference, key), key
    for key in ("loss", "val_loss"):
        assert metrics(run, key) == pytest.approx(metrics(reference, key), abs=tolerance), key


def test_two_processes_train_what_one_does_dropout_included(tiny, tmp_path):
    assert train(*tiny(save_model=tmp_path / "one")) == 0
    assert launch(2, *tiny(save_model=tmp_path / "two")).returncode == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_words_are_judged_once_and_the_best_is_the_same_on_two_processes(tiny_bert, tmp_path):
    for name, count in (("train", 90), ("val", 61)):
        draw = random.Random(name)
        sentences = [
            [draw.choice(["anna", "rome", "the", "sees"]) for _ in range(draw.randint(1, 40))] for _ in range(count)
        ]
        labels = {"anna": "B-PER", "rome": "B-LOC"}
        text = ["".join(f"{word} {labels.get(word, 'O')}\n" for word in words) for words in sentences]
        (tmp_path / f"{name}.conll").write_text("\n".join(text))
    words = {"task": "token_classification", "train_file": tmp_path / "train.conll", "val_file": tmp_path / "val.conll"}
    words |= {"start_context": None, "eval_freq": 5, "metric_for_best": "f1", "patience": 3, "epochs": None}
    words |= {"learning_rate": 1e-2, "warmup_steps": 0, "lr_schedule": "constant"}
    runs = tmp_path / "one", tmp_path / "two"
    assert train(*tiny_bert(**words, max_steps=200, save_model=runs[0])) == 0
    assert launch(2, *tiny_bert(**words, max_steps=200, save_model=runs[1])).returncode == 0
    assert_same_run(runs[1], runs[0], 1e-5)
    for key in ("val_f1", "val_precision", "val_recall", "val_accuracy"):
        assert metrics(runs[1], key) == metrics(runs[0], key), key
    assert len(metrics(runs[0], "val_f1")) < 40  # patience was lost
    kept = [sorted(path.name for path in run.glob("checkpoint-*")) for run in runs]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", ["gpt", "mlm_nsp"])
def test_any_number_of_processes_trains_the_same_run(tiny, tiny_bert, tmp_path, kind):
    """A step has rows for one and a half micro-batches, and an epoch ends within one. No dropout, which is drawn for a
    micro-batch as a whole."""
    sizes = {"epochs": 1, "eval_freq": 10, "total_batch_size": 6, "batch_size": 4}
    if kind == "gpt":
        flags = tiny(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    else:
        flags = tiny_bert(**sizes, task=kind, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    for processes in (2, 3):
        run = tmp_path / str(processes)
        result = launch(processes, *flags, "--save_model", run)
        assert result.returncode == 0, result.stderr
        assert f"{processes} x cpu" in result.stdout
        assert result.stdout.count("step 20: training loss") == 1
        assert_same_run(run, tmp_path / "one")
    if kind == "gpt":
        assert "2 x cpu" in launch_two_machines([*flags, "--save_model", tmp_path / "machines"])
        assert_same_run(tmp_path / "machines", tmp_path / "one")


def trainers(run):
    """The training processes of a run, by rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().split(b"\0")
            place = dict(item.split(b"=", 1) for item in (path / "environ").read_bytes().split(b"\0") if b"=" in item)
        except OSError:
            continue
        if str(run).encode() in line and b"RANK" in place:
            found.append((int(place[b"RANK"]), int(path.name)))
    return [pid for _, pid in sorted(found)]


def wait_for(job, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def reached(run, step):
    return lambda: any(at >= step for at in metrics(run, "step"))


def test_a_run_goes_on_with_other_numbers_of_processes(tiny, tmp_path):
    """Begun on two, whose step it keeps; then on three, on one, and on two again."""
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    assert train(*tiny(**still, save_model=tmp_path / "one")) == 0
    run = tmp_path / "run"
    flags = [*tiny(**still, save_model=run, total_batch_size=None, save_freq=None), "--save_freq", "null"]
    for processes, step in ((2, 8), (3, 19), (1, 30)):
        arguments = [*flags, "--init_from", "resume"]
        job = start(processes, arguments) if processes > 1 else subprocess.Popen(
            ["accelerate", "launch", "-m", "hf_myllm.train", *map(str, arguments)], env=ENVIRONMENT, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(job, reached(run, step))
        told = trainers(run)[-1] if processes > 1 else job.pid  # any one of them stops all, after the same step
        os.kill(told, signal.SIGTERM)
        job.communicate(timeout=120)
    result = launch(2, *flags, "--init_from", "resume")
    assert result.returncode == 0, result.stderr
    assert_same_run(run, tmp_path / "one")


def kill(run, job, how, draw):
    """Kill -9 one training process, all of them, or the launcher."""
    pids = trainers(run)
    for pid in {"one": draw.sample(pids, min(1, len(pids))), "all": pids, "launcher": [job.pid]}[how]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=120)
    for pid in pids:  # those that were not killed end by themselves
        end = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < end, "a process lives on after another died"
            time.sleep(0.05)


def chaos(flags, folder, kills, seed):
    """Kill a run of two processes at random moments until it has been killed so many times, and let it end."""
    draw, run, killed = random.Random(seed), folder / f"killed{seed}", []
    resume = [*flags, "--save_model", run, "--init_from", "resume"]
    while len(killed) < kills:
        before = max(metrics(run, "step"), default=0)
        job = start(2, resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        how, moment = draw.choice(["one", "all", "launcher"]), draw.choice(["step", "save", "evaluation", "start"])
        step = before + draw.randint(1, 6)
        wanted = {
            "step": reached(run, step),
            "save": lambda: any(run.glob("checkpoint-*.partial")),
            "evaluation": lambda: any(at % 5 == 0 for at in metrics(run, "step")[-1:]),
            "start": lambda: len(trainers(run)) == 2,
        }[moment]
        while job.poll() is None and not wanted():
            time.sleep(0.001)
        if job.poll() is not None:
            break  # it ended before it could be killed
        kill(run, job, how, draw)
        killed.append((how, moment))
    result = launch(2, *resume)
    assert result.returncode == 0, result.stderr
    return run, killed


def test_killed_in_any_way_it_ends_with_the_same_bytes(tiny, tmp_path):
    flags = tiny(eval_freq=5, save_freq=4, save_total_limit=3)
    assert launch(2, *flags, "--save_model", tmp_path / "reference").returncode == 0
    run, killed = chaos(flags, tmp_path, kills=3, seed=0)
    assert killed
    assert weights(run) == weights(tmp_path / "reference")
    for key in ("loss", "rows", "val_loss"):
        assert metrics(run, key) == metrics(tmp_path / "reference", key), key


@pytest.mark.chaos
def test_killed_twenty_times_and_more_it_ends_with_the_same_bytes(tiny, tiny_bert, tmp_path):
    total = []
    for name, make in (("gpt", tiny), ("bert", tiny_bert)):
        flags = make(eval_freq=5, save_freq=4, save_total_limit=3, epochs=6)
        assert launch(2, *flags, "--save_model", tmp_path / name).returncode == 0
        for seed in range(2):
            (tmp_path / name / str(seed)).mkdir()
            run, killed = chaos(flags, tmp_path / name / str(seed), kills=8, seed=seed)
            assert weights(run) == weights(tmp_path / name)
            assert metrics(run, "loss") == metrics(tmp_path / name, "loss")
            total += killed
    print(f"{len(total)} kills:", {pair: total.count(pair) for pair in sorted(set(total))})
    assert len(total) >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_at_one_step(tiny, tmp_path, number):
    run = tmp_path / "run"
    flags = [*tiny(epochs=1000, eval_freq=None, save_freq=None), "--save_freq", "null"]
    job = start(2, flags)
    wait_for(job, reached(run, 5))
    os.kill(trainers(run)[1], number)
    out, _ = job.communicate(timeout=120)
    assert "and saved; --init_from resume continues from there" in out
    (saved,) = run.glob("checkpoint-*")
    assert (saved / "trainer_state" / "complete.json").exists()


def test_a_signal_inside_an_evaluation_stops_it_and_it_is_made_up_for(tiny, tmp_path):
    np.random.default_rng(0).integers(0, 90, 500_000).astype(np.uint16).tofile(tmp_path / "ids.bin")
    flags = {"train_file": tmp_path / "ids.bin", "tokenizer": None, "vocab_size": 90, "start_context": None}
    flags = tiny(**flags, eval_freq=10, eval_iter=3, max_steps=20, val_fraction=0.001, save_freq=10)
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    run = tmp_path / "run"
    job = start(2, [*flags, "--save_model", run, "--eval_iter", 2000])  # an evaluation that takes its time
    wait_for(job, lambda: (run / "metrics.jsonl").exists() and len(trainers(run)) == 2)
    time.sleep(1)  # in the evaluation before the first step
    assert not metrics(run, "loss")
    os.kill(trainers(run)[1], signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert "stopped by a signal" in out, out
    assert train(*flags, "--save_model", run, "--init_from", "resume") == 0
    assert_same_run(run, tmp_path / "one")  # the evaluations included, that before the first step too
    assert len(metrics(run, "val_loss")) == 3


def test_when_one_process_fails_the_others_end_and_it_says_why(tiny, tmp_path):
    job = start(2, [*tiny(epochs=100, save_freq=2), "--eval_freq", "null"])
    wait_for(job, reached(tmp_path / "run", 3))
    os.kill(trainers(tmp_path / "run")[1], signal.SIGKILL)
    out, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "error: rank 0 of 2, in " in err
    assert "--init_from resume goes on from the newest checkpoint" in err


def test_an_error_in_one_process_names_it_and_ends_all(tiny, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import importlib, os, sys\n"
        "from hf_myllm.cli import main\n"
        "train = importlib.import_module('hf_myllm.train')\n"
        "step = train.training_step\n"
        "def failing_step(run, model, number):\n"
        "    if number == 3 and os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('the disk has gone')\n"
        "    return step(run, model, number)\n"
        "train.training_step = failing_step\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    result = launch(2, *tiny(eval_freq=None), program=str(tmp_path / "failing.py"))
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "error: " in line and "torch" not in line]
    assert said == ["error: rank 1 of 2, in step 4: the disk has gone"]  # and not that the other cannot reach it


def test_a_mistake_that_only_one_process_meets_is_said_by_it(tiny, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os, sys\n"
        "from hf_myllm import build\n"
        "from hf_myllm.cli import main\n"
        "from hf_myllm.errors import InputError\n"
        "build_run = build.build_run\n"
        "def failing_build(*arguments, **options):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise InputError('the file is not here: copy it')\n"
        "    return build_run(*arguments, **options)\n"
        "build.build_run = failing_build\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    result = launch(2, *tiny(), program=str(tmp_path / "failing.py"))
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "error: " in line and "torch" not in line]
    assert said == ["error: the file is not here: copy it"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_sharded_training_is_the_same_run(tiny, tiny_bert, tmp_path, device):
    """FSDP2 by accelerate_configs/fsdp2.yaml, on CPU by sharding.py: the run of one process, in losses and in what
    stock transformers loads; resumed, the same bytes, and by one process, the same run again. The layers are computed
    again in the backward pass, with the same dropout."""
    processes = 2 if device == "cpu" else torch.cuda.device_count()
    how = {
        "launcher": "accelerate launch --config_file accelerate_configs/fsdp2.yaml --main_process_port 0 "
        "--mixed_precision no --num_processes {}",
        "program": "tests/distributed/sharding.py" if device == "cpu" else "-m hf_myllm.train",
        "env": ENVIRONMENT | {"ACCELERATE_USE_CPU": str(device == "cpu")},
    }
    still = {} if device == "cpu" else {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    tolerance = 1e-6 if device == "cpu" else 1e-3
    flags, run = tiny(max_steps=16, save_freq=8, eval_freq=8, **still), tmp_path / "sharded"
    assert train(*flags, "--save_model", tmp_path / "one") == 0
    result = launch(processes, *flags, "--save_model", run, **how)
    assert result.returncode == 0, result.stderr
    assert f"{processes} x {device}" in result.stdout
    assert_same_run(run, tmp_path / "one", tolerance)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(tmp_path / "one", "grad_norm"), abs=tolerance)
    model, loading = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert model.config.architectures == ["GPT2LMHeadModel"]
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert load_file(run / "model.safetensors").keys() == one.keys()
    if processes == 2:
        state = run / "checkpoint-16" / "trainer_state"
        parts = sorted(path.stat().st_size for path in state.glob("optimizer-0000*-of-00002.safetensors"))
        assert parts[0] == pytest.approx(parts[1], rel=0.1)

    def cut():
        """The run as it was at step 8."""
        shutil.copytree(run, tmp_path / "again", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "again" / "checkpoint-16")
        (tmp_path / "again" / "model.safetensors").unlink()

    cut()
    result = launch(processes, *flags, "--save_model", tmp_path / "again", "--init_from", "resume", **how)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "again", run, tolerance)
    if device == "cpu":
        assert weights(tmp_path / "again") == weights(run)
    shutil.rmtree(tmp_path / "again")
    cut()
    assert train(*flags, "--save_model", tmp_path / "again", "--init_from", "resume") == 0
    assert_same_run(tmp_path / "again", tmp_path / "one", tolerance)

    # by Muon, whose steps are of whole matrices; its bfloat16 makes more of the last bits
    flags, run = tiny(max_steps=8, optimizer="muon", **still), tmp_path / "muon"
    assert train(*flags, "--save_model", tmp_path / "muon-one") == 0
    assert launch(processes, *flags, "--save_model", run, **how).returncode == 0
    assert metrics(run, "loss") == pytest.approx(metrics(tmp_path / "muon-one", "loss"), abs=1e-3)

    # a BERT, from where one process was, in bfloat16
    run, how["launcher"] = tmp_path / "bert", how["launcher"].replace("precision no", "precision bf16")
    flags = tiny_bert(max_steps=8, save_freq=4, eval_freq=4, optimizer="muon")
    assert train(*flags, "--save_model", run) == 0
    exact = metrics(run, "loss")
    shutil.rmtree(run / "checkpoint-8")
    (run / "model.safetensors").unlink()
    result = launch(processes, *flags, "--save_model", run, "--init_from", "resume", **how)
    assert result.returncode == 0, result.stderr
    assert metrics(run, "loss") == pytest.approx(exact, abs=0.05)
    assert metrics(run, "loss")[4:] != exact[4:]
    assert "the precision changed from no to bf16" in result.stdout
    result = launch(processes, *flags, "--load_model", run, "--eval_only", "true", **how)
    assert f"validation loss {metrics(run, 'val_loss')[-1]:.4f}" in result.stdout


def test_a_mistake_is_said_once(tiny):
    result = launch(2, *tiny(n_head=5))
    assert result.returncode != 0
    assert result.stderr.count("error: config of gpt: n_head (5) must divide n_embd (32)") == 1
