"""Text into tokens on disk: tokenized once, memory-mapped, and read by index.

The tokens of a text corpus lie in an Arrow file of the `datasets` cache, each document closed by the end-of-text token;
a `.bin` of token ids is read where it is, and a `.pkl` of them is copied into such a file. Either way a run sees one
flat stream ([`TokenStream`]).
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from ..errors import DataError
from . import packing
from .cache import cached_folder, cached_path
from .pickled import read_token_ids
from .readers import read_documents
from .sources import TOKEN_ID_FORMATS, source_key, total_size
from .tokenizer import end_of_document, safe_split_pattern
from .tokenizer import fingerprint as tokenizer_fingerprint

_BATCH = 1_000_000  # characters tokenized at once: enough for every core, and some 200 bytes of memory for each


class TokenStream:
    """A stream of token ids, in one or more arrays of which only what is read comes into memory.

    Args:
        chunks: one-dimensional arrays of unsigned integers.
        fingerprint: a digest of the stream's content.
        max_id: the largest id in it.
    """

    source_starts = (0,)  # where each of several sources begins

    def __init__(self, chunks, fingerprint, max_id):
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        self.fingerprint, self.max_id = fingerprint, max_id

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, length):
        """The ids at start ... start + length - 1, which may lie in several chunks."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[number])
        parts = [self.chunks[number][offset : offset + length]]
        missing = length - len(parts[0])
        while missing and number + 1 < len(self.chunks):
            number += 1
            parts.append(self.chunks[number][:missing])
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def find_out_of_vocabulary(self, size):
        """The position of the first id that a vocabulary of this size does not have; there must be one."""
        for start in range(0, len(self), 1 << 24):
            found = np.flatnonzero(self.read(start, 1 << 24) >= size)
            if len(found):
                return start + int(found[0])

    def split(self, position):
        """The stream before a position, and from it on."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        offset = position - int(self.starts[number])
        before = [*self.chunks[:number], self.chunks[number][:offset]]
        after = [self.chunks[number][offset:], *self.chunks[number + 1 :]]
        return (
            TokenStream(before, f"{self.fingerprint}[:{position}]", self.max_id),
            TokenStream(after, f"{self.fingerprint}[{position}:]", self.max_id),
        )


def concatenate(streams):
    """Streams one after another, as one; `source_starts` are where each begins."""
    if len(streams) == 1:
        return streams[0]
    chunks = [chunk for stream in streams for chunk in stream.chunks]
    fingerprint = hashlib.sha256(repr([stream.fingerprint for stream in streams]).encode()).hexdigest()
    joined = TokenStream(chunks, fingerprint, max(stream.max_id for stream in streams))
    joined.source_starts = np.cumsum([0, *map(len, streams)])[:-1].tolist()
    return joined


def merge_stats(accounts):
    """The accounts of several sources as one."""
    shares = [account.get("share", 1.0) for account in accounts]
    tokens = [account["train"]["tokens"] for account in accounts]
    whole = sum(count / max(1e-9, share) for count, share in zip(tokens, shares, strict=True))
    total = {"shares": shares, "share": sum(tokens) / max(1, whole)}
    for part in ("train", "validation"):
        counts = [account[part] for account in accounts if part in account]
        keys = {key for count in counts for key in count} - {"max_id", "fingerprint"}
        if counts:
            total[part] = {key: sum(count.get(key, 0) for count in counts) for key in sorted(keys)}
    return total


def load_tokens(source, tokenizer, val_fraction=0.0, bin_dtype="auto", show_progress=False):
    """A source as token streams, tokenized now or found in the cache.

    Every process may call this: a lock lets one of each machine do the work, while the others wait for it.

    Args:
        tokenizer: needed for text; for a .bin it only tells which number type to expect.
        val_fraction: share of the documents to hold out, evenly spread over the corpus. Where there are too few
            documents to hold one out, and in a .bin, it is that share of the tokens, at the end.
    Returns:
        training and validation [`TokenStream`], and a dict with the counts of documents, tokens and bytes of text;
        validation is None when val_fraction is 0.
    Raises:
        DataError: the source cannot be read, or holds no token.
    """
    if source.format in TOKEN_ID_FORMATS:
        training, account = _open_ids(source, tokenizer, bin_dtype)
        held_out = None
    else:
        training, held_out, account = _open_tokenized(source, tokenizer, val_fraction, show_progress)
    if val_fraction and held_out is None:
        training, held_out = training.split(int(len(training) * (1 - val_fraction)))
        if len(training) == 0:
            raise DataError(f"val_fraction {val_fraction} leaves nothing of {source.name} to train on: lower it")
        account["held_out"] = f"the last {val_fraction:.0%} of the tokens"
    return training, held_out, account


def _open_tokenized(source, tokenizer, val_fraction, show_progress):
    cut = [tokenizer_fingerprint(tokenizer), end_of_document(tokenizer), val_fraction]
    if source.max_chars and cached_path(["tokens", source_key(replace(source, max_chars=0)), *cut]).exists():
        source = replace(source, max_chars=0)
    key = ["tokens", source_key(source), *cut]
    folder = cached_folder(key, lambda aside: _tokenize(source, tokenizer, val_fraction, aside, show_progress))
    account = json.loads((folder / "account.json").read_text())
    streams = {}
    for part in ("train", "validation"):
        if account[part]["tokens"]:
            column = datasets.Dataset.from_file(str(folder / f"{part}.arrow")).data.column("input_ids")
            chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
            streams[part] = TokenStream(chunks, account[part]["fingerprint"], account[part]["max_id"])
    return streams["train"], streams.get("validation"), account


def is_held_out(number, share):
    """Whether the share held out so far reaches one more with this document: 0.05 holds out the 10th, 30th ..."""
    return int((number + 1) * share + 0.5) > int(number * share + 0.5)


def _tokenize(source, tokenizer, val_fraction, folder, show_progress):
    dtype, end = token_dtype(tokenizer), end_of_document(tokenizer)
    parts = {part: _Part(folder / f"{part}.arrow", dtype) for part in ("train", "validation")}
    unknown, number = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id, 0
    with Progress(total_size(source), show_progress) as progress:
        for batch in encode(read_documents(source, safe_split_pattern(tokenizer), progress.read), tokenizer):
            rows = {"train": [], "validation": []}
            for (text, is_end), ids in batch:
                part = "validation" if is_held_out(number, val_fraction) else "train"
                rows[part].append(ids)
                parts[part].bytes += len(text.encode())
                parts[part].documents += is_end
                # GPT-2's unknown token is the one that closes a document, which is none of the text's
                parts[part].unknown += int((ids == unknown).sum()) - is_end * end.count(unknown)
                number += is_end
            for part, pieces in rows.items():
                parts[part].write(pieces)
            progress.wrote(sum(len(piece) for pieces in rows.values() for piece in pieces))
    account = {part: writer.close() for part, writer in parts.items()}
    account["share"] = progress.share if source.max_chars else 1.0  # of the source that was read
    if account["train"]["tokens"] == 0:
        if account["validation"]["tokens"]:
            raise DataError(f"val_fraction {val_fraction} leaves nothing of {source.name} to train on: lower it")
        raise DataError(f"{source.name} holds no text")
    (folder / "account.json").write_text(json.dumps(account))


class Progress:
    """How much of a source has been read, how fast it becomes tokens, and how long that will still take: a bar on a
    terminal, a line now and then elsewhere."""

    def __init__(self, total, is_shown):
        self.total, self.is_shown, self.is_terminal = total, is_shown, sys.stderr.isatty()
        self.done = self.tokens = 0
        self.began = self.said = time.monotonic()

    def __enter__(self):
        silent = not (self.is_shown and self.is_terminal)
        bar_format = "tokenizing {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}, {desc}{remaining} left"
        if self.total is None:
            bar_format = "tokenizing {desc}{elapsed}"
        self.bar = tqdm(
            total=self.total, unit="B", unit_scale=True, bar_format=bar_format, disable=silent, leave=False, delay=1
        )
        return self

    def __exit__(self, *error):
        self.bar.close()

    @property
    def share(self):
        return min(1.0, self.done / self.total) if self.total else 1.0

    def read(self, count):
        self.done += count
        self.bar.update(count)

    def wrote(self, tokens):
        self.tokens += tokens
        now = time.monotonic()
        speed = self.tokens / max(1e-9, now - self.began)
        self.bar.set_description_str(f"{speed / 1e6:.2f}M tokens/s, ", refresh=False)
        if self.is_shown and not self.is_terminal and now - self.said > 10:
            self.said = now
            left = tqdm.format_interval((now - self.began) * (1 / self.share - 1)) if self.share else "?"
            far = f"{self.share:.0%}, " if self.total else ""
            left = f", {left} left" if self.total else ""
            print(f"tokenizing  {far}{self.tokens:,} tokens, {speed / 1e6:.2f}M tokens/s{left}", file=sys.stderr)


def token_dtype(tokenizer):
    """The smallest number type that holds a tokenizer's ids."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def encode(pieces, tokenizer):
    """Lists of (piece, its ids), of about `_BATCH` characters each.

    Args:
        pieces: (text, is_end, ...), of which the ids get the marks that close a document where it ends.
    """
    end, dtype = end_of_document(tokenizer), token_dtype(tokenizer)
    for batch in _batches(pieces):
        found = tokenizer.backend_tokenizer.encode_batch_fast([piece[0] for piece in batch], add_special_tokens=False)
        ids = (
            np.array([*one.ids, *end] if piece[1] else one.ids, dtype=dtype)
            for piece, one in zip(batch, found, strict=True)
        )
        yield list(zip(batch, ids, strict=True))


