"""A corpus a window at a time: the tokens of the whole, from any place on, and little of it on the disk."""

import json

import datasets
import numpy as np
import pytest

from hf_myllm.data import cache, corpus, readers, sources, streaming, tokenizer
from hf_myllm.errors import InputError


@pytest.fixture(scope="module")
def bpe(stories):
    return tokenizer.train_bpe(readers.SourceTexts([sources.file_source(str(stories))]), 300)


@pytest.fixture
def source(stories, tmp_path, request):
    """The stories as files, in memory, as lines of two files, or as a streamed data set of two shards."""
    texts = [path.read_text() for path in sorted(stories.glob("*.txt"))]
    if request.param == "files":
        return sources.file_source(str(stories))
    if request.param == "memory":
        return sources.in_memory_source(texts, "train_data")
    for number, part in enumerate(np.array_split(np.arange(len(texts)), 2)):
        lines = "".join(json.dumps({"text": texts[i]}) + "\n" for i in part)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    if request.param == "lines":
        return sources.file_source(f"{tmp_path}/*.jsonl")
    return sources.Source("hub", "someone/stories", is_streamed=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = [str(tmp_path / f"{number}.jsonl") for number in (0, 1)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: load("json", data_files=files, split="train", streaming=True)
    )


def whole(stories, bpe):
    return corpus.load_tokens(sources.file_source(str(stories)), bpe)[0]


@pytest.mark.parametrize("source", ["files", "memory", "lines", "hub"], indirect=True)
def test_windows_are_the_stream_whatever_is_known_of_it(stories, bpe, source, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "_PIECE_CHARS", 200)  # documents in pieces, too
    monkeypatch.setattr(corpus, "_BATCH_CHARS", 1000)
    stream = whole(stories, bpe)
    size, total = 500, len(stream)
    endless = np.tile(stream.read(0, total), 3)
    windows = streaming.TokenWindows(source, bpe, size, owner=str(tmp_path))
    last = 2 * total // size  # into the third time through
    for number in range(last):
        assert np.array_equal(windows.open(number), endless[number * size : (number + 1) * size + 1]), number
    windows.ahead.join()
    there = [number for number in range(last + 2) if cache.cached_path([*windows.key, number]).exists()]
    assert there == [last - 2, last - 1, last]
    positions = json.loads(json.dumps(windows.recent_positions()))
    assert min(map(int, positions)) >= last - 3
    windows.close()
    assert not any(cache.cached_path([*windows.key, number]).exists() for number in range(last + 2))

    # another machine goes on from what a checkpoint knows, and tokenizes no more than that
    again = streaming.TokenWindows(source, bpe, size, owner="elsewhere", positions=positions)
    begun = []
    fill = again._fill
    monkeypatch.setattr(again, "_fill", lambda folder, place: begun.append(place) or fill(folder, place))
    number = last - 1
    assert np.array_equal(again.open(number), endless[number * size : (number + 1) * size + 1])
    again.close()
    assert begun[0] == positions[str(number)]
    assert len(begun) <= 2


@pytest.mark.parametrize("source", ["files"], indirect=True)
def test_rows_are_of_the_window_that_their_number_says(stories, bpe, source, tmp_path):
    stream = whole(stories, bpe).read(0, 2000)
    windows = streaming.TokenWindows(source, bpe, 330, owner=str(tmp_path))
    rows = streaming.StreamedRows(windows, 32, "x")
    assert len(rows) == 10
    read, first = rows.read(np.array([3, 17, 12]))
    for row, start in zip(read, (3 * 32, 330 + 7 * 32, 330 + 2 * 32), strict=True):
        assert row.tolist() == stream[start : start + 33].tolist()
    assert not first.any()
    windows.close()


def test_a_corpus_of_nothing_is_said(bpe, tmp_path):
    (tmp_path / "blank.txt").write_text("  \n")
    windows = streaming.TokenWindows(sources.file_source(str(tmp_path / "blank.txt")), bpe, 100)
    with pytest.raises(InputError, match="holds no text"):
        windows.open(0)
