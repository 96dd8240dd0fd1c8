"""Read a source as documents, for language modeling, or as rows with columns, for labelled tasks."""

import codecs
import csv
import io
import json
import lzma
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import pyarrow as pa

from ..errors import DataError, first_line, library_errors
from . import discovery, remote
from .arrow_rows import open_dataset, read_arrow
from .columns import fill_template, read_text
from .discovery import COMPRESSIONS, TOKEN_ID_FORMATS, check_expansion, check_length

_PIECE_CHARS = 100_000  # a longer document is read in pieces of about this length
_MAX_PIECE_CHARS = 8_000_000  # a piece is split here at the latest, even where no split is safe
_BLOCK_CHARS = 1 << 20  # read at once
_REPORT_CHARS = 10_000  # between two progress reports
_SAMPLE_LINES = 10_000  # of tab-separated values, which show whether fields are quoted
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)+"?')
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)|(?=\n\S)")


@dataclass(frozen=True)
class SourceTexts:
    """An iterable over the text of some sources, long documents in pieces that are split before a space."""

    sources: list

    def __iter__(self):
        return (text for source in self.sources for text, _ in read_documents(source, _BEFORE_SPACE))


def read_documents(source, split_pattern=None, progress=lambda count: None):
    """Yield the documents of a source in order; empty documents are left out.

    Args:
        split_pattern: where a long document may be split; the match itself is left out. None: only a document of more
            than `_MAX_PIECE_CHARS` characters is split, between any two words.
        progress: called with the bytes or rows read since the last call; see [`sources.total_size`].
    Yields:
        (text, is_end): a document, or a piece of one, and whether the document ends with it.
    Raises:
        DataError: a file is not UTF-8 (with the offset), the column is missing or does not hold text, or the Hub
            cannot be reached.
    """
    num_chars = 0
    for blocks in _document_blocks(source, progress):
        for text, is_end in _split_document(blocks, split_pattern):
            num_chars += len(text)
            is_last = bool(source.max_chars) and num_chars >= source.max_chars
            yield text, is_end or is_last
            if is_last:
                return


def resume_documents(source, split_pattern, position):
    """Yield (text, is_end, position) of each piece of a source, from the piece at a position on.

    A Hub data set is read over the network.

    Args:
        split_pattern: see [`read_documents`].
        position: a dict that an earlier call yielded; {} is the beginning.
    Raises:
        DataError: see [`read_documents`].
    """
    skip = position.get("pieces", 0)  # pieces of the first file or document that were read before
    if source.format != "hub":
        for number in range(position.get("file", 0), max(1, len(source.files))):  # data in memory has no files
            part = replace(source, files=source.files[number : number + 1])
            for index, (piece, is_end) in enumerate(read_documents(part, split_pattern)):
                if index >= skip:
                    yield piece, is_end, {"file": number, "pieces": index}
            skip = 0
        return
    with library_errors(f"{source.name} cannot be read"):
        rows, features = open_dataset(source, source.text_columns)
        if features and not source.template and source.text_column not in features:
            _text_of(features, source.name, source)
        if "dataset" in position:
            rows.load_state_dict(position["dataset"])
        state = rows.state_dict()
        for number, row in enumerate(rows, start=1):
            text = _text_of(row, f"{source.name} row {number}", source)
            for index, (piece, is_end) in enumerate(_split_document([text], split_pattern)):
                if index >= skip:
                    yield piece, is_end, {"dataset": state, "pieces": index}
            skip, state = 0, rows.state_dict()


def _document_blocks(source, progress):
    """Yield each document of a source as an iterable of strings."""
    if source.format in TOKEN_ID_FORMATS:
        raise DataError(f"{source.name} holds token ids, not text: a tokenizer cannot be trained on it")
    if source.format != "text":
        for where, row in read_rows(source, progress, source.text_columns):
            yield [_text_of(row, where, source)]
        return
    for file in source.open_files():
        if source.document == "file":
            yield _read_blocks(file, progress)
        else:
            yield from ([line] for _, line in read_lines(file, progress))


