"""A user's mistake ends with one line on stderr and exit code 2, and nothing is written."""

import json
import os
import re
import shutil
import signal
import subprocess

import datasets
import numpy as np
import pytest
from conftest import read_metrics, run_cli, run_command, train, write_story
from filelock import FileLock
from launching import start, wait_for
from small_runs import write_lines

from hf_myllm.data.tokenizer import train_wordpiece


@pytest.fixture
def bad_files(tmp_path, stories):
    """Return a folder with the invalid files that the cases below name."""
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("Anna.")
    (tmp_path / "odd.bin").write_bytes(b"\1\0" * 400 + b"\1")
    ids = np.full(400, 7, dtype=np.uint16)
    ids[321] = 60000
    ids.tofile(tmp_path / "large_ids.bin")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "no_tokenizer").mkdir()
    (tmp_path / "a_file").write_text("I am not a folder")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_head": 2}))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "\\ud800 hello"}')
    np.arange(1, 900, dtype=np.int64).tofile(tmp_path / "wide.bin")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "LICENSE.txt").write_text("You may.")
    (tmp_path / "mixed" / "data.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "utf16.txt").write_bytes("Anna".encode("utf-16-le"))
    (tmp_path / "bad_config").mkdir()
    (tmp_path / "bad_config" / "config.json").write_text("[1]")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_head": 2}))
    (tmp_path / "broken.yaml").write_text("training: {epochs: 1\n")
    (tmp_path / "unknown.yaml").write_text("training: {lerning_rate: 1}\n")
    return tmp_path


# case -> (keys changed in a valid recipe, or the recipe; pattern of the message); PLACE is the folder above
CASES = {
    "unknown key": ({"lerning_rate": 1}, "--lerning_rate; did you mean 'learning_rate'"),
    "wrong type": ({"epochs": "many"}, "'epochs' must be a number, not 'many'"),
    "stride of 0": ({"stride": 0}, "'stride' must be at least 1, not 0"),
    "negative batch": ({"batch_size": -4}, "'batch_size' must be at least 1"),
    "val file shorter than a row": ({"val_file": "PLACE/short.txt"}, "short.txt has . tokens, fewer than one row"),
    "train file shorter than a row": ({"train_file": "PLACE/short.txt", "val_fraction": 0}, "short.txt has . tokens"),
    "held-out part shorter than a row": ({"val_fraction": 0.0001}, "the validation part of .* fewer than one row"),
    "heads that do not divide the width": ({"n_head": 5}, r"n_head \(5\) must divide n_embd \(32\)"),
    "dropout of 2": ({"resid_pdrop": 2}, "resid_pdrop is 2"),
    "unknown activation": ({"activation_function": "gelo"}, "activation_function 'gelo' is unknown; choose one of"),
    "rows longer than the positions": ({"n_positions": 16}, "max_len 32 is more than the 16 positions"),
    "vocabulary smaller than the tokenizer": ({"vocab_size": 100}, "vocab_size 100 is smaller than .* 300"),
    "vocabulary smaller than the data": (
        {"train_file": "PLACE/large_ids.bin", "tokenizer": None, "vocab_size": 300},
        "large_ids.bin: token id 60000 at position 321 .*, but the model's vocabulary has 300 tokens",
    ),
    "missing file": ({"train_file": "PLACE/nope.txt"}, "nope.txt does not exist"),
    "glob without match": ({"train_file": "PLACE/*.nope"}, "does not exist"),
    "empty file": ({"train_file": "PLACE/empty.txt"}, "empty.txt is empty"),
    "empty folder": ({"train_file": "PLACE/no_tokenizer"}, "holds no .txt"),
    "not UTF-8": ({"train_file": "PLACE/latin1.txt"}, "latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    "broken JSON": ({"train_file": "PLACE/bad.jsonl"}, "bad.jsonl line 2 is not JSON"),
    "missing column": ({"train_file": "PLACE/other.jsonl"}, "other.jsonl line 1 has no column 'text', but 'body'"),
    "truncated .bin": ({"train_file": "PLACE/odd.bin", "tokenizer": None}, "odd.bin is cut short: 801 bytes"),
    "no tokenizer": ({"tokenizer": None}, "tokenizer: text needs one"),
    "tokenizer not found": ({"tokenizer": "PLACE/no_tokenizer"}, "no_tokenizer' cannot be found"),
    "tokenizer not on the Hub": ({"tokenizer": "no-such-tokenizer"}, "'no-such-tokenizer' cannot be found"),
    "data set out of reach": (
        {"train_file": None, "dataset": "someone/some-corpus", "tokenizer": "PLACE/tokenizer"},
        "'someone/some-corpus' cannot be loaded from the Hugging Face Hub: .*--train_file FILE",
    ),
    "a model of another family": (
        {"model": "gpt", "init_from": "PLACE/bert", "tokenizer": "PLACE/tokenizer"},
        "bert is a bert model",
    ),
    "a model without weights": (
        {"init_from": "PLACE/no_weights", "tokenizer": "PLACE/tokenizer", "n_layer": 12},
        "no_weights cannot be loaded",
    ),
    "a model that does not exist": (
        {"init_from": "PLACE/nope", "tokenizer": "PLACE/tokenizer"},
        "nope cannot be found",
    ),
    "a special token of another tokenizer": ({"eos_token_id": 99999}, "eos_token_id is 99999"),
    "a norm's epsilon below zero": ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1.0; it must be above 0"),
    "a context longer than the positions": (
        {"start_context": "Anna " * 99},
        "prompt: it has .* tokens and the model takes at most 31",
    ),
    "a lone surrogate": ({"train_file": "PLACE/surrogate.jsonl"}, "line 1: half a character"),
    "no training rows left": (
        {"val_fraction": 0.999},
        "(train|stories).* tokens, fewer|val_fraction .* leaves nothing|warmup_steps 5 are more",
    ),
    "a prompt that is not UTF-8": ({"start_context": "caf\udce9"}, "'start_context' is not text that UTF-8 can hold"),
    "a local folder as a data set": (
        {"train_file": None, "dataset": "PLACE/mixed", "tokenizer": "PLACE/tokenizer"},
        "is a path here, .* give it as --train_file",
    ),
    "another architecture than the weights": (
        {"init_from": "PLACE/other", "tokenizer": "PLACE/tokenizer", "n_head": 4, "n_layer": 12},
        "n_head is 2; the recipe's 4 is another model's",
    ),
    "64-bit ids": ({"train_file": "PLACE/wide.bin", "tokenizer": None}, "wide.bin holds 64-bit numbers"),
    "files of several formats": ({"train_file": "PLACE/mixed"}, "files of several formats"),
    "a compressed file": ({"train_file": "PLACE/a.txt.gz"}, "a.txt.gz cannot be read"),
    "an archive": ({"train_file": "PLACE/a.zip"}, "a.zip is an archive: unpack it"),
    "UTF-16": (
        {"train_file": "PLACE/utf16.txt"},
        "byte 0x00 at offset 1; if it is text, convert it, for example with iconv -f utf-16",
    ),
    "a source with a file and a dataset": (
        {"train_file": None, "datasets": "[{train_file: a.txt, dataset: b}]"},
        r"datasets\[0\]: needs exactly one of train_file and dataset",
    ),
    "an unknown key of a source": (
        {"train_file": None, "datasets": "[{train_file: a.txt, wieght: 2}]"},
        "unknown key 'wieght'; did you mean 'weight'",
    ),
    "a negligible weight": (
        {"train_file": None, "datasets": "[{train_file: a.txt, weight: 1e-9}, {train_file: b.txt}]"},
        "less than a millionth",
    ),
    "a dry run of an evaluation": ({"eval_only": "true", "dry_run": "true"}, "dry_run shows what training would do"),
    "a weight of zero": (
        {"train_file": None, "datasets": "[{train_file: a.txt, weight: 0}]"},
        "datasets: all weights are 0",
    ),
    "pad and a stride": ({"packing": "pad", "stride": 8}, "stride has no effect with packing pad"),
    "an unknown packing": ({"packing": "bestfit"}, "'packing' must be one of stream, documents, pad, best_fit"),
    "an impossible folder name": ({"save_model": "PLACE/" + "x" * 300}, "save_model: .* cannot be a folder"),
    "an invalid config.json": ({"init_from": "PLACE/bad_config"}, "is not a model's configuration"),
    "a model that does not fit into memory": ({"vocab_size": 10**14}, "of this config cannot be made"),
    "save_model is a file": ({"save_model": "PLACE/a_file"}, "a_file is a file"),
    "warmup longer than the run": ({"warmup_steps": 10000}, "warmup_steps 10000 are more than the run's 52 steps"),
    "eval_only without a model": ({"eval_only": "true"}, "eval_only needs a trained model"),
    "no recipe": ("PLACE/nope.yaml", "nope.yaml does not exist"),
    "broken recipe": ("PLACE/broken.yaml", "broken.yaml: line 2: not valid YAML"),
    "unknown key in a recipe": ("PLACE/unknown.yaml", "unknown.yaml: unknown key 'lerning_rate' in training"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_line_and_nothing_written(case, bad_files, tiny, capsys):
    changed, message = CASES[case]
    if "PLACE/tokenizer" in str(changed):
        make_tokenizer(bad_files / "tokenizer")
    before = sizes(bad_files)
    if isinstance(changed, str):
        argv = [changed.replace("PLACE", str(bad_files))]
    else:
        argv = tiny(**{key: str(value).replace("PLACE", str(bad_files)) if value is not None else None
                       for key, value in changed.items()})  # fmt: skip
    code = train(*argv)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert sizes(bad_files) == before


def make_tokenizer(folder):
    from hf_myllm.data.tokenizer import train_bpe

    train_bpe(["Anna likes the cat."], 300).save_pretrained(folder)


def sizes(folder):
    """Return the size of every file below a folder."""
    return {str(path): path.stat().st_size for path in folder.rglob("*")}


def test_a_finished_run_is_not_overwritten(tiny, capsys, tmp_path):
    assert train(*tiny()) == 0
    before = sizes(tmp_path)
    capsys.readouterr()
    assert train(*tiny()) == 2
    error = capsys.readouterr().err
    assert "already holds a finished run" in error
    assert "--init_from resume" in error
    assert "--save_model" in error
    assert sizes(tmp_path) == before


def test_an_unfinished_run_is_not_overwritten(tiny, capsys, tmp_path):
    assert train(*tiny()) == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(*tiny()) == 2
    assert "checkpoints of an unfinished run" in capsys.readouterr().err


def test_resuming_with_another_recipe_names_the_differences(tiny, capsys, stories, tmp_path):
    assert train(*tiny()) == 0
    before = sizes(tmp_path)
    resumed = {"init_from": "resume"}
    for changed, message in (
        ({"learning_rate": 1e-2}, "learning_rate was 0.003 and is 0.01"),
        ({"n_layer": 3}, "config.n_layer was 2 and is 3"),
        ({"seed": 3, "epochs": 4}, "epochs was 3.0 and is 4.0; seed was 1337 and is 3"),
        ({"train_file": f"{stories}/0*.txt", "val_file": f"{stories}/1*.txt"}, "the training data and the validation"),
    ):
        capsys.readouterr()
        assert train(*tiny(**changed, **resumed)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "--allow_changed" in error
    assert sizes(tmp_path) == before
    # keys that do not define the run may change
    assert train(*tiny(**resumed, eval_freq=7, batch_size=2, save_total_limit=5)) == 0


def test_damaged_checkpoints_are_skipped_or_refused(tiny, capsys, tmp_path):
    assert train(*tiny()) == 0
    run = tmp_path / "run"
    reference = (run / "model.safetensors").read_bytes()
    newest, before = sorted(run.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    with open(newest / "model.safetensors", "r+b") as file:  # the same size, one byte changed
        file.seek(-8, os.SEEK_END)
        file.write(b"\x55")
    capsys.readouterr()
    os.remove(run / "model.safetensors")
    assert train(*tiny(init_from="resume")) == 0
    assert "model.safetensors differs from what was written" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == reference

    for path in run.glob("checkpoint-*"):
        (path / "trainer_state" / "complete.json").unlink()
    assert train(*tiny(init_from="resume")) == 2
    error = capsys.readouterr().err
    assert "no checkpoint is complete" in error
    assert "incomplete" in error


def test_edited_side_files_are_tolerated(tiny, capsys, tmp_path):
    assert train(*tiny()) == 0
    run = tmp_path / "run"
    reference = (run / "model.safetensors").read_bytes()
    (run / "recipe.yaml").write_text("{{{")  # not read while there is a checkpoint
    (run / "metrics.jsonl").write_text('[1]\n3\n{"a": 1}\nnonsense\n')
    for content in ("[]", '{"files": []}', '{"files": {"config.json": 3}}', '{"files": {}}'):
        (run / "checkpoint-52" / "trainer_state" / "complete.json").write_text(content)
        (run / "model.safetensors").unlink()
        capsys.readouterr()
        assert train(*tiny(init_from="resume")) == 0
        assert "warning: skipped" in capsys.readouterr().err
        assert (run / "model.safetensors").read_bytes() == reference


def test_a_damaged_newer_checkpoint_does_not_replace_good_ones(tiny, tmp_path):
    assert train(*tiny()) == 0
    run = tmp_path / "run"
    reference = (run / "model.safetensors").read_bytes()
    (run / "checkpoint-50").rename(run / "checkpoint-999")  # newer by its name, but damaged
    (run / "checkpoint-999" / "config.json").write_text("{}")
    (run / "checkpoint-52" / "config.json").write_text("{}")
    shutil.rmtree(run / "checkpoint-999" / "trainer_state")
    assert train(*tiny(init_from="resume")) == 2  # no complete checkpoint is left
    shutil.rmtree(run)
    assert train(*tiny(save_freq=10, save_total_limit=3)) == 0
    (run / "checkpoint-52" / "config.json").write_text("{}")
    (run / "checkpoint-50" / "config.json").write_text("{}")
    (run / "model.safetensors").unlink()
    assert train(*tiny(init_from="resume", save_freq=6, save_total_limit=1)) == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-52"]
    assert (run / "model.safetensors").read_bytes() == reference


def test_invalid_accelerate_settings_are_one_line(tiny):
    process = start(*tiny(max_steps=5), environment={"ACCELERATE_MIXED_PRECISION": "fp12"})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    assert "error: accelerate's settings do not work here" in error
    assert "Traceback" not in error


def test_the_tokenizer_of_a_run_cannot_change(tiny, capsys):
    assert train(*tiny()) == 0
    assert train(*tiny(tokenizer="{train: bpe, vocab_size: 310}", init_from="resume"), "--allow_changed") == 2
    assert "trained with another tokenizer" in capsys.readouterr().err


def test_non_finite_weights_are_not_saved(tiny, capsys, tmp_path):
    flags = {"learning_rate": 1e38, "grad_clip": 0, "warmup_steps": 0, "max_steps": 1, "eval_freq": None}
    assert train(*tiny(**flags)) == 2
    assert "a weight is not finite, so this step is not saved" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, capsys):
    first = start(*tiny(epochs=1000))
    wait_for([first], (tmp_path / "run" / "checkpoint-10").exists)
    assert train(*tiny(epochs=1000, init_from="resume")) == 2
    assert "another run is using it" in capsys.readouterr().err
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    with FileLock(tmp_path / "run" / ".lock", timeout=10):  # the lock of a dead process is free
        pass


def test_a_full_disk_keeps_the_previous_checkpoint(tiny, tmp_path, capsys):
    """The disk has room for one checkpoint but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        assert train(*tiny(save_model=disk / "run", save_total_limit=9, n_embd=48, log_freq=1000)) == 2
        output = capsys.readouterr().err
        errors = [line for line in output.splitlines() if line.startswith("error")]
        assert len(errors) == 1, output
        assert "Traceback" not in output
        assert re.search("cannot be saved: .*No space left.*stays", errors[0]), errors
        kept = [path.name for path in (disk / "run").glob("checkpoint-*")]
        assert kept
        assert not any(name.endswith(".partial") for name in kept)
        shutil.copytree(disk / "run", tmp_path / "elsewhere")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert train(*tiny(save_model=tmp_path / "elsewhere", init_from="resume", n_embd=48)) == 0


def test_a_process_ends_with_one_line(tiny):
    result = run_command(*tiny(lerning_rate=1))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: the command line: unknown key --lerning_rate")
    assert "Traceback" not in result.stderr


def test_mistakes_of_generate(tmp_path, capsys):
    for arguments, message in (
        ([tmp_path / "nope"], "is not a folder"),
        ([tmp_path], "holds no trained model"),
        ([tmp_path, "--top_p", "2"], "top_p: 2.0 is out of range"),
        ([tmp_path, "--temperature", "-1"], "temperature: -1.0 is out of range"),
    ):
        assert run_cli("generate", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_training_on_the_validation_file_is_refused(tiny, tmp_path, stories, capsys):
    for arguments in (tiny(val_file=stories / "00.txt"), [*tiny(val_file=f"{stories}/3*.txt"), "--dry_run"]):
        assert train(*arguments) == 2
        error = capsys.readouterr().err
        assert re.search(r"val_file: .*/[03]0.txt is also a training file; name only the others in train_file", error)
    assert run_cli("prepare", *tiny(val_file=stories / "00.txt")) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_of_version_0_1_keeps_its_validation_rows(tiny, tmp_path, monkeypatch, capsys):
    """It held out evenly spaced documents, most of which are training documents by the hash."""
    from hf_myllm import build
    from hf_myllm.train import evaluate

    build_task = build.tasks.build
    with monkeypatch.context() as patch:
        patch.setattr(
            build.tasks, "build", lambda *args: build_task(*args[:2], args[2] | {"splits_by_position": True}, *args[3:])
        )
        assert train(*tiny(max_steps=4)) == 0
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    assert facts["held_out_by"] == "position"
    before = read_metrics(tmp_path / "run", "val_loss")[-1]
    del facts["held_out_by"]
    path.write_text(json.dumps(facts))
    assert evaluate(tmp_path / "run")["loss"] == pytest.approx(before, abs=1e-6)
    assert train(*tiny(max_steps=6), "--init_from", "resume", "--allow_changed") == 0
    assert "other tokens" not in capsys.readouterr().err
    assert json.loads(path.read_text())["held_out_by"] == "position"
    # it is not mixed with the new choice without a word
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out_by": "hash"}))
    assert evaluate(tmp_path / "run")["loss"] != pytest.approx(before, abs=1e-6)
    assert train(*tiny(max_steps=6), "--init_from", "resume") == 2
    assert "other tokens in the training data and the validation data now" in capsys.readouterr().err


def test_a_shard_of_the_training_text_in_another_format_is_no_validation_data(tiny, tmp_path, capsys):
    texts = [write_story(seed) for seed in range(30)]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts[:20]])
    write_lines(tmp_path / "b.jsonl", [{"text": text} for text in texts[20:]])
    datasets.Dataset.from_dict({"text": texts[20:]}).to_parquet(tmp_path / "val.parquet")
    flags = tiny(train_file=tmp_path / "*.jsonl", val_file=tmp_path / "val.parquet", max_steps=1, start_context=None)
    assert train(*flags) == 2
    assert "val.parquet: it holds the same tokens as a part of" in capsys.readouterr().err
    datasets.Dataset.from_dict({"text": [*texts[28:], write_story(30)]}).to_parquet(tmp_path / "val.parquet")
    assert train(*flags, "--dry_run") == 0
    assert "2 of 3 validation documents are in the training data too" in capsys.readouterr().out


def test_warnings_about_the_data_of_every_task(tiny, tmp_path, capsys):
    """A tokenizer that does not know the text, and rows that leave some of it out."""
    tokenizer = train_wordpiece(["abc " * 9], 100)
    tokenizer.save_pretrained(tmp_path / "tok")
    rows = [{"text": f"a b c {letter}", "label": letter} for letter in "中文ab" * 5]
    flags = ["--model", "bert", "--tokenizer", tmp_path / "tok", "--max_len", 16, "--dry_run", "--hidden_size", 16]
    flags += ["--num_attention_heads", 2, "--num_hidden_layers", 1, "--intermediate_size", 16]
    flags += ["--train_file", write_lines(tmp_path / "a.jsonl", rows)]
    assert train(*flags, "--task", "classification") == 0
    assert re.search(r"8.\d% of the tokens are \[UNK\]", capsys.readouterr().out)
    assert train(*tiny(stride=64, max_steps=2, start_context=None), "--dry_run") == 0
    assert re.search(
        r"stride 64 is above the 32 tokens of a row: [\d,]+ tokens between are left out", capsys.readouterr().out
    )
    flags[3] = "{train: bpe, vocab_size: 300}"
    assert train(*flags, "--task", "mlm") == 2
    assert "which {train: bpe} does not have" in capsys.readouterr().err
