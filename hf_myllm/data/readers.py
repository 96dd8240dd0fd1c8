"""Sources read as documents, for language modeling, or as rows with columns, for labelled tasks."""

import codecs
import csv
import json
import lzma
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from ..errors import InputError, first_line
from .sources import COMPRESSIONS, TOKEN_ID_FORMATS, load_hub, stream_hub

_PIECE = 100_000  # characters: a longer document comes in pieces
_LONGEST = 8_000_000  # characters that are looked through for a place to cut
_BLOCK = 1 << 20  # bytes read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_ANY_SPACE = re.compile(r"(?<=\S)(?= \S)|(?=\n\S)")


@dataclass(frozen=True)
class SourceTexts:
    """The text of some sources, to be read as often as one likes, long documents in pieces cut before a space."""

    sources: list

    def __iter__(self):
        return (text for source in self.sources for text, _ in read_documents(source, _ANY_SPACE))


def read_documents(source, cut=None, progress=lambda count: None):
    """The documents of a source, one after another; empty ones are left out.

    Args:
        cut: a pattern of where a long document may be cut; what it matches is left out. None: only a document that is
            very long is cut at all, between any two words.
        progress: called with the bytes read since the last call.
    Yields:
        (text, is_end): a document, or a piece of one, and whether the document ends with it.
    Raises:
        InputError: a file is not UTF-8 (with the offset), the column is missing or does not hold text, or the Hub
            cannot be reached.
    """
    seen = 0
    for text, is_end in _read_all_pieces(source, cut, progress):
        seen += len(text)
        is_last = bool(source.max_chars) and seen >= source.max_chars
        yield text, is_end or is_last
        if is_last:
            return


def _read_all_pieces(source, cut, progress):
    if source.format in TOKEN_ID_FORMATS:
        raise InputError(f"{source.name} holds token ids, not text: a tokenizer cannot be trained on it")
    if source.format == "text" and source.document == "file":
        for file in source.files:
            yield from _in_pieces(_read_blocks(file, progress), cut)
    elif source.format == "text":
        for file in source.files:
            for _, line in _read_lines(file, progress, is_plain=True):
                yield from _in_pieces([line], cut)
    else:
        for where, row in read_rows(source, progress):
            yield from _in_pieces([_text_of(row, where, source.text_column)], cut)


def _in_pieces(blocks, cut):
    """One document, of which the text comes in blocks, in pieces of about _PIECE characters."""
    ready, held, at, start = None, "", 0, _PIECE  # a piece is kept back until it is known whether the document ends
    for block in blocks:
        held, at = held[at:] + block, 0
        while len(held) - at > start:
            if cut is not None and (place := cut.search(held, at + start)):
                stop, after = place.span()
            elif len(held) - at > _LONGEST:  # memory has an end; here a token may come out otherwise than in the whole
                place = _ANY_SPACE.search(held, at + _LONGEST // 2)
                stop, after = place.span() if place else (at + _LONGEST, at + _LONGEST)
            else:
                start = len(held) - at - 1  # looked through up to here
                break
            if ready is not None:
                yield ready, False
            piece, at, start = held[at:stop], after, _PIECE
            ready = piece if ready is not None or piece.strip() else None
    if ready is not None:
        yield ready, False
        yield held[at:], True
    elif held[at:].strip():
        yield held[at:], True


def _text_of(row, where, column):
    if column not in row:
        columns = f"{column!r}, but {', '.join(map(repr, row))}"
        raise InputError(f"{where} has no column {columns}; name it with --text_column")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: column '{column}' does not hold text: {text!r:.80}")
    return check_text(text, where)


def check_text(text, where, refuse=InputError):
    """The text, which must be one that can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(f"{where}: half a character (a lone surrogate) at place {error.start}") from None
    return text


def _refuse_nul(text, file, offset=0):
    if "\0" in text:
        place = offset + len(text[: text.index("\0")].encode())
        raise InputError(
            f"{file} is not text: a NUL byte at offset {place}; if it is UTF-16, convert it, for example with iconv -f "
            "utf-16 -t utf-8"
        )


@contextmanager
def _opened(file, progress):
    """The bytes of a file, decompressed where its name says that it is compressed."""
    decompress = COMPRESSIONS.get(Path(file).suffix.lower(), lambda raw: raw)
    told = 0

    def tell():
        nonlocal told
        progress(raw.tell() - told)
        told = raw.tell()

    try:
        with open(file, "rb") as raw:
            yield decompress(raw), tell
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}") from None


def _read_blocks(file, progress):
    """The text of a file, a block at a time."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(file, progress) as (stream, tell):
        block = stream.read(_BLOCK)
        if block.startswith(codecs.BOM_UTF8):
            block, offset = block[3:], 3
        while True:
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                _refuse_encoding(file, error, offset - pending)
            _refuse_nul(text, file, offset - pending)
            if not block:
                return
            yield text
            offset += len(block)
            tell()
            block = stream.read(_BLOCK)


def _read_lines(file, progress, is_plain=False):
    """The lines of a file, numbered from 1, with their ends; a plain one may not hold NUL."""
    offset = 0
    with _opened(file, progress) as (stream, tell):
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as error:
                _refuse_encoding(file, error, offset)
            if is_plain:
                _refuse_nul(text, file, offset)
            offset += len(line)
            yield number, text
            tell()


def _refuse_encoding(file, error, offset):
    is_utf16 = offset == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    raise InputError(
        f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}; convert it, "
        f"for example with iconv -f {'utf-16' if is_utf16 else 'latin1'} -t utf-8"
    ) from None


