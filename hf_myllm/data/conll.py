"""Read CoNLL files: one word per line with its columns, and an empty line after each sentence.

The columns differ between the shared tasks. The first sentence of two words or more shows which kind a file is:

    word first                 the label is the last column (Tjong Kim Sang and De Meulder 2003)
    1, 2, 3, ... first         then the word; the label is the third column if there are three
    the same with 10 columns   CoNLL-U: universaldependencies.org/format.html, or CoNLL-X, whose names differ
"""

import re
from itertools import chain

from ..errors import DataError
from .readers import read_lines

_CONLLU = {"upos": 3, "xpos": 4, "lemma": 2, "feats": 5, "deprel": 7, "misc": 9}
_CONLL2003 = {"pos": 1, "chunk": 2, "ner": 3}
_WORD_NAMES = ("word", "words", "token", "tokens", "form")  # in a header, with the names of labels
_LABEL_NAMES = re.compile(r"(label|tag|ner|pos|upos|xpos|chunk|entity)(s|_tags?)?")
_NUMBER = re.compile(r"\d+")
_NO_WORD = re.compile(r"\d+(-\d+|\.\d+)")  # a range of words that are written as one (1-2), or an empty node (1.1)


def read_conll(source, words="tokens", labels="label", needs_labels=True):
    """Yield (where, row) of each sentence of CoNLL files. The label of a word without one is None.

    Args:
        words, labels: the names of the row's two columns. `labels` may also be the number of the label's column,
            counted from 1, or its name: that of a header; in CoNLL-U upos (the default), xpos, lemma, feats, deprel or
            misc; in four columns, those of CoNLL-2003, pos, chunk or ner.
        needs_labels: whether to refuse a file whose label is in one of several columns.
    Raises:
        DataError: the label's column is not clear, or a line does not have the columns of the others.
    """
    for file in source.open_files():
        sentences, first = _sentences(file), []
        for sentence in sentences:  # a sentence of one word does not show whether words are numbered
            first.append(sentence)
            if len(_numbered_words(sentence)) > 1:
                break
        names = _pop_header(first)
        layout = _find_layout(first[-1], names, labels, needs_labels, file) if first else None
        for sentence in chain(first, sentences):
            rows = [_word_and_label(line, fields, layout, file) for line, fields in sentence]
            if rows := [row for row in rows if row is not None]:
                own_words, own_labels = zip(*rows, strict=True)
                yield f"{file} line {sentence[0][0]}", {words: list(own_words), labels: list(own_labels)}


def _sentences(file):
    """Yield the sentences of a file, lists of (number of the line, its fields), with lines that may be comments."""
    sentence = []
    for number, line in read_lines(file):
        text = line.strip(" \t\r\n\ufeff")  # joined files may have a byte order mark on a line of its own
        if line.startswith("#begin document"):
            raise DataError(f"{file} line {number}: CoNLL-2012 is not read; write a word and its label on each line")
        # a word may contain other white space, so split at tabs or plain spaces only
        fields = line.rstrip("\r\n").split("\t") if text and "\t" in line else re.split(" +", text)
        is_comment = not sentence and line.startswith("# ") and "=" in line and "\t" not in line  # "# sent_id = 1"
        if text and fields[0] != "-DOCSTART-" and not is_comment:
            sentence.append((number, fields))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _numbered_words(sentence):
    """Return the lines of a sentence without comments, ranges and empty nodes."""
    return [fields for _, fields in sentence if not fields[0].startswith("#") and not _NO_WORD.fullmatch(fields[0])]


def _pop_header(sentences):
    """Remove a header, the first line of a file, and return its names with the indices of their columns."""
    header = [name.lower() for name in sentences[0][0][1]] if sentences else [""]
    if header[0] not in _WORD_NAMES or not _LABEL_NAMES.fullmatch(header[-1]):
        return {}
    sentences[0].pop(0)
    if not sentences[0]:
        sentences.pop(0)
    return {name: index for index, name in enumerate(header)}


def _find_layout(sentence, names, labels, needs_labels, file):
    """Return (number of columns if words are numbered, index of the label's column).

    Args:
        names: of the columns by a header.
    """
    fields = _numbered_words(sentence)
    width = len(fields[0]) if fields else 0
    is_numbered = width > 2 and [line[0] for line in fields[:2]] in (["0", "1"], ["1", "2"])
    start = 2 if is_numbered else 1  # the first column of labels
    choices = range(start, width)
    names = names or (_CONLLU if is_numbered and width == 10 else _CONLL2003 if (is_numbered, width) == (0, 4) else {})
    if labels.isdecimal() and len(labels) < 5:
        index = max(0, int(labels) - 1)
    elif len(choices) == 1:  # the only column of labels, whatever its name
        index = start
    elif labels == "label" and labels not in names:  # not set in the recipe
        index = _CONLLU["upos"] if names is _CONLLU else None if is_numbered else -1
    else:
        index = names.get(labels.lower())
    if index not in (-1, *choices) and needs_labels:
        shown = ", ".join(f"{column + 1} {fields[0][column]!r:.20}" for column in choices)
        known = f", or by its name ({', '.join(names)})" if names else ""
        raise DataError(
            f"label_column: {file} has no column {labels!r} of labels, but {shown}; choose one by its number{known}"
        )
    return (width if is_numbered else 0), start if index is None else index


def _word_and_label(line, fields, layout, file):
    """Return the word of a line and its label, or None if the line has no word."""
    width, label = layout
    if not width:
        return fields[0].strip(" "), fields[label].strip(" ") or None if len(fields) > max(1, label) else None
    if fields[0].startswith("#") or _NO_WORD.fullmatch(fields[0]):
        return None
    if not _NUMBER.fullmatch(fields[0]) or len(fields) != width:
        raise DataError(f"{file} line {line} is not a number and {width - 1} more columns, as the first sentence has")
    return fields[1].strip(" "), fields[label].strip(" ") or None
