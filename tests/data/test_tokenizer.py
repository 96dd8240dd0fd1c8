import json

import numpy as np
import pytest
from conftest import make_task, train
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.data.corpus import load_tokens
from hf_myllm.data.sources import file_source
from hf_myllm.errors import ModelError
from hf_myllm.models import loading
from hf_myllm.models.loading import num_token_ids

TEXT = "Anna likes the cat.\n\tdef f(x):\n        return 'naïve 漢字 🙂'\r\n"


def test_autotokenizer_loads_a_trained_bpe_tokenizer(tmp_path):
    trained = tokenizers.train_bpe([TEXT] * 20, 320)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2Tokenizer"
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(trained)
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    unseen = "Ωmega \x00 \U0001f600"  # every byte is in the vocabulary
    assert loaded.decode(loaded(unseen)["input_ids"]) == unseen
    assert loaded.eos_token == "<|endoftext|>"
    assert tokenizers.fingerprint(tokenizers.train_bpe([TEXT] * 20, 320)) == tokenizers.fingerprint(trained)


@pytest.mark.parametrize("model_type", ["bert", "t5", "roberta", "gemma", "bart"])
def test_a_model_without_a_tokenizer_has_none(tmp_path, model_type):
    """The library makes one without a vocabulary, to which every text is unknown."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        tokenizers.load(str(tmp_path), model_type)


def test_a_unigram_tokenizer_encodes_any_text(tmp_path):
    trained = tokenizers.train_unigram([TEXT, "playing played plays player replay " * 3] * 20, 320)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert 257 <= len(loaded) <= 320
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(trained)
    for text in (TEXT, "\u03a9mega \x00 \U0001f600"):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    counts = tokenizers.token_bytes(loaded, 320)
    assert counts[loaded(TEXT)["input_ids"]].sum() == len(TEXT.encode())
    assert [loaded.eos_token_id, loaded.bos_token_id] == [0, 0]
    assert tokenizers.safe_split_pattern(loaded) is not None


def test_characters_are_tokens(tmp_path):
    """Characters that the training text does not have become bytes."""
    trained = tokenizers.train("characters", [TEXT], None, {})
    tokenizers.save(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 257 + len(set(TEXT))
    assert len(loaded(TEXT)["input_ids"]) == len(TEXT)
    for text in (TEXT, "\u03a9mega \x00 \U0001f600\r\n\n  <0x41>"):
        ids = loaded(text)["input_ids"]
        assert loaded.decode(ids) == text
        assert tokenizers.token_bytes(loaded, len(loaded))[ids].sum() == len(text.encode())
    few = tokenizers.train("characters", ["aaabbc"], 259, {})
    assert few.convert_ids_to_tokens(few("abc")["input_ids"]) == ["a", "b", "<0x63>"]
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizers.train("characters", [TEXT], None, {}))


def test_autotokenizer_loads_a_trained_wordpiece_tokenizer_which_is_reproducible(tmp_path):
    texts = [TEXT, "playing played plays player replay 漢字漢 naïveté " * 3] * 10
    trained = [tokenizers.train_wordpiece(texts, 200) for _ in range(6)]
    assert len({json.dumps(wordpiece.get_vocab(), sort_keys=True) for wordpiece in trained}) == 1
    assert len(trained[0]) <= 200
    trained[0].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "BertTokenizer"
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(trained[0])
    ids = loaded("Anna played naïve 漢字.")["input_ids"]
    assert loaded.unk_token_id not in ids
    assert loaded.decode(ids, skip_special_tokens=True) == "Anna played naïve 漢 字."
    assert loaded.tokenize("playing") != list("playing")
    assert [ids[0], ids[-1], loaded.pad_token_id] == [loaded.cls_token_id, loaded.sep_token_id, 0]


def test_bytes_per_token_sum_to_the_text():
    trained = tokenizers.train_bpe([TEXT] * 20, 320)
    counts = tokenizers.token_bytes(trained, 400)
    ids = trained(TEXT)["input_ids"]
    assert counts[ids].sum() == len(TEXT.encode())
    assert counts[trained.eos_token_id] == 0
    assert counts.shape == (400,)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_bytes_per_token_of_real_tokenizers(assets, name):
    loaded = tokenizers.load(str(assets / "tokenizers" / name))
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()[:20000]
    ids = np.array(loaded(text, add_special_tokens=False)["input_ids"])
    counts = tokenizers.token_bytes(loaded, len(loaded))
    assert counts[ids].sum() == pytest.approx(len(text.encode()), abs=1)  # SentencePiece adds a space at the beginning


def test_a_missing_tokenizer(tmp_path):
    for name in (str(tmp_path), "no-such-tokenizer", str(tmp_path / "missing")):
        with pytest.raises(ModelError, match="cannot be found"):
            tokenizers.load(name)


def test_saved_files_are_readable_by_transformers_4_and_llama_cpp(tmp_path, assets):
    for name, expected in (
        ("tokenizers/llama2", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False}),
        ("weights/stories260K", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        original = AutoTokenizer.from_pretrained(assets / name)
        tokenizers.save(original, tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert {key: written[key] for key in expected} == expected
        assert not {"is_local", "local_files_only"} & set(written)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded(TEXT)["input_ids"] == original(TEXT)["input_ids"]
        assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(original)


@pytest.fixture
def gapped(tmp_path, stories):
    """A WordPiece tokenizer of 200 tokens whose special tokens have the ids 70,000 to 70,004."""
    texts = [path.read_text() for path in sorted(stories.glob("*.txt"))]
    vocab = tokenizers.train_wordpiece(texts, 200).get_vocab()
    special = {name: 70_000 + index for index, name in enumerate(tokenizers.BERT_SPECIAL_TOKENS)}
    folder = tmp_path / "gapped"
    BertTokenizer(vocab=vocab | special, do_lower_case=False).save_pretrained(folder)
    return folder


def test_ids_beyond_the_length_of_a_tokenizer_keep_their_value(gapped, tiny_bert, tmp_path, stories):
    tokenizer = tokenizers.load(str(gapped))
    assert len(tokenizer) < 300
    assert num_token_ids(tokenizer) == 70_005
    source = file_source(str(stories))
    training, _, _ = load_tokens(source, tokenizer)
    expected = tokenizer((stories / "00.txt").read_text())["input_ids"][1:]
    assert training.read(0, len(expected)).tolist() == expected  # [SEP] is 70,003, which 16 bits do not hold
    task = make_task("mlm", tokenizer, 32, vocab_size=70_005)
    assert set(task.ordinary_ids.tolist()) == set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)

    run = tmp_path / "run"
    flags = {"tokenizer": gapped, "max_steps": 2, "eval_freq": None, "save_model": run}
    assert train(*tiny_bert(**flags)) == 0
    model, reloaded = AutoModelForMaskedLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.vocab_size == 70_005
    assert model.config.pad_token_id == reloaded.pad_token_id == 70_000
    batch = reloaded(["Anna likes the cat.", "Anna"], padding=True, return_tensors="pt")
    assert model(**batch).logits.isfinite().all()
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(f'{{"text": "Anna likes {i}", "label": "{i % 2}"}}\n' for i in range(20)))
    flags |= {"task": "classification", "train_file": labels, "init_from": run, "tokenizer": None, "max_len": 16}
    flags |= dict.fromkeys(("num_hidden_layers", "start_context"))
    assert train(*tiny_bert(**flags | {"save_model": tmp_path / "classifier"})) == 0
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert classifier(**batch).logits.shape == (2, 2)


def test_a_special_token_beyond_the_vocabulary_is_replaced_or_refused(tmp_path):
    GPT2Config(vocab_size=300, n_embd=32, n_head=2, n_layer=1, pad_token_id=-1, eos_token_id=99999).save_pretrained(
        tmp_path
    )
    tokenizer = tokenizers.train_bpe(["Anna likes the cat."], 300)
    config = loading.build_config("gpt", {}, tmp_path, tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert loading.build_config("gpt", {}, tmp_path).eos_token_id is None
    with pytest.raises(ModelError, match="pad_token_id is 300; it must be in the vocabulary, below 300"):
        loading.build_config("gpt", {"pad_token_id": 300}, tmp_path, tokenizer)


def test_a_tokenizer_that_splits_in_another_way_when_loaded_is_noticed(tmp_path, stories):
    texts = [path.read_text() for path in sorted(stories.glob("*.txt"))] + ["It's 1234 o'clock 99 4 12"] * 9
    plain = tokenizers.train_bpe(texts, 400)
    model = json.loads(plain.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.backend_tokenizer.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer  # digits stay together
    Qwen3Config(vocab_size=400).save_pretrained(tmp_path)
    tokenizers.save(tokenizer, tmp_path)
    assert tokenizers.differs_when_loaded(tokenizer, tmp_path)
    tokenizers.save(plain, tmp_path)
    assert not tokenizers.differs_when_loaded(plain, tmp_path)


def test_a_model_without_a_tokenizer_starts_another_run_on_token_ids(tiny, tmp_path, capsys):
    np.random.default_rng(0).integers(1, 100, 4000).astype(np.uint16).tofile(tmp_path / "ids.bin")
    flags = {"tokenizer": None, "train_file": tmp_path / "ids.bin", "max_steps": 2, "eval_freq": None}
    flags |= {"start_context": None, "val_fraction": 0.2}
    assert train(*tiny(**flags, vocab_size=100, save_model=tmp_path / "first")) == 0
    again = flags | {"load_model": tmp_path / "first", "save_model": tmp_path / "second"}
    assert train(*tiny(**again)) == 0
    assert not tokenizers.has_files(tmp_path / "second")
    reads_text = {"train_file": tmp_path / "a.txt", "save_model": tmp_path / "third"}
    (tmp_path / "a.txt").write_text("Anna likes the cat. " * 100)
    capsys.readouterr()
    assert train(*tiny(**again | reads_text)) == 2
    assert "tokenizer" in capsys.readouterr().err
    (tmp_path / "first" / "tokenizer.json").write_text("{")  # a damaged tokenizer is not passed over
    assert train(*tiny(**again | {"save_model": tmp_path / "third"})) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
