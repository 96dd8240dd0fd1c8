"""Every kind of source gives the same tokens, once, with its mistakes named."""

import json
import os

import datasets
import numpy as np
import pytest

from hf_myllm.data import corpus, tokenizer
from hf_myllm.errors import InputError


@pytest.fixture(scope="module")
def bpe(stories):
    return tokenizer.train_bpe(corpus.read_documents(corpus.file_source(str(stories))), 300)


def documents(stories):
    return [path.read_text() for path in sorted(stories.glob("*.txt"))]


def everything(tokens):
    return tokens.read(0, len(tokens)).tolist()


def expected(bpe, texts):
    return [token for text in texts for token in [*bpe(text)["input_ids"], bpe.eos_token_id]]


def load(spec, bpe, fraction=0.0, **options):
    return corpus.load_tokens(corpus.file_source(spec, **options), bpe, fraction)


def test_all_text_sources_agree(stories, bpe, tmp_path):
    texts = documents(stories)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "a.parquet")
    wanted = expected(bpe, texts)
    sources = {
        "folder": load(str(stories), bpe),
        "glob": load(f"{stories}/*.txt", bpe),
        "list": load([str(path) for path in sorted(stories.glob("*.txt"))], bpe),
        "jsonl": load(str(tmp_path / "a.jsonl"), bpe),
        "parquet": load(str(tmp_path / "a.parquet"), bpe, text_column="body"),
    }
    for name, (tokens, held_out, account) in sources.items():
        assert everything(tokens) == wanted, name
        assert held_out is None
        assert account["train"]["documents"] == 40
        assert account["train"]["bytes"] == sum(len(text.encode()) for text in texts)
        assert tokens.max_id == max(wanted)
    assert len({tokens.fingerprint for tokens, _, _ in sources.values()}) == 1


def test_one_document_per_line(tmp_path, bpe):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    tokens, _, account = load(str(tmp_path / "lines.txt"), bpe, document="line")
    assert everything(tokens) == expected(bpe, ["one\n", "two\n", "three"])
    assert account["train"]["documents"] == 3


def test_validation_is_every_so_manieth_document(stories, bpe):
    texts = documents(stories)
    training, held_out, account = load(str(stories), bpe, 0.1)
    assert everything(held_out) == expected(bpe, texts[4::10])
    assert account["validation"]["documents"] == 4
    assert len(training) + len(held_out) == len(expected(bpe, texts))


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_a_long_document_in_pieces_is_the_same_tokens(assets, monkeypatch, name):
    loaded = tokenizer.load(str(assets / "tokenizers" / name))
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()
    monkeypatch.setattr(corpus, "_PIECE", 1000)
    monkeypatch.setattr(corpus, "_BATCH", 20_000)
    assert corpus.cuts_cleanly(loaded) == (name == "gpt2")
    tokens, _, account = load(str(assets / "corpora" / "tinyshakespeare.txt"), loaded)
    assert account["train"]["documents"] == 1
    assert everything(tokens) == [*loaded(text, add_special_tokens=False)["input_ids"], loaded.eos_token_id]
    assert name == "llama2" or len(tokens.chunks) > 10


def test_python_in_pieces_is_the_same_tokens(bpe, monkeypatch):
    monkeypatch.setattr(corpus, "_PIECE", 50)
    texts = list(corpus.read_documents(corpus.file_source("{stdlib}/[a-c]*.py")))
    for text in texts:
        pieces = corpus._pieces(text)
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in bpe(piece)["input_ids"]] == bpe(text)["input_ids"]


def test_few_documents_are_cut_by_tokens(tmp_path, bpe):
    (tmp_path / "one.txt").write_text("Anna likes the cat. " * 200)
    training, held_out, account = load(str(tmp_path / "one.txt"), bpe, 0.1)
    whole = expected(bpe, [(tmp_path / "one.txt").read_text()])
    assert everything(training) + everything(held_out) == whole
    assert len(held_out) == len(whole) - int(len(whole) * 0.9)
    assert "last 10%" in account["held_out"]


