"""Token shards: the tokens of a text in raw files with an index, in a folder or at a URL. corpus.py writes them.

    index.json             counts and digests of the shards, the tokenizer, and what text they came from; written last
    tokenizer/             the tokenizer's files
    shard-00000.bin        token ids, little-endian uint16 or uint32, and nothing else
    shard-00000.documents  a line of JSON about the shard, and a [`RECORD`] of each document or part of one

The cache of tokenized text has the same form. The shards hold the whole text in its order; which documents are held out
for validation is decided when they are read, from the hashes in the records. A shard is opened, memory-mapped or by
ranges, when one of its tokens is read, so a run may start anywhere in any number of tokens.
"""

import functools
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from ..errors import DISK_FULL, DataError, first_line, library_errors, printable
from ..files import atomic_path, flush
from . import remote
from .cache import cached_folder
from .hold_out import HoldOut

INDEX, TOKENIZER = "index.json", "tokenizer"
FORMAT = "hf_myllm token shards"
VERSION = 1
_FIRST = "shard-00000.documents"
# of a document, or of the part of one that is in this shard; `hash` is that of the document's first piece of text, and
# `digest` that of the tokens
RECORD = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("unknown", "<u4"), ("hash", "<u8"), ("digest", "<u8")])
COUNTS = ("documents", "tokens", "bytes", "unknown")
_OPEN_SHARDS = 512  # memory-mapped at once
_HEADER_BYTES = 4096  # of a file of documents, at most

_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Shard = TypedDict("_Shard", dict.fromkeys((*COUNTS, "max_id", "records", "header"), _Count) | {
    "name": Annotated[str, Field(pattern="^shard-[0-9]+$")], "continues": bool, "digest": _Digest,
    "documents_digest": _Digest})  # fmt: skip


class _HeldOut(TypedDict):
    val_fraction: float
    counts: list[Annotated[list[_Count], Field(min_length=len(COUNTS), max_length=len(COUNTS))]]


