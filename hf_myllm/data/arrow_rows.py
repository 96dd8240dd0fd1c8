"""Rows of Parquet files and of `datasets` data sets."""

import json

import datasets

from ..errors import DataError, library_errors
from . import discovery, remote
from .sources import load_hub, stream_hub

_BATCH_ROWS = 1000  # read at once


def read_arrow(source, progress, columns):
    """Yield the rows of Parquet files or of a data set, with class labels as their names.

    Only the columns that are used are read, and pictures and sounds are not decoded: a data set may name their URLs.
    The other columns of a row are None.
    """
    if source.format != "parquet":
        with library_errors(f"{source.name} cannot be read"):
            rows, features = open_dataset(source, columns)
            batches = rows.with_format("arrow").iter(_BATCH_ROWS)
            for where, row, _ in _read_batches(source.name, features, features, batches):
                progress(1)
                yield where, row
        return
    if not any(_count_rows(file) for file in source.open_files()):
        raise DataError(f"{source.name} has no rows; give a file with text in it")
    for file in source.open_files():
        with library_errors(f"{file} cannot be read as parquet"), remote.open_parquet(file) as table:
            features = datasets.Features.from_arrow_schema(table.schema_arrow)
            size = remote.file_size(file)
            rows = _read_batches(file, table.schema_arrow.names, features, _parquet_batches(file, table, columns))
            for where, row, num_chars in rows:
                discovery.check_expansion(file, num_chars, size)
                progress(1)
                yield where, row


def _read_batches(name, columns, features, batches):
    """Yield (where, row, number of characters so far); `columns` are the names of all columns."""
    number = num_chars = 0
    for batch in batches:
        for index in range(batch.num_rows):
            number, row = number + 1, dict.fromkeys(columns)
            for column, values in zip(batch.schema.names, batch.columns, strict=True):
                value = values[index].as_py()
                num_chars += len(value) if isinstance(value, str) else 0
                row[column] = _decode(value, features.get(column))
            yield f"{name} row {number}", row, num_chars


def _count_rows(file):
    with library_errors(f"{file} cannot be read as parquet"), remote.open_parquet(file) as table:
        return table.metadata.num_rows


def _parquet_batches(file, table, columns):
    """Yield the batches of a Parquet file with the columns that are used."""
    used = [name for name in table.schema_arrow.names if columns is None or name in columns]
    groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
    sizes = [
        group.column(index).total_uncompressed_size
        for group in groups
        for index in range(group.num_columns)
        if group.column(index).path_in_schema.split(".")[0] in used
    ]
    discovery.check_expansion(file, sum(sizes), remote.file_size(file))
    # a dictionary-encoded value may be repeated in every row: read fewer rows at once if values are large
    yield from table.iter_batches(
        max(1, min(_BATCH_ROWS, discovery.MAX_LINE_CHARS * 16 // max(sizes, default=1))), columns=used
    )


def open_dataset(source, columns):
    """Return a data set with the columns that are used, and the features of all its columns."""
    rows = source.data if source.format == "memory" else stream_hub(source) if source.is_streamed else load_hub(source)
    features = rows.features or {}
    used = [name for name in features if columns is not None and name in columns]
    if used:
        rows = rows.select_columns(used)
    return rows, features


def _decode(value, feature):
    """Return a value as it was before it was stored: class labels by name, JSON as objects, and objects without the
    None that Arrow gives each for the keys that only others have.

    Args:
        feature: the feature of `datasets` for it, or None.
    """
    if isinstance(value, list):
        return [_decode(item, getattr(feature, "feature", None)) for item in value]
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {name: _decode(item, features.get(name)) for name, item in value.items() if item is not None}
    if isinstance(feature, datasets.ClassLabel):
        return None if value is None or value < 0 else feature.int2str(value)  # -1 is "no label" in `datasets`
    return json.loads(value) if type(feature).__name__ == "Json" and isinstance(value, str) else value
