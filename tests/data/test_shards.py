"""Token shards give the rows of the text, from anywhere, and damage is one line that names the shard."""

import json
import shutil

import fsspec
import numpy as np
import pytest
from conftest import read_metrics, read_weights, run_cli, train

from hf_myllm import prepare
from hf_myllm.data import corpus, readers, shards, sources, streaming, tokenization, tokenizer
from hf_myllm.errors import DataError


@pytest.fixture(scope="module")
def bpe(stories):
    return tokenizer.train_bpe(readers.SourceTexts([sources.file_source(str(stories))]), 300)


@pytest.fixture
def small(monkeypatch):
    """Shards of about 1,000 characters, so that documents are in several."""
    monkeypatch.setattr(readers, "_PIECE_CHARS", 200)
    monkeypatch.setattr(tokenization, "_BATCH_CHARS", 500)
    monkeypatch.setattr(tokenization, "SHARD_CHARS", 1000)


def write(texts, bpe, path, val_fraction=0.0, part=(1, 1)):
    source = texts if isinstance(texts, sources.Source) else sources.in_memory_source(texts, "train_data")
    prepare.write_source(source, bpe, val_fraction, str(path), part)
    return sources.file_source(f"{path}/index.json") if part == (1, 1) else None


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_ids(tokens):
    return None if tokens is None else tokens.read(0, len(tokens)).tolist()


def texts_of(stories):
    return [path.read_text() for path in sorted(stories.glob("*.txt"))]


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize(("fraction", "by_position"), [(0.0, False), (0.1, False), (0.3, False), (0.1, True)])
def test_any_split_is_that_of_the_text(stories, bpe, tmp_path, monkeypatch, where, fraction, by_position):
    monkeypatch.setattr(readers, "_PIECE_CHARS", 200)
    texts = [f"{text} {where} {fraction}" for text in texts_of(stories)]
    expected = corpus.load_tokens(sources.in_memory_source(texts, "texts"), bpe, fraction, by_position=by_position)
    monkeypatch.setattr(tokenization, "SHARD_CHARS", 1000)
    path = tmp_path / "tokens" if where == "folder" else f"memory://{tmp_path.name}-{fraction}"
    source = write(texts, bpe, path, 0.1)
    assert len(source.data.shards) > 10
    assert any(shard["continues"] for shard in source.data.shards)
    found = corpus.load_tokens(source, bpe, fraction, by_position=by_position)
    for part in (0, 1):
        assert all_ids(found[part]) == all_ids(expected[part])
        if found[part] is not None:
            ids = np.array(all_ids(found[part]))
            for start in range(0, len(ids), 37):
                assert np.array_equal(found[part].read(start, 50), ids[start : start + 50])
    for part in ("train", "validation"):
        for name in shards.COUNTS:
            assert found[2][part][name] == expected[2][part][name], (part, name)


def test_documents_that_are_nearly_all_equal_are_split_alike(bpe, tmp_path, small):
    texts = ["the same"] * 40 + ["Anna likes the cat. " * 40]
    expected = corpus.load_tokens(sources.in_memory_source(texts, "texts"), bpe, 0.1)
    found = corpus.load_tokens(write(texts, bpe, tmp_path / "tokens"), bpe, 0.1)
    assert [all_ids(part) for part in found[:2]] == [all_ids(part) for part in expected[:2]]
    assert len(found[1])


def test_two_machines_and_killed_ones_write_what_one_does(stories, bpe, tmp_path, small, monkeypatch, capsys):
    texts = texts_of(stories)
    write(texts, bpe, tmp_path / "whole", 0.1)
    whole = contents(tmp_path / "whole")
    for part in ((2, 2), (1, 2)):
        write(texts, bpe, tmp_path / "halves", 0.1, part)
        assert ("missing: 1/2" in capsys.readouterr().out) == (part == (2, 2))
    assert contents(tmp_path / "halves") == whole
    # each on a disk of its own, then copied together
    for number in (1, 2):
        write(texts, bpe, tmp_path / f"disk{number}", 0.1, (number, 2))
        shutil.copytree(tmp_path / f"disk{number}", tmp_path / "merged", dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "tokenize_pieces", lambda *args: pytest.fail("tokenized again"))
        write(texts, bpe, tmp_path / "merged", 0.1)
    assert contents(tmp_path / "merged") == whole

    count, hash_text = 0, tokenization.text_hash

    def kill(text):
        nonlocal count
        count += 1
        if count == 30:
            raise KeyboardInterrupt
        return hash_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "text_hash", kill)
        with pytest.raises(KeyboardInterrupt):
            write(texts, bpe, tmp_path / "killed", 0.1)
    kept = contents(tmp_path / "killed")
    assert "index.json" not in kept
    assert 4 < len(kept) < len(whole)
    (tmp_path / "killed" / "shard-00000.bin").write_bytes(kept["shard-00000.bin"][:-2])
    (tmp_path / "killed" / "shard-00001.documents").write_bytes(b"\0" * 9)
    (tmp_path / "killed" / "shard-00002.bin").write_bytes(bytes(len(kept["shard-00002.bin"])))
    write(texts, bpe, tmp_path / "killed", 0.1)
    assert contents(tmp_path / "killed") == whole
    with pytest.raises(DataError, match="shard-00000 is of another text, another tokenizer"):
        write(texts[1:], bpe, tmp_path / "killed")
    assert contents(tmp_path / "killed") == whole


