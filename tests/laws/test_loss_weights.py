"""Loss weights (laws 18, 38): the weight of an error at time t, in nats and otherwise, and that it is finite.

Against the KL of posteriors, DDPM eq. 12 in exact fractions, the limits of min-SNR, and the range of half precision.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.diffusion_strategies import any_schedule, seeds, shapes
from support.law_tools import few

from minidiff.diffusion import gaussian, losses, schedules
from minidiff.diffusion.gaussian import PREDICTIONS


@pytest.mark.law(
    18, "L_{t-1} = KL(q(x_{t-1}|x_t,x_0) || q(x_{t-1}|x_t,x0_hat)) = (SNR_{t-1} - SNR_t) ||x_0 - x0_hat||^2 / 2, "
        "whatever is predicted",
    source="VDM eq. 13; the code's own x0_hat, posteriors and KL (laws 9, 10), pixel by pixel",
    tolerance="1e-7: the posterior means differ by c_0 of the error, and are rounded at 1e-16/alpha, over deviations")
@few
@given(any_schedule(min_T=2, ends_at_zero=None), st.sampled_from(PREDICTIONS), st.data(), shapes, seeds)
def test_bound_weight_is_the_kl_between_posteriors(schedule, predicts, data, shape, seed):
    last = schedule.T - 1
    if predicts == "eps" and schedule.alpha_bar[-1] == 0:
        predicts = "v"                                             # at SNR 0 eps has no weight
    t = data.draw(st.integers(1, last))
    x_0, eps, error = np.random.default_rng(seed).standard_normal((3, 1, *shape))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    out = gaussian.target(schedule, predicts, x_0, eps, t) + error
    x0_hat = gaussian.to_x0(schedule, predicts, x_t, t, out)
    q = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t)
    p = gaussian.q_posterior_mean_variance(schedule, x0_hat, x_t, t)
    weight = losses.bound_weight(schedule, t, predicts)
    kl = gaussian.kl_gaussian(*q, *p).sum()
    assert weight * np.sum(error**2) == pytest.approx(kl, rel=1e-7, abs=1e-13)


@pytest.mark.law(
    18, "for eps the weight is beta^2 / (2 beta~ (1 - beta)(1 - abar)), the variance being beta~",
    source="DDPM eq. 12; exact fractions", tolerance="1e-9: a difference of SNRs, rounded at 1e-16 over powers of 6e-6")
@few
@given(any_schedule(min_T=2, max_T=20))
def test_bound_weight_of_eps_is_ddpm_eq_12(schedule):
    weights = losses.bound_weight(schedule, np.arange(1, schedule.T), "eps")
    for t in range(1, schedule.T):
        abar, previous = Fraction(float(schedule.alpha_bar[t])), Fraction(float(schedule.alpha_bar[t - 1]))
        beta = 1 - abar / previous
        beta_tilde = (1 - previous) / (1 - abar) * beta
        expected = beta**2 / (2 * beta_tilde * (1 - beta) * (1 - abar))
        assert weights[t - 1] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.law(
    18, "the weighted losses of eps, x_0 and v are equal if the three stand for the same x0_hat",
    source="law 10; three weights of the code", tolerance="1e-7: eps and v divide by sigma > .002, eps by alpha")
@few
@given(any_schedule(min_T=2), st.sampled_from(["bound", "min_snr"]), seeds)
def test_three_predictions_of_one_x0_hat_have_one_loss(schedule, kind, seed):
    t = np.arange(1, schedule.T)
    x_0, eps, x0_hat = np.random.default_rng(seed).standard_normal((3, schedule.T - 1, 7))
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


@pytest.mark.law(
    18, "the bound's weights for x_0 add up to half the decrease of SNR from the first time to the last",
    source="a telescoping sum",
    tolerance="1e-9: up to 40 differences of SNRs below 2e5")
@few
@given(any_schedule(min_T=2, ends_at_zero=None))
def test_bound_weights_of_x0_telescope(schedule):
    total = losses.bound_weight(schedule, np.arange(1, schedule.T), "x0").sum()
    assert total == pytest.approx((schedule.snr(0) - schedule.snr(schedule.T - 1)) / 2, rel=1e-9)


@pytest.mark.law(
    "18a", "min-SNR: the weight is min(SNR, gamma) for x_0, that over SNR for eps, and over SNR + 1 for v",
    source="Hang et al. 2023, section 3.4; exact fractions",
    tolerance="1e-9: SNR of up to 2e5, rounded at 1e-16/6e-6")
@few
@given(any_schedule(min_T=2, ends_at_zero=None), st.floats(0.5, 20))
def test_min_snr_is_the_smaller_of_snr_and_gamma(schedule, gamma):
    """Bugs: a maximum for the minimum; the wrong v-weight."""
    for t in range(schedule.T):
        abar = Fraction(float(schedule.alpha_bar[t]))
        snr = abar / (1 - abar)
        least = min(snr, Fraction(gamma))
        weights = {"x0": least, "v": least / (snr + 1)} | ({"eps": least / snr} if snr else {})
        for predicts, expected in weights.items():
            weight = losses.min_snr_weight(schedule, t, predicts, gamma)
            assert weight == pytest.approx(float(expected), rel=1e-9, abs=0)


@pytest.mark.law(
    "18a", "min-SNR for eps: 1 where SNR <= gamma, and decreasing as SNR grows beyond",
    source="its purpose", tolerance="1e-12: SNR over SNR")
def test_min_snr_lowers_the_clean_end_and_does_not_change_the_noisy_end():
    schedule = schedules.linear()
    t = np.arange(schedule.T)
    weight = losses.min_snr_weight(schedule, t, "eps")
    noisy = schedule.snr(t) <= 5
    np.testing.assert_allclose(weight[noisy], 1, rtol=1e-12)
    assert np.all(weight[~noisy] < 1) and np.all(np.diff(weight[~noisy]) > 0)
    assert weight[0] < 1e-3
    assert losses.min_snr_weight(schedule, t, "x0").max() == 5


CONVERSIONS = {                                                # from what, by its name among the arrays below
    "x0_from_eps": "eps", "x0_from_v": "v", "x0_from_score": "score", "eps_from_x0": "x0", "eps_from_v": "v",
    "eps_from_score": "score", "v_from_x0": "x0", "score_from_eps": "eps", "score_from_x0": "x0",
}


@pytest.mark.law(
    38, "at the first and last times noising, posterior, targets, conversions, weighted losses and prior are finite in "
        "half precision too; or refused in a sentence, where SNR is 0",
    source="overflow, division by zero and NaN raise; alpha and sigma of schedules from SNR 1e-7 (or 0) to 2e5",
    tolerance="exact: finite, and of the dtype given")
@few
@given(any_schedule(min_T=2, ends_at_zero=None), st.sampled_from([np.float16, np.float32]), seeds)
def test_the_mathematics_is_finite_at_extreme_times_in_half_precision(schedule, dtype, seed):
    rng = np.random.default_rng(seed)
    x_0, eps, error = (a.astype(dtype) for a in (rng.uniform(-1, 1, (2, 3)), *rng.normal(size=(2, 2, 3))))
    refused, finite = set(), []
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        for t in (0, schedule.T - 1):
            x_t, v = gaussian.q_sample(schedule, x_0, t, eps), gaussian.v_from_x0_eps(schedule, x_0, t, eps)
            named = {"x0": x_0, "eps": eps, "v": v, "score": gaussian.score_from_eps(schedule, x_t, t, eps)}
            finite += [x_t, v, named["score"], *gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, -1),
                       gaussian.prior_kl(schedule, x_0)]
            for name, source in CONVERSIONS.items():
                try:
                    finite.append(getattr(gaussian, name)(schedule, x_t, t, named[source]))
                except ValueError as refusal:
                    refused.add((t, name, str(refusal).partition(" at ")[0]))
            for predicts in PREDICTIONS:
                try:
                    out = gaussian.target(schedule, predicts, x_0, eps, t) + error
                    finite.append(gaussian.to_x0(schedule, predicts, x_t, t, out))
                    weights = [losses.weight(schedule, t, predicts, kind) for kind in losses.LOSS_WEIGHTS
                               if t or kind != "bound"]
                    assert all(np.isfinite(weight * np.mean(error**2)) for weight in weights)
                except ValueError as refusal:
                    refused.add((t, predicts, str(refusal).partition(" at ")[0]))
    assert all(np.isfinite(a).all() and a.dtype == dtype for a in finite)
    # the three ways to x_0 through eps are refused at SNR 0, and at no other time
    expected = {"x0_from_eps", "x0_from_score", "eps"} if schedule.alpha_bar[-1] == 0 else set()
    assert refused == {(schedule.T - 1, name, "eps does not determine x_0") for name in expected}
