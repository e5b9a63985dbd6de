"""UserError: the exception whose message is written for the user of the program; errors of the user's own code; and
what scripts do at their start."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minidiff.terminal import one_line


class UserError(ValueError):
    """A problem that the user can solve: a wrong argument, a damaged file, a missing package, a full disk.

    Its message is one sentence that names what is wrong and, where there is one, the remedy.  The command line prints
    the sentence without a traceback and exits with status 2; a program may catch it as a ValueError.  Every refusal of
    a user's file or argument is a UserError, in one line: what a file put into the message cannot move a terminal's
    cursor, nor begin a line of its own.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def run_main(main: Callable, **arguments) -> None:
    """Calls `main(**arguments)` of a script.  A UserError ends the script with its message and status 1, without a
    traceback."""
    print_any_text()
    try:
        main(**arguments)
    except UserError as error:
        raise SystemExit(one_line(str(error))) from error


def brief(error: BaseException) -> str:
    """The exception's type and message, on one line; the type alone where it cannot be asked for its message.  A
    UserError's message stands for itself."""
    try:
        message = " ".join(str(error).split())[:200]
    except BaseException:                                   # of a stranger's __str__
        message = ""
    if isinstance(error, UserError):
        return one_line(message)
    return one_line(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def is_of_gpu(error: BaseException) -> bool:
    """Whether CuPy raised it."""
    return type(error).__module__.startswith("cupy")


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around code that the user brings: whatever it raises becomes a UserError that begins with `what`.

    So does SystemExit, which would otherwise end the command with status 0.  Ctrl-C, a lack of memory and a GPU's
    failure stay as they are.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        if is_of_gpu(error):
            raise
        raise UserError(f"{what}: {brief(error)}") from error


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Like user_code; the message of a ValueError or TypeError stands without its type, as what a system refuses."""
    with user_code(what):
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"{what}: {error}") from error


def print_any_text() -> None:
    """From now on a character that the output's encoding lacks is printed as an escape, and ends no program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # not where a program has put another object in its place
            stream.reconfigure(errors="backslashreplace")
