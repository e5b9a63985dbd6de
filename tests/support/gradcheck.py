"""The gradient checker: compares backward with central differences, in float64.

    L(x) = sum(f(x) dy)                                     dy is random: a cotangent of ones hides errors
    dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2)

It takes the derivative along every element of every input or, if there are many, along a few random directions
(the error of a wrong gradient is orthogonal to a random direction with probability 0).
"""

import numpy as np
import pytest

from minidiff.engine.tensor import Tensor, gradients, no_grad

STEP = 1e-5


def check_gradients(f, *inputs, directions: int = 0, rtol: float = 1e-6, seed: int = 0) -> None:
    """AssertionError, naming the input, unless f's gradients are right.

    f           takes the inputs as Tensors and returns a Tensor
    inputs      float64 arrays (of any layout in memory), or Tensors such as a module's parameters, which f may also
                read directly; they are changed in place and restored
    directions  0: every element of every input; n: n random directions in each input
    rtol        allowed error, relative to the largest derivative of that input
    """
    rng = np.random.default_rng(seed)
    leaves = [x if isinstance(x, Tensor) else Tensor(x, requires_grad=True) for x in inputs]
    before = [leaf.data.copy() for leaf in leaves]
    y = f(*leaves)
    assert y.dtype == np.float64, f"the checker needs float64, and f gave {y.dtype}"
    dy = rng.standard_normal(y.shape)
    dy_before = dy.copy()
    dxs = gradients(y, leaves, dy)

    assert np.array_equal(dy, dy_before), "backward wrote into the cotangent it was given"
    for i, (leaf, dx, x) in enumerate(zip(leaves, dxs, before, strict=True)):
        assert dx.shape == x.shape and dx.dtype == x.dtype, f"gradient of input {i}: {dx.shape} {dx.dtype}"
        assert np.array_equal(leaf.data, x), f"input {i} was written into"

    def loss() -> float:
        with no_grad():
            return float(np.sum(f(*leaves).data * dy))

    for i, (leaf, dx) in enumerate(zip(leaves, dxs, strict=True)):
        if directions:
            along = [rng.standard_normal(leaf.shape) for _ in range(directions)]
            along = [u / np.linalg.norm(u) for u in along]
            expected = np.array([_directional(loss, leaf.data, u) for u in along])
            found = np.array([np.sum(dx * u) for u in along])
        else:
            expected, found = _elementwise(loss, leaf.data), dx
        error = np.abs(found - expected).max(initial=0)
        allowed = rtol * max(np.abs(expected).max(initial=0), 1e-2)
        assert error <= allowed, f"gradient of input {i}, {leaf.shape}: off by {error:.2e}, allowed {allowed:.2e}"


def moved(module, by: float = 0.3):
    """The module in float64, with every parameter changed, so that no branch is zero."""
    rng = np.random.default_rng(9)
    for p in module.astype(np.float64).parameters().values():
        p.data += by * rng.standard_normal(p.shape)
    return module


def check_loss_gradient(loss, parameters, directions: int) -> None:
    """The gradient of loss() -> (), by its float64 parameters, against central differences in random directions."""
    grads, rng, h = gradients(loss(), parameters), np.random.default_rng(0), 1e-6
    start = [p.data for p in parameters]
    for _ in range(directions):
        along = [rng.standard_normal(p.shape) for p in parameters]
        values = []
        for sign in (1, -1):
            for p, x, d in zip(parameters, start, along, strict=True):
                p.data = x + sign * h * d
            with no_grad():
                values.append(loss().item())
        expected = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def _elementwise(loss, x: np.ndarray) -> np.ndarray:
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


def _directional(loss, x: np.ndarray, u: np.ndarray) -> float:
    before = x.copy()
    x[...] = before + STEP * u
    above = loss()
    x[...] = before - STEP * u
    below = loss()
    x[...] = before
    return (above - below) / (2 * STEP)
