"""Evaluation counts each target once, whatever the batch size."""

import math
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import plain_run, train, write_story

from hf_myllm.data.corpus import TokenStream
from hf_myllm.data.packing import StridedRows
from hf_myllm.evaluation import evaluate_rows, unigram_loss
from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.reporting import plots
from hf_myllm.reporting.metrics_log import read_metrics, read_run
from hf_myllm.tasks import CausalLM
from hf_myllm.train import evaluate as evaluate_run_folder

NAMED_SETS = "{{short: {0}/short.txt, long: [{0}/long.txt, {0}/more.txt]}}"


def test_several_validation_sets(tiny, tmp_path, capsys):
    """Each has its metrics, the loss is their mean, and any of them chooses the best checkpoint."""
    for seed, (name, count) in enumerate({"short": 3, "long": 8, "more": 5}.items()):
        (tmp_path / f"{name}.txt").write_text(write_story(100 + seed) * count)
    flags = tiny(val_file=NAMED_SETS.format(tmp_path), metric_for_best="val_long_loss", max_steps=40)
    assert train(*flags) == 0
    out = capsys.readouterr().out
    assert re.search(r"validation  short [\d,]+ tokens, long [\d,]+ tokens\n", out)
    lines = [line for line in read_metrics(tmp_path / "run") if "train_loss" in line]
    for line in lines:
        for metric in ("loss", "bits_per_byte", "perplexity"):
            mean = (line[f"val_short_{metric}"] + line[f"val_long_{metric}"]) / 2
            assert line[f"val_{metric}"] == pytest.approx(mean)
        assert line["val_tokens"] == line["val_short_tokens"] + line["val_long_tokens"]
        assert f"short {line['val_short_loss']:.4f}, long {line['val_long_loss']:.4f}" in out
    for name in ("short", "long"):
        files = [tmp_path / "short.txt"] if name == "short" else [tmp_path / "long.txt", tmp_path / "more.txt"]
        alone = evaluate_run_folder(tmp_path / "run", val_file=[str(file) for file in files])
        best = min(lines, key=lambda line: line["val_long_loss"])
        assert alone["loss"] == pytest.approx(best[f"val_{name}_loss"], abs=1e-6)
    facts = read_run(tmp_path / "run")["data"]
    assert set(facts) == {"training", "validation short", "validation long"}
    assert [source["name"] for source in facts["validation long"]["sources"]] == ["long.txt", "more.txt"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "validation short loss" in report
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    curves = plots.read(tmp_path / "run").evaluations
    assert curves["val_long_loss"][1].tolist() == [line["val_long_loss"] for line in lines]


def test_resuming_with_other_sets_is_noticed(tiny, tmp_path, capsys):
    for name in ("short", "long", "more"):
        (tmp_path / f"{name}.txt").write_text(write_story(len(name)) * 5)
    flags = tiny(val_file=NAMED_SETS.format(tmp_path), max_steps=10, eval_freq=5)
    assert train(*flags) == 0
    (tmp_path / "more.txt").write_text(write_story(7) * 6)
    assert train(*flags, "--resume") == 2
    assert "other tokens in the validation data long now" in capsys.readouterr().err
    for sets, message in (
        ("{Code: a.txt}", "val_file: 'Code' cannot name a validation set"),
        ("{ema: a.txt}", "val_file: 'ema' begins as the metrics of an average of the weights do"),
        ("{a: a.txt, ema_a: a.txt}", "val_file: 'ema_a' begins"),
        (f"{{a: {tmp_path}/nothing.txt}}", "nothing.txt"),
    ):
        assert train(*tiny(val_file=sets, save_model=tmp_path / "other")) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0))
    ids = np.random.default_rng(0).integers(0, 50, 333).astype(np.uint16)
    rows = StridedRows(TokenStream([ids], "f", 49), 16, 16, "x")
    return model, ids, rows


def evaluate(setting, batch_size, token_bytes=None):
    model, _, rows = setting
    indices = np.arange(len(rows))
    run = plain_run(CausalLM(), Accelerator(), batch_size, token_bytes)
    return evaluate_rows(run, model.train(), rows, indices)


def test_the_batch_size_does_not_matter(setting):
    reference = evaluate(setting, 1)
    assert reference["tokens"] == 332
    for batch_size in (2, 5, 21, 64):
        other = evaluate(setting, batch_size)
        assert other["tokens"] == 332
        assert other["loss"] == pytest.approx(reference["loss"], abs=1e-6)
    assert reference["perplexity"] == pytest.approx(math.exp(reference["loss"]))
    assert setting[0].training  # as it was found, and without dropout in between: the metrics agree


def test_it_is_the_mean_over_targets(setting):
    model, ids, rows = setting
    with torch.no_grad():
        windows, first = rows.read(np.arange(len(rows)))
        total = 0.0
        for window, skip in zip(torch.from_numpy(windows), first, strict=True):
            logits = model.eval()(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits[skip:], window[1 + skip :], reduction="sum").item()
    assert evaluate(setting, 7)["loss"] == pytest.approx(total / 332, abs=1e-6)


def test_bits_per_byte(setting):
    result = evaluate(setting, 8, np.full(50, 3))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) / 3)
    assert evaluate(setting, 8)["bits_per_byte"] is None


def test_the_unigram_loss_is_the_cross_entropy_of_frequencies():
    training, validation = np.array([0, 0, 0, 1], dtype=np.uint16), np.array([1, 0, 1], dtype=np.uint16)
    metrics = unigram_loss(TokenStream([training], "f", 1), TokenStream([validation], "g", 1), 3, np.array([1, 1, 1]))
    # counts plus one: 4, 2, 1 of 7; the first token of the data is no target
    assert metrics["loss"] == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7)) / 2)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2))
