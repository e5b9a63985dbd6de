"""Laws 18 to 22: the variational bound, the decoder, and the density of the probability-flow ODE."""

import itertools
import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import tiny
from diffusion_strategies import any_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import (
    DatasetDenoiser,
    GaussianDenoiser,
    MixtureDenoiser,
    NetworkDenoiser,
    static_threshold,
)
from minidiff.diffusion.gaussian import PREDICTIONS, q_sample
from minidiff.diffusion.likelihood import (
    OFFSET,
    DiscretisedGaussian,
    GaussianDensity,
    Hutchinson,
    bits_per_dim,
    density_bits_per_dim,
    draw_times,
    exact_trace,
    flow_bound,
    log_prob,
    reverse_kl,
    variational_bound,
)
from minidiff.diffusion.samplers import beta, beta_tilde, times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import Streams

seeds = st.integers(0, 2**32 - 1)
few = settings(deadline=None, max_examples=30)
LEVELS = np.arange(256) / 127.5 - 1


class Wrong:
    """A denoiser that knows x_0 and errs by error[t], in every pixel: then L_{t-1} does not depend on eps."""

    predicts = "x0"

    def __init__(self, schedule, x_0, error):
        self.schedule, self.x_0, self.error = schedule, x_0, np.asarray(error, np.float64)

    def __call__(self, x_t, t, cond=None):
        x_0 = self.x_0 if cond is None else cond[0]
        return (x_0 + self.error[t].reshape(-1, *[1] * (x_t.ndim - 1))).astype(x_t.dtype)


def exact_snr(schedule, t):
    abar = Fraction(float(schedule.alpha_bar[t]))
    return abar / (1 - abar)


# ---- law 18: what an L_{t-1} is --------------------------------------------------------------------------------

@pytest.mark.law(18, "L_{t-1} = (SNR_{t-1} - SNR_t) ||x_0 - x0_hat||^2 / 2", source="VDM section 4",
                 tolerance="1e-7: 1 - alpha_bar has 11 digits at SNR e^12, and some cancel in beta")
