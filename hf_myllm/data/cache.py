"""What is made of data once and used again: folders beside the cache of `datasets`, named by what they depend on."""

import hashlib
import json
from pathlib import Path

import datasets
from filelock import FileLock

from ..errors import DataError
from ..files import atomic_path

_FORMAT = 6  # of the cache: raise it when what is cached changes


def cached_path(key):
    """Where the cache has, or would have, what this key says."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_myllm" / key_digest(key)


def key_digest(key):
    return hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(key, make):
    """The folder of the cache that `make(folder)` fills, made now unless it is there already; whole or not at all."""
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
