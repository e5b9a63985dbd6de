"""Group and layer norm compared with a loop over groups, their gradients, and extreme inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradcheck import check_gradients
from support.refusals import check_message, zeros

from minidiff.engine import norm, ops, parallel
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import GroupNorm

few = settings(deadline=None, max_examples=25)
small = st.integers(1, 4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_loops(x, groups, gamma, beta, eps=1e-5):
    """One group of one image at a time, with NumPy's own mean and variance."""
    y, size = np.empty(x.shape), x.shape[-1] // groups
    for b in range(len(x)):
        for g in range(groups):
            part = np.s_[b, ..., g * size:(g + 1) * size]
            y[part] = (x[part].astype(float) - x[part].mean(dtype=float)) / np.sqrt(x[part].var(dtype=float) + eps)
    extra = (1,) * (x.ndim - 2)
    return y * gamma.reshape(-1, *extra, x.shape[-1]) + beta.reshape(-1, *extra, x.shape[-1])


@st.composite
def norms(draw):
    groups, pixels, B = draw(small), draw(st.lists(small, min_size=0, max_size=2)), draw(small)
    C = groups * draw(small)
    shape = (B, C) if draw(st.booleans()) else (C,)
    return 2 * normal(B, *pixels, C) + 1, groups, normal(*shape, seed=1), normal(*shape, seed=2)


@few
@given(norms())
def test_group_norm(drawn):
    x, groups, gamma, beta = drawn
    y = norm.group_norm(Tensor(x), groups, Tensor(gamma), Tensor(beta))
    np.testing.assert_allclose(y.data, by_loops(x, groups, gamma, beta), rtol=1e-9, atol=1e-11)
    if x[0].size > groups:                                  # the derivative of a group of one element is zero
        check_gradients(lambda x, g, b: norm.group_norm(x, groups, g, b, eps=0.1), x, gamma, beta)


@few
@given(norms(), st.booleans(), st.integers(1, 30))
def test_pieces_of_an_image_are_the_plain_form(drawn, silu, piece):
    """Without a gradient large images are normalised in pieces; here all are, in pieces of any size."""
    x, groups, gamma, beta = drawn
    plain = norm.group_norm(*(Tensor(a) if i != 1 else a for i, a in enumerate(drawn)), silu=silu).data
    by_row = norm.layer_norm(Tensor(x), Tensor(gamma.reshape(-1, x.shape[-1])[0]),
                             Tensor(beta.reshape(-1, x.shape[-1])[0])).data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "LARGE", 0)
        patch.setattr(parallel, "PIECE", piece)
        y = norm.group_norm(*(Tensor(a) if i != 1 else a for i, a in enumerate(drawn)), silu=silu).data
        rows = norm.layer_norm(Tensor(x), Tensor(gamma.reshape(-1, x.shape[-1])[0]),
                               Tensor(beta.reshape(-1, x.shape[-1])[0])).data
    np.testing.assert_allclose(y, plain, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(rows, by_row, rtol=1e-12, atol=1e-14)


def test_pieces_are_for_large_images_without_a_gradient(monkeypatch):
    """They are used, so the test above compares what users get; and not where their sums would lose digits."""
    monkeypatch.setattr(norm, "LARGE", 10)
    seen, in_pieces = [], norm._group_norm_in_pieces
    monkeypatch.setattr(norm, "_group_norm_in_pieces", lambda *args: seen.append(in_pieces(*args)) or seen[-1])
    gamma, beta = Tensor(normal(4, seed=1)), Tensor(normal(4, seed=2))
    x = normal(1, 2, 3, 4)
    norm.group_norm(Tensor(x), 2, gamma, beta)
    assert len(seen) == 1 and seen[0] is not None
    norm.group_norm(Tensor(x[:, :1, :2]), 2, gamma, beta)
    norm.group_norm(Tensor(x, requires_grad=True), 2, gamma, beta)
    assert len(seen) == 1
    far = norm.group_norm(Tensor(x + 1e9), 2, gamma, beta).data
    assert seen[1] is None
    np.testing.assert_allclose(far, by_loops(x, 2, gamma.data, beta.data), atol=1e-4)


@few
@given(norms(), st.sampled_from([np.float64, np.float32]))
def test_the_silu_of_a_group_norm_is_the_two_ops_bit_for_bit(drawn, dtype):
    """z / 2 has the same digits as z.  (In float16 the two ops would round z, and the single op does not.)"""
    x, groups, gamma, beta = drawn
    dy, results = normal(*x.shape, seed=3), []
    for f in (lambda x, g, b: norm.group_norm(x, groups, g, b, silu=True),
              lambda x, g, b: ops.silu(norm.group_norm(x, groups, g, b))):
        leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in (x, gamma, beta)]
        y = f(*leaves)
        results.append([y.data, *gradients(y, leaves, dy)])
    assert all(np.array_equal(a, b) and a.dtype == b.dtype == dtype for a, b in zip(*results, strict=True))


