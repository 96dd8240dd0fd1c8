"""Cached results of data preparation: folders in the cache of `datasets`, named by a digest of what they depend on."""

import hashlib
import json
from pathlib import Path

import datasets
from filelock import FileLock

from ..errors import DataError
from ..files import atomic_path

_FORMAT = 6  # raise this number when the content of cached folders changes


def cached_path(key):
    """Return the path of the cached folder for a key, which may not exist yet."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_myllm" / key_digest(key)


def key_digest(key):
    """Return a digest of a key: any JSON values."""
    return hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(key, make):
    """Return the cached folder for a key; `make(folder)` fills it if it does not exist. It is complete or absent.

    Every rank may call this: one rank of each machine makes the folder while the others wait.

    Raises:
        DataError: the cache cannot be written.
    """
    folder = cached_path(key)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with atomic_path(folder) as partial:
                    partial.mkdir()
                    make(partial)
    except OSError as error:
        raise DataError(f"the cache {folder.parent} cannot be written: {error}; HF_HOME names another place") from None
    return folder
