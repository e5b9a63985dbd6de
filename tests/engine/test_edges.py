"""Every op at the ends of its dtype: right, or visibly not finite; never a wrong number.

The rule for each op, forward and backward, in float16, float32 and float64:

    right                   to a few units of rounding of the same op in a wider dtype, or of a closed form
    beyond the range        inf, or NaN
    NaN in                  NaN out
    masked                  NaN or inf there has no influence
"""

import math

import numpy as np
import pytest
from support.every_op import EVERY_OP

from minidiff.engine import conv, norm, ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.tensor import Tensor, gradients

every_op = pytest.mark.parametrize("op", EVERY_OP.values(), ids=EVERY_OP.keys())
every_dtype = pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
silent = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")   # an overflow may say that it is one


def results(op, inputs, dy_scale=1.0):
    """y and the gradient of each input, for a random cotangent that has few digits."""
    leaves = [Tensor(x, requires_grad=True) for x in inputs]
    y = op.f(*leaves)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float16) * dy_scale
    return [y.data, *gradients(y, leaves, dy.astype(y.dtype))]


@every_op
@pytest.mark.parametrize("dtype, wider, exponents", [
    (np.float16, np.float64, [-8, -7, -5, -3, 2, 3, 4]),
    (np.float32, np.float64, [-40, -38, -30, -19, -10, 10, 19, 30, 38]),
], ids=["float16", "float32"])
@silent
def test_inputs_of_any_size(op, dtype, wider, exponents):
    """Inputs of about 10^e, from the smallest to the largest numbers, against the op in float64."""
    limits = np.finfo(dtype)
    allowed = {np.float16: 2, np.float32: 40}[dtype] * limits.eps
    for e in exponents:
        with np.errstate(over="ignore"):
            inputs = [(x * 10.0**e).astype(dtype) for x in op.inputs()]
        inputs = [np.where(np.isfinite(x), x, limits.max / 2).astype(dtype) for x in inputs]
        exact = results(op, [x.astype(wider) for x in inputs])
        for expected, found in zip(exact, results(op, inputs), strict=True):
            in_range = np.abs(expected) <= limits.max
            size = np.abs(expected[in_range]).max(initial=0)
            near = np.abs(found - expected) <= allowed * size + 0.01 * limits.tiny
            assert (near | ~np.isfinite(found)).all(), f"10^{e}"
            assert (near | ~in_range).all() or e > 9, f"10^{e}"     # small inputs give the right numbers


@every_op
@every_dtype
@silent
def test_nan_in_gives_nan_out(op, dtype):
    """In each input, at the first place that counts."""
    for i, shape in enumerate(op.shapes):
        for place in range(math.prod(shape)):
            inputs = op.inputs(dtype)
            inputs[i].reshape(-1)[place] = np.nan
            if np.isnan(results(op, inputs)[0]).any():
                break
        else:
            pytest.fail(f"NaN in input {i}, {shape}, did not come out")


# --- elementwise functions against closed forms ---------------------------------------------------------------

def sigmoid(x):
    return np.where(x < 0, np.exp(-np.abs(x)), 1) / (1 + np.exp(-np.abs(x)))



