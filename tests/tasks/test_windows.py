"""Long texts of classifiers as overlapping windows, and texts made of several columns."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_run, read_metrics, train
from launching import run_ranks
from small_runs import BERT, DROPOUT, evaluations, flags, predict, read_lines, write_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_myllm.data import sources, tokenizer
from hf_myllm.tasks.classification import Classification
from hf_myllm.tasks.labelled_rows import load_rows

ROWS = [{"text": "word number text " * n, "pair": "pair text " * (12 - n), "label": n % 2} for n in range(1, 12)]


@pytest.fixture
def wordpiece():
    return tokenizer.train_wordpiece([row["text"] + row["pair"] for row in ROWS] * 3, 120)


def load(folder, wordpiece, **settings):
    source = sources.file_source(str(write_lines(folder / "a.jsonl", ROWS)))
    task = Classification(wordpiece, max_len=12, long_texts="windows", **settings)
    task.find_labels(source, None, False)
    rows, _ = load_rows(source, task)
    task.configure(SimpleNamespace(pad_token_id=wordpiece.pad_token_id, type_vocab_size=2), 12)
    return task, rows


@pytest.mark.parametrize("stride", [None, 3])
def test_windows_are_those_of_the_stock_tokenizer(tmp_path, wordpiece, stride):
    _, rows = load(tmp_path, wordpiece, stride=stride)
    options = {"truncation": True, "max_length": 12, "return_overflowing_tokens": True, "stride": 10 - (stride or 5)}
    stock = wordpiece([row["text"] for row in ROWS], **options)
    assert [rows.read(row)[0].tolist() for row in range(len(rows))] == stock["input_ids"]
    assert rows.example.tolist() == stock["overflow_to_sample_mapping"]


def test_the_longer_text_of_a_pair_is_split(tmp_path, wordpiece):
    _, rows = load(tmp_path, wordpiece, text_pair_column="pair")
    for example, row in enumerate(ROWS):
        windows = [rows.read(index) for index in rows.rows_of_examples([example])]
        ids = [wordpiece(row[name], add_special_tokens=False)["input_ids"] for name in ("text", "pair")]
        longer = int(len(ids[1]) >= len(ids[0]))
        if len(ids[0]) + len(ids[1]) <= 9:
            assert [len(window) for window, _ in windows] == [len(ids[0]) + len(ids[1]) + 3]
            continue
        parts = [(window[1 : second - 1].tolist(), window[second:-1].tolist()) for window, second in windows]
        assert all(part[1 - longer] == ids[1 - longer][:4] for part in parts)
        room = 9 - len(ids[1 - longer][:4])
        for count, part in enumerate(parts):
            start = count * max(1, room // 2)
            assert part[longer] == ids[longer][start : start + room]


@pytest.mark.parametrize("class_weights", [None, {"0": 3.0}])
def test_each_text_counts_once_in_training(tmp_path, wordpiece, class_weights):
    task, rows = load(tmp_path, wordpiece, class_weights=class_weights)
    if class_weights:
        task.class_weights = task._weigh_classes(rows)
    batch = task.batch(rows, np.arange(len(rows)), 0, len(rows) + 2)
    logits = torch.randn(len(rows) + 2, 2, generator=torch.Generator().manual_seed(0))
    model = lambda **inputs: SimpleNamespace(logits=logits)  # noqa: E731
    model.training = True
    loss = task.forward(model, batch, {"num_items_in_batch": len(rows)}).loss.item()
    losses = torch.nn.functional.cross_entropy(logits[:-2], torch.tensor(rows.row_labels), reduction="none").numpy()
    texts = np.array([losses[rows.example == example].mean() for example in range(len(ROWS))])
    weights = np.array([(class_weights or {}).get(str(row["label"]), 1.0) for row in ROWS])
    assert loss == pytest.approx((texts * weights).sum() / weights.sum(), rel=1e-5)
    assert "row_weights" not in task.batch(rows, np.arange(3))


def write_long_texts(path, count, seed):
    """Write texts of which the last word decides, beyond what a row holds."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label = draw.choice(["nice", "nasty"])
        body = " ".join(["thing"] * draw.randint(0, 30) + [{"nice": "lovely", "nasty": "horrid"}[label]])
        rows.append({"title": draw.choice(["thing", "a thing"]), "body": body, "label": label})
    return write_lines(path, rows)


