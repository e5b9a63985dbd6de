"""Tests of every op: its gradient, its dtype, any layout in memory, and no reference cycles."""

import gc
import inspect
import weakref

import numpy as np
import pytest
from support.every_op import EVERY_OP
from support.gradcheck import check_gradients

from minidiff.engine import attention, conv, norm, ops
from minidiff.engine.tensor import Tensor, gradients, no_grad

every_op = pytest.mark.parametrize("op", EVERY_OP.values(), ids=EVERY_OP.keys())


def test_the_table_is_complete():
    """Every public function of the engine that returns a Tensor is in EVERY_OP."""
    for module in (ops, conv, norm, attention):
        for name, f in inspect.getmembers(module, inspect.isfunction):
            ours = f.__module__ == module.__name__ and not name.startswith("_")
            if ours and inspect.signature(f).return_annotation == "Tensor":
                assert any(key.split(",")[0] == name for key in EVERY_OP), f"{name} is not in EVERY_OP"


@every_op
def test_gradient(op):
    check_gradients(op.f, *op.inputs())


@every_op
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keeps_its_dtype_forward_and_back(op, dtype):
    leaves = [Tensor(x, requires_grad=True) for x in op.inputs(dtype)]
    y = op.f(*leaves)
    assert y.dtype == dtype
    for dx, x in zip(gradients(y, leaves, np.ones(y.shape, dtype)), leaves, strict=True):
        assert dx.dtype == dtype and dx.shape == x.shape


@every_op
def test_float32_agrees_with_float64(op):
    """To 30 units of float32's rounding, relative to the largest element: forward and every gradient."""
    results = []
    for dtype in (np.float64, np.float32):
        leaves = [Tensor(x.astype(dtype), requires_grad=True) for x in op.inputs(np.float32)]
        y = op.f(*leaves)
        dy = np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32)
        results.append([y.data, *gradients(y, leaves, dy)])
    for exact, found in zip(*results, strict=True):
        assert np.abs(found - exact).max() <= 30 * np.finfo(np.float32).eps * np.abs(exact).max()


@every_op
def test_two_dtypes_are_refused(op):
    inputs = op.inputs(np.float32)
    if len(inputs) > 1:
        with pytest.raises(TypeError, match="one dtype"):
            op.f(*(Tensor(x) for x in inputs[:-1]), Tensor(inputs[-1].astype(np.float64)))


def transposed(x):
    return np.ascontiguousarray(x.T).T


def one_of_two(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def reversed_twice(x):
    every_axis = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[every_axis])[every_axis]


def rows_reversed_twice(x):
    """Its last axis is contiguous, and the axis before it is reversed, which matrix products must handle."""
    backwards = (..., *(slice(None, None, -1),) * min(1, x.ndim - 1), slice(None))
    return np.ascontiguousarray(x[backwards])[backwards]


@every_op
@pytest.mark.parametrize("layout", [transposed, one_of_two, reversed_twice, rows_reversed_twice])
def test_any_layout_in_memory_gives_the_same(op, layout):
    plain = op.inputs()
    odd = [layout(x) for x in plain]
    results = []
    for inputs in (plain, odd):
        leaves = [Tensor(x, requires_grad=True) for x in inputs]
        y = op.f(*leaves)
        dy = np.random.default_rng(1).standard_normal(y.shape)
        results.append([y.data, *gradients(y, leaves, dy if inputs is plain else layout(dy) if y.ndim else dy)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@every_op
def test_every_gradient_is_the_callers_own(op):
    """Writing into one gradient, as clipping does, changes neither another gradient nor the caller's cotangent."""
    leaves = [Tensor(x, requires_grad=True) for x in op.inputs()]
    y = op.f(*leaves)
    dy = np.ones(y.shape)
    dxs = gradients(y, leaves, dy)
    kept = [dx.copy() for dx in dxs]
    dxs[0] *= 3
    assert np.array_equal(dy, np.ones(y.shape))
    assert all(np.array_equal(a, b) for a, b in zip(dxs[1:], kept[1:], strict=True))


@every_op
def test_an_op_does_not_hold_on_to_its_result(op):
    """There is no reference cycle: without the garbage collector, deleting y frees it and its array."""
    leaves = [Tensor(x, requires_grad=True) for x in op.inputs()]
    gc.disable()
    try:
        y = op.f(*leaves)
        assert y.requires_grad
        gone = weakref.ref(y)
        del y
        assert gone() is None
    finally:
        gc.enable()


@every_op
def test_no_grad_remembers_nothing(op):
    with no_grad():
        y = op.f(*(Tensor(x, requires_grad=True) for x in op.inputs()))
    assert not y.requires_grad and y._parents == () and y._pullback is None


@every_op
def test_inputs_that_want_no_gradient_get_none(op):
    """An input that alone requires a gradient gets the same one as if all inputs do."""
    inputs = op.inputs()
    y = op.f(*(leaves := [Tensor(x, requires_grad=True) for x in inputs]))
    dy = np.random.default_rng(1).standard_normal(y.shape)
    together = gradients(y, leaves, dy)
    for i in range(len(inputs)):
        leaves = [Tensor(x, requires_grad=i == j) for j, x in enumerate(inputs)]
        op.f(*leaves).backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(len(inputs))]
        np.testing.assert_allclose(leaves[i].grad, together[i], rtol=1e-12, atol=1e-14)
