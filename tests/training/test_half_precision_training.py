"""Training in half precision: it learns as in float32, resumes exactly, and skips steps that overflow."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from minidiff import checkpoint
from minidiff.errors import UserError
from minidiff.nn.precision import dtype_of
from minidiff.training.trainer import TrainConfig

EPS = 2.0**-11                                              # the largest relative error of rounding to float16
half_trainer = partial(tiny.trainer, precision="float16", batch=4)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision must be one of"):
        TrainConfig(precision="half")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_it_learns_as_float32_does(precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs the package ml_dtypes")
    assert dtype_of(precision).itemsize == 2
    losses = {}
    for name in ("float32", precision):
        t = tiny.trainer(steps=20, batch=4, lr=5e-3, precision=name)
        for _ in range(20):
            t.step()
        losses[name] = np.array(t.losses)
        for arrays in (t.stage.module.state_dict(), t.optimiser.m, t.optimiser.v, t.ema.average):
            assert all(a.dtype == np.float32 for a in arrays.values())
    assert not np.array_equal(losses[precision], losses["float32"])
    np.testing.assert_allclose(losses[precision], losses["float32"], rtol=0.05)
    assert losses[precision][-5:].mean() < 0.95 * losses[precision][:3].mean()


@pytest.mark.parametrize("start", [1.0, 2.0**15])
def test_gradients_are_clipped_whatever_the_loss_scale(start):
    """The optimiser gets gradients of norm `clip` at most, in units of the loss and not of the scaled one."""
    t, norms = half_trainer(clip=1e-3), []
    t.scaling.scale, step = start, t.optimiser.step

    def measured(grads, lr):
        norms.append(np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads)))
        step(grads, lr)
    t.optimiser.step = measured
    for _ in range(3):
        t.step()
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-2)      # before, the norm was above 0.01


@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps, in float16 too: the loss scale and the skipped steps with it",
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
    assert np.linalg.norm(moments[1] - moments[0]) < 30 * EPS * np.linalg.norm(moments[0])


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
def test_a_gradient_that_no_scale_can_make_finite_stops_the_run(monkeypatch):
    t = half_trainer()
    x_0, *others = t.batch()
    monkeypatch.setattr(t, "batch", lambda: (x_0 * np.nan, *others))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        t.step()
    t = half_trainer()
    t.scaling.scale = 1.0
    t.stage.module.unet.conv_out.w.data[:] = 6e4                   # the loss, float32's, is finite; the way back is not
    before = {name: a.copy() for name, a in t.state()[0].items()}
    with pytest.raises(FloatingPointError, match="its gradient's norm (inf|nan)"):
        for _ in range(2):
            t.step()
    assert all(np.array_equal(a, t.state()[0][name]) for name, a in before.items())


def test_a_run_in_another_precision_is_not_resumed(tmp_path):
    t = tiny.trainer(batch=4)
    t.step()
    tensors, meta = t.state()
    assert not any(name.startswith("scaling.") for name in tensors)
    checkpoint.save(tmp_path / "step-000001.safetensors", tensors, meta)
    with pytest.raises(UserError, match="step-000001.safetensors is of a run with another .*--precision"):
        half_trainer().restore(checkpoint.load(tmp_path / "step-000001.safetensors"))


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
