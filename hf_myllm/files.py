"""Write files and folders so that they are complete or absent, and render templates."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import jinja2

PARTIAL = ".partial"  # suffix of the temporary names


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` to write a file or a folder to.

    When the block ends, the temporary path is renamed to `path`, replacing a file that exists. When the block raises,
    it is removed. A leftover of a killed process is removed first.
    """
    path = Path(path)
    temporary = path.with_name(path.name + PARTIAL)
    _remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_text_atomically(path, text):
    """Write a text file in UTF-8, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_or_copy(source, target):
    """Create `target` as a hard link to `source`, which must not be written to any more, or else as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def flush(path):
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def render_template(path, **values):
    """Return the text of a Jinja template with its values filled in; in an HTML template they are escaped.

    The filter `thousands` formats an integer with thousands separators.
    """
    environment = jinja2.Environment(
        autoescape=path.name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    return environment.from_string(path.read_text(encoding="utf-8")).render(values)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
