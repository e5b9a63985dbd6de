"""The one exception that is meant for the person at the keyboard."""

from collections.abc import Callable


class UserError(ValueError):
    """A mistake from outside (a file, an argument, a machine), told in one sentence that names the remedy.

    The command line prints the sentence and exits with status 2; a program may catch it as a ValueError.
    """


def run_main(main: Callable, **arguments) -> None:
    """Runs a program's `main`; a UserError ends it with that sentence, and status 1, in place of a traceback."""
    try:
        main(**arguments)
    except UserError as error:
        raise SystemExit(str(error)) from error
