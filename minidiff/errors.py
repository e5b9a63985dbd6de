"""UserError: the exception whose message is written for the user of the program; and what scripts do at their start."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A problem that the user can solve: a wrong argument, a damaged file, a missing package, a full disk.

    Its message is one sentence that names what is wrong and, where there is one, the remedy.  The command line prints
    the sentence without a traceback and exits with status 2; a program may catch it as a ValueError.
    """


def run_main(main: Callable, **arguments) -> None:
    """Calls `main(**arguments)` of a script.  A UserError ends the script with its message and status 1, without a
    traceback."""
    print_any_text()
    try:
        main(**arguments)
    except UserError as error:
        raise SystemExit(str(error)) from error


def print_any_text() -> None:
    """From now on a character that the output's encoding lacks is printed as an escape, and ends no program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # not where a program has put another object in its place
            stream.reconfigure(errors="backslashreplace")
