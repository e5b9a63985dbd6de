"""Mixed precision: half-precision arithmetic within its own rounding, float32 weights, and the loss scale.

NumPy is the test bed.  bfloat16 comes from the package ml_dtypes, and its tests are skipped where that is missing.
"""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.every_op import EVERY_OP

from minidiff.engine import attention, conv, norm, ops
from minidiff.engine.backend import is_floating, is_half
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.nn.layers import Linear
from minidiff.nn.precision import LossScale, dtype_of, in_precision
from minidiff.nn.transformer import TransformerBlock

HALVES = ("float16", "bfloat16")
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}            # the largest relative error of rounding to it
half = pytest.mark.parametrize("precision", HALVES)


def the(precision: str) -> np.dtype:
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs the package ml_dtypes")
    return dtype_of(precision)


# --- the dtypes -------------------------------------------------------------------------------------------

@half
def test_half_precision_is_recognised(precision):
    dtype = the(precision)
    assert is_half(dtype) and is_floating(dtype) and dtype.name == precision and dtype.itemsize == 2
    assert not any(is_half(np.dtype(other)) for other in ("float32", "float64", "int16", "uint16", "bool"))
    assert is_floating(np.dtype("float64")) and not is_floating(np.dtype("int16"))


def test_without_ml_dtypes_bfloat16_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)     # an import of it fails
    with pytest.raises(UserError, match="pip install ml_dtypes, or use float16"):
        dtype_of("bfloat16")
    with pytest.raises(UserError, match="precision must be one of float32, float16, bfloat16, not 'float8'"):
        dtype_of("float8")


# --- the arithmetic ---------------------------------------------------------------------------------------

@half
@pytest.mark.parametrize("op", EVERY_OP.values(), ids=EVERY_OP.keys())
def test_every_op_agrees_with_float64(op, precision):
    """Forward and every gradient to a few roundings of inputs that half precision holds exactly."""
    dtype, results = the(precision), []
    inputs = [x.astype(dtype).astype(np.float64) for x in op.inputs()]
    for compute in (np.dtype(np.float64), dtype):
        leaves = [ops.cast(Tensor(x), compute) for x in inputs]
        for leaf in leaves:
            leaf.requires_grad = True
        y = op.f(*leaves)
        assert y.dtype == compute
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype).astype(compute)
        dxs = gradients(y, leaves, dy)
        assert all(dx.dtype == compute for dx in dxs)
        results.append([a.astype(np.float64) for a in (y.data, *dxs)])
    for exact, found in zip(*results, strict=True):
        assert np.abs(found - exact).max() <= 6 * EPS[precision] * np.abs(exact).max()


N = 20_000                                                  # float16 cannot count it: 2048 + 1 is 2048 there
ADDS = {
    "sum": (ops.sum, [(N, 3)], {"axis": 0}),
    "mean": (ops.mean, [(N, 3)], {"axis": 0}),
    "matmul": (ops.matmul, [(2, N), (N, 3)], {}),
    "matmul of a batch": (ops.matmul, [(2, 1, N), (2, N, 3)], {}),
    "what broadcasting repeated": (lambda x, b: ops.add(x, b), [(N, 3), (3,)], {}),
    "convolution": (conv.conv2d, [(2, 100, 100, 1), (3, 3, 1, 2), (2,)], {}),
    "group norm": (lambda x, g, b: norm.group_norm(x, 1, g, b), [(1, N, 2), (2,), (2,)], {}),
    "layer norm": (norm.layer_norm, [(3, N), (N,), (N,)], {}),
    "attention": (attention.scaled_dot_product_attention, [(1, 1, 2, 4), (1, 1, N, 4), (1, 1, N, 4)], {}),
    "softmax": (ops.softmax, [(2, N)], {}),
    "embedding": (lambda table: ops.embedding(table, np.zeros(N, int)), [(2, 3)], {}),
    "an index that repeats": (lambda x: ops.getitem(x, np.zeros(N, int)), [(2, 3)], {}),
    "up-sampling": (lambda x: conv.upsample_nearest(x, 100), [(1, 1, 1, 2)], {}),
    "average of a square": (lambda x: conv.average_pool(x, 100), [(1, 100, 100, 2)], {}),
}


@half
@pytest.mark.parametrize("name", ADDS)
def test_sums_are_float32s(name, precision):
    """20,000 terms of one sign, forward and back: no more than a few roundings of the result."""
    dtype, results, (op, shapes, options) = the(precision), [], ADDS[name]
    rng = np.random.default_rng(0)
    inputs = [rng.uniform(0.5, 1, shape).astype(dtype).astype(np.float64) / (16 if name == "matmul" else 1)
              for shape in shapes]
    for compute in (np.dtype(np.float64), dtype):
        leaves = [Tensor(x.astype(compute)) for x in inputs]
        for leaf in leaves:
            leaf.requires_grad = True
        y = op(*leaves, **options)
        results.append([a.astype(np.float64) for a in (y.data, *gradients(y, leaves, np.ones(y.shape, compute)))])
    # the largest of them all, for where a norm's gradient cancels to nothing
    size = max(np.abs(exact).max() for exact in results[0])
    for exact, found in zip(*results, strict=True):
        bound = np.abs(exact).max() if np.abs(exact).max() > 1e-6 * size else size
        assert np.abs(found - exact).max() <= 4 * EPS[precision] * bound