def test_a_layer_then_silu_is_the_silu_of_the_layer():
    layer, x = GroupNorm(6, 3), normal(2, 5, 5, 6).astype(np.float32)
    layer.gamma.data, layer.beta.data = normal(6, seed=1).astype(np.float32), normal(6, seed=2).astype(np.float32)
    assert np.array_equal(layer.then_silu(Tensor(x)).data, ops.silu(layer(Tensor(x))).data)


@few
@given(st.lists(small, min_size=1, max_size=3), st.integers(2, 5))
def test_layer_norm(leading, C):
    """The norm of each token is the group norm of one group, each token its own sample."""
    x, gamma, beta = 2 * normal(*leading, C) + 1, normal(C, seed=1), normal(C, seed=2)
    y = norm.layer_norm(Tensor(x), Tensor(gamma), Tensor(beta))
    np.testing.assert_allclose(y.data.reshape(-1, C), by_loops(x.reshape(-1, C), 1, gamma, beta), rtol=1e-9, atol=1e-11)
    check_gradients(lambda x, g, b: norm.layer_norm(x, g, b, eps=0.1), x, gamma, beta)


@pytest.mark.parametrize("silu", [False, True])
def test_an_empty_batch_goes_through(silu):
    leaves = [Tensor(a, requires_grad=True) for a in (np.zeros((0, 3, 3, 4)), np.ones(4), np.zeros(4))]
    y = norm.group_norm(leaves[0], 2, *leaves[1:], silu=silu)
    dx, dgamma, dbeta = gradients(y, leaves, np.zeros(y.shape))
    assert y.shape == dx.shape == (0, 3, 3, 4) and not dgamma.any() and not dbeta.any()


def test_shifting_and_scaling_the_input_changes_nothing():
    x, ones, zeros = normal(2, 5, 5, 6), np.ones(6), np.zeros(6)
    for f in (lambda x: norm.group_norm(Tensor(x), 3, Tensor(ones), Tensor(zeros), eps=0),
              lambda x: norm.layer_norm(Tensor(x), Tensor(ones), Tensor(zeros), eps=0)):
        np.testing.assert_allclose(f(5 * x - 3).data, f(x).data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 100.0, 3000.0])
def test_a_large_mean_does_not_swallow_the_variance(mean):
    """In float32, the error stays that of rounding x itself: mean eps, for a variance of 1 (times 20)."""
    x = (normal(2, 14, 14, 8) + mean).astype(np.float32)
    gamma, beta, dy = (a.astype(np.float32) for a in (normal(8, seed=1), normal(8, seed=2), normal(*x.shape, seed=3)))
    for f in (lambda x, g, b: norm.group_norm(x, 2, g, b), norm.layer_norm):
        results = []
        for dtype in (np.float64, np.float32):
            leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in (x, gamma, beta)]
            y = f(*leaves)
            results.append([y.data, *gradients(y, leaves, dy)])
        for exact, found in zip(*results, strict=True):
            allowed = 20 * np.finfo(np.float32).eps * (mean + 3) * np.abs(exact).max()
            assert np.abs(found - exact).max() <= allowed


