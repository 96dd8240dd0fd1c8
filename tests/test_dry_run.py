"""What a careful person runs first: it must be true, quick, and leave nothing behind."""

import json
import re

import pytest
from conftest import train, write_story

from hf_myllm import build as prepare


def numbers(line):
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]*\d\.?\d*", line)]


def line_of(out, start):
    return next(line for line in out.splitlines() if line.startswith(f"{start:<12}"))


@pytest.mark.parametrize("packing", ["stream", "documents", "pad", "best_fit", "overlapping"])
def test_it_says_what_the_run_then_does(tiny, tmp_path, capsys, packing):
    run = tmp_path / "run"
    flags = tiny(**({"stride": 8} if packing == "overlapping" else {"packing": packing}), epochs=1, start_context=None)
    assert train(*flags, "--dry_run") == 0
    said = capsys.readouterr().out
    assert not run.exists()
    for name in ("training", "validation"):
        total, used, dropped, rows = numbers(line_of(said, name))[:4]
        assert total == used + dropped
        assert dropped <= 2 + (packing in ("pad", "best_fit"))
    parts = numbers(line_of(said, "model").split(": ")[1])
    wte, wpe, layers, each, norm = parts
    assert numbers(line_of(said, "model"))[0] == wte + wpe + layers * each + norm
    assert "head tied to the embeddings" in said
    assert f"next        accelerate launch -m hf_myllm.train {flags[0]}" in said
    assert "--dry_run" not in line_of(said, "next")
    assert f"packing: {'stream' if packing == 'overlapping' else packing}" in said

    assert train(*flags, "--save_freq", "null") == 0
    out = capsys.readouterr().out
    assert numbers(line_of(out, "training"))[:2] == [numbers(line_of(said, "training"))[at] for at in (0, 3)]
    steps, epochs = numbers(line_of(said, "steps"))[:2]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert max(line["step"] for line in logged) == steps
    assert epochs == pytest.approx(1, abs=0.02)
    if packing != "overlapping":  # each target once, to the token
        trained = sum(line.get("tokens", 0) for line in logged)
        assert trained == numbers(line_of(said, "training"))[1]


def test_the_first_batch_is_the_first_step_s_and_shows_what_is_special(tiny, tiny_bert, stories, capsys):
    assert train(*tiny(), "--dry_run") == 0
    out = capsys.readouterr().out
    reads, predicts = (line_of(out, f"  {name}")[12:] for name in ("reads", "predicts"))
    assert reads.split("|")[1:20] == predicts.split("|")[:19]
    assert "<|endoftext|>" in out or "Anna" in out
    assert train(*tiny_bert(), "--dry_run") == 0
    out = capsys.readouterr().out
    reads, predicts = (line_of(out, f"  {name}")[12:].split("|") for name in ("reads", "predicts"))
    assert reads[0] == "[CLS]"
    assert "[MASK]" in out
    assert all(answer != "\u00b7" for word, answer in zip(reads[:24], predicts[:24], strict=True) if word == "[MASK]")
    assert predicts.count("\u00b7") > 15


def test_of_a_large_corpus_only_the_beginning_is_read(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "DRY_RUN_CHARS", 20_000)
    (tmp_path / "large.jsonl").write_text("".join(json.dumps({"text": write_story(n)}) + "\n" for n in range(600)))
    flags = tiny(train_file=tmp_path / "large.jsonl", epochs=2)
    assert train(*flags, "--dry_run") == 0
    about = capsys.readouterr().out
    assert "training    about " in about
    assert "steps       about " in about
    assert train(*flags, "--max_steps", "1", "--warmup_steps", "0", "--epochs", "null", "--eval_freq", "null") == 0
    capsys.readouterr()
    assert train(*flags, "--save_model", str(tmp_path / "other"), "--dry_run") == 0
    exact = capsys.readouterr().out
    assert "about" not in line_of(exact, "training")
    for start, at in (("training", 0), ("training", 3), ("steps", 0)):
        guess, truth = numbers(line_of(about, start))[at], numbers(line_of(exact, start))[at]
        assert guess == pytest.approx(truth, rel=0.1), start
