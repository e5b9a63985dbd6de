"""`minidiff` as a process of its own, with the toy system among its systems and a few digits as its data."""

import os
import subprocess
import sys
from pathlib import Path

from support import tiny

from minidiff.data import mnist

TESTS = Path(__file__).parents[1]
PROGRAM = """
import sys
from support.toy import Toy, enter
enter()
{before}
from minidiff.__main__ import program
sys.exit(program())
"""
TRAIN = ("train", "--system", "toy", "--out", "run", "--data", "data", "--images", "0")


def start(folder: Path, *words, before: str = "", **options) -> subprocess.Popen:
    """The command in that folder, which has the folder `data` too.  before: code that runs before it."""
    (folder / "data").mkdir(exist_ok=True)
    mnist.pack(tiny.images(), folder / "data")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(before=before), *map(str, words)], cwd=folder,
                            env=env, **options)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, and what was printed on stdout and stderr."""
    out, err = process.communicate(timeout=200)
    return process.returncode, (out or b"").decode(), (err or b"").decode().replace("\r", "\n")