@half
def test_attention_over_scores_that_float16_does_not_know(precision):
    """Scores of 10^5 before their scaling: computed in float32 they are scores like any others."""
    dtype = the(precision)
    q = Tensor(np.full((1, 1, 2, 16), 80, dtype))
    y = attention.scaled_dot_product_attention(q, q, Tensor(np.ones((1, 1, 2, 3), dtype)))
    assert (y.data.astype(float) == 1).all()


@pytest.mark.parametrize("size", [300, 1e-4])
@half
def test_a_quotients_gradient_where_the_square_is_no_float16(precision, size):
    """d(x/y)/dy = -x/y^2: 300^2 is inf there, and 1e-8 is 0."""
    x, y = (Tensor(np.full(3, size, the(precision))) for _ in range(2))
    x.requires_grad = y.requires_grad = True
    dx, dy = gradients(ops.div(x, y), [x, y], np.ones(3, x.dtype))
    assert dx.dtype == dy.dtype == x.dtype
    exact = 1 / float(y.data[0])
    for found, expected in ((dx, exact), (dy, -exact)):
        np.testing.assert_allclose(found.astype(float), expected, rtol=2 * EPS[precision])


def test_two_dtypes_are_refused_by_ops_of_half_precision():
    x, y = Tensor(np.ones((2, 2), np.float16)), Tensor(np.ones((2, 2), np.float32))
    image, w = (Tensor(np.ones((1, 1, 1, 1), np.float16)) for _ in range(2))
    assert conv.conv2d(image, w, bias=Tensor(np.ones(1, np.float16))).data.item() == 2
    for wrong in (lambda: x @ y, lambda: ops.add(x, y), lambda: ops.matmul(y, x),
                  lambda: conv.conv2d(image, w, bias=Tensor(np.ones(1, np.float32)))):
        with pytest.raises(TypeError, match="one dtype"):
            wrong()
    with pytest.raises(TypeError, match="cast takes one floating dtype to another, not int64 to float16"):
        ops.cast(Tensor(np.arange(3)), np.float16)
    with pytest.raises(TypeError, match="not float16 to int32"):
        ops.cast(x, np.int32)


# --- a network in half precision --------------------------------------------------------------------------

@half
def test_a_module_in_half_precision(precision):
    """A copy whose parameters are casts, for which tests/nn/test_half_precision_networks.py has every network."""
    dtype, module = the(precision), TransformerBlock(4, 2, np.random.default_rng(0))
    before = module.state_dict()
    twin = in_precision(module, dtype)
    assert twin is not module and twin.dtype == dtype and module.dtype == np.float32
    assert twin.parameters().keys() == module.parameters().keys()
    for name, p in twin.parameters().items():
        assert p.dtype == dtype and np.array_equal(p.data, before[name].astype(dtype))
    after = module.state_dict()
    assert all(np.array_equal(after[name], w) for name, w in before.items())


def test_in_its_own_precision_a_module_is_itself():
    layer = Linear(2, 2, np.random.default_rng(0))
    assert in_precision(layer, np.float32) is layer


def test_scaling_keeps_small_gradients():
    """A gradient of 1e-9 rounds to 0 in float16, and is there once the loss was scaled."""
    layer, x = Linear(2, 1, np.random.default_rng(0)), np.ones((4, 2), np.float32)
    leaves, S = list(layer.parameters().values()), 2.0**20

    def loss(part):
        y = in_precision(layer, np.float16)(ops.cast(Tensor(x[part]), np.float16))
        return ops.mean(ops.cast(y, np.float32)) * 1e-9
    exact = np.array([[1e-9], [1e-9]])
    _, (lost, _) = parallel_gradients(loss, leaves, 4)
    value, (kept, _) = parallel_gradients(loss, leaves, 4, S)
    assert (lost == 0).all()
    np.testing.assert_allclose(kept / S, exact, rtol=2e-3)
    assert value == pytest.approx(1e-9 * float((x @ layer.w.data.astype(np.float16)).mean()), rel=2e-3)


# --- the loss scale ---------------------------------------------------------------------------------------

@settings(max_examples=50)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_the_loss_scale_is_halved_and_doubled(finite, patience):
    """S is 2^(start + doublings - halvings), and a doubling is every `patience`-th good step in a row."""
    s, doublings, run = LossScale(2.0**8, patience), 0, 0
    for i, good in enumerate(finite):
        s.update(good)
        run = run + 1 if good else 0
        doublings += good and run % patience == 0
        assert s.scale == 2.0 ** (8 + doublings - finite[:i + 1].count(False))
        assert s.skipped == finite[:i + 1].count(False)
    other = LossScale(2.0, patience)
    other.load_state_dict(s.state_dict())
    assert vars(other) == vars(s)


def test_a_scale_of_one_stays_one():
    s = LossScale.of("bfloat16")
    for finite in (True, False) * 3:
        s.update(finite)
    assert s.scale == 1 and s.state_dict() == {} and s.can_continue(True) and not s.can_continue(False)
    assert LossScale.of("float16").scale == 2.0**15 and LossScale.of("float16").can_continue(False)
