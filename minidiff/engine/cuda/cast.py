"""Casts of many CuPy arrays in one launch, by kernels/cast_all_*.cu.

    halves = cast_all(weights, float16)         at the beginning of a step in half precision
    grads  = cast_all(halves' gradients, float32)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from minidiff.engine.cuda import launch as cuda


def cast_all(arrays: Sequence, dtype) -> list:
    """The arrays in another dtype: from float32 to half precision, or back.

    The results of one launch are parts of one new array.
    """
    if not arrays:
        return []
    import cupy
    dtype, given = np.dtype(dtype), arrays[0].dtype
    if any(a.dtype != given for a in arrays) or (given == np.float32) == (dtype == np.float32):
        raise TypeError(f"cast_all takes arrays of one dtype, float32 to half precision or back, not "
                        f"{', '.join(sorted({str(a.dtype) for a in arrays}))} to {dtype}")
    device = cupy.cuda.Device().id
    if others := {a.data.device_id for a in arrays} - {device}:
        raise ValueError(f"cast_all: an array is on GPU {min(others)}, and the current one is GPU {device}")
    arrays = [a if a.flags.c_contiguous else cupy.ascontiguousarray(a) for a in arrays]
    half = str(given if dtype == np.float32 else dtype)
    source = cuda.pick("cast_all", half)
    if len(arrays) > (most := source.constants["MOST"]):
        return [*cast_all(arrays[:most], dtype), *cast_all(arrays[most:], dtype)]
    sizes = tuple(a.size for a in arrays)
    offsets, tables = _tables(device, sizes, source.constants["CHUNK"])
    to = cupy.empty(offsets[-1], dtype)
    cuda.kernel(source, "widen_all" if dtype == np.float32 else "narrow_all", half)(
        len(tables[2]), source.constants["THREADS"], cuda.table([a.data.ptr for a in arrays], most),
        *tables, to)
    return [to[begin:begin + a.size].reshape(a.shape) for begin, a in zip(offsets, arrays, strict=False)]


@functools.lru_cache(maxsize=16)
def _tables(device: int, sizes: tuple[int, ...], chunk: int):
    """Where each result begins, and where all end; and lengths, offsets and chunks on the device."""
    import cupy
    # each begins at a multiple of 16 bytes, as vector loads require
    offsets = np.cumsum([0, *(-(-n // 8) * 8 for n in sizes)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"cast_all: {offsets[-1]} numbers are more than the kernel counts to, 2^31 - 1")
    chunks = np.array([(p, first) for p, n in enumerate(sizes) for first in range(0, n, chunk)], np.int32)
    return offsets.tolist(), tuple(cupy.asarray(np.array(a, np.int32)) for a in (
        sizes, offsets[:-1], chunks.reshape(-1, 2)))
