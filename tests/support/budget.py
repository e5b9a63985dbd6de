"""The budget of a refusal: one second of a core, and 200 MB."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS, MEGABYTES = 1.0, 200
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")            # of Linux


@dataclass(frozen=True)
class Measured:
    result: object                          # what the call returned, or the exception that it raised
    seconds: float                          # of this thread's core
    megabytes: float                        # above what the process had before; 0 where it cannot be measured

    @property
    def raised(self) -> bool:
        return isinstance(self.result, BaseException)


def measured(call: Callable[[], object]) -> Measured:
    before = _reset_peak()
    start = time.thread_time()
    try:
        result = call()
    except Exception as error:
        result = error
    return Measured(result, time.thread_time() - start, max(0.0, _megabytes("VmHWM") - before))


def measured_again(new_call: Callable[[], Callable[[], object]]) -> Measured:
    """A new call, measured; and again, up to five times, where it raised over the budget.

    Other work on the machine costs time, too.
    """
    result = measured(new_call())
    for _ in range(5):
        if result.raised and result.seconds >= SECONDS:
            result = measured(new_call())
    return result


def _reset_peak() -> float:
    """Sets the process's largest memory to its memory now, which it returns."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    return _megabytes("VmRSS")


def _megabytes(field: str) -> float:
    if not STATUS.exists():
        return 0.0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
