"""Scaled dot-product attention against a loop over queries, masks of every kind, and its gradients."""

import math

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradcheck import check_gradients
from support.refusals import check_message, zeros

from minidiff.engine import attention
from minidiff.engine.attention import causal_mask, scaled_dot_product_attention
from minidiff.engine.tensor import Tensor, gradients, no_grad

few = settings(deadline=None, max_examples=30)
small = st.integers(1, 4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_loops(q, k, v, mask):
    """One query at a time, over the keys that it attends to; zeros if there are none."""
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h, n in np.ndindex(q.shape[:3]):
        at = mask[b, h, n]
        if at.any():
            P = scipy.special.softmax(k[b, h, at] @ q[b, h, n] / math.sqrt(q.shape[3]))
            y[b, h, n] = P @ v[b, h, at]
    return y


@st.composite
def attentions(draw):
    B, h, N, M, d, e = (draw(st.integers(1, 3)) for _ in range(6))
    M = draw(st.sampled_from([M, 5, 7]))
    shape = [n if draw(st.booleans()) else 1 for n in (B, h, N, M)]         # a mask that broadcasts
    share = draw(st.sampled_from([0, 0.3, 0.7, 1]))
    mask = np.random.default_rng(3).random(shape) < share
    return 2 * normal(B, h, N, d), normal(B, h, M, d, seed=1), normal(B, h, M, e, seed=2), mask


@few
@given(attentions())
@pytest.mark.filterwarnings("error")
def test_attention_with_any_mask(drawn):
    """A query without keys gets zeros, without a warning or a NaN, forward and backward."""
    q, k, v, mask = drawn
    everywhere = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    y = scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), mask)
    np.testing.assert_allclose(y.data, by_loops(q, k, v, everywhere), rtol=1e-11, atol=1e-13)
    check_gradients(lambda *qkv: scaled_dot_product_attention(*qkv, mask), q, k, v)


@few
@given(attentions(), st.integers(1, 40), st.sampled_from([0.1, 1, 1e3]))
def test_blocks_of_queries_are_the_plain_form(drawn, block, size):
    """Blocks of one query up to all of them; scores so large that exponentials would overflow, too."""
    q, k, v, _ = drawn
    k = k * np.array([1e-3, 1, 1])[:k.shape[1], None, None]         # no head's scores say how large another's are
    y = attention._by_blocks(size * q, k, v, 1 / math.sqrt(q.shape[3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        blocks = attention._by_blocks(size * q, k, v, 1 / math.sqrt(q.shape[3]))
    everywhere = np.ones((*q.shape[:3], k.shape[2]), bool)
    np.testing.assert_allclose(y, by_loops(size * q, k, v, everywhere), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(blocks, y, rtol=1e-12, atol=1e-14)


def test_large_attention_without_a_gradient_goes_by_blocks(monkeypatch):
    monkeypatch.setattr(attention, "LARGE", 2 * 3 * 5 * 7)
    q, k, v = (Tensor(normal(2, 3, n, 4, seed=n), requires_grad=n == 7) for n in (5, 7, 7))
    plain = scaled_dot_product_attention(q, k, v)
    seen, blocks = [], attention._by_blocks
    monkeypatch.setattr(attention, "_by_blocks", lambda *args: seen.append(args) or blocks(*args))
    with no_grad():
        y = scaled_dot_product_attention(q, k, v)
        scaled_dot_product_attention(q, k, v, np.ones((5, 7), bool))
        scaled_dot_product_attention(q, k, v, causal=True)
    scaled_dot_product_attention(q, k, v)
    assert len(seen) == 1 and not y.requires_grad and plain.requires_grad
    np.testing.assert_allclose(y.data, plain.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_by_blocks_a_bad_number_reaches_what_it_reaches_in_the_plain_form(bad):
    for place in range(3):
        qkv = [normal(1, 2, 4, 3, seed=i) for i in range(3)]
        qkv[place][0, 1, 2, 1] = bad
        with np.errstate(invalid="ignore", over="ignore"):
            plain = scaled_dot_product_attention(*map(Tensor, qkv)).data
            y = attention._by_blocks(*qkv, 1 / math.sqrt(3))
        np.testing.assert_allclose(y, plain, rtol=1e-12, atol=1e-14)


@few
@given(attentions())
def test_attention_without_a_mask(drawn):
    q, k, v, _ = drawn
    y = scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v))
    np.testing.assert_allclose(y.data, by_loops(q, k, v, np.ones((*q.shape[:3], k.shape[2]), bool)), rtol=1e-11)
    check_gradients(scaled_dot_product_attention, q, k, v)


@pytest.mark.law(
    39, "what stands at masked keys does not count, and gets no gradient",
    source="other numbers at masked keys", tolerance="exact, to the last bit")
def test_what_is_masked_has_no_influence():
    """Masked keys may have any values: the result is the same to the last bit, and their gradient is zero."""
    q, k, v = normal(2, 2, 3, 4), normal(2, 2, 5, 4, seed=1), normal(2, 2, 5, 4, seed=2)
    mask = np.array([True, True, False, True, False])
    y = scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), mask).data
    k[:, :, ~mask], v[:, :, ~mask] = 1e6, -1e6
    leaves = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    again = scaled_dot_product_attention(*leaves, mask)
    assert np.array_equal(again.data, y)
    _, dk, dv = gradients(again, leaves, normal(*y.shape, seed=3))
    assert not dk[:, :, ~mask].any() and not dv[:, :, ~mask].any()


def test_the_order_of_keys_does_not_matter():
    q, k, v, order = normal(1, 2, 3, 4), normal(1, 2, 7, 4, seed=1), normal(1, 2, 7, 4, seed=2), [3, 1, 6, 0, 5, 2, 4]
    y = scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v))
    permuted = scaled_dot_product_attention(Tensor(q), Tensor(k[:, :, order]), Tensor(v[:, :, order]))
    np.testing.assert_allclose(permuted.data, y.data, rtol=1e-12, atol=1e-14)


