"""Text into tokens on disk: tokenized once, memory-mapped, and read by index.

The tokens of a text corpus lie in an Arrow file of the `datasets` cache, each document closed by the end-of-text token;
a `.bin` of token ids is read where it is, and a `.pkl` of them is copied into such a file. Either way a run sees one
flat stream ([`Tokens`]).
"""

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sysconfig
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from pyarrow import parquet
from tqdm import tqdm

from ..errors import InputError, first_line
from .pickled import read_ids
from .tokenizer import end_of_document
from .tokenizer import fingerprint as tokenizer_fingerprint

_FORMAT = 3  # of the cache: raise it when what is cached changes
# any other suffix is plain text
_KINDS = {".jsonl": "json", ".parquet": "parquet", ".bin": "bin", ".pkl": "pkl", ".pickle": "pkl"}
OF_IDS = ("bin", "pkl")  # the kinds that hold token ids, and need no tokenizer
_PIECE = 100_000  # characters: a longer document is tokenized in pieces
_LINE = re.compile(r"\n(?=\S)")
_BATCH = 1_000_000  # characters tokenized at once: enough for every core, and some 200 bytes of memory for each


@dataclass(frozen=True)
class Source:
    """Where text comes from: files of one kind ("text", "json", "parquet", "bin", "pkl"), or a Hub data set ("hub")."""

    kind: str
    name: str
    files: tuple[str, ...] = ()
    text_column: str = "text"
    document: str = "file"
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class Tokens:
    """A stream of token ids, in one or more arrays of which only what is read comes into memory.

    Args:
        chunks: one-dimensional arrays of unsigned integers.
        fingerprint: a digest of the stream's content.
        max_id: the largest id in it.
        position_of_max: where in the stream that id stands first.
    """

    def __init__(self, chunks, fingerprint, max_id, position_of_max=0):
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        self.fingerprint, self.max_id, self.position_of_max = fingerprint, max_id, position_of_max

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

    def split(self, position):
        """The stream before a position, and from it on."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        offset = position - int(self.starts[number])
        before = [*self.chunks[:number], self.chunks[number][:offset]]
        after = [self.chunks[number][offset:], *self.chunks[number + 1 :]]
        return (
            Tokens(before, f"{self.fingerprint}[:{position}]", self.max_id, self.position_of_max),
            Tokens(after, f"{self.fingerprint}[{position}:]", self.max_id, self.position_of_max),
        )


def file_source(spec, text_column="text", document="file"):
    """The source that `train_file` or `val_file` names: a file, a glob, a folder, or a list of them.

    Raises:
        InputError: a file is missing, empty or not readable, nothing matches, or the kinds are mixed.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    files = []
    for pattern in patterns:
        files += _expand(pattern)
    for file in files:
        if not os.path.isfile(file):
            raise InputError(f"{file} is not a file")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file} cannot be read: no permission")
        if Path(file).suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"):
            raise InputError(f"{file} is compressed: decompress it first")
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise InputError(f"{' '.join(patterns)}: files of several kinds ({', '.join(sorted(kinds))}); give one kind")
    if all(os.path.getsize(file) == 0 for file in files):
        raise InputError(f"{' '.join(patterns)} is empty; give a file with text in it")
    return Source(kinds.pop(), " ".join(patterns), tuple(files), text_column, document)


def _kind(file):
    return _KINDS.get(Path(file).suffix.lower(), "text")


def _expand(pattern):
    path = pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"])
    if os.path.isdir(path):
        endings = (".txt", *_KINDS)
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in endings)
        if found := [file for file in found if not os.path.isdir(file)]:
            return found
        raise InputError(f"folder {pattern} holds no .txt, .jsonl, .parquet, .bin or .pkl; give a glob: {pattern}/*.md")
    if os.path.exists(path):
        return [path]
    found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not found:
        raise InputError(f"{pattern} does not exist (looked in {os.getcwd()})")
    return found


def hub_source(name, config=None, split="train", revision=None, text_column="text"):
    """The source that `dataset` names.

    Raises:
        InputError: it is a path here, which is for train_file to name.
    """
    if os.path.exists(name):
        raise InputError(f"dataset {name} is a path here, not a data set of the Hub: give it as --train_file")
    return Source("hub", name, (), text_column, "row", config, split, revision)


@dataclass(frozen=True)
class Documents:
    """The documents of a source, to be read as often as one likes."""

    source: Source

    def __iter__(self):
        return read_documents(self.source)


def read_documents(source, progress=None):
    """The documents of a source, one text after another; empty ones are left out.

    Args:
        progress: called with the bytes read since the last call.
    Raises:
        InputError: a file is not UTF-8 (with the offset), the column is missing or does not hold text, or the Hub
            cannot be reached.
    """
    progress = progress or (lambda count: None)
    if source.kind in OF_IDS:
        raise InputError(f"{source.name} holds token ids, not text: a tokenizer cannot be trained on it")
    if source.kind == "text":
        for file in source.files:
            with _open(file) as lines:
                offset = 0
                for part in [lines.read()] if source.document == "file" else lines:
                    text = _decode(part, file, offset)
                    offset += len(part)
                    progress(len(part))
                    if text.strip():
                        yield text
        return
    for where, row in _read_json_lines(source, progress) if source.kind == "json" else _load_rows(source):
        text = row.get(source.text_column)
        if text is None and source.text_column not in row:
            columns = f"{source.text_column!r}, but {', '.join(map(repr, row))}"
            raise InputError(f"{where} has no column {columns}; name it with --text_column")
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: column '{source.text_column}' does not hold text: {text!r:.80}")
        if text and text.strip():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{where}: half a character (a lone surrogate) at place {error.start}") from None
            yield text


