"""The command line, called as a function."""

from minidiff.cli import main as cli


def call(*arguments) -> int:
    """The exit status of `minidiff` with these arguments."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
