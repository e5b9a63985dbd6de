"""Weights in half precision: widened when they are read from the file, or, to save memory, at each use.

    float16     1 bit of sign, 5 of exponent e, 10 of mantissa m        (-1)^s 2^(e - 15) (1 + m / 1024)
    bfloat16    1, 8 and 7: the upper half of a float32
    float32     1, 8 and 23                                             (-1)^s 2^(e - 127) (1 + m / 2^23)

The exponent and mantissa of a float16, moved up by 13 bits, are those of a float32 that is 2^112 times too small, also
where e is 0 and the number has no leading 1.  A product with 2^112 is exact.  So widening takes a few operations on
whole arrays, on all cores, where NumPy's own conversion takes each number by itself.
"""

from __future__ import annotations

from math import prod

import numpy as np

from minidiff.engine.parallel import map_rows, parallel_map, pieces
from minidiff.engine.tensor import Tensor


def widened(bits: np.ndarray, bfloat: bool) -> np.ndarray:
    """float32 numbers of the bits (uint16) of float16 or bfloat16; those of float16 must be finite."""
    def widen(bits):
        u = bits.astype(np.uint32)
        if bfloat:
            u <<= 16
            return u.view(np.float32)
        sign = u & 0x8000
        sign <<= 16
        u &= 0x7fff
        u <<= 13
        x = u.view(np.float32)
        x *= np.float32(2.0 ** 112)
        u |= sign
        return x
    return map_rows(widen, bits.reshape(-1, 1), np.float32).reshape(bits.shape)


def finite(bits: np.ndarray, bfloat: bool) -> bool:
    """Whether none of them is NaN or infinite: those have all bits of the exponent."""
    exponent, flat = 0x7f80 if bfloat else 0x7c00, bits.reshape(-1)

    def beyond(piece: slice) -> bool:
        return bool(((flat[piece] & exponent) == exponent).any())
    return not any(parallel_map(beyond, pieces(flat.size, 1)))


class Stored(Tensor):
    """A weight that keeps the 16 bits of its file, and has a new float32 array each time that its data is read."""

    __slots__ = ("bits", "bfloat", "wide")

    def __init__(self, bits: np.ndarray, bfloat: bool):
        super().__init__(np.zeros(0, np.float32))
        self.bits, self.bfloat, self.wide = bits, bfloat, None

    def _read(self) -> np.ndarray:
        return widened(self.bits, self.bfloat) if self.wide is None else self.wide

    def _write(self, data) -> None:
        self.bits, self.wide = None, data                   # moved to a GPU, for example: from now on as any Tensor

    def move(self, device: str) -> None:
        if device != "cpu" or self.wide is not None:        # else it is there, and stays narrow
            super().move(device)

    data = property(_read, _write)
    shape = property(lambda self: self.bits.shape if self.wide is None else self.wide.shape)
    dtype = property(lambda self: np.dtype(np.float32) if self.wide is None else self.wide.dtype)
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: prod(self.shape))

    def __reduce__(self) -> tuple:
        return (Stored, (self.bits, self.bfloat)) if self.wide is None else (Tensor, (self.wide,))
