"""Weights in 8 bits, for small files: whole numbers from -127 to 127, and one scale for each output channel.

    q  = round(w / scale),   scale_c = max |w[..., c]| / 127            weights (..., C), scale (C,)
    w' = scale q,            |w' - w| <= scale / 2                      what is computed with

A file is a quarter of one in float32, and half of one in float16.  The rounding is an error of at most 1/254 of a
channel's largest weight.  It hardly changed the model of emoji (docs/own_pictures.md has both measurements).  Vectors,
such as biases and the scales of norms, are few and have 16 bits.  Nothing is computed in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minidiff.errors import UserError

SCALE = ":scale"                                            # after a weight's name: the name of its scale


def to_int8(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each float32 array (..., C) of two axes or more as two, of int8 and (C,) float32; vectors in float16.

    Other arrays, such as float64 statistics, are kept.  UserError for a number of a vector that float16 cannot hold.
    """
    found = {}
    for name, w in weights.items():
        if w.dtype != np.float32:
            found[name] = w
        elif w.ndim < 2:
            found[name] = rounded(name, w, np.float16)
        else:
            found[name], found[name + SCALE] = quantised(w)
    return found


def rounded(name: str, w: np.ndarray, dtype) -> np.ndarray:
    """The array in another floating dtype; UserError where this makes a number infinite.  name: for the message."""
    with np.errstate(over="ignore"):
        found = w.astype(dtype)
    if not np.array_equal(np.isfinite(found), np.isfinite(w)):
        largest = abs(w[np.isfinite(w)]).max()
        raise UserError(f"{np.dtype(dtype)} holds numbers up to {float(np.finfo(dtype).max):,.0f}, and the weights "
                        f"{name!r} reach {largest:,.0f}: save them in float32")
    return found


def quantised(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q int8 of w's shape (..., C), and scale (C,) float32.  A channel of zeros has the scale 0."""
    # scale_c = max |w[..., c]| / 127
    scale = np.abs(w).max(axis=tuple(range(w.ndim - 1))) / np.float32(127)
    # q = round(w / scale)
    q = np.divide(w, scale, out=np.zeros_like(w), where=scale > 0)
    return np.rint(q).clip(-127, 127).astype(np.int8), scale


def from_int8(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights that `to_int8` was given, but for the rounding; arrays without a scale are kept as they are."""
    # w' = scale q
    return {name: a * arrays[name + SCALE] if name + SCALE in arrays else a
            for name, a in arrays.items() if not name.endswith(SCALE)}


def scale_shapes(arrays: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the scales that belong to arrays, or a header's entries, of these shapes: one for each int8."""
    return {name + SCALE: shape[-1:] for name, shape in shapes.items()
            if name in arrays and arrays[name].dtype == np.int8 and len(shape) > 1}
