"""What a run leaves to look at."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
from conftest import ROOT, command, run_command, train

from hf_myllm.reporting.console import Reporter
from hf_myllm.reporting.metrics_log import read_metrics


def write(folder, lines, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_a_resumed_log_forgets_what_is_run_again_and_what_is_torn(tmp_path):
    write(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 9)], tail='{"step": 9, "lo')
    Reporter(tmp_path, start=5, total_steps=20).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_only_the_main_process_speaks(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 5, is_main=False)
    reporter.info("hello")
    reporter.log_step(1, 1.0, 1e-3, 10, 0.5, 7)
    reporter.close()
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_speed_leaves_evaluations_out(tmp_path, monkeypatch):
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


def test_a_recipe_dump_and_a_log_hold_no_secret(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert train(*tiny(max_steps=5)) == 0
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hf_secretsecretsecret" not in path.read_bytes()


# ---- the terminal


def in_a_terminal(arguments, columns=80):
    """What a command sends to a terminal of some columns, and its exit code."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    job = subprocess.Popen(command(*arguments), stdin=other, stdout=other, stderr=other, cwd=ROOT)
    os.close(other)
    sent = b""
    while True:
        try:
            more = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        sent += more
    os.close(main)
    return sent.decode(), job.wait(timeout=60)


def test_a_terminal_of_80_columns_has_one_line_of_progress(tiny):
    sent, code = in_a_terminal(tiny(max_steps=60, eval_freq=30, temperature=1.5, max_new_tokens=90))
    assert code == 0, sent
    assert "\x1b[A" not in sent  # a second bar would move the cursor
    lines = [line for line in re.split(r"[\r\n]+", sent.replace("\x1b[K", "")) if line.strip()]
    bars = [line for line in lines if line.startswith("step") and "|" in line]
    assert len(bars) > 1
    assert all(
        re.match(r"step \d+/60 \|.*\| \S+ left, loss [\d.]+, lr [\d.e-]+, \S+ tokens/s$", bar)
        for bar in bars
        if "starting" not in bar
    )
    assert all(len(bar) <= 80 for bar in bars)
    assert all(len(line) <= 80 for line in lines if line.startswith("  | "))  # what the model says
    assert not any("warning" in line.lower() or "Traceback" in line for line in lines)


def test_a_pipe_has_lines_that_align_and_nothing_else(tiny):
    result = run_command(*tiny(max_steps=120, eval_freq=60))
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\r" not in result.stdout
    assert "\x1b" not in result.stdout
    evaluations = [line for line in result.stdout.splitlines() if ": training loss" in line]
    assert [line[:9] for line in evaluations] == ["step   0:", "step  60:", "step 120:"]
    assert len({line.index(", validation") for line in evaluations}) == 1
    heads = [line[:12] for line in result.stdout.splitlines() if line[:1].isalpha() and not line.startswith("step ")]
    assert all(head[-1] == " " and head[0] != " " for head in heads)  # what a line is about, in a column of its own


def test_quiet_says_nothing_when_all_is_well_and_what_is_wrong_when_it_is_not(tiny, tmp_path, capsys):
    result = run_command(*tiny(max_steps=10), "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert train(*tiny(max_steps=10), "--quiet") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch("error: .*\n", said.err)


def test_warnings_are_kept_by_quiet_and_dropped_by_error(tmp_path, capsys):
    for level, said in (("info", "hello\nbeware\n"), ("warning", "beware\n"), ("error", "")):
        reporter = Reporter(None, 0, 1, log_level=level)
        reporter.info("hello")
        reporter.warning("beware")
        assert capsys.readouterr().out == said


def test_a_profile_says_where_a_step_spends_its_time(tiny, tmp_path):
    result = run_command(*tiny(max_steps=14, eval_freq=None), "--profile", "3")
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "run" / "profile" / "summary.txt").read_text()
    assert summary.strip() in result.stdout
    assert "ms a step over 3 steps" in summary
    assert "matrix products" in summary
    assert "attention" in summary
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert train(*tiny(max_steps=2, save_model=tmp_path / "short"), "--profile", "50") == 0


def test_debug_lets_the_libraries_speak(tiny):
    assert "generation_config.json" in run_command(*tiny(max_steps=2), "--log_level", "debug").stderr


def test_what_can_be_known_of_memory_and_of_the_devices_is_logged(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_myllm.reporting.console.time.monotonic", lambda: clock[0])
    reporter = Reporter(tmp_path, 0, 1, flops=6e9 / 989e12, memory=lambda: 2_500_000_000)
    clock[0] = 2.0
    reporter.log_step(1, 1.0, 1e-3, 100_000, 0.5, 7)
    reporter.close()
    line = read_metrics(tmp_path)[0]
    assert line["peak_memory_gb"] == 2.5
    assert line["mfu"] == pytest.approx(50_000 * 6e9 / 989e12, abs=1e-4)


def test_the_time_of_training_goes_on_where_a_run_goes_on(tmp_path, monkeypatch):
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