def _batches(pieces):
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Part:
    """An Arrow file of tokens being written, a document or a piece of one a row, and the account of what is in it."""

    def __init__(self, path, dtype):
        features = datasets.Features({"input_ids": datasets.List(datasets.Value(np.dtype(dtype).name))})
        self.schema = features.arrow_schema
        self.writer = ArrowWriter(path=str(path), features=features)
        self.digest = hashlib.sha256()
        self.documents = self.tokens = self.bytes = self.unknown = self.max_id = 0

    def write(self, rows):
        if not rows:
            return
        flat = np.concatenate(rows)
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        self.writer.write_table(pa.Table.from_arrays([column], schema=self.schema), writer_batch_size=len(rows))
        self.digest.update(flat)
        self.tokens += len(flat)
        self.max_id = max(self.max_id, int(flat.max()))

    def close(self):
        self.writer.finalize()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "unknown": self.unknown,
            "max_id": self.max_id,
            "fingerprint": self.digest.hexdigest(),
        }


def _open_ids(source, tokenizer, bin_dtype):
    files = [file for file in source.files if os.path.getsize(file)]
    if source.format == "bin":
        chunks = [_map_bin(file, tokenizer, bin_dtype) for file in files]
    else:
        chunks = [_map_pickle(replace(source, files=(file,))) for file in files]

    def measure(folder):  # once, for it reads every token
        digest, max_id = hashlib.sha256(repr([str(chunk.dtype) for chunk in chunks]).encode()), -1
        for chunk in chunks:
            for start in range(0, len(chunk), 1 << 24):
                block = np.asarray(chunk[start : start + (1 << 24)])
                digest.update(block)
                max_id = max(max_id, int(block.max()))
        account = {"max_id": max_id, "fingerprint": digest.hexdigest()}
        (folder / "account.json").write_text(json.dumps(account))

    folder = cached_folder(["ids", source_key(source), [str(chunk.dtype) for chunk in chunks]], measure)
    tokens = TokenStream(chunks, **json.loads((folder / "account.json").read_text()))
    return tokens, {"train": {"tokens": len(tokens)}}


