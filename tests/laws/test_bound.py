"""Laws 18 to 20: the variational bound, its terms, where it is tight, and its limit; and what likelihoods refuse."""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import LEVELS, Noise, few

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser
from minidiff.diffusion.likelihood import (
    DiscretisedGaussian,
    GaussianDensity,
    Hutchinson,
    draw_times,
    log_prob,
    reverse_kl,
    variational_bound,
)
from minidiff.diffusion.samplers import beta, beta_tilde
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams


class Wrong:
    """A denoiser whose x0_hat is x_0 + error[t] in every pixel, so that L_{t-1} does not depend on eps."""

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

@pytest.mark.law(18, "L_{t-1} = (SNR_{t-1} - SNR_t) ||x_0 - x0_hat||^2 / 2", source="VDM eq. 13",
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
    """x0_hat wrong by 1e-6 at SNR 1e4: the two means agree to 6 digits. The error is exact in float32: 2^-20."""
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
    # the denoiser gets x_0 through its condition, and would be off by 9 without it
    bound = variational_bound(Wrong(schedule, x_0 + 9, [error] * schedule.T), x_0, (x_0,), streams=SampleStreams(1, 3),
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
def test_random_terms_estimate_the_sum_without_bias(schedule, terms, seed):
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
    # with probabilities in proportion to the terms, the estimate has no error, whatever u
    for share in (0.0, 0.3, 1.0):
        assert sum(w * p[t - 1] for t, w in draw_times(schedule, terms, np.array([share]))) == pytest.approx(p.sum())


@few
@given(any_schedule(min_T=2), st.integers(1, 5), seeds)
def test_random_terms_of_a_network_whose_v_is_equally_wrong_everywhere(schedule, terms, seed):
    """x0_hat wrong by sigma_t, which is v wrong by 1: any few terms give the sum over all. Samples are independent."""
    x_0 = np.random.default_rng(seed).normal(size=(3, 2))
    denoiser = Wrong(schedule, x_0, schedule.sigma(np.arange(schedule.T)))

    def bound(**options):
        return variational_bound(denoiser, x_0, streams=SampleStreams(7, 3), decoder=GaussianDensity(1.0), **options)
    np.testing.assert_allclose(bound(terms=terms).steps, bound().steps, rtol=1e-7)


def test_a_sample_s_bound_does_not_depend_on_the_batch_and_each_draws_its_own_times():
    schedule = schedules.cosine(50)
    x_0 = np.random.default_rng(0).normal(size=(4, 3))
    denoiser = GaussianDenoiser(schedule, np.zeros(3), np.ones(3))

    def steps(part):
        return variational_bound(denoiser, x_0[part], streams=SampleStreams(7, 4)[part], decoder=GaussianDensity(1.0),
                                 terms=2).total
    assert np.allclose(steps(slice(0, 4)), np.concatenate([steps(slice(0, 1)), steps(slice(1, 4))]), rtol=1e-12)
    x_0 = np.ones((40, 3))
    denoiser = Wrong(schedule, x_0, np.arange(50.0))
    drawn = variational_bound(denoiser, x_0, streams=SampleStreams(7, 40), decoder=GaussianDensity(1.0), terms=1).steps
    assert len(np.unique(drawn)) > 10


# ---- law 19: tight on Gaussian data ----------------------------------------------------------------------------

@pytest.mark.law(19, "E[L_T + sum L_{t-1} - log p(x_0|x_{t=0})] = H(x_0) + KL(q(x_{T-1}) || N(0, 1)), if p is exact",
                 source="the chain rule of the divergence, for independent pixels; every term is quadratic in x_0 and "
                        "eps, so 3 Gauss-Hermite nodes a variable are exact",
                 tolerance="1e-12, and 1e-17 / beta_t for each step, a tenth of what beta_t = 1 - alpha_bar_t / "
                           "alpha_bar_{t-1}, rounded to 1e-16, could cost: measured, at most 6e-14 in 150 schedules")
@few
@given(any_schedule(ends_at_zero=None), st.floats(-1.5, 1.5), st.floats(0.05, 3.0), seeds)
def test_the_bound_is_tight_for_gaussian_data(schedule, mu, s, seed):
    mean, s = np.array([mu, -mu / 2]), np.array([s, 1.0])   # two pixels with different variances
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
    # the rest by the public function; its one eps comes from a stream that we choose
    whole = variational_bound(denoiser, x_0, streams=Noise(9, given=eps),
                              decoder=GaussianDensity(exact(schedule, 0, -1)), variance=exact)
    assert w @ whole.steps == pytest.approx(nelbo, rel=1e-12, abs=1e-12)
    V = abar[-2] * s**2 + 1 - abar[-2]
    entropy = stats.norm.entropy(mean, s).sum()
    start = ((V + abar[-2] * mean**2 - 1 - np.log(V)) / 2).sum()
    assert w @ whole.total == pytest.approx(entropy + start, rel=0, abs=1e-12 + 1e-17 * (1 / schedule.betas).sum())


@pytest.mark.law("19b", "correlated pixels leave a gap, sum_t -log(1 - rho_t^2) / 2, rho_t the correlation of x_{t-1} "
                        "given x_t; in the eigenbasis of their covariance there is none",
                 source="KL(N(m, S) || N(m, diag S)) = -log det(correlation) / 2 a step, S = V_s - alpha_ts^2 V_s "
                        "V_t^-1 V_s by dense algebra; 3 Gauss-Hermite nodes a variable are exact",
                 tolerance="1e-9: at steps as short as those of cosine(10) nothing cancels")
@pytest.mark.parametrize("rho", [0.9, -0.5])
def test_correlated_pixels_leave_a_gap_and_their_eigenbasis_none(rho):
    """Bug: a bound called tight on all Gaussian data."""
    schedule = schedules.cosine(10)
    abar = np.concatenate([schedule.alpha_bar, [1.0]])      # abar[-1] is the clean image's
    S = np.array([[1.0, 0.6 * rho], [0.6 * rho, 0.36]])
    values, basis = np.linalg.eigh(S)

    def given(t, s, S):
        """Cov[x_s | x_t]."""
        V_s, V_t = (abar[i] * S + (1 - abar[i]) * np.eye(2) for i in (s, t))
        return V_s - abar[t] / abar[s] * V_s @ np.linalg.solve(V_t, V_s)

    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z = np.stack(np.meshgrid(*[nodes] * 4), axis=-1).reshape(81, 4)
    w = np.prod(np.stack(np.meshgrid(*[weights] * 4), axis=-1).reshape(81, 4), axis=1) / weights.sum() ** 4
    mean = np.array([0.3, -0.2])
    x_0, eps = mean + z[:, :2] @ np.linalg.cholesky(S).T, z[:, 2:]

    def expected_bound(x_0, eps, mean, S):
        bound = variational_bound(GaussianDenoiser(schedule, mean, S), x_0, streams=Noise(81, given=eps),
                                  variance=lambda _, t, s: np.diag(given(t, s, S)),
                                  decoder=GaussianDensity(np.diag(given(0, -1, S))))
        return w @ bound.total
    V = abar[-2] * S + (1 - abar[-2]) * np.eye(2)
    least = stats.multivariate_normal(mean, S).entropy() + (
        np.trace(V) + abar[-2] * mean @ mean - 2 - math.log(np.linalg.det(V))) / 2
    steps = [given(t, t - 1, S) for t in range(10)]
    gap = sum(-math.log(1 - C[0, 1] ** 2 / (C[0, 0] * C[1, 1])) for C in steps) / 2
    assert gap > 0.01
    assert expected_bound(x_0, eps, mean, S) - least == pytest.approx(gap, rel=1e-9)
    turned = expected_bound(x_0 @ basis, eps @ basis, mean @ basis, np.diag(values))
    assert turned == pytest.approx(least, rel=1e-9)


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
    """A schedule of `steps` steps whose log-SNR falls from high to low along the curve WARPS[warp]."""
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


# ---- what is refused -------------------------------------------------------------------------------------------

def test_impossible_arguments_are_refused_in_one_sentence():
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
            variational_bound(denoiser, x, streams=SampleStreams(0, 3), decoder=GaussianDensity(1.0), terms=terms)
    with pytest.raises(ValueError, match="streams must be .* 3 samples, got 2"):
        variational_bound(denoiser, x, streams=SampleStreams(0, 2), decoder=GaussianDensity(1.0))
    with pytest.raises(ValueError, match="streams must be .* 3 samples, got 4"):
        Hutchinson.draw(SampleStreams(0, 4), x)
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
        with pytest.raises(TypeError, match="must have a network_vjp, and no clip"):
            log_prob(network, x, [9, 0])


def test_one_time_is_enough():
    """T = 1: there is no L_{t-1} and no step, but a prior, a decoder and a density."""
    schedule = Schedule(np.array([0.01]))
    denoiser = GaussianDenoiser(schedule, np.zeros(1), np.ones(1))
    x = np.array([[0.5], [-1.0]])
    bound = variational_bound(denoiser, x, streams=SampleStreams(0, 2), decoder=GaussianDensity(1.0), terms=3)
    assert np.array_equal(bound.steps, [0, 0]) and np.isfinite(bound.total).all()
    np.testing.assert_allclose(log_prob(denoiser, x, [0]), stats.norm.logpdf(x[:, 0]), rtol=1e-12)
