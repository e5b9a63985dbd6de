"""Time on the GPU itself: how long a call takes there, and the GPU's best speeds."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cases import random_arrays


class Card:
    """A GPU's queue: events in it, work that keeps it busy, and waiting for its end."""

    def __init__(self):
        import cupy
        self._cupy, device = cupy, cupy.cuda.Device()
        self.event, self.elapsed_ms, self.now = cupy.cuda.Event, cupy.cuda.get_elapsed_time, time.perf_counter
        self.synchronize = device.synchronize
        attributes = device.attributes
        self.cache_bytes, self._khz = attributes["L2CacheSize"], attributes.get("ClockRate", 2_000_000)
        self._spin = cupy.RawKernel('extern "C" __global__ void spin(long long cycles) {'
                                    "long long began = clock64(); while (clock64() - began < cycles) {} }", "spin")

    def spin(self, seconds: float) -> None:
        """Keeps the GPU busy for about this many seconds."""
        self._spin((1,), (1,), (np.int64(seconds * 1e3 * self._khz),))

    def poison(self, nbytes: int) -> None:
        """The next arrays that are made, up to this many bytes, lie in memory that holds NaN."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.full(nbytes // 4 + 1, np.nan, self._cupy.float32)


@dataclass(frozen=True)
class Taken:
    """The time of one call."""

    ms: float                                               # on the GPU, the median
    host_us: float                                          # that the host took to launch it
    waits: bool                                             # whether the host waited until the GPU was done


def take_time(calls: Sequence[Callable], card: Card, budget: float = 0.03, most: int = 30) -> Taken:
    """The median over about `budget` seconds of calls, taken in turn.

    The GPU spins until all calls are in its queue, so the time between two events is the GPU's own and includes none of
    the host's.  A call that waits for the GPU cannot be queued in this way, and its time includes the host's.
    """
    calls[0]()
    card.synchronize()
    began = card.now()
    calls[-1]()
    host = card.now() - began
    card.synchronize()
    whole = card.now() - began                              # at least the GPU's time
    count = 1 if whole > 5 * budget else max(3, min(most, int(budget / whole)))
    queue = [calls[i % len(calls)] for i in range(count)]

    results: deque = deque(maxlen=len(calls))               # kept, so that each call writes to different memory
    lead = 2 * host * count + 1e-4
    for _ in range(3):
        events = [card.event() for _ in range(count + 1)]
        card.spin(lead)
        began = card.now()
        events[0].record()
        for call, event in zip(queue, events[1:], strict=True):
            results.append(call())
            event.record()
        asked = card.now() - began
        waits = events[0].done                              # the GPU stopped spinning before all were launched
        card.synchronize()
        if not waits:
            break
        lead = 4 * asked + 1e-4
    ms = [card.elapsed_ms(a, b) for a, b in zip(events, events[1:], strict=False)]
    return Taken(statistics.median(ms), 1e6 * asked / count, waits)


def ceilings(card: Card) -> dict[str, float]:
    """The speed of the GPU's own libraries: TFLOP/s of a matrix product in each mode, GB/s of a copy."""
    import cupy
    from cupy._core import _routines_linalg, set_compute_type
    found, n = {}, 8192
    for mode, kind in ("float32", "FP32"), ("tf32", "TF32"), ("float16", None):
        if kind:
            set_compute_type(cupy.float32, getattr(_routines_linalg, f"COMPUTE_TYPE_{kind}"))
        a, b = random_arrays(mode, (n, n), (n, n))
        found[mode] = 2 * n**3 / take_time([lambda a=a, b=b: a @ b], card, 0.2).ms / 1e9
    set_compute_type(cupy.float32, _routines_linalg.COMPUTE_TYPE_DEFAULT)
    found["bfloat16"] = found["float16"]                    # the tensor cores compute both at the same rate
    a, b = cupy.zeros(2**28, cupy.float32), cupy.empty(2**28, cupy.float32)         # 1 GiB each
    found["copy"] = 2 * a.nbytes / take_time([lambda: cupy.copyto(b, a)], card, 0.1).ms / 1e6
    return found