def find_documents(tokens, marks):
    """Where each document starts and stops in a stream, found once and kept in the cache.

    Args:
        marks: the ids that stand between documents.
    Returns:
        (documents, 2) int64, memory-mapped; documents without a token are left out.
    """

    def find(folder):
        edges = [np.array([-1])]
        for start in range(0, len(tokens), 1 << 24):
            edges.append(np.flatnonzero(np.isin(tokens.read(start, 1 << 24), marks)) + start)
        edges = np.concatenate([*edges, [len(tokens)]])
        spans = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
        np.save(folder / "documents.npy", spans[spans[:, 0] < spans[:, 1]])

    folder = cached_folder(["documents", tokens.fingerprint, list(marks)], find)
    return np.load(folder / "documents.npy", mmap_mode="r")


def pack_documents(tokens, marks, length, edges, is_fitted, ahead):
    """The documents of a stream as rows: found once and kept in the cache, and memory-mapped.

    Args:
        marks: the ids that stand between documents.
        length: positions of a row.
        edges: how many positions of a row each document takes beyond its tokens.
        is_fitted: whether a row may have several documents, as many as fit.
        ahead: 1 where the tokens are targets, of which the mark that closes a document is one and the first token of
            all, which nothing predicts, is none.
    Returns:
        spans, the first span of each row, and the first row of each source, as [`packing.DocumentRows`] takes them.
    """

    def find(folder):
        documents = np.array(find_documents(tokens, marks))
        if ahead:
            documents = np.stack([np.maximum(documents[:, 0], 1), np.minimum(documents[:, 1] + 1, len(tokens))], axis=1)
            documents = documents[documents[:, 0] < documents[:, 1]]
        spans = packing.split_spans(documents, length - edges)
        owners = np.searchsorted(tokens.source_starts, spans[:, 0], side="right") - 1
        rows, count = np.arange(len(spans)), 0
        for part in range(len(tokens.source_starts)) if is_fitted else ():  # no row has documents of two sources
            mine = np.flatnonzero(owners == part)
            if len(mine) == 0:
                continue
            row_of = packing.best_fit(spans[mine, 1] - spans[mine, 0] + edges, length)
            order = np.argsort(row_of, kind="stable")
            spans[mine], rows[mine] = spans[mine[order]], row_of[order] + count
            count += int(row_of.max()) + 1
        first = packing.group_offsets(rows)
        np.save(folder / "spans.npy", spans)
        np.save(folder / "first.npy", first)
        np.save(
            folder / "parts.npy",
            [np.searchsorted(first, np.searchsorted(owners, p)) for p in range(len(tokens.source_starts))],
        )

    key = ["spans", tokens.fingerprint, list(marks), length, edges, is_fitted, ahead]
    folder = cached_folder(key, find)
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("spans", "first", "parts")]


