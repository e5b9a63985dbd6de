"""The first diffusion model: its loss against K of diffusion/entropy.py, its schedule, its samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.examples import load
from support.gradcheck import check_gradients
from support.small_systems import CONFIGS

from minidiff.data import swiss_roll
from minidiff.diffusion.entropy import log_likelihood_of_noise
from minidiff.diffusion.gaussian import kl_gaussian, q_posterior_mean_variance, q_sample
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import gradients
from minidiff.errors import UserError
from minidiff.nn.optim import AdamW
from minidiff.systems.dpm import DPM, DPMConfig
from minidiff.systems.stage import Step

CONFIG = CONFIGS["dpm"]


def made(config: DPMConfig = CONFIG, seed: int = 0) -> DPM:
    """A model whose readouts are no longer zero, and whose schedule has moved."""
    model, rng = DPM(config, None, np.random.default_rng(seed)), np.random.default_rng(seed)
    for p in model.parameters().values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape, dtype=np.float32)
    return model


def test_the_schedule_begins_with_even_losses():
    model = DPM(DPMConfig(T=40), None, np.random.default_rng(0))
    betas = model.schedule.betas
    np.testing.assert_allclose(betas[1:-1], [1 / (40 - t + 1) for t in range(2, 40)], rtol=1e-5)
    assert betas[0] == pytest.approx(0.001) and betas[-1] == pytest.approx(0.999, rel=1e-5)
    kept = model.schedule.alpha_bar / (1 - betas[0])        # each step but the last loses 1/(T - 1) of the signal
    np.testing.assert_allclose(-np.diff(kept[:-1]), 1 / 39, rtol=1e-4)


def test_its_tables_are_those_of_the_schedule():
    model = made().astype(np.float64)
    logit_beta, log_abar = (a.data[:, 0] for a in model.tables())
    np.testing.assert_allclose(1 / (1 + np.exp(-logit_beta)), model.schedule.betas, rtol=1e-10)
    np.testing.assert_allclose(np.exp(log_abar), model.schedule.alpha_bar, rtol=1e-10)


def test_the_loss_is_minus_K_up_to_a_constant():
    """With each t equally often, -loss is K without the parts that depend on no parameter."""
    model, rng = made(), np.random.default_rng(0)
    model.logit_beta.data[:] = -2                            # so that x_T keeps signal, and its entropy counts
    B, T = 20, CONFIG.T
    t = np.tile(np.arange(1, T), B // (T - 1))
    x_0, eps = rng.standard_normal((2, B, 2), dtype=np.float32)
    schedule = model.schedule
    x_t = q_sample(schedule, x_0.astype(np.float64), t, eps.astype(np.float64))
    q = q_posterior_mean_variance(schedule, x_0.astype(np.float64), x_t, t)
    steps = (T - 1) * kl_gaussian(*q, *model.reverse_step(x_t, t)).sum(1).mean()
    # of one coordinate
    end = stats.norm.entropy(scale=math.sqrt(1 - schedule.alpha_bar[-1])) - stats.norm.entropy()
    assert end < -0.05 and model.loss(x_0, t, eps).item() == pytest.approx(steps - 2 * end, rel=1e-5)


def test_the_gradients_for_the_schedule_through_frozen_noise_and_for_the_network():
    model, rng = made().astype(np.float64), np.random.default_rng(0)
    x_0, eps = rng.standard_normal((2, 15, 2))
    t = np.tile(np.arange(1, CONFIG.T), 3)
    parameters = list(model.parameters().values())
    assert len(parameters) == 4
    check_gradients(lambda *_: model.loss(x_0, t, eps), *parameters, rtol=2e-6)
    assert all(np.abs(g).max() > 0 for g in gradients(model.loss(x_0, t, eps), parameters))


def test_an_untrained_step_is_q_at_the_middle_with_variance_beta():
    """z_mu = z_Sigma = 0: the mean of q(x_{t-1} | x_t, 0), and beta_t."""
    model = DPM(CONFIG, None, np.random.default_rng(0))
    x_t, t = np.random.default_rng(0).standard_normal((3, 2)), np.array([1, 3, 5])
    mean, variance = model.reverse_step(x_t, t)
    a, b = model.schedule.abar(t - 1), model.schedule.abar(t)
    np.testing.assert_allclose(mean, (np.sqrt(b / a) * (1 - a) / (1 - b))[:, None] * x_t, rtol=1e-6)
    np.testing.assert_allclose(variance, np.repeat((1 - b / a)[:, None], 2, axis=1), rtol=1e-6)


def test_training_raises_K_in_both_stages():
    config = DPMConfig(T=10, hidden=16)
    model, x = DPM(config, None, np.random.default_rng(0)), swiss_roll.points(np.random.default_rng(5), 200)
    K = [model.bound(x).total.mean()]
    for k, stage in enumerate(model.stages(None), start=1):
        before = model.schedule.betas
        parameters = stage.module.parameters()
        optimiser = AdamW(parameters)
        for n in range(60):
            loss = stage.loss(stage.module, *stage.batch(Step(0, k, n, 60, 128)))
            optimiser.step(gradients(loss, list(parameters.values())), 2e-2)
        K.append(model.bound(x).total.mean())
        assert (model.schedule.betas == before).all() == (stage.name == "reverse")
        assert model.schedule.betas[0] == before[0]         # beta_1 is not learned
    assert K[0] + 1 < K[1] and K[1] + 0.1 < K[2]


def test_times_are_spread_evenly_over_1_to_T_1():
    """The step to x_0 has no term of its own in K, so t = 0 is left out."""
    model = DPM(DPMConfig(T=9, noise=0.01), None, np.random.default_rng(0))
    points, t, eps = next(model.stages(None)).batch(Step(0, 1, 0, 60, 128))
    assert np.bincount(t).tolist() == [0, *[16] * 8] and points.shape == eps.shape == (128, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_report_is_of_its_seed_s_points_and_noise(seed):
    model = made()
    x_0 = swiss_roll.points(generator(seed, "points of a report"), 50, CONFIG.noise)
    K = model.bound(x_0, seed=seed).total / math.log(2)     # in bits
    report = model.report(50, seed=seed)
    assert report["K"] == pytest.approx(K.mean(), rel=1e-9)
    assert report["standard error"] == pytest.approx(K.std() / math.sqrt(50), rel=1e-9)


@pytest.mark.parametrize("noise", [CONFIG.noise, 0.15])
def test_the_values_of_the_report_agree(noise):
    """The truth is that of the configured roll, not of the default one."""
    report = made(replace(CONFIG, noise=noise)).report(50)
    assert report["K - L_null"] - report["K"] == pytest.approx(-log_likelihood_of_noise(2) / math.log(2))
    assert report["K"] < report["truth"]
    # both in bits: the mean of log2 q(x_0) over the report's own points
    points = swiss_roll.points(generator(0, "points of a report"), 50, noise)
    assert report["truth"] == pytest.approx(np.log2(np.exp(swiss_roll.log_prob(points, noise))).mean())


def test_the_truth_is_minus_the_entropy_of_the_roll():
    """The mean of log q is about -H: the entropy along the curve, 9.3 long in deviations, plus the noise's."""
    curve = swiss_roll._curve((np.arange(4000) + 0.5) / 4000, 0.05)
    speed = np.linalg.norm(np.diff(curve, axis=0), axis=1) * 3999
    entropy = np.log(speed).mean() + stats.norm.entropy(scale=0.05)
    x = swiss_roll.points(np.random.default_rng(0), 2000)
    assert swiss_roll.log_prob(x).mean() == pytest.approx(-entropy, abs=0.1)


