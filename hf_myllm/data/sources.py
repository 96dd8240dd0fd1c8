"""Data sources: files, data sets of the Hugging Face Hub, and data in memory."""

import functools
import hashlib
import io
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat, zip_longest
from pathlib import Path

import datasets
import pyarrow as pa

from ..errors import DataError, hide_secrets, library_errors, show
from . import discovery, remote, shards
from .cache import cached_folder, cached_path
from .columns import template_columns
from .discovery import TOKEN_ID_FORMATS, file_format, find_files

_CLOCK_TICK = 2_000_000_000  # nanoseconds; the clocks of file systems are coarser than the processor's
_HEAD_CHARS, _BLOCK_CHARS = 4096, 1 << 20  # read at once, to compare files


@dataclass(frozen=True)
class Source:
    """Files of one format, a data set of the Hub, or data in memory.

    Args:
        format: "text", "jsonl", "json", "csv", "parquet", "bin" or "pkl" for files; "hub"; "memory"; or "shards", an
            index of token shards.
        name: how messages refer to the source; for a Hub data set, its id.
        document: what one document of a text file is, "file" or "line".
        config, split, revision: of a Hub data set.
        num_duplicates: files that were listed more than once; each is read once.
        is_streamed: whether a Hub data set is read over the network instead of being downloaded first.
        max_chars: stop reading after this many characters, for a sample of the beginning; 0: read everything.
        data: the list of strings or the `datasets.Dataset` in memory, or the [`shards.Index`].
        fingerprint: a digest of the data in memory, or of the index.
        template: makes the text of several columns in place of text_column; see columns.py.
        deduplicate: whether documents that were read before are left out.
        max_rows: how many rows to use, from the beginning; 0: all.
    """

    format: str
    name: str
    files: tuple[str, ...] = ()
    text_column: str = "text"
    document: str = "file"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    num_duplicates: int = 0
    is_streamed: bool = False
    max_chars: int = 0
    data: object = field(default=None, compare=False, repr=False)
    fingerprint: str = ""
    template: str = ""
    deduplicate: bool = False
    max_rows: int = 0

    def open_files(self):
        """Return the files, of which remote ones are downloaded, unless the source is streamed or only sampled."""
        for file in self.files:
            if not (self.is_streamed or self.max_chars or self.max_rows):
                remote.local_path(file)
            yield file

    @property
    def text_columns(self):
        """The names of the columns that hold the text."""
        return tuple(template_columns(self.template)) if self.template else (self.text_column,)


def file_source(spec, text_column="text", document="file"):
    """Return the source for `train_file` or `val_file`.

    Args:
        spec: a file, a glob, a folder, or a list of them, each also as a URL; `{stdlib}` is replaced by Python's
            standard library folder.
    Raises:
        DataError: a file is missing, empty or not readable, nothing matches, or the files have different formats.
    """
    name, files = hide_secrets(spec if isinstance(spec, str) else " ".join(spec)), {}
    if (path := index_path(spec)) is not None:
        index = shards.Index(path)
        return Source("shards", name, document="row", data=index, fingerprint=index.digest)
    paths = find_files(spec)
    for path in paths:
        # the same file may be listed twice or linked
        files.setdefault(path if remote.is_remote(path) else os.path.realpath(path), path)
    formats = {file_format(file) for file in files.values()}
    if len(formats) > 1:
        raise DataError(f"{name}: files of several formats ({', '.join(sorted(formats))}); give files of one format")
    if all(remote.file_size(file) == 0 for file in files.values()):
        raise DataError(f"{name} is empty; give a file with text in it")
    duplicates = len(paths) - len(files)
    return Source(formats.pop(), name, tuple(files.values()), text_column, document, num_duplicates=duplicates)


def index_path(spec):
    """Return the path or URL of an index of token shards if `train_file` is one, or a folder with one; else None."""
    if isinstance(spec, (list, tuple)):
        (spec,) = spec if len(spec) == 1 else ("",)
    spec = remote.without_file_scheme(spec)
    if remote.is_remote(spec):
        return spec if remote.file_name(spec) == shards.INDEX else None
    return next((path for path in (spec, os.path.join(spec, shards.INDEX)) if shards.is_index(path)), None)


