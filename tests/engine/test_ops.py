"""The elementary ops compared with NumPy and SciPy, their gradients on unusual shapes, and their error messages."""

import math

import numpy as np
import pytest
import scipy.special
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.gradcheck import check_gradients
from support.refusals import check_message, zeros

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients

few = settings(deadline=None, max_examples=25)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)
two_broadcasting = hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=1, max_side=3, max_dims=3)
EXTREME = np.array([[1e4, -1e4, 0.0, 1.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, 0.5]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def value(f, *inputs):
    return f(*(Tensor(x) for x in inputs)).data


# ---- arithmetic ------------------------------------------------------------------------------------------


@few
@given(two_broadcasting)
def test_arithmetic_broadcasts_as_numpy_does(broadcast):
    rng = np.random.default_rng(0)
    x, y = (rng.uniform(0.5, 2, shape) for shape in broadcast.input_shapes)
    for op, reference in [(ops.add, np.add), (ops.sub, np.subtract), (ops.mul, np.multiply), (ops.div, np.divide)]:
        assert np.array_equal(value(op, x, y), reference(x, y))
        check_gradients(op, x, y)


@few
@given(two_broadcasting)
def test_where(broadcast):
    x, y = normal(*broadcast.input_shapes[0]), normal(*broadcast.input_shapes[1], seed=1)
    condition = normal(*broadcast.result_shape, seed=2) > 0
    assert np.array_equal(ops.where(condition, Tensor(x), Tensor(y)).data, np.where(condition, x, y))
    check_gradients(lambda x, y: ops.where(condition, x, y), x, y)


def test_numbers_and_arrays_on_either_side():
    a, b = normal(2, 3), normal(3, seed=1)
    x = Tensor(a)
    for found, expected in [(2 - x, 2 - a), (2 / x, 2 / a), (x / 2, a / 2), (2 + x, a + 2), (3 * x, 3 * a), (-x, -a),
                            (b - x, b - a), (b * x, b * a), (b / x, b / a), (x - b, a - b), (x**2, a**2),
                            (b @ np.ones((3, 1)) * x, b @ np.ones((3, 1)) * a), (normal(4, 2) @ x, normal(4, 2) @ a),
                            (np.float64(2) * x, 2 * a), (np.array(2.0) - x, 2 - a)]:
        assert isinstance(found, Tensor)
        np.testing.assert_allclose(found.data, expected, rtol=1e-14)
    check_gradients(lambda x: (2 - x) * (b / x) + normal(2, 2) @ x * (-x) / 3 - x**3, a + 4 * np.sign(a))


@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.array(2.0), np.int64(2)])
def test_a_number_takes_the_dtype_of_the_tensor_it_meets(number):
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    for f in (lambda: x * number, lambda: number - x, lambda: x / number, lambda: x**number,
              lambda: ops.clip(x, -number, number)):
        y = f()
        assert y.dtype == np.float32
        assert gradients(y, [x], np.ones(3, np.float32))[0].dtype == np.float32


def test_an_array_of_another_dtype_is_refused():
    x = Tensor(np.ones(3, np.float32))
    for other in (np.ones(3), np.ones(3, np.int64), np.ones(3, np.float16)):
        with pytest.raises(TypeError, match=f"one dtype, not float32 and {other.dtype}"):
            x + other


@few
@given(st.floats(-3, 4), shapes)
def test_power(n, shape):
    x = np.random.default_rng(0).uniform(0.5, 2, shape)
    assert np.array_equal(value(lambda x: ops.power(x, n), x), x**n)
    check_gradients(lambda x: ops.power(x, n), x)


def test_whole_powers_at_negative_numbers_and_zero():
    check_gradients(lambda x: x**2 + x**3 + x**1, np.array([-2.0, -0.5, 0.0, 1.5]))
    x = Tensor(np.array([0.0, 2.0]), requires_grad=True)
    assert gradients(x**0, [x], np.ones(2))[0].tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match="constant exponent"):
        x**x


