"""The curves of one run or of several."""

import json
import re

import numpy as np
import pytest
from conftest import run_cli, train

from hf_myllm.reporting import plots

pytestmark = pytest.mark.usefixtures("pictures")


def write(folder, steps=100, log_freq=1, every=50, **about):
    """Write the metrics of an invented run into a folder."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": 0, "train_loss": 5.0, "val_loss": 5.1}]
    for step in range(log_freq, steps + 1, log_freq):
        line = {"step": step, "loss": 5.0 / step**0.2, "learning_rate": 1e-3, "tokens": 64, "train_seconds": 0.5 * step}
        lines.append(line | {"time": 1e9 + step})
        if step % every == 0:
            lines.append({"step": step, "train_loss": 5.0 / step**0.2, "val_loss": 5.1 / step**0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("lines", [[{"step": 1, "loss": 3.0, "learning_rate": 1.0}], [{"step": 0, "train_loss": 3.0}]])
def test_a_single_point_can_be_plotted(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.write_plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_axes_count_tokens_and_training_time(tmp_path):
    run = plots.read(write(tmp_path / "run", log_freq=5))
    assert run.axes["step"][-1] == 100
    assert run.axes["tokens"][-1] == 6400  # steps between the lines count too
    assert run.axes["time"][-1] == 50
    assert run.at([0, 50, 100], "tokens").tolist() == [0, 3200, 6400]


def test_a_resumed_run_has_one_line(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*tiny(save_model=whole)) == 0
    assert train(*tiny(save_model=parts, max_steps=25)) == 0
    assert train(*tiny(save_model=parts), "--resume", "--allow_changed") == 0
    at_once, resumed = plots.read(whole), plots.read(parts)
    assert resumed.axes["step"].tolist() == at_once.axes["step"].tolist()
    assert resumed.axes["tokens"].tolist() == at_once.axes["tokens"].tolist()
    assert (np.diff(resumed.axes["time"]) > 0).all()  # without the time between the two launches
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    wall = [line["time"] for line in lines if "time" in line]
    assert resumed.axes["time"][-1] < wall[-1] - wall[0] + 1


@pytest.mark.parametrize("by", plots.AXES)
def test_several_runs_share_the_axes(tmp_path, monkeypatch, capsys, by):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "first", steps=60)
    write(tmp_path / "second", steps=100, unit="nats per label")
    assert run_cli("plot", "first", "second", "--by", by) == 0
    assert capsys.readouterr().out.split() == ["curves.png", "curves.svg"]
    text = re.sub(r"<[^>]+>", "", (tmp_path / "curves.svg").read_text())
    for text_part in ("first: validation", "second: validation", "learning rate", "nats per label or nats per token"):
        assert text_part in text
    assert {"step": "step", "tokens": "thousand tokens", "time": "training time (seconds"}[by] in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run")
    assert run_cli("plot", "a/run", "b/run", "--output", "both.svg") == 0
    assert "a/run: validation" in (tmp_path / "both.svg").read_text()


def test_one_run_shows_its_unigram_loss_tokens_and_units(tmp_path):
    folder = write(tmp_path / "run", unigram_loss=4.2)
    assert run_cli("plot", str(folder)) == 0
    text = (folder / "loss.svg").read_text()
    for text_part in ("thousand tokens", "unigram loss", "loss (nats per token)", "training, smoothed", "validation"):
        assert text_part in text


def test_thinning_keeps_peaks(tmp_path):
    x = np.arange(100_000)
    y = np.zeros(100_000)
    y[54_321] = 7.0
    thin_x, thin_y = plots._thin(x, y)
    assert len(thin_x) <= 4002
    assert thin_y.max() == 7.0
    assert (np.diff(thin_x) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: it is not a folder"),
        (["."], ".: metrics.jsonl is missing or empty"),
        ([".", "--output", "x.pdf"], "--output: x.pdf is not a picture; give a file that ends in .png or .svg"),
        ([".", "--by", "weight"], "invalid choice: 'weight'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_cli("plot", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["_under", "$ma$th_{x}", r"run_$\alpha_{$", "x" * 200, "日本 🙂"])
def test_names_are_shown_literally(tmp_path, name, recwarn):
    write(tmp_path / name)
    write(tmp_path / "other")
    assert run_cli("plot", str(tmp_path / name), str(tmp_path / "other"), "--output", str(tmp_path / "both.svg")) == 0
    text = re.sub(r"<[^>]+>", "", (tmp_path / "both.svg").read_text())
    assert f"{name[:28]} ... {name[-28:]}: validation" in text if len(name) > 60 else f"{name}: validation" in text
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_skipped_steps_are_marked_and_spikes_are_cut(tmp_path):
    folder = write(tmp_path / "run", steps=300)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if 90 <= line["step"] < 120:
            line["loss"] = None
        if line["step"] == 200:
            line["loss"] = 1e6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_cli("plot", str(folder)) == 0
    text = (folder / "loss.svg").read_text()
    assert "skipped steps: loss not finite" in text
    assert "1 step is higher, up to 1e+06" in text


@pytest.mark.parametrize(
    "odd",
    [{"loss": "x"}, {"loss": {}}, {"tokens": None}, {"val_loss": [1]}, {"step": 10**400}, {"learning_rate": None}],
)
def test_values_that_are_not_numbers_are_ignored(tmp_path, odd):
    folder = write(tmp_path / "run", unit=5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 101, "loss": 1.0, "learning_rate": 1.0, "train_loss": 2.0} | odd) + "\n")
    assert run_cli("plot", str(folder)) == 0


def test_a_run_without_times_cannot_be_plotted_by_time(tmp_path, capsys):
    folder = write(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"train_seconds": [\d.]+, ', "", text))
    assert run_cli("plot", folder, "--by", "time") == 2
    assert "run has no training times" in capsys.readouterr().err


def test_the_matplotlib_backend_of_a_notebook_is_left_alone(tmp_path, monkeypatch):
    """It is not changed, and a backend that another environment lacks is not needed."""
    import subprocess
    import sys

    folder = write(tmp_path / "run")
    script = f"from hf_myllm.reporting.plots import plot; plot([{str(folder)!r}])\n"
    script += "import sys; assert 'matplotlib.pyplot' not in sys.modules"
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_that_is_not_there")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
