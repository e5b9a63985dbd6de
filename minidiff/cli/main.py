"""The command line: minidiff train, sample, evaluate, verify, info.  Each command is a file of this folder.

What the user can put right (an argument, a file, a missing device) is reported in one sentence, with exit status 2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from minidiff import __version__
from minidiff.cli import evaluate, info, sample, train, verify
from minidiff.cli import ranks as cli_ranks
from minidiff.cli.arguments import Parser
from minidiff.errors import UserError, print_any_text
from minidiff.training.ranks import rank_and_size, ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 1 interrupted and saved, or a law broken, 2 a mistake that the user can put right.
    """
    print_any_text()
    if rank_and_size()[1] > 1:
        return cli_ranks.together(lambda: _main(argv))
    return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)     # of overflows; what they lead to is checked
        warnings.showwarning = lambda message, *_: print(f"minidiff: {message}", file=sys.stderr)
        return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minidiff", description="Text-to-image diffusion from scratch: train, sample, evaluate.")
    parser.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in (train, sample, evaluate, verify, info):
        command.add(commands)
    return parser


def _run(args: argparse.Namespace) -> int:
    try:
        if args.command is not train.train and ranks().size > 1:
            raise UserError(f"mpiexec started {ranks().size} ranks of minidiff, but only train divides its work among "
                            "ranks: leave out mpiexec")
        from minidiff.engine.backend import check_device
        if getattr(args, "device", None):
            check_device(args.device)
        return args.command(args) or 0
    except UserError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:                              # of the user's own code, which must not end with status 0
        print(f"minidiff: the code that was run asked to exit, with status {stop.code}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminidiff: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:                                 # whoever read our output has gone
        return 1
    except OSError as error:
        print(f"minidiff: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        print(f"minidiff: the GPU failed: {' '.join(str(error).split())}; start the command again (train: with "
              "--resume)", file=sys.stderr)
        return 2
    except MemoryError:
        print("minidiff: out of memory: ask for fewer images at a time (--count, --images, --batch)", file=sys.stderr)
        return 2