matrices = st.tuples(two_broadcasting, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@few
@given(matrices)
def test_matmul(drawn):
    broadcast, M, K, N = drawn
    leading = broadcast.input_shapes
    x, y = normal(*leading[0], M, K), normal(*leading[1], K, N, seed=1)
    np.testing.assert_allclose(value(ops.matmul, x, y), np.einsum("...mk,...kn->...mn", x, y), rtol=1e-12, atol=1e-13)
    check_gradients(ops.matmul, x, y)


@pytest.mark.parametrize("x, y", [((3,), (3, 2)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((4, 2, 3), (4, 2, 3))])
def test_matmul_refuses_shapes_that_do_not_fit(x, y):
    with pytest.raises(ValueError, match=r"matmul takes x \(\.\.\., M, K\)"):
        Tensor(np.ones(x)) @ Tensor(np.ones(y))


@few
@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), st.integers(1, 5), st.integers(1, 5))
def test_linear(leading, C, D):
    x, w, b = normal(*leading, C), normal(C, D, seed=1), normal(D, seed=2)
    np.testing.assert_allclose(value(ops.linear, x, w, b), np.einsum("...c,cd->...d", x, w) + b, rtol=1e-12, atol=1e-13)
    check_gradients(ops.linear, x, w, b)


@pytest.mark.parametrize("shapes", [((3, 2), (3, 2), (2,)), ((2, 3), (3, 2), (3,)), ((2, 3), (3, 2), (1, 2)),
                                    ((2, 3), (1, 3, 2), (2,)), ((), (3, 2), (2,))])
def test_linear_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"linear takes x \(\.\.\., C\)"):
        ops.linear(*(Tensor(np.ones(shape)) for shape in shapes))


# ---- functions of one element ----------------------------------------------------------------------------

WIDE = np.concatenate([np.linspace(-40, 40, 401), [-1e4, 1e4, -700.0, 700.0, 1e-9, -1e-9]])


@pytest.mark.parametrize("op, reference", [
    (ops.sigmoid, scipy.special.expit),
    (ops.silu, lambda x: x * scipy.special.expit(x)),
    # (1 + tanh u)/2 = expit(2 u)
    (ops.gelu, lambda x: x * scipy.special.expit(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    (ops.tanh, np.tanh), (ops.relu, lambda x: np.where(x > 0, x, 0)), (ops.absolute, np.abs),
    (lambda x: ops.exp(-ops.absolute(x)), lambda x: np.exp(-np.abs(x))),
    (lambda x: ops.log(ops.sqrt(x * x)), lambda x: np.log(np.abs(x))),
    (lambda x: ops.clip(x, -2, 3), lambda x: np.minimum(np.maximum(x, -2), 3)),
])
def test_value_over_the_whole_line(op, reference):
    x = WIDE[WIDE != 0]
    np.testing.assert_allclose(value(op, x), reference(x), rtol=1e-13, atol=1e-14)


def test_gelu_is_x_times_the_normal_distribution_function():
    """The tanh form is within 5e-4 of x Phi(x) everywhere."""
    assert np.abs(value(ops.gelu, WIDE) - WIDE * scipy.special.ndtr(WIDE)).max() < 5e-4


@pytest.mark.parametrize("op", [ops.exp, ops.tanh, ops.sigmoid, ops.silu, ops.gelu, ops.relu, ops.absolute])
@few
@given(hnp.arrays(np.float64, shapes, elements=st.floats(-6, 6)))
def test_gradient_of_functions_of_one_element(op, x):
    check_gradients(op, np.where(np.abs(x) < 1e-3, 0.1, x))     # relu and |x| have no derivative at 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("op", [ops.tanh, ops.sigmoid, ops.silu, ops.gelu, ops.relu])
@pytest.mark.filterwarnings("error:invalid")
def test_activations_are_finite_at_extremes(op, dtype):
    x = Tensor(np.array([-1e4, -300, -30, 0, 30, 300, 1e4], dtype), requires_grad=True)
    y = op(x)
    dx, = gradients(y, [x], np.ones(7, dtype))
    assert np.isfinite(y.data).all() and np.isfinite(dx).all()


def test_clip_passes_no_gradient_where_it_clipped():
    check_gradients(lambda x: ops.clip(x, -0.5, 0.5), np.array([-2.0, -0.4, 0.0, 0.4, 2.0]))
    x = Tensor(np.array([-0.5, 0.5]), requires_grad=True)       # at the edge itself it passes
    assert gradients(ops.clip(x, -0.5, 0.5), [x], np.ones(2))[0].tolist() == [1.0, 1.0]


# ---- reductions ------------------------------------------------------------------------------------------


@st.composite
def array_and_axes(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    axis = draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1),
                          hnp.valid_tuple_axes(len(shape), min_size=0)))
    return normal(*shape), axis


