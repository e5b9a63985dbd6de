"""A command on the ranks that mpiexec started: one rank prints, and all end together.

    all fail            (a wrong argument)          the first rank reports it, and all exit with its status
    one fails           (a disk, memory, a bug)     it reports why in one sentence, and ends the others
    one is killed       mpiexec kills the others too, so that no rank can report it: a helper process of the first rank,
                        which does nothing else, says how to resume
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import numpy as np

from minidiff.errors import UserError
from minidiff.terminal import say
from minidiff.training.ranks import rank_and_size, ranks

GRACE = 3.0                                                 # seconds in which all have failed, if they fail alike
GO_ON = "if it had saved a state, resume from it with --resume"


def together(main: Callable[[], int]) -> int:
    """main() on each rank, whose status it returns; the first rank alone prints.

    A rank that fails alone, by an exception or a status other than 0, ends them all.
    """
    (rank, size), said = rank_and_size(), io.StringIO()
    helper = _Helper(size) if rank == 0 else None
    try:
        if rank == 0:
            status, words = _status_of(main)
        else:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                status, words = _status_of(main)
        sys.stdout.flush()
        sys.stderr.flush()
        _leave(status, words, said.getvalue())
    finally:
        if helper:
            helper.dismiss()
    return status


def _status_of(main: Callable[[], int]) -> tuple[int, str]:
    """main's status, and the message where it raised."""
    try:
        ranks()                                             # UserError first of all, if they cannot be joined
        return main(), ""
    except UserError as error:
        say(error)
        return 2, str(error)
    except Exception as error:                              # a bug of ours: report all that is known
        traceback.print_exc()
        return 2, f"{type(error).__name__}: {error}"


def _leave(status: int, words: str, said: str) -> None:
    """Waits until all ranks are here; one that failed waits for GRACE seconds, then reports it and ends the others."""
    try:
        own = ranks()
    except UserError:                                       # no rank can ask another, and all of them fail alike
        return
    failed = status != 0
    words = words or " ".join(said.split("minidiff: ")[-1].split())
    everyones = np.zeros(own.size, bool)                    # whether they failed
    there, deadline = own.comm.Iallgather(np.array([failed]), everyones), time.monotonic() + GRACE
    while not there.Test():
        if failed and time.monotonic() > deadline:
            _say(own, words, said, f", and the {own.size} were stopped: {GO_ON}")
            time.sleep(0.5)                                 # until mpiexec has passed the message on
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)                # silences MPI's own message
            own.comm.Abort(status)
        time.sleep(0.01)                                    # MPI's own wait would keep a core busy
    if failed and not everyones[:own.rank].any():           # else a rank before it reports
        _say(own, words, said, "")


def _say(own, words: str, said: str, what_then: str) -> None:
    """Reports in one sentence why this rank failed; the first rank has printed its own reason already."""
    if own.rank == 0:
        if what_then:
            say(f"rank 0 failed in this way{what_then}")
    else:
        at = said.find("Traceback (")                       # a progress bar may stand on this line
        print("\n" + (said[at:] if at >= 0 else ""), end="", file=sys.stderr)
        say(f"rank {own.rank} failed ({words}){what_then}")
    sys.stderr.flush()


class _Helper:
    """A process that prints a message if this one ends without dismissing it, as when this one is killed.

    It has a session of its own, so that a signal to the ranks does not reach it.
    """

    def __init__(self, size: int):
        words = (f"\nminidiff: the run was cut off: one of its {size} ranks was killed or crashed, and mpiexec "
                 f"ended the others; {GO_ON}\n")
        code = "import os, sys\nif not os.read(0, 1): os.write(2, sys.argv[1].encode())"
        self.process = subprocess.Popen([sys.executable, "-ISc", code, words], stdin=subprocess.PIPE,
                                        start_new_session=True)

    def dismiss(self) -> None:
        self.process.communicate(b".")
