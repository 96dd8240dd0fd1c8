"""What a run leaves to look at."""

import json

from conftest import train

from hf_myllm.report import Report, read_metrics


def write(folder, lines, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_a_resumed_log_forgets_what_is_run_again_and_what_is_torn(tmp_path):
    write(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 9)], tail='{"step": 9, "lo')
    Report(tmp_path, start=5, total_steps=20).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_only_the_main_process_speaks(tmp_path, capsys):
    report = Report(tmp_path, 0, 5, is_main=False)
    report.say("hello")
    report.step(1, 1.0, 1e-3, 10, 0.5, 7)
    report.close()
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_speed_leaves_evaluations_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_myllm.report.time.monotonic", lambda: clock[0])
    report = Report(tmp_path, 0, 2)
    clock[0] = 2.0
    report.step(1, 1.0, 1e-3, 100, 0.5, 7)
    report.pause()
    clock[0] = 60.0
    report.resume()
    clock[0] = 62.0
    report.step(2, 1.0, 1e-3, 100, 0.5, 7)
    report.close()
    assert [line["tokens_per_second"] for line in read_metrics(tmp_path)] == [50.0, 50.0]


def test_a_recipe_dump_and_a_log_hold_no_secret(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert train(*tiny(max_steps=5)) == 0
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hf_secretsecretsecret" not in path.read_bytes()
