"""Gaussian algebra: laws 1, 2, 4, 8 to 10, 15 and 16, against composition, exact fractions and quadrature."""

import math
from fractions import Fraction

import numpy as np
import pytest
from diffusion_strategies import any_schedule, schedule_and_times
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.gaussian import PREDICTIONS

few = settings(deadline=None, max_examples=40)
pixels = st.floats(-3, 3)


def one(x: float) -> np.ndarray:
    return np.array([x])


def coefficient(function) -> float:
    """What a linear function of one number multiplies it by."""
    return float((function(one(1.0)) - function(one(0.0)))[0])


# ---- forward ---------------------------------------------------------------------------------------------


@few
@given(any_schedule(max_T=20, ends_at_zero=None))
def test_marginal_is_the_composition_of_single_steps(schedule):
    """Law 1: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, one step after another, in fractions."""
    signal, noise = Fraction(1), Fraction(0)  # powers
    for t in range(schedule.T):
        beta = Fraction(float(schedule.betas[t]))
        signal, noise = (1 - beta) * signal, (1 - beta) * noise + beta
        mean, variance = gaussian.q_mean_variance(schedule, one(1.0), t)
        assert mean[0] ** 2 == pytest.approx(float(signal), rel=1e-8, abs=1e-15)
        assert float(variance) == pytest.approx(float(noise), rel=1e-8)
        x_t = [gaussian.q_sample(schedule, one(a), t, one(b))[0] for a, b in [(1.0, 0.0), (0.0, 1.0)]]
        assert x_t[0] ** 2 == pytest.approx(float(signal), rel=1e-8, abs=1e-15)
        assert x_t[1] ** 2 == pytest.approx(float(noise), rel=1e-8)


def test_a_simulated_chain_has_the_moments_of_the_marginal():
    """Law 1 by simulation: 200,000 chains, 3 means and 3 variances at 5.4 standard errors: false alarm 4e-7.

    (P(|z| > 5.4) = 6.7e-8, times six. The mean of normals is normal, and so, nearly, is their variance.)
    """
    rng = np.random.default_rng(0)
    schedule, x_0, count = schedules.cosine(6), 0.7, 200_000
    x = np.full(count, x_0)
    for t, beta in enumerate(schedule.betas):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * rng.standard_normal(count)
        if t in (0, 3, 5):
            mean, variance = gaussian.q_mean_variance(schedule, one(x_0), t)
            assert abs(x.mean() - mean[0]) < 5.4 * math.sqrt(variance / count)
            assert abs(x.var() - variance) < 5.4 * variance * math.sqrt(2 / count)


@few
@given(schedule_and_times(ends_at_zero=None), st.data())
def test_any_two_jumps_compose(drawn, data):
    """Law 2: r to s to t is r to t, with VDM's variance sigma_t^2 - alpha_ts^2 sigma_s^2 in fractions."""
    schedule, s, t = drawn
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
    abar_s, abar_t = Fraction(float(schedule.abar(s))), Fraction(float(schedule.abar(t)))
    vdm = (1 - abar_t) - abar_t / abar_s * (1 - abar_s)
    assert sigma2_ts == pytest.approx(float(vdm), rel=1e-10)
    assert alpha_ts**2 == pytest.approx(float(abar_t / abar_s), rel=1e-12)
    if s > -1:
        r = data.draw(st.integers(-1, s - 1))
        alpha_sr, sigma2_sr = gaussian.q_step(schedule, r, s)
        alpha_tr, sigma2_tr = gaussian.q_step(schedule, r, t)
        assert alpha_ts * alpha_sr == pytest.approx(alpha_tr, rel=1e-12)
        assert alpha_ts**2 * sigma2_sr + sigma2_ts == pytest.approx(sigma2_tr, rel=1e-12)
    else:  # from the clean image it is the marginal
        assert alpha_ts == schedule.alpha(t)
        assert sigma2_ts == 1 - schedule.abar(t)


def test_a_single_jump_is_beta():
    schedule = schedules.linear()
    t = np.arange(schedule.T)
    _, sigma2_ts = gaussian.q_step(schedule, t - 1, t)
    np.testing.assert_allclose(sigma2_ts, np.linspace(1e-4, 0.02, 1000), rtol=1e-10)


