"""Small linear layers: values against float64, gradients by central differences, what the same launch adds."""

import numpy as np
import pytest
from support import fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.engine.backend import to_device
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda import linear
from minidiff.engine.tensor import Tensor, gradients, record

pytestmark = fake_cupy.needs_device
DTYPES = cuda.versions("linear")[1].takes
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
SHAPES = ((1, 1, 1), (33, 31, 5), (40, 70, 64), (5, 32, 33))                        # M, C, D around a tile of 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, C, D", SHAPES)
def test_they_are_the_plain_products(cupy, dtype, M, C, D):
    """Also of arrays that are not contiguous."""
    rng = np.random.default_rng(0)
    x, w, b, plus, dy, held = (rng.standard_normal(shape).astype(fake_cupy.dtype_of(dtype))
                               for shape in ((M, C), (C, D), (D,), (M, D), (M, D), (M, C)))
    X, W, BIAS, PLUS, DY, HELD = (a.astype(np.float64) for a in (x, w, b, plus, dy, held))
    x, w, b, plus, dy, held = map(cupy.asarray, (x, w, b, plus, dy, held))
    turned = cupy.ascontiguousarray(w.T).T
    for found, expected in ((linear.forward(x, w, b), X @ W + BIAS), (linear.forward(x, turned, b), X @ W + BIAS),
                            (linear.forward(x, w, b, plus), X @ W + BIAS + PLUS),
                            (linear.backward(dy, w), DY @ W.T), (linear.backward(dy, w, held), DY @ W.T + HELD)):
        assert found.dtype == x.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found.get().astype(np.float64), expected, rtol=4 * ROUNDING[dtype],
                                   atol=20 * ROUNDING[dtype])


def test_the_way_back_by_central_differences(cupy):
    def op(plus: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def across(a: Tensor, there: str, back: str) -> Tensor:
            return record(to_device(a.data, there), (a,), lambda da: (to_device(da, back),))
        y = ops.plus_linear(*(across(a, "cuda", "cpu") for a in (plus, x, w, b)))
        return across(y, "cpu", "cuda")
    rng = np.random.default_rng(1)
    check_gradients(op, *(rng.standard_normal(shape) for shape in ((2, 3, 5), (2, 3, 4), (4, 5), (5,))))


@pytest.mark.parametrize("small", [True, False])
def test_a_residual_branch_is_that_of_the_cpu(cupy, monkeypatch, small):
    """x + linear(tanh(x)) and a second use of x; in one launch each way, or as ops where the layer is large."""
    if not small:
        monkeypatch.setattr(linear, "SMALL", 0)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((2, 3, 4), (4, 4), (4,), (4, 4), (4,))]

    def of(place) -> list:
        leaves = x, w, b, w2, b2 = [Tensor(place(a), requires_grad=True) for a in arrays]
        h = ops.tanh(x)
        y = ops.plus_linear(h, h, w, b)
        y = ops.plus_linear(y, ops.linear(h, w2, b2), w, b)
        return [y.data, *gradients(y, leaves, place(np.arange(24.0).reshape(2, 3, 4)))]
    launched = fake_cupy.watch_launches(monkeypatch)
    for found, expected in zip(of(cupy.asarray), of(np.asarray), strict=True):
        fake_cupy.assert_same(found, expected)
    if not fake_cupy.REAL:
        assert [launched.count(name) for name in ("linear", "linear_dx")] == ([3, 3] if small else [0, 0])


def test_what_does_not_fit_is_refused(cupy):
    x, w, b = cupy.ones((2, 3), "float32"), cupy.ones((3, 4), "float32"), cupy.ones(4, "float32")
    with pytest.raises(ValueError, match="plus must have") as error:
        linear.forward(x, w, b, cupy.ones((2, 3), "float32"))
    fake_cupy.one_sentence(error)
    assert ops.plus_linear(Tensor(cupy.ones((1, 4), "float32")), *map(Tensor, (x, w, b))).data.get().tolist() == \
        [[5] * 4] * 2                                       # broadcast, as `+` does
    with pytest.raises(TypeError, match="one dtype"):
        ops.plus_linear(Tensor(cupy.ones((2, 4), "float16")), *map(Tensor, (x, w, b)))
    with pytest.raises(ValueError, match="linear takes"):
        ops.plus_linear(Tensor(cupy.ones((2, 4), "float32")), Tensor(x), Tensor(b), Tensor(b))