def test_causal_mask():
    """Token i does not depend on the tokens after it."""
    mask = causal_mask(4, np)
    assert mask.tolist() == [[j <= i for j in range(4)] for i in range(4)]
    x = normal(1, 1, 4, 3)
    before = scaled_dot_product_attention(*[Tensor(x)] * 3, mask).data
    x[:, :, 2:] += 1
    after = scaled_dot_product_attention(*[Tensor(x)] * 3, mask).data
    assert np.array_equal(before[:, :, :2], after[:, :, :2]) and not np.array_equal(before[:, :, 2:], after[:, :, 2:])


@pytest.mark.law(
    38, "attention at scores of +-10,000: the largest takes all",
    source="softmax at its limit", tolerance="exact")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("mask", [None, np.array([True, False, True])])
@pytest.mark.filterwarnings("error")
def test_finite_at_extreme_scores(dtype, mask):
    """Law 38: scores of +-10,000; the largest takes all."""
    q, k = (np.array(a, dtype)[None, None] for a in ([[100.0, 0], [-100, 0]], [[140.0, 1], [0, 1], [-140, 1]]))
    v = np.array([[[[1.0], [2], [3]]]], dtype)
    leaves = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    y = scaled_dot_product_attention(*leaves, mask)
    assert y.data[0, 0, :, 0].tolist() == [1.0, 3.0]
    assert all(np.isfinite(dx).all() for dx in gradients(y, leaves, np.ones(y.shape, dtype)))


@pytest.mark.parametrize("around", [-1000, -200, -61, -59, 0, 59, 61, 80, 200, 1000])
@pytest.mark.parametrize("mask", [None, np.array([True, False, True, True, False])])
@pytest.mark.filterwarnings("error")
def test_scores_of_any_size_decide_by_their_differences(around, mask):
    """In float32, whose exponential is inf at 89 and 0 at -104."""
    q, v = np.ones((1, 2, 1, 1), np.float32), normal(1, 2, 5, 3, seed=1).astype(np.float32)
    k = (around + normal(1, 2, 5, 1)).astype(np.float32)    # the scores themselves
    y = scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), mask).data
    everywhere = np.broadcast_to(True if mask is None else mask, (1, 2, 1, 5))
    np.testing.assert_allclose(y, by_loops(*(a.astype(np.float64) for a in (q, k, v)), everywhere), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shapes", [
    [(2, 2, 3, 4), (2, 2, 5, 3), (2, 2, 5, 4)], [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 4, 4)],
    [(2, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)], [(2, 3, 4), (2, 5, 4), (2, 5, 4)],
    [(2, 2, 3, 4), (2, 2, 5), (2, 2, 5, 4)],
])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"attention takes q \(B, h, N, d\)"):
        scaled_dot_product_attention(*(Tensor(np.zeros(shape)) for shape in shapes))


