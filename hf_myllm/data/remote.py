"""Files in object storage, on the Hub or behind a URL, by fsspec: s3://, gs://, hf://datasets/..., https://, memory://.

The same functions open, measure and list local and remote files. A file that cannot be read in parts is downloaded
once into the cache. A remote file is identified by what its server says of its content, such as an ETag, so that a
second run neither downloads nor tokenizes it again. Credentials come from the environment or from fsspec's
configuration; those in a URL are never shown.
"""

import hashlib
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import fsspec
from datasets.utils.file_utils import xopen
from pyarrow import parquet

from ..errors import DataError, first_line, hide_secrets
from ..files import digest_file
from .cache import cached_folder, cached_path

# what servers say of a file's content, the most reliable first; the last ones are times
_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "xet_hash", "blob_id", "content_hash")
_CONTENT_TAGS += ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
_SAMPLE_BYTES = 1 << 16
_infos, _copies = {}, {}  # by URL, since it was last listed: fsspec's information, and the path of the downloaded copy


def is_remote(path):
    """Return whether a path is a URL; `C:` is a drive."""
    return bool(re.match(r"[a-z][a-z0-9+.-]+://", path))


def without_file_scheme(path):
    """Return the path that a file:// URL names; any other path or URL as it is."""
    return fsspec.core.url_to_fs(path)[1] if path.startswith(("file://", "local://")) else path


def file_name(path):
    """Return the last part of a path, or of a URL without its query."""
    return Path(re.sub(r"[?#].*", "", path) if is_remote(path) else path).name


def list_files(pattern, is_data):
    """Return the URLs of the files that a URL stands for: a file, a folder (for HTTP with / at its end), or a glob.

    Args:
        is_data: whether a file of a folder is data, by its name.
    Raises:
        DataError: nothing matches, a package is missing, or the server cannot be reached.
    """
    if "://***@" in pattern or pattern.endswith("?***"):
        raise DataError(f"{pattern}: the credentials of this URL were not stored; give the whole URL again")
    is_http = pattern.startswith(("http://", "https://"))
    with _remote_errors(pattern):
        system, path = open_system(pattern)
        if set("*[" if is_http else "*?[") & set(path):
            found = system.glob(path, detail=True)
        elif (is_http and path.endswith("/")) or (not is_http and system.info(path)["type"] == "directory"):
            found = {name: info for name, info in system.find(path, detail=True).items() if is_data(Path(name).name)}
        else:
            _remember(pattern, info := system.info(path))
            if info.get("mimetype") == "text/html" and not file_name(pattern).lower().endswith((".html", ".htm")):
                folder = re.sub(r"(?=[?#]|$)", "/", pattern, count=1)
                raise DataError(f"{pattern}: it is a web page, not a data file; of a folder, add /: {folder}")
            return [pattern]
        files = sorted(name for name, info in found.items() if info["type"] == "file" and _is_shown(name, path))
        if not files:
            raise DataError(f"{pattern}: no file matches; correct it")
        urls = [system.unstrip_protocol(name) for name in files]
        for url, name in zip(urls, files, strict=True):  # the index page of a web server has no sizes
            _remember(url, system.info(name) if is_http else found[name])
        return urls


def open_system(url):
    options = {"client_kwargs": {"trust_env": True}} if url.startswith("http") else {}  # proxies
    return fsspec.core.url_to_fs(url, **options)


def _remember(url, info):
    _infos[url] = info
    _copies.pop(url, None)  # the file may have changed since


def _is_shown(name, pattern):
    """Return whether no part of a name that a pattern or folder added is hidden."""
    return not any(part.startswith((".", "__")) for part in set(name.split("/")) - set(pattern.split("/")))


def file_size(path):
    """Return the size of a file in bytes; None if its server does not say."""
    if is_remote(path) and path not in _copies:
        return _info(path).get("size")
    return os.path.getsize(_copies.get(path, path))


def _info(url):
    if url not in _infos:
        with _remote_errors(url):
            system, path = open_system(url)
            _remember(url, system.info(path))
    return _infos[url]


def open_file(path):
    """Open a file to read its bytes, by ranges if it is remote; its downloaded copy, if there is one.

    Raises:
        DataError: a remote file cannot be read.
        OSError: a file here cannot be read.
    """
    path = _copies.get(path, path)
    if not is_remote(path):
        return open(path, "rb")
    with _remote_errors(path):
        file = xopen(path, "rb")
    read = file.read

    def read_or_explain(*args):
        with _remote_errors(path):
            return read(*args)

    file.read = read_or_explain
    return file


def open_parquet(path):
    """Open a Parquet file; a remote one is read by ranges."""
    path = _copies.get(path, path)
    return parquet.ParquetFile(open_file(path) if is_remote(path) else path)


def local_path(path):
    """Return the path of a file, or of the copy of a remote file, downloaded once."""
    if not is_remote(path):
        return path
    if path not in _copies:
        tag, name = _content_tag(path), file_name(path)
        if tag is not None:
            key = ["download", hide_secrets(path), tag]
            folder = cached_folder(key, lambda folder: _download(path, folder / name))
        else:  # the server does not say whether it has changed: download it to see
            root = cached_path(()).parent
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as temporary:
                _download(path, Path(temporary) / name)
                key = ["download", digest_file(Path(temporary) / name)]
                folder = cached_folder(key, lambda folder: os.replace(Path(temporary) / name, folder / name))
        _copies[path] = str(next(file for file in folder.iterdir() if file.name != "files.json"))
    return _copies[path]


def _download(url, path):
    with _remote_errors(url):
        system, name = open_system(url)
        system.get_file(name, str(path))


def content_key(path, samples=None):
    """Return what identifies the content of a file, wherever it is: JSON values without its path and times.

    Args:
        samples: read the size and about this number of evenly spaced samples of 64 KiB, which is quick for any size;
            None: read all of it.
    """
    if is_remote(path):
        if (tag := _content_tag(path)) is not None:
            return tag
        if samples:
            with open_file(path) as file:
                return ["head", _info(path).get("size"), file.read(_SAMPLE_BYTES).hex()]
    return digest_samples(local_path(path), samples) if samples else digest_file(local_path(path))


def digest_samples(path, samples):
    """Return the size of a file and a digest of evenly spaced samples and its end."""
    size, digest = os.path.getsize(path), hashlib.sha256()
    end = max(0, size - _SAMPLE_BYTES)
    with open(path, "rb", buffering=0) as file:
        for start in (*range(0, end, max(_SAMPLE_BYTES, size // samples)), end):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return [size, digest.hexdigest()]


def _content_tag(url):
    info = _info(url)
    info = info | {"ETag": info["lfs"]["sha256"]} if info.get("lfs") else info
    tag = next((info[name] for name in _CONTENT_TAGS if info.get(name)), None)
    tag = tag.timestamp() if hasattr(tag, "timestamp") else tag
    if tag is None:
        return None
    is_digest = re.search("[0-9a-fA-F]{32}", str(tag))  # else, a time: it identifies the content of one URL only
    own = [] if is_digest or "?" not in url else [hashlib.sha256(url.encode()).hexdigest()]
    return [info.get("size"), str(tag), *own]


@contextmanager
def _remote_errors(url):
    """Turn the errors of fsspec, of its packages and of the network, which have many classes, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{url}: {first_line(error)}; install that package, or copy the file here") from None
    except Exception as error:
        cause = error.__cause__ or error
        problem = "it does not exist" if isinstance(cause, FileNotFoundError) else first_line(cause)[:300]
        raise DataError(f"{url} cannot be read: {problem}; check the URL, the network and your credentials") from None