def check_disjoint(training, validation):
    """Raise DataError if the validation source is also trained on, in whole or in part.

    Args:
        training: list of sources.
    """
    by_head = {}
    for source in training:
        if source.data is not None and source.fingerprint == validation.fingerprint:
            raise DataError(f"{validation.name}: it holds the same texts as {source.name}; leave it out or give others")
        for file in source.files if validation.files else ():
            by_head.setdefault(_head(file), []).append(file)
    for file in validation.files:
        head = _head(file)
        for other in by_head.get(head, ()) if head else ():
            is_same = remote.is_remote(file) or os.path.samefile(file, other)
            if is_same or all(a == b for a, b in zip_longest(_blocks(file), _blocks(other))):
                name = "" if file == other or os.path.abspath(file) == os.path.abspath(other) else f", as {other}"
                raise DataError(
                    f"val_file: {file} is also a training file{name}; name only the others in train_file, or leave out "
                    "val_file to hold out a part"
                )


def check_prepared(sources, **keys):
    """Raise DataError if all sources are token shards, and those are of a text read with other values of some keys."""
    if any(source.format != "shards" for source in sources):
        return
    for source in sources:
        facts = source.data.content.get("source", {})
        for name, value in keys.items():
            if value not in (None, "file", facts.get(name)):
                raise DataError(
                    f"{name}: it has no effect on {source.name}, whose text was read with {name} "
                    f"{show(facts.get(name))}; leave it out, or prepare the text with this one"
                )


def _head(file):
    """Return what equal files share: the beginning of a file here, what identifies the content of a remote one."""
    return repr(remote.content_key(file, samples=1)) if remote.is_remote(file) else next(_blocks(file), "")


