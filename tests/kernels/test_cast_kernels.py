"""Casts of many arrays in one launch, and a network in half precision that takes them."""

import numpy as np
import pytest
from support import fake_cupy

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.cast import cast_all
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Linear
from minidiff.nn.precision import dtype_of, in_precision

pytestmark = fake_cupy.needs_device
SHAPES = ((1,), (), (3, 2), (255,), (257,), (0, 3), (64, 65), (4096 + 1,))          # a chunk is 4096 numbers


def half(name: str) -> np.dtype:
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return dtype_of(name)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_there_and_back(cupy, name):
    """To the bits of NumPy's own casts."""
    rng = np.random.default_rng(0)
    arrays = [np.asarray(rng.standard_normal(shape) * 100).astype(np.float32) for shape in SHAPES]
    narrow = cast_all([cupy.asarray(a) for a in arrays], half(name))
    wide = cast_all(narrow, np.float32)
    for a, b, c in zip(arrays, narrow, wide, strict=True):
        assert b.shape == c.shape == a.shape and b.dtype == half(name) and c.dtype == np.float32
        assert b.data.ptr % 16 == 0 or not b.size
        assert b.get().tobytes() == a.astype(half(name)).tobytes()
        assert c.get().tobytes() == a.astype(half(name)).astype(np.float32).tobytes()


def test_more_arrays_than_a_launch_takes(cupy, monkeypatch):
    most = cuda.pick("cast_all", "float16").constants["MOST"]
    arrays = [np.full(1 + i % 3, i, np.float32) for i in range(most + 1)]
    launched = fake_cupy.watch_launches(monkeypatch)
    narrow = cast_all([cupy.asarray(a) for a in arrays], np.float16)
    assert fake_cupy.REAL or launched == ["narrow_all"] * 2
    for a, b in zip(arrays, narrow, strict=True):
        assert np.array_equal(b.get(), a.astype(np.float16))


def test_what_it_takes(cupy):
    assert cast_all([], np.float32) == []
    x = cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert cast_all([x.T], np.float16)[0].get().tolist() == [[0, 3], [1, 4], [2, 5]]
    for arrays, dtype in (([x], np.float32), ([x, x.astype(np.float16)], np.float16), ([x.astype(np.float64)], "f2")):
        with pytest.raises(TypeError) as error:
            cast_all(arrays, dtype)
        fake_cupy.one_sentence(error)


def test_a_network_in_half_precision_casts_its_weights_in_one_launch(cupy, monkeypatch):
    layer, x = Linear(3, 2, np.random.default_rng(0)), np.ones((2, 3), np.float16)

    def loss_and_gradients(place):
        y = in_precision(layer, np.float16)(Tensor(place(x)))
        return [y.data, *gradients(y, [layer.w, layer.b], place(np.ones((2, 2), np.float16)))]
    expected = loss_and_gradients(np.asarray)
    launched = fake_cupy.watch_launches(monkeypatch)
    layer.to("cuda")
    found = loss_and_gradients(cupy.asarray)
    assert fake_cupy.REAL or launched.count("narrow_all") == launched.count("widen_all") == 1
    assert [a.dtype for a in found] == [np.float16, np.float32, np.float32]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.get(), b, rtol=2e-3)
