"""Cached results of data preparation: folders in the cache of `datasets`, named by a digest of what they depend on."""

import hashlib
import json
import shutil
from pathlib import Path

import datasets
from filelock import FileLock

from ..errors import DataError
from ..files import atomic_path

_FILES = "files.json"  # written last: name of each file -> its size and a digest of samples of its content
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # a file of up to 4 MiB is compared whole
_FORMAT = 6  # raise this number when the content of cached folders changes


def cached_path(key):
    """Return the path of the cached folder for a key, which may not exist yet."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_myllm" / key_digest(key)


def key_digest(key):
    """Return a digest of a key: any JSON values."""
    return hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(key, make):
    """Return the cached folder for a key; `make(folder)` fills it if it does not exist. It is complete or absent.

    Every rank may call this: one rank of each machine makes the folder while the others wait. A folder that has lost a
    file, or a part of one, or whose files have changed in one of the samples of their content, is made again.

    Raises:
        DataError: the cache cannot be written.
    """
    folder = cached_path(key)
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                with atomic_path(folder) as partial:
                    partial.mkdir()
                    make(partial)
                    (partial / _FILES).write_text(json.dumps(_describe_files(partial)))
    except OSError as error:
        raise DataError(f"the cache {folder.parent} cannot be written: {error}; HF_HOME names another place") from None
    return folder


def _is_whole(folder):
    """Return whether a cached folder has all its files, as they were written."""
    try:
        return json.loads((folder / _FILES).read_text()) == _describe_files(folder)
    except (OSError, ValueError):
        return False


def _describe_files(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _FILES)
    return {path.relative_to(folder).as_posix(): _describe(path) for path in files}


def _describe(path):
    """Return the size of a file and a digest of evenly spaced samples: a digest of the whole would take minutes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    end = max(0, size - _SAMPLE_BYTES)
    with open(path, "rb", buffering=0) as file:
        for start in (*range(0, end, max(_SAMPLE_BYTES, size // _SAMPLES)), end):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return [size, digest.hexdigest()]
