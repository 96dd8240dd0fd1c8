"""Generated text: seeded, bounded, streamed."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_cli, train
from launching import run_in_a_terminal
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hf_myllm.errors import InputError
from hf_myllm.generate import generate, generate_text, load
from hf_myllm.models.gpt import GPTForCausalLM


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("generate") / "run"
    flags = "--n_layer 1 --n_head 2 --n_embd 32 --max_len 32 --epochs 6 --learning_rate 5e-3 --batch_size 8"
    argv = [*flags.split(), "--train_file", stories, "--tokenizer", "{train: bpe, vocab_size: 300}"]
    assert train(*argv, "--save_model", folder) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(run_dir):
    return load(run_dir)


def test_the_seed_and_the_sampling_settings_decide_the_text(loaded):
    model, tokenizer = loaded

    def sample(**settings):
        return generate_text(model, tokenizer, "Anna", **{"max_new_tokens": 15, "seed": 1} | settings)

    assert sample() == sample()
    assert sample() != sample(seed=2)
    greedy = sample(temperature=0)
    assert greedy == sample(temperature=0, seed=2) == sample(top_k=1) == sample(top_k=0, top_p=1e-6)
    assert all(text.startswith("Anna") for text in (sample(), greedy))
    assert not model.training


def test_the_models_own_generation_settings_are_not_used(run_dir):
    model, tokenizer = load(run_dir)
    greedy = generate_text(model, tokenizer, "Anna", 20, temperature=0)
    model.generation_config.update(do_sample=True, temperature=1.5, repetition_penalty=3.0)
    assert {generate_text(model, tokenizer, "Anna", 20, temperature=0, seed=seed) for seed in range(3)} == {greedy}
    assert model.generation_config.repetition_penalty == 3.0


def test_a_model_that_trains_with_flex_attention_generates_with_sdpa(run_dir, loaded, monkeypatch):
    """Flex attention would be compiled for the lengths of a prompt and of a token."""
    model, tokenizer = GPTForCausalLM.from_pretrained(run_dir), loaded[1]
    expected = generate_text(model, tokenizer, "Anna", 5)
    model.set_attn_implementation("flex_attention")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", None)  # a call would fail
    assert generate_text(model, tokenizer, "Anna", 5) == expected
    assert model.config._attn_implementation == "flex_attention"


def test_generation_stops_at_the_last_position(loaded):
    model, tokenizer = loaded
    text = generate_text(model, tokenizer, "Anna", max_new_tokens=10_000)
    assert 1 < len(tokenizer(text)["input_ids"]) <= 33
    with pytest.raises(InputError, match="the model takes at most 31; shorten it"):
        generate_text(model, tokenizer, "Anna " * 40)


def test_an_empty_prompt_starts_a_document(loaded):
    model, tokenizer = loaded
    assert generate_text(model, tokenizer, "", max_new_tokens=5)


def test_generate_is_the_public_function(run_dir, loaded):
    """It returns what the model generates, and changes neither the random state nor the logging of the process."""
    state, settings = torch.get_rng_state(), (logging.get_verbosity(), logging.is_progress_bar_enabled())
    text = generate(run_dir, "Anna", max_new_tokens=15, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == settings
    assert text == generate_text(*loaded, "Anna", max_new_tokens=15, seed=1)
    for settings in ({"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(InputError, match=f"{next(iter(settings))}: .* out of range; give a number"):
            generate(run_dir, "Anna", **settings)


def test_generate_fills_the_mask_of_a_masked_language_model(tiny_bert, tmp_path):
    assert train(*tiny_bert(task="mlm", max_steps=1, start_context=None)) == 0
    text, guesses = generate(tmp_path / "run", "Anna likes the [MASK].").splitlines()
    assert text == "Anna likes the [MASK]."
    assert guesses.startswith("[MASK]  ")
    assert guesses.count("%") == 5


def test_the_command_streams_each_sample(run_dir, loaded):
    flags = "--prompt", "Anna", "--num_samples", 2, "--seed", 3
    pieces, code = run_in_a_terminal(run_dir, *flags, module="hf_myllm.generate")
    output = b"".join(pieces).decode().replace("\r\n", "\n")
    assert code == 0, output
    assert len(pieces) > 5  # the text arrives while it is generated
    first, second = output.split("--- sample 2 of 2, seed 4\n")
    assert first.startswith("--- sample 1 of 2, seed 3\nAnna")
    assert second.startswith("Anna")
    assert first.splitlines()[1:] == generate_text(*loaded, "Anna", 200, seed=3).splitlines()


def test_an_unfinished_run_generates_from_its_newest_checkpoint(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    model, _ = load(tmp_path / "run")
    assert model.config.n_embd == 32


def test_options_without_effect_are_refused(monkeypatch, capsys):
    module = sys.modules["hf_myllm.generate"]
    model = SimpleNamespace(can_generate=lambda: False, device=torch.device("cpu"))
    monkeypatch.setattr(module, "_load_generator", lambda run_dir: (model, None))
    monkeypatch.setattr(module, "fill_mask", lambda model, tokenizer, prompt: f"filled: {prompt}")
    assert run_cli("generate", "run", "--prompt", "a [MASK]") == 0
    assert capsys.readouterr().out == "filled: a [MASK]\n"
    for option in (["--temperature", "0.8"], ["--chat"], ["--num_samples", "2"]):
        assert run_cli("generate", "run", *option) == 2
        assert f"{option[0]}: it has no effect" in capsys.readouterr().err
