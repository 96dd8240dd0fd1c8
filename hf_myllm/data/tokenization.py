"""Tokenize text, and write token shards (see shards.py)."""

import hashlib
import json
import time
from array import array
from collections import deque
from itertools import groupby
from operator import itemgetter

import numpy as np
from tqdm import tqdm

from ..errors import DataError
from ..models.loading import num_token_ids
from ..terminal import Status
from . import shards
from .hold_out import text_hash
from .readers import read_documents
from .sources import total_size
from .tokenizer import end_of_document, safe_split_pattern
from .tokenizer import fingerprint as tokenizer_fingerprint

SHARD_CHARS = 1 << 27  # of text in a shard, about 64 MB of tokens
_TOKENS, _BYTES, _UNKNOWN, _DIGEST = -5, -4, -3, -1  # where the fields of the last [`shards.RECORD`] are in an array
_BATCH_CHARS = 1_000_000  # tokenized at once: enough to use all cores, and about 200 bytes of memory for each


def text_key(tokenizer):
    """Return what the shards of a text depend on beside the text."""
    return [tokenizer_fingerprint(tokenizer), end_of_document(tokenizer), SHARD_CHARS]


def write_shards(folder, source, tokenizer, show_progress=False, key="", part=(1, 1)):
    """Write the token shards of a source (see shards.py), without the index. Those that are whole in the folder stay.

    Where a shard begins depends only on the text, so several machines may each write a part of them.

    Args:
        folder: a [`shards.Folder`].
        key: a digest of the text and the tokenizer; shards with another one are refused.
        part: (number from 1, count): write each count-th shard.
    Returns:
        what the index says of each shard, None for one that is not there yet; and the keys of the index that reading
        the source gave.
    Raises:
        DataError: the source cannot be read or has no text, or the folder holds shards of something else.
    """
    split_pattern, dtype = safe_split_pattern(tokenizer), np.dtype(token_dtype(tokenizer)).newbyteorder("<")
    repeated = _find_repeated(source, split_pattern) if source.deduplicate else frozenset()
    sizes, entries, is_end = folder.sizes([]), [], True
    with Progress(total_size(source), show_progress) as progress:
        pieces = _leave_out(read_documents(source, split_pattern, progress.add_read), repeated)
        for number, pieces_of_shard in groupby(_number_shards(pieces), itemgetter(3)):
            name, was_end = f"shard-{number:05}", is_end
            if (entry := shards.read_header(folder, name, dtype, sizes)) and entry.pop("key") != key:
                raise DataError(
                    f"{folder.path}: {name} is of another text, another tokenizer or another version; give another "
                    "folder, or remove it"
                )
            if entry or number % part[1] != part[0] - 1:
                is_end = deque(pieces_of_shard, maxlen=1)[0][1]
            else:
                writer = _ShardWriter(name, tokenizer, dtype, continues=not was_end)
                is_end = writer.write(folder, pieces_of_shard, progress, key)
                entry = writer.entry
            entries.append(entry)
    if not entries:
        raise DataError(f"{source.name} holds no text")
    return entries, {"repeated": len(repeated), "share": progress.fraction if source.max_chars else 1.0}


def write_index(folder, tokenizer, entries, facts, val_fraction=0.0):
    """Write the index of shards that [`write_shards`] wrote, and return it.

    Args:
        val_fraction: a share of the documents for which it says how many of each shard are held out, so that readers
            need not count.
    """
    content = {"format": shards.FORMAT, "version": shards.VERSION} | facts
    content |= {"tokenizer": tokenizer_fingerprint(tokenizer), "dtype": np.dtype(token_dtype(tokenizer)).name}
    content |= {name: sum(entry[name] for entry in entries) for name in shards.COUNTS} | {"shards": entries}
    if val_fraction:
        counts = shards.Split(shards.Index(f"{folder.path}/{shards.INDEX}", content), val_fraction).count()
        content["held_out"] = {"val_fraction": val_fraction, "counts": counts}
    folder.write(shards.INDEX, json.dumps(content, indent=1).encode())
    return content


def _number_shards(pieces):
    """Yield (text, is_end, first piece of its document, number of its shard) of each piece."""
    number, num_chars, opening = 0, 0, None
    for text, is_end in pieces:
        if num_chars >= SHARD_CHARS:
            number, num_chars = number + 1, 0
        opening = text if opening is None else opening
        yield text, is_end, opening, number
        num_chars, opening = num_chars + len(text), None if is_end else opening