@few
@given(any_schedule(min_T=2, ends_at_zero=None), seeds)
def test_with_the_posterior_s_variance_a_term_is_a_weighted_squared_error(schedule, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(1, schedule.T, 5)
    x_0, eps = rng.normal(size=(2, 5, 2, 3))
    error = rng.normal(size=schedule.T)
    got = reverse_kl(Wrong(schedule, x_0, error), x_0, t, eps)
    for b in range(5):
        gain = exact_snr(schedule, t[b] - 1) - exact_snr(schedule, t[b])
        assert got[b] == pytest.approx(float(gain) * 6 * error[t[b]] ** 2 / 2, rel=1e-7)


@pytest.mark.law(18, "L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || N(mu~(x_t, x0_hat), variance_t) ), for any variance_t",
                 source="DDPM eq. 5; q by Bayes' rule, KL by 3-node Gauss-Hermite, exact for a quadratic",
                 tolerance="1e-7: as for the weighted error; a thousandth of that is the quadrature's")
@few
@given(any_schedule(min_T=2), seeds)
def test_a_term_is_the_divergence_of_two_gaussians(schedule, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(1, schedule.T, 4)
    x_0, eps = rng.normal(size=(2, 4, 2))
    error = rng.normal(size=schedule.T)
    factors = rng.uniform(0.3, 3, size=(schedule.T, 2))     # one variance for each pixel and time

    def variance(of, t, s):
        assert of is schedule and s == t - 1
        return factors[t] * beta(of, t, s)
    got = reverse_kl(Wrong(schedule, x_0 + 9, error), x_0, t, eps, (x_0,), variance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    for b in range(4):
        expected, a_t, a_s = 0.0, schedule.alpha_bar[t[b]], schedule.alpha_bar[t[b] - 1]
        for i in range(2):
            x_t = math.sqrt(a_t) * x_0[b, i] + math.sqrt(1 - a_t) * eps[b, i]
            # Bayes: q(x_s | x_t, x_0) is N(x_s; alpha_s x_0, sigma_s^2) N(x_t; alpha_ts x_s, 1 - alpha_ts^2), scaled
            step = 1 - a_t / a_s
            precision = 1 / (1 - a_s) + a_t / a_s / step
            means = [(math.sqrt(a_s) * x / (1 - a_s) + math.sqrt(a_t / a_s) * x_t / step) / precision
                     for x in (x_0[b, i], x_0[b, i] + error[t[b]])]
            sd = math.sqrt(1 / precision)
            x_s = means[0] + sd * nodes
            ratio = stats.norm.logpdf(x_s, means[0], sd) - stats.norm.logpdf(x_s, means[1],
                                                                             math.sqrt(factors[t[b], i] * step))
            expected += weights @ ratio / weights.sum()
        assert got[b] == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_in_float32_the_small_differences_of_small_times_survive():
    """x0_hat wrong by 1e-6 at SNR 1e4: 6 digits of the two means are alike. The error is exact in float32: 2^-20."""
    schedule, x_0 = schedules.linear(), np.full((1, 4), 0.5, np.float32)
    got = reverse_kl(Wrong(schedule, x_0, [2.0**-20] * 1000), x_0, np.array([1]), x_0)
    gain = exact_snr(schedule, 0) - exact_snr(schedule, 1)
    assert got.dtype == np.float64 and got[0] == pytest.approx(float(gain) * 4 * 2.0**-40 / 2, rel=1e-6)


@few
@given(any_schedule(ends_at_zero=None), seeds)
def test_the_whole_bound_adds_every_term_once(schedule, seed):
    """With a constant error the squared errors telescope, to (SNR_0 - SNR_{T-1}) D error^2 / 2."""
    rng = np.random.default_rng(seed)
    x_0, error = rng.normal(size=(3, 4)), float(rng.normal())
    # the denoiser hears of x_0 through its condition, and would be off by 9 without it
    bound = variational_bound(Wrong(schedule, x_0 + 9, [error] * schedule.T), x_0, (x_0,), streams=Streams(1, 3),
                              decoder=GaussianDensity(0.3))
    telescoped = float(exact_snr(schedule, 0) - exact_snr(schedule, schedule.T - 1)) * 4 * error**2 / 2
    np.testing.assert_allclose(bound.steps, telescoped, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(bound.decoder, -4 * stats.norm.logpdf(error, scale=math.sqrt(0.3)), rtol=1e-9)
    # KL(N(m, v) || N(0, 1)) = (v + m^2 - 1 - log v) / 2
    v, m = 1 - schedule.alpha_bar[-1], math.sqrt(schedule.alpha_bar[-1]) * x_0
    np.testing.assert_allclose(bound.prior, ((v - 1 - math.log(v) + m**2) / 2).sum(1), rtol=1e-6, atol=1e-12)
    assert np.array_equal(bound.total, bound.prior + bound.steps + bound.decoder)


@few
@given(any_schedule(min_T=2, ends_at_zero=None), st.integers(1, 7), seeds)
def test_drawn_terms_tell_the_sum_without_bias(schedule, terms, seed):
    """E over u of sum w f(t) is piecewise constant in u: summed exactly, between the places where a time changes."""
    snr = np.array([float(exact_snr(schedule, t)) for t in range(schedule.T)])
    p = (snr[:-1] - snr[1:]) * (1 - schedule.alpha_bar[1:])
    edges = terms * np.cumsum(p) / p.sum()
    breaks = np.unique(np.concatenate([[0, 1], edges % 1]))
    u, length = (breaks[1:] + breaks[:-1]) / 2, np.diff(breaks)
    u, length = u[length > 1e-9], length[length > 1e-9]
    f = np.random.default_rng(seed).uniform(1, 2, schedule.T) * np.concatenate([[np.nan], p])
    draws = draw_times(schedule, terms, u)
    assert len(draws) == terms
    mean = sum(length @ (w * f[t]) for t, w in draws)
    assert mean == pytest.approx(f[1:].sum(), rel=1e-5)     # 1e-9 of u was left out at each of at most 40 breaks
    # drawn as likely as they are large, the terms tell the sum without error, whatever u
    for share in (0.0, 0.3, 1.0):
        assert sum(w * p[t - 1] for t, w in draw_times(schedule, terms, np.array([share]))) == pytest.approx(p.sum())


@few
@given(any_schedule(min_T=2), st.integers(1, 5), seeds)
def test_drawn_terms_of_a_network_whose_v_is_equally_wrong_everywhere(schedule, terms, seed):
    """x0_hat wrong by sigma_t, which is v wrong by 1: any few terms give the sum over all. Samples are independent."""
    x_0 = np.random.default_rng(seed).normal(size=(3, 2))
    denoiser = Wrong(schedule, x_0, schedule.sigma(np.arange(schedule.T)))

    def bound(**options):
        return variational_bound(denoiser, x_0, streams=Streams(7, 3), decoder=GaussianDensity(1.0), **options)
    np.testing.assert_allclose(bound(terms=terms).steps, bound().steps, rtol=1e-7)


def test_a_sample_s_bound_does_not_depend_on_the_batch_and_each_draws_its_own_times():
    schedule = schedules.cosine(50)
    x_0 = np.random.default_rng(0).normal(size=(4, 3))
    denoiser = GaussianDenoiser(schedule, np.zeros(3), np.ones(3))

    def steps(part):
        return variational_bound(denoiser, x_0[part], streams=Streams(7, 4)[part], decoder=GaussianDensity(1.0),
                                 terms=2).total
    assert np.allclose(steps(slice(0, 4)), np.concatenate([steps(slice(0, 1)), steps(slice(1, 4))]), rtol=1e-12)
    x_0 = np.ones((40, 3))
    denoiser = Wrong(schedule, x_0, np.arange(50.0))
    drawn = variational_bound(denoiser, x_0, streams=Streams(7, 40), decoder=GaussianDensity(1.0), terms=1).steps
    assert len(np.unique(drawn)) > 10


# ---- law 19: tight on Gaussian data ----------------------------------------------------------------------------

@pytest.mark.law(19, "E[L_T + sum L_{t-1} - log p(x_0|x_{t=0})] = H(x_0) + KL(q(x_{T-1}) || N(0, 1)), if p is exact",
                 source="the chain rule of the divergence; every term is quadratic in x_0 and eps, so 3 Gauss-Hermite "
                        "nodes a variable are exact",
                 tolerance="1e-12, and 1e-17 / beta_t for each step: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} is "
                           "rounded to 1e-16; the largest seen in 150 schedules is 6e-14")
@few
@given(any_schedule(ends_at_zero=None), st.floats(-1.5, 1.5), st.floats(0.05, 3.0), seeds)
def test_the_bound_is_tight_for_gaussian_data(schedule, mu, s, seed):
    mean, s = np.array([mu, -mu / 2]), np.array([s, 1.0])   # two pixels, each of a variance of its own
    denoiser = GaussianDenoiser(schedule, mean, s**2)
    abar = np.concatenate([schedule.alpha_bar, [1.0]])      # abar[-1] is the clean image's

    def exact(of, t, r):
        # (x_r, x_t) are jointly Gaussian with covariance alpha_tr V_r:  Var(x_r | x_t) = V_r (1 - alpha_tr^2) / V_t
        V = [abar[i] * s**2 + 1 - abar[i] for i in (r, t)]
        return V[0] * (1 - abar[t] / abar[r]) / V[1]

    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    x_0, eps = np.meshgrid(nodes, nodes)
    x_0 = mean + s * x_0.reshape(9, 1)                      # both pixels at once: they are independent
    eps = np.repeat(eps.reshape(9, 1), 2, axis=1)
    w = np.outer(weights, weights).ravel() / weights.sum() ** 2

    nelbo = sum(w @ reverse_kl(denoiser, x_0, np.full(9, t), eps, variance=exact) for t in range(1, schedule.T))
    # the rest from the function that users call, its one eps from a stream that we choose
    whole = variational_bound(denoiser, x_0, streams=Given(eps), decoder=GaussianDensity(exact(schedule, 0, -1)),
                              variance=exact)
    assert w @ whole.steps == pytest.approx(nelbo, rel=1e-12, abs=1e-12)
    V = abar[-2] * s**2 + 1 - abar[-2]
    entropy = stats.norm.entropy(mean, s).sum()
    start = ((V + abar[-2] * mean**2 - 1 - np.log(V)) / 2).sum()
    assert w @ whole.total == pytest.approx(entropy + start, rel=0, abs=1e-12 + 1e-17 * (1 / schedule.betas).sum())


class Given:
    """Streams that give the same numbers at every call."""

    def __init__(self, numbers):
        self.numbers = numbers

    def normal(self, shape, dtype):
        return self.numbers.astype(dtype)

    def __len__(self):
        return len(self.numbers)


@pytest.mark.law("19a", "no variance loses less on Gaussian data than beta~_t + c_0^2 Var[x_0|x_t]",
                 source="law 19: the bound is an entropy plus divergences, 0 at the exact chain",
                 tolerance="none: an inequality, by a factor of 1.3 either way")
@pytest.mark.parametrize("factor", [1 / 1.3, 1.3])
def test_any_other_variance_loses(factor):
    schedule, s = schedules.cosine(20), 0.7
    denoiser, a = GaussianDenoiser(schedule, np.zeros(1), np.full(1, s**2)), schedule.alpha_bar

    def exact(of, t, r):
        return (a[r] * s**2 + 1 - a[r]) * (1 - a[t] / a[r]) / (a[t] * s**2 + 1 - a[t])
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    x_0, eps = (m.reshape(9, 1) for m in np.meshgrid(s * nodes, nodes))
    w = np.outer(weights, weights).ravel()
    for t in range(1, 20):
        best, other = (w @ reverse_kl(denoiser, x_0, np.full(9, t), eps, variance=lambda *a, k=k: k * exact(*a))
                       for k in (1.0, factor))
        assert best < other


# ---- law 20: in continuous time only the ends count ------------------------------------------------------------

WARPS = {
    "straight": lambda u: u,
    "slow first": lambda u: (u + 3 * u**2) / 4,
    "fast first": lambda u: np.log1p(u) / math.log(2),
    "sine": lambda u: np.sin(np.pi * u / 2),
}
cached_beta_tilde = lru_cache(None)(beta_tilde)


def warped(warp, steps, high, low):
    """A schedule of `steps` steps whose log-SNR falls from high to low, as its warp likes to."""
    return Schedule(special.expit(high + (low - high) * WARPS[warp](np.arange(steps + 1) / steps)))


def mean_of_terms(denoiser, x_0, w, eps, phi):
    """Every E[L_{t-1}] by quadrature: x_0 (n, 1) and eps (m,), with weights w and phi."""
    T, n, m = denoiser.schedule.T, len(x_0), len(eps)
    t = np.repeat(np.arange(1, T), n * m)
    x = np.tile(np.repeat(x_0, m, axis=0), (T - 1, 1))
    kl = reverse_kl(denoiser, x, t, np.tile(eps, (T - 1) * n)[:, None], variance=cached_beta_tilde)
    return kl.reshape(T - 1, n, m) @ phi @ w     # (T-1,)


@pytest.mark.law(20, "sum L_{t-1} -> 1/2 int mmse dSNR = 1/2 log((1 + s^2 SNR_max) / (1 + s^2 SNR_min)), whatever "
                     "the schedule between", source="VDM eq. 18; Gaussian data, mmse = s^2 / (1 + s^2 SNR)",
                 tolerance="the sum lies above the integral by at most the gap between upper and lower sums, "
                           "1/2 sum dSNR dmmse, in closed form; and it falls as 1/steps, to 2 %")
@pytest.mark.parametrize("warp", WARPS)
def test_the_continuous_bound_depends_on_the_ends_alone(warp):
    s, high, low, gaps = 0.6, 5.0, -5.0, []
    exact = 0.5 * (math.log1p(s**2 * math.exp(high)) - math.log1p(s**2 * math.exp(low)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact: every term is quadratic in x_0 and eps
    weights = weights / weights.sum()
    for steps in (400, 800):
        schedule = warped(warp, steps, high, low)
        terms = mean_of_terms(GaussianDenoiser(schedule, [0.3], [s**2]), 0.3 + s * nodes[:, None], weights, nodes,
                              weights)
        snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
        mmse = s**2 / (1 + s**2 * snr)
        np.testing.assert_allclose(terms, (snr[:-1] - snr[1:]) * mmse[1:] / 2, rtol=1e-9)
        gaps.append(terms.sum() - exact)
        between_sums = ((snr[:-1] - snr[1:]) * np.diff(mmse)).sum() / 2
        assert 0 < gaps[-1] < between_sums
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)  # the gap is of first order in the length of a step


@pytest.mark.law(20, "1/2 int mmse dSNR = I(x_0; x_t)", source="Guo, Shamai & Verdu 2005, theorem 1",
                 tolerance="1e-4: extrapolation from 60, 120 and 240 steps takes the errors 1/N and 1/N^2 away")
@pytest.mark.parametrize("warp", WARPS)
def test_half_the_integral_of_the_mmse_is_the_mutual_information(warp):
    """Data: three points. I(x_0; x_t) = h(x_t) - h(sigma eps), its first entropy by scipy's quadrature."""
    points = np.array([-1.0, 0.2, 0.9])

    def information(log_snr):
        alpha, sigma = math.sqrt(special.expit(log_snr)), math.sqrt(special.expit(-log_snr))

        def surprise(x):
            p = stats.norm.pdf(x, alpha * points, sigma).mean()
            return -p * math.log(p) if p > 0 else 0.0
        h, _ = integrate.quad(surprise, -1 - 9 * sigma, 1 + 9 * sigma, limit=500, epsabs=1e-11,
                              points=list(alpha * points))
        return h - stats.norm.entropy(scale=sigma)
    eps = np.linspace(-7, 7, 57)                            # the trapezoid rule: errors fall faster than any power
    phi = np.exp(-eps**2 / 2)
    a, b, c = (mean_of_terms(DatasetDenoiser(warped(warp, steps, 4.0, -6.0), points[:, None]), points[:, None],
                             np.full(3, 1 / 3), eps, phi / phi.sum()).sum() for steps in (60, 120, 240))
    assert (a - 6 * b + 8 * c) / 3 == pytest.approx(information(4.0) - information(-6.0), abs=1e-4)


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
                 tolerance="1e-12: closed forms; for the Gaussian (width/sigma)^2 / 24 nats, the bin's curvature")
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
                 tolerance="2e-4 bits: the ODE's error at 800 steps, and four times as much at 400")
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


# ---- law 22: the density of the flow ---------------------------------------------------------------------------

def closed_log_prob(schedule, low, mean, cov, x):
    """The density at `low` that the flow of Gaussian data makes of N(0, I): x moves linearly, by sqrt(V_T / V_low)."""
    values, basis = np.linalg.eigh(cov)
    a, b = schedule.alpha_bar[low], schedule.alpha_bar[-1]
    stretch = np.sqrt((b * values + 1 - b) / (a * values + 1 - a))
    x_T = math.sqrt(b) * mean @ basis + stretch * ((x - math.sqrt(a) * mean) @ basis)
    return stats.norm.logpdf(x_T).sum(1) + np.log(stretch).sum()


@pytest.mark.law(22, "log p_t(x) = log N(x_{T-1}; 0, I) + int div v dphi, exact on Gaussian data",
                 source="Score SDE eq. 39; the flow is linear, its determinant prod sqrt(V_T / V_t)",
                 tolerance="3e-4 nats at 400 steps, and an error that falls as 1/N^2, to 3 %")
@pytest.mark.parametrize("schedule, low", [
    (schedules.cosine(8001), 0), (schedules.cosine(8001), 801),
    (schedules.zero_terminal_snr(schedules.log_snr_linear(8001, 6.0, -6.0)), 0),
    (schedules.log_snr_linear(8001, 5.0, -2.0, allow_signal=True), 0)],    # ends far from noise: the model's density
    ids=["cosine", "from a later time", "to SNR 0", "with signal at the end"])
def test_the_flow_s_density_is_exact_on_gaussians_at_second_order(schedule, low):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(3, 3))
    mean, cov, x = rng.normal(size=3), A @ A.T / 3 + 0.2 * np.eye(3), rng.normal(size=(4, 3))
    denoiser, errors = GaussianDenoiser(schedule, mean, cov), []
    for steps in (100, 200, 400):
        path = np.linspace(schedule.T - 1, low, steps + 1).astype(int)
        errors.append(log_prob(denoiser, x, path) - closed_log_prob(schedule, low, mean, cov, x))
    largest = np.abs(errors).max(axis=1)
    assert largest[2] < 3e-4
    assert largest[:2] / largest[1:] == pytest.approx([4, 4], rel=0.03)
    if schedule.alpha_bar[-1] < 1e-6:                       # then it is the density of the noised data
        a = schedule.alpha_bar[low]
        exact = stats.multivariate_normal(math.sqrt(a) * mean, a * cov + (1 - a) * np.eye(3)).logpdf(x)
        np.testing.assert_allclose(closed_log_prob(schedule, low, mean, cov, x), exact, atol=1e-4)


@pytest.mark.law(22, "log p_t(x) of the flow is the mixture's own log-density",
                 source="Score SDE eq. 39, against the sum of the components' densities",
                 tolerance="3e-4 nats at 600 steps, and an error that falls as 1/N^2, to 3 %")
def test_the_flow_s_density_is_exact_on_mixtures():
    schedule = schedules.zero_terminal_snr(schedules.log_snr_linear(4801, 5.0, -10.0))
    rng = np.random.default_rng(1)
    denoiser = MixtureDenoiser(schedule, [0.2, 0.5, 0.3], rng.normal(size=(3, 2)), rng.uniform(0.05, 0.5, size=(3, 2)))
    x, t = rng.normal(size=(20, 2)), np.zeros(20, int)
    errors = np.array([abs(log_prob(denoiser, x, np.linspace(4800, 0, steps + 1).astype(int))
                           - denoiser.log_prob(x, t)).max() for steps in (150, 300, 600)])
    assert errors[2] < 3e-4 and errors[:2] / errors[1:] == pytest.approx([4, 4], rel=0.03)
    only = (np.array([[False, True, False]] * 20),)         # a condition travels along
    got = log_prob(denoiser, x, np.linspace(4800, 0, 601).astype(int), only)
    np.testing.assert_allclose(got, denoiser.log_prob(x, t, only), atol=3e-3)    # of up to 82 nats


@pytest.mark.law("22a", "log q(x_t|x_0) - log p_t(x_t) - log p(x_0|x_t) = -log p(x_0) on Gaussian data, at every eps",
                 source="Bayes' rule, pointwise: exact dequantisation loses nothing",
                 tolerance="2e-3 nats: the ODE's error at 1,000 steps")
@pytest.mark.parametrize("low", [0, 700])
def test_the_flow_s_bound_is_tight_on_gaussians(low):
    schedule, mean, s = schedules.log_snr_linear(2001, 5.0, -14.0), np.array([0.4, -0.2]), np.array([0.5, 1.2])
    denoiser, rng = GaussianDenoiser(schedule, mean, s**2), np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 6, 2))
    a = schedule.alpha_bar[low]
    posterior = s**2 * (1 - a) / (a * s**2 + 1 - a)
    path = np.unique(np.linspace(2000, low, 1001).astype(int))[::-1]
    bound = flow_bound(denoiser, x_0, path, eps=eps, decoder=GaussianDensity(posterior))
    np.testing.assert_allclose(bound.total, -stats.norm.logpdf(x_0, mean, s).sum(1), atol=2e-3)
    x_t = q_sample(schedule, x_0, low, eps)
    np.testing.assert_allclose(bound.decoder, -stats.norm.logpdf(x_0, denoiser(x_t, np.full(6, low)),
                                                                 np.sqrt(posterior)).sum(1), rtol=1e-12)