def read_rows(source, progress=lambda count: None):
    """(where it stands, the row as a dict) of each row.

    Raises:
        InputError: see [`read_documents`]; or the source has no columns.
    """
    if source.format in ("text", *TOKEN_ID_FORMATS):
        raise InputError(
            f"{source.name} has no columns: give .jsonl, .json, .csv, .tsv, .parquet or a data set of the Hub"
        )
    if source.format in ("hub", "parquet"):
        yield from _load_rows(source, progress)
        return
    read = {"jsonl": _read_json_lines, "json": _read_json, "csv": _read_csv}[source.format]
    for file in source.files:
        for where, row in read(file, progress):
            if not isinstance(row, dict):
                raise InputError(f"{where} is not an object with columns: {row!s:.80}")
            yield where, row


def read_conll(source, words="tokens", labels="label"):
    """The sentences of CoNLL files, as rows with two columns: a word a line, its label last on the line, and an empty
    line after each sentence (Tjong Kim Sang and De Meulder 2003). A word without a label has None.

    Args:
        words, labels: what to call the columns.
    """
    for file in source.files:
        begin, row = 0, {words: [], labels: []}
        for number, line in _read_lines(file, lambda count: None, is_plain=True):
            has_text = line.strip(" \t\r\n\ufeff")  # a lone byte order mark, as of joined files, is none
            # only at plain spaces: a word may hold others
            fields = line.rstrip("\r\n").split("\t") if has_text and "\t" in line else re.split(" +", has_text)
            is_comment = not begin and line.startswith("# ") and "=" in line and "\t" not in line  # as "# sent_id = 1"
            if has_text and fields[0] != "-DOCSTART-" and not is_comment:
                begin = begin or number
                row[words].append(fields[0].strip(" "))
                row[labels].append(fields[-1].strip(" ") or None if len(fields) > 1 else None)
            elif begin:
                yield f"{file} line {begin}", row
                begin, row = 0, {words: [], labels: []}
        if begin:
            yield f"{file} line {begin}", row


def _read_json_lines(file, progress):
    for number, text in _read_lines(file, progress):
        if text.strip():
            try:
                yield f"{file} line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:
                message = f"{file} line {number} is not JSON: {error}; each line must be an object of its own"
                raise InputError(message) from None


