"""Sums that several blocks of threads share, by kernels/sum_partials_*.cu.

Each block writes its partial sum to memory, and a second kernel adds the partial sums in a fixed order.  So the result
is the same, bit for bit, on every run; atomic additions would add in another order each time.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.engine.cuda import launch as cuda


def accumulator_dtype(dtype) -> np.dtype:
    """The dtype in which kernels add numbers of `dtype`: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def sum_partials(partial, result, bias=None, silu: bool = False) -> None:
    """result[...] = the sum over partial's rows, plus bias, through SiLU if asked.

    partial (splits, n) of the accumulator's dtype, result of n elements, bias of result's last axis.
    """
    source, dtype = cuda.pick("sum_partials", str(result.dtype)), str(result.dtype)
    threads, n, splits = source.constants["THREADS"], result.size, len(partial)
    blocks = math.ceil(n / threads)
    if bias is None and not silu:
        cuda.kernel(source, "sum_partials", dtype)(blocks, threads, partial, result, n, splits)
    else:
        cuda.kernel(source, "sum_partials_bias", dtype)(
            blocks, threads, partial, bias, result, n, splits, result.shape[-1], silu)
