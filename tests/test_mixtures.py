"""Mixtures of sources: shares, schedule and limits, a validation set for each, and streams that resume exactly."""

import re
import shutil

import pytest
from conftest import assert_same_run, read_metrics, read_weights, train
from launching import has_reached, kill_at, run_command, run_ranks

from hf_myllm.errors import RecipeError
from hf_myllm.recipe import Recipe


@pytest.fixture
def sources(stories, tmp_path):
    """Two files: numbers and letters."""
    (tmp_path / "numbers.txt").write_text("".join(f"{n} times two is {2 * n}.\\n" for n in range(300)))
    (tmp_path / "letters.txt").write_text("".join(f"{chr(97 + n % 26)} comes after {n}.\\n" for n in range(300)))
    return f"{tmp_path}/numbers.txt", f"{tmp_path}/letters.txt"


@pytest.fixture
def mixed_stream(tiny, sources):
    """A run of 12 steps on two streams with windows of ten rows, whose weights change after step 5."""
    numbers, letters = sources
    datasets = (
        f"[{{name: numbers, train_file: {numbers}, weight: 3}}, {{name: letters, train_file: {letters}, weight: 0}}]"
    )
    schedule = "[{step: 5, weights: {numbers: 1, letters: 2}}]"
    return lambda **changes: tiny(
        train_file=None, datasets=datasets, mixture_schedule=schedule, streaming="true", streaming_window=320,
        max_steps=12, save_freq=4, save_total_limit=9, eval_freq=100, eval_iter=1, start_context=None, val_fraction=0,
        **changes,
    )  # fmt: skip


def test_a_mixture_of_streams_resumes_exactly_before_and_after_its_schedule_changes(mixed_stream, tmp_path, capsys):
    run, flags = tmp_path / "run", mixed_stream()
    assert train(*flags) == 0
    out = capsys.readouterr().out
    assert "10 rows of 32 tokens per window of 320 tokens of each source" in out
    assert re.search(r"60.4% from .*numbers.txt: 1,856 tokens", out), out
    assert re.search(r"after step 5: 33.3% from .*numbers.txt, 66.7% from .*letters.txt", out)
    weights, rows = read_weights(run), read_metrics(run, "rows")
    assert len(set(rows)) == 12
    for resume_from in (8, 4):
        for step in range(resume_from + 4, 13, 4):
            shutil.rmtree(run / f"checkpoint-{step}")
        (run / "model.safetensors").unlink()
        assert train(*flags, "--init_from", "resume") == 0
        assert f"{resume_from} to 12" in capsys.readouterr().out
        assert read_weights(run) == weights
        assert read_metrics(run, "rows") == rows
    late = "[{step: 5, weights: {numbers: 1, letters: 2}}, {step: 800, weights: {numbers: 0}}]"
    assert (
        train(*flags, "--dry_run", "--mixture_schedule", late, "--keep_every", 20, "--save_model", tmp_path / "x") == 0
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "mixture_schedule: step 800 is never reached; the run has 12 steps" in out
    assert "keep_every: 20 is more than the 12 steps of the run" in out
    assert train(*flags, "--resume", "--mixture_schedule", "[{step: 6, weights: {letters: 2}}]") == 2
    assert "mixture_schedule was" in capsys.readouterr().err


@pytest.mark.chaos
def test_a_mixture_of_streams_that_is_killed_and_resumed_ends_with_the_same_bytes(mixed_stream, tmp_path):
    assert run_command(*mixed_stream(save_model=tmp_path / "reference")).returncode == 0
    run = tmp_path / "run"
    resume = [*mixed_stream(save_model=run), "--init_from", "resume"]
    moments = [
        has_reached(run, 2),  # before the first checkpoint
        lambda: any(run.glob("checkpoint-*.partial")),
        lambda: (run / "checkpoint-4").exists(),
        has_reached(run, 7),  # after the weights have changed
        lambda: (run / "checkpoint-8").exists(),
    ]
    assert kill_at(moments, *resume) >= 3
    assert run_command(*resume).returncode == 0
    assert read_weights(run) == read_weights(tmp_path / "reference")
    assert read_metrics(run, "loss") == read_metrics(tmp_path / "reference", "loss")


@pytest.mark.chaos
def test_a_mixture_of_streams_continues_on_two_ranks(mixed_stream, tmp_path):
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert train(*mixed_stream(save_model=reference, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)) == 0
    shutil.copytree(reference, run)
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(run / name)
    (run / "model.safetensors").unlink()
    result = run_ranks(2, run / "recipe.yaml", "--save_model", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "4 to 12" in result.stdout
    assert_same_run(run, reference)


def test_each_source_has_a_validation_set_and_may_be_used_up(tiny, sources, stories, tmp_path, capsys):
    """The letters, read at most twice, are used up; the stories have a file of their own for validation."""
    numbers, letters = sources
    (tmp_path / "val.txt").write_text("Anna sees the cat. A king finds my friend. " * 9)
    datasets = (
        f"[{{name: stories, train_file: {stories}, val_file: {tmp_path / 'val.txt'}}},"
        f"{{name: letters, train_file: {letters}, max_epochs: 0.25, document: line}}]"
    )
    flags = tiny(train_file=None, datasets=datasets, max_steps=14, start_context=None, eval_freq=100, eval_iter=1)
    assert train(*flags, "--dry_run") == 0
    assert train(*flags) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"letters.txt: its \d+ rows 0.2\d times, [\d,]+ tokens", out)) == 2, out
    assert len(re.findall(r"after step \d+: 100.0% from ", out)) == 2, out
    last = next(line for line in reversed(read_metrics(tmp_path / "run")) if "val_loss" in line)
    assert last["val_loss"] == pytest.approx((last["val_stories_loss"] + last["val_letters_loss"]) / 2)
    short = f"[{{train_file: {letters}, max_epochs: 0.5}}, {{train_file: {numbers}, max_epochs: 0.1}}]"
    assert train(*flags, "--datasets", short, "--save_model", tmp_path / "short") == 0
    assert "the run ends when max_epochs leaves no source, after step" in capsys.readouterr().out
    assert 0 < len(read_metrics(tmp_path / "short", "rows")) < 14