def test_a_second_run_tokenizes_nothing_and_a_changed_file_is_seen(tmp_path, bpe, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("Anna finds a king.")
    first, _, _ = load(str(file), bpe)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_tokenize", lambda *args: pytest.fail("tokenized again"))
        again, _, _ = load(str(file), bpe)
        assert everything(again) == everything(first)
    file.write_text("Anna forgets a king, and the cat.")
    changed, _, _ = load(str(file), bpe)
    assert everything(changed) == expected(bpe, [file.read_text()])
    assert changed.fingerprint != first.fingerprint


def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path, bpe, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("the cat sees my friend.")

    def die(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(corpus._Part, "close", die)
        with pytest.raises(RuntimeError):
            load(str(file), bpe)
    assert everything(load(str(file), bpe)[0]) == expected(bpe, [file.read_text()])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bin_files_of_both_widths(tmp_path, bpe, dtype):
    ids = np.arange(5000, dtype=dtype) % 300
    ids.tofile(tmp_path / "a.bin")
    tokens, held_out, _ = load(str(tmp_path / "a.bin"), bpe, 0.2)
    assert everything(tokens) + everything(held_out) == ids.tolist()
    assert (tokens.max_id, tokens.position_of_max) == (299, 299)


def test_a_stream_in_pieces_reads_as_one():
    whole = np.arange(100, dtype=np.uint16)
    tokens = corpus.Tokens([whole[:1], whole[1:40], whole[40:41], whole[41:]], "f", 99)
    many = corpus.Tokens(np.array_split(np.arange(6000, dtype=np.uint16), 3000), "f", 5999)
    assert many.read(1, 5999).tolist() == list(range(1, 6000))
    for start, length in ((0, 100), (0, 1), (1, 39), (39, 3), (99, 1), (0, 42)):
        assert tokens.read(start, length).tolist() == list(range(start, start + length))
    for position in (0, 1, 40, 77, 99):
        before, after = tokens.split(position)
        assert len(before) == position
        assert after.read(0, len(after)).tolist() == list(range(position, 100))


def test_mistakes_are_named(tmp_path, bpe):
    def refused(message, spec, content=None, **options):
        if content is not None:
            spec.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load(str(spec), bpe, **options)
        assert "\n" not in str(error.value)

    refused("does not exist", tmp_path / "missing.txt")
    refused("is empty", tmp_path / "empty.txt", b"")
    refused("holds no text", tmp_path / "blank.txt", b"  \n\n")
    refused("byte 0xe9 at offset 3", tmp_path / "latin.txt", b"caf\xe9 au lait")
    refused("byte 0xff at offset 9", tmp_path / "lines.txt", b"one\ntwo\nx\xff\n", document="line")
    refused("5 bytes is not a whole number", tmp_path / "odd.bin", b"\0\1\0\1\0")
    refused("no column 'text', but 'body'", tmp_path / "a.jsonl", b'{"body": "x"}\n')
    datasets.Dataset.from_dict({"text": [3, 4]}).to_parquet(tmp_path / "b.parquet")
    refused("b.parquet row 1: column 'text' does not hold text: 3", tmp_path / "b.parquet")
    refused("c.jsonl line 2 is not JSON", tmp_path / "c.jsonl", b'{"text": "x"}\n{"text": \n')
    (tmp_path / "folder").mkdir()
    refused("holds no .txt", tmp_path / "folder")
    refused("cannot be read as parquet", tmp_path / "d.parquet", b"not a parquet file")
    (tmp_path / "mixed").mkdir()
    with pytest.raises(InputError, match="several kinds"):
        corpus.file_source([str(tmp_path / "latin.txt"), str(tmp_path / "odd.bin")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(InputError, match="no permission"):
        load(str(tmp_path / "a.txt"), bpe)


def test_the_hub_out_of_reach_says_what_else_works(bpe):
    with pytest.raises(InputError, match="--train_file FILE") as error:
        corpus.load_tokens(corpus.hub_source("someone/some-corpus"), bpe)
    assert "someone/some-corpus" in str(error.value)