def test_the_flow_s_bound_hands_on_the_condition_and_the_divergence():
    """A mixture held to one component is a Gaussian; one probe of a rotated Gaussian errs by its own amount."""
    schedule, rng = schedules.log_snr_linear(801, 5.0, -14.0), np.random.default_rng(0)
    means, s = np.array([[0.5, 0.0], [-1.0, 1.0]]), 0.6
    denoiser = MixtureDenoiser(schedule, [0.5, 0.5], means, [s**2, s**2])
    x_0, eps = rng.normal(size=(2, 4, 2))
    posterior = s**2 * (1 - schedule.alpha_bar[0]) / (schedule.alpha_bar[0] * s**2 + 1 - schedule.alpha_bar[0])
    path, decoder = times(schedule, 401, "linspace"), GaussianDensity(posterior)
    bound = flow_bound(denoiser, x_0, path, (np.array([[False, True]] * 4),), eps=eps, decoder=decoder)
    np.testing.assert_allclose(bound.total, -stats.norm.logpdf(x_0, means[1], s).sum(1), atol=1e-2)

    A, path = rng.normal(size=(2, 2)), times(schedule, 20)
    denoiser, probe = GaussianDenoiser(schedule, np.zeros(2), A @ A.T), Hutchinson.draw(Streams(0, 4), x_0)
    flows = [flow_bound(denoiser, x_0, path, eps=eps, decoder=decoder, divergence=d).flow for d in (probe, exact_trace)]
    x_t = q_sample(schedule, x_0, int(path[-1]), eps)
    densities = [log_prob(denoiser, x_t, path, divergence=d) for d in (probe, exact_trace)]
    np.testing.assert_allclose(flows[0] - flows[1], densities[1] - densities[0], rtol=1e-9)
    assert (abs(flows[0] - flows[1]) > 1e-3).all()


