"""Text as token ids, in batches."""

import hashlib
import sys
import time

import numpy as np
from tqdm import tqdm

from ..models.loading import num_token_ids
from .readers import read_documents
from .tokenizer import end_of_document

_BATCH_CHARS = 1_000_000  # tokenized at once: enough to use all cores, and about 200 bytes of memory for each
_LINE_SECONDS = 10  # between two progress reports where there is no terminal


def find_repeated(source, split_pattern):
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


def leave_out(pieces, numbers):
    """Yield the pieces of all documents but those with these numbers."""
    number = 0
    for text, is_end in pieces:
        if number not in numbers:
            yield text, is_end
        number += is_end


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
    """Report how much of a source is read and how fast: a progress bar on a terminal, otherwise a line now and then.

    Args:
        total: the size of the source, in the unit of `add_read`; None if it is unknown.
        is_shown: whether to report anything.
    """

    def __init__(self, total, is_shown):
        self.total, self.is_shown, self.is_bar = total, is_shown, is_shown and sys.stderr.isatty()
        self.num_read = self.num_tokens = 0
        self.start_time = self.report_time = time.monotonic()

    def __enter__(self):
        bar_format = "tokenizing {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}, {desc}{remaining} left"
        if self.total is None:
            bar_format = "tokenizing {desc}{elapsed}"
        options = {"unit_scale": True, "leave": False, "delay": 1, "disable": not self.is_bar}
        self.bar = tqdm(total=self.total, bar_format=bar_format, **options)
        return self

    def __exit__(self, *error):
        self.bar.close()

    @property
    def fraction(self):
        """The fraction of the source that was read."""
        return min(1.0, self.num_read / self.total) if self.total else 1.0

    def add_read(self, count):
        self.num_read += count
        self.bar.update(count)

    def add_tokens(self, count):
        self.num_tokens += count
        now = time.monotonic()
        elapsed = now - self.start_time
        speed = f"{self.num_tokens / max(1e-9, elapsed) / 1e6:.2f}M tokens/s"
        self.bar.set_description_str(f"{speed}, ", refresh=False)
        if self.is_shown and not self.is_bar and now - self.report_time > _LINE_SECONDS:
            self.report_time, line = now, f"tokenizing  {self.num_tokens:,} tokens, {speed}"
            if self.total and self.num_read:
                left = tqdm.format_interval(elapsed * (1 / self.fraction - 1))
                line += f", {self.fraction:.0%} done, {left} left"
            print(line, file=sys.stderr)
