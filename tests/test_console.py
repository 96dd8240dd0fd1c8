"""The terminal output of a run, and metrics.jsonl."""

import json
import os
import re
import shlex
import signal
import subprocess

import pytest
from conftest import ROOT, command, run_cli, run_command, train
from launching import run_in_a_terminal

import hf_myllm
from hf_myllm import launcher
from hf_myllm.errors import RecipeError
from hf_myllm.models import FAMILIES
from hf_myllm.recipe.flags import parse
from hf_myllm.reporting.console import Reporter
from hf_myllm.reporting.metrics_log import read_metrics
from hf_myllm.reporting.profiling import category_of
from hf_myllm.tasks import TASKS
from hf_myllm.terminal import Status, plural


def write(folder, lines, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_resuming_drops_logged_steps_that_run_again_and_incomplete_lines(tmp_path):
    write(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 9)], tail='{"step": 9, "lo')
    Reporter(tmp_path, start_step=5, total_steps=20).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_only_rank_0_prints_and_writes(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 5, is_main=False)
    reporter.info("hello")
    reporter.log_step(1, 1.0, 1e-3, 10, 0.5, 7)
    reporter.close()
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_tokens_per_second_exclude_evaluations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_myllm.reporting.console.time.monotonic", lambda: clock[0])
    reporter = Reporter(tmp_path, 0, 2)
    clock[0] = 2.0
    reporter.log_step(1, 1.0, 1e-3, 100, 0.5, 7)
    reporter.pause()
    clock[0] = 60.0
    reporter.resume()
    clock[0] = 62.0
    reporter.log_step(2, 1.0, 1e-3, 100, 0.5, 7)
    reporter.close()
    assert [line["tokens_per_second"] for line in read_metrics(tmp_path)] == [50.0, 50.0]


