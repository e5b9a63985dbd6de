"""`minidiff`, and `python -m minidiff`: the command line as a process of its own."""

import signal
import sys


def program() -> int:
    """Runs one command; returns the exit status."""
    # until a command handles Ctrl-C, and after it, Ctrl-C ends the process without a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from minidiff import terminal
    terminal.open_missing()
    try:
        from minidiff.cli.main import main
        status = main()
    except KeyboardInterrupt:                               # a further Ctrl-C, while the first one was reported
        status = 130
    except Exception:                                       # a bug of ours: report all that is known
        import traceback
        traceback.print_exc()
        status = 2
    terminal.drop_unwritable()
    return status


if __name__ == "__main__":
    sys.exit(program())