def _open(file):
    try:
        return open(file, "rb")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _decode(part, file, offset):
    try:
        return part.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte 0x{part[error.start]:02x} at offset {offset + error.start}; convert it, "
            f"for example with iconv -f latin1 -t utf-8"
        ) from None


def _read_json_lines(source, progress):
    for file in source.files:
        with _open(file) as lines:
            offset = 0
            for number, line in enumerate(lines, start=1):
                where = f"{file} line {number}"
                text = _decode(line, file, offset)
                offset += len(line)
                progress(len(line))
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where} is not JSON: {error}; each line must be an object of its own") from None
                if not isinstance(row, dict):
                    raise InputError(f"{where} is not an object with columns: {text.strip():.80}")
                yield where, row


def _load_rows(source):
    try:
        if source.kind == "hub":
            rows = _load_hub(source)
        else:
            if not any(parquet.read_metadata(file).num_rows for file in source.files):
                raise InputError(f"{source.name} has no rows; give a file with text in it")
            rows = datasets.load_dataset("parquet", data_files=list(source.files), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{source.name} row {number}", row
    except InputError:
        raise
    except Exception as error:  # the library's errors, its parsers' and the network's are of many classes
        raise InputError(
            f"{source.name} cannot be read as {source.kind}: {first_line(error.__cause__ or error)[:300]}"
        ) from None


@functools.cache
def _load_hub(source):
    try:
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        raise InputError(
            f"data set '{source.name}' cannot be loaded from the Hugging Face Hub ({first_line(error)[:200]}); to "
            "train without the Hub, pass --train_file FILE (.txt, .jsonl, .parquet or .bin)"
        ) from None


def load_tokens(source, tokenizer, val_fraction=0.0, bin_dtype="auto", show_progress=False):
    """A source as token streams, tokenized now or found in the cache.

    Every process may call this: a lock lets one of each machine do the work, while the others wait for it.

    Args:
        tokenizer: needed for text; for a .bin it only tells which number type to expect.
        val_fraction: share of the documents to hold out, evenly spread over the corpus. Where there are too few
            documents to hold one out, and in a .bin, it is that share of the tokens, at the end.
    Returns:
        training and validation [`Tokens`], and a dict with the counts of documents, tokens and bytes of text;
        validation is None when val_fraction is 0.
    Raises:
        InputError: the source cannot be read, or holds no token.
    """
    if source.kind in OF_IDS:
        training, account = _open_ids(source, tokenizer, bin_dtype)
        held_out = None
    else:
        training, held_out, account = _open_tokenized(source, tokenizer, val_fraction, show_progress)
    if val_fraction and held_out is None:
        training, held_out = training.split(int(len(training) * (1 - val_fraction)))
        if len(training) == 0:
            raise InputError(f"val_fraction {val_fraction} leaves nothing of {source.name} to train on: lower it")
        account["held_out"] = f"the last {val_fraction:.0%} of the tokens"
    return training, held_out, account


def _cache(key):
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_myllm" / digest


def cached_folder(key, make):
    """The folder of the cache that `make(folder)` fills, made now unless it is there already; whole or not at all."""
    folder = _cache(key)
    if folder.exists():
        return folder
    aside = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(aside, ignore_errors=True)  # a process that was killed may have left one
                aside.mkdir()
                try:
                    make(aside)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"the cache {folder.parent} cannot be written: {error}; HF_HOME names another place") from None
    return folder


def source_key(source):
    """What a cached result of this source depends on; files by size and time of change, which is quick to look up."""
    if source.kind == "hub":  # an unpinned revision may have moved on
        return asdict(source) | {"fingerprint": _load_hub(source)._fingerprint}
    stats = [(os.path.abspath(file), os.stat(file)) for file in source.files]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return asdict(replace(source, files=(), name="")) | {"files": files}


def _open_tokenized(source, tokenizer, val_fraction, show_progress):
    key = ["tokens", source_key(source), tokenizer_fingerprint(tokenizer), end_of_document(tokenizer), val_fraction]
    folder = cached_folder(key, lambda aside: _tokenize(source, tokenizer, val_fraction, aside, show_progress))
    account = json.loads((folder / "account.json").read_text())
    streams = {}
    for part in ("train", "validation"):
        if account[part]["tokens"]:
            column = datasets.Dataset.from_file(str(folder / f"{part}.arrow")).data.column("input_ids")
            chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
            streams[part] = Tokens(chunks, account[part]["fingerprint"], account[part]["max_id"])
    return streams["train"], streams.get("validation"), account