def test_a_mask_of_numbers_is_refused():
    """An additive mask of 0 and -inf would have the opposite meaning."""
    qkv = [Tensor(np.zeros((1, 1, 2, 3)))] * 3
    with pytest.raises(TypeError, match="mask must be boolean, True where a query attends to a key, not float64"):
        scaled_dot_product_attention(*qkv, np.zeros((2, 2)))


@pytest.mark.parametrize("mask", [[[True, False], [True, True]], True])
def test_a_mask_that_is_no_array_is_refused(mask):
    with pytest.raises(TypeError, match="mask must be boolean, True where a query attends to a key, not (list|bool)"):
        scaled_dot_product_attention(*[Tensor(np.zeros((1, 1, 2, 3)))] * 3, mask)


@pytest.mark.parametrize("shape", [(3,), (5, 1), (2, 1, 1, 2), (2, 5, 4, 2), (1, 1, 1, 4, 2), (0, 1, 4, 2), (2, 4, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    q, k = Tensor(np.zeros((3, 5, 4, 3))), Tensor(np.zeros((3, 5, 2, 3)))
    with pytest.raises(ValueError, match=r"mask must broadcast to .* here \(3, 5, 4, 2\), and has shape") as error:
        scaled_dot_product_attention(q, k, k, np.ones(shape, bool))
    assert str(error.value).endswith(str(shape))


@pytest.mark.parametrize("mask", [None, np.ones((1, 1, 2, 1), bool)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("error")
def test_without_keys_there_are_zeros_and_without_columns_a_refusal(mask, causal):
    q, nothing = Tensor(np.ones((1, 3, 2, 4)), requires_grad=True), Tensor(np.zeros((1, 3, 0, 4)), requires_grad=True)
    mask = None if mask is None else mask[..., :0]
    y = scaled_dot_product_attention(q, nothing, nothing, mask, causal=causal)
    assert y.shape == (1, 3, 2, 4) and not y.data.any()
    assert not any(dx.any() for dx in gradients(y, [q, nothing], np.ones(y.shape)))
    with pytest.raises(ValueError, match=r"at least one column, not q \(1, 2, 3, 0\)"):
        scaled_dot_product_attention(*[Tensor(np.zeros((1, 2, 3, 0)))] * 3)


def test_each_query_has_its_own_largest_score():
    """Scores of 10,000 for one query and of -9,000 for another: no overflow, and both results are right."""
    q, k = (Tensor(np.array(rows).reshape(1, 1, 2, 1)) for rows in ([100.0, -100.0], [100.0, 90.0]))
    v = Tensor(np.array([1.0, 2.0]).reshape(1, 1, 2, 1))
    assert scaled_dot_product_attention(q, k, v).data.ravel().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "attention takes q (B, h, N, d), k (B, h, M, d) and v (B, h, M, e), not (1, 1, 2, 3), (1, 1, 2, 4) "
                 "and (1, 1, 2, 3)",
     lambda: scaled_dot_product_attention(zeros(1, 1, 2, 3), zeros(1, 1, 2, 4), zeros(1, 1, 2, 3))),
    (TypeError, "attention: mask must be boolean, True where a query attends to a key, not float32",
     lambda: scaled_dot_product_attention(*[zeros(1, 1, 2, 3)] * 3, zeros(1, 1, 1, 2).data)),
    *((TypeError, f"an op takes one dtype, not {' and '.join(dtypes)}: convert one of them",
       lambda dtypes=dtypes: scaled_dot_product_attention(*(zeros(1, 1, 2, 3, dtype=d) for d in dtypes)))
      for dtypes in (["float64", "float32", "float32"], ["float32", "float64", "float32"],
                     ["float32", "float32", "float64"])),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)
