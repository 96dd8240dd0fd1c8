"""Text sources as memory-mapped token ids.

A text source is tokenized once into token shards (shards.py), with the end-of-text token after each document: in the
cache of `datasets`, or where `hf-myllm prepare --to` writes them. A `.bin` file of token ids is memory-mapped where it
is; a `.pkl` is converted once. In each case a run reads one flat [`TokenStream`].
"""

import hashlib
import json
import os
from dataclasses import replace
from functools import partial

import numpy as np

from ..errors import DataError
from ..models.loading import num_token_ids
from . import remote, shards, tokenization
from .cache import cached_folder, cached_path, key_digest
from .pickled import read_token_ids
from .sources import known_whole, source_key
from .tokenization import write_index, write_shards

_COMPARED_DOCUMENTS = 10_000_000  # of training and validation data: their digests are held in memory
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
        documents: (documents,) uint64, a digest of the tokens of each document, or a function that returns these; None
            if they are unknown.
    Attributes:
        old_fingerprint: a function that returns what the fingerprint was in version 0.1, which had no token shards.
    """

    def __init__(self, chunks, fingerprint, max_id, source_starts=(0,), documents=None):
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        self.fingerprint, self.max_id, self.source_starts = fingerprint, max_id, source_starts
        self._documents, self.old_fingerprint = documents, lambda: fingerprint

    @property
    def documents(self):
        return self._documents() if callable(self._documents) else self._documents

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

    def blocks(self, first=0):
        """Yield (start, token ids) of consecutive blocks from a position on, each small enough for memory."""
        for start in range(first, len(self), _BLOCK_TOKENS):
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

        def part(chunks, name):
            stream = TokenStream(chunks, f"{self.fingerprint}{name}", self.max_id)
            stream.old_fingerprint = lambda: f"{self.old_fingerprint()}{name}"
            return stream

        before = part([*self.chunks[:index], self.chunks[index][:offset]], f"[:{position}]")
        return before, part([self.chunks[index][offset:], *self.chunks[index + 1 :]], f"[{position}:]")

    def digest(self):
        """Return a digest of the token ids, which takes about a second per GB."""
        digest = hashlib.sha256()
        for _, ids in self.blocks():
            digest.update(np.ascontiguousarray(ids))
        return digest.hexdigest()


def concatenate(streams):
    """Return several streams as one, with `source_starts` set."""
    if len(streams) == 1:
        return streams[0]
    chunks = [chunk for stream in streams for chunk in stream.chunks]

    def join(fingerprints):
        return hashlib.sha256(repr(fingerprints).encode()).hexdigest()

    def documents():
        known = [digests for stream in streams if (digests := stream.documents) is not None]
        return np.concatenate(known) if known else None

    joined = TokenStream(
        chunks,
        join([stream.fingerprint for stream in streams])[:32],
        max(stream.max_id for stream in streams),
        np.cumsum([0, *map(len, streams)])[:-1].tolist(),
        documents,
    )
    joined.old_fingerprint = lambda: join([stream.old_fingerprint() for stream in streams])
    return joined


def count_shared(training, validation):
    """Return how many documents of the validation data are in the training data too, and how many it has.

    Args:
        training, validation: [`TokenStream`]s.
    """
    known, digests = training.documents, validation.documents
    if known is None or digests is None:
        return 0, 0
    return int(np.isin(digests, known).sum()), len(digests)


def merge_stats(stats):
    """Return the statistics of several sources, as [`load_tokens`] returns them, as those of one."""
    shares = [source.get("share", 1.0) for source in stats]
    tokens = [source["train"]["tokens"] for source in stats]
    estimated_total = sum(count / max(1e-9, share) for count, share in zip(tokens, shares, strict=True))
    merged = {"is_limited": True} if any("is_limited" in source for source in stats) else {}
    merged |= {"shares": shares, "share": sum(tokens) / max(1, estimated_total)}
    for part in ("train", "validation"):
        counts = [source[part] for source in stats if part in source]
        keys = {key for count in counts for key in count} - {"max_id", "fingerprint"}
        if counts:
            merged[part] = {key: sum(count.get(key, 0) for count in counts) for key in sorted(keys)}
    return merged


def load_tokens(
    source, tokenizer, val_fraction=0.0, bin_dtype="auto", show_progress=False, by_position=False, first=()
):
    """Return a source as token streams, tokenized now or loaded from the cache.

    Every rank may call this: a lock lets one rank of each machine do the work while the others wait.

    Args:
        tokenizer: for a `.bin`, only its size is used, to choose the integer type.
        val_fraction: fraction of the documents to hold out. With too few documents, and for token ids, that fraction of
            the tokens is held out, at the end.
        bin_dtype: the integer type of a `.bin`, or "auto".
        by_position: see [`HoldOut`].
        first: numbers of tokens: only these are used, from the beginning, for training and, if there is a second
            number, for validation. Of a source that has no more tokens all are used, as without it.
    Returns:
        The training and the validation [`TokenStream`] (None if val_fraction is 0), and the statistics: for each part
        the counts of documents, tokens, bytes of text and unknown tokens, and the share of the source that was read.
    Raises:
        DataError: the source cannot be read, or has no tokens.
    """
    source, options = replace(source, max_rows=0), (bin_dtype, show_progress)
    if first and (parts := _load_first(source, tokenizer, first, *options)):
        return parts
    if source.format in ("bin", "pkl"):
        training, stats = _load_token_ids(source, tokenizer, bin_dtype)
        validation = None
    else:
        index = source.data if source.format == "shards" else _tokenize_into_cache(source, tokenizer, show_progress)
        training, validation, stats = _open_shards(index, source.name, val_fraction, by_position)
    if val_fraction and validation is None:
        training, validation = training.split(int(len(training) * (1 - val_fraction)))
        if len(training) == 0:
            raise _nothing_left(source.name, val_fraction)
        stats["held_out"] = f"the last {val_fraction:.0%} of the tokens"
    return training, validation, stats


def _load_first(source, tokenizer, counts, *options):
    """Return what [`load_tokens`] does of the first tokens of a source, or None if it has no more than these.

    Text is read up to some number of characters, and further if its tokens are longer than that.
    """
    total, before, max_chars = sum(counts), None, 8 * sum(counts)
    while True:
        tokens, _, stats = load_tokens(replace(source, max_chars=max_chars), tokenizer, 0.0, *options)
        if len(tokens) > total:
            break
        if source.format in ("shards", "bin", "pkl") or before == len(tokens):
            return None
        before, max_chars = len(tokens), 4 * max_chars
    stats |= {"share": 1.0, "is_limited": True}
    training, rest = tokens.split(counts[0])
    if len(counts) < 2:
        return training, None, stats
    stats["held_out"] = f"the {counts[1]:,} tokens after them"
    return training, rest.split(counts[1])[0], stats


def _nothing_left(name, val_fraction):
    return DataError(f"val_fraction {val_fraction} leaves nothing of {name} to train on: lower it")


def _tokenize_into_cache(source, tokenizer, show_progress):
    settings, whole = tokenization.text_key(tokenizer), known_whole(source)
    if whole and cached_path(["shards", source_key(whole), *settings]).exists():  # prefer it to a sample
        source = whole

    def tokenize(folder):
        folder = shards.Folder(folder)
        write_index(folder, tokenizer, *write_shards(folder, source, tokenizer, show_progress))

    return shards.Index(cached_folder(["shards", source_key(source), *settings], tokenize) / shards.INDEX)


def _open_shards(index, name, val_fraction, by_position):
    """Return the training stream, the validation stream (None if it would be empty) and the statistics of an index."""
    parts, streams = shards.split_chunks(index, val_fraction, by_position), {}
    stats = {"share": index.content["share"]}
    for part, (chunks, counts) in zip(("train", "validation"), parts, strict=True):
        fingerprint = index.digest[:32]
        if val_fraction:
            records = [shard["documents_digest"] for shard in index.shards]
            fingerprint = key_digest([index.digest, records, val_fraction, by_position, part])
        stats[part] = counts | {"max_id": max(shard["max_id"] for shard in index.shards)}
        documents = partial(shards.document_digests, chunks) if counts["documents"] <= _COMPARED_DOCUMENTS else None
        stream = streams[part] = TokenStream(chunks, fingerprint, stats[part]["max_id"], documents=documents)
        stream.old_fingerprint = stream.digest
    stats["train"]["repeated"] = index.content["repeated"]
    if not len(streams["train"]):
        raise _nothing_left(name, val_fraction)
    return streams["train"], streams["validation"] if len(streams["validation"]) else None, stats


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
