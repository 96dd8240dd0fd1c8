"""Cached results of data preparation: folders in the cache of `datasets`, named by a digest of what they depend on."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
from filelock import FileLock

from ..errors import library_errors
from ..files import atomic_path, digest_file

_FILES = "files.json"  # written last: name of each file -> its size and a digest of its content
_FORMAT = 6  # raise this number when the content of cached folders changes


def cached_path(key):
    """Return the path of the cached folder for a key, which may not exist yet."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_myllm" / key_digest(key)


def key_digest(key):
    """Return a digest of a key: any JSON values."""
    return hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]


def cached_folder(key, make):
    """Return the cached folder for a key; `make(folder)` fills it if it does not exist. It is complete or absent.

    Every rank may call this: one rank of each machine makes the folder while the others wait. A folder that lacks a
    file, or has one with other content, is made again. Only files that changed after it was made are read to see that.

    Raises:
        DataError: the cache cannot be written.
    """
    folder = cached_path(key)
    if _is_whole(folder):
        return folder
    problem = f"the cache {folder.parent} cannot be written"
    with library_errors(problem, catches=OSError, advice="; change HF_HOME"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                with atomic_path(folder) as partial:
                    partial.mkdir()
                    make(partial)
                    files = _list_files(partial)
                    known = {name: [path.stat().st_size, digest_file(path)] for name, path in files.items()}
                    (partial / _FILES).write_text(json.dumps(known))
    return folder


def _is_whole(folder):
    """Return whether a cached folder has all its files, as they were written."""
    try:
        known, files = json.loads((folder / _FILES).read_text()), _list_files(folder)
        if {name: size for name, (size, _) in known.items()} != {n: path.stat().st_size for n, path in files.items()}:
            return False
        written = (folder / _FILES).stat().st_mtime_ns
        changed = [name for name, path in files.items() if _last_change(path) >= written]
        if any(digest_file(files[name]) != known[name][1] for name in changed):
            return False
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    with suppress(OSError):  # the cache may be read-only
        if changed:  # the folder was copied or a file linked: do not read the content again next time
            os.utime(folder / _FILES)
    return True


def _list_files(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _FILES)
    return {path.relative_to(folder).as_posix(): path for path in files}


def _last_change(path):
    """Return when a file was last written to, or changed in any other way, in nanoseconds."""
    stat = path.stat()
    return max(stat.st_mtime_ns, stat.st_ctime_ns)