def test_the_chain_draws_each_step_and_ends_with_q_reversed():
    model = made()
    states = list(model.trajectory(4, seed=2))
    assert [state.t for state in states] == [5, 4, 3, 2, 1, 0, -1]
    streams = SampleStreams(2, 4)
    noise = [streams.normal((2,), np.float64) for _ in range(7)]
    np.testing.assert_array_equal(states[0].x_t, noise[0])
    mean, variance = model.reverse_step(states[1].x_t, np.full(4, 4))
    np.testing.assert_allclose(states[2].x_t, mean + np.sqrt(variance) * noise[2])
    np.testing.assert_allclose(states[-1].x_t, math.sqrt(0.999) * states[-2].x_t + math.sqrt(0.001) * noise[-1])


def test_a_point_depends_on_its_own_seed_only_and_a_file_holds_all(tmp_path):
    model = made()
    together = model.sample(5, seed=3)
    assert together.shape == (5, 2) and together.dtype == np.float32
    np.testing.assert_allclose(model.sample(1, streams=SampleStreams(3, 5)[2:3])[0], together[2], atol=1e-6)
    model.save(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(DPM.load(tmp_path / "m.safetensors").sample(5, seed=3), together)


def test_the_picture_and_the_example(tmp_path, capsys):
    assert made().picture(20).mode == "RGB"
    load("01_swiss_roll").main(effort=0.001, points=20, out=str(tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("K - L_null") == 2 and printed.count("learned beta_t: 0.001, 0.0") == 1


def test_refusals():
    model = made()
    for count in (0, True, "a seven", [""]):
        with pytest.raises(ValueError, match="count, of points and not captions, must be a whole number"):
            model.sample(count)
    with pytest.raises(ValueError, match="streams must be one for each of the 3 points, not 2"):
        model.sample(3, streams=SampleStreams(0, 2))
    with pytest.raises(ValueError, match="T must be at least 2"):
        DPMConfig(T=1)
    with pytest.raises(ValueError, match="beta_first and noise must lie between 0 and 1"):
        DPMConfig(noise=0.0)
    model.reverse.readout.data[:] = np.nan
    with pytest.raises(UserError, match="not finite"):
        model.sample(2)


def test_a_data_set_that_would_not_be_used_is_refused():
    from support import outside, small_systems

    from minidiff.errors import UserError
    with pytest.raises(UserError, match="leave out --data"):
        next(small_systems.small("dpm").stages(outside.Stripes()))


@pytest.mark.parametrize("logit, z_sigma", [(20.0, 0.0), (0.0, -40.0), (-20.0, 40.0), (17.0, -60.0)])
def test_the_loss_is_finite_where_the_reverse_step_is(logit, z_sigma):
    """In float32: 1 - sigmoid(17) is 0, and (1 + tanh(-30))/2 too; their logarithms are not."""
    model, rng = made(), np.random.default_rng(0)
    model.logit_beta.data[:] = [[logit]] + [[-2]] * (len(model.logit_beta.data) - 1)
    model.reverse.readout.data[:] = z_sigma
    x_0, eps = rng.standard_normal((2, 8, 2), dtype=np.float32)
    t = 1 + np.arange(8) % (CONFIG.T - 1)
    loss = model.loss(x_0, t, eps)
    grads = gradients(loss, list(model.parameters().values()))
    wide = model.astype(np.float64).loss(x_0.astype(np.float64), t, eps.astype(np.float64))
    assert loss.item() == pytest.approx(wide.item(), rel=1e-4)
    assert all(np.isfinite(g).all() for g in grads)
