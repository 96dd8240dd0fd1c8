"""Texts that a template makes of a row's columns, such as "Q: {question}\\nA: {answer}"."""

import re

from ..errors import DataError

# {{ and }} stand for braces; {a.b} is the value b of the object in column a.
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def check_template(template):
    """Raise ValueError if a template has a brace without its other half, or names no column."""
    matches = list(_FIELD.finditer(template))
    if single := next((match[0] for match in matches if match[0] in "{}"), None):
        raise ValueError(f"'{single}' stands alone; write {single * 2} for the character")
    if not any(match[1] for match in matches):
        raise ValueError(f"{template!r:.60} names no column; write its name in braces, such as {{question}}")


def template_columns(template):
    """Return the names of the columns that a template may read."""
    names = [match[1] for match in _FIELD.finditer(template) if match[1]]
    return [*names, *(name.split(".")[0] for name in names if "." in name)]


def read_column(row, where, name, error_class=DataError):
    """Return the value of a column, or of a key of the object in it: "translation.en".

    Raises:
        error_class: there is no such column.
    """
    if name in row:
        return row[name]
    value = row
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise error_class(f"{where} has no column {name!r}, but {', '.join(map(repr, row))}")
        value = value[key]
    return value


def fill_template(row, where, template, error_class=DataError):
    """Return the text that a template makes of a row; an empty cell is an empty text.

    Raises:
        error_class: a column is missing, or holds neither text nor a number.
    """

    def fill(match):
        if not match[1]:
            return match[0][0]
        value = read_column(row, where, match[1], error_class)
        if value is None:
            return ""
        if not isinstance(value, (str, int, float)):
            raise error_class(f"{where}: column {match[1]!r} holds neither text nor a number: {value!r:.80}")
        return str(value)

    return _FIELD.sub(fill, template)
