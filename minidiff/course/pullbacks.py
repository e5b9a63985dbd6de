"""Pullbacks against central differences.

    L(x) = sum(y dy)                                        dy is random: a cotangent of ones hides errors
    D(h) = (L(x + h e_i) - L(x - h e_i)) / 2h = dL/dx_i + O(h^2)
    dL/dx_i = (4 D(h) - D(2h)) / 3 + O(h^4), since the terms in h^2 cancel                     (Richardson)

An answer computes y and its pullback together, as minidiff's ops do:  y, pullback = op(x);  dx = pullback(dy).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minidiff.course.compare import differs, misshapen, not_tuple

STEP = 3e-4
TOLERANCE = 1e-8                                            # of the largest derivative


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
    y, dy = np.array(got[0]), rng.standard_normal(shape)
    dxs = got[1](dy.copy())
    y_after = np.array(got[0])
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
    if not np.array_equal(y, y_after, equal_nan=True):
        return f"the pullback changed the y that was returned before it, {where}: compute with a copy"
    return _keeps_something(op, arrays, dy, where)


def _keeps_something(op: Callable, arrays: list[np.ndarray], dy: np.ndarray, where: str) -> str | None:
    """None if a pullback gives the same again, and after a call of `op` with other numbers; else one sentence."""
    pullback = op(*[x.copy() for x in arrays])[1]

    def dxs() -> list[np.ndarray]:
        got = pullback(dy.copy())
        return [np.array(dx) for dx in (got if isinstance(got, tuple) else (got,))]
    first, second = dxs(), dxs()
    op(*[x[::-1] + 1.0 + np.arange(x.size).reshape(x.shape) % 3 for x in arrays])
    for later, when in ((second, "when it is called twice"), (dxs(), "after another call with other numbers")):
        if not all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(first, later, strict=True)):
            return f"the pullback gives another result {when}, {where}: each pullback needs what belongs to its own " \
                   "call, and must leave it as it is"
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
        before, differences = x[i], []
        for h in (STEP, 2 * STEP):
            x[i] = before + h
            above = loss()
            x[i] = before - h
            below = loss()
            differences.append((above - below) / (2 * h))
        x[i] = before
        dx[i] = (4 * differences[0] - differences[1]) / 3
    return dx
