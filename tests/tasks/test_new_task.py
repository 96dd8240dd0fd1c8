"""A task is one file and one line in the registry: a new one trains, saves, resumes and predicts."""

import json
import random

import pytest
import torch
from conftest import flags, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from word_count import WordCount

from hf_myllm.models import FAMILIES
from hf_myllm.predict import predict_file
from hf_myllm.tasks import TASKS


@pytest.fixture
def word_count(monkeypatch):
    monkeypatch.setitem(TASKS, "word_count", WordCount)
    monkeypatch.setitem(FAMILIES["gpt"].tasks, "word_count", FAMILIES["gpt"].tasks["classification"])


def write_texts(path, count, seed):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(("one", "two", "three"), k=draw.randint(1, 8))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_new_task_trains_saves_and_predicts(word_count, tmp_path, capsys):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    settings = {"model": "gpt", "task": "word_count", **sizes, "max_len": 16, "batch_size": 16}
    settings |= {"train_file": write_texts(tmp_path / "train.jsonl", 300, 0), "save_model": tmp_path / "run"}
    settings |= {"val_file": write_texts(tmp_path / "val.jsonl", 41, 1), "learning_rate": 5e-3, "max_steps": 150}
    settings["tokenizer"] = "{train: bpe, vocab_size: 300}"
    arguments = flags(**settings)
    assert train(*arguments, "--dry_run") == 0
    assert " words\n" in capsys.readouterr().out
    assert train(*arguments, "--save_freq", 100) == 0
    run = tmp_path / "run"
    out = capsys.readouterr().out
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["val_mean_error"] < 1
    assert f"mean_error {metrics['val_mean_error']:.4f}" in out
    assert json.loads((run / "run.json").read_text())["unit"] == "squared error per text"

    # the saved model is a stock one, and predicts the same
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(run).eval(),
        AutoTokenizer.from_pretrained(run),
    )
    texts = [json.loads(line)["text"] for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    with torch.no_grad():
        counts = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert metrics["val_mean_error"] == pytest.approx(
        sum(abs(count - len(text.split())) for count, text in zip(counts, texts, strict=True)) / len(texts), abs=1e-4
    )
    assert predict_file(run, str(tmp_path / "val.jsonl"), tmp_path / "predictions.jsonl") == (41, [], {})
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    assert [line["words"] for line in lines] == pytest.approx(counts, abs=1e-4)

    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert predict_file(run, str(tmp_path / "empty.jsonl"), tmp_path / "predictions.jsonl") == (1, [], {})

    # a run that is resumed ends with the same bytes
    weights = (run / "model.safetensors").read_bytes()
    for path in (run / "model.safetensors", *(run / "checkpoint-150").rglob("complete.json")):
        path.unlink()
    assert train(run / "recipe.yaml", "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == weights
