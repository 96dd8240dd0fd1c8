import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_myllm.data import tokenizer
from hf_myllm.errors import ModelError

TEXT = "Anna likes the cat.\n\tdef f(x):\n        return 'naïve 漢字 🙂'\r\n"


def test_autotokenizer_loads_a_trained_bpe_tokenizer(tmp_path):
    trained = tokenizer.train_bpe([TEXT] * 20, 320)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2Tokenizer"
    assert tokenizer.fingerprint(loaded) == tokenizer.fingerprint(trained)
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    unseen = "Ωmega \x00 \U0001f600"  # every byte is in the vocabulary
    assert loaded.decode(loaded(unseen)["input_ids"]) == unseen
    assert loaded.eos_token == "<|endoftext|>"
    assert tokenizer.fingerprint(tokenizer.train_bpe([TEXT] * 20, 320)) == tokenizer.fingerprint(trained)


def test_a_unigram_tokenizer_encodes_any_text(tmp_path):
    trained = tokenizer.train_unigram([TEXT, "playing played plays player replay " * 3] * 20, 320)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert 257 <= len(loaded) <= 320
    assert tokenizer.fingerprint(loaded) == tokenizer.fingerprint(trained)
    for text in (TEXT, "\u03a9mega \x00 \U0001f600"):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    counts = tokenizer.token_bytes(loaded, 320)
    assert counts[loaded(TEXT)["input_ids"]].sum() == len(TEXT.encode())
    assert [loaded.eos_token_id, loaded.bos_token_id] == [0, 0]
    assert tokenizer.safe_split_pattern(loaded) is not None


def test_autotokenizer_loads_a_trained_wordpiece_tokenizer_which_is_reproducible(tmp_path):
    texts = [TEXT, "playing played plays player replay 漢字漢 naïveté " * 3] * 10
    trained = [tokenizer.train_wordpiece(texts, 200) for _ in range(6)]
    assert len({json.dumps(wordpiece.get_vocab(), sort_keys=True) for wordpiece in trained}) == 1
    assert len(trained[0]) <= 200
    trained[0].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "BertTokenizer"
    assert tokenizer.fingerprint(loaded) == tokenizer.fingerprint(trained[0])
    ids = loaded("Anna played naïve 漢字.")["input_ids"]
    assert loaded.unk_token_id not in ids
    assert loaded.decode(ids, skip_special_tokens=True) == "Anna played naïve 漢 字."
    assert loaded.tokenize("playing") != list("playing")
    assert [ids[0], ids[-1], loaded.pad_token_id] == [loaded.cls_token_id, loaded.sep_token_id, 0]


def test_bytes_per_token_sum_to_the_text():
    trained = tokenizer.train_bpe([TEXT] * 20, 320)
    counts = tokenizer.token_bytes(trained, 400)
    ids = trained(TEXT)["input_ids"]
    assert counts[ids].sum() == len(TEXT.encode())
    assert counts[trained.eos_token_id] == 0
    assert counts.shape == (400,)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_bytes_per_token_of_real_tokenizers(assets, name):
    loaded = tokenizer.load(str(assets / "tokenizers" / name))
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()[:20000]
    ids = np.array(loaded(text, add_special_tokens=False)["input_ids"])
    counts = tokenizer.token_bytes(loaded, len(loaded))
    assert counts[ids].sum() == pytest.approx(len(text.encode()), abs=1)  # SentencePiece adds a space at the beginning


def test_a_missing_tokenizer(tmp_path):
    for name in (str(tmp_path), "no-such-tokenizer", str(tmp_path / "missing")):
        with pytest.raises(ModelError, match="cannot be found"):
            tokenizer.load(name)


def test_saved_files_are_readable_by_transformers_4_and_llama_cpp(tmp_path, assets):
    for name, expected in (
        ("tokenizers/llama2", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False}),
        ("weights/stories260K", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        original = AutoTokenizer.from_pretrained(assets / name)
        tokenizer.save(original, tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert {key: written[key] for key in expected} == expected
        assert not {"is_local", "local_files_only"} & set(written)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded(TEXT)["input_ids"] == original(TEXT)["input_ids"]
        assert tokenizer.fingerprint(loaded) == tokenizer.fingerprint(original)
