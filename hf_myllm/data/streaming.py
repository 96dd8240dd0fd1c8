"""Streaming: a corpus larger than the disk, one window of tokens at a time.

The corpus is one endless stream of tokens, in the order of its files, and starts again at its end. The stream is cut
into windows of equal size. Rows are drawn from a window in random order until all have been read, so the rows of a step
are still a function of the step. A window is made when it is needed, from its position in the corpus, which is known
once the window before it was made. Checkpoints keep these positions, so a run resumes exactly, on any number of ranks,
without tokenizing what was read before. Of a mixture each source is a stream of its own.

On each machine one rank makes the windows, the next one while the current one is read. Two or three windows of each
source are on the disk at any time.
"""

import json
import shutil
import threading
from contextlib import suppress

import numpy as np

from ..errors import DataError
from .cache import cached_folder, cached_path, key_digest
from .corpus import TokenStream, load_tokens
from .readers import resume_documents
from .remote import content_key
from .sources import file_states, source_key
from .tokenization import Progress, token_dtype, tokenize_pieces
from .tokenizer import end_of_document, fingerprint, safe_split_pattern

_SAMPLES = 1024  # of all files together, by which a checkpoint recognizes them


class TokenWindows:
    """The windows of a source, made on demand.

    Args:
        size: tokens per window.
        owner: identifies the run: two runs do not share windows, because each removes those that it has read.
        positions: where windows begin in the corpus, as far as is known: {window: position}.
        is_maker: whether this rank removes old windows and makes the next one ahead.
    Raises:
        DataError: the source cannot be read, or has no text.
    """

    def __init__(self, source, tokenizer, size, owner="", positions=None, is_maker=True):
        self.source, self.tokenizer, self.size, self.is_maker = source, tokenizer, size, is_maker
        key = source_key(source)
        if source.files:  # by content: the files may be copied or touched before a run resumes
            samples = max(1, _SAMPLES // len(source.files))
            key = key | {"files": [content_key(file, samples) for file in source.files]}
        key = ["window", key, fingerprint(tokenizer), end_of_document(tokenizer), size]
        self.fingerprint = key_digest(key)
        self.key = [*key, owner, file_states(source)]
        self.positions = {0: {}} | {int(window): position for window, position in (positions or {}).items()}
        self.opened, self.prefetch, self.is_closed, self.oldest = {}, None, threading.Event(), None

    def open(self, window):
        """Return the tokens of a window and the token after them, memory-mapped."""
        if window not in self.opened:
            if self.prefetch is not None:
                self.prefetch.join()
            self.opened = {index: ids for index, ids in self.opened.items() if index == window - 1}
            self.opened[window] = np.load(self._make(window) / "ids.npy", mmap_mode="r")
            if self.is_maker:
                self.oldest = max(0, window - 3) if self.oldest is None else self.oldest
                for index in range(self.oldest, window - 1):
                    self._remove(index)
                self.oldest = max(self.oldest, window - 1)
                self.prefetch = threading.Thread(target=self._try_to_make, args=(window + 1,))
                self.prefetch.start()
        return self.opened[window]

    def close(self):
        """Stop making the next window, and remove the windows on the disk."""
        self.is_closed.set()
        if self.prefetch is not None:
            self.prefetch.join()
        last = max(self.opened, default=0)
        # the window after the next may have a position
        for window in [*self.opened, last + 1, last + 2] if self.is_maker else ():
            self._remove(window)

    def recent_positions(self):
        """Return what a checkpoint keeps: where the windows from the one before the current one on begin."""
        first = min(self.opened, default=0) - 1
        # a copy: the next window may be made meanwhile
        return {window: position for window, position in self.positions.copy().items() if window >= first}

    def _remove(self, window):
        shutil.rmtree(cached_path([*self.key, window]), ignore_errors=True)
        shutil.rmtree(cached_path([*self.key, window, "position"]), ignore_errors=True)

    def _make(self, window):
        """Return the folder of a window; make it, and those between it and the last one with a known position."""
        for index in range(self._last_known(window), window + 1):
            position = self.positions[index]
            folder = cached_folder([*self.key, index], lambda folder, position=position: self._fill(folder, position))
            self.positions[index + 1] = json.loads((folder / "next.json").read_text())
            key, text = [*self.key, index + 1, "position"], json.dumps(self.positions[index + 1])
            cached_folder(key, lambda folder, text=text: (folder / "position.json").write_text(text))
            if self.is_maker and index < window - 1:
                self._remove(index)
        return folder

    def _last_known(self, window):
        """Return the last window up to this one whose position is known here or was found by another rank, which may
        have read windows of this source that this rank had no rows of."""
        last = max(known for known in self.positions if known <= window)
        for index in range(window, last, -1):
            path = cached_path([*self.key, index, "position"]) / "position.json"
            with suppress(OSError, ValueError):
                self.positions[index] = json.loads(path.read_text())
                return index
        return last

    def _try_to_make(self, window):
        try:
            self._make(window)
        except Exception:  # raised again when the window is opened
            return

    def _fill(self, folder, position):
        """Write ids.npy, the tokens from a position on, and next.json, the position after them."""
        ids = np.lib.format.open_memmap(
            folder / "ids.npy", mode="w+", dtype=token_dtype(self.tokenizer), shape=(self.size + 1,)
        )
        filled, skip, following = 0, position.get("tokens", 0), None
        is_awaited = self.is_maker and threading.current_thread() is threading.main_thread()
        with Progress(self.size, is_awaited) as progress:
            while filled < len(ids):  # each time from the position to the end of the corpus, then from its beginning
                start = filled
                for batch in self._tokenize_from(position):
                    if self.is_closed.is_set():
                        raise DataError("the run has ended")
                    for (_, _, piece_position), piece_ids in batch:
                        piece_ids = piece_ids[skip:]
                        if following is None and filled + len(piece_ids) > self.size:
                            following = piece_position | {"tokens": skip + self.size - filled}
                        piece_ids = piece_ids[: len(ids) - filled]
                        ids[filled : filled + len(piece_ids)] = piece_ids
                        filled, skip = filled + len(piece_ids), 0
                        if filled == len(ids):
                            break
                    progress.add_read(filled - progress.num_read)
                    progress.add_tokens(filled - progress.num_tokens)
                    if filled == len(ids):
                        break
                if not position and filled == start:
                    raise DataError(f"{self.source.name} holds no text")
                if not position and filled < len(ids):  # the whole corpus is smaller: repeat its tokens
                    following = self._position_of((self.size - start) % (filled - start))
                    ids[filled:] = np.resize(ids[start:filled], len(ids) - filled)
                    filled = len(ids)
                position = {}
        ids.flush()
        (folder / "next.json").write_text(json.dumps(following))

    def _tokenize_from(self, position):
        """Yield lists of ((text, is_end, position), token ids) of the pieces from a position to the corpus' end."""
        if self.source.format == "shards":
            tokens, _, _ = load_tokens(self.source, self.tokenizer)
            return ([((None, None, {"start": start}), ids)] for start, ids in tokens.blocks(position.get("start", 0)))
        pieces = resume_documents(self.source, safe_split_pattern(self.tokenizer), position)
        return tokenize_pieces(pieces, self.tokenizer)

    def _position_of(self, token):
        """Return the position of a token of the corpus, counted from its beginning."""
        for batch in self._tokenize_from({}):
            for (_, _, position), ids in batch:
                if token < len(ids):
                    return position | {"tokens": token}
                token -= len(ids)


class Streams:
    """The [`TokenWindows`] of one source, or of each source of a mixture."""

    max_id = 0  # all token ids come from the tokenizer

    def __init__(self, streams):
        self.streams, self.size = streams, streams[0].size
        prints = [stream.fingerprint for stream in streams]
        self.fingerprint = prints[0] if len(prints) == 1 else key_digest(prints)

    def close(self):
        """Stop making windows, and remove those on the disk."""
        for stream in self.streams:
            stream.close()

    def recent_positions(self):
        """Return what a checkpoint keeps: {window: position} of one source, {source: {window: position}} of several."""
        positions = [stream.recent_positions() for stream in self.streams]
        return positions[0] if len(positions) == 1 else {f"source {i}": own for i, own in enumerate(positions)}


def stored_positions(state, num_sources):
    """Return the positions of each source of what [`Streams.recent_positions`] returned; none without."""
    state = state or {}
    return [state] if num_sources == 1 else [state.get(f"source {i}") for i in range(num_sources)]


class StreamedRows:
    """Rows of [`Streams`]: row k of window w of source i of n has the number (w * rows per window + k) * n + i.

    Args:
        length, ahead: see [`packing.StridedRows`].
    """

    lengths = None

    def __init__(self, windows, length, name, ahead=1):
        self.windows, self.length, self.name, self.ahead = windows, length, name, ahead
        self.num_rows = windows.size // length  # of a window
        if self.num_rows < 1:
            raise DataError(f"streaming_window {windows.size} is less than one row of {length} tokens: raise it")
        self.source_starts = tuple(range(len(windows.streams)))
        self.current = [0] * len(windows.streams)  # the window of each source that was read last

    def __len__(self):
        return self.num_rows * len(self.current)

    @property
    def tokens(self):
        """The tokens of the current windows, which stand for the corpus in statistics."""
        streams = zip(self.windows.streams, self.current, strict=True)
        chunks = [stream.open(window)[:-1] for stream, window in streams]
        return TokenStream(chunks, self.windows.fingerprint, len(self.windows.streams[0].tokenizer) - 1)

    def read(self, rows):
        """See [`packing.StridedRows.read`]."""
        width = self.length + self.ahead
        result = np.empty((len(rows), width), dtype=np.int64)
        for index, row in enumerate(np.asarray(rows, dtype=np.int64).tolist()):
            row, source = divmod(row, len(self.current))
            self.current[source], row_in_window = divmod(row, self.num_rows)
            start = row_in_window * self.length
            result[index] = self.windows.streams[source].open(self.current[source])[start : start + width]
        return result, np.zeros(len(rows), dtype=np.int64)
