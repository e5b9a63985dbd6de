"""The command line: minidiff train, sample, evaluate, verify, check, info, play.  Each is a file of this folder.

What the user can put right (an argument, a file, a missing device) is reported in one sentence, with exit status 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from minidiff import __version__
from minidiff.cli import check, evaluate, info, play, sample, train, verify
from minidiff.cli import ranks as cli_ranks
from minidiff.cli.arguments import Parser
from minidiff.errors import UserError, brief, is_of_gpu, print_any_text
from minidiff.signals import on_stop, stop_at_once
from minidiff.terminal import Output, say, unfailing
from minidiff.training.ranks import rank_and_size, ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 1 interrupted and saved, or a law broken, or an exercise not right, 2 a mistake that the user can put right,
    or output that could not be printed (train's is in its files, too), 128 + n stopped by the signal n with nothing
    saved since the last state (130 by Ctrl-C).
    """
    print_any_text()
    with unfailing() as (out, _):
        if rank_and_size()[1] > 1:
            return cli_ranks.together(lambda: _main(argv, out))
        return _main(argv, out)


def _main(argv: Sequence[str] | None, out: Output) -> int:
    try:
        args = _parser().parse_args(argv)
        status, in_files = _with_warnings(args), args.command is train.train
    except SystemExit as stop:                              # after --help, --version or a wrong argument
        status, in_files = stop.code, False
    out.flush()
    if out.error:
        say(f"the output could not be printed ({getattr(out.error, 'strerror', None) or out.error})")
        status = status or (0 if in_files else 2)
    return status


def _with_warnings(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)     # of overflows; what they lead to is checked
        warnings.showwarning = lambda message, *_: say(message)
        return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minidiff", description="Text-to-image diffusion from scratch: train, sample, evaluate.")
    parser.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in (train, sample, evaluate, verify, check, info, play):
        command.add(commands)
    return parser


def _run(args: argparse.Namespace) -> int:
    try:
        with on_stop(stop_at_once):
            if args.command is not train.train and ranks().size > 1:
                raise UserError(f"mpiexec started {ranks().size} ranks of minidiff, but only train divides its work "
                                "among ranks: leave out mpiexec")
            from minidiff.engine.backend import check_device
            if getattr(args, "device", None):
                check_device(args.device)
            return args.command(args) or 0
    except UserError as error:
        if sys.flags.dev_mode:                              # python -X dev: for the author of a data set
            traceback.print_exc()
        say(error)
    except KeyboardInterrupt as stop:
        say(str(stop) or "stopped")
        return 128 + getattr(stop, "number", signal.SIGINT)
    except OSError as error:
        say(f"{error.filename or 'the system'}: {error.strerror or error}")
    except RuntimeError as error:
        if not is_of_gpu(error):
            raise
        say(f"the GPU failed: {error}; start the command again (train: with --resume)")
    except MemoryError:
        say("out of memory: ask for fewer images at a time (--count, --images, --batch)")
    except Exception:                                       # a bug of ours, which is worth its traceback
        raise
    except BaseException as error:                          # of the user's code: SystemExit has status 0, perhaps
        say(f"the code that was run ended with {brief(error)}")
    return 2
