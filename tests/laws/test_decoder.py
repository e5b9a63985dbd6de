"""Law 21: the decoder of 8-bit values, the offset of a density, and the eight bits of uniform data."""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from support.law_tools import LEVELS, Noise

from minidiff.diffusion import schedules
from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.likelihood import (
    OFFSET,
    DiscretisedGaussian,
    GaussianDensity,
    bits_per_dim,
    density_bits_per_dim,
    flow_bound,
    variational_bound,
)
from minidiff.diffusion.samplers import beta_tilde, times

# ---- law 21: the decoder, and the offset -----------------------------------------------------------------------

@pytest.mark.law(21, "sum_{u=0}^{255} P(u) = 1", source="DDPM eq. 13: the bins tile the line",
                 tolerance="1e-12: 256 differences of cumulative probabilities, each right to 2e-16")
@settings(deadline=None, max_examples=200)
@given(st.floats(-2, 2), st.floats(-6, 6))
def test_the_decoder_sums_to_one(mean, log_sigma):
    log_p = DiscretisedGaussian(10**log_sigma)(LEVELS, np.full(256, mean))
    assert (log_p <= 0).all() and np.isfinite(log_p).all()
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.law(21, "log P(u) = log int N(x; x0_hat, sigma^2) dx over |x - (u / 127.5 - 1)| < 1/255, in far tails, "
                     "too", source="DDPM eq. 13; quadrature relative to the density at the nearer edge",
                 tolerance="1e-9 of log P, and 1e-15 / P where P is a difference of numbers near 1/2")
@settings(deadline=None, max_examples=100)
@given(st.integers(0, 255), st.floats(-1.2, 1.2), st.floats(-3, 1))
def test_the_decoder_s_bins_by_quadrature(u, mean, log_sigma):
    sigma = 10**log_sigma
    got = DiscretisedGaussian(sigma)(np.array([u / 127.5 - 1]), np.array([mean]))[0]
    x = Fraction(2 * u - 255, 255)
    low = -math.inf if u == 0 else (float(x - Fraction(1, 255)) - mean) / sigma
    high = math.inf if u == 255 else (float(x + Fraction(1, 255)) - mean) / sigma
    if low + high < 0:
        low, high = -high, -low                             # by symmetry: the nearer edge is low, or 0 lies within
    edge, width = max(low, 0.0), high - max(low, 0.0)

    def upward(start, length):                              # log int_start^{start + length} of the normal density
        if math.isinf(length):
            length = 40 / (1 + start)
        span = min(length, 40 / (1 + start))
        inner, _ = integrate.quad(lambda y: math.exp(-start * y - y * y / 2), 0, span, epsabs=0, epsrel=1e-12)
        return stats.norm.logpdf(start) + math.log(inner)
    expected = upward(edge, width)
    if low < 0:
        expected = np.logaddexp(expected, upward(0.0, -low))
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-9 + 1e-15 * math.exp(-max(expected, -30)))


@pytest.mark.law(21, "a density over [-1, 1] costs log2(127.5) = 6.9944 bits/dim more than it says",
                 source="a level is 1/127.5 wide; uniform data have 8 bits a value",
                 tolerance="1e-12: closed forms; .1 % for the Gaussian, of the bin's curvature (width/sigma)^2 / 24")
def test_the_offset_and_the_eight_bits_of_uniform_data():
    assert OFFSET == pytest.approx(math.log(127.5) / math.log(2), rel=1e-15) and f"{OFFSET:.4f}" == "6.9944"
    # 256 cells of width 1/127.5 tile an interval; the uniform density on it costs exactly 8 bits
    assert density_bits_per_dim(784 * math.log(256 / 127.5), 784) == pytest.approx(8, rel=1e-12)
    assert bits_per_dim(784 * math.log(256), 784) == pytest.approx(8, rel=1e-12)
    # a smooth density, by its bins and by the offset
    x, mean, sigma = LEVELS[1:-1], np.full(254, 0.1), 0.5
    by_bins = bits_per_dim(-DiscretisedGaussian(sigma)(x, mean), 1)
    by_offset = density_bits_per_dim(-GaussianDensity(sigma**2)(x, mean), 1)
    curvature = ((x - mean) ** 2 / sigma**2 - 1) / (24 * 127.5**2 * sigma**2 * math.log(2))
    np.testing.assert_allclose(by_offset - by_bins, curvature, rtol=1e-3, atol=1e-8)