def test_no_file_of_a_run_holds_the_hub_token(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert train(*tiny(max_steps=5)) == 0
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hf_secretsecretsecret" not in path.read_bytes()


# ---- the terminal


def test_a_terminal_of_80_columns_has_one_line_of_progress(tiny):
    flags = tiny(max_steps=60, eval_freq=30, temperature=1.5, max_new_tokens=90)
    pieces, code = run_in_a_terminal(*flags, in_new_process=True)
    output = b"".join(pieces).decode()
    assert code == 0, output
    assert "\x1b[A" not in output  # a second bar would move the cursor
    lines = [line for line in re.split(r"[\r\n]+", output.replace("\x1b[K", "")) if line.strip()]
    bars = [line for line in lines if line.startswith("step") and "|" in line]
    assert len(bars) > 1
    assert all(
        re.match(r"step \d+/60 \|.*\| \S+ left, loss [\d.]+, lr [\d.e-]+, \S+ tokens/s$", bar)
        for bar in bars
        if not re.search("starting|evaluating|saving|writing|publishing|drawing", bar)
    )
    assert any(re.search(r"evaluating \d/\d", bar) for bar in bars)
    assert any("saving checkpoint-30" in bar for bar in bars)
    assert any(line.startswith("hf-myllm ") and "loading" in line for line in lines[:1])
    assert all(len(bar) <= 80 for bar in bars)
    assert all(len(line) <= 80 for line in lines if line.startswith("  | "))  # samples
    assert not any("warning" in line.lower() or "Traceback" in line for line in lines)


def test_without_a_terminal_a_line_says_what_is_slow(capsys):
    status = Status()
    status("saving checkpoint-1")
    status("saving checkpoint-2", is_slow=True)
    Status(is_shown=False)("saving checkpoint-3", is_slow=True)
    assert capsys.readouterr().err == "saving checkpoint-2\n"


def test_an_error_begins_on_a_line_of_its_own(tiny):
    flags = tiny(max_steps=6, learning_rate=1e38, grad_clip=0, warmup_steps=0, eval_freq=None)
    pieces, code = run_in_a_terminal(*flags)
    output = b"".join(pieces).decode()
    assert code == 2
    shown = re.split(r"\r\n|\r|\x1b\[K", output)
    errors = [line for line in shown if "error: " in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: step 2: loss nan"), errors


def test_ctrl_c_while_importing_ends_in_one_line(tiny):
    job = subprocess.Popen(command(*tiny()), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline().startswith("hf-myllm ")
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert (error, job.returncode) == ("stopped by Ctrl-C\n", 130)


@pytest.mark.parametrize(
    ("program", "launched_by", "ranks", "expected"),
    [
        ("/bin/hf-myllm", "", 1, "hf-myllm train"),
        ("/x/hf_myllm/train.py", "", 1, "python -m hf_myllm.train"),
        ("/x/hf_myllm/cli.py", "", 1, "python -m hf_myllm.cli train"),
        ("/x/notebook.py", "", 1, "hf-myllm train"),
        ("/x/hf_myllm/train.py", "", 4, "accelerate launch -m hf_myllm.train"),
        ("/x/hf_myllm/train.py", "accelerate launch --num_processes 2 -m hf_myllm.train a.yaml --seed 1", 2,
         "accelerate launch --num_processes 2 -m hf_myllm.train"),
        ("/x/hf_myllm/train.py", "torchrun --nproc_per_node 2 -m hf_myllm.train a.yaml", 2,
         "torchrun --nproc_per_node 2 -m hf_myllm.train"),
    ],
)  # fmt: skip
def test_the_command_to_continue_is_the_one_that_was_used(monkeypatch, program, launched_by, ranks, expected):
    monkeypatch.setattr("sys.argv", [program])
    monkeypatch.setattr(launcher, "_launcher_command", launched_by.split)
    assert launcher.train_command(ranks) == expected


def test_a_stopped_run_prints_the_command_that_resumes_it(tiny, tmp_path, capsys):
    stop = lambda line: os.kill(os.getpid(), signal.SIGINT) if line["step"] == 3 else None  # noqa: E731
    recipe = parse(list(map(str, tiny(max_steps=9))), FAMILIES)
    assert hf_myllm.train(recipe, on_log=stop).stop_signal == signal.SIGINT
    lines = capsys.readouterr().out.splitlines()
    stopped = next(index for index, line in enumerate(lines) if line.startswith("stopped by a signal after step"))
    (resume,) = re.findall(r"^resume      hf-myllm (train .*)$", lines[stopped + 1])
    assert run_cli(*shlex.split(resume)) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 9


def test_evaluations_fit_80_columns(tiny_family, tmp_path, capsys):
    files = [tmp_path / f"{name}_file_with_a_name_that_is_rather_long.jsonl" for name in ("a", "another")]
    for start, file in enumerate(files):
        rows = range(30 * start, 30 * start + 30)
        file.write_text("".join(f'{{"text": "Anna likes {i}", "label": "{i % 3}"}}\n' for i in rows))
    flags = {"task": "classification", "train_file": files[0], "val_file": files[1], "max_len": 16, "max_steps": 2}
    assert train(*tiny_family("bert")(**flags, eval_freq=1, start_context=None)) == 0
    assert run_cli("evaluate", tmp_path / "run", "--batch_size", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []  # a path is not cut
    assert run_cli("evaluate", tmp_path / "run", "--learning_rate", 1) == 2
    assert "learning_rate has no effect on an evaluation; remove it" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="save_freq has no effect on an evaluation"):
        hf_myllm.evaluate(tmp_path / "run", save_freq=3)


def test_the_hardware_is_counted_in_words(tiny, capsys):
    assert train(*tiny(max_steps=1, eval_freq=None)) == 0
    assert re.search(r"^hardware    1 CPU, precision fp32", capsys.readouterr().out, re.MULTILINE)
    assert (plural(1, "GPU"), plural(2000, "row")) == ("1 GPU", "2,000 rows")


def test_without_a_terminal_the_output_is_aligned_lines(tiny, capfd):
    assert train(*tiny(max_steps=120, eval_freq=60)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\r" not in out
    assert "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("step "))
    evaluations = [line for line in out.splitlines() if ": training loss" in line]
    assert [line[:9] for line in evaluations] == ["step   0:", "step  60:", "step 120:"]
    assert len({line.index(", validation") for line in evaluations}) == 1
    heads = [line[:12] for line in out.splitlines() if line[:1].isalpha() and not line.startswith("step ")]
    assert all(head[-1] == " " and head[0] != " " for head in heads)  # the label has a column of its own


def test_a_quiet_run_prints_nothing_but_errors(tiny, tmp_path, capfd):
    assert train(*tiny(max_steps=10), "--quiet") == 0
    assert tuple(capfd.readouterr()) == ("", "")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert train(*tiny(max_steps=10), "--quiet") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", err)


def test_log_levels(tmp_path, capsys):
    for level, printed in (("info", "hello\nbeware\n"), ("warning", "beware\n"), ("error", "")):
        reporter = Reporter(None, 0, 1, log_level=level)
        reporter.info("hello")
        reporter.warning("beware")
        assert capsys.readouterr().out == printed


def test_a_profile_shows_the_time_of_a_step_by_category(tiny, tmp_path, capsys):
    assert train(*tiny(max_steps=14, eval_freq=None), "--profile", "3") == 0
    summary = (tmp_path / "run" / "profile" / "summary.txt").read_text()
    assert summary.strip() in capsys.readouterr().out
    assert "ms per step over 3 steps" in summary
    assert "matrix products" in summary
    assert "attention" in summary
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert train(*tiny(max_steps=2, save_model=tmp_path / "short"), "--profile", "50") == 0


def test_a_compiled_kernel_is_counted_by_its_operations_and_not_as_a_copy():
    kernels = {
        "triton_red_fused__to_copy_add_native_layer_norm_3": "norms",
        "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0": "norms",
        "triton_red_fused__log_softmax__to_copy_view_5": "loss",
        "triton_poi_fused__to_copy_cat_mul_neg_slice_unsqueeze_4": "element-wise",  # rotary embeddings
        "triton_tem_fused_flex_attention_backward_9": "attention",
        "triton_poi_fused__to_copy_7": "copies",
        "triton_poi_fused_clone_view_2": "copies",
        "aten::copy_": "copies",
        "Memcpy HtoD (Pinned -> Device)": "copies",
    }
    assert {name: category_of(name) for name in kernels} == kernels


def test_log_level_debug_shows_the_messages_of_libraries(tiny):
    assert "generation_config.json" in run_command(*tiny(max_steps=2), "--log_level", "debug").stderr


def test_memory_and_mfu_are_logged_where_they_are_known(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_myllm.reporting.console.time.monotonic", lambda: clock[0])
    reporter = Reporter(tmp_path, 0, 1, flops=6e9 / 989e12, memory=lambda: 2_500_000_000)
    clock[0] = 2.0
    reporter.log_step(1, 1.0, 1e-3, 100_000, 0.5, 7)
    reporter.close()
    line = read_metrics(tmp_path)[0]
    assert line["peak_memory_gb"] == 2.5
    assert line["mfu"] == pytest.approx(50_000 * 6e9 / 989e12, abs=1e-4)


def test_training_time_adds_up_over_launches(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_myllm.reporting.console.time.monotonic", lambda: clock[0])
    for start in (0, 2):
        reporter = Reporter(tmp_path, start, 4)
        for step in (start + 1, start + 2):
            clock[0] += 3.0
            reporter.log_step(step, 1.0, 1e-3, 100, 0.5, 7)
        reporter.close()
        clock[0] += 1000.0
    assert [line["train_seconds"] for line in read_metrics(tmp_path)] == [3.0, 6.0, 9.0, 12.0]


def test_callbacks_get_what_is_logged(tmp_path):
    logged, evaluated = [], []
    reporter = Reporter(tmp_path, 0, 1, on_log=logged.append, on_evaluate=evaluated.append)
    reporter.log_step(1, float("nan"), 1e-3, 100, 0.5, 7)
    reporter.log({"step": 1, "train_loss": 2.0, "val_loss": 3.0})
    reporter.close()
    assert logged == read_metrics(tmp_path)
    assert evaluated == logged[1:]
    other_rank = Reporter(None, 0, 1, is_main=False, on_log=logged.append)
    other_rank.log_step(1, 1.0, 1e-3, 100, 0.5, 7)
    other_rank.log({"step": 1, "train_loss": 2.0})
    assert len(logged) == 2


def test_an_error_in_a_callback_propagates(tmp_path):
    reporter = Reporter(tmp_path, 0, 1, on_log=lambda line: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reporter.log_step(1, 1.0, 1e-3, 100, 0.5, 7)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("causal", {}),
        ("causal", {"loss": 12.3456, "bits_per_byte": 1.234, "tokens": 5}),
        ("mlm_nsp", {"loss": 12.3456, "nsp_loss": 0.6931, "nsp_accuracy": 0.5, "bits_per_byte": None, "tokens": 5}),
        ("classification", {"loss": 0.6931} | dict.fromkeys(("accuracy", "f1", "precision", "recall"), 0.123456)),
    ],
)
def test_lines_of_evaluations_fit_80_columns(capsys, task, metrics):
    details = TASKS[task]().describe_metrics(metrics)
    Reporter(None, 0, 100_000).show_evaluation(5, {"loss": 12.3456}, metrics, details)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step      5: training loss 12.3456")
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(lines)
    for name in ("accuracy", "f1", "precision", "recall"):
        assert name not in metrics or f"{name} 0.1235" in text
