"""Text classification: trained, evaluated, and used by stock transformers."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import train
from families import CASES
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_myllm.tasks import Labels
from hf_myllm.tasks.base import language_metrics
from hf_myllm.tasks.classification import classification_metrics
from hf_myllm.tasks.question_answering import QuestionAnswering
from hf_myllm.tasks.token_classification import entity_metrics, find_entities


def write_rows(path, count, label_type, seed=0):
    """Write texts of nice and nasty words; the label is the more frequent kind, both kinds, or the difference."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            nice, nasty = draw.randint(0, 4), draw.randint(0, 4)
            words = ["lovely"] * nice + ["horrid"] * nasty + ["thing"] * draw.randint(1, 6)
            draw.shuffle(words)
            label = {"single": "nice" if nice > nasty else "nasty", "regression": nice - nasty}.get(label_type)
            if label_type == "multi":
                label = ["nice"] * (nice > 0) + ["nasty"] * (nasty > 0)
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def flags(folder, family, label_type, **more):
    case = CASES[family]
    settings = {**case.recipe(), **case.no_dropout} if case.family.is_decoder else case.recipe()
    settings |= {"task": "classification", "max_len": 32, "batch_size": 16, "start_context": None}
    settings |= {"train_file": write_rows(folder / "train.jsonl", 600, label_type), "save_model": folder / "run"}
    settings |= {
        "val_file": write_rows(folder / "val.jsonl", 101, label_type, 1),
        "learning_rate": 5e-3,
        "epochs": 8 if label_type == "multi" else 4,
    }
    settings["tokenizer"] = f"{{train: {case.family.tokenizer}, vocab_size: 300}}"
    settings |= {"problem_type": "regression" if label_type == "regression" else None} | more
    return [text for key, value in settings.items() if value is not None for text in (f"--{key}", str(value))]


def last_evaluation(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line][-1]