FUNCTIONS = {                               # op, f, df/dx; in longdouble
    "exp": (ops.exp, np.exp, np.exp),
    "expm1": (ops.expm1, np.expm1, np.exp),
    "log": (lambda x: ops.log(ops.absolute(x)), lambda x: np.log(np.abs(x)), lambda x: 1 / x),
    "sqrt": (lambda x: ops.sqrt(ops.absolute(x)), lambda x: np.sqrt(np.abs(x)),
             lambda x: np.sign(x) / (2 * np.sqrt(np.abs(x)))),
    "tanh": (ops.tanh, np.tanh, lambda x: 4 * sigmoid(2 * x) * sigmoid(-2 * x)),
    "sigmoid": (ops.sigmoid, sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "log_sigmoid": (ops.log_sigmoid, lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), lambda x: sigmoid(-x)),
    "relu": (ops.relu, lambda x: np.maximum(x, 0), lambda x: (x > 0) * np.ones_like(x)),
    "absolute": (ops.absolute, np.abs, np.sign),
    "1/x": (lambda x: 1 / x, lambda x: 1 / x, lambda x: -1 / (x * x)),
    "x^2": (lambda x: x**2, lambda x: x * x, lambda x: 2 * x),
    "clip": (lambda x: ops.clip(x, -1, 2), lambda x: x.clip(-1, 2), lambda x: ((-1 <= x) & (x <= 2)) * np.ones_like(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@every_dtype
@silent
def test_functions_at_the_ends_of_their_dtype(name, dtype):
    """To 8 units of rounding of the result itself, however small it is."""
    op, f, slope = FUNCTIONS[name]
    limits = np.finfo(dtype)
    sizes = [limits.smallest_subnormal, limits.tiny, 1e-6, 1e-3, 0.5, 1, 2, 5, 10, 15, 20, 40, 80, 88, 100, 700,
             float(limits.max) ** 0.5, limits.max]
    x = np.array([*sizes, *(-np.array(sizes, np.float64))], dtype)
    x = Tensor(x[np.isfinite(x)], requires_grad=True)
    y = op(x)
    exact_x = x.data.astype(np.longdouble)
    for found, exact in ((y.data, f(exact_x)), (gradients(y, [x], np.ones_like(y.data))[0], slope(exact_x))):
        expected = exact.astype(dtype)
        out = ~np.isfinite(expected)
        assert np.array_equal(found[out], expected[out])
        # float64's own functions take a number near 700 to an exponential that is right to 700 units
        np.testing.assert_allclose(found[~out].astype(np.longdouble), exact[~out], rtol=8 * limits.eps,
                                   atol=2 * limits.smallest_subnormal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_the_logarithm_of_a_sigmoid(dtype):
    """log(sigmoid(x)) was -inf at -20, and its gradient NaN."""
    x = Tensor(np.array([-20, -60], dtype), requires_grad=True)
    for y in (ops.log(ops.sigmoid(x)), ops.log_sigmoid(x)):
        np.testing.assert_allclose(y.data, [-20, -60], rtol=1e-6)
        np.testing.assert_allclose(gradients(y, [x], np.ones(2))[0], [1, 1], rtol=1e-5)
    far = Tensor(np.array([-np.inf, -1e30, 1e30, np.inf], dtype))
    assert ops.log_sigmoid(far).data.tolist() == [-np.inf, -dtype(1e30), 0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int8, bool])
@pytest.mark.parametrize("op", [ops.exp, ops.log, ops.sqrt, ops.tanh, ops.sigmoid, ops.log_sigmoid, ops.silu,
                                ops.softmax, ops.log_softmax, ops.mean, lambda x: ops.matmul(x, x),
                                lambda x: ops.power(x, 2), lambda x: x + 10, lambda x: 2 - x, lambda x: x * x,
                                lambda x: -x])
def test_functions_of_whole_numbers_are_refused(op, dtype):
    """sigmoid of the uint8 200 was 0, and softmax chose the smallest logit, since -x wraps around; 250 + 10 was 4."""
    with pytest.raises(TypeError, match=f"takes a floating dtype, not {np.dtype(dtype)}: convert x"):
        op(Tensor(np.ones((2, 2), dtype)))


@silent
def test_a_quotients_gradient_needs_no_square():
    a, b = (Tensor(np.array(x, np.float32), requires_grad=True) for x in ([1e20, 1e-30, 0], [1e25, 1e-25, 1e-40]))
    np.testing.assert_allclose(gradients(a / b, [b], np.ones(3))[0], [-1e-30, -1e20, 0], rtol=1e-6)


def test_a_products_gradient_is_summed_in_float32():
    """float16 rounds each of these products to 0, and their sum is 1e-3."""
    x, y = Tensor(np.full(10_000, 1e-4, np.float16)), Tensor(np.float16([1.0]), requires_grad=True)
    found = gradients(x * y, [y], np.full(10_000, 1e-3, np.float16))[0]
    np.testing.assert_allclose(found, [1e-3], rtol=1e-2)


@pytest.mark.parametrize("low, high", [(1, 0), (np.nan, 1), (0, np.nan)])
def test_clip_refuses_bounds_out_of_order(low, high):
    with pytest.raises(ValueError, match="low must be at most high"):
        ops.clip(Tensor([1.0]), low, high)


@pytest.mark.parametrize("dtype, number", [(np.float16, 1e-9), (np.float32, 1e-50), (np.float32, np.float64(-1e-50))])
def test_a_number_that_the_dtype_rounds_to_0_is_refused(dtype, number):
    """log(x + 1e-9) in float16 would be log(0), and 1e4 * 1e-9 would be 0."""
    x = Tensor(np.zeros(2, dtype))
    for f in (lambda: x + number, lambda: number * x, lambda: x / number):
        with pytest.raises(ValueError, match="is 0 in float"):
            f()
    assert (x + 0).data.tolist() == (0.0 * x).data.tolist() == [0, 0]


# --- reductions, softmax ---------------------------------------------------------------------------------------

@every_dtype
@pytest.mark.filterwarnings("error")
def test_a_mean_whose_sum_overflows(dtype):
    top = np.finfo(dtype).max
    x = np.stack([np.full(8, top), np.arange(8)]).astype(dtype)
    assert ops.mean(Tensor(x), axis=1).data.tolist() == [top, 3.5]
    assert conv.average_pool(Tensor(np.full((1, 2, 2, 1), top, dtype))).data.item() == top
    assert np.isinf(ops.mean(Tensor(np.array([np.inf, 1], dtype))).data)


@every_dtype
def test_ties_of_a_maximum_share_their_gradient(dtype):
    """70,000 of them: float16 counts to 65,504."""
    x = Tensor(np.ones((1, 70_000), dtype), requires_grad=True)
    dx, = gradients(ops.maximum_of(x, axis=1), [x], np.array([60_000.0]))
    np.testing.assert_allclose(dx, 6 / 7, rtol=1e-3)


@every_dtype
@silent
def test_minus_infinity_among_logits(dtype):
    """It has probability 0 and no gradient; a row that says nothing is NaN, not a distribution."""
    x = Tensor(np.array([[0, -np.inf, 0]], dtype), requires_grad=True)
    dy = np.array([[1.0, 2, 3]])
    y = ops.softmax(x)
    assert y.data.tolist() == [[0.5, 0, 0.5]] and gradients(y, [x], dy)[0].tolist() == [[-0.5, 0, 0.5]]
    y = ops.log_softmax(x)
    assert y.data[0, 1] == -np.inf and np.isfinite(gradients(y, [x], dy)[0]).all()
    assert ops.cross_entropy(x, np.array([1])).item() == np.inf
    for row in ([-np.inf] * 3, [np.inf, 0, 0], [np.nan, 0, 0]):
        for f in (ops.softmax, ops.log_softmax):
            assert np.isnan(f(Tensor(np.array([row], dtype))).data).any()


@silent
def test_what_weighs_nothing_has_no_influence_on_a_cross_entropy():
    """A label of probability 0 at padding: 0 times -inf."""
    logits = Tensor(np.array([[[0, 1], [0, -np.inf]]], np.float32), requires_grad=True)
    loss = ops.cross_entropy(logits, np.array([[1, 1]]), np.array([[2.0, 0]]))
    assert loss.item() == pytest.approx(2 * np.log1p(np.exp(-1)), rel=1e-6)
    assert gradients(loss, [logits])[0][0, 1].tolist() == [0, 0]
    for anything in (np.nan, np.inf, -np.inf):
        logits = Tensor(np.array([[0, 1], [anything, anything]], np.float32), requires_grad=True)
        loss = ops.cross_entropy(logits, np.array([1, 0]), np.array([2.0, 0]))
        assert loss.item() == pytest.approx(2 * np.log1p(np.exp(-1)), rel=1e-6)
        dx = gradients(loss, [logits])[0]
        assert dx[1].tolist() == [0, 0] and dx[0, 0] == pytest.approx(2 / (1 + np.e), rel=1e-6)
    logits = Tensor(np.zeros((1, 2, 2), np.float32))
    for labels in ([[0, -1]], [[2, 0]]):
        with pytest.raises(IndexError, match=r"labels of 0\.\.1"):
            ops.cross_entropy(logits, np.array(labels), np.array([[1.0, 0]]))


# --- norms -----------------------------------------------------------------------------------------------------

def norm_and_gradient(x, groups, gamma, beta, dy, eps=1e-5):
    """Group norm and dx in longdouble."""
    shape, x = x.shape, x.astype(np.longdouble).reshape(len(x), -1, groups, x.shape[-1] // groups)
    centred = x - x.mean(axis=(1, 3), keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + np.longdouble(eps))
    x_hat, d = centred * rstd, (dy.astype(np.longdouble) * gamma).reshape(x.shape)
    dx = rstd * (d - d.mean(axis=(1, 3), keepdims=True) - x_hat * (d * x_hat).mean(axis=(1, 3), keepdims=True))
    return x_hat.reshape(shape) * gamma + beta, dx.reshape(shape)


SHAPES_OF_INPUT = {                         # of standard normal x and the dtype's largest number
    "huge": lambda x, top: x * (top / 16), "tiny": lambda x, top: x / top, "of 1e20": lambda x, top: x * top**0.52,
    "far from 0": lambda x, top: x + top**0.15, "constant": lambda x, top: 0 * x + top**0.16 + 0.3,
    "constant and huge": lambda x, top: 0 * x + top, "one sample huge": lambda x, top: x * np.stack([1, top / 32])[
        :, None, None, None],
}


@pytest.mark.parametrize("name", SHAPES_OF_INPUT)
@every_dtype
@pytest.mark.filterwarnings("error")
def test_norms_of_any_input(name, dtype):
    rng, top = np.random.default_rng(0), float(np.finfo(dtype).max)
    x = np.clip(SHAPES_OF_INPUT[name](rng.standard_normal((2, 5, 7, 4)), top), -top, top).astype(dtype)
    gamma, beta, dy = (rng.standard_normal(shape).astype(dtype) for shape in (4, 4, x.shape))
    leaves = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    for groups, y in ((2, norm.group_norm(leaves[0], 2, *leaves[1:])), (1, norm.layer_norm(*leaves))):
        rows, dy_rows = (x, dy) if groups == 2 else (x.reshape(-1, 1, 4), dy.reshape(-1, 1, 4))
        expected, dx = norm_and_gradient(rows, groups, gamma, beta, dy_rows)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(y.data.astype(np.longdouble), expected.reshape(x.shape), rtol=0, atol=100 * eps)
        found = gradients(y, leaves, dy)
        sizes = np.abs(dx).reshape(len(dx), -1).max(axis=1).reshape(-1, *[1] * (dx.ndim - 1))
        error = np.abs(found[0].reshape(dx.shape) - dx) - 2 * np.finfo(dtype).smallest_subnormal
        assert (error <= 100 * eps * sizes).all() and np.isfinite(found[1]).all()


def test_a_norm_of_one_sample_does_not_depend_on_another_that_is_out_of_range():
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 4), dtype=np.float32)
    gamma, beta = Tensor(np.ones(4, np.float32)), Tensor(np.zeros(4, np.float32))
    for f in (lambda x: norm.group_norm(x, 2, gamma, beta), lambda x: norm.layer_norm(x, gamma, beta)):
        before = f(Tensor(x)).data[0]
        for other in (x[1] * 1e30, x[1] + 1e6, x[1] * np.nan):
            assert np.array_equal(f(Tensor(np.stack([x[0], other]))).data[0], before)


# --- attention -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 6e4])
@pytest.mark.parametrize("of", ["k", "v"])
@every_dtype
@silent
def test_masked_keys_and_values_may_be_anything(bad, of, dtype):
    """NaN and infinity too: the result and every gradient are the same to the last bit."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)))
    mask, plain = np.array([True, True, False, True, False]), None
    for value in (None, bad):
        if value is not None:
            {"k": k, "v": v}[of][:, :, ~mask] = value
        leaves = [Tensor(a, requires_grad=True) for a in (q, k, v)]
        y = scaled_dot_product_attention(*leaves, mask)
        found = [y.data, *gradients(y, leaves, np.ones(y.shape))]
        plain = plain or found
        assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("of", ["k", "v"])
@silent
def test_a_causal_query_does_not_see_a_nan_that_comes_later(of):
    """And one that may see it is NaN."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((1, 2, 4, 3)) for name in "qkv"}
    before = scaled_dot_product_attention(*map(Tensor, arrays.values()), causal=True).data
    arrays[of][:, :, 2] = np.nan
    leaves = [Tensor(a, requires_grad=True) for a in arrays.values()]
    y = scaled_dot_product_attention(*leaves, causal=True)
    np.testing.assert_allclose(y.data[:, :, :2], before[:, :, :2], rtol=1e-12)
    assert np.isnan(y.data[:, :, 2:]).all()
    dq, _, _ = gradients(y, leaves, np.ones(y.shape))
    assert np.isfinite(dq[:, :, :2]).all()


@silent
def test_attention_to_scores_of_minus_infinity_alone_is_not_a_zero():
    q, k, v = (np.full((1, 1, 1, 2), x) for x in (-1e200, 1e200, 1.0))
    assert np.isnan(scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v)).data).all()
    assert np.isnan(scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), np.array([True])).data).all()
    assert not scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), np.array([False])).data.any()