class _ShardWriter:
    """Writes a shard: its tokens as they come, and then the records of its documents, with what the index says of it.

    Args:
        continues: whether it begins within a document.
    """

    def __init__(self, name, tokenizer, dtype, continues):
        self.entry = {"name": name, "documents": 0, "tokens": 0, "bytes": 0, "unknown": 0, "max_id": 0}
        self.entry |= {"records": 0, "continues": continues}
        self.tokenizer, self.dtype = tokenizer, dtype
        self.records = array("Q")  # the numbers of each, one after another
        self.end, self.unknown_id = end_of_document(tokenizer), tokenizer.unk_token_id

    def write(self, folder, pieces, progress, key):
        """Write both files; the second one makes the shard whole. Return whether its last document ends in it."""
        digest, is_first = hashlib.sha256(), True
        with folder.create(f"{self.entry['name']}.bin") as path, open(path, "wb") as file:
            for batch in tokenize_pieces(pieces, self.tokenizer):
                for (text, is_end, opening, _), ids in batch:
                    self._add(text, ids, self.end if is_end else [], opening if is_first else None)
                    is_first = is_end
                ids = np.concatenate([ids for _, ids in batch]).astype(self.dtype, copy=False)
                self.entry["max_id"] = max(self.entry["max_id"], int(ids.max(initial=0)))
                file.write(ids)
                digest.update(ids)
                progress.add_tokens(len(ids))
        records = np.empty(len(self.records) // len(shards.RECORD), shards.RECORD)
        for name, values in zip(shards.RECORD.names, np.array(self.records).reshape(len(records), -1).T, strict=True):
            records[name] = values
        self.entry |= {"digest": digest.hexdigest(), "records": len(records)}
        self.entry |= {name: int(records[name].sum(dtype=np.int64)) for name in shards.COUNTS[1:]}
        self.entry["documents"] = len(records) - self.entry["continues"]
        header = json.dumps(self.entry | {"key": key}).encode() + b"\n"
        folder.write(f"{self.entry['name']}.documents", header + records.tobytes())
        self.entry |= {"header": len(header), "documents_digest": hashlib.sha256(records).hexdigest()}
        return is_first

    def _add(self, text, ids, end, opening):
        """Add a piece of a document.

        Args:
            end: the token ids at its end that stand for no text.
            opening: the first piece of the document, if this is the first one of it in the shard.
        """
        if opening is not None:
            self.records.extend((0, 0, 0, text_hash(opening), 0))
            self.document = document_digest()
        self.document.update(ids)
        self.records[_DIGEST] = int.from_bytes(self.document.digest(), "little")
        self.records[_TOKENS] += len(ids)
        self.records[_BYTES] += len(text.encode())
        if self.unknown_id is not None:  # GPT-2 has one token for unknown text and for the end of a document
            self.records[_UNKNOWN] += int((ids == self.unknown_id).sum()) - end.count(self.unknown_id)


def document_digest(ids=b""):
    """Return a hash object for the tokens of a document, whose digest is a number of `TokenStream.documents`."""
    return hashlib.blake2b(ids, digest_size=8)


def _find_repeated(source, split_pattern):
    """Return the numbers of the documents of a source whose text is that of an earlier one."""
    seen, repeated, digest, number = set(), set(), hashlib.blake2b(digest_size=8), 0
    for text, is_end in read_documents(source, split_pattern):
        digest.update(text.encode())
        if is_end:
            key = digest.digest()
            if key in seen:
                repeated.add(number)
            seen.add(key)
            digest, number = hashlib.blake2b(digest_size=8), number + 1
    return repeated


def _leave_out(pieces, numbers):
    """Yield the pieces of all documents but those with these numbers."""
    number = 0
    for text, is_end in pieces:
        if number not in numbers:
            yield text, is_end
        number += is_end


# ---- tokens


def token_dtype(tokenizer):
    """Return the smallest integer type that holds a tokenizer's ids."""
    return np.uint16 if num_token_ids(tokenizer) <= 1 << 16 else np.uint32


def tokenize_pieces(pieces, tokenizer):
    """Tokenize pieces of documents in batches of about `_BATCH_CHARS` characters.

    Args:
        pieces: tuples (text, is_end, ...); the token ids of a piece that ends its document include the end of document.
    Yields:
        Lists of (piece, token ids).
    """
    end, dtype = end_of_document(tokenizer), token_dtype(tokenizer)
    for batch in _batch_pieces(pieces):
        texts = [text for text, *_ in batch]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids + end * piece[1], dtype) for piece, encoding in zip(batch, encodings, strict=True)]
        yield list(zip(batch, ids, strict=True))


def _batch_pieces(pieces):
    batch, num_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece[0])
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class Progress:
    """Show how much of a source is read, and how fast it is tokenized.

    Args:
        total: the size of the source, in the unit of `add_read`; None if it is unknown.
        is_shown: whether to show anything.
    """

    def __init__(self, total, is_shown):
        self.total, self.status = total, Status(is_shown)
        self.num_read = self.num_tokens = 0
        self.start_time = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.status.clear()

    @property
    def fraction(self):
        """The fraction of the source that was read."""
        return min(1.0, self.num_read / self.total) if self.total else 1.0

    def add_read(self, count):
        self.num_read += count

    def add_tokens(self, count):
        self.num_tokens += count
        elapsed = time.monotonic() - self.start_time
        text = f"tokenizing  {self.num_tokens:,} tokens, {self.num_tokens / max(1e-9, elapsed) / 1e6:.2f}M tokens/s"
        if self.total and self.num_read:
            left = tqdm.format_interval(elapsed * (1 / self.fraction - 1))
            text += f", {self.fraction:.0%} done, {left} left"
        self.status(text)
