"""Where text comes from: files of many kinds, compressed or not, or data sets of the Hub; read as documents."""

import bz2
import functools
import glob
import gzip
import io
import lzma
import os
import sysconfig
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from ..errors import InputError, first_line

# any other suffix is plain text
_KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_KINDS |= {".bin": "bin", ".pkl": "pkl", ".pickle": "pkl"}
TOKEN_ID_FORMATS = ("bin", "pkl")  # the kinds that hold token ids, and need no tokenizer
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda raw: _unpack_zst(raw)}


@dataclass(frozen=True)
class Source:
    """Files of one kind ("text", "jsonl", "json", "csv", "parquet", "bin", "pkl"), or a Hub data set ("hub")."""

    format: str
    name: str
    files: tuple[str, ...] = ()
    text_column: str = "text"
    document: str = "file"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    num_duplicates: int = 0  # files that were named twice, and are read once
    is_streamed: bool = False  # of the Hub: read from there, rather than downloaded first
    max_chars: int = 0  # characters after which reading stops, for a quick look; 0: none


def file_source(spec, text_column="text", document="file"):
    """The source that `train_file` or `val_file` names: a file, a glob, a folder, or a list of them.

    Raises:
        InputError: a file is missing, empty or not readable, nothing matches, or the kinds are mixed.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    name, found, files = " ".join(patterns), [], {}
    for pattern in patterns:
        found += _expand(pattern)
    for file in found:
        if not os.path.isfile(file):
            raise InputError(f"{file} is not a file")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file} cannot be read: no permission")
        if Path(file).suffix.lower() in (".zip", ".tar", ".tgz", ".7z", ".rar"):
            raise InputError(f"{file} is an archive: unpack it first")
        if file_format(file) in ("parquet", *TOKEN_ID_FORMATS) and Path(file).suffix.lower() in COMPRESSIONS:
            raise InputError(f"{file} is compressed, and its kind is read in place: decompress it first")
        files.setdefault(os.path.realpath(file), file)  # one file by two names, or by a link that leads back
    kinds = {file_format(file) for file in files.values()}
    if len(kinds) > 1:
        raise InputError(f"{name}: files of several kinds ({', '.join(sorted(kinds))}); give one kind")
    if all(os.path.getsize(file) == 0 for file in files):
        raise InputError(f"{name} is empty; give a file with text in it")
    repeated = len(found) - len(files)
    return Source(kinds.pop(), name, tuple(files.values()), text_column, document, num_duplicates=repeated)


def file_format(file):
    path = Path(file)
    return _KINDS.get(Path(path.stem if path.suffix.lower() in COMPRESSIONS else path).suffix.lower(), "text")


def _expand(pattern):
    path = pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"])
    if os.path.isdir(path):
        endings = (".txt", *_KINDS)
        found = [file for file in Path(path).rglob("*") if file.suffix.lower() in (*endings, *COMPRESSIONS)]
        found = sorted(str(file) for file in found if file_format(file) != "text" or ".txt" in file.name.lower())
        if found := [file for file in found if not os.path.isdir(file)]:
            return found
        raise InputError(f"folder {pattern} holds no {', '.join(endings)}; give a glob: {pattern}/*.md")
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


def source_key(source):
    """What a cached result of this source depends on; files by size and time of change, which is quick to look up.

    Raises:
        InputError: a file is no longer there.
    """
    if source.format == "hub" and source.is_streamed:
        return asdict(source)
    if source.format == "hub":  # an unpinned revision may have moved on
        return asdict(source) | {"fingerprint": load_hub(source)._fingerprint}
    try:
        stats = [(os.path.abspath(file), os.stat(file)) for file in source.files]
    except OSError as error:
        raise InputError(f"{source.name} cannot be read: {error}") from None
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return asdict(replace(source, files=(), name="", num_duplicates=0)) | {"files": files}


def total_size(source):
    """How much there is to read, in what `progress` is told: bytes, or the rows of a data set."""
    if source.format == "hub":
        return _count_hub_rows(source) if source.is_streamed else len(load_hub(source))
    if source.format == "parquet":
        try:
            return sum(parquet.read_metadata(file).num_rows for file in source.files)
        except (OSError, pa.ArrowException):
            return None  # which is said when it is read
    return sum(os.path.getsize(file) for file in source.files)


def _unpack_zst(raw):
    return io.BufferedReader(pa.input_stream(raw, compression="zstd"))


def _count_hub_rows(source):
    """What the Hub says, if it does."""
    try:
        info = datasets.load_dataset_builder(source.name, source.config, revision=source.revision).info
        return info.splits[source.split].num_examples or None
    except Exception:
        return None


def stream_hub(source):
    return datasets.load_dataset(
        source.name, source.config, split=source.split, revision=source.revision, streaming=True
    )


@functools.cache
def load_hub(source):
    try:
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        raise InputError(
            f"data set '{source.name}' cannot be loaded from the Hugging Face Hub ({first_line(error)[:200]}); to "
            "train without the Hub, pass --train_file FILE (.txt, .jsonl, .csv, .parquet or .bin)"
        ) from None