class _Index(TypedDict):
    """The keys of an index that are read; it may come from somebody else. That of a cache has no source."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)
    format: Literal[FORMAT]
    version: Literal[VERSION]
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    share: float
    repeated: _Count
    shards: Annotated[list[_Shard], Field(min_length=1)]
    source: NotRequired[dict[str, Any]]
    tokenizer_files: NotRequired[list[str]]
    tokenizer_recipe: NotRequired[dict[str, Any]]
    held_out: NotRequired[_HeldOut]


_INDEX = TypeAdapter(_Index)


_errors = functools.partial(library_errors, passes=(FileNotFoundError,))


class Folder:
    """A folder by its path, or elsewhere by a URL that fsspec knows."""

    def __init__(self, path):
        self.path = remote.without_file_scheme(str(path))
        self.is_local = not remote.is_remote(self.path)
        if not self.is_local:
            with _errors(f"{self.path} cannot be read"):
                self.files, self.root = remote.open_system(self.path)

    def read(self, name, start=None, stop=None):
        """Return the bytes of a file, or a range of them.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it cannot be read.
        """
        if self.is_local:
            with open(os.path.join(self.path, name), "rb") as file:
                file.seek(start or 0)
                return file.read() if stop is None else file.read(stop - (start or 0))
        with _errors(f"{self.path}/{name} cannot be read"):
            return self.files.cat_file(f"{self.root}/{name}", start=start, end=stop)

    def sizes(self, names):
        """Return the sizes in bytes of those of some files that are there, by name."""
        if self.is_local:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}
        with _errors(f"{self.path} cannot be read"):
            if "http" in self.files.protocol:  # HTTP servers do not list folders
                paths = [f"{self.root}/{name}" for name in names]
                try:
                    sizes = self.files.sizes(paths)
                except FileNotFoundError:
                    sizes = [self.files.size(path) if self.files.exists(path) else None for path in paths]
                return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
            entries = self.files.ls(self.root, detail=True) if self.files.exists(self.root) else []
            return {os.path.basename(entry["name"]): entry["size"] for entry in entries}

    @contextmanager
    def create(self, name):
        """Yield a path to write a file to, which then appears in the folder as a whole or not at all."""
        if self.is_local:
            path = Path(self.path, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomic_path(path) as partial:
                    yield partial
                    flush(partial)
            except OSError as error:
                if error.errno in DISK_FULL and not error.filename:
                    error.filename = str(path)
                raise
            flush(path.parent)
            return
        with tempfile.TemporaryDirectory() as temporary:
            yield (path := Path(temporary, "file"))
            with _errors(f"{self.path}/{name} cannot be written"):
                self.files.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
                self.files.put_file(str(path), f"{self.root}/{name}")

    def write(self, name, content):
        with self.create(name) as path:
            path.write_bytes(content)


def is_index(path):
    """Return whether a file is an index of token shards, by its beginning or, if that is damaged, beside shards."""
    try:
        with open(path, "rb") as file:
            is_beside = os.path.basename(path) == INDEX and os.path.exists(os.path.join(os.path.dirname(path), _FIRST))
            return is_beside or FORMAT.encode() in file.read(100)
    except OSError:
        return False


class Index:
    """The index of token shards.

    Args:
        path: path or URL of index.json.
        content: of one that is not written yet.
    Raises:
        DataError: it is no such index, it cannot be read, or a shard is missing or has another size.
    """

    def __init__(self, path, content=None):
        self.path, self.folder = str(path), Folder(os.path.dirname(str(path)) or ".")
        try:
            if content is None:
                content = _INDEX.validate_json(self._read(os.path.basename(self.path)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            problem = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
            raise DataError(
                f"{self.path}: it is not an index of token shards of version {VERSION} ({problem}); write one with "
                "hf-myllm prepare RECIPE --to FOLDER"
            ) from None
        self.content, self.shards = content, content["shards"]
        self._map_file = functools.lru_cache(_OPEN_SHARDS)(_map_file)  # a new run opens the files anew
        self.dtype = np.dtype(content["dtype"]).newbyteorder("<")
        self.digest = digest_shards(self.dtype, [shard["digest"] for shard in self.shards])
        continued = np.cumsum([shard["continues"] for shard in self.shards])
        records = np.cumsum([0, *(shard["records"] for shard in self.shards)])
        self.first_documents = records[:-1] - continued  # the number of the document of each shard's first record
        expected = {name: size for shard in self.shards for name, size in _sizes(shard, self.dtype).items()}
        sizes = self.folder.sizes(list(expected))
        for name, size in expected.items():
            if sizes.get(name) != size:
                found = f"has {sizes[name]:,} bytes" if name in sizes else "is missing"
                raise self._damaged(name, f"{found}, and the index names {size:,} bytes")

    def _damaged(self, name, problem):
        """Return the error of a file that is not as the index says."""
        advice = "copy it again, or run hf-myllm prepare --to on the folder"
        return DataError(f"{self.folder.path}/{name} {problem}; {advice}")

    def _read(self, name, start=None, stop=None):
        try:
            return self.folder.read(name, start, stop)
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        except OSError as error:
            raise self._damaged(name, f"cannot be read: {first_line(error)}") from None

    def verify(self):
        """Read all shards and return their number; raise DataError at the first whose content is not that of its
        digest."""
        for number, shard in enumerate(self.shards):
            name = f"{shard['name']}.bin"
            contents = {"digest": self._read(name), "documents_digest": self.records(number)}
            for digest, content in contents.items():
                if hashlib.sha256(content).hexdigest() != shard[digest]:
                    name = name if digest == "digest" else f"{shard['name']}.documents"
                    raise self._damaged(name, "is damaged: its content is not that of the index")
        self._check_tokenizer()
        return len(self.shards)

    @property
    def text_name(self):
        """The name of the text that the index came from."""
        return printable(str(self.content.get("source", {}).get("name", self.path)))

    def _check_tokenizer(self):
        for name in self.content.get("tokenizer_files", ()):
            self._read(f"{TOKENIZER}/{os.path.basename(name)}")

    def read(self, number, start, stop):
        """Return the token ids [start, stop) of a shard."""
        shard, size = self.shards[number], self.dtype.itemsize
        name = f"{shard['name']}.bin"
        try:
            if self.folder.is_local:
                ids = self._map_file(os.path.join(self.folder.path, name), self.dtype)[start:stop]
            else:
                content = self._read(name, start * size, stop * size) if stop > start else b""
                if len(content) != (stop - start) * size:
                    raise self._damaged(name, f"ends at byte {start * size + len(content):,}")
                ids = np.frombuffer(content, self.dtype)
        except (OSError, ValueError) as error:
            raise self._damaged(name, f"cannot be read: {first_line(error)}") from None
        if (largest := int(ids.max(initial=0))) > shard["max_id"]:
            raise self._damaged(name, f"is damaged: token id {largest} is above the largest that the index names")
        return ids

    def records(self, number):
        """Return the records of the documents of a shard."""
        name, count = f"{self.shards[number]['name']}.documents", self.shards[number]["records"]
        content = self._read(name)
        return np.frombuffer(content[len(content) - count * RECORD.itemsize :], RECORD)

    def hashes(self):
        """Yield the hash of each document."""
        for number, shard in enumerate(self.shards):
            yield from self.records(number)["hash"][int(shard["continues"]) :].tolist()

    def tokenizer_folder(self):
        """Return the folder of the tokenizer, downloaded once if it is remote."""

        def download(folder):
            for name in map(os.path.basename, self.content["tokenizer_files"]):
                (folder / name).write_bytes(self._read(f"{TOKENIZER}/{name}"))

        if self.folder.is_local:
            self._check_tokenizer()  # transformers would look for a missing file on the Hub
            return Path(self.folder.path, TOKENIZER)
        return cached_folder(["index's tokenizer", self.content["tokenizer"]], download)


def _map_file(path, dtype):
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # slices of a memmap take longer


def digest_shards(dtype, digests):
    return hashlib.sha256(json.dumps([dtype.name, digests]).encode()).hexdigest()


def _sizes(shard, dtype):
    """Return the sizes of a shard's files in bytes, by name."""
    records = shard["header"] + shard["records"] * RECORD.itemsize
    return {f"{shard['name']}.bin": shard["tokens"] * dtype.itemsize, f"{shard['name']}.documents": records}