def test_shards_that_are_written_anew_are_read_anew(bpe, tmp_path):
    for text in ("Anna likes the cat.", "The king was there."):
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        tokens, _, _ = corpus.load_tokens(write([text], bpe, tmp_path / "tokens"), bpe)
        assert bpe.decode(tokens.read(0, len(tokens)), skip_special_tokens=True) == text


def test_damage_is_one_line_that_names_the_shard(stories, bpe, tmp_path, small, capsys):
    write(texts_of(stories), bpe, tmp_path)
    file, index = tmp_path / "shard-00003.bin", tmp_path / "index.json"
    content = file.read_bytes()
    assert run_cli("prepare", index) == 0
    assert "shards checked, all whole" in capsys.readouterr().out

    def refused(message):
        with pytest.raises(DataError, match=message) as error:
            sources.file_source(str(index))
        assert "\n" not in str(error.value)

    file.write_bytes(content[:-2])
    refused(f"shard-00003.bin has {len(content) - 2:,} bytes, and the index names {len(content):,}")
    file.unlink()
    refused("shard-00003.bin is missing")
    file.write_bytes(content[:-2] + b"\0\1")
    assert run_cli("prepare", index) == 2
    assert "shard-00003.bin is damaged: its content is not that of the index" in capsys.readouterr().err
    file.write_bytes(content)
    records = tmp_path / "shard-00004.documents"
    records.write_bytes(records.read_bytes()[:-1] + b"\0")
    assert run_cli("prepare", index) == 2
    assert "shard-00004.documents is damaged" in capsys.readouterr().err
    whole = json.loads(index.read_text())
    first = whole["shards"][0]
    ids = np.frombuffer(content, "<u2").copy()
    ids[0] = 60_000
    file.write_bytes(ids.tobytes())
    with pytest.raises(DataError, match="shard-00003.bin is damaged: token id 60000 is above the largest"):
        all_ids(corpus.load_tokens(sources.file_source(str(index)), bpe)[0])
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer/tokenizer.json is missing; copy it again"):
        sources.file_source(str(tmp_path)).data.tokenizer_folder()
    no_digest = {name: value for name, value in first.items() if name != "digest"}
    for wrong, problem in (
        ({"version": 2}, "version: Input should be 1"),
        ({"dtype": "object"}, "dtype: "),
        ({"shards": [first | {"name": "../x"}]}, "shards.0.name: "),
        ({"shards": [no_digest]}, "shards.0.digest: Field required"),
        ({"shards": []}, "shards: "),
        (None, "format: Field required"),
    ):
        index.write_text(json.dumps(whole | wrong if wrong else {}))
        refused(rf"not an index of token shards of version 1 \({problem}")


def test_remote_shards_are_read_by_ranges(stories, bpe, small, monkeypatch):
    texts, system = texts_of(stories), fsspec.filesystem("memory")
    source = write(texts, bpe, "memory://ranges", 0.1)
    num_read, cat_file = [], type(system).cat_file

    def count(*args, **kwargs):
        content = cat_file(*args, **kwargs)
        num_read.append((args[1], len(content)))
        return content

    monkeypatch.setattr(type(system), "cat_file", count)
    tokens, _, _ = corpus.load_tokens(source, bpe)
    middle = len(tokens) // 2
    ids = tokens.read(middle, 64)
    assert sum(size for _, size in num_read) == 128
    assert len(num_read) <= 2
    assert (
        ids.tolist() == all_ids(corpus.load_tokens(sources.in_memory_source(texts, "x"), bpe)[0])[middle : middle + 64]
    )
    name = source.data.shards[2]["name"]
    system.rm(f"/ranges/{name}.bin")
    with pytest.raises(DataError, match=f"memory://ranges/{name}.bin"):
        tokens.read(0, 2000)


