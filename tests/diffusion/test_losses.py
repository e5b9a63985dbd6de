"""Loss weights: law 18 against the KL of posteriors, DDPM eq. 12 in fractions, and the limits of min-SNR."""

from fractions import Fraction

import numpy as np
import pytest
from diffusion_strategies import any_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.diffusion import gaussian, losses, schedules
from minidiff.diffusion.gaussian import PREDICTIONS

few = settings(deadline=None, max_examples=40)


@few
@given(any_schedule(min_T=2), st.sampled_from(PREDICTIONS), st.data())
def test_bound_weight_is_the_kl_between_posteriors(schedule, predicts, data):
    """Law 18: weight ||target - out||^2 = KL(q(x_{t-1}|x_t,x_0) || q(x_{t-1}|x_t,x0_hat)), always.

    The right-hand side makes x0_hat from the answer, posteriors from x_0 and x0_hat, and their KL by pixel.
    """
    t = data.draw(st.integers(1, schedule.T - 1))
    x_0, eps, error = np.random.default_rng(t).standard_normal((3, 1, 5))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    out = gaussian.target(schedule, predicts, x_0, eps, t) + error
    x0_hat = gaussian.to_x0(schedule, predicts, x_t, t, out)
    q = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t)
    p = gaussian.q_posterior_mean_variance(schedule, x0_hat, x_t, t)
    weight = losses.bound_weight(schedule, t, predicts)
    assert weight * np.sum(error**2) == pytest.approx(gaussian.kl_gaussian(*q, *p).sum(), rel=1e-7)


@few
@given(any_schedule(min_T=2))
def test_bound_weight_of_eps_is_ddpm_eq_12(schedule):
    """Law 18: beta^2 / (2 beta~ (1 - beta)(1 - abar)) for the variance beta~, in fractions."""
    for t in range(1, schedule.T):
        abar, previous = Fraction(float(schedule.alpha_bar[t])), Fraction(float(schedule.alpha_bar[t - 1]))
        beta = 1 - abar / previous
        beta_tilde = (1 - previous) / (1 - abar) * beta
        expected = beta**2 / (2 * beta_tilde * (1 - beta) * (1 - abar))
        assert losses.bound_weight(schedule, t, "eps") == pytest.approx(float(expected), rel=1e-9)


@few
@given(any_schedule(min_T=2), st.sampled_from(["bound", "min_snr"]))
def test_three_predictions_of_one_x0_hat_have_one_loss(schedule, kind):
    """Law 18: weighted, it does not matter what a network is asked for."""
    t = np.arange(1, schedule.T)
    x_0, eps, x0_hat = np.random.default_rng(0).standard_normal((3, schedule.T - 1, 7))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    answers = {
        "x0": x0_hat,
        "eps": gaussian.eps_from_x0(schedule, x_t, t, x0_hat),
        "v": gaussian.v_from_x0(schedule, x_t, t, x0_hat),
    }
    loss = {
        predicts: losses.weight(schedule, t, predicts, kind)
        * np.sum((gaussian.target(schedule, predicts, x_0, eps, t) - out) ** 2, axis=1)
        for predicts, out in answers.items()
    }
    np.testing.assert_allclose(loss["eps"], loss["x0"], rtol=1e-7)
    np.testing.assert_allclose(loss["v"], loss["x0"], rtol=1e-7)


@few
@given(any_schedule(min_T=2, ends_at_zero=None), st.floats(0.5, 20))
def test_min_snr_is_the_smaller_of_snr_and_gamma(schedule, gamma):
    """In fractions: min(SNR, gamma) for x0, that over SNR for eps, and over SNR + 1 for v."""
    for t in range(schedule.T):
        abar = Fraction(float(schedule.alpha_bar[t]))
        snr = abar / (1 - abar)
        least = min(snr, Fraction(gamma))
        weights = {"x0": least, "v": least / (snr + 1)} | ({"eps": least / snr} if snr else {})
        for predicts, expected in weights.items():
            weight = losses.min_snr_weight(schedule, t, predicts, gamma)
            assert weight == pytest.approx(float(expected), rel=1e-9, abs=0)


def test_min_snr_shuns_the_clean_end_and_leaves_the_noisy_end_alone():
    """The purpose, seen on eps: weight 1 where noise rules, and ever less as images clear up."""
    schedule = schedules.linear()
    t = np.arange(schedule.T)
    weight = losses.min_snr_weight(schedule, t, "eps")
    noisy = schedule.snr(t) <= 5
    np.testing.assert_allclose(weight[noisy], 1, rtol=1e-12)
    assert np.all(weight[~noisy] < 1) and np.all(np.diff(weight[~noisy]) > 0)
    assert weight[0] < 1e-3
    assert losses.min_snr_weight(schedule, t, "x0").max() == 5


@few
@given(any_schedule(min_T=2, ends_at_zero=None))
def test_bound_weights_of_x0_telescope(schedule):
    """Their sum is half the SNR lost from first to last: nothing is counted twice, and no step is missed."""
    total = losses.bound_weight(schedule, np.arange(1, schedule.T), "x0").sum()
    assert total == pytest.approx((schedule.snr(0) - schedule.snr(schedule.T - 1)) / 2, rel=1e-9)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_simple_weight_is_one_at_every_time(predicts):
    weight = losses.simple_weight(schedules.cosine(10), np.arange(10), predicts)
    np.testing.assert_array_equal(weight, np.ones(10))


@pytest.mark.parametrize("kind", losses.WEIGHTS)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_weights_are_positive_float64_of_the_shape_of_t(kind, predicts):
    schedule = schedules.cosine(10)
    for t in (np.array([1, 9, 4]), np.array([2], np.uint8), 3):
        weight = losses.weight(schedule, t, predicts, kind)
        assert np.shape(weight) == np.shape(t) and weight.dtype == np.float64
        assert np.all(weight > 0) and np.all(np.isfinite(weight))


def test_what_has_no_weight_is_refused():
    schedule = schedules.cosine(10)
    with pytest.raises(ValueError, match="t must be at least 1 for a loss of this kind"):
        losses.bound_weight(schedule, np.array([3, 0]), "v")
    for kind in ("simple", "min_snr"):
        with pytest.raises(ValueError, match="t must be at least 0"):
            losses.weight(schedule, -1, "x0", kind)
    with pytest.raises(ValueError, match="kind must be one of simple, bound, min_snr, got 'vlb'"):
        losses.weight(schedule, 3, "x0", "vlb")
    for kind in losses.WEIGHTS:
        with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, got 'noise'"):
            losses.weight(schedule, 3, "noise", kind)
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be positive"):
            losses.min_snr_weight(schedule, 3, "x0", gamma)


@pytest.mark.parametrize("kind", ["bound", "min_snr"])
def test_at_snr_0_only_eps_is_without_a_weight(kind):
    schedule = schedules.zero_terminal_snr(schedules.cosine(10))
    with pytest.raises(ValueError, match="eps says nothing of x_0 at SNR 0"):
        losses.weight(schedule, 9, "eps", kind)
    for predicts in ("x0", "v"):
        assert np.isfinite(losses.weight(schedule, 9, predicts, kind))
