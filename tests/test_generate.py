"""Text from a folder: seeded, bounded, streamed."""

import subprocess

import pytest
from conftest import ROOT, command, run_command, train

from hf_myllm.errors import InputError
from hf_myllm.generate import generate_text, load


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("generate") / "run"
    flags = "--n_layer 1 --n_head 2 --n_embd 32 --max_len 32 --epochs 6 --learning_rate 5e-3 --batch_size 8"
    argv = [*flags.split(), "--train_file", stories, "--tokenizer", "{train: bpe, vocab_size: 300}"]
    assert train(*argv, "--save_model", folder) == 0
    return folder


def test_the_seed_decides_and_the_settings_matter(run):
    model, tokenizer = load(run)

    def say(**settings):
        return generate_text(model, tokenizer, "Anna", **{"max_new_tokens": 15, "seed": 1} | settings)

    assert say() == say()
    assert say() != say(seed=2)
    greedy = say(temperature=0)
    assert greedy == say(temperature=0, seed=2) == say(top_k=1) == say(top_k=0, top_p=1e-6)
    assert all(text.startswith("Anna") for text in (say(), greedy))
    assert not model.training


def test_a_models_own_settings_do_not_leak_in(run):
    model, tokenizer = load(run)
    greedy = generate_text(model, tokenizer, "Anna", 20, temperature=0)
    model.generation_config.update(do_sample=True, temperature=1.5, repetition_penalty=3.0)
    assert {generate_text(model, tokenizer, "Anna", 20, temperature=0, seed=seed) for seed in range(3)} == {greedy}
    assert model.generation_config.repetition_penalty == 3.0


def test_the_positions_are_the_end(run):
    model, tokenizer = load(run)
    text = generate_text(model, tokenizer, "Anna", max_new_tokens=10_000)
    assert 1 < len(tokenizer(text)["input_ids"]) <= 33
    with pytest.raises(InputError, match="the model only 32 positions"):
        generate_text(model, tokenizer, "Anna " * 40)


def test_an_empty_prompt_starts_a_document(run):
    model, tokenizer = load(run)
    assert generate_text(model, tokenizer, "", max_new_tokens=5)


def test_the_command(run):
    result = run_command(run, "--prompt", "Anna", "--num_samples", 2, "--seed", 3, module="hf_myllm.generate")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first, second = result.stdout.split("--- sample 2 of 2, seed 4\n")
    assert first.startswith("--- sample 1 of 2, seed 3\nAnna")
    assert second.startswith("Anna")
    model, tokenizer = load(run)
    assert first.splitlines()[1:] == generate_text(model, tokenizer, "Anna", 200, seed=3).splitlines()


def test_it_streams(run):
    """The text comes in pieces while it is being made, not at the end."""
    arguments = command(run, "--prompt", "Anna", "--max_new_tokens", 30, module="hf_myllm.generate")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0) as process:
        pieces = list(iter(lambda: process.stdout.read(4096), b""))
    assert len(pieces) > 3


def test_a_run_that_is_still_training_speaks_from_its_newest_checkpoint(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    model, _ = load(tmp_path / "run")
    assert model.config.n_embd == 32
