"""Write files and folders so that they are complete or absent, render templates, and read YAML."""

import math
import os
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jinja2
import yaml

from .errors import first_line

_MAX_YAML_CHARS, _MAX_YAML_NODES = 1 << 20, 100_000
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
    return _load_template(path).render(values)


@cache
def _load_template(path):
    environment = jinja2.Environment(
        autoescape=path.name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    return environment.from_string(path.read_text(encoding="utf-8"))


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- YAML


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
                raise yaml.constructor.ConstructorError(None, None, f"key '{name}' is given twice", node.start_mark)
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', None) or first_line(error)}") from None


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
