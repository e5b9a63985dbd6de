"""Mixed precision: half-precision arithmetic within its own rounding, float32 weights, and the loss scale.

NumPy is the test bed.  bfloat16 comes from the package ml_dtypes, and its tests are skipped where that is missing.
"""

import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.every_op import EVERY_OP

from minidiff import checkpoint
from minidiff.engine import attention, conv, norm, ops
from minidiff.engine.backend import is_floating, is_half
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.nn.layers import Linear
from minidiff.nn.precision import LossScale, dtype_of, in_precision
from minidiff.training import main_job as train

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
    with pytest.raises(UserError, match="precision must be one of"):
        train.TrainConfig(precision="half")


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
    """It computes in half; the gradients reach the float32 weights, and the module is as it was."""
    dtype, model = the(precision), tiny.trained_a_little()
    before = model.state_dict()
    twin = in_precision(model, dtype)
    assert twin is not model and twin.dtype == dtype and model.dtype == np.float32
    assert twin.parameters().keys() == model.parameters().keys()
    for name, p in twin.parameters().items():
        assert p.dtype == dtype and np.array_equal(p.data, before[name].astype(dtype))
    x_0, ids, mask, t, eps = tiny.trainer().batch()
    results = []
    for m in (model, twin):
        loss = m.loss(x_0, ids, mask, t, eps)
        assert loss.dtype == np.float32
        grads = gradients(loss, list(model.parameters().values()))
        assert all(g.dtype == np.float32 for g in grads)
        results.append((loss.item(), np.concatenate([g.ravel() for g in grads])))
    (loss, g), (half_loss, half_g) = results
    assert half_loss != loss and half_loss == pytest.approx(loss, rel=4 * EPS[precision])
    assert np.linalg.norm(half_g - g) < 30 * EPS[precision] * np.linalg.norm(g)
    after = model.state_dict()
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
    assert s.scale == 1 and s.state_dict() == {} and s.bears(True) and not s.bears(False)
    assert LossScale.of("float16").scale == 2.0**15 and LossScale.of("float16").bears(False)


# --- training ---------------------------------------------------------------------------------------------

half_trainer = partial(tiny.trainer, precision="float16", batch=4)


@half
def test_it_learns_as_float32_does(precision):
    the(precision)
    losses = {}
    for name in ("float32", precision):
        t = tiny.trainer(steps=20, batch=4, lr=5e-3, precision=name)
        for _ in range(20):
            t.step()
        losses[name] = np.array(t.losses)
        for arrays in (t.model.state_dict(), t.optimiser.m, t.optimiser.v, t.ema.average):
            assert all(a.dtype == np.float32 for a in arrays.values())
    assert not np.array_equal(losses[precision], losses["float32"])
    np.testing.assert_allclose(losses[precision], losses["float32"], rtol=0.05)
    assert losses[precision][-5:].mean() < 0.95 * losses[precision][:3].mean()


@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps, in float16 too: the loss scale and the steps left out with it",
    source="the same run without the break", tolerance="exact, to the last bit")
@settings(max_examples=3)
@given(n=st.integers(1, 3), m=st.integers(1, 3), start=st.sampled_from([2.0**15, 2.0**20]))
def test_n_plus_m_steps_in_float16(tmp_path_factory, n, m, start):
    """From 2^20 the first steps overflow; with a patience of 2, S grows as well."""
    def fresh():
        t = half_trainer()
        t.scaling.scale, t.scaling.patience = start, 2
        return t
    path = tmp_path_factory.mktemp("run") / "state.safetensors"
    straight, first = fresh(), fresh()
    for _ in range(n + m):
        straight.step()
    for _ in range(n):
        first.step()
    checkpoint.save(path, *first.state())
    second = fresh()
    second.restore(checkpoint.load(path))
    for _ in range(m):
        second.step()
    ours, theirs = straight.state()[0], second.state()[0]
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert second.losses == straight.losses and second.n == n + m
    assert second.optimiser.n == second.ema.n == n + m - second.scaling.skipped
    assert (second.scaling.skipped > 0) == (start == 2.0**20)