class Linear:
    """A denoiser with a Jacobian of our choice: x0_hat = M x, for any M, symmetric or not."""

    predicts = "x0"

    def __init__(self, schedule, M):
        self.schedule, self.M = schedule, M

    def __call__(self, x_t, t, cond=None):
        return (x_t.reshape(len(x_t), -1) @ self.M.T).reshape(x_t.shape)

    def vjp(self, x_t, t, dy, cond=None):
        return self(x_t, t), (dy.reshape(len(dy), -1) @ self.M).reshape(dy.shape)


@pytest.mark.law(22, "E z^T J z = tr J over signs z, with variance sum_{i<j} (J_ij + J_ji)^2: none if J is diagonal",
                 source="Hutchinson 1990; Score SDE eq. 40. All 2^D probes, each once",
                 tolerance="1e-10: sums of 16 and 256 products")
@few
@given(seeds)
def test_hutchinson_s_estimate_over_all_signs(seed):
    M = np.random.default_rng(seed).normal(size=(4, 4))
    schedule, x, t = schedules.cosine(10), np.ones((2, 2, 2)), np.zeros(2, int)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=4))).reshape(16, 1, 2, 2).repeat(2, axis=1)
    for J in (M, np.diag(np.diag(M))):
        denoiser = Linear(schedule, J)
        x0_hat, trace = Hutchinson(signs)(denoiser, x, t)
        np.testing.assert_allclose(trace, np.trace(J), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
        x0_hat, trace = exact_trace(denoiser, x, t)
        np.testing.assert_allclose(trace, np.trace(J), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
        each = np.array([Hutchinson(signs[k:k + 1])(denoiser, x, t)[1][0] for k in range(16)])
        variance = sum((J[i, j] + J[j, i]) ** 2 for i in range(4) for j in range(i))
        np.testing.assert_allclose(each.var(), variance, rtol=1e-9, atol=1e-20)


def test_probes_are_signs_each_sample_s_own():
    """Their mean over 40,000 is within 5 / sqrt(40,000) of 0: false alarm 6e-7."""
    z = Hutchinson.draw(Streams(3, 4), np.zeros((4, 100, 100), np.float32)).probes
    assert z.shape == (1, 4, 100, 100) and z.dtype == np.float32 and set(np.unique(z)) == {-1, 1}
    assert abs(z.mean()) < 5 / 200
    again = Hutchinson.draw(Streams(3, 4)[1:], np.zeros((3, 100, 100), np.float32), 2).probes
    assert np.array_equal(again[0], z[0, 1:]) and not np.array_equal(again[0], again[1]) and len(again) == 2


@pytest.mark.law(22, "the flow's density with one Hutchinson probe is that with the exact trace, if J is diagonal",
                 source="law 22", tolerance="1e-10: the same sums in another order")
def test_one_probe_is_enough_for_independent_pixels():
    schedule, rng = schedules.cosine(60), np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 2))
    path = times(schedule, 60)
    A = rng.normal(size=(4, 4))
    for cov, same in [(np.diag([0.3, 1.0, 2.0, 0.5]), True), (A @ A.T, False)]:
        denoiser = GaussianDenoiser(schedule, np.zeros((2, 2)), cov)
        exact = log_prob(denoiser, x, path)
        got = log_prob(denoiser, x, path, divergence=Hutchinson.draw(Streams(0, 3), x))
        assert (np.isclose(got, exact, rtol=1e-10) == same).all()