def _tokenize(source, tokenizer, val_fraction, folder, show_progress):
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = end_of_document(tokenizer)
    parts = {part: _Part(folder / f"{part}.arrow", dtype) for part in ("train", "validation")}
    total = sum(os.path.getsize(file) for file in source.files) if source.kind in ("text", "json") else None
    silent = None if show_progress else True  # None: only on a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=silent, leave=False, delay=1) as bar:
        number = 0
        for batch in _batches(read_documents(source, bar.update), cuts_cleanly(tokenizer)):
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(
                [text for text, _ in batch], add_special_tokens=False
            )
            rows = {"train": [], "validation": []}
            for (text, is_end), encoding in zip(batch, encoded, strict=True):
                # the share of documents held out so far reaches one more: 0.05 holds out the 10th, 30th, 50th ...
                is_held_out = int((number + 1) * val_fraction + 0.5) > int(number * val_fraction + 0.5)
                part = "validation" if is_held_out else "train"
                rows[part].append(np.array([*encoding.ids, *end] if is_end else encoding.ids, dtype=dtype))
                parts[part].bytes += len(text.encode())
                parts[part].documents += is_end
                parts[part].unknown += encoding.ids.count(tokenizer.unk_token_id)
                number += is_end
            for part, pieces in rows.items():
                parts[part].write(pieces)
    account = {part: writer.close() for part, writer in parts.items()}
    if account["train"]["tokens"] == 0:
        if account["validation"]["tokens"]:
            raise InputError(f"val_fraction {val_fraction} leaves nothing of {source.name} to train on: lower it")
        raise InputError(f"{source.name} holds no text")
    (folder / "account.json").write_text(json.dumps(account))


def cuts_cleanly(tokenizer):
    """Whether text may be cut before a line and give the same tokens: byte-level tokenizers that put no space before
    a text, and split it at line breaks before anything else."""
    if any(character.isspace() for token in tokenizer.get_added_vocab() for character in token):
        return False  # which may stand across the cut
    splitter = repr(tokenizer.backend_tokenizer.pre_tokenizer)
    return splitter.startswith("ByteLevel(add_prefix_space=False") and "use_regex=True" in splitter


def _batches(texts, in_pieces):
    """Lists of (text, whether it ends a document), of about `_BATCH` characters each."""
    batch, size = [], 0
    for text in texts:
        pieces = _pieces(text) if in_pieces else [text]
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text):
    """A long text cut before a line break that something other than white space follows: GPT-2's splitting never joins
    such a break to what is before it."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        match = _LINE.search(text, start + _PIECE)
        if match is None:
            break
        pieces.append(text[start : match.start()])
        start = match.start()
    return [*pieces, text[start:]]


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
    if source.kind == "bin":
        chunks = [_map_bin(file, tokenizer, bin_dtype) for file in files]
    else:
        chunks = [_map_pickle(replace(source, files=(file,))) for file in files]

    def measure(folder):  # once, for it reads every token
        digest, max_id, position, seen = hashlib.sha256(), -1, 0, 0
        for chunk in chunks:
            for start in range(0, len(chunk), 1 << 24):
                block = np.asarray(chunk[start : start + (1 << 24)])
                digest.update(block)
                if int(block.max()) > max_id:
                    max_id, position = int(block.max()), seen + start + int(block.argmax())
            seen += len(chunk)
        account = {"max_id": max_id, "position_of_max": position, "fingerprint": digest.hexdigest()}
        (folder / "account.json").write_text(json.dumps(account))

    folder = cached_folder(["ids", source_key(source), [str(chunk.dtype) for chunk in chunks]], measure)
    tokens = Tokens(chunks, **json.loads((folder / "account.json").read_text()))
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


def _map_pickle(source):
    """The ids of one pickle, memory-mapped: unpickled once, and kept in the cache."""
    folder = cached_folder(
        ["pickle", source_key(source)], lambda aside: np.save(aside / "ids.npy", read_ids(source.files[0]))
    )
    return np.load(folder / "ids.npy", mmap_mode="r")


def _map_bin(file, tokenizer, bin_dtype):
    size = os.path.getsize(file)
    dtype = np.dtype(np.uint16 if bin_dtype == "auto" else bin_dtype).newbyteorder("<")
    if bin_dtype == "auto" and size % 4 == 0:
        halves = np.fromfile(file, dtype="<u2", count=4096)
        is_large = tokenizer is not None and len(tokenizer) > 1 << 16
        if len(halves) % 4 == 0 and halves[::4].any() and not halves.reshape(-1, 4)[:, 1:].any():
            raise InputError(f"{file} holds 64-bit numbers: write the ids as uint16 or uint32")
        if is_large or not halves[1::2].any():  # 32-bit ids of a usual vocabulary have nothing in their upper half
            dtype = np.dtype("<u4")
    if size % dtype.itemsize:
        raise InputError(
            f"{file} is cut short: {size} bytes is not a whole number of {dtype.itemsize}-byte token ids; "
            "copy or write it again"
        )
    return np.memmap(file, dtype=dtype, mode="r")
