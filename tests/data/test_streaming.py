"""Streaming reads the same tokens as the whole corpus, from any position, with few windows on the disk."""

import json
from dataclasses import replace

import datasets
import fsspec
import numpy as np
import pytest

from hf_myllm.data import cache, corpus, readers, sources, streaming, tokenization, tokenizer
from hf_myllm.errors import DataError


@pytest.fixture(scope="module")
def bpe(stories):
    return tokenizer.train_bpe(readers.SourceTexts([sources.file_source(str(stories))]), 300)


@pytest.fixture
def source(stories, tmp_path, request):
    """The stories as files, by URL, in memory, as lines of two files, or as a streamed data set of two shards."""
    if request.param == "urls":
        remote_files = fsspec.filesystem("memory")
        remote_files.put(str(stories), "/stories", recursive=True)
        return replace(sources.file_source("memory://stories"), is_streamed=True)
    texts = [path.read_text() for path in sorted(stories.glob("*.txt"))]
    if request.param == "files":
        return sources.file_source(str(stories))
    if request.param == "memory":
        return sources.in_memory_source(texts, "train_data")
    for shard, part in enumerate(np.array_split(np.arange(len(texts)), 2)):
        lines = "".join(json.dumps({"text": texts[i]}) + "\n" for i in part)
        (tmp_path / f"{shard}.jsonl").write_text(lines)
    if request.param == "lines":
        return sources.file_source(f"{tmp_path}/*.jsonl")
    return sources.Source("hub", "someone/stories", is_streamed=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = [str(tmp_path / f"{shard}.jsonl") for shard in (0, 1)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: load("json", data_files=files, split="train", streaming=True)
    )


def whole(stories, bpe):
    return corpus.load_tokens(sources.file_source(str(stories)), bpe)[0]


@pytest.mark.parametrize("source", ["files", "urls", "memory", "lines", "hub"], indirect=True)
def test_windows_equal_the_stream_and_resume_from_saved_positions(stories, bpe, source, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "_PIECE_CHARS", 200)  # splits documents into pieces
    monkeypatch.setattr(tokenization, "_BATCH_CHARS", 1000)
    stream = whole(stories, bpe)
    size, total = 500, len(stream)
    endless = np.tile(stream.read(0, total), 3)
    windows = streaming.TokenWindows(source, bpe, size, owner=str(tmp_path))
    last = 2 * total // size  # in the third pass over the corpus
    for window in range(last):
        assert np.array_equal(windows.open(window), endless[window * size : (window + 1) * size + 1]), window
    windows.prefetch.join()
    on_disk = [window for window in range(last + 2) if cache.cached_path([*windows.key, window]).exists()]
    assert on_disk == [last - 2, last - 1, last]
    positions = json.loads(json.dumps(windows.recent_positions()))
    assert min(map(int, positions)) >= last - 3
    windows.close()
    keys = [[*windows.key, window, *part] for window in range(last + 4) for part in ([], ["position"])]
    assert not any(cache.cached_path(key).exists() for key in keys)

    # another machine resumes from a checkpoint's positions and tokenizes nothing before them
    resumed = streaming.TokenWindows(source, bpe, size, owner="elsewhere", positions=positions)
    filled_from = []
    fill = resumed._fill
    monkeypatch.setattr(
        resumed, "_fill", lambda folder, position: filled_from.append(position) or fill(folder, position)
    )
    window = last - 1
    assert np.array_equal(resumed.open(window), endless[window * size : (window + 1) * size + 1])
    resumed.close()
    assert filled_from[0] == positions[str(window)]
    assert len(filled_from) <= 2


@pytest.mark.parametrize("source", ["files"], indirect=True)
def test_a_row_number_selects_the_window_and_the_row_in_it(stories, bpe, source, tmp_path):
    stream = whole(stories, bpe).read(0, 2000)
    windows = streaming.TokenWindows(source, bpe, 330, owner=str(tmp_path))
    rows = streaming.StreamedRows(streaming.Streams([windows]), 32, "x")
    assert len(rows) == 10
    read, first = rows.read(np.array([3, 17, 12]))
    for row, start in zip(read, (3 * 32, 330 + 7 * 32, 330 + 2 * 32), strict=True):
        assert row.tolist() == stream[start : start + 33].tolist()
    assert not first.any()
    windows.close()


def test_an_empty_corpus_is_an_error(bpe, tmp_path):
    (tmp_path / "blank.txt").write_text("  \n")
    windows = streaming.TokenWindows(sources.file_source(str(tmp_path / "blank.txt")), bpe, 100)
    with pytest.raises(DataError, match="holds no text"):
        windows.open(0)


@pytest.mark.parametrize("source", ["files", "lines", "memory"], indirect=True)
@pytest.mark.parametrize("factor", [1, 2, 3.7])
def test_a_corpus_that_is_smaller_than_a_window_is_tokenized_once_or_twice(stories, bpe, source, factor, monkeypatch):
    stream = whole(stories, bpe)
    size = int(len(stream) * factor)
    endless = np.tile(stream.read(0, len(stream)), 12)
    windows, passes = streaming.TokenWindows(source, bpe, size, owner=f"{source.format} {factor}"), []
    tokenize = windows._tokenize_from
    monkeypatch.setattr(windows, "_tokenize_from", lambda position: passes.append(position) or tokenize(position))
    for window in range(3):
        assert np.array_equal(windows.open(window), endless[window * size : (window + 1) * size + 1]), window
    windows.close()
    assert len(passes) <= 3 * 4


def test_ranks_read_the_windows_of_a_mixture_alike_though_one_skips_some(stories, bpe, tmp_path, monkeypatch):
    """The second rank has no row of either source for several windows."""
    files = sources.file_source(str(stories)), sources.file_source(f"{stories}/0*.txt")

    def open_rows(owner, positions=(None, None), **options):
        streams = [
            streaming.TokenWindows(source, bpe, 160, f"{owner} {i}", own, **options)
            for i, (source, own) in enumerate(zip(files, positions, strict=True))
        ]
        return streaming.StreamedRows(streaming.Streams(streams), 32, "x")

    maker, other = open_rows(tmp_path), open_rows(tmp_path, is_maker=False)
    expected = [whole(stories, bpe), corpus.load_tokens(files[1], bpe)[0]]
    expected = [np.tile(stream.read(0, len(stream)), 9) for stream in expected]
    for row in range(60):
        index, source = divmod(row, 2)
        start = index // 5 * 160 + index % 5 * 32
        assert maker.read([row])[0][0].tolist() == expected[source][start : start + 33].tolist(), row
    for stream in other.windows.streams:
        monkeypatch.setattr(stream, "_fill", None)  # the first rank has made the window, and knows where it begins
    assert other.read([58, 59])[0].tolist() == maker.read([58, 59])[0].tolist()
    positions = json.loads(json.dumps(maker.windows.recent_positions()))
    maker.windows.close()
    resumed = open_rows("elsewhere", streaming.stored_positions(positions, 2))
    assert all(min(set(stream.positions) - {0}) >= 3 for stream in resumed.windows.streams)
    assert resumed.read([59])[0][0].tolist() == expected[1][5 * 160 + 4 * 32 : 6 * 160 + 1].tolist()
    resumed.windows.close()


def test_equal_files_elsewhere_are_the_same_stream(stories, bpe, tmp_path):
    """Another path, other times and other names: the content counts."""
    (tmp_path / "copy").mkdir()
    for path in stories.glob("*.txt"):
        (tmp_path / "copy" / f"story-{path.name}").write_bytes(path.read_bytes())
    here, there = (
        streaming.TokenWindows(sources.file_source(str(folder)), bpe, 500) for folder in (stories, tmp_path / "copy")
    )
    assert here.fingerprint == there.fingerprint
    assert here.key != there.key  # so that no window of changed files is read
    with open(tmp_path / "copy" / "story-07.txt", "a") as file:
        file.write("!")
    assert streaming.TokenWindows(sources.file_source(str(tmp_path / "copy")), bpe, 500).fingerprint != here.fingerprint