def test_weights_may_be_shares_of_tokens(tiny, tmp_path, capsys):
    """Rows of one document each: short ones and long ones. Equal shares of tokens are unequal ones of rows."""
    (tmp_path / "short.txt").write_text("".join(f"a {n}.\n" for n in range(400)))
    (tmp_path / "long.txt").write_text("".join(f"{n} a long line of words and more words.\n" for n in range(400)))
    datasets = f"[{{train_file: {tmp_path}/short.txt}}, {{train_file: {tmp_path}/long.txt}}]"
    flags = tiny(train_file=None, datasets=datasets, document="line", max_steps=2, start_context=None, val_fraction=0)
    assert train(*flags, "--weights_by", "tokens", "--dry_run") == 2
    assert "weights_by: with packing stream all rows have 32 tokens" in capsys.readouterr().err
    assert train(*flags, "--packing", "pad", "--weights_by", "tokens", "--max_steps", 40, "--dry_run") == 0
    share = float(re.search(r"([\d.]+)% from .*short.txt", capsys.readouterr().out)[1])
    assert share > 60  # of rows 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"datasets": [{"name": "a", "dataset": "x"}, {"dataset": "y"}]}, r"datasets\[1\]: it needs a name"),
        ({"datasets": [{"dataset": "x", "val_file": "v"}]}, r"datasets\[0\]: it needs a name"),
        ({"datasets": [{"dataset": "x", "name": "A b"}]}, r"datasets\[0\].name: 'A b' cannot name a validation set"),
        ({"datasets": [{"dataset": x, "name": "a"} for x in "xy"]}, r"'a' is the name of another source too"),
        ({"datasets": [{"dataset": "x", "weight": 0}]}, "datasets: all weights are 0"),
        ({"datasets": [{"dataset": "x"}, {"dataset": "y", "weight": 0}]}, r"datasets\[1\]: its weight is 0 in every"),
        ({"mixture_schedule": [{"step": 1, "weights": {"b": 1}}]}, r"\[0\]: no source of datasets has the name 'b'"),
        ({"mixture_schedule": [{"step": 1, "weights": {"a": 0}}]}, "mixture_schedule at step 1: all weights are 0"),
        ({"mixture_schedule": [{"step": 2, "weights": {}}] * 2}, "step 2 does not come after step 2"),
        ({"mixture_schedule": [{"step": 0, "weights": {}}]}, "'step' must be at least 1"),
        ({"mixture_schedule": [{"steps": 1, "weights": {}}]}, "unknown key 'steps'; did you mean 'step'"),
        ({"mixture_schedule": [{"step": 1}]}, "'weights' is missing; give it"),
    ],
)
def test_an_impossible_mixture_is_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(data={"datasets": [{"dataset": "x", "name": "a"}]} | data)


def test_a_stream_has_no_epochs_to_limit(mixed_stream, sources, capsys):
    limited = (
        f"[{{name: numbers, train_file: {sources[0]}, max_epochs: 2}}, {{name: letters, train_file: {sources[1]}}}]"
    )
    assert train(*mixed_stream(), "--datasets", limited) == 2
    assert "streaming cannot be combined with max_epochs" in capsys.readouterr().err