def _blocks(file):
    """Yield the beginning of a file in blocks, decompressed and with "\\n" at the ends of lines, to compare files."""
    try:
        with open(file, "rb") as raw:
            stream = discovery.COMPRESSIONS.get(Path(file).suffix.lower(), lambda raw: raw)(raw)
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            for size in (_HEAD_CHARS, *repeat(_BLOCK_CHARS, discovery.FREE_BYTES // _BLOCK_CHARS)):
                if not (block := text.read(size)):
                    return
                yield block
    except Exception:  # decompressors raise many classes of errors; reading the file will report the problem
        return


def with_template(source, template):
    """Return a source whose texts are made by a template, in place of its text column.

    Raises:
        DataError: it has no columns.
    """
    if source.format in ("text", *TOKEN_ID_FORMATS):
        raise DataError(f"template: {source.name} has no columns; give .jsonl, .json, .csv, .tsv, .parquet or Hub data")
    return replace(source, template=template)


def hub_source(name, config=None, split="train", revision=None, text_column="text"):
    """Return the source for `dataset`, a data set of the Hub.

    Raises:
        DataError: the name is a local path.
    """
    if os.path.exists(name):
        raise DataError(f"dataset {name} is a path here, not a data set of the Hub; give it as --train_file")
    return Source("hub", name, (), text_column, "row", config, split, revision)


def in_memory_source(data, name, text_column="text", document="file"):
    """Return the source for `train_data` or `eval_data` of the Python API.

    Args:
        data: a list of strings, each a document; a `datasets.Dataset`; a list of `Path`s; or a path, glob or folder as
            in a recipe.
        name: how messages refer to the data, such as "train_data".
        text_column, document: see [`Source`].
    Raises:
        DataError: the data is empty, has another type, or an item of the list is not a string.
    """
    if isinstance(data, (str, os.PathLike)):
        return file_source(os.fspath(data), text_column, document)
    if isinstance(data, (list, tuple)) and data and all(isinstance(path, os.PathLike) for path in data):
        return file_source([os.fspath(path) for path in data], text_column, document)
    if not isinstance(data, (list, tuple, datasets.Dataset)):
        expected = "a list of strings, a datasets.Dataset or a path"
        raise DataError(f"{name}: expected {expected}, got {type(data).__name__}; convert it first")
    if len(data) == 0:
        raise DataError(f"{name} is empty; give at least one text")
    if isinstance(data, datasets.Dataset):
        data = data.with_format(None)
        fingerprint = data._fingerprint
    else:
        digest = hashlib.sha256()
        for index, text in enumerate(data, start=1):
            if not isinstance(text, str):
                raise DataError(f"{name} row {index}: expected a string, got {type(text).__name__}; convert it first")
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if all(len(text) < 4096 and os.path.isfile(text) for text in data):
            raise DataError(f"{name}: its strings are names of files; give their texts, or a list of pathlib.Path")
        fingerprint = digest.hexdigest()
    return Source("memory", name, (), text_column, "row", data=data, fingerprint=fingerprint)


def source_key(source):
    """Return what a cached result of this source depends on, as JSON values.

    A file is identified by its path and the digest of its content, not by its times. The digest is cached by the file's
    size, times and inode. A stream, or a sample of the beginning, is not read whole: its files are identified by these.

    Raises:
        DataError: a file no longer exists.
    """
    key = asdict(replace(source, files=(), data=None))
    for name in ("template", "deduplicate", "max_rows"):  # keys that version 0.1 did not have
        if not key[name]:
            del key[name]
    if source.format == "hub":  # an unpinned revision may have changed
        return key if source.is_streamed else key | {"fingerprint": load_hub(source)._fingerprint}
    key |= {"name": "", "num_duplicates": 0}
    if source.is_streamed or source.max_chars or source.max_rows:
        return key | {"files": file_states(source)}
    paths = [hide_secrets(file) if remote.is_remote(file) else os.path.abspath(file) for file in source.files]
    return key | {"files": list(zip(paths, _digests(source), strict=True))}


def known_whole(source):
    """Return the whole of a sampled source, or None if nothing was made of the whole yet."""
    keys = [["digests", file_states(source), is_final] for is_final in (True, False)] if source.max_chars else []
    if keys and (not source.files or any(cached_path(key).exists() for key in keys)):
        return replace(source, max_chars=0)


def file_states(source):
    """Return (path, size, times of modification and of any change, inode) of each file, which are quick to look up; of
    a remote file what identifies its content."""
    with library_errors(f"{source.name} cannot be read", catches=OSError):
        return [_file_state(file) for file in source.files]


def _file_state(file):
    if remote.is_remote(file):
        return hide_secrets(file), remote.content_key(file, samples=1), 0, 0, 0
    stat = os.stat(file)
    return os.path.abspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _digests(source):
    """Return a digest of the content of each file."""

    def measure():
        return list(map(remote.content_key, source.files))

    if any(map(remote.is_remote, source.files)):
        return measure()
    states = file_states(source)
    # a second write within one tick of the clock would leave the same times
    is_final = time.time_ns() - max((changed for *_, changed, _ in states), default=0) > _CLOCK_TICK
    key = ["digests", states, is_final]
    folder = cached_folder(key, lambda folder: (folder / "digests.json").write_text(json.dumps(measure())))
    return json.loads((folder / "digests.json").read_text()) if is_final else measure()


def total_size(source):
    """Return the size of a source in the unit of progress reports: bytes of files, or rows; None if it is unknown."""
    if source.format == "memory":
        return len(source.data)
    if source.format == "hub":
        return _count_hub_rows(source) if source.is_streamed else len(load_hub(source))
    if source.format == "parquet":
        try:
            return sum(remote.open_parquet(file).metadata.num_rows for file in source.open_files())
        except (OSError, DataError, pa.ArrowException):
            return None  # reading the file will report the error
    sizes = list(map(remote.file_size, source.files))
    return None if None in sizes else sum(sizes)


def _count_hub_rows(source):
    try:
        info = datasets.load_dataset_builder(source.name, source.config, revision=source.revision).info
        return info.splits[source.split].num_examples or None
    except Exception:  # the size is only needed for progress reports
        return None


def stream_hub(source):
    """Return a Hub data set as a `datasets.IterableDataset`."""
    return datasets.load_dataset(
        source.name, source.config, split=source.split, revision=source.revision, streaming=True
    )


@functools.cache
def load_hub(source):
    """Return a Hub data set as a `datasets.Dataset`, downloaded or from the cache of `datasets`."""
    advice = "; to train without the Hub, pass --train_file FILE (.txt, .jsonl, .csv, .parquet or .bin)"
    with library_errors(f"data set '{source.name}' cannot be loaded from the Hugging Face Hub", advice=advice):
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
