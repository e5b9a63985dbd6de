"""AdamW, clipping, the learning-rate schedule and the moving average, each against its closed form."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.engine import parallel
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Linear
from minidiff.nn.optim import EMA, AdamW, AdamWConfig, WarmupCosine, clip_by_norm

few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def parameters(dtype=np.float64):
    return {"w": Tensor(normal(3, 2).astype(dtype), True), "b": Tensor(normal(2, seed=1).astype(dtype), True)}


# ---- AdamW -----------------------------------------------------------------------------------------------


@few
@given(st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-10, 1e-2), st.floats(0, 0.5), st.integers(1, 6))
def test_adamw_is_its_closed_form(b1, b2, eps, decay, steps):
    """m^ and v^ are weighted means of all gradients so far; a matrix decays besides, a vector does not."""
    held = parameters()
    w, b = held["w"].data.copy(), held["b"].data.copy()
    optimiser = AdamW(held, AdamWConfig(b1, b2, eps, decay))
    gs, rates = [(normal(3, 2, seed=n), normal(2, seed=99 + n)) for n in range(steps)], 0.1 + np.arange(steps) / 10
    for n in range(steps):
        optimiser.step(list(gs[n]), rates[n])
        update = []
        for i in range(2):
            # m^ = sum_k b1^(n-k) g_k / sum_k b1^(n-k),  and v^ likewise of g_k^2
            past = np.array([g[i] for g in gs[:n + 1]])
            means = [np.average(past**p, axis=0, weights=[c ** (n - k) for k in range(n + 1)])
                     for p, c in ((1, b1), (2, b2))]
            update.append(means[0] / (np.sqrt(means[1]) + eps))
        w = w - rates[n] * (update[0] + decay * w)
        b = b - rates[n] * update[1]
        np.testing.assert_allclose(held["w"].data, w, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(held["b"].data, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lr", [np.nan, np.inf, -0.1, None, True])
def test_a_rate_that_is_none_is_refused_and_nothing_changes(lr):
    w = Tensor(np.ones(3), requires_grad=True)
    optimiser = AdamW({"w": w})
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
        optimiser.step([np.ones(3)], lr)
    assert w.data.tolist() == [1, 1, 1] and optimiser.n == 0


def test_the_first_step_is_lr_in_the_direction_of_the_sign():
    held = parameters()
    before, g = held["b"].data.copy(), np.array([1e-3, -50.0])
    AdamW(held).step([np.zeros((3, 2)), g], 0.01)
    np.testing.assert_allclose(held["b"].data - before, -0.01 * np.sign(g), rtol=1e-4)


def test_adamw_keeps_float32_and_leaves_the_gradients_alone():
    held = parameters(np.float32)
    gs = [normal(3, 2).astype(np.float32), normal(2).astype(np.float32)]
    kept = [g.copy() for g in gs]
    optimiser = AdamW(held)
    for lr in (0.1, np.float64(0.1)):
        optimiser.step(gs, lr)
    assert all(a.dtype == np.float32 for a in [*optimiser.m.values(), *optimiser.v.values()])
    assert all(p.dtype == np.float32 for p in held.values())
    assert all(np.array_equal(a, b) for a, b in zip(gs, kept, strict=True))
    with pytest.raises(ValueError, match="grads must be one array for each of the 2 parameters, not 1"):
        optimiser.step(gs[:1], 0.1)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_on_any_number_of_cores_all_parameters_are_clipped_stepped_and_averaged(monkeypatch, cores):
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    sizes = [1, 50, 7, 30, 2, 60, 1]
    w, g = ([normal(n, seed=i + seed) for i, n in enumerate(sizes)] for seed in (0, 100))
    held, grads = {str(i): Tensor(a.copy(), True) for i, a in enumerate(w)}, [a.copy() for a in g]
    ema, norm = EMA(held, 0.99), np.linalg.norm(np.concatenate(g))
    assert clip_by_norm(grads, 1.0) == pytest.approx(norm, rel=1e-12)
    np.testing.assert_allclose(np.concatenate(grads), np.concatenate(g) / norm, rtol=1e-12)
    AdamW(held, AdamWConfig(eps=1e-12)).step(grads, 0.01)
    ema.step()
    for p, average, before, of_p in zip(held.values(), ema.average.values(), w, g, strict=True):
        np.testing.assert_allclose(p.data, before - 0.01 * np.sign(of_p), atol=1e-8)    # the first step's
        np.testing.assert_allclose(average, 0.1 * before + 0.9 * p.data, rtol=1e-12)    # decay 1/10 at first


@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps: the optimiser and the average",
    source="the same steps without the break", tolerance="exact, to the last bit")
@pytest.mark.parametrize("make", [lambda held: AdamW(held), lambda held: EMA(held, 0.9)])
def test_saved_and_loaded_it_continues_bit_for_bit(make):
    """Law 37, for the optimiser and the average: N + M steps are N steps, save, load, M steps."""
    def run(held, what, steps):
        for n in steps:
            if isinstance(what, AdamW):
                what.step([normal(3, 2, seed=n).astype(np.float32), normal(2, seed=n).astype(np.float32)], 0.01)
            else:
                for p in held.values():
                    p.data += np.float32(n)
                what.step()
    a, b = parameters(np.float32), parameters(np.float32)
    whole, first = make(a), make(b)
    run(a, whole, range(7))
    run(b, first, range(4))
    state = first.state_dict()
    kept = {name: array.copy() for name, array in state.items()}
    second = make(b)
    second.load_state_dict(state)
    run(b, second, range(4, 7))
    assert all(np.array_equal(state[name], kept[name]) for name in kept), "a loaded state is not written into"
    assert all(np.array_equal(a[name].data, b[name].data) for name in a)
    ours, theirs = whole.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_linear_regression_reaches_the_least_squares_solution():
    x, noise = normal(200, 5), 0.1 * normal(200, 2, seed=2)
    y = x @ normal(5, 2, seed=1) + 3 + noise
    best, *_ = np.linalg.lstsq(np.hstack([x, np.ones((200, 1))]), y, rcond=None)
    layer = Linear(5, 2, np.random.default_rng(0)).astype(np.float64)
    held = layer.parameters()
    optimiser, rate = AdamW(held, AdamWConfig(decay=0)), WarmupCosine(0.1, 600, warmup=10)
    for n in range(600):
        error = layer(Tensor(x)) - y
        optimiser.step(gradients((error * error).mean(), list(held.values())), rate(n))
    np.testing.assert_allclose(np.vstack([layer.w.data, layer.b.data]), best, atol=1e-4)


# ---- clipping --------------------------------------------------------------------------------------------


def test_gradients_of_numbers_are_clipped_too():
    """Leaves of shape (), such as CLIP's temperature, are divided by the scale and clipped too."""
    x, w = (Tensor(np.array(number), requires_grad=True) for number in (3.0, 4.0))
    grads = gradients(x * w, [x, w], 8.0)                   # 32 and 24: 8 times 4 and 3
    assert clip_by_norm(grads, 1.0, 8.0) == 5 and [float(g) for g in grads] == pytest.approx([0.8, 0.6])


