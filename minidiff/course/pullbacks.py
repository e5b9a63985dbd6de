"""Pullbacks against central differences.

    L(x) = sum(y dy)                                        dy is random: a cotangent of ones hides errors
    dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2)

An answer computes y and its pullback together, as minidiff's ops do:  y, pullback = op(x);  dx = pullback(dy).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minidiff.course.compare import differs, misshapen, not_tuple

STEP = 1e-5
TOLERANCE = 1e-6                                            # of the largest derivative


def wrong_pullback(op: Callable, inputs: dict[str, np.ndarray], shape: tuple[int, ...], rng: np.random.Generator,
                   where: str) -> str | None:
    """None if the pullback of op(*inputs) is right; else one sentence.

    op: takes the inputs (float64) in order, and returns y and its pullback.  shape: of y.  The pullback returns one
    array, or as many as there are inputs, in a tuple.
    """
    arrays = [x.copy() for x in inputs.values()]
    got = op(*arrays)
    if (said := not_y_and_pullback(got, shape, where)):
        return said
    dy = rng.standard_normal(shape)
    dxs = got[1](dy.copy())
    names = [f"d{name}" for name in inputs]
    if len(names) == 1:
        dxs = dxs if isinstance(dxs, tuple) and len(dxs) == 1 else (dxs,)
    elif (said := not_tuple(", ".join(names), dxs, len(names), f"of the pullback {where}")):
        return said

    def loss() -> float:
        return float((np.asarray(op(*[x.copy() for x in arrays])[0]) * dy).sum())
    for name, dx, x in zip(names, dxs, arrays, strict=True):
        if (said := differs(name, dx, _central(loss, x), f"by central differences {where}", tolerance=TOLERANCE)):
            return said
    return None


def not_y_and_pullback(got, shape: tuple[int, ...], where: str, dtype=None, like: str = "") -> str | None:
    """None if `got` is an array of that shape and a function; else one sentence."""
    if (said := not_tuple("y, pullback", got, 2, where)
            or misshapen("y", got[0], shape, where, dtype=dtype, like=like)):
        return said
    return None if callable(got[1]) else f"the second result should be a function, pullback(dy), {where}"


def results(op: Callable, *arrays: np.ndarray) -> list:
    """For a probe: y, and what the pullback returns for a cotangent of whole numbers."""
    y, pullback = op(*arrays)
    dy = (np.arange(np.size(y)).reshape(np.shape(y)) * 7 % 11 - 5).astype(np.asarray(y).dtype)
    dxs = pullback(dy)
    return [y, *(dxs if isinstance(dxs, tuple) else (dxs,))]


def _central(loss: Callable[[], float], x: np.ndarray) -> np.ndarray:
    """The derivative of loss() by every number of x, which is changed in place and restored."""
    dx = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        before = x[i]
        x[i] = before + STEP
        above = loss()
        x[i] = before - STEP
        below = loss()
        x[i] = before
        dx[i] = (above - below) / (2 * STEP)
    return dx
