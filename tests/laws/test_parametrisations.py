"""Parametrisations (laws 5, 10, 17): eps, x_0, v and the score determine one another.

Against finite differences of densities, and the papers' own tables.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.diffusion_strategies import any_schedule, seeds, shapes
from support.law_tools import alphas_sigmas, few, one

from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.gaussian import PREDICTIONS, q_sample, target

# ---- law 5: zero terminal SNR --------------------------------------------------------------------------------

@pytest.mark.law(
    5, "zero-terminal-SNR rescaling is affine in sqrt(abar), keeps the first, and makes the last 0; twice is once",
    source="Zero SNR algorithm 1; a line fitted through the two tables",
    tolerance="1e-12: a least-squares line over 40 numbers below 1; the two ends exact")
@few
@given(any_schedule(min_T=2))
def test_zero_terminal_snr_keeps_the_first_and_ends_at_zero(schedule):
    zeroed = schedules.zero_terminal_snr(schedule)
    assert zeroed.alpha_bar[0] == schedule.alpha_bar[0]
    assert zeroed.alpha_bar[-1] == 0
    before, after = schedule.alpha(np.arange(schedule.T)), zeroed.alpha(np.arange(schedule.T))
    slope, offset = np.polyfit(before, after, 1)
    np.testing.assert_allclose(after, slope * before + offset, rtol=0, atol=1e-12)
    np.testing.assert_allclose(schedules.zero_terminal_snr(zeroed).alpha_bar, zeroed.alpha_bar, rtol=0, atol=1e-15)


@pytest.mark.law(
    5, "at SNR 0, eps and score do not determine x_0 and raise; v and x_0 do",
    source="x_t = eps there", tolerance="1e-14: one rotation of numbers of order 4")
@few
@given(any_schedule(ends_at_zero=True), shapes, seeds)
def test_eps_prediction_at_snr_0_raises_and_v_and_x0_do_not(schedule, shape, seed):
    """An error, not an infinity that clipping would hide. One such time in a batch is enough."""
    t = np.array([0, schedule.T - 1])
    x_0, eps = np.random.default_rng(seed).standard_normal((2, 2, *shape))
    x_t = q_sample(schedule, x_0, t, eps)
    np.testing.assert_array_equal(x_t[1], eps[1])
    for call in (
        lambda: target(schedule, "eps", x_0, eps, t),
        lambda: gaussian.to_x0(schedule, "eps", x_t, t, eps),
        lambda: gaussian.x0_from_eps(schedule, x_t, t, eps),
        lambda: gaussian.x0_from_score(schedule, x_t, t, -eps),
    ):
        with pytest.raises(ValueError, match="eps does not determine x_0 at SNR 0"):
            call()
    for predicts in ("v", "x0"):
        out = target(schedule, predicts, x_0, eps, t)
        np.testing.assert_allclose(gaussian.to_x0(schedule, predicts, x_t, t, out), x_0, rtol=0, atol=1e-14)
    mean, variance = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, np.array([-1, 0]))
    assert np.all(np.isfinite(mean)) and np.all(variance >= 0)
    with pytest.raises(ValueError, match="predicts='eps'.*use 'v' or 'x0'"):
        NetworkDenoiser(schedule, "eps", lambda x_t, t, cond: x_t)


@pytest.mark.law(
    5, "a signal that rounds to 0 in the array's dtype counts as SNR 0",
    source="float32 holds nothing below 1e-45", tolerance="exact")
def test_a_signal_too_small_for_the_dtype_counts_as_none():
    schedule = schedules.Schedule([0.5, 1e-100])
    x = np.ones(1)
    assert np.isfinite(gaussian.x0_from_eps(schedule, x, 1, 0 * x))
    with pytest.raises(ValueError, match="float32"):
        gaussian.x0_from_eps(schedule, x.astype(np.float32), 1, x.astype(np.float32))


# ---- law 10: four names of one thing -------------------------------------------------------------------------

@pytest.mark.law(
    10, "eps, x_0, v = alpha eps - sigma x_0 and score = grad log q(x_t|x_0) convert into one another and back",
    source="DDPM eq. 4, 15; Salimans & Ho 2022; the score by differences of scipy's log-density",
    tolerance="1e-13 over alpha^2 or sigma^2: x_t is rounded at 1e-15, and divided by either; 1e-6 for differences")
@few
@given(any_schedule(), shapes, seeds)
def test_all_four_names_convert_into_one_another_and_back(schedule, shape, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    x_0, eps = rng.uniform(-3, 3, size=(2, 3, *shape))
    alpha, sigma = alphas_sigmas(schedule, t, x_0)
    x_t, v = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0
    h = 1e-4 * sigma
    slope = (stats.norm.logpdf(x_t + h, alpha * x_0, sigma) - stats.norm.logpdf(x_t - h, alpha * x_0, sigma)) / (2 * h)

    def convert(name, thing):
        return getattr(gaussian, name)(schedule, x_t, t, thing)

    def assert_equal(got, expected, rounding):
        assert (abs(got - expected) <= 1e-12 * abs(expected) + 1e-13 * rounding).all()

    score = convert("score_from_eps", eps)
    np.testing.assert_allclose(score * sigma, slope * sigma, rtol=0, atol=1e-6)
    for name, thing in [("x0_from_eps", eps), ("x0_from_v", v), ("x0_from_score", score)]:
        assert_equal(convert(name, thing), x_0, 1 / alpha**2)
    for name, thing in [("eps_from_x0", x_0), ("eps_from_v", v), ("eps_from_score", score)]:
        assert_equal(convert(name, thing), eps, 1 / sigma**2)
    assert_equal(convert("v_from_x0", x_0), v, 1 / sigma**2)
    assert_equal(convert("score_from_x0", x_0) * sigma, score * sigma, 1 / sigma**2)
    assert_equal(gaussian.v_from_x0_eps(schedule, x_0, t, eps), v, 1.0)


@pytest.mark.law(
    10, "(x_t, v) is (x_0, eps) turned: lengths stay, from the clean image to SNR 0",
    source="Salimans & Ho 2022, appendix D; Pythagoras", tolerance="1e-14: one rotation, of numbers below 5")
@few
@given(any_schedule(ends_at_zero=None), shapes, seeds)
def test_v_is_a_rotation(schedule, shape, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(-1, schedule.T, 3)
    x_0, eps = rng.uniform(-3, 3, size=(2, 3, *shape))
    x_t, v = q_sample(schedule, x_0, t, eps), gaussian.v_from_x0_eps(schedule, x_0, t, eps)
    np.testing.assert_allclose(x_t**2 + v**2, x_0**2 + eps**2, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(gaussian.x0_from_v(schedule, x_t, t, v), x_0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(gaussian.eps_from_v(schedule, x_t, t, v), eps, rtol=0, atol=1e-14)


@pytest.mark.law(
    10, "to_x0 inverts target, and so does NetworkDenoiser",
    source="a round trip", tolerance="1e-13/abar: eps is divided by alpha")
@few
@given(any_schedule(), st.sampled_from(PREDICTIONS), shapes, seeds)
def test_to_x0_inverts_target(schedule, predicts, shape, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    x_0, eps = rng.standard_normal((2, 3, *shape))
    x_t, out = q_sample(schedule, x_0, t, eps), target(schedule, predicts, x_0, eps, t)
    rounding = 1e-13 / schedule.alpha_bar[t].min()
    np.testing.assert_allclose(gaussian.to_x0(schedule, predicts, x_t, t, out), x_0, rtol=0, atol=rounding)
    denoiser = NetworkDenoiser(schedule, predicts, lambda x_t, t, cond: out)
    np.testing.assert_allclose(denoiser(x_t, t), x_0, rtol=0, atol=rounding)


# ---- law 17: preconditioning ---------------------------------------------------------------------------------

def edm(noise, sigma_data):
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1, for x = y + noise n."""
    total = noise**2 + sigma_data**2
    return sigma_data**2 / total, noise * sigma_data / np.sqrt(total), 1 / np.sqrt(total), np.log(noise) / 4


