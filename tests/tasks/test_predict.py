"""The predict command."""

import json
import os

import pytest
from conftest import train
from small_runs import (
    flags,
    generate,
    predict,
    write_lines,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


def test_predictions_of_lines_and_bad_rows(tmp_path, noise, capsys, entities_run):
    assert train(*flags(**noise, max_steps=2)) == 0
    run = tmp_path / "run"
    (tmp_path / "lines.txt").write_text("anna 3 oslo\n\nboris\n")
    capsys.readouterr()
    assert predict(run, "--input", tmp_path / "lines.txt", "--batch_size", 1) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["anna 3 oslo", "boris"]
    cut = pipeline("text-classification", str(run))(
        "anna " * 99, truncation=True, batch_size=2
    )  # the tokenizer truncates
    assert cut[0]["label"] in "ab"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(run).eval(),
        AutoTokenizer.from_pretrained(run),
    )
    for row in rows:
        scores = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert row["scores"] == pytest.approx({"a": scores[0].item(), "b": scores[1].item()}, abs=1e-5)
        assert row["label"] == max(row["scores"], key=row["scores"].get)
        assert row["score"] == max(row["scores"].values())
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "anna"}, {"text": 3}, {"no": "text"}])
    assert predict(run, "--input", bad, "--output", tmp_path / "out.jsonl") == 2
    assert "bad.jsonl line 2: column 'text' does not hold text: 3" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl*"))  # no partial file
    assert predict(run, "--input", bad, "--output", tmp_path / "out.jsonl", "--skip_bad_rows") == 0
    assert "1 row judged, 2 left out" in capsys.readouterr().err
    for arguments, message in (
        ((tmp_path / "nowhere", "--input", bad), "is not a folder"),
        ((run, "--input", tmp_path / "missing.csv"), "missing.csv does not exist"),
        ((run, "--input", bad, "--max_len", 10**6), "--max_len must be from 4 to 32"),
        ((run, "--input", bad, "--output", bad), "is the input: name another file"),
        ((run, "--input", bad, "--output", tmp_path / "no" / "out"), "cannot be written"),
        ((entities_run / "run", "--input", bad), "line 1 has no column 'tokens'"),
    ):
        assert predict(*arguments) == 2
        assert message in capsys.readouterr().err
    assert generate(run, "--prompt", "x") == 2  # the model generates no text


def test_predictions_need_a_model_with_a_head_for_them(gpt, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x\n")
    assert predict(gpt, "--input", tmp_path / "a.txt") == 2
    assert "GPT2LMHeadModel, which makes no predictions; to generate text: hf-myllm generate" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
