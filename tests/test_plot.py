"""Curves, of one run or of several."""

import json
import re

import numpy as np
import pytest
from conftest import train

from hf_myllm import plot
from hf_myllm.plot import main


def write(folder, steps=100, log_freq=1, every=50, **about):
    """A folder with the metrics of a run that never was."""
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
def test_a_plot_of_little_is_a_picture_too(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.make(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_axes_count_tokens_and_training_time(tmp_path):
    run = plot.read(write(tmp_path / "run", log_freq=5))
    assert run.axes["step"][-1] == 100
    assert run.axes["tokens"][-1] == 6400  # of each step, also of those between the lines
    assert run.axes["time"][-1] == 50
    assert run.at([0, 50, 100], "tokens").tolist() == [0, 3200, 6400]


def test_a_run_that_was_stopped_and_resumed_has_one_line(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*tiny(save_model=whole)) == 0
    assert train(*tiny(save_model=parts, max_steps=25)) == 0
    assert train(*tiny(save_model=parts), "--resume", "--allow_changed") == 0
    one, two = plot.read(whole), plot.read(parts)
    assert two.axes["step"].tolist() == one.axes["step"].tolist()
    assert two.axes["tokens"].tolist() == one.axes["tokens"].tolist()
    assert (np.diff(two.axes["time"]) > 0).all()  # without the time in which nothing was trained
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    wall = [line["time"] for line in lines if "time" in line]
    assert two.axes["time"][-1] < wall[-1] - wall[0] + 1


@pytest.mark.parametrize("by", plot.AXES)
def test_runs_are_laid_over_each_other(tmp_path, monkeypatch, capsys, by):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "first", steps=60)
    write(tmp_path / "second", steps=100, unit="nats per label")
    main(["first", "second", "--by", by])
    assert capsys.readouterr().out.split() == ["curves.png", "curves.svg"]
    text = re.sub(r"<[^>]+>", "", (tmp_path / "curves.svg").read_text())
    for said in ("first: validation", "second: validation", "learning rate", "nats per label or nats per token"):
        assert said in text
    assert {"step": "step", "tokens": "thousand tokens", "time": "training time (seconds"}[by] in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run")
    main(["a/run", "b/run", "--output", "both.svg"])
    assert "a/run: validation" in (tmp_path / "both.svg").read_text()


def test_one_run_has_its_level_its_tokens_and_units(tmp_path):
    folder = write(tmp_path / "run", unigram_loss=4.2)
    main([str(folder)])
    text = (folder / "loss.svg").read_text()
    for said in ("thousand tokens", "unigram level", "loss (nats per token)", "training, smoothed", "validation"):
        assert said in text


def test_a_long_run_is_thinned_and_keeps_its_peaks(tmp_path):
    x = np.arange(100_000)
    y = np.zeros(100_000)
    y[54_321] = 7.0
    thin_x, thin_y = plot._thin(x, y)
    assert len(thin_x) <= 4002
    assert thin_y.max() == 7.0
    assert (np.diff(thin_x) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], ". has no curves: its metrics.jsonl is missing or empty"),
        ([".", "--output", "x.pdf"], "--output x.pdf: give a file that ends in .png or .svg"),
        ([".", "--by", "weight"], "invalid choice: 'weight'"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
