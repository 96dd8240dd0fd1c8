"""Go on from any checkpoint in a new folder, with another recipe; average checkpoints; average weights in training."""

import json
import os
import shutil

import pytest
from conftest import assert_same_run, read_metrics, run_cli, train
from launching import run_ranks
from small_runs import copy_until
from small_runs import flags as as_flags

import hf_myllm
from hf_myllm import checkpoint
from hf_myllm.recipe import Recipe
from hf_myllm.tasks.causal_lm import CausalLM

BYTES = ("model.safetensors", "config.json", "trainer_state/optimizer.safetensors")


@pytest.fixture
def branch(kept_run, tmp_path):
    """Return a function that trains a branch of the run's step 4, with other keys; it returns the exit code."""

    def run(**changes):
        folder, keys = kept_run
        start = {"init_from": folder / "checkpoint-4", "with_optimizer": True, "save_model": tmp_path / "branch"}
        return train(*as_flags(**keys | start | changes))

    return run


def read_run(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_branch_with_the_same_recipe_ends_with_the_bytes_of_the_run(kept_run, branch, tmp_path, capsys):
    folder, run = kept_run[0], tmp_path / "branch"
    assert branch() == 0
    for name in BYTES:
        assert (run / "checkpoint-8" / name).read_bytes() == (folder / "checkpoint-8" / name).read_bytes(), name
    assert read_metrics(run, "rows") == read_metrics(folder, "rows")[4:]
    digest = checkpoint.digest(folder / "checkpoint-4")
    assert (
        f"branched    from step 4 of run, with its optimizer state\n            SHA-256 {digest}"
        in capsys.readouterr().out
    )
    facts = {"run": "run", "step": 4, "digest": digest, "changed": []}
    assert read_run(run)["branched_from"] == facts
    assert digest in (run / "README.md").read_text()
    assert digest in (run / "report.html").read_text()
    assert "4 steps of at most" in (run / "README.md").read_text()


def test_a_branch_of_another_recipe_is_what_resuming_with_it_trains(kept_run, branch, tmp_path):
    """Rows, learning rates and seeds of the new recipe at step 4; then it resumes without the folder it came from."""
    folder, (run, other, resumed) = kept_run[0], (tmp_path / name for name in ("branch", "other", "resumed"))
    changes = {"learning_rate": 1e-3, "total_batch_size": 6, "max_steps": 10, "save_freq": 2, "seed": 7}
    assert branch(**changes) == 0
    assert "learning_rate was 0.003 and is 0.001" in read_run(run)["branched_from"]["changed"]
    copy_until(folder, 4, resumed)
    assert branch(**changes, save_model=resumed, init_from="resume", with_optimizer=None, allow_changed=True) == 0
    for name in BYTES:
        assert (run / "checkpoint-10" / name).read_bytes() == (resumed / "checkpoint-10" / name).read_bytes(), name
    # a resumed branch ends with the same bytes, and needs the folder that it came from no more
    copy_until(run, 8, other)
    away = folder.rename(folder.with_name("away"))
    try:
        assert train(other / "recipe.yaml", "--save_model", other, "--resume") == 0
    finally:
        away.rename(folder)
    for name in BYTES:
        assert (run / "checkpoint-10" / name).read_bytes() == (other / "checkpoint-10" / name).read_bytes(), name
    assert read_run(other)["branched_from"] == read_run(run)["branched_from"]
    assert read_run(other)["base_model"] is None
    assert_same_run(other, run)


@pytest.mark.parametrize("how", [None, "folder"])
def test_the_tokenizer_of_a_checkpoint_may_be_left_out_or_named_by_its_folder(kept_run, branch, tmp_path, how):
    given = how and shutil.copytree(kept_run[0] / "checkpoint-4", tmp_path / "folder")
    assert branch(tokenizer=given, max_steps=5) == 0
    recipe = Recipe.load(tmp_path / "branch" / "recipe.yaml")
    assert recipe.data.tokenizer == {"train": "bpe", "vocab_size": 300}


@pytest.mark.chaos
def test_a_branch_has_other_data_and_an_evaluation_at_its_start(branch, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("The old house finds a king. " * 400)
    changes = {"train_file": tmp_path / "other.txt", "metric_for_best": "loss", "save_freq": 100}
    assert branch(**changes) == 0
    assert "other tokens in the training data" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "branch", "val_loss")) == 2
    assert {path.name for path in (tmp_path / "branch").glob("checkpoint-*")} == {"checkpoint-8"}  # 4 is not the best


@pytest.mark.chaos
def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_again(kept_run, branch, tmp_path):
    run, keys = tmp_path / "branch", kept_run[1]
    assert branch(save_freq=100) == 0
    expected = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-8")
    (run / "model.safetensors").unlink()
    assert train(*as_flags(**keys | {"save_model": run, "init_from": "resume"})) == 0  # the flags are forgotten
    assert (run / "model.safetensors").read_bytes() == expected
    assert read_run(run)["branched_from"]["step"] == 4


