"""Gradients of many layers in one launch: the values, when the layers are computed, and who may read them."""

import numpy as np
import pytest
from support import fake_cupy

from minidiff.engine import ops
from minidiff.engine.backend import to_device
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda import weight_gradients as of_weights
from minidiff.engine.cuda.reduce import accumulator_dtype
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.precision import in_precision

pytestmark = fake_cupy.needs_device
SOURCE = cuda.versions("weight_gradients")[1]
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


def assert_near(found, expected, dtype: str) -> None:
    assert found.dtype == fake_cupy.dtype_of(dtype) and found.shape == expected.shape
    np.testing.assert_allclose(found.get().astype(np.float64), expected, rtol=4 * ROUNDING[dtype],
                               atol=20 * ROUNDING[dtype])


# --- the kernel ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", SOURCE.takes)
def test_they_are_the_plain_products(cupy, monkeypatch, dtype):
    """Shapes around a tile; a product with and without its sum, sums alone, sums of partial sums; all in one launch."""
    rng, exact = np.random.default_rng(0), np.float64
    launched, pairs = fake_cupy.watch_launches(monkeypatch), []
    with of_weights.waiting():
        for M, C, D in ((1, 1, 1), (33, 31, 5), (64, 32, 33), (70, 40, 64)):
            x, dy = (rng.standard_normal(shape).astype(fake_cupy.dtype_of(dtype)) for shape in ((M, C), (M, D)))
            dw, db = of_weights.weight_gradients(cupy.asarray(x), cupy.asarray(dy))
            alone, none = of_weights.weight_gradients(cupy.asarray(x), cupy.asarray(dy), db=False)
            assert none is None
            pairs += [(dw, x.astype(exact).T @ dy.astype(exact)), (alone, x.astype(exact).T @ dy.astype(exact)),
                      (db, dy.astype(exact).sum(axis=0)),
                      (of_weights.sum_of_rows(cupy.asarray(dy)), dy.astype(exact).sum(axis=0))]
        partial, whole = rng.standard_normal((5, 35)), cupy.empty((5, 7), fake_cupy.dtype_of(dtype))
        of_weights.sum_of_partials(cupy.asarray(partial.astype(accumulator_dtype(fake_cupy.dtype_of(dtype)))), whole)
        assert not launched
    assert fake_cupy.REAL or launched == ["weight_gradients"]
    for found, expected in (*pairs, (whole, partial.sum(axis=0).reshape(5, 7))):
        assert_near(found, expected, dtype)


def test_more_layers_than_a_table_holds(cupy, monkeypatch):
    launched, dys = fake_cupy.watch_launches(monkeypatch), np.arange(2 * 85 * 3, dtype=np.float32).reshape(85, 2, 3)
    with of_weights.waiting():
        found = [of_weights.sum_of_rows(cupy.asarray(dy)) for dy in dys]
    assert fake_cupy.REAL or len(launched) == 2
    np.testing.assert_array_equal([db.get() for db in found], dys.sum(axis=1))


def test_the_table_fits_in_a_kernels_arguments():
    assert SOURCE.constants["MOST"] * of_weights.LAYER.itemsize <= 4096


# --- who waits ----------------------------------------------------------------------------------------------

def test_outside_a_walk_nothing_waits(cupy):
    x, dy = np.ones((3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    dw, db = of_weights.weight_gradients(cupy.asarray(x), cupy.asarray(dy))
    assert dw.get().tolist() == [[6, 9], [6, 9]] and db.get().tolist() == [6, 9]
    assert of_weights.weight_gradients(cupy.asarray(x), cupy.asarray(dy), dw=False, db=False) == (None, None)
    whole = cupy.empty(2, "float32")
    of_weights.sum_of_partials(cupy.asarray(dy.astype(accumulator_dtype(dy.dtype))), whole)
    assert whole.get().tolist() == [6, 9]


def test_long_sums_large_products_and_many_bytes_do_not_wait(cupy, monkeypatch):
    launched = fake_cupy.watch_launches(monkeypatch)
    with of_weights.waiting():
        of_weights.sum_of_rows(cupy.ones((of_weights.LONG + 1, 1), "float32"))
        assert fake_cupy.REAL or launched == ["sum_rows"]
        monkeypatch.setattr(of_weights, "SMALL", 8)
        dw, _ = of_weights.weight_gradients(cupy.ones((3, 3), "float32"), cupy.ones((3, 1), "float32"), db=False)
        assert dw.get().tolist() == [[3]] * 3
        monkeypatch.setattr(of_weights, "HELD", 11)
        db = of_weights.sum_of_rows(cupy.ones((3, 1), "float32"))
        assert db.get().tolist() == [3]
    assert fake_cupy.REAL or launched == ["sum_rows", "weight_gradients"]


def test_after_an_error_nothing_waits(cupy):
    with pytest.raises(RuntimeError), of_weights.waiting():
        of_weights.sum_of_rows(cupy.ones((2, 1), "float32"))
        raise RuntimeError
    assert of_weights.sum_of_rows(cupy.ones((2, 1), "float32")).get().tolist() == [2]


def network(rng) -> list:
    return [Conv2d(3, 8, rng), GroupNorm(8, 2), Linear(8, 8, rng), Linear(8, 3, rng)]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_networks_gradients_are_those_of_the_cpu_and_take_one_launch(cupy, monkeypatch, precision):
    layers, x = network(np.random.default_rng(0)), np.random.default_rng(1).standard_normal((2, 4, 4, 3), np.float32)

    def of(device: str) -> list:
        parts = [in_precision(layer.to(device), np.dtype(precision)) for layer in layers]
        y = Tensor(to_device(x.astype(precision), device))
        for part in parts:
            y = part(y)
        leaves = [p for layer in layers for p in layer.parameters().values()]
        return gradients(y, leaves, to_device(np.ones(y.shape, precision), device))
    expected, launched = of("cpu"), fake_cupy.watch_launches(monkeypatch)
    for found, dw in zip(of("cuda"), expected, strict=True):
        bound = (1e-5 if precision == "float32" else 2e-2) * max(1, np.abs(dw).max())
        np.testing.assert_allclose(found.get(), dw, rtol=0, atol=bound)
    assert fake_cupy.REAL or launched.count("weight_gradients") == 1


@pytest.mark.parametrize("used", ["twice", "by another op", "through a view"])
def test_an_op_that_reads_a_gradient_gets_it_filled(cupy, monkeypatch, used):
    """A weight that two layers share, one that is computed, and one that is a part of another."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape) for shape in ((5, 4), (4, 4), (4,)))

    def of(place) -> list:
        leaves = [Tensor(place(a), requires_grad=True) for a in (x, w, b)]
        y, weights, bias = leaves
        if used == "by another op":
            weights, bias = weights * weights, bias * 2.0
        if used == "through a view":
            weights, bias = ops.transpose(weights, (1, 0)), bias[::-1]
        for _ in range(2 if used == "twice" else 1):
            y = ops.linear(y, weights, bias)
        return gradients(y, leaves, place(np.arange(20.0).reshape(5, 4)))
    for found, expected in zip(of(cupy.asarray), of(np.asarray), strict=True):
        fake_cupy.assert_same(found, expected)


def test_a_struct_is_an_array_with_named_fields(cupy):
    kernel = cuda.kernel(SOURCE, "weight_gradients", "float32")
    with pytest.raises(TypeError, match="named fields") as error:
        kernel(1, SOURCE.constants["THREADS"], 3)
    fake_cupy.one_sentence(error)
