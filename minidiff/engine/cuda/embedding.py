"""The way back of an embedding on CuPy arrays, by kernels/embedding_backward_*.cu.

    dtable[v] = sum of dy[n] over the n with ids[n] = v             in the order of n, the same each time
"""

from __future__ import annotations

import math

from minidiff.engine.cuda import launch as cuda


def embedding_backward(ids, dy, V: int):
    """ids (...) whole numbers of 0..V-1, dy (..., C) -> dtable (V, C), of dy's dtype."""
    import cupy
    if dy.shape[:-1] != ids.shape:
        raise ValueError(f"embedding: dy must be (*ids.shape, C), ids are {ids.shape} and dy is {dy.shape}")
    ids, dy = cupy.ascontiguousarray(ids, "int32"), cupy.ascontiguousarray(dy)
    C, dtype = dy.shape[-1], str(dy.dtype)
    dtable = cupy.empty((V, C), dy.dtype)
    source = cuda.pick("embedding_backward", dtype)
    warps = source.constants["WARPS"]
    cuda.kernel(source, "embedding_backward", dtype)(math.ceil(V / warps), 32 * warps, ids, dy, dtable, ids.size, V, C)
    return dtable