@few
@given(st.floats(0.01, 100))
def test_clip_by_norm(max_norm):
    grads = [normal(3, 2), normal(4, seed=1)]
    before = np.concatenate([g.ravel() for g in grads])
    norm = clip_by_norm(grads, max_norm)
    after = np.concatenate([g.ravel() for g in grads])
    assert norm == pytest.approx(np.linalg.norm(before))
    assert np.linalg.norm(after) == pytest.approx(min(norm, max_norm))
    np.testing.assert_allclose(after / np.linalg.norm(after), before / norm)
    if norm <= max_norm:
        assert np.array_equal(after, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_reported_and_not_clipped(bad):
    grads = [np.array([3.0, bad]), np.array([4.0])]
    assert not math.isfinite(clip_by_norm(grads, 1.0))
    assert grads[0][0] == 3.0 and grads[1][0] == 4.0


def test_gradients_of_shared_pieces_are_clipped_once_each():
    """x + w gives both leaves the same cotangent; scaling one must not scale the other again."""
    x, w = Tensor(np.ones(2), True), Tensor(np.ones(2), True)
    grads = gradients(x + w, [x, w], np.array([3.0, 4.0]))
    clip_by_norm(grads, 1.0)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(grads)), 1.0)


# ---- the learning rate's course --------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [math.nan, math.inf, -0.1])
def test_a_learning_rate_that_is_none_is_refused(peak):
    with pytest.raises(ValueError, match="peak, the highest learning rate, must be a number of at least 0, not"):
        WarmupCosine(peak, 5)