@pytest.mark.parametrize("op, reference", [(ops.sum, np.sum), (ops.mean, np.mean)])
@few
@given(array_and_axes(), st.booleans())
def test_sum_and_mean(op, reference, drawn, keepdims):
    x, axis = drawn
    found = value(lambda x: op(x, axis=axis, keepdims=keepdims), x)
    np.testing.assert_allclose(found, reference(x, axis=axis, keepdims=keepdims), rtol=1e-13, atol=1e-14)
    check_gradients(lambda x: op(x, axis=axis, keepdims=keepdims), x)


@few
@given(shapes, st.data(), st.booleans())
def test_maximum_of(shape, data, keepdims):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape) * 0.1     # no two are equal
    assert np.array_equal(value(lambda x: ops.maximum_of(x, axis, keepdims), x), x.max(axis=axis, keepdims=keepdims))
    check_gradients(lambda x: ops.maximum_of(x, axis, keepdims), x)


def test_the_largest_share_the_gradient():
    x = Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), requires_grad=True)
    assert gradients(ops.maximum_of(x, axis=1), [x], np.ones(2))[0].tolist() == [[0, 0.5, 0.5], [1, 0, 0]]


# ---- shapes and indices ----------------------------------------------------------------------------------


@few
@given(shapes, st.data())
def test_transpose(shape, data):
    """Any order of the axes, some of them counted from the end."""
    axes = data.draw(st.permutations(range(len(shape))))
    axes = [a - len(shape) if data.draw(st.booleans()) else a for a in axes]
    x = normal(*shape)
    assert np.array_equal(value(lambda x: ops.transpose(x, axes), x), np.transpose(x, axes))
    check_gradients(lambda x: ops.transpose(x, axes), x)
    check_gradients(lambda x: x.transpose(*axes), x)


def test_reshape():
    x = normal(2, 3, 4)
    for f in (lambda x: x.reshape(4, 6), lambda x: x.reshape((4, 6)), lambda x: x.reshape(-1, 6),
              lambda x: x.transpose(2, 0, 1).reshape(4, 6)):
        assert value(f, x).shape == (4, 6)
        check_gradients(f, x)
    assert value(lambda x: x.reshape(-1), x).shape == (24,)


@few
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(-3, 2))
def test_concat(lengths, axis):
    xs = [np.moveaxis(normal(n, 2, 2, seed=n), 0, axis) for n in lengths]
    assert np.array_equal(value(lambda *xs: ops.concat(xs, axis), *xs), np.concatenate(xs, axis))
    check_gradients(lambda *xs: ops.concat(xs, axis), *xs)


