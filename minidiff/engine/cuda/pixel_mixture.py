"""v of a mixture of black, white and between on CuPy arrays, by kernels/pixel_mixture_*.cu: a launch each way.

    y        = forward(out, x, alpha, sigma)            out (..., 4 C), x (B, ..., C), alpha, sigma (B,), of one dtype
    dout, dx = backward(out, x, alpha, sigma, dy)       dy, y and dx are of x's shape
"""

from __future__ import annotations

import math

from minidiff.engine.cuda import launch as cuda


def forward(out, x, alpha, sigma):
    import cupy
    y = cupy.empty_like(x, order="C")
    _launch("mixture_forward", (out, x, alpha, sigma), (y,), x)
    return y


def backward(out, x, alpha, sigma, dy) -> tuple:
    import cupy
    dout, dx = cupy.empty_like(out, order="C"), cupy.empty_like(x, order="C")
    _launch("mixture_backward", (out, x, alpha, sigma, dy), (dout, dx), x)
    return dout, dx


def _launch(kernel: str, arrays: tuple, results: tuple, x) -> None:
    import cupy
    if not x.size:
        return
    dtype = str(x.dtype)
    source = cuda.pick("pixel_mixture", dtype)
    threads = source.constants["THREADS"]
    cuda.kernel(source, kernel, dtype)(math.ceil(x.size / threads), threads, *map(cupy.ascontiguousarray, arrays),
                                       *results, x.size // len(x), x.size)