# ---- the derivative that the flow needs ------------------------------------------------------------------------

def by_differences(denoiser, x, t, dy, cond, h):
    """dy^T d x0_hat / d x_t by central differences of fourth order."""
    dx = np.zeros_like(x)
    for i in np.ndindex(x.shape[1:]):
        e = np.zeros_like(x)
        e[(slice(None), *i)] = h
        d = (8 * (denoiser(x + e, t, cond) - denoiser(x - e, t, cond))
             - (denoiser(x + 2 * e, t, cond) - denoiser(x - 2 * e, t, cond))) / (12 * h)
        dx[(slice(None), *i)] = (d * dy).reshape(len(x), -1).sum(1)
    return dx


def some_denoisers(schedule, rng):
    A = rng.normal(size=(4, 4))
    yield GaussianDenoiser(schedule, rng.normal(size=(2, 2)), A @ A.T), None
    yield GaussianDenoiser(schedule, rng.normal(size=(2, 2)), rng.uniform(0.1, 2, size=(2, 2))), None
    mixture = MixtureDenoiser(schedule, rng.dirichlet(np.ones(3)), rng.normal(size=(3, 2, 2)),
                              rng.uniform(0.05, 1, size=(3, 2, 2)))
    yield mixture, None
    yield mixture, (np.array([[True, False, True]] * 3),)
    yield DatasetDenoiser(schedule, rng.normal(size=(5, 2, 2))), None