INDICES = [
    0, -1, (1, -2), slice(1, None), (slice(None), slice(None, None, 2)), (slice(None, None, -1), 2), None,
    (None, 0, ..., None), ..., (..., 1), np.array([2, 0, 2, 2]), (np.array([0, 0, 1]), np.array([1, 1, 0])),
    (slice(None), np.array([[1, 1], [3, -1]])), (np.array([1, -2]), slice(1, 3)), [0, 0], np.int64(1),
    np.array([True, False, True]), (slice(None), np.array([False, True, True, False])),
    (np.array([0, 2, 0]), slice(None), np.array([1, 1, 1])), (slice(0, 0),),
]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: " ".join(str(index).split()))
def test_getitem_is_numpys_and_repeats_add_up(index):
    x = normal(3, 4, 2)
    assert np.array_equal(value(lambda x: x[index], x), x[index])
    check_gradients(lambda x: x[index], x)


def test_embedding_adds_up_the_gradient_of_repeated_ids():
    ids = np.array([[3, 3, 0], [3, 1, 0]])
    table = normal(5, 2)
    assert np.array_equal(value(lambda table: ops.embedding(table, ids), table), table[ids])
    check_gradients(lambda table: ops.embedding(table, ids), table)
    leaf = Tensor(table, requires_grad=True)
    counts = gradients(ops.embedding(leaf, ids), [leaf], np.ones((2, 3, 2)))[0]
    assert counts[:, 0].tolist() == [2, 1, 0, 3, 0]


def test_embedding_refuses_ids_that_are_not_rows():
    table = Tensor(np.ones((5, 2)))
    for ids, found in [([0, 5], "0..5"), ([-1, 2], "-1..2")]:
        with pytest.raises(IndexError, match=rf"ids of 0\.\.4, not {found}"):
            ops.embedding(table, np.array(ids))
    with pytest.raises(TypeError, match="ids that are whole numbers, not float64"):
        ops.embedding(table, np.array([1.0]))


# ---- softmax and what is made of it ----------------------------------------------------------------------


@pytest.mark.parametrize("op, reference", [(ops.softmax, scipy.special.softmax),
                                           (ops.log_softmax, scipy.special.log_softmax)])
@few
@given(hnp.arrays(np.float64, shapes, elements=st.floats(-20, 20)), st.data())
def test_softmax_and_its_logarithm(op, reference, x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    np.testing.assert_allclose(value(lambda x: op(x, axis), x), reference(x, axis=axis), rtol=1e-12, atol=1e-13)
    check_gradients(lambda x: op(x, axis), x)


@few
@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_cross_entropy(B, K, data):
    labels = np.array(data.draw(st.lists(st.integers(0, K - 1), min_size=B, max_size=B)))
    logits = 3 * normal(B, K)
    expected = -scipy.special.log_softmax(logits, axis=1)[np.arange(B), labels].mean()
    np.testing.assert_allclose(value(lambda x: ops.cross_entropy(x, labels), logits), expected, rtol=1e-12, atol=1e-14)
    check_gradients(lambda x: ops.cross_entropy(x, labels), logits)


@pytest.mark.law(
    38, "softmax, log-softmax and cross-entropy are finite at logits of +-10,000, in half precision too, and so "
        "are their gradients",
    source="scipy's log-softmax", tolerance="2e-3: half precision has 11 bits; finiteness is exact")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite_at_extreme_logits(dtype):
    """Law 38: logits of +-10,000, where exp would overflow, in half precision too."""
    x = Tensor(EXTREME.astype(dtype), requires_grad=True)
    labels = np.array([1, 2, 2])
    rows = np.ones((3, 4), dtype)
    for y, dy in [(ops.softmax(x), rows), (ops.log_softmax(x), rows), (ops.cross_entropy(x, labels), None)]:
        assert np.isfinite(y.data).all() and y.dtype == dtype
        assert np.isfinite(gradients(y, [x], dy)[0]).all()
    np.testing.assert_allclose(ops.softmax(x).data.sum(axis=1), 1, rtol=2e-3)
    assert ops.softmax(x).data[1].tolist() == [0.25] * 4
    expected = -scipy.special.log_softmax(EXTREME, axis=1)[np.arange(3), labels].mean()
    assert ops.cross_entropy(x, labels).item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("labels, error", [
    (np.array([0, 3]), "labels of 0..2, not 0..3"), (np.array([-1, 1]), "labels of 0..2, not -1..1"),
    (np.array([0.0, 1.0]), "labels that are whole numbers, not float64"),
    (np.array([0, 1, 2]), r"labels and weight \(\.\.\.\), not"),
    (np.array([[0], [1]]), r"labels and weight \(\.\.\.\), not"),
])
def test_cross_entropy_refuses_labels_that_are_not_classes(labels, error):
    with pytest.raises((ValueError, TypeError, IndexError), match=error):
        ops.cross_entropy(Tensor(np.zeros((2, 3))), labels)


# ---- dropout ---------------------------------------------------------------------------------------------


def test_dropout_zeroes_a_share_p_and_keeps_the_mean():
    """100,000 elements, share zeroed within 5.5 standard errors: false alarm 4e-8."""
    p, n = 0.3, 100_000
    y = ops.dropout(Tensor(np.ones(n, np.float32)), p, np.random.default_rng(0)).data
    assert abs((y == 0).mean() - p) < 5.5 * math.sqrt(p * (1 - p) / n)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-6)