def _map_pickle(source):
    """The ids of one pickle, memory-mapped: unpickled once, and kept in the cache."""
    folder = cached_folder(
        ["pickle", source_key(source)], lambda aside: np.save(aside / "ids.npy", read_token_ids(source.files[0]))
    )
    return np.load(folder / "ids.npy", mmap_mode="r")


def _map_bin(file, tokenizer, bin_dtype):
    size = os.path.getsize(file)
    dtype = np.dtype(np.uint16 if bin_dtype == "auto" else bin_dtype).newbyteorder("<")
    if bin_dtype == "auto" and size % 4 == 0:
        halves = np.fromfile(file, dtype="<u2", count=4096)
        is_large = tokenizer is not None and len(tokenizer) > 1 << 16
        if len(halves) % 4 == 0 and halves[::4].any() and not halves.reshape(-1, 4)[:, 1:].any():
            raise DataError(f"{file} holds 64-bit numbers: write the ids as uint16 or uint32")
        if is_large or not halves[1::2].any():  # 32-bit ids of a usual vocabulary have nothing in their upper half
            dtype = np.dtype("<u4")
    if size % dtype.itemsize:
        raise DataError(
            f"{file} is cut short: {size} bytes is not a whole number of {dtype.itemsize}-byte token ids; "
            "copy or write it again"
        )
    return np.memmap(file, dtype=dtype, mode="r")