@pytest.mark.law("11a", "dy^T d E[x_0|x_t] / d x_t = alpha/sigma^2 Cov[x_0|x_t] dy", source="Tweedie, differentiated; "
                 "central differences of fourth order with h = sigma / 1000",
                 tolerance="1e-6 of alpha/sigma times the data's size: 1e-16 / h of rounding, h^4 of truncation")
@few
@given(any_schedule(ends_at_zero=None), seeds)
def test_vjp_of_the_exact_denoisers(schedule, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    x_0, eps, dy = rng.normal(size=(3, 3, 2, 2))
    x_t, sigma = q_sample(schedule, x_0, t, eps), schedule.sigma(t)
    for denoiser, cond in some_denoisers(schedule, rng):
        x0_hat, dx_t = denoiser.vjp(x_t, t, dy, cond)
        np.testing.assert_allclose(x0_hat, denoiser(x_t, t, cond), rtol=1e-12, atol=1e-12)
        expected = by_differences(denoiser, x_t, t, dy, cond, 1e-3 * sigma.min())
        np.testing.assert_allclose(dx_t, expected, rtol=1e-6, atol=1e-6 / sigma.min())
        assert denoiser.vjp(x_t.astype(np.float32), t, dy.astype(np.float32), cond)[1].dtype == np.float32


@few
@given(any_schedule(), st.sampled_from(PREDICTIONS), seeds)
def test_vjp_of_a_network_whatever_it_predicts(schedule, predicts, seed):
    """Of out = tanh(M x + t), whose derivative is (1 - out^2) M; M is not symmetric."""
    rng = np.random.default_rng(seed)
    M, x, dy = rng.normal(size=(3, 3)), *rng.normal(size=(2, 4, 3))
    t = rng.integers(0, schedule.T, 4)

    def network(x_t, t, cond):
        return np.tanh(x_t @ M.T + t[:, None] / schedule.T)

    def network_vjp(x_t, t, dy, cond):
        out = network(x_t, t, cond)
        return out, ((1 - out**2) * dy) @ M
    denoiser = NetworkDenoiser(schedule, predicts, network, network_vjp=network_vjp)
    x0_hat, dx_t = denoiser.vjp(x, t, dy)
    np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
    expected = by_differences(denoiser, x, t, dy, None, 1e-3)
    np.testing.assert_allclose(dx_t, expected, rtol=1e-8, atol=1e-8 * abs(expected).max())


def test_vjp_of_the_text_to_image_network():
    """In float64, at random weights, against central differences in 3 random directions, sample by sample."""
    model = tiny.trained_a_little().astype(np.float64)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 28, 28, 1))
    t, cond = np.array([0, 20, 49]), model.encode(["a bold seven", "", "3"])
    denoiser = model.unguided()
    x0_hat, dx = denoiser.vjp(x, t, dy, cond)
    np.testing.assert_allclose(x0_hat, denoiser(x, t, cond), rtol=1e-10, atol=1e-12)
    for _ in range(3):
        e = 1e-4 * rng.normal(size=x.shape)
        d = (8 * (denoiser(x + e, t, cond) - denoiser(x - e, t, cond))
             - (denoiser(x + 2 * e, t, cond) - denoiser(x - 2 * e, t, cond))) / 12
        np.testing.assert_allclose((dx * e).sum((1, 2, 3)), (d * dy).sum((1, 2, 3)), rtol=1e-6, atol=1e-10)
    assert all(p.grad is None for p in model.parameters().values())