sigma_datas = st.floats(0.1, 5)


@pytest.mark.law(
    17, "EDM: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) is v-prediction of y/sigma_data at SNR "
        "sigma_data^2/sigma^2: c_in x is x_t, v is -F, c_noise = (log sigma_data - lambda)/4",
    source="Karras et al. 2022, table 1",
    tolerance="1e-9: sigma/alpha taken from the table, rounded at 1e-16 over powers of 6e-6")
@few
@given(any_schedule(), sigma_datas, shapes, seeds)
def test_edm_preconditioning_is_v_prediction_of_data_of_unit_variance(schedule, sigma_data, shape, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    y, n = rng.normal(size=(2, 3, *shape))
    alpha, sigma = alphas_sigmas(schedule, t, y)
    noise = sigma_data * sigma / alpha
    x = y + noise * n
    c_skip, c_out, c_in, c_noise = edm(noise, sigma_data)

    def F(z, c):                                                   # any network
        return np.tanh(2 * z + c) - 0.3 * c

    np.testing.assert_allclose(c_in * x, q_sample(schedule, y / sigma_data, t, n), rtol=1e-9, atol=1e-9)
    lam = schedule.half_log_snr(t).reshape(c_noise.shape)
    np.testing.assert_allclose(c_noise, (math.log(sigma_data) - lam) / 4, rtol=0, atol=1e-9)
    denoiser = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: -F(x_t, c_noise))
    D = c_skip * x + c_out * F(c_in * x, c_noise)
    np.testing.assert_allclose(sigma_data * denoiser(c_in * x, t), D, rtol=1e-9, atol=1e-9)
    # and training: F's target is minus v's, and the loss weighted by 1/c_out^2 is the plain loss of v
    v = target(schedule, "v", y / sigma_data, n, t)
    np.testing.assert_allclose((y - c_skip * x) / c_out, -v, rtol=1e-9, atol=1e-9 / sigma.min() ** 2)
    np.testing.assert_allclose((D - y) / c_out, F(c_in * x, c_noise) + v, rtol=1e-9, atol=1e-9 / sigma.min() ** 2)


