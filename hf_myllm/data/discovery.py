"""Find the files that a path, folder or glob stands for, and tell what they hold by name and by content."""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import sysconfig
from pathlib import Path

import pyarrow as pa

from ..errors import DataError
from ..files import LFS_POINTER
from . import remote

# by suffix; a file with another suffix is plain text
_FORMATS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl")
_FORMATS |= {".bin": "bin", ".pkl": "pkl", ".pickle": "pkl"}
TOKEN_ID_FORMATS = ("bin", "pkl", "shards")  # token ids, which need no tokenizer
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_MISNAMED = (".pq", ".parq", ".arrow", ".feather", ".gzip", ".bzip2", ".zstd")  # refused, not left out of a folder


def _open_zstd(raw):
    return io.BufferedReader(pa.input_stream(raw, compression="zstd"))


COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}

# (first bytes, what they are, suffixes or formats that hold them, what to do). Each pattern has four bytes or more, so
# that token ids do not match one by chance.
_SIGNATURES = [
    (re.compile(pattern, re.DOTALL), name, allowed, advice)
    for pattern, name, allowed, advice in (
        (re.escape(LFS_POINTER) + rb"\r?\n", "a Git LFS pointer", (), "fetch it with git lfs pull"),
        (rb"/annex/objects/", "a git-annex pointer", (), "fetch it with git annex get"),
        (rb"\x1f\x8b\x08[\0-\x1f].{4}[\0\x02\x04][\0-\x0d\xff]", "gzip", (".gz",), "call it .gz"),
        (rb"BZh[1-9]1AY&SY", "bzip2", (".bz2",), "call it .bz2"),
        (rb"\xfd7zXZ\0", "xz", (".xz",), "call it .xz"),
        (rb"\x28\xb5\x2f\xfd", "zstd", (".zst",), "call it .zst"),
        (rb"PAR1\x15", "Parquet", ("parquet",), "call it .parquet"),
        (rb"ARROW1|\xff{4}.{2}\0\0", "Arrow", (), "convert it: datasets.Dataset.from_file(FILE).to_parquet(NEW_FILE)"),
        (rb"\x93NUMPY", "a NumPy array", (), "write token ids with array.astype('uint16').tofile('ids.bin')"),
        (rb"\x89HDF\r\n|SQLite format 3\0|Obj\x01", "a database file", (), "export it as .jsonl or .parquet"),
        (rb".{4}\0{4}\{\"|GGUF[\1-\t]|\x7fELF", "a model or a program", (), "give the data, not the model"),
        (rb"PK\x03\x04.{26}(\[Content_Types|_rels/|mimetype)", "an office document", (), "export it as .csv or .txt"),
        (rb"PK\x03\x04", "a zip archive", ("pkl",), "unpack it, or call it .pkl if torch.save wrote token ids"),
        (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a|.{257}ustar(\0|  \0)", "an archive", (), "unpack it"),
        (rb"\x80[\x02-\x05][\x8c\x95\]\}c(]", "a pickle", ("pkl", "bin"), "call it .pkl if it holds token ids"),
        (rb"%PDF-|\xd0\xcf\x11\xe0|\{\\rtf", "a document of a word processor", (), "save its text as .txt"),
        (
            rb"\x89PNG|\xff\xd8\xff[\xdb-\xee]|GIF8[79]a|RIFF.{4}(WAVE|WEBP|AVI )|OggS\0|fLaC\0|ID3[\2-\4]|.{4}ftyp",
            "a picture or sound",
            (),
            "give text",
        ),
    )
]
_HEAD_BYTES, _CHECKED_URLS = 512, 8  # of many remote files, the first ones are checked before they are read
# Limits for hostile files, which may expand a thousandfold. The longest line, JSON object or CSV field:
MAX_LINE_CHARS = int(os.environ.get("HF_MYLLM_MAX_LINE_CHARS", 1 << 28))
MAX_RATIO = 200  # of decompressed to compressed bytes, once a file has expanded to FREE_BYTES; text has 3 to 50
FREE_BYTES = 1 << 28


def find_files(spec):
    """Return the paths that `train_file` or `val_file` stands for.

    Args:
        spec: a file, a glob, a folder, or a list of them, each also as a URL; `{stdlib}` is replaced by Python's
            standard library folder.
    Raises:
        DataError: a file is missing or not readable, nothing matches, or a file does not hold what its name says.
    """
    paths = [path for pattern in ([spec] if isinstance(spec, str) else spec) for path in _expand(pattern)]
    urls = list(filter(remote.is_remote, paths))
    for path in paths:
        _check_file(path, reads_content=path not in urls[_CHECKED_URLS:])
    return paths


def _expand(pattern):
    """Return the paths that a file, folder or glob stands for."""
    path = remote.without_file_scheme(pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"]))
    if remote.is_remote(path):
        return remote.list_files(path, _is_data)
    if os.path.isdir(path):
        if files := sorted(_list_folder(path)):
            return files
        raise DataError(f"folder {pattern} holds no {', '.join(('.txt', *_FORMATS))}; give a glob: {pattern}/*.md")
    if os.path.exists(path):
        return [path]
    parent = path  # the part of the path that exists, in which *, ? and [ are characters of names
    while not os.path.lexists(parent) and os.path.dirname(parent) != parent:
        parent = os.path.dirname(parent)
    matches = glob.glob(glob.escape(parent) + path[len(parent) :], recursive=True)
    files = sorted(file for file in matches if os.path.isfile(file))
    if not files:
        problem = f"does not exist (looked in {os.getcwd()})"
        if os.path.islink(path):
            problem = f"is a link to {os.readlink(path)}, which does not exist; correct it"
        elif any(map(os.path.isdir, matches)):
            problem = f"matches folders only; give one of them, or a glob of files: {pattern}/*.txt"
        raise DataError(f"{pattern} {problem}")
    return files


def _list_folder(folder):
    """Yield the data files below a folder: linked folders are followed, hidden files and folders left out."""
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:  # a link to a folder above it
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
            raise DataError(
                f"{parent} is a folder of save_to_disk; give a Parquet file: datasets.load_from_disk({parent!r})"
                ".to_parquet('data.parquet') (of one split)"
            )
        yield from (os.path.join(parent, name) for name in names if _is_data(name))


def _is_data(name):
    """Return whether a file of a folder is data, by its name."""
    suffix = Path(name).suffix.lower()
    is_data = suffix in (".txt", *_FORMATS, *COMPRESSIONS, *_MISNAMED)
    is_text = file_format(name) == "text" and suffix not in _MISNAMED
    return is_data and not name.startswith(".") and (not is_text or content_suffix(name) == ".txt")


def _raise_unreadable(error):
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}; correct it or leave it out")


def _check_file(path, reads_content=True):
    suffix, is_here = file_suffix(path), not remote.is_remote(path)
    if is_here and not os.path.isfile(path):
        raise DataError(f"{path} is not a file")
    if is_here and not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: no permission")
    if suffix in _ARCHIVES:
        raise DataError(f"{path} is an archive: unpack it first")
    if suffix in COMPRESSIONS and file_format(path) in ("parquet", *TOKEN_ID_FORMATS):
        raise DataError(f"{path} is compressed, but files of this format are memory-mapped; decompress it first")
    if not reads_content:
        return
    with remote.open_file(path) as raw:
        head = raw.read(_HEAD_BYTES)
    refuse_content(path, head, (suffix, file_format(path)))
    if suffix in COMPRESSIONS:
        try:
            with remote.open_file(path) as raw:
                head = COMPRESSIONS[suffix](raw).read(_HEAD_BYTES)
        except Exception:  # reading the file will report the problem
            return
        refuse_content(path, head, (), "it holds ")


def refuse_content(path, head, allowed=(), prefix="it is "):
    """Raise DataError if a file's first bytes are those of another kind of file than its name says.

    Args:
        allowed: the file's suffix and format.
    """
    for pattern, name, kinds, advice in _SIGNATURES:
        if pattern.match(head) and not set(kinds) & set(allowed):
            raise DataError(f"{path}: {prefix}{name} by its first bytes; {advice}")


def file_suffix(file):
    """Return the suffix of a file in lower case."""
    return Path(remote.file_name(file)).suffix.lower()


def content_suffix(file):
    """Return the suffix of a file in lower case, leaving out that of a compression."""
    path = Path(remote.file_name(file))
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def file_format(file):
    """Return the format of a file by its suffix."""
    return _FORMATS.get(content_suffix(file), "text")


def check_expansion(file, size, stored_size):
    """Raise DataError if a file expands so far that it is more likely an attack than data.

    Args:
        size, stored_size: bytes or characters, and the bytes in the file that they were decompressed from.
    """
    if size > max(FREE_BYTES, MAX_RATIO * stored_size):
        raise DataError(f"{file} expands to more than {MAX_RATIO} times its size; decompress it, if you trust it")


def check_length(text, where):
    """Raise DataError if a line or an object is longer than a hostile file should be able to make it."""
    if len(text) > MAX_LINE_CHARS:
        raise DataError(
            f"{where} has more than {MAX_LINE_CHARS:,} characters; split it, or set the environment variable "
            "HF_MYLLM_MAX_LINE_CHARS"
        )