@pytest.mark.law(21, "uniform 8-bit data cost exactly 8 bits/dim through the flow, at every eps",
                 source="Bayes: p(x_t) P(x_0 | x_t) = P(x_0) q(x_t | x_0), pointwise",
                 tolerance="2e-4 bits: the ODE's error at 800 steps, and four times as much at 400, to 3 %")
def test_uniform_eight_bit_data_cost_eight_bits_through_the_flow():
    schedule = schedules.zero_terminal_snr(schedules.log_snr_linear(1601, 11.0, -10.0))
    denoiser = DatasetDenoiser(schedule, LEVELS[:, None])
    rng = np.random.default_rng(0)
    x_0, eps = LEVELS[rng.integers(0, 256, 20)][:, None], rng.normal(size=(20, 1))
    alpha, sigma = schedule.alpha(0), schedule.sigma(0)
    x_t = alpha * x_0 + sigma * eps

    def bayes(x_0, x0_hat):
        logits = stats.norm.logpdf(x_t, alpha * LEVELS, sigma)                        # (20, 256)
        return stats.norm.logpdf(x_t, alpha * x_0, sigma) - special.logsumexp(logits, axis=1, keepdims=True)
    worst = []
    for steps in (400, 800):
        bound = flow_bound(denoiser, x_0, times(schedule, steps + 1, "linspace"), eps=eps, decoder=bayes)
        worst.append(abs(bits_per_dim(bound.total, 1) - 8).max())
    assert worst[1] < 2e-4 and worst[0] / worst[1] == pytest.approx(4, rel=0.03)


@pytest.mark.law(21, "uniform 8-bit data cost at least 8 bits/dim through the variational bound, and 8 in the limit of "
                     "short steps", source="Gibbs' inequality; -log P(x_0) = log 256; the mean over all 256 values "
                     "and, by the trapezoid rule, over eps; a decoder by Bayes' rule",
                 tolerance="2e-4 bits: extrapolation from 10, 20 and 40 steps takes the errors 1/N and 1/N^2 away")
def test_uniform_eight_bit_data_cost_eight_bits_through_the_bound():
    """Half of the values is enough: by symmetry the other half gives the same, with the sign of x_t reversed."""
    eps = np.linspace(-6, 6, 13)
    phi = np.exp(-eps**2 / 2)
    x_0, eps, w = np.repeat(LEVELS[:128], 13)[:, None], np.tile(eps, 128)[:, None], np.tile(phi / phi.sum() / 128, 128)
    costs = []
    for steps in (10, 20, 40):
        schedule = schedules.log_snr_linear(steps + 1, 0.0, -8.0, allow_signal=True)
        alpha, sigma = schedule.alpha(0), schedule.sigma(0)

        def bayes(x_0, x0_hat, alpha=alpha, sigma=sigma):
            x_t = alpha * x_0 + sigma * eps
            logits = stats.norm.logpdf(x_t, alpha * LEVELS, sigma)                    # (1664, 256)
            return stats.norm.logpdf(x_t, alpha * x_0, sigma) - special.logsumexp(logits, axis=1, keepdims=True)
        bound = variational_bound(DatasetDenoiser(schedule, LEVELS[:, None]), x_0, streams=Noise(len(x_0), given=eps),
                                  decoder=bayes, variance=lru_cache(None)(beta_tilde))
        costs.append(bits_per_dim(w @ bound.total, 1))
    assert min(costs) > 8
    assert (costs[0] - 6 * costs[1] + 8 * costs[2]) / 3 == pytest.approx(8, abs=2e-4)
