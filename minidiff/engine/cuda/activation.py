"""GELU and SiLU on CuPy arrays, by kernels/activation_*.cu: one launch forward, and one on the way back.

    y  = forward("gelu", x)                     dx = backward("gelu", x, dy)
    y  = forward("silu", x)                     dx = backward("silu", x, dy)
"""

from __future__ import annotations

import math

from minidiff.engine.cuda import launch as cuda

NAMES = {"gelu": ("gelu", "gelu_backward"), "silu": ("silu_forward", "silu_backward")}


def forward(name: str, x):
    """An array of x's shape and dtype."""
    return _launch(NAMES[name][0], x)


def backward(name: str, x, dy):
    """dx, of x's shape and dtype, from the x of the forward pass and dy of its shape."""
    if dy.shape != x.shape:
        raise ValueError(f"{name}: dy must have x's shape {x.shape}, not {dy.shape}")
    return _launch(NAMES[name][1], x, dy)


def _launch(kernel: str, *arrays):
    import cupy
    result, dtype = cupy.empty(arrays[0].shape, arrays[0].dtype), str(arrays[0].dtype)
    arrays = map(cupy.ascontiguousarray, arrays)
    source = cuda.pick("activation", dtype)
    threads = source.constants["THREADS"]
    cuda.kernel(source, kernel, dtype)(math.ceil(result.size / threads), threads, *arrays, result, result.size)
    return result