@few
@given(st.integers(1, 400), st.integers(0, 60), st.floats(1e-5, 1))
def test_warm_up_and_cosine(steps, warmup, peak):
    rate = WarmupCosine(peak, steps, warmup)
    rates = np.array([rate(n) for n in range(steps)])
    assert (rates > 0).all() and rates.max() <= peak * (1 + 1e-12)
    up, down = rates[:warmup], rates[max(warmup - 1, 0):]
    np.testing.assert_allclose(up, peak * np.arange(1, len(up) + 1) / max(warmup, 1))
    assert (np.diff(down) < 0).all()
    if 0 < warmup <= steps:
        assert rates[warmup - 1] == pytest.approx(peak)
    # half way through the fall it is half of the peak, by cosine's symmetry about that point
    if steps > warmup:
        fall = np.concatenate([[peak], rates[warmup:], [0]])
        np.testing.assert_allclose(fall + fall[::-1], peak, atol=1e-9 * peak)
    assert rate(steps) == rate(10 * steps) == rates[-1], "beyond the last step it stays at the last step's"


# ---- the moving average ----------------------------------------------------------------------------------


@pytest.mark.law(
    36, "ema_N = (d_1 ... d_N) w_0 + sum_n (1 - d_n)(d_{n+1} ... d_N) w_n, d_n = min(decay, n/(n + 9))",
    source="the recursion written out", tolerance="1e-10: 30 sums of numbers below 30, rounded at 1e-16")
@few
@given(st.floats(0, 0.999), st.integers(0, 30))
def test_ema_is_its_closed_form_sum(decay, steps):
    """Law 36:  ema_N = (d_1 ... d_N) w_0 + sum_n (1 - d_n) (d_{n+1} ... d_N) w_n."""
    held = parameters()
    ws = [held["w"].data.copy()]
    ema = EMA(held, decay)
    for n in range(steps):
        held["w"].data += normal(3, 2, seed=n)
        ws.append(held["w"].data.copy())
        ema.step()
    d = np.minimum(decay, np.arange(1, steps + 1) / np.arange(10, steps + 10))
    weights = [np.prod(d)] + [(1 - d[n]) * np.prod(d[n + 1:]) for n in range(steps)]
    assert sum(weights) == pytest.approx(1, rel=1e-10)
    np.testing.assert_allclose(ema.average["w"], np.tensordot(weights, ws, axes=1), rtol=1e-10, atol=1e-11)


@pytest.mark.law(36, "EMA never touches the weights, nor a table", source="a copy taken before", tolerance="exact")
def test_ema_changes_neither_the_weights_nor_anything_else():
    """Law 36: a module's tables (here an array, as a schedule has) are no parameters, and stay as they are."""
    layer = Linear(2, 2, np.random.default_rng(0))
    layer.alpha_bar = np.linspace(0.9, 0.1, 5)
    held = layer.parameters()
    ema = EMA(held, 0.9)
    assert ema.average.keys() == {"w", "b"}
    layer.w.data += 1
    before, table = layer.state_dict(), layer.alpha_bar.copy()
    ema.step()
    assert np.array_equal(layer.alpha_bar, table)
    assert all(np.array_equal(layer.state_dict()[name], before[name]) for name in before)
    assert not np.array_equal(ema.average["w"], before["w"])
    assert all(a.dtype == np.float32 for a in ema.average.values())


def test_decay_must_be_below_1():
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            EMA(parameters(), decay)


def test_a_single_number_is_a_parameter_like_any_other():
    """Such as CLIP's log-temperature: its first step is -lr sign(gradient) (Kingma & Ba 2015, section 2.1)."""
    w = Tensor(np.array(0.5), requires_grad=True)
    AdamW({"w": w}).step([np.array(-3.0)], lr=0.01)
    assert w.data.shape == () and abs(w.data - 0.51) < 1e-9


def test_a_state_that_does_not_fit_changes_nothing():
    held = {"w": Tensor(np.ones((2, 2)), requires_grad=True), "b": Tensor(np.ones(2), requires_grad=True)}
    optimiser, average = AdamW(held), EMA(held)
    for what, name in ((optimiser, "v.b"), (average, "b")):
        what.step(*([[np.ones((2, 2)), np.ones(2)], 0.1] if what is optimiser else []))
        before, good = what.state_dict(), {key: a + 1 for key, a in what.state_dict().items()}
        lost = {key: a for key, a in good.items() if key != name}
        for wrong in (lost, good | {"other": np.ones(2)}, good | {name: np.ones(3)}, good | {"n": np.array(-1)}, {}):
            with pytest.raises(ValueError, match="state"):
                what.load_state_dict(wrong)
            assert all(np.array_equal(a, before[key]) for key, a in what.state_dict().items())
        what.load_state_dict(good)
        assert all(np.array_equal(a, good[key]) for key, a in what.state_dict().items())
