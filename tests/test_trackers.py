"""Experiment trackers: each is started for real, and its files are read back."""

import json
import struct

import pytest
from conftest import train
from launching import start

from hf_myllm.reporting.console import Reporter
from hf_myllm.reporting.metrics_log import read_metrics, read_run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, stories):
    """A folder with a run to step 10 that was resumed to step 20, tracked by all trackers, and with Trackio's files."""
    folder = tmp_path_factory.mktemp("tracked")
    flags = {
        "train_file": stories,
        "tokenizer": "{train: bpe, vocab_size: 300}",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "max_len": 32,
        "eval_freq": 10,
        "eval_iter": 1,
        "save_freq": 10,
        "save_model": folder / "run",
        "project_name": "stories",
    }
    arguments = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    arguments += ["--log_with", "tensorboard", "wandb", "trackio", "--lr_schedule", "constant"]
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    for more in (("--max_steps", 10), ("--max_steps", 20, "--resume", "--allow_changed")):
        process = start(*arguments, *more, environment=environment)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert "tracked     by tensorboard, wandb, trackio, as " in out
        assert error == ""  # no introductions
        assert "Trackio" not in out
    return folder


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def test_tensorboard_has_one_curve(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "run" / "tensorboard" / "stories")).Reload()
    assert {"loss", "learning_rate", "val_loss", "train_loss"} <= set(events.Tags()["scalars"])
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(losses(tracked / "run"))
    assert [event.step for event in events.Scalars("val_loss")] == [0, 10, 20]


def records_of_wandb(path):
    """Yield the records of a .wandb file: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole = (whole if kind in (3, 4) else b"") + data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def test_wandb_has_one_run_under_one_id(tracked):
    logged, ids = {}, []
    for path in sorted((tracked / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in records_of_wandb(path):
            if record.WhichOneof("record_type") == "run":
                ids.append((record.run.run_id, record.run.project, record.run.display_name))
            elif record.WhichOneof("record_type") == "history":
                line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                if "loss" in line:
                    logged[line["_step"]] = line["loss"]
    assert logged == losses(tracked / "run")
    assert set(ids) == {(read_run(tracked / "run")["id"], "stories", "run")}
    assert len(ids) >= 2  # of each launch


def test_trackio_has_one_run(tracked):
    import sqlite3

    lines = sqlite3.connect(tracked / "trackio" / "stories.db").execute("select run_name, step, metrics from metrics")
    lines = [(name, step, json.loads(values)) for name, step, values in lines.fetchall()]
    assert {name for name, _, _ in lines} == {f"run-{read_run(tracked / 'run')['id']}"}
    assert {step: values["loss"] for _, step, values in lines if "loss" in values} == losses(tracked / "run")


def test_a_missing_tracker_package_is_reported_before_anything_is_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_myllm.distributed.importlib.util.find_spec", lambda name: None)
    assert train(*tiny(), "--log_with", "wandb") == 2
    assert "error: log_with: wandb needs its package; pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_failing_tracker_is_reported_once_and_training_continues(tmp_path, capsys):
    def track(values, step):
        raise ConnectionError("no route to host")

    reporter, tracked_steps = Reporter(tmp_path, 0, 3), []
    reporter.trackers = {"wandb": track, "tensorboard": lambda values, step: tracked_steps.append(step)}
    for step in (1, 2, 3):
        reporter.log_step(step, 1.0, 1e-3, 10, 0.5, 7)
    reporter.close()
    assert capsys.readouterr().out.count("warning: wandb failed and is not used any more: no route to host") == 1
    assert len(read_metrics(tmp_path)) == 3
    assert tracked_steps == [1, 2, 3]  # the others get all


def test_a_tracker_that_cannot_start_is_reported_and_training_continues(tiny, monkeypatch, capsys):
    monkeypatch.setattr("wandb.init", lambda **settings: 1 / 0)
    assert train(*tiny(max_steps=2, eval_freq=None), "--log_with", "wandb", "tensorboard") == 0
    out = capsys.readouterr().out
    assert "warning: wandb cannot be used: division by zero" in out
    assert "tracked     by tensorboard, as " in out