@pytest.mark.parametrize("s, t", [(3, 3), (4, 3), (np.array([0, 5]), np.array([1, 4]))])
def test_a_jump_goes_forward(s, t):
    with pytest.raises(ValueError, match="s must be earlier than t"):
        gaussian.q_step(schedules.cosine(10), s, t)


# ---- posterior -------------------------------------------------------------------------------------------


@few
@given(schedule_and_times(first=0), pixels, pixels, pixels)
def test_bayes_holds_pointwise(drawn, x_0, x_s, x_t):
    """Law 8: q(x_s|x_t,x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0), at any three points."""
    schedule, s, t = drawn
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
    posterior = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), t, s)

    def log_density(x, mean, variance):
        return norm.logpdf(x, mean, np.sqrt(variance)).item()

    left = [
        log_density(x_s, *posterior),
        log_density(x_t, *gaussian.q_mean_variance(schedule, one(x_0), t)),
    ]
    right = [
        log_density(x_t, alpha_ts * x_s, sigma2_ts),
        log_density(x_s, *gaussian.q_mean_variance(schedule, one(x_0), s)),
    ]
    # the terms are as large as (x - mean)^2 / variance, and cancel
    assert sum(left) == pytest.approx(sum(right), abs=1e-11 * (1 + sum(map(abs, left + right))))


@few
@given(schedule_and_times(first=0, ends_at_zero=None), pixels, pixels)
def test_posterior_is_the_normalised_product_on_a_grid(drawn, x_0, x_t):
    """Law 9: mean and variance of q(x_t|x_s) q(x_s|x_0) over a fine grid of x_s. No algebra is shared."""
    schedule, s, t = drawn
    abar_s, abar_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
    mean, variance = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), t, s)
    # a grid around the answer; were the answer wrong, the product would not have its mass where it says
    x_s = mean[0] + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    log_p = -((x_t - math.sqrt(abar_t / abar_s) * x_s) ** 2) / (2 * (1 - abar_t / abar_s))
    log_p -= (x_s - math.sqrt(abar_s) * x_0) ** 2 / (2 * (1 - abar_s))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    scale = math.sqrt(variance)
    assert (p @ x_s - mean[0]) / scale == pytest.approx(0, abs=1e-6)
    assert p @ ((x_s - mean[0]) / scale) ** 2 == pytest.approx(1, abs=1e-6)


@few
@given(any_schedule(min_T=2))
def test_posterior_of_one_step_is_ddpm_eq_6_and_7(schedule):
    """Law 9, DDPM's own formulas in fractions, squared; s = t-1 is meant where s is left out."""
    for t in range(1, schedule.T):
        abar, previous = Fraction(float(schedule.alpha_bar[t])), Fraction(float(schedule.alpha_bar[t - 1]))
        beta = 1 - abar / previous
        _, variance = gaussian.q_posterior_mean_variance(schedule, one(0.0), one(0.0), t)
        assert float(variance) == pytest.approx(float((1 - previous) / (1 - abar) * beta), rel=1e-10)

        def of_x0(x_0, t=t):
            return gaussian.q_posterior_mean_variance(schedule, x_0, one(0.0), t)[0]

        def of_xt(x_t, t=t):
            return gaussian.q_posterior_mean_variance(schedule, one(0.0), x_t, t)[0]

        assert coefficient(of_x0) ** 2 == pytest.approx(float(previous * (beta / (1 - abar)) ** 2), rel=1e-10)
        expected = (abar / previous) * ((1 - previous) / (1 - abar)) ** 2
        assert coefficient(of_xt) ** 2 == pytest.approx(float(expected), rel=1e-10)
        assert coefficient(of_x0) > 0 and coefficient(of_xt) > 0


@few
@given(any_schedule(ends_at_zero=None), st.data(), pixels, pixels)
def test_the_last_jump_ends_at_x_0_with_no_noise(schedule, data, x_0, x_t):
    """Law 9: from any time to the clean image, mean x_0 and variance 0 to the last bit, in every dtype."""
    t = data.draw(st.integers(0, schedule.T - 1))
    for dtype in (np.float16, np.float32, np.float64):
        x = np.array([x_0], dtype)
        mean, variance = gaussian.q_posterior_mean_variance(schedule, x, np.array([x_t], dtype), t, s=-1)
        assert mean[0] == x[0]
        assert variance == 0
    at_first_step = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), 0)
    assert at_first_step[0][0] == x_0 and at_first_step[1] == 0
    unsigned = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), np.zeros(1, np.uint8))
    assert unsigned[0][0] == x_0


