"""A corpus larger than the disk: a window of its tokens at a time.

The corpus is one endless stream of tokens, in the order of its files, and from the beginning again when it ends. The
stream is cut into windows of equal size, and rows are drawn from a window in random order until all have been read. So
which rows a step reads is a function of the step, as ever; a window is made when it is needed, from the place in the
corpus where it begins, which the window before it has found. These places are kept in each checkpoint, so that a run
goes on exactly, on any number of processes, without tokenizing what lies before.

One process of each machine makes the windows, the next one while the present one is being read; two or three are on the
disk at any time.
"""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np

from ..errors import DataError
from .cache import cached_folder, cached_path, key_digest
from .corpus import Progress, TokenStream, token_dtype, tokenize_pieces
from .readers import read_documents, stream_documents
from .sources import source_key
from .tokenizer import end_of_document, fingerprint, safe_split_pattern


class TokenWindows:
    """The windows of a source, made when they are asked for.

    Args:
        size: tokens of a window.
        owner: whose windows these are: two runs do not share them, for each removes what it has read.
        places: where windows begin, as far as is known: {number: place}.
        is_maker: whether this process removes old windows and makes the next one ahead.
    Raises:
        DataError: the source cannot be read, or holds no text.
    """

    max_id = 0  # no more than the tokenizer has

    def __init__(self, source, tokenizer, size, owner="", places=None, is_maker=True):
        self.source, self.tokenizer, self.size, self.is_maker = source, tokenizer, size, is_maker
        self.key = ["window", source_key(source), fingerprint(tokenizer), end_of_document(tokenizer), size]
        self.fingerprint = key_digest(self.key)
        self.key.append(owner)
        self.places = {0: {}} | {int(number): place for number, place in (places or {}).items()}
        self.opened, self.ahead, self.is_closed = {}, None, threading.Event()

    def open(self, number):
        """The tokens of a window and the one after them, memory-mapped."""
        if number not in self.opened:
            if self.ahead is not None:
                self.ahead.join()
            self.opened = {old: ids for old, ids in self.opened.items() if old == number - 1}
            self.opened[number] = np.load(self._make(number) / "ids.npy", mmap_mode="r")
            if self.is_maker:
                for old in range(max(0, number - 3), number - 1):
                    shutil.rmtree(cached_path([*self.key, old]), ignore_errors=True)
                self.ahead = threading.Thread(target=self._make_quietly, args=(number + 1,))
                self.ahead.start()
        return self.opened[number]

    def close(self):
        """End what is being made ahead, and remove what is left on the disk."""
        self.is_closed.set()
        if self.ahead is not None:
            self.ahead.join()
        for number in [*self.opened, max(self.opened, default=0) + 1] if self.is_maker else ():
            shutil.rmtree(cached_path([*self.key, number]), ignore_errors=True)

    def recent_positions(self):
        """What a checkpoint keeps: where the windows from the present one on begin."""
        first = min(self.opened, default=0) - 1
        return {number: place for number, place in self.places.items() if number >= first}

    def _make(self, number):
        """The folder of a window; those between it and the last one whose beginning is known are made too."""
        for one in range(max(known for known in self.places if known <= number), number + 1):
            folder = cached_folder([*self.key, one], lambda aside, one=one: self._fill(aside, self.places[one]))
            self.places[one + 1] = json.loads((folder / "next.json").read_text())
            if self.is_maker and one < number - 1:
                shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _make_quietly(self, number):
        try:
            self._make(number)
        except Exception:  # which comes again when the window is needed, and is said then
            return

    def _fill(self, folder, place):
        dtype, shape = token_dtype(self.tokenizer), (self.size + 1,)
        ids = np.lib.format.open_memmap(folder / "ids.npy", mode="w+", dtype=dtype, shape=shape)
        filled, skip, after = 0, place.get("tokens", 0), None
        is_awaited = self.is_maker and threading.current_thread() is threading.main_thread()
        with Progress(self.size, is_awaited) as progress:
            for batch in tokenize_pieces(self._pieces_from(place), self.tokenizer):
                if self.is_closed.is_set():
                    raise DataError("the run has ended")
                for (_, _, before), found in batch:
                    found = found[skip:]
                    if after is None and filled + len(found) > self.size:
                        after = before | {"tokens": skip + self.size - filled}
                    taken = found[: len(ids) - filled]
                    ids[filled : filled + len(taken)] = taken
                    filled, skip = filled + len(taken), 0
                    if filled == len(ids):
                        ids.flush()
                        (folder / "next.json").write_text(json.dumps(after))
                        return
                progress.add_read(filled - progress.num_read)
                progress.add_tokens(filled - progress.num_tokens)

    def _pieces_from(self, place):
        """(text, is_end, place) of each piece from a place on, again and again; `place` is where the piece begins."""
        cut, file, pieces = safe_split_pattern(self.tokenizer), place.get("file", 0), place.get("pieces", 0)
        while True:
            is_empty = file == 0 and pieces == 0
            if self.source.format == "hub":
                state = place.get("dataset")
                for text, is_end, before, count in stream_documents(self.source, cut, state):
                    if count >= pieces:
                        yield text, is_end, {"dataset": before, "pieces": count}
                        is_empty = False
                    if is_end:
                        pieces = 0
                is_empty, place = is_empty and state is None, {}
            else:
                for number in range(file, max(1, len(self.source.files))):  # data in memory has no files
                    one = replace(self.source, files=self.source.files[number : number + 1])
                    for count, (text, is_end) in enumerate(read_documents(one, cut)):
                        if count >= pieces:
                            yield text, is_end, {"file": number, "pieces": count}
                            is_empty = False
                    pieces = 0
            if is_empty:
                raise DataError(f"{self.source.name} holds no text")
            file = pieces = 0


class StreamedRows:
    """Rows of a stream of [`TokenWindows`]: row k of window w has the number w * len(self) + k.

    Args:
        length, ahead: see [`packing.StridedRows`].
    """

    lengths = None
    source_starts = (0,)

    def __init__(self, windows, length, name, ahead=1):
        self.windows, self.length, self.stride, self.name, self.ahead = windows, length, length, name, ahead
        self.num_rows = windows.size // length
        if self.num_rows < 1:
            raise DataError(f"streaming_window {windows.size} is less than one row of {length} tokens: raise it")
        self.base = 0  # the window that was read last

    def __len__(self):
        return self.num_rows

    @property
    def tokens(self):
        """The tokens of the present window, which stand for the corpus where it is looked at as a whole."""
        ids = self.windows.open(self.base)
        return TokenStream([ids[:-1]], self.windows.fingerprint, len(self.windows.tokenizer) - 1)

    def num_used_tokens(self):
        return self.num_rows * self.length

    def read(self, rows):
        """See [`packing.StridedRows.read`]."""
        width = self.length + self.ahead
        result = np.empty((len(rows), width), dtype=np.int64)
        for place, row in enumerate(np.asarray(rows, dtype=np.int64).tolist()):
            self.base, number = divmod(row, self.num_rows)
            result[place] = self.windows.open(self.base)[number * self.length : number * self.length + width]
        return result, np.zeros(len(rows), dtype=np.int64)