def test_predictions_are_means_over_the_windows_of_a_text(tmp_path, capsys):
    """Whatever the batch size; of the text that a template makes, in training, evaluation and prediction."""
    run, val = tmp_path / "run", write_long_texts(tmp_path / "val.jsonl", 23, 1)
    settings = {"model": "bert", "task": "classification", "long_texts": "windows", "template": "{title}: {body}"}
    settings |= {"train_file": write_long_texts(tmp_path / "train.jsonl", 60, 0), "val_file": val, "epochs": 1}
    settings |= {"tokenizer": "{train: wordpiece, vocab_size: 300}", "max_len": 16, "batch_size": 16, "save_model": run}
    assert train(*flags(**settings, **BERT, **DROPOUT, learning_rate=5e-3)) == 0
    shown = capsys.readouterr().out
    assert "of 60 texts longer than max_len 16: several windows, whose logits are averaged" in shown
    assert "validation: " in shown
    model, stock = AutoModelForSequenceClassification.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    rows, means = read_lines(val), []
    assert f"over all {len(rows)} rows" in " ".join(shown.split())
    for row in rows:
        options = {"truncation": True, "max_length": 16, "stride": 7, "return_overflowing_tokens": True}
        windows = stock(f"{row['title']}: {row['body']}", **options)["input_ids"]
        with torch.no_grad():
            means.append(torch.stack([model(torch.tensor([ids])).logits[0] for ids in windows]).mean(0))
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    last, logits = evaluations(run)[-1], torch.stack(means)
    assert last["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert last["val_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    outputs = []
    for size in (1, 7):
        assert predict(run, "--input", val, "--output", tmp_path / f"{size}.jsonl", "--batch_size", size) == 0
        outputs.append(read_lines(tmp_path / f"{size}.jsonl"))
        scores = [[row["scores"][model.config.id2label[label]] for label in range(2)] for row in outputs[-1]]
        np.testing.assert_allclose(scores, logits.softmax(-1).numpy(), atol=1e-5)
    assert outputs[0][3]["text"] == f"{rows[3]['title']}: {rows[3]['body']}"
    assert "longer than max_len 16: several windows" in capsys.readouterr().err
    (tmp_path / "lines.txt").write_text("thing: thing lovely\n")  # a line is a text as it is
    assert predict(run, "--input", tmp_path / "lines.txt") == 0
    assert '{"text": "thing: thing lovely", "label": "n' in capsys.readouterr().out


def test_keys_that_do_not_fit_are_one_line(tmp_path, capsys):
    base = {"model": "bert", "train_file": write_long_texts(tmp_path / "a.jsonl", 9, 0), "max_len": 16}
    base |= {"tokenizer": "{train: wordpiece, vocab_size: 300}", "task": "classification", "save_model": tmp_path / "x"}
    for more, message in (
        ({"stride": 15}, "stride 15 is above the 14 tokens of a row"),
        ({"template": "{title} {boddy}"}, "line 1 has no column 'boddy', but 'title', 'body', 'label'"),
        ({"template": "{title}", "text_column": "body"}, "template and text_column are both given"),
        ({"template": "{text: '{title}'}"}, "template: task classification cannot use .*; give one text"),
    ):
        assert train(*flags(**{**base, "template": "{body}", "long_texts": "windows"} | more)) == 2
        captured = capsys.readouterr().err
        assert len(captured.splitlines()) == 1
        assert re.search(message, captured)


@pytest.mark.chaos
def test_two_ranks_train_and_evaluate_windows_as_one(tmp_path):
    settings = {"model": "bert", "task": "classification", "long_texts": "windows", "text_column": "body", "epochs": 1}
    settings |= {"train_file": write_long_texts(tmp_path / "train.jsonl", 40, 0), "max_len": 16, "eval_freq": 2}
    settings |= {"val_file": write_long_texts(tmp_path / "val.jsonl", 23, 1), "batch_size": 4, "total_batch_size": 16}
    settings |= {"tokenizer": "{train: wordpiece, vocab_size: 300}"} | BERT | DROPOUT
    assert train(*flags(**settings, save_model=tmp_path / "one")) == 0
    result = run_ranks(2, *flags(**settings, save_model=tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)
    assert read_metrics(tmp_path / "two", "val_accuracy") == read_metrics(tmp_path / "one", "val_accuracy")