@pytest.mark.law(
    38, "norms of +-10,000 in half precision, of constants and zeros, are finite and right",
    source="plain loops in float64", tolerance="2e-3: half precision has 11 bits")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.filterwarnings("error")
def test_extreme_inputs(dtype):
    """Law 38: +-10,000 in half precision, whose squares and sums overflow it, a constant, and zeros."""
    signs = np.sign(normal(2, 7, 7, 8))
    for x in (1e4 * signs, np.full((2, 7, 7, 8), 1e4), np.zeros((2, 7, 7, 8)), 1e-4 * signs):
        x = x.astype(dtype)
        leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in (x, np.ones(8), np.zeros(8))]
        for y in (norm.group_norm(leaves[0], 2, *leaves[1:]), norm.layer_norm(*leaves)):
            assert np.isfinite(y.data).all() and y.dtype == dtype
            assert all(np.isfinite(dx).all() for dx in gradients(y, leaves, np.ones(y.shape, dtype)))
        group_norm = norm.group_norm(leaves[0], 2, *leaves[1:]).data
        np.testing.assert_allclose(group_norm, by_loops(x, 2, np.ones(8), np.zeros(8)), atol=2e-3)


def vector(*shape):
    return Tensor(np.ones(shape))


@pytest.mark.parametrize("refused, message", [
    (lambda: norm.group_norm(vector(2, 3, 4), 3, vector(4), vector(4)), "4 channels do not divide into 3 groups"),
    (lambda: norm.group_norm(vector(2, 3, 4), 0, vector(4), vector(4)), "groups must be a whole number .* not 0"),
    (lambda: norm.group_norm(vector(2, 3, 4), 2, vector(3), vector(4)), r"gamma and beta must both be .* \(3,\)"),
    (lambda: norm.group_norm(vector(2, 3, 4), 2, vector(2, 4), vector(4)), r"gamma and beta must both be"),
    (lambda: norm.layer_norm(vector(2, 4), vector(4), vector(3)), r"must be \(4,\), not \(4,\) and \(3,\)"),
])
def test_shapes_that_do_not_fit_are_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "group_norm: 6 channels do not divide into 4 groups",
     lambda: norm.group_norm(zeros(1, 2, 2, 6), 4, zeros(6), zeros(6))),
    (ValueError, "group_norm: gamma and beta must both be (6,) or (2, 6), not (6,), (2, 6)",
     lambda: norm.group_norm(zeros(2, 2, 2, 6), 3, zeros(6), zeros(2, 6))),
    (ValueError, "group_norm: gamma and beta must both be (6,) or (2, 6), not (5,), (5,)",
     lambda: norm.group_norm(zeros(2, 2, 2, 6), 3, zeros(5), zeros(5))),
    (ValueError, "layer_norm: gamma and beta must be (6,), not (6,) and (5,)",
     lambda: norm.layer_norm(zeros(2, 6), zeros(6), zeros(5))),
    (ValueError, "layer_norm: gamma and beta must be (6,), not (5,) and (6,)",
     lambda: norm.layer_norm(zeros(2, 6), zeros(5), zeros(6))),
    *((TypeError, f"an op takes one dtype, not {' and '.join(dtypes)}: convert one of them",
       lambda f=f, dtypes=dtypes: f(zeros(1, 2, 2, 4, dtype=dtypes[0]), *(zeros(4, dtype=d) for d in dtypes[1:])))
      for f in (lambda x, g, b: norm.group_norm(x, 2, g, b), norm.layer_norm)
      for dtypes in (["float64", "float32", "float32"], ["float32", "float64", "float32"],
                     ["float32", "float32", "float64"])),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)
