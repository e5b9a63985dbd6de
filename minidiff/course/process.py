"""Judges a learner's file in a process of its own: it may loop for ever, take all memory, print, or end itself.

    verdict, printed = check("ex07_ddpm_step", Path("exercises/ex07_ddpm_step.py"))
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from minidiff.course.exercise import exercise
from minidiff.course.judge import FAULT, Verdict
from minidiff.course.learner import late_at
from minidiff.errors import UserError
from minidiff.input_files import read_file

START = 60                                                  # seconds in which Python and NumPy must have started
LARGEST = 1 << 20                                           # bytes of a verdict
MOST_PRINTED = 10_000                                       # bytes of what it printed that are kept


def check(name: str, path: Path, seconds: float | None = None) -> tuple[Verdict, list[str]]:
    """The verdict on a learner's file, and the first lines that it printed.  seconds: else those of the exercise."""
    path, seconds = path.absolute(), seconds or exercise(name).seconds
    with TemporaryDirectory(prefix="minidiff-check-") as folder:
        answer = Path(folder) / "verdict"
        process = _started(name, path, seconds, answer)
        printed = _Printed(process.stdout)
        try:
            process.wait(seconds + START)
        except subprocess.TimeoutExpired:
            pass
        finally:                                            # after Ctrl-C, too
            _kill(process)
        late = _text(Path(f"{answer}.late"))
        found = _text(answer)
    lines = printed.lines()
    if found:
        return Verdict(*json.loads(found)), lines
    return Verdict(FAULT, _ended(process.returncode, path, seconds, late)), lines


def _started(name: str, path: Path, seconds: float, answer: Path) -> subprocess.Popen:
    here = str(Path(__file__).parents[2])                   # where minidiff is imported from
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
                        "PYTHONIOENCODING": "utf-8:backslashreplace", "PYTHONUNBUFFERED": "1",
                        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # -P: files beside the learner's, such as a numpy.py, do not take the place of others
    command = [sys.executable, "-P", "-m", "minidiff.course.learner", name, str(path), str(seconds), str(answer)]
    return subprocess.Popen(command, cwd=path.parent, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def _kill(process: subprocess.Popen) -> None:
    """Ends the process and those that it started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)          # its own group, which start_new_session made
        else:
            process.kill()
    process.wait()


class _Printed:
    """Reads what a process prints to its end, and keeps the beginning."""

    def __init__(self, pipe):
        self.pipe, self.kept, self.thread = pipe, b"", threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while chunk := self.pipe.read1(1 << 16):
            self.kept += chunk[:MOST_PRINTED - len(self.kept)]

    def lines(self) -> list[str]:
        self.thread.join(5)
        if not self.thread.is_alive():
            self.pipe.close()
        return [line for line in self.kept.decode("utf-8", "replace").splitlines() if line.strip()]


def _text(path: Path) -> str:
    try:
        return read_file(path, LARGEST).decode("utf-8", "replace")
    except UserError:
        return ""


def _ended(status: int, path: Path, seconds: float, late: str) -> str:
    """Why there is no verdict."""
    if late:
        at = late_at(late, path)
        return f"{path.name} was not done after {seconds:g} s" + (f", when it was at {at}: does a loop there end?"
                                                                  if at else ": it has a loop that does not end")
    if status == -9:
        return f"{path.name} was stopped, after {seconds:g} s or by the system, for too much memory"
    if status < 0:
        return f"{path.name} was ended by the signal {-status} before it could be judged"
    return f"{path.name} ended its process, with the status {status}, before it could be judged"