def _read_json(file, progress):
    """The objects of a list, or of a file that has one after another; never all of them in memory."""
    decoder, blocks, held, at, number = json.JSONDecoder(), _read_blocks(file, progress), "", 0, 0

    def read_on(wanted):
        """Have so many characters more, if there are."""
        nonlocal held, at
        found, size = [held[at:]], 0
        while size < wanted and (block := next(blocks, "")):
            found.append(block)
            size += len(block)
        held, at = "".join(found), 0
        return size > 0

    def next_character():
        nonlocal at
        while True:
            at = _SPACE.match(held, at).end()
            if at < len(held):
                return held[at]
            if not read_on(1):
                return ""

    def refuse(problem):
        raise InputError(f"{file} object {number + 1} is not JSON: {problem}") from None

    is_list = next_character() == "["
    at += is_list
    while (character := next_character()) and not (is_list and character == "]"):
        if is_list and number:
            if character != ",":
                refuse(f"{character!r} where a comma is due")
            at += 1
            next_character()
        while True:
            try:
                row, end = decoder.raw_decode(held, at)
                break
            except RecursionError as error:
                refuse(error)
            except ValueError as error:
                is_cut = "Unterminated" in error.msg or error.pos > len(held) - 20  # there may be more of it to come
                if not is_cut or not read_on(len(held) - at):
                    refuse(f"{error.msg} at character {error.pos - at} of it")
        number, at = number + 1, end
        yield f"{file} object {number}", row
    if is_list and character != "]":
        refuse("the list is cut short, it has no end")
    at += is_list
    if next_character():
        refuse("something stands after the list")


def _read_csv(file, progress):
    csv.field_size_limit(1 << 31 - 1)
    delimiter = "\t" if ".tsv" in Path(file).name.lower() else ","
    rows = csv.DictReader(
        (text for _, text in _read_lines(file, progress, is_plain=True)), delimiter=delimiter, strict=True
    )
    try:
        for row in rows:
            where = f"{file} line {rows.line_num}"
            if len(set(rows.fieldnames)) < len(rows.fieldnames):
                raise InputError(f"{file}: two columns have one name, of {', '.join(map(repr, rows.fieldnames))}")
            if None in row.values():
                raise InputError(f"{where} has fewer fields than the {len(rows.fieldnames)} that the first line names")
            if None in row:
                raise InputError(f"{where} has more fields than the {len(rows.fieldnames)} that the first line names")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num + 1} cannot be read as CSV: {error}") from None


def _load_rows(source, progress):
    try:
        if source.format == "hub":
            rows = stream_hub(source) if source.is_streamed else load_hub(source)
        else:
            if not any(parquet.read_metadata(file).num_rows for file in source.files):
                raise InputError(f"{source.name} has no rows; give a file with text in it")
            rows = datasets.load_dataset("parquet", data_files=list(source.files), split="train", streaming=True)
        decode = {name: feature for name, feature in (rows.features or {}).items() if _has_names(feature)}
        for number, row in enumerate(rows, start=1):
            progress(1)
            for name, feature in decode.items():  # numbers of classes as their names
                row[name] = _names_of(row[name], feature)
            yield f"{source.name} row {number}", row
    except InputError:
        raise
    except Exception as error:  # the library's errors, its parsers' and the network's are of many classes
        raise InputError(
            f"{source.name} cannot be read as {source.format}: {first_line(error.__cause__ or error)[:300]}"
        ) from None


def _has_names(feature):
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)


def _names_of(value, feature):
    if isinstance(value, list):
        return [_names_of(one, feature.feature) for one in value]
    return None if value is None or value < 0 else feature.int2str(value)  # -1: the library's "no label"


def stream_documents(source, cut, state=None):
    """The documents of a Hub data set, read from the network as they come.

    Args:
        cut: see [`read_documents`].
        state: where to begin, as this gave it.
    Yields:
        (text, is_end, state, count): a piece, whether its document ends with it, where the row of the document begins,
        and which piece of it this is.
    Raises:
        InputError: see [`read_documents`].
    """
    try:
        rows = stream_hub(source)
        if state is not None:
            rows.load_state_dict(state)
        before = rows.state_dict()
        for number, row in enumerate(rows, start=1):
            text = _text_of(row, f"{source.name} row {number}", source.text_column)
            for count, (piece, is_end) in enumerate(_in_pieces([text], cut)):
                yield piece, is_end, before, count
            before = rows.state_dict()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source.name} cannot be read: {first_line(error.__cause__ or error)[:300]}") from None