# ---- what is refused -------------------------------------------------------------------------------------------

def test_what_cannot_be_is_refused_in_a_sentence():
    schedule = schedules.cosine(10)
    denoiser = GaussianDenoiser(schedule, np.zeros(2), np.ones(2))
    x = np.zeros((3, 2))
    for bad in ([], [9, 9, 0], [0, 5, 9], [8, 0], [9, -1], [9, 3, 5]):
        with pytest.raises(ValueError, match="times must be integers that fall strictly from 9"):
            log_prob(denoiser, x, bad)
    with pytest.raises(ValueError, match="t must be at least 1"):
        reverse_kl(denoiser, x, np.array([1, 0, 2]), x)
    for terms in (0, -1):
        with pytest.raises(ValueError, match=f"terms must be None, for all, or at least 1, got {terms}"):
            variational_bound(denoiser, x, streams=Streams(0, 3), decoder=GaussianDensity(1.0), terms=terms)
    with pytest.raises(ValueError, match="streams must be .* 3 samples, got 2"):
        variational_bound(denoiser, x, streams=Streams(0, 2), decoder=GaussianDensity(1.0))
    with pytest.raises(ValueError, match="streams must be .* 3 samples, got 4"):
        Hutchinson.draw(Streams(0, 4), x)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma must be positive and finite"):
            DiscretisedGaussian(sigma)
        with pytest.raises(ValueError, match="variance must be positive and finite"):
            GaussianDensity(np.array([1.0, sigma]))
    for bad in (np.array([0.0]), np.array([-1 - 1 / 127.5]), np.array([1 + 1 / 127.5]), np.array([128], np.uint8),
                np.array([1]), np.array([np.nan]), np.array([1 / 255 + 2e-5])):
        with pytest.raises(ValueError, match="x_0 must be 8-bit values as floats"):
            DiscretisedGaussian(0.1)(bad, np.zeros(1))
    assert DiscretisedGaussian(0.1)(LEVELS.astype(np.float32), np.zeros(256)).shape == (256,)
    with pytest.raises(TypeError, match="denoiser must have a method vjp.*Wrong has none"):
        log_prob(Wrong(schedule, x, np.zeros(10)), x, [9, 0])
    for network in (NetworkDenoiser(schedule, "v", lambda x, t, c: x),
                    NetworkDenoiser(schedule, "v", lambda x, t, c: x, static_threshold, lambda x, t, dy, c: (x, dy))):
        with pytest.raises(TypeError, match="must have a network_vjp and no clip"):
            log_prob(network, x, [9, 0])


def test_one_time_is_enough():
    """T = 1: no L_{t-1} and no way to go, but a prior, a decoder and a density."""
    schedule = Schedule(np.array([0.01]))
    denoiser = GaussianDenoiser(schedule, np.zeros(1), np.ones(1))
    x = np.array([[0.5], [-1.0]])
    bound = variational_bound(denoiser, x, streams=Streams(0, 2), decoder=GaussianDensity(1.0), terms=3)
    assert np.array_equal(bound.steps, [0, 0]) and np.isfinite(bound.total).all()
    np.testing.assert_allclose(log_prob(denoiser, x, [0]), stats.norm.logpdf(x[:, 0]), rtol=1e-12)