def test_windows_of_a_stream_are_those_of_the_text(stories, bpe, tmp_path, small, monkeypatch):
    monkeypatch.setattr(corpus, "_BLOCK_TOKENS", 300)
    text = sources.file_source(str(stories))
    first = streaming.TokenWindows(text, bpe, 700, owner="a")
    second = streaming.TokenWindows(write(text, bpe, tmp_path / "tokens"), bpe, 700, owner="b")
    for window in range(12):  # more than one pass
        assert np.array_equal(first.open(window), second.open(window))
    positions = json.loads(json.dumps(second.recent_positions()))
    expected = second.open(11).tolist()
    first.close()
    second.close()
    resumed = streaming.TokenWindows(second.source, bpe, 700, owner="c", positions=positions)
    assert resumed.open(11).tolist() == expected
    resumed.close()


def test_a_run_on_shards_is_the_run_on_the_text(tiny, stories, tmp_path, capsys, monkeypatch):
    """Also a run that goes on, on shards instead of the text; the tokenizer is that of the index."""
    monkeypatch.setattr(tokenization, "SHARD_CHARS", 5000)
    index = tmp_path / "tokens" / "index.json"
    assert train(*tiny(max_steps=4, save_freq=2, start_context=None)) == 0
    assert run_cli("prepare", *tiny(max_steps=4, save_freq=2, start_context=None), "--to", index.parent) == 0
    on_shards = tiny(max_steps=4, save_freq=2, start_context=None, train_file=index, save_model=tmp_path / "shards")
    assert train(*on_shards) == 0
    assert read_weights(tmp_path / "shards") == read_weights(tmp_path / "run")
    for key in ("loss", "val_loss", "rows"):
        assert read_metrics(tmp_path / "shards", key) == read_metrics(tmp_path / "run", key)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    on_index = tiny(max_steps=4, save_freq=2, start_context=None, train_file=index, tokenizer=None)
    assert train(*on_index, "--init_from", "resume") == 0
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "shards")
    capsys.readouterr()
    for changed in ({"tokenizer": "{train: bpe, vocab_size: 301}"}, {"tokenizer": tmp_path / "run", "add_tokens": "x"}):
        assert train(*tiny(train_file=index, save_model=tmp_path / "other", **changed)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error for error in errors if "index.json are of another one" in error] == errors
    assert len(errors) == 2
    for key, value in (("text_column", "body"), ("document", "line")):
        assert train(*tiny(train_file=index, save_model=tmp_path / "other", **{key: value})) == 2
        assert f"{key}: it has no effect on {index}, whose text was read with {key} " in capsys.readouterr().err


def test_a_run_from_before_there_were_shards_resumes(tiny, tmp_path, monkeypatch):
    """Its checkpoints name the data by a digest of all tokens."""
    open_shards = corpus._open_shards

    def with_old_fingerprints(*arguments):
        *streams, stats = open_shards(*arguments)
        for stream in streams:
            stream.fingerprint = stream.digest()
        return *streams, stats

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_open_shards", with_old_fingerprints)
        assert train(*tiny(max_steps=4, save_freq=2, start_context=None)) == 0
    expected = read_weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert train(*tiny(max_steps=4, save_freq=2, start_context=None), "--init_from", "resume") == 0
    assert read_weights(tmp_path / "run") == expected


@pytest.mark.chaos
@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_and_a_validation_file_of_shards(tiny, stories, tmp_path, streaming):
    for index, path in enumerate(sorted(stories.glob("*.txt"))):
        folder = tmp_path / ("a" if index < 20 else "b" if index < 39 else "val")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    more = {"streaming": True, "streaming_window": 2000} if streaming else {}
    flags = tiny | {"tokenizer": tmp_path / "tokenizer", "max_steps": 3, "epochs": None, "warmup_steps": 1} | more

    def run(name, folder_a, folder_b, val_file):
        entries = [{"train_file": str(folder_a), "weight": 2}, {"train_file": str(folder_b), "weight": 1}]
        data = {"train_file": folder_a} if streaming else {"train_file": None, "datasets": json.dumps(entries)}
        data |= {"tokenizer": None} if name == "shards" else {}
        return type(tiny)(flags | data | {"val_file": val_file, "save_model": tmp_path / name})

    tokenizer.save(tokenizer.train_bpe(texts_of(stories), 300), tmp_path / "tokenizer")
    text = run("text", *(tmp_path / name for name in ("a", "b", "val")))
    assert train(*text()) == 0
    assert run_cli("prepare", *text(), "--to", tmp_path / "tokens") == 0
    names = ("", "") if streaming else ("1", "2")
    indexes = [tmp_path / "tokens" / name / "index.json" for name in (*names, "validation")]
    assert train(*run("shards", *indexes)()) == 0
    assert read_weights(tmp_path / "shards") == read_weights(tmp_path / "text")
    assert read_metrics(tmp_path / "shards", "val_loss") == read_metrics(tmp_path / "text", "val_loss")