def test_dropout_drops_the_same_elements_on_the_way_back():
    x = Tensor(np.ones(1000), requires_grad=True)
    y = ops.dropout(x, 0.5, np.random.default_rng(0))
    assert np.array_equal(gradients(y, [x], np.ones(1000))[0], y.data) and 0 < np.count_nonzero(y.data) < 1000


def test_dropout_in_evaluation_is_the_identity():
    x = Tensor(np.ones(3))
    assert ops.dropout(x, 0.5, None) is x and ops.dropout(x, 0, np.random.default_rng(0)) is x
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            ops.dropout(x, p, None)


@few
@given(two_broadcasting)
def test_a_sum_over_what_was_broadcast_is_exact(broadcast):
    """For a cotangent of ones, x's gradient counts how often each element was repeated."""
    a, b = broadcast.input_shapes
    assume(a != b)
    x, y = Tensor(np.ones(a), requires_grad=True), Tensor(np.ones(b))
    dx, = gradients(x + y, [x], np.ones(broadcast.result_shape))
    assert np.array_equal(dx, np.full(a, math.prod(broadcast.result_shape) / math.prod(a)))


# ---- corners ---------------------------------------------------------------------------------------------


def test_the_kinks():
    """At 0 the slopes of relu and |x| are 0, and the slope of x**0 is 0 everywhere."""
    zero = zeros(3)
    for f in (ops.relu, ops.absolute, lambda x: x ** 0):
        assert gradients(f(zero), [zero], np.array([0, 1, -2], np.float32))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("f", [ops.mul, ops.div, ops.matmul])
def test_a_cotangent_that_nobody_needs_is_not_computed(f):
    for i in range(2):
        pair = [Tensor(np.ones((2, 2), np.float32), requires_grad=i == j) for j in range(2)]
        y = f(*pair)
        assert [dx is None for dx in y._pullback(y.data)] == [i == 1, i == 0]


def test_dropout_draws_single_precision():
    x, p = Tensor(np.ones((4, 5))), 0.4
    kept = np.random.default_rng(3).random((4, 5), dtype=np.float32) >= p
    assert np.allclose(ops.dropout(x, p, np.random.default_rng(3)).data, kept / 0.6)
    assert ops.dropout(x, 0, np.random.default_rng(3)) is x and ops.dropout(x, p, None) is x


