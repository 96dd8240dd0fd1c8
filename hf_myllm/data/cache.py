"""Cached results of data preparation: folders in the cache of `datasets`, named by a digest of what they depend on."""

import hashlib
import json
import shutil
from pathlib import Path

import datasets
from filelock import FileLock

from ..errors import DataError
from ..files import atomic_path

_SIZES = "sizes.json"  # written last: name of each file -> its bytes
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
    file, or a part of one, is made again.

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
                    (partial / _SIZES).write_text(json.dumps(_sizes(partial)))
    except OSError as error:
        raise DataError(f"the cache {folder.parent} cannot be written: {error}; HF_HOME names another place") from None
    return folder


def _is_whole(folder):
    """Return whether a cached folder has all its files, of the size that they were written with."""
    try:
        return json.loads((folder / _SIZES).read_text()) == _sizes(folder)
    except (OSError, ValueError):
        return False


def _sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != _SIZES}