# ---- divergences -----------------------------------------------------------------------------------------


def kl_by_quadrature(mean1, var1, mean2, var2):
    """E_1[log p_1 - log p_2] at Gauss-Hermite nodes, exact for the quadratic integrand."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    x = mean1 + math.sqrt(var1) * nodes
    gap = norm.logpdf(x, mean1, math.sqrt(var1)) - norm.logpdf(x, mean2, math.sqrt(var2))
    return weights @ gap / weights.sum()


@few
@given(pixels, st.floats(1e-3, 9), pixels, st.floats(1e-3, 9))
def test_kl_is_the_expected_log_ratio(mean1, var1, mean2, var2):
    kl = gaussian.kl_gaussian(mean1, var1, mean2, var2)
    assert kl == pytest.approx(kl_by_quadrature(mean1, var1, mean2, var2), rel=1e-9, abs=1e-11)
    assert gaussian.kl_gaussian(mean1, var1, mean1, var1) == 0


def test_kl_broadcasts_and_keeps_float32():
    means = np.zeros((2, 3), np.float32)
    kl = gaussian.kl_gaussian(means, 1.0, 1.0, 1.0)
    assert kl.shape == (2, 3) and kl.dtype == np.float32
    np.testing.assert_array_equal(kl, 0.5)


@pytest.mark.parametrize("var1, var2", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, np.nan)])
def test_kl_refuses_a_point_mass(var1, var2):
    with pytest.raises(ValueError, match="var1 and var2 must be positive"):
        gaussian.kl_gaussian(0.0, var1, 0.0, var2)


@few
@given(any_schedule(ends_at_zero=None), pixels)
def test_prior_kl_is_the_expected_log_ratio(schedule, x_0):
    """Law 4: the price of starting from N(0, I), by quadrature; 0 where the schedule ends at SNR 0."""
    abar = schedule.alpha_bar[-1]
    expected = kl_by_quadrature(math.sqrt(abar) * x_0, 1 - abar, 0.0, 1.0)
    kl = gaussian.prior_kl(schedule, one(x_0))[0]
    assert kl == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if abar == 0:
        assert kl == 0


def test_reaching_noise_means_a_small_prior_kl():
    """The bound 0.02 that schedules are held to is worth at most 0.0102 nats a pixel in [-1, 1]."""
    barely = schedules.Schedule([0.5, schedules.MOST_SIGNAL_AT_THE_END])
    assert barely.reaches_noise
    assert kl_by_quadrature(math.sqrt(0.02), 0.98, 0.0, 1.0) < 0.0102
    assert gaussian.prior_kl(barely, np.array([-1.0, 0.0, 1.0])).max() < 0.0102


# ---- eps, x0, v, score -----------------------------------------------------------------------------------


@few
@given(any_schedule(), st.data(), pixels, pixels)
def test_all_four_names_convert_into_one_another_and_back(schedule, data, x_0, eps):
    """Law 10, from a known x_0 and eps; the score is checked as the slope of log q(x_t|x_0)."""
    t = data.draw(st.integers(0, schedule.T - 1))
    alpha, sigma = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
    x_t = alpha * x_0 + sigma * eps
    v = alpha * eps - sigma * x_0
    h = 1e-4 * sigma
    slope = (norm.logpdf(x_t + h, alpha * x_0, sigma) - norm.logpdf(x_t - h, alpha * x_0, sigma)) / (2 * h)

    def convert(name, thing):
        return getattr(gaussian, name)(schedule, one(x_t), t, one(thing))[0]

    score = convert("score_from_eps", eps)
    assert score * sigma == pytest.approx(slope * sigma, abs=1e-6)
    # dividing by a small alpha or sigma magnifies the rounding of x_t
    of_x0, of_eps = 1e-14 * 10 / alpha**2, 1e-14 * 10 / sigma**2
    for name, thing in [("x0_from_eps", eps), ("x0_from_v", v), ("x0_from_score", score)]:
        assert convert(name, thing) == pytest.approx(x_0, rel=1e-12, abs=of_x0)
    for name, thing in [("eps_from_x0", x_0), ("eps_from_v", v), ("eps_from_score", score)]:
        assert convert(name, thing) == pytest.approx(eps, rel=1e-12, abs=of_eps)
    assert convert("v_from_x0", x_0) == pytest.approx(v, rel=1e-12, abs=of_eps)
    assert convert("score_from_x0", x_0) * sigma == pytest.approx(score * sigma, rel=1e-12, abs=of_eps)
    assert gaussian.v_from_x0_eps(schedule, one(x_0), t, one(eps))[0] == pytest.approx(v, abs=1e-14)


@few
@given(any_schedule(ends_at_zero=None), st.data(), pixels, pixels)
def test_v_is_a_rotation(schedule, data, x_0, eps):
    """Law 10: (x_t, v) is (x_0, eps) turned, so lengths stay, also at the clean image and at SNR 0."""
    t = data.draw(st.integers(-1, schedule.T - 1))
    x_t = gaussian.q_sample(schedule, one(x_0), t, one(eps))
    v = gaussian.v_from_x0_eps(schedule, one(x_0), t, one(eps))
    assert x_t[0] ** 2 + v[0] ** 2 == pytest.approx(x_0**2 + eps**2, rel=1e-12, abs=1e-14)
    assert gaussian.x0_from_v(schedule, x_t, t, v)[0] == pytest.approx(x_0, abs=1e-14)
    assert gaussian.eps_from_v(schedule, x_t, t, v)[0] == pytest.approx(eps, abs=1e-14)


@few
@given(any_schedule(), st.sampled_from(PREDICTIONS), st.data())
def test_to_x0_inverts_target(schedule, predicts, data):
    """What training asks for is what sampling understands, in a batch where each sample has its own time."""
    t = np.array(data.draw(st.lists(st.integers(0, schedule.T - 1), min_size=3, max_size=3)))
    x_0, eps = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 1))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    out = gaussian.target(schedule, predicts, x_0, eps, t)
    x0_hat = gaussian.to_x0(schedule, predicts, x_t, t, out)
    rounding = 1e-14 / schedule.alpha_bar[t].min()
    np.testing.assert_allclose(x0_hat, x_0, rtol=0, atol=rounding)


def test_targets_are_what_they_are_called():
    schedule, x_0, eps = schedules.cosine(10), one(2.0), one(3.0)
    assert gaussian.target(schedule, "eps", x_0, eps, 4) == 3.0
    assert gaussian.target(schedule, "x0", x_0, eps, 4) == 2.0
    half = schedules.Schedule([0.64, 0.36])  # alpha .8, sigma .6, then the reverse
    assert gaussian.target(half, "v", x_0, eps, 0) == pytest.approx(0.8 * 3 - 0.6 * 2)
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, got 'epsilon'"):
        gaussian.target(schedule, "epsilon", x_0, eps, 4)
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, got 'epsilon'"):
        gaussian.to_x0(schedule, "epsilon", x_0, 4, eps)


def test_eps_prediction_at_snr_0_raises_and_v_and_x0_do_not():
    """Law 5: no infinity for a clip to hide. One bad time in a batch is enough."""
    schedule = schedules.zero_terminal_snr(schedules.linear())
    t = np.array([10, 999])
    x_0, eps = np.random.default_rng(0).standard_normal((2, 2, 3))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    np.testing.assert_array_equal(x_t[1], eps[1])
    for call in (
        lambda: gaussian.target(schedule, "eps", x_0, eps, t),
        lambda: gaussian.to_x0(schedule, "eps", x_t, t, eps),
        lambda: gaussian.x0_from_eps(schedule, x_t, t, eps),
        lambda: gaussian.x0_from_score(schedule, x_t, t, -eps),
    ):
        with pytest.raises(ValueError, match="eps says nothing of x_0 at SNR 0"):
            call()
    for predicts in ("v", "x0"):
        out = gaussian.target(schedule, predicts, x_0, eps, t)
        np.testing.assert_allclose(gaussian.to_x0(schedule, predicts, x_t, t, out), x_0, atol=1e-14)
    mean, variance = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, t - 5)
    assert np.all(np.isfinite(mean)) and np.all(variance > 0)


def test_a_signal_too_small_for_the_dtype_counts_as_none():
    """alpha = 1e-50 is 0 in float32, where a division by it would be infinite."""
    schedule = schedules.Schedule([0.5, 1e-100])
    x = np.ones(1)
    assert np.isfinite(gaussian.x0_from_eps(schedule, x, 1, 0 * x))
    with pytest.raises(ValueError, match="float32"):
        gaussian.x0_from_eps(schedule, x.astype(np.float32), 1, x.astype(np.float32))


@pytest.mark.parametrize("name", ["eps_from_x0", "v_from_x0", "score_from_eps", "score_from_x0"])
def test_the_clean_image_has_no_eps_to_speak_of(name):
    with pytest.raises(ValueError, match="t must be 0 or more, where there is noise, got -1"):
        getattr(gaussian, name)(schedules.cosine(10), one(0.5), -1, one(0.5))


# ---- Gaussian data ---------------------------------------------------------------------------------------

deviations = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 3.0))


@few
@given(any_schedule(), st.data(), deviations)
def test_loss_floors_on_gaussian_data(schedule, data, s):
    """Law 15: for x_0 ~ N(0, s^2), the target's variance that no function of x_t explains.

    The left-hand side is linear regression on moments: Var(y) - Cov(y, x_t)^2 / Var(x_t), with y and x_t read
    off `target` and `q_sample` as linear functions of independent x_0 and eps.
    """
    t = data.draw(st.integers(0, schedule.T - 1))
    zero = one(0.0)
    power = np.array([s**2, 1.0])  # of x_0 and eps

    def row(function):  # coefficients of x_0 and eps
        return np.array([coefficient(lambda x: function(x, zero)), coefficient(lambda x: function(zero, x))])

    x_t = row(lambda x_0, eps: gaussian.q_sample(schedule, x_0, t, eps))
    alpha2, sigma2 = schedule.alpha_bar[t], 1 - schedule.alpha_bar[t]
    V = alpha2 * s**2 + sigma2
    floors = {"x0": s**2 * sigma2 / V, "eps": alpha2 * s**2 / V, "v": s**2 / V}
    for predicts, floor in floors.items():
        y = row(lambda x_0, eps, predicts=predicts: gaussian.target(schedule, predicts, x_0, eps, t))
        unexplained = y**2 @ power - ((y * x_t) @ power) ** 2 / (x_t**2 @ power)
        assert unexplained == pytest.approx(floor, rel=1e-9, abs=1e-13 * (1 + s**2))


def joint_covariance(schedule, s, t, deviation):
    """Of (x_0, x_s, x_t), by pushing independent normals through x_s = q_sample and x_t = q_step."""
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
    x_0 = np.array([deviation, 0.0, 0.0])
    x_s = schedule.alpha(s) * x_0 + np.array([0.0, schedule.sigma(s), 0.0])
    x_t = alpha_ts * x_s + np.array([0.0, 0.0, math.sqrt(sigma2_ts)])
    rows = np.stack([x_0, x_s, x_t])
    return rows @ rows.T


@few
@given(schedule_and_times(first=0), deviations)
def test_true_reverse_variance_on_gaussian_data(drawn, deviation):
    """Law 16: Var(x_s|x_t) = beta~ + c_0^2 Var(x_0|x_t); beta~ itself at s = 0, and beta at unit variance."""
    schedule, s, t = drawn
    cov = joint_covariance(schedule, s, t, deviation)
    given_xt = cov - np.outer(cov[:, 2], cov[2]) / cov[2, 2]  # the covariance that is left, x_t being known
    zero = one(0.0)
    beta_tilde = float(gaussian.q_posterior_mean_variance(schedule, zero, zero, t, s)[1])
    c_0 = coefficient(lambda x: gaussian.q_posterior_mean_variance(schedule, x, zero, t, s)[0])
    assert given_xt[1, 1] == pytest.approx(beta_tilde + c_0**2 * given_xt[0, 0], rel=1e-9, abs=1e-13)
    if deviation == 0:
        assert given_xt[1, 1] == pytest.approx(beta_tilde, rel=1e-9, abs=1e-13)
    if deviation == 1:
        beta = 1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]
        assert given_xt[1, 1] == pytest.approx(beta, rel=1e-9, abs=1e-13)


@few
@given(schedule_and_times(first=0), deviations)
def test_sohl_dickstein_entropy_bounds(drawn, deviation):
    """Law 16: H(x_t|x_s) + H(x_s|x_0) - H(x_t|x_0) <= H(x_s|x_t) <= H(x_t|x_s), in nats.

    The lower is tight for a point, the upper at unit variance; the upper fails for data wider than the noise.
    """
    schedule, s, t = drawn
    cov = joint_covariance(schedule, s, t, deviation)
    log_step, log_beta_tilde = (
        math.log(variance)
        for variance in (
            gaussian.q_step(schedule, s, t)[1],
            gaussian.q_posterior_mean_variance(schedule, one(0.0), one(0.0), t, s)[1],
        )
    )
    # the entropy of a Gaussian is half the log of its variance, up to a constant that all three share
    true = math.log(cov[1, 1] - cov[1, 2] ** 2 / cov[2, 2])
    lower = log_step + math.log(1 - schedule.alpha_bar[s]) - math.log(1 - schedule.alpha_bar[t])
    assert log_beta_tilde == pytest.approx(lower, abs=1e-9)  # beta~ is the lower bound's variance
    slack = 1e-8
    assert lower <= true + slack
    if deviation == 0:
        assert true == pytest.approx(lower, abs=slack)
    if deviation == 1:
        assert true == pytest.approx(log_step, abs=slack)
    elif deviation < 1:
        assert true <= log_step + slack
    elif deviation > 1.01:
        assert true > log_step


# ---- arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 3, 1)])
def test_results_keep_dtype_and_shape(dtype, shape):
    schedule, t = schedules.cosine(100), np.array([3, 50])
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    results = [
        gaussian.q_sample(schedule, x, t, y),
        *gaussian.q_mean_variance(schedule, x, t),
        *gaussian.q_posterior_mean_variance(schedule, x, y, t),
        gaussian.prior_kl(schedule, x),
        *(gaussian.to_x0(schedule, predicts, x, t, y) for predicts in PREDICTIONS),
        *(gaussian.target(schedule, predicts, x, y, t) for predicts in PREDICTIONS),
        gaussian.score_from_x0(schedule, x, t, y),
        gaussian.eps_from_score(schedule, x, t, y),
    ]
    for result in results:
        assert result.dtype == dtype
        assert result.shape in (shape, (2,) + (1,) * (len(shape) - 1))


def test_each_sample_has_its_own_time():
    """A batch with times (B,) equals its samples one at a time, also where B, H, W and C are all 3."""
    schedule = schedules.linear()
    x_0, x_t = np.random.default_rng(0).standard_normal((2, 3, 3, 3, 3))
    t = np.array([0, 400, 999])
    for function in (
        lambda x_0, x_t, t: gaussian.q_sample(schedule, x_0, t, x_t),
        lambda x_0, x_t, t: gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t)[0],
        lambda x_0, x_t, t: gaussian.to_x0(schedule, "v", x_t, t, x_0),
        lambda x_0, x_t, t: gaussian.eps_from_x0(schedule, x_t, t, x_0),
    ):
        batch = function(x_0, x_t, t)
        for i in range(3):
            np.testing.assert_array_equal(batch[i], function(x_0[i], x_t[i], int(t[i])))


def test_arguments_that_do_not_fit_are_refused():
    schedule, x = schedules.cosine(10), np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"one per sample of x \(4, 2\), got an array \(2,\)"):
        gaussian.q_sample(schedule, x, np.array([1, 2]), x)
    with pytest.raises(ValueError, match=r"eps must be float32 \(4, 2\) like x_0, got float64 \(4, 2\)"):
        gaussian.q_sample(schedule, x, 3, np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"out must be float32 \(4, 2\) like x_t, got float32 \(4, 1\)"):
        gaussian.to_x0(schedule, "x0", x, 3, x[:, :1])
    with pytest.raises(TypeError, match="x must be a floating-point array, got dtype int64"):
        gaussian.q_sample(schedule, np.zeros(3, int), 3, np.zeros(3, int))
