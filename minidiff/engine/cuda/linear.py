"""Small linear layers on CuPy arrays, by kernels/linear_*.cu: one launch forward, and one on the way back to x.

    y  = x w + b  + plus        plus: None, or an array of the result's shape: a residual branch adds x to its result,
    dx = dy w^T   + plus        and on the way back the cotangent of the other path is added to dx

The gradients of w and b are in weight_gradients.py.
"""

from __future__ import annotations

import math

from minidiff.engine.cuda import launch as cuda

SMALL = 2**26                                               # multiplications: some 20 us on an H100 (estimated)


def is_small(M: int, C: int, D: int) -> bool:
    """Whether a layer of these sizes is worth these kernels, which keep few sums in registers."""
    return 0 < M * C * D <= SMALL


def forward(x, w, b, plus=None):
    """x (M, C), w (C, D), b (D,) -> (M, D)."""
    return _launch("linear", (x, w, b), plus, (len(x), w.shape[1]), len(x), *w.shape)


def backward(dy, w, plus=None):
    """dy (M, D), w (C, D) -> dx (M, C)."""
    return _launch("linear_dx", (dy, w), plus, (len(dy), w.shape[0]), len(dy), *w.shape)


def _launch(name: str, arrays: tuple, plus, shape: tuple[int, int], *sizes: int):
    import cupy
    if plus is not None and plus.shape != shape:
        raise ValueError(f"{name}: plus must have the result's shape {shape}, not {plus.shape}")
    dtype, result = str(arrays[0].dtype), cupy.empty(shape, arrays[0].dtype)
    source = cuda.pick("linear", dtype)
    blocks = math.prod(math.ceil(n / source.constants["TILE"]) for n in shape)
    given = (*map(cupy.ascontiguousarray, arrays), None if plus is None else cupy.ascontiguousarray(plus))
    cuda.kernel(source, name, dtype)(blocks, source.constants["THREADS"], *given, result, *sizes)
    return result
