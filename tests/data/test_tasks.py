"""Labelled data: every label where it belongs, and every mistake named by its row."""

import json

import numpy as np
import pytest
import torch

from hf_myllm.data import objectives, sources, tasks, tokenizer
from hf_myllm.errors import InputError

ROWS = [{"text": f"text number {n} " * (n % 7 + 1), "other": f"pair {n}", "label": n % 3} for n in range(50)]


@pytest.fixture(scope="module")
def wordpiece():
    return tokenizer.train_wordpiece([row["text"] + row["other"] for row in ROWS] * 3, 120)


def written(folder, rows, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.file_source(str(folder / name))


def columns(label="label", pair=None):
    return tasks.Columns("text", pair, label)


@pytest.mark.parametrize("pair", [None, "other"])
def test_examples_are_what_the_tokenizer_says(tmp_path, wordpiece, pair):
    source = written(tmp_path, ROWS)
    labels = tasks.find_labels(source, columns(), None)
    assert labels == tasks.Labels("single_label_classification", ("0", "1", "2"))
    training, held_out = tasks.load_examples(source, wordpiece, columns(pair=pair), labels, 20, 0.1)
    assert (len(training), len(held_out)) == (45, 5)
    kept = [row for number, row in enumerate(ROWS) if number % 10 != 4]
    objective = objectives.Classification(labels, wordpiece.pad_token_id, has_types=True)
    batch = objective.batch(training, np.arange(45), size=50)
    assert batch["labels"].tolist() == [row["label"] for row in kept] + [-100] * 5
    texts = [row["text"] for row in kept], *([[row["other"] for row in kept]] if pair else [])
    stock = wordpiece(*texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        width = stock[name].shape[1]
        assert torch.equal(batch[name][:45, :width], stock[name]), name
    assert batch["input_ids"].shape[1] % 8 == 0
    assert training.account["cut"] > 0
    assert training.lengths(np.arange(3)).tolist() == stock["attention_mask"].sum(1)[:3].tolist()


def test_kinds_of_labels(tmp_path):
    several = [{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": []}, {"text": "z", "label": ["c"]}]
    labels = tasks.find_labels(written(tmp_path, several), columns(), None)
    assert labels == tasks.Labels("multi_label_classification", ("a", "b", "c"))
    assert labels.encode(["c", "a"], "row") == [1.0, 0.0, 1.0]
    assert labels.encode([], "row") == [0.0, 0.0, 0.0]
    flags = tasks.find_labels(written(tmp_path, [{"text": "x", "p": 1, "q": "0"}]), columns(["p", "q"]), None)
    assert flags.encode({"p": 1, "q": "0"}, "row") == [1.0, 0.0]
    number = tasks.find_labels(written(tmp_path, ROWS), columns(), "regression")
    assert (number.encode("2.5", "row"), number.count) == (2.5, 1)
    words = [{"text": "x", "label": name} for name in ("spam", "ham", "spam")]
    assert tasks.find_labels(written(tmp_path, words), columns(), None).names == ("ham", "spam")
    tens = [{"text": "x", "label": number} for number in (10, 9, 100)]
    assert tasks.find_labels(written(tmp_path, tens), columns(), None).names == ("9", "10", "100")


def test_mistakes_are_named_by_row(tmp_path, wordpiece):
    def refused(message, rows, kind=None, known=None, **changed):
        source = written(tmp_path, rows)

        def load():
            labels = known or tasks.find_labels(source, columns(**changed), kind)
            tasks.load_examples(source, wordpiece, columns(**changed), labels, 20)

        with pytest.raises(InputError, match=message):
            load()

    good = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    known = tasks.Labels("single_label_classification", ("a", "b"))
    refused("line 3 has no label", [*good, {"text": "z", "label": None}])
    refused("line 3 has no label", [*good, {"text": "z", "label": ""}], known=known)
    refused("line 3: the label 3 is of another type than that of .* line 1", [*good, {"text": "z", "label": 3}])
    refused("line 3: the label 'c' is not in the training data", [*good, {"text": "z", "label": "c"}], known=known)
    refused("line 1: the label 0.5 is not the name or number", [{"text": "z", "label": 0.5}])
    refused("line 1: the label 'a' is not a number", good, kind="regression")
    refused("has 1 label: there is nothing to tell apart", good[:1])
    refused("line 1 has no column 'class', but 'text', 'label'; name it with --label_column", good, label="class")
    refused("line 1 has no column 'more'", good, pair="more")
    refused("line 3: column 'text' does not hold text: 3", [*good, {"text": 3, "label": "a"}])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="a.txt has no columns"):
        tasks.find_labels(sources.file_source(str(tmp_path / "a.txt")), columns(), None)