def test_what_a_branch_may_not_change_is_one_line(kept_run, branch, tmp_path, capsys):
    folder = kept_run[0]
    for changes, message in (
        ({"optimizer": "muon"}, "checkpoint-4: optimizer was 'adamw' and is 'muon'; give optimizer adamw"),
        ({"implementation": "stock"}, "implementation was 'ours' and is 'stock'"),
        ({"n_layer": 2}, "n_layer is 1; the recipe's 2 is another model's"),
        ({"r": 4}, "LoRA has other settings there: r was None and is 4"),
        ({"tokenizer": "{train: bpe, vocab_size: 310}"}, "trained with another tokenizer"),
        ({"max_steps": 4}, "checkpoint-4 is at the end of the 4 steps of this recipe; raise max_steps"),
        ({"max_steps": 3}, "checkpoint-4 is beyond the 3 steps of this recipe"),
        ({"init_from": folder}, "run is no checkpoint of a run; give --init_from RUN/checkpoint-500"),
        ({"init_from": None}, "with_optimizer has no effect without a checkpoint"),
        ({"save_model": folder}, "already holds a finished run"),
    ):
        assert branch(**changes) == 2, changes
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not os.path.exists(tmp_path / "branch")
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    os.truncate(tmp_path / "checkpoint-4" / "model.safetensors", 100)
    assert branch(init_from=tmp_path / "checkpoint-4") == 2
    assert "checkpoint-4: model.safetensors has 100 bytes instead of" in capsys.readouterr().err


def test_damaged_weights_of_a_checkpoint_are_refused_wherever_they_are_read(kept_run, branch, tmp_path, capsys):
    shutil.copytree(kept_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-[1-7]"))
    damaged = tmp_path / "run" / "checkpoint-8"
    with open(damaged / "model.safetensors", "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}')
    for call in (
        lambda: run_cli("evaluate", damaged),
        lambda: run_cli("generate", damaged),
        lambda: run_cli("predict", damaged, "--input", tmp_path / "texts.jsonl"),
        lambda: branch(init_from=damaged, with_optimizer=None),
    ):
        assert call() == 2
        error = f"error: {damaged}: it is damaged: model.safetensors differs from what was written; give another"
        assert capsys.readouterr().err.startswith(error)
    shutil.rmtree(damaged / "trainer_state")
    assert hf_myllm.evaluate(damaged)["loss"] > 0  # there is nothing to compare it with


@pytest.mark.chaos
def test_a_stream_goes_on_in_a_branch_and_other_text_is_read_from_its_start(tiny, tmp_path):
    (tmp_path / "val.txt").write_text("Anna sees the cat. A king finds my friend. " * 9)
    (tmp_path / "other.txt").write_text("".join(f"The cat {n} forgets a king. " for n in range(3000)))
    keys = {"streaming": "true", "streaming_window": 800, "val_file": tmp_path / "val.txt", "eval_freq": None}
    flags, run = tiny(max_steps=16, save_freq=8, **keys), tmp_path / "run"
    assert train(*flags) == 0
    start = ["--init_from", run / "checkpoint-8", "--with_optimizer", "--save_model"]
    assert train(*flags, *start, tmp_path / "same") == 0
    for name in BYTES:
        assert (tmp_path / "same" / "checkpoint-16" / name).read_bytes() == (run / "checkpoint-16" / name).read_bytes()
    # other text: the tokens of step 8 of a run that reads it from the beginning
    read, batches = [], []
    original = CausalLM.batch

    def batch(task, rows, indices, step=None, size=None):
        result = original(task, rows, indices, step, size)
        if step is not None:
            read.append((step, result["input_ids"].tolist()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "batch", batch)
        for more in (["--tokenizer", run], start[:-1]):
            folder = tmp_path / f"other-{len(more)}"  # with the same tokenizer, that of the run
            others = tiny(max_steps=16, save_freq=8, **keys, train_file=tmp_path / "other.txt", save_model=folder)
            assert train(*others, *more) == 0
            batches.append([pair for pair in read if pair[0] >= 8])
            read.clear()
    assert batches[0] == batches[1]
    assert len(batches[0]) == 16


@pytest.mark.chaos
def test_a_branch_on_two_ranks_is_that_of_one(kept_run, branch, tmp_path):
    folder, keys = kept_run
    start = {"init_from": folder / "checkpoint-4", "with_optimizer": True, "learning_rate": 1e-3, "batch_size": 2}
    assert branch(**start, save_model=tmp_path / "one") == 0
    result = run_ranks(2, *as_flags(**keys | start | {"save_model": tmp_path / "two"}))
    assert result.returncode == 0, result.stderr
    assert "branched    from step 4 of run" in result.stdout
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert read_run(tmp_path / "two")["branched_from"] == read_run(tmp_path / "one")["branched_from"]
    result = run_ranks(2, *as_flags(**keys | start | {"init_from": folder, "save_model": tmp_path / "three"}))
    assert result.returncode == 2
    assert "is no checkpoint of a run" in result.stderr