def read_header(folder, name, dtype, sizes):
    """Return what the first line of a shard's documents says, if both files of the shard are whole; else None."""
    if f"{name}.documents" not in sizes or f"{name}.bin" not in sizes:
        return None
    try:
        line = folder.read(f"{name}.documents", 0, _HEADER_BYTES).partition(b"\n")[0]
        shard = json.loads(line) | {"header": len(line) + 1}
        is_whole = all(sizes[file] == size for file, size in _sizes(shard, dtype).items())
        records, tokens = folder.read(f"{name}.documents", shard["header"]), folder.read(f"{name}.bin")
    except (KeyError, TypeError, ValueError, FileNotFoundError):
        return None
    shard["documents_digest"] = hashlib.sha256(records).hexdigest()
    return shard if is_whole and hashlib.sha256(tokens).hexdigest() == shard["digest"] else None


# ---- documents that are held out


class Split:
    """Which documents of an index are held out for validation.

    Args:
        fraction: share of the documents.
        by_position: see [`HoldOut`].
    """

    def __init__(self, index, fraction, by_position=False):
        self.index, self.fraction, self.by_position = index, fraction, by_position
        self.hold_out = HoldOut(((None, item) for item in index.hashes()), fraction, by_position)
        self.chosen = None
        if self.hold_out.seen is not None:  # of few documents
            self.chosen = self.hold_out.choose(0, np.fromiter(index.hashes(), dtype=np.uint64))
        self.spans = functools.lru_cache(_OPEN_SHARDS)(self._find_spans)

    def mask(self, number, records):
        """Return which records of a shard are held out."""
        first = int(self.index.first_documents[number])
        if self.chosen is not None:
            return self.chosen[first : first + len(records)]
        return self.hold_out.choose(first, records["hash"])

    def totals(self):
        """Return of each shard the [`COUNTS`] of what is held out, computed once per machine."""
        key = ["split", self.index.digest, [shard["documents_digest"] for shard in self.index.shards]]
        key += [self.fraction, self.by_position]
        stored = self.index.content.get("held_out", {})
        if stored.get("val_fraction") == self.fraction and not self.by_position:
            return stored["counts"]
        folder = cached_folder(key, lambda folder: (folder / "counts.json").write_text(json.dumps(self.count())))
        return json.loads((folder / "counts.json").read_text())

    def count(self):
        return [self._count(number) for number in range(len(self.index.shards))]

    def _count(self, number):
        records = self.index.records(number)
        mask = self.mask(number, records)
        documents = mask.sum() - (mask[0] if self.index.shards[number]["continues"] else 0)
        return list(map(int, [documents, *(records[name][mask].sum(dtype=np.int64) for name in COUNTS[1:])]))

    def _find_spans(self, number, is_held_out):
        """Return where the tokens of a part of a shard begin, and how many of the part are before each such span."""
        records = self.index.records(number)
        used = self.mask(number, records) == is_held_out
        edges = np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)])
        changes = np.diff(used.astype(np.int8), prepend=0, append=0)
        begins, ends = edges[np.flatnonzero(changes == 1)], edges[np.flatnonzero(changes == -1)]
        return begins, np.concatenate([[0], np.cumsum(ends - begins)])


