"""The mixture of black, white and between by its kernels: the plain form of nn/pixel_mixture.py, and central
differences."""

import numpy as np
import pytest
from support import fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda import pixel_mixture
from minidiff.engine.tensor import Tensor, gradients, record
from minidiff.nn.pixel_mixture import v_of_mixture

pytestmark = fake_cupy.needs_device
DTYPES = cuda.versions("pixel_mixture")[1].takes


def arrays(shape=(3, 2, 5, 2), least: float = 0.3, seed: int = 0) -> tuple:
    """out, x, alpha, sigma in float64; the angle of alpha and sigma is at least `least`."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(least, 1.5, shape[0])
    angle[:1] = least
    return (rng.standard_normal((*shape[:-1], 4 * shape[-1])), rng.standard_normal(shape), np.cos(angle),
            np.sin(angle))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, least", [
    ((1, 1), 0.3), ((3, 2, 5, 2), 0.3), ((2, 129, 1), 0.3), ((2, 9, 9, 3), 0.006)])
def test_it_is_the_plain_form(cupy, dtype, shape, least):
    """In float64, from the numbers that the kernel got.  v = (alpha x_t - x0_hat) / sigma magnifies rounding 1/sigma
    times; on the way back 30 times more, where two explanations of a pixel compete."""
    out, x, alpha, sigma = (a.astype(dtype) for a in arrays(shape, least))
    dy = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    there = [Tensor(cupy.asarray(a), requires_grad=True) for a in (out, x)]
    here = [Tensor(a.astype(np.float64), requires_grad=True) for a in (out, x)]
    y = v_of_mixture(*there, alpha.astype(np.float64), sigma.astype(np.float64))
    expected = v_of_mixture(*here, alpha.astype(np.float64), sigma.astype(np.float64))
    rounding = {"float32": 6e-7, "float64": 1e-14}[dtype]
    assert y.data.dtype == dtype and y.data.shape == shape
    scale = np.abs(expected.data).max() + 1 / least
    np.testing.assert_allclose(y.data.get(), expected.data, rtol=0, atol=rounding * scale)
    pairs = zip(gradients(y, there, cupy.asarray(dy)), gradients(expected, here, dy.astype(np.float64)), strict=True)
    for found, right in pairs:
        np.testing.assert_allclose(found.get(), right, rtol=0, atol=30 * rounding * max(np.abs(right).max(), scale))


@pytest.mark.slow
def test_the_ways_back_by_central_differences(cupy):
    out, x, alpha, sigma = arrays()
    alpha, sigma = cupy.asarray(alpha), cupy.asarray(sigma)

    def op(out: Tensor, x: Tensor) -> Tensor:
        there = cupy.asarray(out.data), cupy.asarray(x.data), alpha, sigma
        return record(pixel_mixture.forward(*there).get(), (out, x), lambda dy: tuple(
            d.get() for d in pixel_mixture.backward(*there, cupy.asarray(dy))))
    check_gradients(op, out, x)


def test_only_the_gradients_that_are_asked_for(cupy, monkeypatch):
    launched = fake_cupy.watch_launches(monkeypatch)
    out, x, alpha, sigma = arrays()
    out, x = Tensor(cupy.asarray(out), requires_grad=True), Tensor(cupy.asarray(x))
    d, = gradients(v_of_mixture(out, x, alpha, sigma), [out], cupy.ones(x.shape, "float64"))
    assert d.shape == out.shape and (fake_cupy.REAL or launched == ["mixture_forward", "mixture_backward"])


def test_no_images_make_no_launch(cupy):
    out, x, alpha, sigma = (cupy.asarray(a[:0]) for a in arrays())
    assert pixel_mixture.forward(out, x, alpha, sigma).shape == (0, 2, 5, 2)
    dout, dx = pixel_mixture.backward(out, x, alpha, sigma, x)
    assert (dout.shape, dx.shape) == ((0, 2, 5, 8), (0, 2, 5, 2))
