"""Functions that the tests of verify share."""

from minidiff import verify
from minidiff.cli import main as cli

NOISE = "4 ends in noise"


def broken(report) -> set[str]:
    return {row.law for row in report if row.verdict == verify.BROKEN}


def call(*arguments) -> int:
    try:
        return cli.main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def with_factor(module, name, factor):
    original = getattr(module, name)
    return lambda *a, **k: factor * original(*a, **k)