def _split_document(blocks, split_pattern):
    """Yield (text, is_end) of each piece of a document, of about `_PIECE_CHARS` characters."""
    piece = None  # the last piece, kept back until the next one or the end of the document is known
    buffer, offset, search_from = "", 0, _PIECE_CHARS
    for block in blocks:
        buffer, offset = buffer[offset:] + block, 0
        while len(buffer) - offset > search_from:
            if split_pattern is not None and (match := split_pattern.search(buffer, offset + search_from)):
                stop, following = match.span()
            elif len(buffer) - offset > _MAX_PIECE_CHARS:  # bounds the memory; tokens at this split may differ
                match = _BEFORE_SPACE.search(buffer, offset + _MAX_PIECE_CHARS // 2)
                stop, following = match.span() if match else (offset + _MAX_PIECE_CHARS,) * 2
            else:
                search_from = len(buffer) - offset - 1  # do not search this part again
                break
            if piece is not None:
                yield piece, False
            text = buffer[offset:stop]
            piece = text if piece is not None or text.strip() else None
            offset, search_from = following, _PIECE_CHARS
    if piece is not None:
        yield piece, False
    if piece is not None or buffer[offset:].strip():
        yield buffer[offset:], True


def _text_of(row, where, source):
    if source.template:
        return fill_template(row, where, source.template)
    is_empty = row.get(source.text_column, "") is None
    return "" if is_empty else read_text(row, where, source.text_column, "text_column")


def read_rows(source, progress=lambda count: None, columns=None):
    """Yield (where, row) of each row: its file and line or number for messages, and its columns as a dict.

    Args:
        columns: names of the columns that are used; of a data set or a Parquet file the others are None. Default: all.
    Raises:
        DataError: see [`read_documents`]; or the source has no columns.
    """
    if source.format in ("text", *TOKEN_ID_FORMATS):
        raise DataError(
            f"{source.name} has no columns: give .jsonl, .json, .csv, .tsv, .parquet or a data set of the Hub"
        )
    if isinstance(source.data, (list, tuple)):
        for number, text in enumerate(source.data, start=1):
            progress(1)
            yield f"{source.name} row {number}", {source.text_column: text}
        return
    if source.format in ("hub", "parquet", "memory"):
        yield from read_arrow(source, progress, columns)
        return
    read = {"jsonl": _read_json_lines, "json": _read_json, "csv": _read_csv}[source.format]
    for file in source.open_files():
        for where, row in read(file, progress):
            if not isinstance(row, dict):
                raise DataError(f"{where} is not an object with columns: {row!s:.80}")
            yield where, row


@contextmanager
def _open_text(file, progress):
    """Yield a file as a text stream, decompressed, and a function to call with the number of characters read so far; it
    reports the bytes read to `progress`."""
    decompress, reported = COMPRESSIONS.get(discovery.file_suffix(file), lambda raw: raw), 0

    def report(num_chars):
        nonlocal reported
        position = raw.tell()
        check_expansion(file, num_chars, position)
        progress(position - reported)
        reported = position

    damaged = EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError
    try:
        with library_errors(f"{file} cannot be read", catches=damaged), remote.open_file(file) as raw:
            yield io.TextIOWrapper(decompress(raw), encoding="utf-8-sig", newline="\n"), report
    except (UnicodeDecodeError, _NulByte):
        with remote.open_file(file) as raw:
            _raise_encoding_error(file, decompress(raw))


class _NulByte(Exception):
    """A text contains a NUL byte."""


def _raise_encoding_error(file, stream):
    """Raise a DataError with the offset of the first byte that is not UTF-8 text."""
    offset = 0
    for line in stream:
        try:
            line.decode()
            position = line.find(b"\0")
        except UnicodeDecodeError as error:
            position = error.start
        if position >= 0:
            is_utf16 = b"\0" in line or line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            raise DataError(
                f"{file} is not UTF-8 text: byte 0x{line[position]:02x} at offset {offset + position}; if it is text, "
                f"convert it, for example with iconv -f {'utf-16' if is_utf16 else 'latin1'} -t utf-8"
            )
        offset += len(line)


def _read_blocks(file, progress):
    """Yield the text of a file in blocks."""
    with _open_text(file, progress) as (stream, report):
        num_chars = 0
        while block := stream.read(_BLOCK_CHARS):
            if "\0" in block:
                raise _NulByte
            yield block
            num_chars += len(block)
            report(num_chars)


def read_lines(file, progress=lambda count: None):
    """Yield (number, line) of each line of a file, counted from 1; a line includes its end."""
    with _open_text(file, progress) as (stream, report):
        num_chars, next_report = 0, _REPORT_CHARS
        for number, line in enumerate(iter(partial(stream.readline, discovery.MAX_LINE_CHARS + 1), ""), start=1):
            if "\0" in line:
                raise _NulByte
            check_length(line, f"{file} line {number}")
            yield number, line
            num_chars += len(line)
            if num_chars > next_report:  # asking for the position in the file takes longer than reading a line
                report(num_chars)
                next_report = num_chars + _REPORT_CHARS
        report(num_chars)


def _read_json_lines(file, progress):
    for number, line in read_lines(file, progress):
        if line.strip():
            try:
                yield f"{file} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = first_line(error)
                message = f"{file} line {number} is not JSON: {problem}; each line must be an object of its own"
                raise DataError(message) from None


def _read_json(file, progress):
    """Yield the objects of a JSON list, or of concatenated JSON objects, without reading the whole file at once."""
    decoder, blocks, text, position, number = json.JSONDecoder(), _read_blocks(file, progress), "", 0, 1

    def next_character():
        """Skip white space and return the character after it, or "" at the end of the file."""
        nonlocal text, position
        while (position := _WHITE_SPACE.match(text, position).end()) == len(text):
            if not (block := next(blocks, "")):
                return ""
            text, position = block, 0
        return text[position]

    def parse():
        nonlocal text, position
        while True:
            try:
                row, position = decoder.raw_decode(text, position)
                return row
            except json.JSONDecodeError as error:
                may_continue = "Unterminated" in error.msg or error.pos > len(text) - 20  # in the next block
                more = "".join(islice(blocks, 1 + (len(text) - position) // _BLOCK_CHARS)) if may_continue else ""
                if not more:
                    fail(f"{error.msg} at character {error.pos - position} of it")
                text, position = text[position:] + more, 0
                check_length(text, f"{file} object {number}")
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
                fail(first_line(error))

    def fail(problem):
        raise DataError(f"{file} object {number} is not JSON: {problem}") from None

    is_list = next_character() == "["
    position += is_list
    while (character := next_character()) and not (is_list and character == "]"):
        if is_list and number > 1:
            if character != ",":
                fail(f"{character!r} where a comma is expected")
            position += 1
            next_character()
        yield f"{file} object {number}", parse()
        number += 1
    if is_list and character != "]":
        fail("the list is cut short; its closing bracket is missing")
    position += is_list
    if next_character():
        fail("something stands after the list")


def _read_csv(file, progress):
    """Yield the rows of CSV or of tab-separated values."""
    csv.field_size_limit(min(discovery.MAX_LINE_CHARS, 1 << 30))
    lines, options = (line for _, line in read_lines(file, progress)), {"strict": True}
    is_tsv = discovery.content_suffix(file) == ".tsv"
    if is_tsv:
        first = list(islice(lines, _SAMPLE_LINES))
        lines, options = chain(first, lines), {"delimiter": "\t"} | _tsv_quoting(first)
    rows = csv.DictReader(lines, **options)
    try:
        for row in rows:
            where, columns = f"{file} line {rows.line_num}", rows.fieldnames
            if len(set(columns)) < len(columns):
                raise DataError(f"{file}: two columns have one name, of {', '.join(map(repr, columns))}")
            if None in row or None in row.values():
                problem = "more" if None in row else "fewer"
                raise DataError(f"{where} has {problem} fields than the {len(columns)} that the first line names")
            if "quoting" in options and any(_QUOTED.fullmatch(value) for value in row.values()):
                raise DataError(
                    f'{where} has a field that is quoted as in CSV, with "" for a quotation mark, and the file is '
                    "otherwise not; save it as .csv or .jsonl"
                )
            yield where, row
    except csv.Error as error:
        raise DataError(f"{file} line {rows.line_num + 1} cannot be read as CSV: {error}") from None


def _tsv_quoting(lines):
    """Return the options of `csv` for tab-separated values, given the first lines.

    They have no quoting, and a quotation mark is a character (IANA text/tab-separated-values, GLUE), unless only with
    quoting all rows have as many fields as the first line, or the first line is quoted.
    """
    unquoted = {"quoting": csv.QUOTE_NONE}
    width = lines[0].count("\t") if lines else 0
    header_is_quoted = bool(lines) and all(name[:1] == name[-1:] == '"' for name in lines[0].strip().split("\t"))
    if not header_is_quoted and all(line.count("\t") == width for line in lines if line.strip()):
        return unquoted
    try:
        rows = list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error as error:
        return {"strict": True} if "unexpected end" in str(error) else unquoted  # the last row goes on
    is_quoted = all(len(row) == width + 1 for row in rows[:-1] if row)
    return {"strict": True} if is_quoted else unquoted
