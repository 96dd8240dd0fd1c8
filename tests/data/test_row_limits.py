"""`max_train_rows` and `max_eval_rows`: the first rows, and no more text is tokenized than they need."""

import json

import pytest
from conftest import write_story
from small_runs import BERT, write_lines

import hf_myllm
from hf_myllm.build import open_run
from hf_myllm.data import tokenization, tokenizer
from hf_myllm.recipe import Recipe

GPT = {"n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return 400 documents and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [write_story(seed) for seed in range(400)]
    write_lines(folder / "a.jsonl", [{"text": text, "label": "ab"[len(text) % 2]} for text in texts])
    tokenizer.train_bpe(texts, 300).save_pretrained(folder / "bpe")
    return folder


def open_rows(corpus, task="causal", model="gpt", config=GPT, **data):
    """Return the training and the validation rows of a run, and its statistics."""
    data = {"train_file": str(corpus / "a.jsonl"), "tokenizer": str(corpus / "bpe"), "max_len": 64} | data
    training = {"max_steps": 3} if data.get("streaming") else {}
    recipe = Recipe(model=model, task=task, config=config, data=data, training=training, run={"dry_run": True})
    with open_run(recipe) as run:
        return run.train_rows, run.val_rows, run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 40},
        {"packing": "documents"},
        {"packing": "pad"},
        {"packing": "best_fit"},
        {"model": "bert", "task": "mlm"},
        {"model": "bert", "task": "mlm_nsp"},
        {"streaming": True},
    ],
)
def test_text_is_tokenized_as_far_as_needed(corpus, settings, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    if settings.get("model") == "bert":
        settings = settings | {"tokenizer": {"train": "wordpiece", "vocab_size": 200}, "config": BERT}
    read = []
    original = tokenization.read_documents

    def count(*args):
        for text, is_end in original(*args):
            read.append(text)
            yield text, is_end

    monkeypatch.setattr(tokenization, "read_documents", count)
    rows, val_rows, run = open_rows(corpus, max_train_rows=20, max_eval_rows=4, **settings)
    assert len(rows) == 20
    assert len(val_rows) == 4 or "mlm_nsp" in settings.values()  # whole documents
    assert 20 < len(read) < 200
    whole, _, _ = open_rows(corpus, val_fraction=0, **settings | {"streaming": False})
    assert len(whole) > 200
    if not {"packing", "model"} & set(settings):
        same = whole.tokens.read(0, 20 * (settings.get("stride") or 64))
        assert rows.tokens.read(0, len(same)).tolist() == same.tolist()
    larger, val_rows, _ = open_rows(corpus, max_train_rows=10**6, **settings)
    held_out, val_whole, _ = open_rows(corpus, **settings | {"streaming": False})  # as without a limit
    assert (larger.tokens.fingerprint, len(val_rows)) == (held_out.tokens.fingerprint, len(val_whole))


def test_the_rows_of_a_mixture_have_their_shares(corpus):
    sources = [{"train_file": str(corpus / "a.jsonl"), "weight": weight} for weight in (3, 1)]
    rows, _, run = open_rows(corpus, train_file=None, datasets=sources, max_train_rows=40, val_fraction=0)
    assert len(rows) == 40
    assert rows.source_starts == [0, 31]  # the 31st row ends in the second source


def test_labelled_rows_are_those_of_the_file(corpus, tmp_path):
    settings = {"model": "bert", "task": "classification", "config": BERT, "max_len": 16}
    settings |= {"tokenizer": {"train": "wordpiece", "vocab_size": 200}}
    whole, _, _ = open_rows(corpus, val_fraction=0, **settings)
    rows, val_rows, run = open_rows(corpus, max_train_rows=30, max_eval_rows=7, **settings)
    assert (rows.num_examples, val_rows.num_examples) == (30, 7)
    first = [whole.read(row)[0].tolist() for row in range(37)]
    own = [part.read(row)[0].tolist() for part in (rows, val_rows) for row in range(len(part))]
    assert sorted(own) == sorted(first)
    assert open_rows(corpus, max_train_rows=95, **settings)[1].num_examples == 5
    _, val_rows, _ = open_rows(corpus, max_eval_rows=7, **settings)
    assert val_rows.num_examples == len(val_rows) == 7
    other = write_lines(tmp_path / "val.jsonl", [{"text": f"Anna {n}", "label": "a"} for n in range(9)])
    rows, val_rows, _ = open_rows(corpus, val_file=str(other), max_train_rows=30, max_eval_rows=7, **settings)
    assert (rows.num_examples, val_rows.num_examples) == (30, 7)


def test_a_trial_is_named(corpus, tmp_path, capsys):
    data = {"train_file": str(corpus / "a.jsonl"), "tokenizer": str(corpus / "bpe"), "max_len": 64}
    data |= {"max_train_rows": 8, "max_eval_rows": 2}
    recipe = Recipe(model="gpt", config=GPT, data=data, run={"save_model": str(tmp_path / "run")})
    result = hf_myllm.train(recipe)
    assert result.step == 1
    assert "max_train_rows 8, max_eval_rows 2: a trial, of the first rows only" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["training"]["rows"] == 8
    assert "documents" not in facts["data"]["training"]
    assert facts["recipe"]["data"]["max_train_rows"] == 8
