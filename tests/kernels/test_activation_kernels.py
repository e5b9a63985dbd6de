"""GELU and SiLU by their kernels: the plain forms of ops.py, the ways back by central differences, large inputs."""

import numpy as np
import pytest
from support import fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.engine.cuda import activation
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.tensor import Tensor, gradients, record

pytestmark = fake_cupy.needs_device
DTYPES = cuda.versions("activation")[1].takes
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
each = pytest.mark.parametrize("name", activation.NAMES)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (255,), (257,), (3, 86)])
def test_they_are_the_plain_forms(cupy, name, dtype, shape):
    """In float64, from the numbers that the kernel got.  The error of each element is relative to its size, or to 1."""
    rng = np.random.default_rng(0)
    x, dy = (np.asarray(3 * rng.standard_normal(shape)).astype(fake_cupy.dtype_of(dtype)) for _ in range(2))
    leaf = Tensor(x.astype(np.float64), requires_grad=True)
    y = getattr(ops, name)(leaf)
    dx, = gradients(y, [leaf], dy.astype(np.float64))
    found = activation.forward(name, cupy.asarray(x)), activation.backward(name, cupy.asarray(x), cupy.asarray(dy))
    for a, b in zip(found, (y.data, dx), strict=True):
        assert a.dtype == x.dtype and a.shape == shape
        np.testing.assert_allclose(a.get().astype(np.float64), b, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])


@each
def test_the_way_back_by_central_differences(cupy, name):
    def op(x: Tensor) -> Tensor:
        there = cupy.asarray(x.data)
        return record(activation.forward(name, there).get(), (x,),
                      lambda dy: (activation.backward(name, there, cupy.asarray(dy)).get(),))
    check_gradients(op, np.random.default_rng(1).standard_normal((3, 7)))


@each
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_inputs_stay_finite(cupy, name, dtype):
    """x on the right, 0 on the left, with slopes 1 and 0: x^3 would overflow."""
    large = np.finfo(dtype).max
    x = np.array([large, 1e4, -1e4, -large, 20, -20], dtype)
    y = activation.forward(name, cupy.asarray(x)).get()
    dx = activation.backward(name, cupy.asarray(x), cupy.ones(6, dtype)).get()
    np.testing.assert_allclose(y, np.where(x > 0, x, 0), atol=1e-6)
    np.testing.assert_allclose(dx, x > 0, atol=1e-6)


@each
def test_the_op_takes_the_kernels(cupy, monkeypatch, name):
    launched = fake_cupy.watch_launches(monkeypatch)
    x = Tensor(cupy.ones((2, 3), "float16"), requires_grad=True)
    dx, = gradients(getattr(ops, name)(x), [x], cupy.ones((2, 3), "float16"))
    assert dx.dtype == np.float16 and (fake_cupy.REAL or launched == list(activation.NAMES[name]))


def test_nothing_gives_nothing_and_another_shape_is_refused(cupy):
    assert activation.forward("gelu", cupy.zeros((0, 3), "float32")).shape == (0, 3)
    with pytest.raises(ValueError, match="dy must have x's shape") as error:
        activation.backward("gelu", cupy.zeros((2, 3), "float32"), cupy.zeros(3, "float32"))
    fake_cupy.one_sentence(error)
    with pytest.raises(TypeError, match="int32"):
        activation.forward("silu", cupy.zeros(3, "int32"))
