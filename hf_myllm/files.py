"""Write files and folders so that they are complete or absent, render templates, and read YAML."""

import errno
import hashlib
import math
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import jinja2
import yaml

from .errors import first_line, printable

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

IS_WINDOWS = os.name == "nt"
_RENAME_TRIES = 10
_MAX_YAML_CHARS, _MAX_YAML_NODES = 1 << 20, 100_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
PARTIAL = ".partial"  # suffix of the temporary names
_BLOCK = 1 << 23  # bytes that are written and hashed at a time


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` to write a file or a folder to.

    When the block ends, the temporary path is renamed to `path`, replacing a file that exists. When the block raises,
    it is removed. A leftover of a killed process is removed first.

    Raises:
        OSError: `path` is a link, which may lead out of its folder.
    """
    path = Path(path)
    refuse_link(path)
    temporary = path.with_name(path.name + PARTIAL)
    _remove(temporary)
    try:
        yield temporary
        rename(temporary, path)
    finally:
        _remove(temporary)


def rename(source, target):
    """Rename a file, replacing one that exists, or a folder.

    On Windows a scanner or an indexer may hold a file open for a moment after it was written: try again for a second.
    """
    for _ in range(_RENAME_TRIES - 1 if IS_WINDOWS else 0):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)


def refuse_link(path):
    """Raise OSError if a path is a link: what is written there would go elsewhere."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a link, and nothing is written through links; remove it", str(path))


def open_new(path):
    """Open a text file to write, which must not exist, not even as a link."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    return open(handle, "w", encoding="utf-8")


def write_text_atomically(path, text):
    """Write a text file in UTF-8, complete or not at all."""
    with atomic_path(path) as temporary, open_new(temporary) as file:
        file.write(text)


def regular_files(folder):
    """Return the files of a folder, sorted, without links: they may lead to files that nobody meant to share."""
    return sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.is_symlink())


def link_or_copy(source, target):
    """Create `target` as a hard link to `source`, which must not be written to any more, or else as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def share_mode(folder, like):
    """Give all files the permissions of one: safetensors creates files that only their owner can read."""
    mode = like.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def find_lfs_pointer(folder):
    """Return a message about the first file of a model's folder that is a Git LFS pointer; None if there is none."""
    for path in sorted(Path(folder).glob("*")) if os.path.isdir(folder) else ():
        if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(LFS_POINTER):
            return f"{path}: it is a Git LFS pointer; fetch it with git lfs pull"


def digest_file(path):
    """Return the SHA-256 digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_and_digest(path, blocks, must_stop=lambda: False):
    """Write a new file, flush it to disk, and return its size and its SHA-256 digest.

    Hashing, writing and flushing large blocks let other threads run.

    Args:
        blocks: the content: an iterable of objects with the buffer protocol, in bytes.
        must_stop: called repeatedly; True raises OSError.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for block in blocks:
            for start in range(0, len(block), _BLOCK):
                if must_stop():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), str(path))
                part = block[start : start + _BLOCK]
                file.write(part)
                digest.update(part)
            size += len(block)
        file.flush()
        _flush_handle(file.fileno())
    return [size, digest.hexdigest()]


def flush(path):
    """Flush a file, or the entries of a folder, to disk.

    Windows flushes what is open for writing only, and no folders: NTFS keeps a journal of their entries. On macOS,
    fsync leaves the data in the drive's own cache.
    """
    if IS_WINDOWS and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        _flush_handle(handle)
    finally:
        os.close(handle)


def _flush_handle(handle):
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # of a file system that lacks it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def render_template(path, **values):
    """Return the text of a Jinja template with its values filled in; in an HTML template they are escaped.

    The filter `thousands` formats an integer with thousands separators; `md` and `code` are [`markdown`] and
    [`markdown_code`].
    """
    return _load_template(path).render(values)


@cache
def _load_template(path):
    environment = jinja2.Environment(
        autoescape=path.name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "md": markdown, "code": markdown_code}
    return environment.from_string(path.read_text(encoding="utf-8"))


def markdown(value):
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", printable(" ".join(str(value).split())))


def markdown_code(value, is_block=False):
    """Return text as code between marks that are longer than any in the text: in a line, or as a block of YAML."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    if is_block:
        fence = "`" * max(3, longest + 1)
        return f"{fence}yaml\n{value.rstrip()}\n{fence}"
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{printable(' '.join(value.split()))}{pad}{fence}"


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- YAML


class RepeatedKeyError(ValueError):
    """YAML text gives a key twice."""


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML whose plain numbers and booleans are those of YAML 1.2, and that refuses a repeated key.

    YAML 1.1 reads 1:30 as 90, 010 as 8 and 0x10 as 16; here they are text, which no number accepts.
    """

    yaml_implicit_resolvers = {}

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_YAML_NODES:
            raise yaml.composer.ComposerError(None, None, "its anchors expand to too many values", node.start_mark)
        return node

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # <<, whose keys may be given again
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        for name in keys:
            if keys.count(name) > 1:
                raise RepeatedKeyError(f"line {node.start_mark.line + 1}: key '{name}' is given twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     [*"-+.0123456789"]),
    ("merge", "<<", ["<"]),
):  # fmt: skip
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read_yaml(text):
    """Return the content of YAML text, which may be hostile.

    Raises:
        ValueError: it is not YAML or too large. The message says what and in which line.
    """
    if len(text) > _MAX_YAML_CHARS:
        raise ValueError(f"it is longer than {_MAX_YAML_CHARS:,} characters")
    try:
        return yaml.load(text, RecipeLoader)
    except RepeatedKeyError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or first_line(error)
        if "escape" in problem:
            problem += "; write a path with backslashes without double quotes"
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not valid YAML: {problem}") from None


def _expanded_size(node, sizes):
    """Return the number of values below a node; an alias counts as all that it stands for.

    Args:
        sizes: id of a node -> its size; infinite while it is counted, so for an alias in its own anchor.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = [child for child in node.value for child in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
