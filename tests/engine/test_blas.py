"""y += x w by BLAS, compared with NumPy, on matrices that are parts of larger ones, whose other elements stay."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import check_message

from minidiff.engine.blas import add_product

side = st.integers(1, 9)


def part_of(rng, rows, columns, more, dtype):
    """A matrix whose rows are separated by `more` elements."""
    return rng.standard_normal((rows + 1, columns + more)).astype(dtype)[1:, :columns]


@settings(deadline=None, max_examples=100)
@given(side, side, side, st.tuples(*[st.integers(0, 3)] * 3), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_adds_the_product(M, K, N, more, dtype, first):
    rng = np.random.default_rng(0)
    x, w, y = (part_of(rng, *shape, m, dtype) for shape, m in zip([(M, K), (K, N), (M, N)], more, strict=True))
    expected = x.astype(float) @ w.astype(float) + (0 if first else y)
    around = y.base.copy()
    add_product(y, x, w, first=first)
    np.testing.assert_allclose(y, expected, atol=20 * np.finfo(dtype).eps)
    y[...] = around[1:, :N]
    assert np.array_equal(y.base, around), "it wrote beside y"


def test_first_does_not_read_what_was_there():
    y = np.full((2, 2), np.nan)
    add_product(y, np.eye(2), np.eye(2), first=True)
    assert np.array_equal(y, np.eye(2))


def test_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((50, 30)), rng.standard_normal((30, 20))) for _ in range(40)]

    def product(pair):
        y = np.zeros((50, 20))
        add_product(y, *pair)
        return y
    with ThreadPoolExecutor(4) as pool:
        for y, (x, w) in zip(pool.map(product, pairs), pairs, strict=True):
            np.testing.assert_allclose(y, x @ w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("odd", [
    lambda a: np.asfortranarray(a), lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: a[:, ::-1],
    lambda a: a[::-1], lambda a: np.broadcast_to(a[:1], a.shape),
])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_that_blas_cannot_follow_are_refused(which, odd):
    """BLAS would read beyond the array's memory."""
    matrices = [np.ones((4, 3)), np.ones((4, 5)), np.ones((5, 3))]
    matrices[which] = odd(matrices[which])
    with pytest.raises(ValueError, match="each row of x, w and y must be contiguous"):
        add_product(*matrices)


def test_refuses_what_does_not_fit():
    y, x, w = np.ones((4, 3)), np.ones((4, 5)), np.ones((5, 3))
    for wrong in [(y[:3], x, w), (y, x[:, :4], w), (y, x, w[:, :2])]:
        with pytest.raises(ValueError, match="does not fit y"):
            add_product(*wrong)
    with pytest.raises(TypeError, match="float32 or float64, not float64, float32, float64"):
        add_product(y, x, w.astype(np.float32))
    with pytest.raises(TypeError, match="float32 or float64, not float16"):
        add_product(*(a.astype(np.float16) for a in (y, x, w)))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_add_product_takes_rows_of_any_distance(rows, columns):
    """Also rows of length 1, whose strides have no meaning, and rows that are parts of longer ones."""
    rng = np.random.default_rng([rows, columns])
    wide = rng.normal(size=(rows, columns + 2)).astype(np.float32)
    one = np.broadcast_to(wide[0, :columns], (1, columns))          # whose row has a stride of 0
    for x in (wide[:, :columns], wide[:, :columns].copy(), wide[::2, :columns], wide[:1, :columns], one):
        w, y = rng.normal(size=(columns, 4)).astype(np.float32), np.ones((len(x), 4), np.float32)
        add_product(y, x, w, first=False)
        np.testing.assert_allclose(y, 1 + x.astype(float) @ w, rtol=1e-5, atol=1e-5)
        add_product(y, x, w)                                   # by default it adds
        np.testing.assert_allclose(y, 1 + 2 * (x.astype(float) @ w), rtol=1e-5, atol=1e-5)


def f32(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "add_product: x, w and y must all be float32 or float64, not float32, float64, float32",
     lambda: add_product(f32(2, 4), f32(2, 3), np.zeros((3, 4)), first=True)),
    (ValueError, "add_product: x (2, 3) @ w (2, 4) does not fit y (2, 4)",
     lambda: add_product(f32(2, 4), f32(2, 3), f32(2, 4), first=True)),
    (ValueError, "add_product: x (2, 3) @ w (3, 4) does not fit y (2, 3)",
     lambda: add_product(f32(2, 3), f32(2, 3), f32(3, 4), first=True)),
    *((ValueError, "add_product: each row of x, w and y must be contiguous, and the rows must be in order",
       lambda x=x: add_product(f32(len(x), 4), x, f32(x.shape[1], 4), first=True))
      for x in (f32(2, 6)[:, ::2], f32(2, 4)[:, ::2], f32(6, 2).T[:, :2], f32(2, 3)[::-1], f32(2, 2)[:, ::-1],
                np.broadcast_to(f32(1, 3), (2, 3)), np.broadcast_to(f32(1, 2), (2, 2)),
                np.lib.stride_tricks.sliding_window_view(f32(6), 4))),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)
