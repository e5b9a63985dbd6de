"""The signals that ask a process to stop: Ctrl-C, and those of batch systems, of terminals that close and of limits.

    with on_stop(handler): ...              handler(number, frame) receives them; before and after, all is as it was
    with on_stop(stop_at_once): ...         they raise Stopped, so that half-written files are removed

A signal that is ignored stays ignored: `nohup` ignores SIGHUP, and a shell SIGINT for a job in the background.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# SIGXCPU: the processor time is used up; SIGBREAK: Ctrl-Break, on Windows
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGBREAK")
         if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal stopped the work at once; str() says what the user can do, if anything."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def stop_at_once(number: int, frame) -> None:
    """Raises Stopped; the same signal again ends the process without more ado."""
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)


@contextmanager
def on_stop(handler: Callable) -> Iterator[None]:
    """Within it handler(number, frame) receives STOPS.  Outside the main thread, which alone receives signals, nothing
    changes; nor does a signal that is ignored, or whose handler is not Python's (None), since that one could not be
    put back."""
    before = {}
    try:
        for number in STOPS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
