"""Sums that several blocks of threads share, by kernels/sum_partials_*.cu and sum_rows_*.cu.

Each block writes its partial sum to memory.  Then a second kernel (`sum_partials`), or the block that finishes last
(`sum_rows`, and the convolutions), adds the partial sums in a fixed order.  So the result is the same, bit for bit, on
every run; atomic additions would add in another order each time.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np

from minidiff.engine.cuda import launch as cuda


def accumulator_dtype(dtype) -> np.dtype:
    """The dtype in which kernels add numbers of `dtype`: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def sum_partials(partial, result) -> None:
    """result[...] = the sum of partial's rows: partial (splits, n) of the accumulator's dtype, result of n numbers."""
    source, dtype = cuda.pick("sum_partials", str(result.dtype)), str(result.dtype)
    threads, n, splits = source.constants["THREADS"], result.size, len(partial)
    blocks = math.ceil(n / threads)
    cuda.kernel(source, "sum_partials", dtype)(blocks, threads, partial, result, n, splits)


BUSY = 2                                                    # blocks that keep a multiprocessor busy


def sum_rows(x):
    """x (M, C) -> the sum of its rows, (C,), of x's dtype."""
    import cupy
    x = cupy.ascontiguousarray(x)
    (M, C), dtype = x.shape, str(x.dtype)
    if not x.size:
        return cupy.zeros(C, x.dtype)
    source = cuda.pick("sum_rows", dtype)
    columns = math.ceil(C / source.constants["COLUMNS"])
    # enough blocks to fill the card, but at least a few rows for each warp
    rows = max(4 * source.constants["WARPS"], math.ceil(M * columns / (BUSY * cuda.multiprocessors())))
    parts = math.ceil(M / rows)
    y, found = cupy.empty(C, x.dtype), cupy.empty((parts, C), accumulator_dtype(x.dtype))
    cuda.kernel(source, "sum_rows", dtype)((columns, parts), source.constants["THREADS"], x, found,
                                           counters(columns), y, M, C, rows)
    return y


def counters(count: int):
    """At least `count` zeros, in which a launch counts the blocks that are done, and which it leaves as zeros.

    Launches on one stream follow each other and share them; each stream, and each thread, has its own.
    """
    import cupy
    stream = cupy.cuda.get_current_stream().ptr
    return _counters(cupy.cuda.Device().id, stream, threading.get_ident(), max(1024, 1 << (count - 1).bit_length()))


@functools.cache
def _counters(device: int, stream: int, thread: int, count: int):
    import cupy
    return cupy.zeros(count, "uint32")
