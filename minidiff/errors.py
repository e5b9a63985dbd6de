"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake from outside (a file, an argument, a machine), told in one sentence that names the remedy.

    The command line prints the sentence and exits with status 2; a program may catch it as a ValueError.
    """
