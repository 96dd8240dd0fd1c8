"""The best checkpoint, patience, metrics of the library, rows that cannot be used, and heads for other labels."""

import re
import shutil

import pytest
from conftest import train
from small_runs import (
    NAMES,
    evaluations,
    flags,
    read_lines,
    write_lines,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_myllm.reporting.metrics_log import best_evaluation


def test_the_best_checkpoint_is_kept_and_patience_stops_the_run(tmp_path, noise, capsys):
    assert train(*flags(**noise, max_steps=200, metric_for_best="loss", patience=4)) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    losses = {line["step"]: line["val_loss"] for line in evaluations(run) if line["step"]}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(4, best + 17, 4))  # patience: four evaluations without a better one
    assert f"best        val_loss {losses[best]:.4f} after step {best}; {run} holds the best" in out
    assert f"stopped     early, after step {best + 16} of 200: 4 evaluations without improvement" in out
    names = {path.name for path in run.glob("checkpoint-*")}
    assert f"checkpoint-{best}" in names
    assert f"checkpoint-{best + 16}" in names
    assert (run / "model.safetensors").read_bytes() == (run / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    assert train(run / "recipe.yaml", "--init_from", "resume") == 0
    assert f"is finished, after {best + 16} steps; raise patience" in capsys.readouterr().out
    last = tmp_path / "last"
    settings = noise | {"max_steps": 200, "metric_for_best": "loss", "patience": 4, "final_model": "last"}
    assert train(*flags(**settings | {"save_model": last})) == 0
    weights = (last / f"checkpoint-{best + 16}" / "model.safetensors").read_bytes()
    assert (last / "model.safetensors").read_bytes() == weights
    assert (last / f"checkpoint-{best}").is_dir()
    # final_model may change without training
    assert train(last / "recipe.yaml", "--init_from", "resume", "--final_model", "best") == 0
    assert (last / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert len(evaluations(last)) == len(evaluations(run))


def test_a_signal_in_the_last_evaluation_changes_nothing(tmp_path, noise):
    settings = {**noise, "max_steps": 200, "metric_for_best": "loss", "patience": 2}
    assert train(*flags(**settings)) == 0
    run = tmp_path / "run"
    expected, weights = evaluations(run), (run / "model.safetensors").read_bytes()
    last = expected[-1]["step"]
    # what a signal leaves behind: the checkpoint of that step without its evaluation
    text = [line for line in read_lines(run / "metrics.jsonl") if line["step"] < last or "val_loss" not in line]
    write_lines(run / "metrics.jsonl", text)
    (run / "model.safetensors").unlink()
    assert train(*flags(**settings, init_from="resume")) == 0
    assert evaluations(run) == expected
    assert (run / "model.safetensors").read_bytes() == weights


def test_an_interrupted_run_finds_the_same_best(tmp_path, noise):
    settings = {**noise, "max_steps": 40, "metric_for_best": "loss", "save_total_limit": 9}
    assert train(*flags(**settings)) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    best = best_evaluation(run, "val_loss", 40)[0]
    shutil.copytree(run, other)
    for path in other.glob("*.safetensors"):
        path.unlink()
    for step in range(21, 41):
        shutil.rmtree(other / f"checkpoint-{step}", ignore_errors=True)
    assert train(*flags(**settings | {"save_model": other, "init_from": "resume"})) == 0
    assert [line["val_loss"] for line in evaluations(other)] == [line["val_loss"] for line in evaluations(run)]
    assert best_evaluation(other, "val_loss", 40)[0] == best
    assert (other / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_the_best_checkpoint_needs_a_metric(tmp_path, noise, capsys):
    for more, message in (
        (
            {"metric_for_best": "f2"},
            "metric_for_best: val_f2 is not a metric of task classification; choose one of val_loss, val_acc",
        ),
        ({"patience": 2}, "patience has no effect without metric_for_best; set it too"),
        ({"final_model": "best"}, "final_model best needs a metric"),
        ({"metric_for_best": "loss", "eval_freq": None}, "needs several evaluations; give --eval_freq"),
        (
            {"metric_for_best": "loss", "val_file": None, "val_fraction": 0},
            "metric_for_best: there are no validation rows; give --val_file FILE",
        ),
        ({"metrics": "no_such_metric_anywhere"}, "metric no_such_metric_anywhere cannot be loaded"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert train(*flags(**noise | {"max_steps": 8} | more)) == 2
        assert message in capsys.readouterr().err


METRIC = """
import datasets
import evaluate
class Halves(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"rows": len(references), "f1": 0.5}
"""


def test_metrics_that_should_grow_or_fall(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": n, "train_loss": 0, "val_x": x, "val_wer": x} for n, x in ((0, 9), (2, 3), (4, 5), (6, None))],
    )
    assert best_evaluation(tmp_path, "val_x", 9) == (4, 5, 1)
    assert best_evaluation(tmp_path, "val_wer", 9) == (2, 3, 2)
    assert best_evaluation(tmp_path, "val_x", 9, greater_is_better=False) == (2, 3, 2)
    assert best_evaluation(tmp_path, "val_y", 9) == (None, None, 0)  # no evaluation has it
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "train_loss": 0, "val_x": None} for n in (2, 4)])
    assert best_evaluation(tmp_path, "val_x", 9) == (None, None, 2)


def test_metrics_of_the_library_evaluate(tmp_path, noise):
    (tmp_path / "halves.py").write_text(METRIC)
    assert train(*flags(**noise, max_steps=2, metrics=tmp_path / "halves.py", trust_metric_code="true")) == 0
    metrics = evaluations(tmp_path / "run")[-1]
    assert metrics["val_rows"] == 40
    assert metrics["val_halves_f1"] == 0.5
    assert "val_f1" in metrics


def test_bad_rows_are_skipped_and_counted(tmp_path, noise, capsys):
    with open(noise["train_file"], "a") as file:
        file.write('{"text": "x", "label": null}\n{"text": "y"}\n')
    assert train(*flags(**noise, max_steps=2)) == 2
    assert "train.jsonl line 65 has no label" in capsys.readouterr().err
    assert train(*flags(**noise, max_steps=2), "--skip_bad_rows") == 0
    assert re.search("skipped 2 rows of the training data, for example .*line 65 has no label", capsys.readouterr().out)
    write_lines(tmp_path / "other.jsonl", [*read_lines(noise["val_file"]), {"text": "x", "label": "c"}])
    settings = flags(val_file=tmp_path / "other.jsonl", load_model=tmp_path / "run")
    assert train(tmp_path / "run" / "recipe.yaml", "--eval_only", *settings, "--skip_bad_rows") == 0
    assert "skipped 1 row of the validation data" in capsys.readouterr().out


def test_a_head_keeps_the_meaning_of_its_labels(tmp_path, noise, capsys):
    """A head for the same labels is kept, in its own order; a head for other labels is newly initialized."""
    assert train(*flags(**noise, max_steps=60)) == 0
    run, swapped = tmp_path / "run", tmp_path / "swapped"
    model = AutoModelForSequenceClassification.from_pretrained(run)
    model.score.weight.data = model.score.weight.data.flip(0)
    model.config.id2label, model.config.label2id = {0: "b", 1: "a"}, {"b": 0, "a": 1}
    model.save_pretrained(swapped)
    AutoTokenizer.from_pretrained(run).save_pretrained(swapped)
    same = flags(
        model="gpt", task="classification", train_file=noise["train_file"], val_file=noise["val_file"], max_steps=1
    )
    for start in (run, swapped):
        assert (
            train(*same, *flags(init_from=start, save_model=tmp_path / f"from_{start.name}", learning_rate=1e-12)) == 0
        )
        assert "newly initialized" not in capsys.readouterr().out
    before = evaluations(run)[-1]
    for name in ("from_run", "from_swapped"):
        assert evaluations(tmp_path / name)[-1]["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "from_swapped").id2label == {0: "b", 1: "a"}
    numbers = [{"text": line["text"], "label": index} for index, line in enumerate(read_lines(noise["val_file"]))]
    data = write_lines(tmp_path / "numbers.jsonl", numbers)
    settings = {
        "model": "gpt",
        "task": "classification",
        "problem_type": "regression",
        "train_file": data,
        "max_steps": 1,
    }
    assert train(*flags(**settings, init_from=run, save_model=tmp_path / "first")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out
    assert train(*flags(**settings, init_from=tmp_path / "first", save_model=tmp_path / "second")) == 0
    assert "newly initialized" not in capsys.readouterr().out
    other = [
        {"text": line["text"], "label": {"a": "cat", "b": "dog"}[line["label"]]}
        for line in read_lines(noise["val_file"])
    ]
    settings = flags(
        model="gpt", task="classification", train_file=write_lines(tmp_path / "pets.jsonl", other), max_steps=1
    )
    assert train(*settings, *flags(init_from=run, save_model=tmp_path / "pets")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out


def test_a_head_for_more_labels_is_newly_initialized(tmp_path, noise, capsys):
    assert train(*flags(**noise, max_steps=2)) == 0
    rows = [{"text": f"{name} {n}", "label": "xyz"[n % 3]} for name in NAMES for n in range(9)]
    settings = {
        "model": "gpt",
        "task": "classification",
        "train_file": write_lines(tmp_path / "b.jsonl", rows),
        "max_steps": 2,
    }
    assert train(*flags(**settings, init_from=tmp_path / "run", save_model=tmp_path / "other")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "other").id2label == {0: "x", 1: "y", 2: "z"}
