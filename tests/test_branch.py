"""Go on from any checkpoint in a new folder, with another recipe; average checkpoints; average weights in training."""

import json
import os
import shutil

import pytest
from conftest import Flags, assert_same_run, read_metrics, train
from small_runs import flags as as_flags

from hf_myllm import checkpoint

BYTES = ("model.safetensors", "config.json", "trainer_state/optimizer.safetensors")


@pytest.fixture(scope="module")
def parent(tmp_path_factory, stories):
    """Return the folder of a run of 8 steps with a checkpoint every 4, and its recipe as flags."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    recipe = Flags(train_file=stories, tokenizer="{train: bpe, vocab_size: 300}", n_layer=1, n_head=2, n_embd=32)
    recipe |= {"max_len": 32, "batch_size": 4, "total_batch_size": 8, "max_steps": 8, "save_freq": 4}
    recipe |= {"learning_rate": 3e-3, "warmup_steps": 2, "eval_freq": 4, "eval_iter": 1, "save_model": folder}
    assert train(*recipe(warmup_steps=2)) == 0
    return folder, recipe


@pytest.fixture
def branch(parent, tmp_path):
    """Return a function that trains a branch of the parent's step 4, with other keys; it returns the exit code."""

    def run(**changes):
        folder, recipe = parent
        start = {"init_from": folder / "checkpoint-4", "with_optimizer": True, "save_model": tmp_path / "branch"}
        return train(*as_flags(**recipe | start | changes))

    return run


def read_run(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_branch_with_the_same_recipe_ends_with_the_bytes_of_the_run(parent, branch, tmp_path, capsys):
    folder, run = parent[0], tmp_path / "branch"
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


def test_a_branch_of_another_recipe_is_what_resuming_with_it_trains(parent, branch, tmp_path):
    """Rows, learning rates and seeds of the new recipe at step 4; then it resumes without the folder it came from."""
    folder, (run, other, resumed) = parent[0], (tmp_path / name for name in ("branch", "other", "resumed"))
    changes = {"learning_rate": 1e-3, "total_batch_size": 6, "max_steps": 10, "save_freq": 2, "seed": 7}
    assert branch(**changes) == 0
    assert "learning_rate was 0.003 and is 0.001" in read_run(run)["branched_from"]["changed"]
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    (resumed / "model.safetensors").unlink()
    assert branch(**changes, save_model=resumed, init_from="resume", with_optimizer=None, allow_changed=True) == 0
    for name in BYTES:
        assert (run / "checkpoint-10" / name).read_bytes() == (resumed / "checkpoint-10" / name).read_bytes(), name
    # a resumed branch ends with the same bytes, and needs the folder that it came from no more
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoint-10")
    (other / "model.safetensors").unlink()
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


def test_a_branch_has_other_data_and_an_evaluation_at_its_start(branch, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("The old house finds a king. " * 400)
    changes = {"train_file": tmp_path / "other.txt", "metric_for_best": "loss", "save_freq": 100}
    assert branch(**changes) == 0
    assert "other tokens in the training data" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "branch", "val_loss")) == 2
    assert {path.name for path in (tmp_path / "branch").glob("checkpoint-*")} == {"checkpoint-8"}  # 4 is not the best


def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_again(parent, branch, tmp_path):
    run, recipe = tmp_path / "branch", parent[1]
    assert branch(save_freq=100) == 0
    expected = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-8")
    (run / "model.safetensors").unlink()
    assert train(*as_flags(**recipe | {"save_model": run, "init_from": "resume"})) == 0  # the flags are forgotten
    assert (run / "model.safetensors").read_bytes() == expected
    assert read_run(run)["branched_from"]["step"] == 4


def test_what_a_branch_may_not_change_is_one_line(parent, branch, tmp_path, capsys):
    folder = parent[0]
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