@pytest.mark.parametrize(
    ("family", "label_type"),
    [(f, "single") for f in CASES if "classification" in CASES[f].family.tasks]
    + [("bert", "multi"), ("gpt", "regression")],
)
def test_it_learns_and_stock_transformers_agrees(tmp_path, family, label_type):
    assert train(*flags(tmp_path, family, label_type)) == 0
    run, metrics = tmp_path / "run", last_evaluation(tmp_path / "run")
    model, loading = AutoModelForSequenceClassification.from_pretrained(run, output_loading_info=True)
    assert type(model).__name__ == f"{CASES[family].stock}ForSequenceClassification"
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run)
    with torch.no_grad():  # one at a time: no padding
        logits = torch.cat([model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    if label_type == "regression":
        predicted, expected = logits[:, 0].numpy(), np.array([row["label"] for row in rows])
        assert metrics["val_mse"] == pytest.approx(((predicted - expected) ** 2).mean(), rel=1e-4)
        assert metrics["val_loss"] == pytest.approx(metrics["val_mse"], rel=1e-4)
        assert metrics["val_pearson"] > 0.9
        for page in ("README.md", "report.html"):
            assert "The loss is the mean squared error per text." in (run / page).read_text()
        return
    if label_type == "multi":
        names = [model.config.id2label[index] for index in range(2)]
        expected = np.array([[name in row["label"] for name in names] for row in rows])
        assert metrics["val_accuracy"] == pytest.approx(((logits > 0).numpy() == expected).all(axis=1).mean())
        assert metrics["val_f1_micro"] > 0.9
        return
    expected = np.array([model.config.label2id[row["label"]] for row in rows])
    predicted = logits.argmax(-1).numpy()
    assert metrics["val_accuracy"] == pytest.approx((predicted == expected).mean())
    assert metrics["val_accuracy"] > 0.8
    assert metrics["val_f1"] == pytest.approx(f1_score(expected, predicted))
    assert metrics["val_matthews"] == pytest.approx(matthews_corrcoef(expected, predicted))
    assert metrics["val_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(expected)).item(), rel=1e-4
    )
    assert pipeline("text-classification", str(run))("lovely lovely thing")[0]["label"] == "nice"


def test_the_batch_size_does_not_change_an_evaluation(tmp_path, capsys):
    assert train(*flags(tmp_path, "bert", "single", epochs=1)) == 0
    run = tmp_path / "run"
    outputs = []
    for size in (1, 7, 64):
        capsys.readouterr()
        command = ["--model", "bert", "--task", "classification", "--eval_only", "--load_model", run]
        command += ["--val_file", tmp_path / "val.jsonl"]
        assert train(*command, "--batch_size", size) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    assert f"accuracy {last_evaluation(run)['val_accuracy']:.4f}" in outputs[0]
    (tmp_path / "val.jsonl").write_text('{"text": "x", "label": "so so"}\n')
    assert train(*command) == 2
    assert "line 1: the label 'so so' is not in the training data, which has nasty, nice" in capsys.readouterr().err


@pytest.mark.parametrize("letters", ["BIO", "BIESO", "BILUO"])
def test_entities_are_those_of_seqeval(letters):
    """On random labels, valid or not, as in CoNLL's script. seqeval does not know L and U, so it gets E and S."""
    from seqeval import metrics
    from seqeval.metrics.sequence_labeling import get_entities

    draw = np.random.default_rng(0)
    names = [letter if letter == "O" else f"{letter}-{kind}" for letter in letters for kind in ("X", "Y-Z")]
    predicted, expected = ([draw.choice(names, 30).tolist() for _ in range(40)] for _ in range(2))
    as_bioes = [
        [[name.replace("L-", "E-").replace("U-", "S-") for name in labels] for labels in sentences]
        for sentences in (predicted, expected)
    ]
    for labels, known in zip(predicted, as_bioes[0], strict=True):
        assert find_entities(labels) == get_entities(known)
    ours = entity_metrics(predicted, expected)
    for name in ("precision", "recall", "f1", "accuracy"):
        assert ours[name] == pytest.approx(getattr(metrics, f"{name}_score")(*as_bioes[::-1]))
    assert 0 < ours["f1"] < 0.5


def test_metrics_by_hand():
    labels = {n: Labels("single_label_classification", tuple("abc"[:n])) for n in (2, 3)}
    metrics = classification_metrics([0, 1, 1, 0], [0, 1, 0, 0], labels[2])
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert "f1" not in classification_metrics([0, 1, 2], [0, 1, 2], labels[3])
    several = Labels("multi_label_classification", ("a", "b"))
    metrics = classification_metrics([[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], several)
    assert metrics == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3 + 1) / 2, "f1_micro": 0.8})
    metrics = classification_metrics([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], Labels("regression"))
    assert metrics["pearson"] == pytest.approx(1)
    assert metrics["mse"] == pytest.approx((1 + 4 + 9) / 3)
    assert classification_metrics([1.0, 1.0], [2.0, 3.0], Labels("regression"))["spearman"] == 0
    # an entity counts when all of it and its type are right
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    metrics = entity_metrics([["B-PER", "O", "O", "B-LOC"], ["B-PER", "B-LOC"]], references)
    assert metrics == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 4 / 6})
    # two entities of one type side by side are two; BILOU as BIOES, and IOB1 as IOB2
    metrics = entity_metrics([["O", "O", "B-X", "L-X", "O"]], [["B-X", "L-X", "B-X", "L-X", "O"]])
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == pytest.approx((1, 1 / 2, 2 / 3))
    assert entity_metrics([["U-X", "O", "O"]], [["U-X", "U-X", "O"]])["recall"] == 0.5
    assert find_entities(["I-X", "I-X", "B-X", "I-Y", "O", "E-Y"]) == [
        ("X", 0, 1),
        ("X", 2, 2),
        ("Y", 3, 3),
        ("Y", 5, 5),
    ]
    # as in SQuAD's script: articles, case and punctuation aside, the best of several references, "" for no answer
    answers = [("The  blue Sky.", ["blue sky"]), ("sky", ["the green sea", "a blue sky"]), ("", [""]), ("x", [""])]
    predictions = [{"id": str(n), "prediction_text": text} for n, (text, _) in enumerate(answers)]
    references = [
        {"id": str(n), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
        for n, (_, texts) in enumerate(answers)
    ]
    metrics = QuestionAnswering.compute_metrics(predictions, references)
    assert metrics == pytest.approx({"exact_match": 2 / 4, "f1": (1 + 2 / 3 + 1 + 0) / 4})
    metrics = language_metrics(math.log(8) + math.log(2), 2, 4)
    assert metrics == pytest.approx({"loss": math.log(4), "perplexity": 4, "bits_per_byte": 1, "tokens": 2})