@pytest.mark.law(
    17, "for y ~ N(0, sigma_data^2) c_skip x is E[y|x], so that F = 0 is optimal; input c_in x and target "
        "(y - c_skip x)/c_out have unit variance and no correlation",
    source="Karras et al. 2022, appendix B.6; the matrix that takes (y/sigma_data, n) to input and target",
    tolerance="1e-9: as above; 1e-12 for the 2 x 2 matrix of a rotation, from terms of order 1")
@few
@given(any_schedule(), sigma_datas, shapes, seeds)
def test_edm_scalings_are_optimal_for_gaussian_data(schedule, sigma_data, shape, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    y, n = rng.normal(size=(2, 3, *shape))
    alpha, sigma = alphas_sigmas(schedule, t, y)
    noise = sigma_data * sigma / alpha
    x = sigma_data * y + noise * n
    c_skip, c_out, c_in, _ = edm(noise, sigma_data)
    exact = GaussianDenoiser(schedule, np.zeros(shape), np.full(shape, sigma_data**2))
    np.testing.assert_allclose(edm(sigma / alpha, sigma_data)[0] * x, exact(alpha * x, t), rtol=1e-9, atol=1e-9)
    # the same of the code's own v: its output 0 is optimal on unit data
    silent = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: np.zeros_like(x_t))
    unit = GaussianDenoiser(schedule, np.zeros(shape), np.ones(shape))
    np.testing.assert_allclose(silent(x, t), unit(x, t), rtol=1e-12, atol=1e-12)
    # input and target as linear functions of the unit normals y and n
    at = noise.ravel()[0], c_skip.ravel()[0], c_out.ravel()[0], c_in.ravel()[0]
    noise, c_skip, c_out, c_in = at
    M = np.array([[c_in * sigma_data, c_in * noise],
                  [sigma_data * (1 - c_skip) / c_out, -c_skip * noise / c_out]])
    np.testing.assert_allclose(M @ M.T, np.eye(2), rtol=0, atol=1e-9)
    zero = one(0.0)
    ours = np.array([[f(one(1.0), zero), f(zero, one(1.0))] for f in (
        lambda x_0, eps: q_sample(schedule, x_0, t[:1], eps)[0],
        lambda x_0, eps: -target(schedule, "v", x_0, eps, t[:1])[0])])
    np.testing.assert_allclose(ours, M, rtol=0, atol=1e-9)