@pytest.mark.parametrize("f", [ops.sum, ops.mean])
def test_reductions_take_all_axes_and_drop_them_by_default(f):
    x = zeros(1, 4, 4, 2)
    assert f(x).shape == () and f(x, 3).shape == (1, 4, 4) and f(x, 3, True).shape == (1, 4, 4, 1)


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "power takes a constant exponent; write exp(y * log(x)) for a Tensor y",
     lambda: zeros(2) ** zeros(2)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (2, 3) and (2, 3)",
     lambda: zeros(2, 3) @ zeros(2, 3)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (3,) and (3, 2)", lambda: zeros(3) @ zeros(3, 2)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (2, 3) and (3,)", lambda: zeros(2, 3) @ zeros(3)),
    (TypeError, "an op takes one dtype, not float32 and float64: convert one of them",
     lambda: zeros(2) + zeros(2, dtype=np.float64)),
    (TypeError, "a Tensor of int64 does not take the number 0.5: convert it to a floating dtype",
     lambda: ops.where(np.ones(2, bool), Tensor(np.zeros(2, np.int64)), 0.5)),
    (ValueError, "cross_entropy takes logits (..., K), with labels and weight (...), not (2, 3), (3,) and no weight",
     lambda: ops.cross_entropy(zeros(2, 3), np.zeros(3, int))),
    (ValueError, "cross_entropy takes logits (..., K), with labels and weight (...), not (2, 3, 1), (2,) and no weight",
     lambda: ops.cross_entropy(zeros(2, 3, 1), np.zeros(2, int))),
    (TypeError, "cross_entropy takes labels that are whole numbers, not float64",
     lambda: ops.cross_entropy(zeros(2, 3), np.zeros(2))),
    (IndexError, "cross_entropy takes labels of 0..2, not 0..3",
     lambda: ops.cross_entropy(zeros(2, 3), np.array([0, 3]))),
    (IndexError, "cross_entropy takes labels of 0..2, not -1..2",
     lambda: ops.cross_entropy(zeros(2, 3), np.array([-1, 2]))),
    (ValueError, "p must be in [0, 1), not 1", lambda: ops.dropout(zeros(2), 1, np.random.default_rng(0))),
    (ValueError, "p must be in [0, 1), not -0.1", lambda: ops.dropout(zeros(2), -0.1, np.random.default_rng(0))),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)


# ---- erf, for gelu_exact ---------------------------------------------------------------------------------


def test_erf_in_float32_is_erf():
    """To 2e-7 everywhere, against SciPy's in float64; exactly odd, and exactly 1 and -1 far away."""
    x = np.concatenate([np.linspace(-6, 6, 400_001), 10.0 ** np.arange(-30, 38, 0.25)]).astype(np.float32)
    y = ops.erf_in_float32(x)
    assert y.dtype == np.float32 and np.abs(y - scipy.special.erf(x.astype(float))).max() < 2e-7
    assert np.array_equal(ops.erf_in_float32(-x), -y)
    assert (y[x >= 4.5] == 1).all() and y[x == 0] == 0
    assert ops.erf_in_float32(np.array([np.inf, -np.inf, np.nan], np.float32)).tolist()[:2] == [1, -1]
    assert np.isnan(ops.erf_in_float32(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("dtype, atol", [(np.float64, 1e-14), (np.float32, 5e-7), (np.float16, 1e-3)])
@pytest.mark.parametrize("recorded", [True, False])
def test_gelu_exact_is_x_phi_of_x(dtype, atol, recorded):
    """With a gradient and, in pieces, without; the columns of a larger array too."""
    x = np.random.default_rng(0).normal(0, 2, (40, 7, 6)).astype(dtype)[..., ::2]
    y = ops.gelu_exact(Tensor(x, requires_grad=recorded)).data
    assert y.dtype == dtype
    wanted = x.astype(float) * scipy.special.ndtr(x.astype(float))
    np.testing.assert_allclose(y.astype(float), wanted, rtol=0, atol=atol * np.abs(wanted).max())
    assert (ops.gelu_exact(Tensor(np.array([-30, -1e3], dtype))).data == 0).all()
