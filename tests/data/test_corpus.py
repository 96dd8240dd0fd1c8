"""All sources of one text give the same tokens, and errors name the file and the row."""

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_myllm.data import corpus, hold_out, readers, remote, sources, tokenization, tokenizer
from hf_myllm.errors import DataError


@pytest.fixture(scope="module")
def bpe(stories):
    return tokenizer.train_bpe(readers.SourceTexts([sources.file_source(str(stories))]), 300)


def documents(stories):
    return [path.read_text() for path in sorted(stories.glob("*.txt"))]


def all_ids(tokens):
    return tokens.read(0, len(tokens)).tolist()


def expected(bpe, texts):
    return [token for text in texts for token in [*bpe(text)["input_ids"], bpe.eos_token_id]]


def load(spec, bpe, fraction=0.0, **options):
    return corpus.load_tokens(sources.file_source(spec, **options), bpe, fraction)


def test_all_text_sources_agree(stories, bpe, tmp_path):
    texts = documents(stories)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "a.parquet")
    expected_ids = expected(bpe, texts)
    loaded = {
        "folder": load(str(stories), bpe),
        "glob": load(f"{stories}/*.txt", bpe),
        "list": load([str(path) for path in sorted(stories.glob("*.txt"))], bpe),
        "jsonl": load(str(tmp_path / "a.jsonl"), bpe),
        "parquet": load(str(tmp_path / "a.parquet"), bpe, text_column="body"),
    }
    rows = [{"text": text, "n": 1} for text in texts]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"a{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    plain = (tmp_path / "a.jsonl").read_bytes()
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(plain))
    with pa.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as file:
        file.write(plain)
    (tmp_path / "zipped").mkdir()
    for path in stories.glob("*.txt"):
        (tmp_path / "zipped" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    names = ["a.json", "b.json", "a.csv", "a.tsv", "zipped", *(f"a.jsonl.{z}" for z in ("gz", "bz2", "xz", "zst"))]
    loaded |= {name: load(str(tmp_path / name), bpe) for name in names}
    for name, (tokens, held_out, stats) in loaded.items():
        assert all_ids(tokens) == expected_ids, name
        assert held_out is None
        assert stats["train"]["documents"] == 40
        assert stats["train"]["unknown"] == 0
        assert stats["train"]["bytes"] == sum(len(text.encode()) for text in texts)
        assert tokens.max_id == max(expected_ids)
    assert len({tokens.fingerprint for tokens, _, _ in loaded.values()}) == 1


def test_one_document_per_line(tmp_path, bpe):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    tokens, _, stats = load(str(tmp_path / "lines.txt"), bpe, document="line")
    assert all_ids(tokens) == expected(bpe, ["one\n", "two\n", "three"])
    assert stats["train"]["documents"] == 3


def held_out_texts(bpe, texts, fraction=0.1, **options):
    """Return the texts that are held out, and those that are not."""
    source = sources.in_memory_source(texts, "train_data")
    training, held_out, _ = corpus.load_tokens(source, bpe, fraction, **options)
    return [bpe.decode(all_ids(part)).split(bpe.eos_token)[:-1] for part in (held_out, training)]


def test_documents_are_held_out_by_their_content(stories, bpe):
    texts = documents(stories)
    held_out, training = held_out_texts(bpe, texts)
    assert len(held_out) == 4
    assert sorted(held_out + training) == sorted(texts)
    assert set(held_out_texts(bpe, texts[::-1])[0]) == set(held_out)  # in any order
    more = held_out_texts(bpe, [*texts, "one more text"])[0]
    assert len(set(more) & set(held_out)) >= 3
    assert not set(held_out_texts(bpe, texts * 3)[0]) & set(held_out_texts(bpe, texts * 3)[1])  # equal ones on one side
    assert len(held_out_texts(bpe, ["the same"] * 40)[0]) == 4
    # as in version 0.1
    assert held_out_texts(bpe, texts, by_position=True)[0] == texts[4::10]


def test_long_documents_are_held_out_whole(stories, bpe, monkeypatch):
    texts = [" ".join(documents(stories)[n : n + 5]) for n in range(30)]
    whole = held_out_texts(bpe, texts)
    monkeypatch.setattr(readers, "_PIECE_CHARS", 100)
    held_out, training = held_out_texts(bpe, [f"{text}." for text in texts])
    assert (len(held_out), len(training)) == tuple(map(len, whole)) == (3, 27)


def test_the_share_of_very_many_documents(bpe, monkeypatch):
    monkeypatch.setattr(hold_out, "_RANKED", 100)
    texts = [f"text {n}" for n in range(3000)]
    assert abs(len(held_out_texts(bpe, texts)[0]) - 300) < 60


def test_equal_documents_are_read_once(bpe, monkeypatch):
    """Also long ones, of which the beginning is equal; and nothing else changes."""
    texts = [f"text {n % 7} " * (n % 7 + 1) for n in range(30)] + ["word " * 100 + str(n % 2) for n in range(6)]
    unique = list(dict.fromkeys(texts))
    for piece_chars in (1000, 50):
        monkeypatch.setattr(readers, "_PIECE_CHARS", piece_chars)
        source, expected = (sources.in_memory_source(part, "texts") for part in (texts, unique))
        tokens, held_out, stats = corpus.load_tokens(replace(source, deduplicate=True), bpe, 0.2)
        assert stats["train"]["repeated"] == len(texts) - len(unique)
        same, same_held_out, _ = corpus.load_tokens(expected, bpe, 0.2)
        assert all_ids(tokens) == all_ids(same)
        assert all_ids(held_out) == all_ids(same_held_out)
    assert len(corpus.load_tokens(source, bpe)[0]) > 2 * len(tokens)


@pytest.mark.parametrize("name", ["gpt2", "llama2", "bert-base-uncased", "t5"])
def test_a_long_document_in_pieces_gives_the_same_tokens(assets, monkeypatch, tmp_path, name):
    loaded = tokenizer.load(str(assets / "tokenizers" / name))
    file = tmp_path / "shakespeare.txt"
    file.write_text((assets / "corpora" / "tinyshakespeare.txt").read_text()[:400_000])
    monkeypatch.setattr(readers, "_PIECE_CHARS", 1000)
    monkeypatch.setattr(tokenization, "_BATCH_CHARS", 20_000)
    monkeypatch.setattr(tokenization, "SHARD_CHARS", 30_000)
    tokens, _, stats = load(str(file), loaded)
    assert stats["train"]["documents"] == 1
    whole = loaded(file.read_text(), add_special_tokens=False)["input_ids"]
    assert all_ids(tokens) == [*whole, *tokenizer.end_of_document(loaded)]
    assert len(tokens.chunks) > 10


@pytest.mark.parametrize("name", ["bpe", "characters", "llama2", "bert-base-uncased", "t5"])
def test_unusual_text_in_pieces_gives_the_same_tokens(assets, bpe, monkeypatch, name):
    """Python code and random white space, punctuation and scripts, split as often as possible."""
    own = {"bpe": bpe, "characters": tokenizer.train("characters", ["a \n\u4e2d"], None, {})}
    loaded = own.get(name) or tokenizer.load(str(assets / "tokenizers" / name))
    monkeypatch.setattr(readers, "_PIECE_CHARS", 50)
    texts = list(readers.SourceTexts([sources.file_source("{stdlib}/[ab]*.py")]))[:20]
    draw = np.random.default_rng(0)
    parts = ["a", "Zebra", " ", "  ", "\n", "\n\n ", "\t", "\u00a0", "\u3000", "\u0301", "'s", "\u00e9", "\u4e2d", "7"]
    parts += ["...", "_", "\r\n"]
    parts += [*loaded.all_special_tokens[:3], "▁x"]
    texts += ["".join(draw.choice(parts, 400)) for _ in range(50)]
    split_pattern = tokenizer.safe_split_pattern(loaded)
    num_splits = 0
    for text in texts:
        pieces = list(readers._split_document([text[:90], text[90:]], split_pattern))
        num_splits += len(pieces) - 1
        assert [is_end for _, is_end in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = [i for piece, _ in pieces for i in loaded(piece, add_special_tokens=False)["input_ids"]]
        assert ids == loaded(text, add_special_tokens=False)["input_ids"]
    assert num_splits > 100


def test_a_line_without_spaces_is_split(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(readers, "_MAX_PIECE_CHARS", 10_000)
    monkeypatch.setattr(readers, "_PIECE_CHARS", 1000)
    monkeypatch.setattr(readers, "_BLOCK_CHARS", 700)
    (tmp_path / "line.txt").write_text("\u00e9" * 50_000)
    tokens, _, stats = load(str(tmp_path / "line.txt"), bpe)
    assert stats["train"]["documents"] == 1
    assert bpe.decode(all_ids(tokens)[:-1]) == "\u00e9" * 50_000


def test_with_few_documents_the_last_tokens_are_held_out(tmp_path, bpe):
    (tmp_path / "one.txt").write_text("Anna likes the cat. " * 200)
    training, held_out, stats = load(str(tmp_path / "one.txt"), bpe, 0.1)
    whole = expected(bpe, [(tmp_path / "one.txt").read_text()])
    assert all_ids(training) + all_ids(held_out) == whole
    assert len(held_out) == len(whole) - int(len(whole) * 0.9)
    assert "last 10%" in stats["held_out"]


def test_tokens_are_cached_until_the_file_changes(tmp_path, bpe, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("Anna finds a king.")
    first, _, _ = load(str(file), bpe)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_shards", lambda *args: pytest.fail("tokenized again"))
        again, _, _ = load(str(file), bpe)
        assert all_ids(again) == all_ids(first)
    file.write_text("Anna forgets a king, and the cat.")
    changed, _, _ = load(str(file), bpe)
    assert all_ids(changed) == expected(bpe, [file.read_text()])
    assert changed.fingerprint != first.fingerprint


def test_new_content_of_the_same_size_and_time_is_read(tmp_path, bpe, monkeypatch):
    """As archives with fixed times give it; a copy of the same content with other times is not tokenized again."""
    file = tmp_path / "a.txt"
    for waits in (False, True):
        if waits:  # as if the file had been written long ago
            monkeypatch.setattr(sources, "_CLOCK_TICK", 0)
        for text in ("aaaa a king", "cccc a king"):
            file.write_text(text)
            os.utime(file, (10**9, 10**9))
            assert all_ids(load(str(file), bpe)[0]) == expected(bpe, [text])
    monkeypatch.setattr(corpus, "write_shards", lambda *args: pytest.fail("tokenized again"))
    for name in ("b.txt", "a.txt"):
        file = file.replace(tmp_path / name)
    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)
    os.utime(file, (2 * 10**9, 2 * 10**9))
    load(str(file), bpe)


def test_a_sample_of_the_beginning_is_replaced_by_the_whole_once_that_is_tokenized(tmp_path, bpe, monkeypatch):
    (tmp_path / "a.txt").write_text("Anna finds a king. " * 99)
    monkeypatch.setattr(sources, "_CLOCK_TICK", 0)
    source = sources.file_source(str(tmp_path / "a.txt"))
    sample = replace(source, max_chars=50)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "digest_file", lambda path: pytest.fail("all of a large file was read"))
        assert corpus.load_tokens(sample, bpe)[2]["share"] < 1.1
    whole = corpus.load_tokens(source, bpe)[0]
    assert corpus.load_tokens(sample, bpe)[0].fingerprint == whole.fingerprint


def test_an_interrupted_tokenization_leaves_no_cached_folder(tmp_path, bpe, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("the cat sees my friend.")

    def fail(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "text_hash", fail)
        with pytest.raises(RuntimeError):
            load(str(file), bpe)
    assert all_ids(load(str(file), bpe)[0]) == expected(bpe, [file.read_text()])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bin_files_of_both_integer_types(tmp_path, bpe, dtype):
    ids = np.arange(5000, dtype=dtype) % 300
    ids.tofile(tmp_path / "a.bin")
    tokens, held_out, _ = load(str(tmp_path / "a.bin"), bpe, 0.2)
    assert all_ids(tokens) + all_ids(held_out) == ids.tolist()
    assert (tokens.max_id, tokens.find_out_of_vocabulary(299), tokens.find_out_of_vocabulary(300)) == (299, 299, None)


def test_a_stream_of_several_chunks_reads_as_one():
    whole = np.arange(100, dtype=np.uint16)
    tokens = corpus.TokenStream([whole[:1], whole[1:40], whole[40:41], whole[41:]], "f", 99)
    many = corpus.TokenStream(np.array_split(np.arange(6000, dtype=np.uint16), 3000), "f", 5999)
    assert many.read(1, 5999).tolist() == list(range(1, 6000))
    for start, length in ((0, 100), (0, 1), (1, 39), (39, 3), (99, 1), (0, 42)):
        assert tokens.read(start, length).tolist() == list(range(start, start + length))
    for position in (0, 1, 40, 77, 99):
        before, after = tokens.split(position)
        assert len(before) == position
        assert after.read(0, len(after)).tolist() == list(range(position, 100))


def test_errors_name_the_file_and_the_position(tmp_path, bpe):
    def refused(message, spec, content=None, **options):
        if content is not None:
            spec.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
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
    refused("e.json object 2 is not JSON", tmp_path / "e.json", b'[{"text": "x"}, {"text": ]')
    refused("f.json object 1 is not an object with columns: 3", tmp_path / "f.json", b"[3]")
    refused("g.csv has no column 'text', but 'a', 'b'|line 2 has no column", tmp_path / "g.csv", b"a,b\n1,2\n")
    refused("h.csv line 2 has more fields than the 1", tmp_path / "h.csv", b"text\nx,y\n")
    refused("i.csv line 2 cannot be read as CSV", tmp_path / "i.csv", b'text\n"x" y\n')
    refused("byte 0xe9 at offset 8", tmp_path / "j.csv", b"text\ncaf\xe9\n")
    refused("k.jsonl.gz cannot be read", tmp_path / "k.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9])
    refused("l.txt.zst cannot be read", tmp_path / "l.txt.zst", b"no zstd")
    refused("m.bin.gz is compressed", tmp_path / "m.bin.gz", b"x")
    refused("n.zip is an archive", tmp_path / "n.zip", b"x")
    refused("byte 0x00 at offset 1", tmp_path / "o.txt", "ab".encode("utf-16-le"))
    refused("iconv -f utf-16", tmp_path / "o2.txt", "ab".encode("utf-16"))
    refused("byte 0x00 at offset 6", tmp_path / "o3.txt", b"abc\nab\0", document="line")
    refused("the list is cut short", tmp_path / "e2.json", b'[{"text": "x"}, {"text": "y"}')
    refused(
        "object 2 is not JSON: '{' where a comma is expected", tmp_path / "e3.json", b'[{"text": "x"} {"text": "y"}]'
    )
    refused("something stands after the list", tmp_path / "e4.json", b'[{"text": "x"}] x')
    refused("e5.json object 1 is not JSON: maximum recursion", tmp_path / "e5.json", b"[" * 200_000)
    refused("h2.csv line 3 has fewer fields than the 2", tmp_path / "h2.csv", b"text,b\nx,y\nz\n")
    refused("h3.csv: two columns have one name", tmp_path / "h3.csv", b"text,text\nx,y\n")
    refused("byte 0xc3 at offset 4", tmp_path / "p.txt", b"cafe\xc3")
    (tmp_path / "folder").mkdir()
    refused("holds no .txt", tmp_path / "folder")
    refused("cannot be read as parquet", tmp_path / "d.parquet", b"not a parquet file")
    (tmp_path / "mixed").mkdir()
    with pytest.raises(DataError, match="several formats"):
        sources.file_source([str(tmp_path / "latin.txt"), str(tmp_path / "odd.bin")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_permission_is_named(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="no permission"):
        load(str(tmp_path / "a.txt"), bpe)


def test_an_unreachable_hub_suggests_train_file(bpe):
    with pytest.raises(DataError, match="--train_file FILE") as error:
        corpus.load_tokens(sources.hub_source("someone/some-corpus"), bpe)
    assert "someone/some-corpus" in str(error.value)


def test_a_file_listed_twice_is_read_once(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("Anna finds a king.")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = sources.file_source([str(tmp_path / "a.txt"), f"{tmp_path}/**/*.txt"])
    assert len(source.files) == 1
    assert source.num_duplicates > 1
    assert len(sources.file_source(str(tmp_path)).files) == 1
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    with pytest.raises(DataError, match=r"self.txt is a link to .*which does not exist"):
        sources.file_source(str(tmp_path / "self.txt"))


def test_a_file_that_disappears_is_named(tmp_path, bpe, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("Anna finds a king.")
    source = sources.file_source(str(tmp_path))
    monkeypatch.setattr(tokenization, "_BATCH_CHARS", 1)
    read = tokenization.read_documents

    def read_and_delete(*args):
        for piece in read(*args):
            (tmp_path / "b.txt").unlink(missing_ok=True)
            yield piece

    monkeypatch.setattr(tokenization, "read_documents", read_and_delete)
    with pytest.raises(DataError, match="b.txt cannot be read: .*No such file"):
        corpus.load_tokens(source, bpe)
    with pytest.raises(DataError, match="cannot be read: .*No such file"):
        corpus.load_tokens(source, bpe)


def test_concatenated_streams_keep_the_start_of_each_source(tmp_path, bpe):
    for name, text in (("a", "Anna finds a king."), ("b", "the cat sees my friend.")):
        (tmp_path / f"{name}.txt").write_text(text)
    streams = [load(str(tmp_path / f"{name}.txt"), bpe)[0] for name in "ab"]
    joined = corpus.concatenate(streams)
    assert all_ids(joined) == all_ids(streams[0]) + all_ids(streams[1])
    assert joined.source_starts == [0, len(streams[0])]
    assert joined.fingerprint != corpus.concatenate(streams[::-1]).fingerprint
    assert joined.find_out_of_vocabulary(5) == next(place for place, token in enumerate(all_ids(joined)) if token >= 5)


def test_data_in_memory_gives_the_tokens_of_the_same_files(stories, bpe):
    texts = documents(stories)
    rows = datasets.Dataset.from_dict({"body": texts, "n": range(40)})
    for data, column in ((texts, "text"), (tuple(texts), "text"), (rows, "body"), (str(stories), "text")):
        source = sources.in_memory_source(data, "train_data", column)
        training, held_out, stats = corpus.load_tokens(source, bpe, 0.1)
        expected_stream = load(str(stories), bpe, 0.1)[0]
        assert all_ids(training) == all_ids(expected_stream)
        assert training.fingerprint == expected_stream.fingerprint
        assert held_out.fingerprint == load(str(stories), bpe, 0.1)[1].fingerprint
        assert (stats["train"]["documents"], stats["validation"]["documents"]) == (36, 4)
    assert list(readers.SourceTexts([sources.in_memory_source(texts, "train_data")])) == texts
    assert sources.total_size(source) == sum(path.stat().st_size for path in stories.glob("*.txt"))
    assert sources.total_size(sources.in_memory_source(rows, "train_data", "body")) == 40


def test_data_in_memory_is_cached_by_content(bpe, monkeypatch):
    first = corpus.load_tokens(sources.in_memory_source(["Anna finds a king.", "x"], "train_data"), bpe)[0]
    rows = datasets.Dataset.from_dict({"text": ["Anna finds a king.", "x"]})
    corpus.load_tokens(sources.in_memory_source(rows, "train_data"), bpe)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_shards", lambda *args: pytest.fail("tokenized again"))
        again = sources.in_memory_source(["Anna finds a king.", "x"], "other name")
        assert all_ids(corpus.load_tokens(again, bpe)[0]) == all_ids(first)
        rows = datasets.Dataset.from_dict({"text": ["Anna finds a king.", "x"]})
        corpus.load_tokens(sources.in_memory_source(rows, "train_data"), bpe)
    keys = [
        sources.source_key(sources.in_memory_source(texts, "train_data"))
        for texts in (["ab", "c"], ["a", "bc"], ["abc"])
    ]
    assert len({json.dumps(key) for key in keys}) == 3


def test_data_in_memory_has_rows_with_columns():
    labels = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features).with_format("torch")
    read = list(readers.read_rows(sources.in_memory_source(rows, "train_data")))
    assert read == [
        ("train_data row 1", {"text": "x", "label": "spam"}),
        ("train_data row 2", {"text": "y", "label": None}),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a"] * 6 + [7], "train_data row 7: expected a string, got int"),
        (["a", "\ud800"], "train_data row 2: half a character"),
        ([], "train_data is empty"),
        (["", " "], "train_data holds no text"),
        ({"text": ["a"]}, "train_data: expected a list of strings, a datasets.Dataset or a path, got dict"),
        (datasets.Dataset.from_dict({"body": ["a"]}), "train_data row 1 has no column 'text', but 'body'"),
        (datasets.Dataset.from_dict({"text": [3]}), "train_data row 1: column 'text' does not hold text: 3"),
        ("missing.txt", "missing.txt does not exist"),
    ],
    ids=str,
)
def test_errors_in_data_in_memory_name_the_row(bpe, data, message):
    with pytest.raises(DataError, match=message):
        corpus.load_tokens(sources.in_memory_source(data, "train_data"), bpe)
