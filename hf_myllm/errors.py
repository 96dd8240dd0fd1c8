"""The exceptions that this package raises on purpose."""

import argparse
import errno
import re
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_MESSAGE = 2000  # characters: a message may quote a user's value
# control characters but tab, line feed, carriage return and the sequence that clears a line, and those that change the
# direction of text
CONTROL = re.compile(r"\x1b(?!\[K)|[\0-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_URL_USER = re.compile(r"://[^\s/]+@")  # with a password, as endpoints and proxies may have
_URL_QUERY = re.compile(r"(://[^\s?'\"]{0,4096}\?)[^\s'\"]*[^\s'\".,:;)\]}]")  # which may sign a request


def hide_secrets(text):
    """Return text without access tokens of the Hub, and without the users, passwords and queries of URLs."""
    return _URL_QUERY.sub(r"\1***", _URL_USER.sub("://***@", HUB_TOKEN.sub("hf_...", text)))


class InputError(Exception):
    """A user's input (recipe, file, folder, data set, network) cannot be used.

    Base class of all errors that this package raises on purpose. The message is one line:
    `<key or file>: <problem>; <what to do>`.
    """

    def __init__(self, message=""):
        text = hide_secrets(" ".join(str(message)[: 8 * _MAX_MESSAGE].splitlines()))
        super().__init__(text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} ...")


class RecipeError(InputError):
    """A recipe or flag is invalid."""


class DataError(InputError):
    """Training, validation or input data cannot be read or used."""


class ModelError(InputError):
    """A model, its configuration or its tokenizer cannot be loaded or does not fit."""


class CheckpointError(InputError):
    """A run's folder or checkpoint cannot be read, written or resumed from."""


class HubError(InputError):
    """The Hugging Face Hub cannot be reached or refuses a push."""


class RankError(InputError):
    """An error on one rank; that rank prints it."""


class PeerFailure(RankError):
    """This rank failed because another failed first; that one prints the cause, so this one prints nothing."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises an exception instead of exiting."""

    def error(self, message):
        raise RecipeError(f"{message}; --help lists the options")


def first_line(error):
    """Return the first line of a library's error, or the name of its type if it has no message.

    Advice to run the code in a file or a repository is not passed on.
    """
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "Weights only load failed" in text:
        return "it holds more than tensors"
    return re.sub(r"[^.;:,(]*\b(trust_remote_code|weights_only)\b[^.;)]*[.;)]?", "", text).strip()


def os_problem(error, can_resume=False):
    """Return an OSError in words: the file, the problem and, if the disk is full, what to do."""
    text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else first_line(error)
    again = "use --init_from resume" if can_resume else "try again"
    return f"{text}; free some space, then {again}" if error.errno in DISK_FULL else text


@contextmanager
def library_errors(problem, raises=DataError, catches=Exception, passes=(), advice=""):
    """Turn the errors of libraries, of the file system and of the network, which have many classes, into one of ours.

    Args:
        problem: what cannot be done; the message is "<problem>: <first line of the error><advice>".
        passes: classes of errors to leave as they are, besides ours.
    """
    try:
        yield
    except (InputError, *passes):
        raise
    except catches as error:
        raise raises(f"{problem}: {first_line(error.__cause__ or error)[:300]}{advice}") from None


def show(value, limit=80):
    """Return a value for a message: its repr, cut to a length. A huge integer has none."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def printable(text):
    """Return text without control characters: text from files, models and libraries may move a terminal's cursor."""
    return "".join(character if character.isprintable() or character == "\t" else "\ufffd" for character in text)
