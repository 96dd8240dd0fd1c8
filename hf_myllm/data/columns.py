"""The columns of a row, and the texts that a template makes of them, such as "Q: {question}\\nA: {answer}"."""

import re

from ..errors import DataError

# {{ and }} stand for braces; {a.b} is the value b of the object in column a.
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def check_template(template):
    """Raise DataError if a template has a brace without its other half, or names no column."""
    matches = list(_FIELD.finditer(template))
    if single := next((match[0] for match in matches if match[0] in "{}"), None):
        raise DataError(f"template: '{single}' stands alone; write {single * 2} for the character")
    if not any(match[1] for match in matches):
        raise DataError(f"template: {template!r:.60} names no column; write its name in braces, such as {{question}}")


def template_columns(template):
    """Return the names of the columns that a template may read."""
    names = [match[1] for match in _FIELD.finditer(template) if match[1]]
    return [*names, *(name.split(".")[0] for name in names if "." in name)]


class BadRowError(DataError):
    """A row cannot be used; with skip_bad_rows a labelled example is left out."""


def read_column(row, where, name, flag=None):
    """Return the value of a column.

    Args:
        flag: the flag that names the column, for the message.
    Raises:
        BadRowError: there is no such column.
    """
    if name not in row:
        hint = f"; name it with --{flag}" if flag else ""
        raise BadRowError(f"{where} has no column {name!r}, but {', '.join(map(repr, row)) or 'none'}{hint}")
    return row[name]


def read_text(row, where, name, flag=None):
    """Return the text in a column; see [`read_column`].

    Raises:
        BadRowError: there is no such column, or it does not hold text.
    """
    text = read_column(row, where, name, flag)
    if not isinstance(text, str):
        raise BadRowError(f"{where}: column {name!r} does not hold text: {text!r:.80}")
    return check_text(text, where)


def check_text(text, where):
    """Return the text if it can be encoded in UTF-8; otherwise raise BadRowError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{where}: half a character (a lone surrogate) at position {error.start}") from None
    return text


def read_field(row, where, name):
    """Return the value of a column, or of a key of the object in it: "translation.en".

    Raises:
        BadRowError: there is no such column.
    """
    value = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or key not in value:
            return read_column(row, where, name)
        value = value[key]
    return value


def fill_template(row, where, template):
    """Return the text that a template makes of a row; an empty cell is an empty text.

    Raises:
        BadRowError: a column is missing, or holds neither text nor a number.
    """

    def fill(match):
        if not match[1]:
            return match[0][0]
        value = read_field(row, where, match[1])
        if value is None:
            return ""
        if not isinstance(value, (str, int, float)):
            raise BadRowError(f"{where}: column {match[1]!r} holds neither text nor a number: {value!r:.80}")
        return str(value)

    return check_text(_FIELD.sub(fill, template), where)
