"""One clear line for a user's mistake, instead of a traceback."""

import argparse
import os
import signal
import sys


class InputError(Exception):
    """A user's input (recipe, file, folder, data set, network) cannot be used.

    Base class of all errors that this package raises on purpose. The message is one line:
    `<key or file>: <problem>; <what to do>`.
    """


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
    """What an error of a library says first, or its name when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text):
    """A line in which nothing moves a terminal's cursor or turns its colours: what a model, a file or a library says
    may hold anything."""
    return "".join(character if character.isprintable() or character == "\t" else "\ufffd" for character in text)


def exit_on_input_error(main):
    """Wrap a command's `main`: an InputError becomes one line on stderr and exit code 2.

    On several processes, the first of each machine speaks for all.
    """

    def run(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
                print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read our output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        sys.exit(code)  # here, where a notebook shows it without the traceback of what came before

    run.__doc__ = main.__doc__
    return run