class ShardTokens:
    """The tokens of a shard that are held out or that are not, read when they are sliced, like an array.

    Args:
        split: None for all tokens.
    """

    def __init__(self, index, number, length, split, is_held_out):
        self.index, self.number, self.length, self.split, self.is_held_out = index, number, length, split, is_held_out

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        start, stop, _ = key.indices(self.length)
        if self.split is None or self.length == self.index.shards[self.number]["tokens"]:
            return self.index.read(self.number, start, stop)
        begins, counts = self.split.spans(self.number, self.is_held_out)
        first, last = np.searchsorted(counts, start, "right") - 1, np.searchsorted(counts, stop, "left")
        low = np.maximum(start - counts[first:last], 0) + begins[first:last]
        high = np.minimum(stop, counts[first + 1 : last + 1]) - counts[first:last] + begins[first:last]
        if first >= last:
            return self.index.read(self.number, 0, 0)
        ids = self.index.read(self.number, int(low[0]), int(high[-1]))
        parts = [ids[begin:end] for begin, end in zip(low - low[0], high - low[0], strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def document_digests(chunks):
    """Return a digest of the tokens of each document, or part of one in a shard, of some [`ShardTokens`]."""
    digests = [np.zeros(0, dtype=np.uint64)]
    for chunk in chunks:
        records = chunk.index.records(chunk.number)
        used = chunk.split.mask(chunk.number, records) == chunk.is_held_out if chunk.split else slice(None)
        digests.append(records["digest"][used])
    return np.concatenate(digests)


def split_chunks(index, fraction, by_position):
    """Return the tokens of an index that are not held out, and those that are, each as a list of chunks with the
    [`COUNTS`] of all of them."""
    whole = [[shard[name] for name in COUNTS] for shard in index.shards]
    split = Split(index, fraction, by_position) if fraction else None
    held_out = split.totals() if fraction else [[0] * len(COUNTS)] * len(whole)
    parts = []
    for is_held_out in (False, True):
        counts = held_out if is_held_out else np.subtract(whole, held_out).tolist()
        chunks = [
            ShardTokens(index, number, tokens, split, is_held_out) for number, (_, tokens, *_) in enumerate(counts)
        ]
        parts.append((chunks, dict(zip(COUNTS, np.sum(counts, axis=0).tolist(), strict=True))))
    return parts
