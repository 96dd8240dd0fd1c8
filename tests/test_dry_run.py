"""--dry_run: its counts are those of the run, and it writes nothing."""

import json
import re

import pytest
import yaml
from conftest import train, write_story

from hf_myllm import build_data


def numbers(line):
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]*\d\.?\d*", line)]


def line_of(out, start):
    return next(line for line in out.splitlines() if line.startswith(f"{start:<12}"))


@pytest.mark.parametrize("packing", ["stream", "documents", "pad", "best_fit", "overlapping"])
def test_its_counts_are_those_of_the_run(tiny, tmp_path, capsys, packing):
    run = tmp_path / "run"
    flags = tiny(**({"stride": 8} if packing == "overlapping" else {"packing": packing}), epochs=1, start_context=None)
    assert train(*flags, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert not run.exists()
    for name in ("training", "validation"):
        total, used, dropped, rows = numbers(line_of(shown, name))[:4]
        assert total == used + dropped
        assert dropped <= 2 + (packing in ("pad", "best_fit"))
    parts = numbers(line_of(shown, "model").split(": ")[1])
    wte, wpe, layers, each, norm = parts
    assert numbers(line_of(shown, "model"))[0] == wte + wpe + layers * each + norm
    assert "head is tied to the embeddings" in shown
    assert f"next        hf-myllm train {flags[0]}" in shown
    assert "--dry_run" not in line_of(shown, "next")
    assert f"packing: {'stream' if packing == 'overlapping' else packing}" in shown

    assert train(*flags, "--save_freq", "null") == 0
    out = capsys.readouterr().out
    assert numbers(line_of(out, "training"))[:2] == [numbers(line_of(shown, "training"))[index] for index in (0, 3)]
    steps, epochs = numbers(line_of(shown, "steps"))[:2]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert max(line["step"] for line in logged) == steps
    assert epochs == pytest.approx(1, abs=0.02)
    if packing != "overlapping":  # each target exactly once
        trained = sum(line.get("tokens", 0) for line in logged)
        assert trained == numbers(line_of(shown, "training"))[1]


def test_the_first_batch_is_that_of_the_first_step(tiny, tiny_bert, stories, capsys):
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


def test_of_large_data_only_the_beginning_is_read(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build_data, "DRY_RUN_CHARS", 100_000)
    (tmp_path / "large.jsonl").write_text("".join(json.dumps({"text": write_story(n)}) + "\n" for n in range(2000)))
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
    for label, index in (("training", 0), ("training", 3), ("steps", 0)):
        guess, truth = numbers(line_of(about, label))[index], numbers(line_of(exact, label))[index]
        assert guess == pytest.approx(truth, rel=0.1), label


def test_it_shows_only_the_keys_that_matter(tiny, tiny_bert, capsys):
    assert train(*tiny(), "--dry_run") == 0
    recipe = yaml.safe_load(capsys.readouterr().out.split("\n\n")[1])
    assert recipe["training"]["learning_rate"] == 3e-3
    assert recipe["data"]["max_len"] == 32
    assert not {"mlm_probability", "label_column", "unanswerable"} & set(recipe["data"])
    assert "lora" not in recipe
    assert train(*tiny_bert(), "--dry_run") == 0
    assert "mlm_probability: 0.15" in capsys.readouterr().out


def test_it_works_whatever_the_folder_holds(tiny, tmp_path, capsys):
    assert train(*tiny(max_steps=2, eval_freq=None)) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(*tiny(), "--dry_run") == 0
    assert "nothing is trained" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
