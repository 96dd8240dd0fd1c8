"""Text sources as memory-mapped token ids.

A text source is tokenized once, into Arrow files in the cache of `datasets`, with the end-of-text token after each
document. A `.bin` file of token ids is memory-mapped where it is; a `.pkl` is converted once. In each case a run reads
one flat [`TokenStream`].
"""

import hashlib
import json
import os
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from ..errors import DataError
from ..models.loading import num_token_ids
from . import remote
from .cache import cached_folder, cached_path
from .discovery import TOKEN_ID_FORMATS
from .hold_out import HoldOut
from .pickled import read_token_ids
from .readers import read_documents
from .sources import known_whole, source_key, total_size
from .tokenization import Progress, find_repeated, leave_out, token_dtype, tokenize_pieces
from .tokenizer import end_of_document, safe_split_pattern
from .tokenizer import fingerprint as tokenizer_fingerprint

_BLOCK_TOKENS = 1 << 24  # of a memory-mapped stream, looked through at once
_LLMC_HEADER = 256  # int32 numbers
_LLMC_DTYPES = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


class TokenStream:
    """A stream of token ids in one or more memory-mapped arrays.

    Args:
        chunks: one-dimensional arrays of unsigned integers.
        fingerprint: a digest of the content.
        max_id: the largest token id.
        source_starts: the position of the first token of each source.
        documents: (documents,) uint64, a digest of the tokens of each document; None if it is unknown.
    """

    def __init__(self, chunks, fingerprint, max_id, source_starts=(0,), documents=None):
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        self.fingerprint, self.max_id, self.source_starts = fingerprint, max_id, source_starts
        self.documents = documents

    def __len__(self):
        return int(self.starts[-1])

    def _locate(self, position):
        """Return the chunk that holds a position, and the offset in it."""
        index = int(np.searchsorted(self.starts, position, side="right")) - 1
        return index, position - int(self.starts[index])

    def read(self, start, length):
        """Return the token ids [start, start + length), fewer at the end of the stream."""
        index, offset = self._locate(start)
        parts = [self.chunks[index][offset : offset + length]]
        missing = length - len(parts[0])
        for chunk in self.chunks[index + 1 :] if missing else ():
            parts.append(chunk[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self):
        """Yield (start, token ids) of consecutive blocks of the stream, each small enough for memory."""
        for start in range(0, len(self), _BLOCK_TOKENS):
            yield start, self.read(start, _BLOCK_TOKENS)

    def find_out_of_vocabulary(self, vocab_size):
        """Return the position of the first token id that is not below `vocab_size`, or None."""
        for start, ids in self.blocks():
            positions = np.flatnonzero(ids >= vocab_size)
            if len(positions):
                return start + int(positions[0])

    def split(self, position):
        """Return the streams before a position and from it on."""
        index, offset = self._locate(position)
        before = [*self.chunks[:index], self.chunks[index][:offset]]
        after = [self.chunks[index][offset:], *self.chunks[index + 1 :]]
        return (
            TokenStream(before, f"{self.fingerprint}[:{position}]", self.max_id),
            TokenStream(after, f"{self.fingerprint}[{position}:]", self.max_id),
        )


def concatenate(streams):
    """Return several streams as one, with `source_starts` set."""
    if len(streams) == 1:
        return streams[0]
    chunks = [chunk for stream in streams for chunk in stream.chunks]
    fingerprint = hashlib.sha256(repr([stream.fingerprint for stream in streams]).encode()).hexdigest()
    starts = np.cumsum([0, *map(len, streams)])[:-1].tolist()
    documents = [stream.documents for stream in streams if stream.documents is not None]
    documents = np.concatenate(documents) if documents else None
    return TokenStream(chunks, fingerprint, max(stream.max_id for stream in streams), starts, documents)


def count_shared(training, validation):
    """Return how many documents of the validation data are in the training data too, and how many it has.

    Args:
        training, validation: [`TokenStream`]s.
    """
    if training.documents is None or validation.documents is None:
        return 0, 0
    return int(np.isin(validation.documents, training.documents).sum()), len(validation.documents)


def document_digest(ids=b""):
    """Return a hash object for the tokens of a document, whose digest is a number of `TokenStream.documents`."""
    return hashlib.blake2b(ids, digest_size=8)


def merge_stats(stats):
    """Return the statistics of several sources, as [`load_tokens`] returns them, as those of one."""
    shares = [source.get("share", 1.0) for source in stats]
    tokens = [source["train"]["tokens"] for source in stats]
    estimated_total = sum(count / max(1e-9, share) for count, share in zip(tokens, shares, strict=True))
    merged = {"shares": shares, "share": sum(tokens) / max(1, estimated_total)}
    for part in ("train", "validation"):
        counts = [source[part] for source in stats if part in source]
        keys = {key for count in counts for key in count} - {"max_id", "fingerprint"}
        if counts:
            merged[part] = {key: sum(count.get(key, 0) for count in counts) for key in sorted(keys)}
    return merged


def load_tokens(source, tokenizer, val_fraction=0.0, bin_dtype="auto", show_progress=False, by_position=False):
    """Return a source as token streams, tokenized now or loaded from the cache.

    Every rank may call this: a lock lets one rank of each machine do the work while the others wait.

    Args:
        tokenizer: for a `.bin`, only its size is used, to choose the integer type.
        val_fraction: fraction of the documents to hold out. With too few documents, and for token ids, that fraction of
            the tokens is held out, at the end.
        bin_dtype: the integer type of a `.bin`, or "auto".
        by_position: see [`HoldOut`].
    Returns:
        The training and the validation [`TokenStream`] (None if val_fraction is 0), and the statistics: for each part
        the counts of documents, tokens, bytes of text and unknown tokens, and the share of the source that was read.
    Raises:
        DataError: the source cannot be read, or has no tokens.
    """
    if source.format in TOKEN_ID_FORMATS:
        training, stats = _load_token_ids(source, tokenizer, bin_dtype)
        validation = None
    else:
        training, validation, stats = _load_text(source, tokenizer, (val_fraction, by_position), show_progress)
    if val_fraction and validation is None:
        training, validation = training.split(int(len(training) * (1 - val_fraction)))
        if len(training) == 0:
            raise _nothing_left(source, val_fraction)
        stats["held_out"] = f"the last {val_fraction:.0%} of the tokens"
    return training, validation, stats


def _nothing_left(source, val_fraction):
    return DataError(f"val_fraction {val_fraction} leaves nothing of {source.name} to train on: lower it")


def _load_text(source, tokenizer, split, show_progress):
    settings = [tokenizer_fingerprint(tokenizer), end_of_document(tokenizer), *split, "digests of documents"]
    whole = known_whole(source)
    if whole and cached_path(["tokens", source_key(whole), *settings]).exists():  # prefer it to a sample
        source = whole
    folder = cached_folder(
        ["tokens", source_key(source), *settings],
        lambda folder: _tokenize(source, tokenizer, split, folder, show_progress),
    )
    stats = json.loads((folder / "stats.json").read_text())
    streams = {}
    for part in ("train", "validation"):
        if stats[part]["tokens"]:
            column = datasets.Dataset.from_file(str(folder / f"{part}.arrow")).data.column("input_ids")
            chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
            documents = np.load(folder / f"{part}.npy", mmap_mode="r")
            streams[part] = TokenStream(chunks, stats[part]["fingerprint"], stats[part]["max_id"], documents=documents)
    return streams["train"], streams.get("validation"), stats


def _tokenize(source, tokenizer, split, folder, show_progress):
    """Write train.arrow and validation.arrow, the digests of their documents in train.npy and so on, and stats.json."""
    end, split_pattern = end_of_document(tokenizer), safe_split_pattern(tokenizer)
    repeated = find_repeated(source, split_pattern) if source.deduplicate else frozenset()
    first_pieces = _first_pieces(leave_out(read_documents(source, split_pattern), repeated))
    hold_out = HoldOut(((None, text) for text in first_pieces), *split)
    parts = {part: _PartWriter(folder / f"{part}.arrow", tokenizer) for part in ("train", "validation")}
    num_documents, is_first = 0, True
    with Progress(total_size(source), show_progress) as progress:
        pieces = leave_out(read_documents(source, split_pattern, progress.add_read), repeated)
        for batch in tokenize_pieces(pieces, tokenizer):
            for (text, is_end), ids in batch:
                if is_first:
                    part = parts["validation" if hold_out.chooses(num_documents, None, text) else "train"]
                part.add(text, ids, end if is_end else [])
                num_documents, is_first = num_documents + is_end, is_end
            for writer in parts.values():
                writer.flush()
            progress.add_tokens(sum(len(ids) for _, ids in batch))
    stats = {name: part.close() for name, part in parts.items()}
    stats["train"]["repeated"] = len(repeated)
    stats["share"] = progress.fraction if source.max_chars else 1.0
    if not stats["train"]["tokens"]:
        if stats["validation"]["tokens"]:
            raise _nothing_left(source, split[0])
        raise DataError(f"{source.name} holds no text")
    (folder / "stats.json").write_text(json.dumps(stats))


def _first_pieces(pieces):
    """Yield the first piece of each document."""
    is_first = True
    for text, is_end in pieces:
        if is_first:
            yield text
        is_first = is_end


class _PartWriter:
    """Write the tokens of the training or the validation part to an Arrow file, one row per piece, and count them."""

    def __init__(self, path, tokenizer):
        features = datasets.Features({"input_ids": datasets.List(datasets.Value(token_dtype(tokenizer).__name__))})
        self.schema = features.arrow_schema
        self.writer = ArrowWriter(path=str(path), features=features)
        self.unknown_id = tokenizer.unk_token_id
        self.rows, self.digest = [], hashlib.sha256()
        self.path, self.documents, self.document = path, [], document_digest()
        self.stats = dict.fromkeys(("documents", "tokens", "bytes", "unknown", "max_id"), 0)

    def add(self, text, ids, end):
        """Add a piece of a document; `end` are the token ids at its end that stand for no text."""
        self.rows.append(ids)
        self.document.update(ids)
        if end:
            self.documents.append(self.document.digest())
            self.document = document_digest()
        self.stats["bytes"] += len(text.encode())
        self.stats["documents"] += bool(end)
        if self.unknown_id is not None:  # GPT-2 has one token for unknown text and for the end of a document
            self.stats["unknown"] += int((ids == self.unknown_id).sum()) - end.count(self.unknown_id)

    def flush(self):
        if not self.rows:
            return
        ids, offsets = np.concatenate(self.rows), np.cumsum([0, *map(len, self.rows)], dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        self.writer.write_table(pa.Table.from_arrays([column], schema=self.schema), writer_batch_size=len(self.rows))
        self.digest.update(ids)
        self.stats["tokens"] += len(ids)
        self.stats["max_id"] = max(self.stats["max_id"], int(ids.max()))
        self.rows = []

    def close(self):
        """Close the file and return the statistics."""
        self.writer.finalize()
        np.save(self.path.with_suffix(".npy"), np.frombuffer(b"".join(self.documents), dtype=np.uint64))
        return self.stats | {"fingerprint": self.digest.hexdigest()}


def _load_token_ids(source, tokenizer, bin_dtype):
    files = [file for file in map(remote.local_path, source.files) if os.path.getsize(file)]
    if source.format == "bin":
        chunks = [_map_bin(file, tokenizer, bin_dtype) for file in files]
    else:
        chunks = [_map_pickle(replace(source, files=(file,))) for file in files]
    dtypes = [str(chunk.dtype) for chunk in chunks]

    def measure(folder):  # cached, because it reads every token
        digest, max_id = hashlib.sha256(repr(dtypes).encode()), -1
        for chunk in chunks:
            for _, ids in TokenStream([chunk], "", 0).blocks():
                digest.update(ids)
                max_id = max(max_id, int(ids.max()))
        (folder / "stats.json").write_text(json.dumps({"max_id": max_id, "fingerprint": digest.hexdigest()}))

    folder = cached_folder(["ids", source_key(source), dtypes], measure)
    tokens = TokenStream(chunks, **json.loads((folder / "stats.json").read_text()))
    return tokens, {"train": {"tokens": len(tokens)}}


def _map_pickle(source):
    folder = cached_folder(
        ["pickle", source_key(source)],
        lambda folder: np.save(folder / "ids.npy", read_token_ids(remote.local_path(source.files[0]))),
    )
    return np.load(folder / "ids.npy", mmap_mode="r")


def _map_bin(file, tokenizer, bin_dtype):
    size, header = os.path.getsize(file), np.fromfile(file, dtype="<i4", count=_LLMC_HEADER)
    if len(header) == _LLMC_HEADER and not header[3:].any() and 20240000 < header[0] < 20270000:
        return _map_llmc(file, size, header)
    dtype = np.dtype(np.uint16 if bin_dtype == "auto" else bin_dtype).newbyteorder("<")
    if bin_dtype == "auto" and size % 4 == 0:
        halves = np.fromfile(file, dtype="<u2", count=4096)
        if len(halves) % 4 == 0 and halves[::4].any() and not halves.reshape(-1, 4)[:, 1:].any():
            raise DataError(f"{file} holds 64-bit numbers: write the ids as uint16 or uint32")
        is_large_vocab = tokenizer is not None and num_token_ids(tokenizer) > 1 << 16
        if is_large_vocab or not halves[1::2].any():  # the upper half of a 32-bit id is usually 0
            dtype = np.dtype("<u4")
    if size % dtype.itemsize:
        raise DataError(
            f"{file} is cut short: {size} bytes is not a whole number of {dtype.itemsize}-byte token ids; "
            "copy or write it again"
        )
    return np.memmap(file, dtype=dtype, mode="r")


def _map_llmc(file, size, header):
    """Return the token ids after a header of llm.c: 256 int32; the first are a magic number, the version, the count."""
    dtype = _LLMC_DTYPES.get((int(header[0]), int(header[1])))
    if dtype is None or size != header.nbytes + int(header[2]) * dtype.itemsize:
        kinds = "complete token ids of llm.c, version 1 of 20240520 (GPT-2) or version 7 of 20240801 (Llama 3)"
        raise DataError(
            f"{file} has a header of llm.c ({header[0]}, version {header[1]}, {header[2]:,} tokens) and {size:,} "
            f"bytes, which are not {kinds}; write it again"
        )
    return np.memmap(file, dtype=dtype, mode="r", offset=header.nbytes)