def test_the_optimiser_does_not_see_the_scale():
    """Where nothing is clipped, the first moments after a step of S = 2^15 are those of S = 1, to half's rounding."""
    moments = []
    for scale in (1.0, 2.0**15):
        t = half_trainer(clip=1e9)
        t.scaling.scale = scale
        t.step()
        moments.append(np.concatenate([m.ravel() for m in t.optimiser.m.values()]))
    assert np.linalg.norm(moments[1] - moments[0]) < 30 * EPS["float16"] * np.linalg.norm(moments[0])


def test_the_learning_rate_is_that_of_the_runs_step_also_after_skipped_steps(monkeypatch):
    t, rates = half_trainer(), []
    monkeypatch.setattr(t.optimiser, "step", lambda grads, lr: rates.append((t.n, lr)))
    t.scaling.scale = 2.0**21
    for _ in range(6):
        t.step()
    assert 0 < t.scaling.skipped < 6 and len(rates) == 6 - t.scaling.skipped
    assert rates == [(n, t.lr(n)) for n, _ in rates] and rates[-1][0] == 5


def test_a_step_that_overflows_is_skipped():
    t = half_trainer()
    t.scaling.scale = 2.0**40
    before = {name: a.copy() for name, a in t.state()[0].items()}
    loss = t.step()
    after = t.state()[0]
    changed = {name for name, a in before.items() if not np.array_equal(a, after[name])}
    assert changed == {"scaling.scale", "scaling.skipped", "losses"}
    assert t.scaling.scale == 2.0**39 and t.n == 1 and t.losses == [loss] and np.isfinite(loss)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_no_scale_can_make_finite_stops_the_run():
    t = half_trainer()
    t.data.x_0[:] = np.nan
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        t.step()
    t = half_trainer()
    t.scaling.scale = 1.0
    t.model.unet.conv_out.w.data[:] = 6e4                   # the loss, float32's, is finite; the way back is not
    before = {name: a.copy() for name, a in t.state()[0].items()}
    with pytest.raises(FloatingPointError, match="its gradient's norm (inf|nan)"):
        for _ in range(2):
            t.step()
    assert all(np.array_equal(a, t.state()[0][name]) for name, a in before.items())


def test_a_run_in_another_precision_is_not_resumed(tmp_path):
    """And a state from before there was a precision is one of float32."""
    t = tiny.trainer()
    t.step()
    tensors, meta = t.state()
    assert not any(name.startswith("scaling.") for name in tensors)
    del meta["train"]["precision"]
    checkpoint.save(tmp_path / "step-000001.safetensors", tensors, meta)
    saved = checkpoint.load(tmp_path / "step-000001.safetensors")
    assert train._config_of(saved, train.TrainConfig()).precision == "float32"
    with pytest.raises(UserError, match="precision=float32, which resuming cannot change"):
        train._config_of(saved, train.TrainConfig(precision="float16"))


@pytest.mark.parametrize("name, wrong", [
    ("scaling.skipped", np.array(-1)), ("scaling.skipped", np.array([1, 2])), ("scaling.scale", np.zeros(2)),
    ("scaling.good", np.array(0.5)), ("scaling.scale", np.array(0.0)), ("scaling.good", None),
    ("scaling.scale", np.array(2.0**61)), ("scaling.good", np.array(-1))])
def test_a_state_with_an_invalid_scale_is_refused(tmp_path, name, wrong):
    t = half_trainer()
    t.step()
    tensors, meta = t.state()
    del tensors[name]
    checkpoint.save(tmp_path / "state.safetensors", tensors | ({} if wrong is None else {name: wrong}), meta)
    with pytest.raises(ValueError, match="state.safetensors") as error:
        half_trainer().restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert "\n" not in str(error.value)
