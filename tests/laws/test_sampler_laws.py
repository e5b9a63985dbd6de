"""Samplers (laws 23, 24, 26 to 28, and two of law 25): from noise to data, one step and all of them.

Against the marginals that each step must keep, exact flows of Gaussians, the papers' own forms, and random samples.
The orders at which samplers converge are in test_convergence.py.
"""

import math
from itertools import groupby

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import solve_ivp
from scipy.spatial.distance import cdist
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import (
    Noise,
    alpha_sigma,
    covariance,
    fitted_order,
    matrix_of,
    quickly,
    rotation,
    schedule_and_list,
    start,
)

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.multistep import dpm_solver_pp_2m_sde
from minidiff.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    beta,
    beta_tilde,
    ddim,
    ddim_inverse,
    ddpm,
    dpm_solver_pp_2m,
    sample,
    times,
)
from minidiff.engine.random import SampleStreams

DETERMINISTIC = {name: sampler for name, sampler in SAMPLERS.items() if not sampler.noise}


def marginal_variance(schedule, t, s2):
    """V = alpha^2 s^2 + sigma^2."""
    alpha, sigma = alpha_sigma(schedule, t)
    return alpha**2 * s2 + sigma**2


def gaussian_1d(schedule, s2, mean=0.0):
    return GaussianDenoiser(schedule, np.array([mean]), np.array([s2]))


# ---- law 23: DDIM keeps the marginals for every eta ----------------------------------------------------------

@pytest.mark.law(
    23, "DDIM keeps q(x_s|x_0) for every eta: (sqrt(1 - abar_s - sigma^2))^2 + sigma^2 = 1 - abar_s, "
        "sigma eta times the exact posterior's deviation",
    source="DDIM eq. 12, 16; the posterior by adding precisions: 1/var = alpha_ts^2/sigma2_ts + 1/sigma_s^2",
    tolerance="1e-8: eps_hat divides a difference rounded at 1e-16 by sigma, and 1 - abar by powers of 6e-6")
@quickly
@given(schedule_and_list(ends_at_zero=None), st.floats(0, 1))
def test_ddim_keeps_the_marginals_for_every_eta(schedule_and_list, eta):
    """On a point of data, where x_s = alpha_s x_0 + (a number) eps + (a number) z, read off with unit eps and z.
    Bugs: the direction with sigma_s for sqrt(sigma_s^2 - sigma^2), or with its sign reversed; a previous time that
    is not the list's next."""
    schedule, ts = schedule_and_list
    x_0 = 0.7
    point = gaussian_1d(schedule, 0.0, x_0)
    for t, s in zip(ts, [*ts[1:], -1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
        eps, z = np.array([[0.0], [1], [0]]), np.array([[0.0], [0], [1]])
        x_t = alpha_t * x_0 + sigma_t * eps
        x_s = next(ddim(point, x_t, [v for v in ts if v <= t], eta=eta, streams=Noise(3, given=z))).x_t[:, 0]
        clean, of_eps, of_z = x_s[0], x_s[1] - x_s[0], x_s[2] - x_s[0]
        np.testing.assert_allclose(clean, alpha_s * x_0, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(of_eps**2 + of_z**2, sigma_s**2, rtol=1e-8, atol=1e-9)
        if s >= 0:
            ratio = alpha_t**2 / alpha_s**2
            exact = 1 / (ratio / (1 - ratio) + 1 / sigma_s**2)
            np.testing.assert_allclose(of_z, eta * math.sqrt(exact), rtol=1e-8, atol=1e-9)
            assert of_eps >= 0


@pytest.mark.law(
    23, "eta = 1 is the ancestral sampler with variance beta~, state by state, on any list of times",
    source="DDIM section 4.1; two samplers of the code with the same streams",
    tolerance="1e-8: as above")
@quickly
@given(schedule_and_list(ends_at_zero=None), seeds)
def test_ddim_at_eta_1_is_ddpm(schedule_and_list, seed):
    """Bug: the full chain's beta on a respaced chain."""
    schedule, ts = schedule_and_list
    rng = np.random.default_rng(seed)
    denoiser = MixtureDenoiser(schedule, [0.3, 0.7], rng.normal(size=(2, 2)), [0.1, 0.5])
    x_T = rng.normal(size=(3, 2))
    a = ddpm(denoiser, x_T, ts, streams=SampleStreams(seed, 3))
    b = ddim(denoiser, x_T, ts, eta=1.0, streams=SampleStreams(seed, 3))
    for ours, other in zip(a, b, strict=True):
        assert ours.t == other.t
        np.testing.assert_allclose(ours.x_t, other.x_t, rtol=1e-8, atol=1e-8)


# ---- law 24: one step ----------------------------------------------------------------------------------------

@pytest.mark.law(
    24, "x_0 ~ N(mu, S): one DDIM step takes x_t - alpha_t mu to (alpha_s alpha_t S + sigma_s sigma_t I) V_t^-1 of it",
    source="derived from law 12: alpha_s x0_hat + sigma_s eps_hat; a dense solve",
    tolerance="1e-7: V's condition of up to 10/6e-6, times 1e-16 and 30 of cancellation")
@quickly
@given(schedule_and_list(ends_at_zero=None, fewest=2), st.integers(1, 3), seeds)
def test_one_ddim_step_on_gaussian_data(schedule_and_list, D, seed):
    schedule, (t, s, *_) = schedule_and_list
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    rng = np.random.default_rng(seed)
    mean, S, x = rng.normal(size=D), covariance(rng, D), rng.normal(size=(2, D))
    state = next(ddim(GaussianDenoiser(schedule, mean, S), x, [t, s]))
    V = alpha_t**2 * S + sigma_t**2 * np.eye(D)
    step = np.linalg.solve(V, alpha_s * alpha_t * S + sigma_s * sigma_t * np.eye(D))      # the two commute
    np.testing.assert_allclose(state.x_t, alpha_s * mean + (x - alpha_t * mean) @ step, rtol=1e-7, atol=1e-7)
    assert (state.step, state.t) == (1, s)


@pytest.mark.law(
    24, "on a point of data every state is alpha x_0 + sigma eps: exact in one step, or in many, of any strides",
    source="eps_hat is eps there", tolerance="1e-8: a difference rounded at 1e-16, over sigma > .002, in 40 steps")
@quickly
@given(schedule_and_list(ends_at_zero=None), seeds)
def test_ddim_and_dpm_solver_are_exact_on_a_point_of_data(schedule_and_list, seed):
    """Bug: previous times by stride."""
    schedule, ts = schedule_and_list
    x_0, eps = np.random.default_rng(seed).normal(size=(2, 3, 2))
    point = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: x_0)
    alpha, sigma = alpha_sigma(schedule, ts[0])
    for sampler in (ddim, dpm_solver_pp_2m):
        for state in sampler(point, alpha * x_0 + sigma * eps, ts):
            alpha_t, sigma_t = alpha_sigma(schedule, state.t)
            np.testing.assert_allclose(state.x_t, alpha_t * x_0 + sigma_t * eps, rtol=1e-8, atol=1e-8)


# ---- law 25: the flow that samplers approach; their orders are in test_convergence.py ------------------------

NS = np.array([16, 32, 64, 128, 256])
FINE = schedules.log_snr_linear(16 * 256 + 1, 18.0, -9.0)         # every N divides it; ends at sigma = 1.2e-4


@pytest.mark.law(
    25, "every state of an irregular list follows the flow of Gaussian data, a factor sqrt(V_s/V_t)",
    source="the probability-flow ODE, Score SDE eq. 13, solved in closed form",
    tolerance="2 % for first order, .1 % for second: 401 irregular steps over a log-SNR of 27")
@pytest.mark.law(
    26, "each step's previous time is the next entry of its own list",
    source="as law 25", tolerance="as law 25; a wrong time is off by at least 10 %")
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_state_of_an_irregular_list_follows_the_exact_flow(name, seed):
    rng = np.random.default_rng(seed)
    ts = [FINE.T - 1, *sorted(rng.choice(FINE.T - 1, 400, replace=False), reverse=True)]
    s2 = 4.0
    for state in DETERMINISTIC[name](gaussian_1d(FINE, s2), np.array([[1.0]]), ts):
        exact = math.sqrt(marginal_variance(FINE, state.t, s2) / marginal_variance(FINE, FINE.T - 1, s2))
        np.testing.assert_allclose(state.x_t[0, 0], exact, rtol=0.02 if DETERMINISTIC[name].order < 2 else 1e-3)


@pytest.mark.law(
    25, "DDIM is DPM-Solver-1: x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps_hat, h = lambda_s - lambda_t; "
        "and it is the first step of DPM-Solver++(2M)",
    source="DPM-Solver eq. 3.7", tolerance="1e-6: e^h of up to 1e5, from logarithms rounded at 1e-16/6e-6")
@quickly
@given(schedule_and_list(fewest=2), seeds)
def test_ddim_is_dpm_solver_1(schedule_and_list, seed):
    schedule, (t, s, *_) = schedule_and_list
    assume(schedule.alpha_bar[t] > 1e-8)                           # e^h is lost in rounding beyond that
    x = np.random.default_rng(seed).normal(size=(3, 1))
    denoiser = gaussian_1d(schedule, 0.5)
    step = next(ddim(denoiser, x, [t, s]))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    h = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)
    eps = (x - alpha_t * step.x0_hat) / sigma_t
    dpm_solver_1 = alpha_s / alpha_t * x - sigma_s * math.expm1(h) * eps
    np.testing.assert_allclose(step.x_t, dpm_solver_1, rtol=1e-6, atol=1e-9)
    first_of_2m = next(dpm_solver_pp_2m(denoiser, x, [t, s]))
    np.testing.assert_allclose(first_of_2m.x_t, step.x_t, rtol=1e-9, atol=1e-12)


@pytest.mark.law(
    40, "a step of DPM-Solver++(2M) SDE solves the reverse SDE with x0_hat held at D, its value at lambda_t + h/2 if "
        "it is linear in lambda; in the first step D is x0_hat",
    source="d mean/d lambda = (sigma^2 - 2) mean + 2 alpha D, d var/d lambda = 2 (sigma^2 - 2) var + 2 sigma^2, "
           "from DPM-Solver++'s SDE; by scipy's DOP853",
    tolerance="1e-7: rtol 1e-10, and r from differences of lambda")
@quickly
@given(schedule_and_list(fewest=2), st.floats(-2, 2))
def test_the_steps_of_the_sde_solver(schedule_and_list, slope):
    """Bugs: the ODE's e^{-h} for the SDE's e^{-2h}; the variance for its root; r upside down."""
    schedule, ts = schedule_and_list
    def half_log_snr(t):
        return math.log(np.divide(*alpha_sigma(schedule, t)))

    linear = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: np.full((2, 1), 0.7 + slope * half_log_snr(t[0])))
    x_t = np.array([[1.0], [1.0]])                          # the second sample gets noise of 1
    steps = dpm_solver_pp_2m_sde(linear, x_t, ts, streams=Noise(2, given=np.array([[0.0], [1.0]])))
    for state, t, s in zip(steps, ts, ts[1:3], strict=False):
        start, end = half_log_snr(t), half_log_snr(s)
        D = 0.7 + slope * (start + ((end - start) / 2 if state.step > 1 else 0))

        def moments(lam, y, D=D):
            alpha2, sigma2 = 1 / (1 + math.exp(-2 * lam)), 1 / (1 + math.exp(2 * lam))
            mean, variance = y
            return (sigma2 - 2) * mean + 2 * math.sqrt(alpha2) * D, 2 * (sigma2 - 2) * variance + 2 * sigma2
        mean, variance = solve_ivp(moments, (start, end), [x_t[0, 0], 0], method="DOP853", rtol=1e-10,
                                   atol=1e-12).y[:, -1]
        np.testing.assert_allclose(state.x_t[0, 0], mean, rtol=1e-7, atol=1e-7)
        shrunk = (state.x_t[1, 0] - state.x_t[0, 0]) - (x_t[1, 0] - x_t[0, 0]) * contraction(schedule, t, s)
        np.testing.assert_allclose(shrunk**2, variance, rtol=1e-7, atol=1e-9)
        x_t = state.x_t


def contraction(schedule, t, s):
    """sigma_s / sigma_t e^{-h}: by what the SDE multiplies a difference of two samples that have one x0_hat."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    return sigma_s**2 * alpha_t / (sigma_t**2 * alpha_s)


# ---- law 26: where samplers start and end --------------------------------------------------------------------

@pytest.mark.law(
    26, "every sampler asks the denoiser at each time of its list, from the last training step down, and ends at "
        "sigma = 0: its last state is x0_hat, without noise",
    source="the definition of a trajectory; overflow, division by zero and NaN raise", tolerance="exact")
@quickly
@given(schedule_and_list(ends_at_zero=None), st.sampled_from(sorted(SAMPLERS)), seeds)
def test_every_sampler_walks_its_list_and_ends_without_noise(schedule_and_list, name, seed):
    """Bugs: noise at the last step; none at the step before it; -inf at sigma = 0 in the last DPM-Solver step, and
    at SNR 0."""
    schedule, ts = schedule_and_list
    rng = np.random.default_rng(seed)
    exact = DatasetDenoiser(schedule, rng.normal(size=(3, 2)))
    asked = []
    denoiser = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: asked.append(t) or exact(x_t, t))
    noise = Noise(4, rng)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        states = list(start(SAMPLERS[name], denoiser, rng.normal(size=(4, 2)), ts, noise))
    assert [state.t for state in states] == [*ts[1:], -1]
    assert [state.step for state in states] == list(range(1, len(ts) + 1))
    np.testing.assert_array_equal(states[-1].x_t, states[-1].x0_hat)
    assert all(np.isfinite(state.x_t).all() for state in states)
    assert all(t.shape == (4,) and (t == t[0]).all() for t in asked)
    asked = [int(t[0]) for t in asked]
    # a method of more calls also calls at s, and in the next step again; the last step is one call
    assert [t for t, _ in groupby(asked)] == ts
    more = len(asked) - SAMPLERS[name].calls * (len(ts) - 1) - 1
    assert more in (0, SAMPLERS[name].first_calls)
    assert noise.calls == (len(ts) - 1 if SAMPLERS[name].noise else 0)


@pytest.mark.law(
    26, "for every N and every spacing the list has N times, begins at T-1, falls strictly, and stays above -1",
    source="the definition of a list of times", tolerance="exact")
@quickly
@given(any_schedule(ends_at_zero=None), st.data(), st.sampled_from(sorted(SPACINGS)))
def test_times_begin_at_the_last_and_fall_strictly(schedule, data, spacing):
    """Bugs: leading spacing from 980 of 1000, or past the table."""
    N = data.draw(st.integers(1, schedule.T))
    ts = times(schedule, N, spacing)
    assert ts.shape == (N,) and ts.dtype.kind == "i"
    assert ts[0] == schedule.T - 1 and ts[-1] >= 0 and (np.diff(ts) < 0).all()


# ---- law 27: the distribution of samples ---------------------------------------------------------------------

def assert_normal(x, mean, variance):
    """Mean and variance of x as those of n draws from N(mean, variance); false alarm 1e-7 for the two."""
    n = x.size
    z = (x.mean() - mean) / math.sqrt(variance / n)
    chi2 = stats.chi2.cdf(((x - mean) ** 2).sum() / variance, n)
    assert 2 * stats.norm.sf(abs(z)) > 5e-8, f"mean {x.mean()} for {mean}"
    assert 2.5e-8 < chi2 < 1 - 2.5e-8, f"variance {((x - mean) ** 2).mean()} for {variance}"


@pytest.mark.law(
    27, "ancestral steps of variance beta~ on a point, of beta on N(mu, 1): each state is N(alpha mu, V), in few steps",
    source="law 16; 20,000 draws", tolerance="z and chi-squared tests at 1e-7: false alarm 5e-7 for five states")
@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("variance, s2", [(beta_tilde, 0.0), (beta, 1.0)])
@pytest.mark.parametrize("ts", [[199, 120, 119, 60, 7], [199]])
def test_ancestral_variances_are_exact_where_ddpm_says_so(variance, s2, ts, seed):
    """Bugs: no noise at the step before the last, the full chain's beta on a respaced chain. The last state is
    E[x_0 | x_t], of variance alpha_t^2 where s = 1."""
    schedule, mu, n = schedules.cosine(200), 0.8, 20_000
    rng = np.random.default_rng(seed)
    alpha, sigma = alpha_sigma(schedule, ts[0])
    x_T = alpha * mu + math.sqrt(alpha**2 * s2 + sigma**2) * rng.standard_normal((n, 1))
    *states, last = ddpm(gaussian_1d(schedule, s2, mu), x_T, ts, streams=Noise(n, rng), variance=variance)
    for state in states:
        alpha = alpha_sigma(schedule, state.t)[0]
        assert_normal(state.x_t, alpha * mu, marginal_variance(schedule, state.t, s2))
    if s2 == 0:
        np.testing.assert_array_equal(last.x_t, mu)
    else:
        assert_normal(last.x_t, mu, alpha_sigma(schedule, ts[-1])[0] ** 2)


@pytest.mark.law(
    27, "with the exact denoiser a deterministic sampler's samples have the data's mean mu and covariance S",
    source="the sampler's own affine map x_0 = M x_T + b, which must have M M^T = S and b = mu; no chance in it",
    tolerance="5 % of a variance for first order, 1 % for second, at 250 steps; measured: DDIM 3.7, Heun .54, 2M .036")
@pytest.mark.parametrize("seed", [3])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_map_from_noise_to_data_has_the_data_s_covariance(name, seed):
    schedule, rng = schedules.zero_terminal_snr(schedules.linear()), np.random.default_rng(seed)
    Q = rotation(rng, 3)
    mean, S = rng.normal(size=3), Q * np.array([0.3, 1.0, 1.7]) ** 2 @ Q.T
    denoiser, ts = GaussianDenoiser(schedule, mean, S), times(schedule, 250)

    def run(x_T):
        return sample(DETERMINISTIC[name](denoiser, x_T, ts))

    M, allowed = matrix_of(run, 3), 0.05 if DETERMINISTIC[name].order < 2 else 0.01
    np.testing.assert_allclose(run(np.zeros((1, 3)))[0], mean, rtol=0, atol=0.02 if allowed > 0.01 else 1e-3)
    whitened = np.linalg.solve(np.linalg.cholesky(S), M)           # its M M^T would be the identity
    np.testing.assert_allclose(whitened @ whitened.T, np.eye(3), rtol=0, atol=allowed)


@pytest.mark.law(
    27, "with the exact denoiser ancestral samples of N(mu, S) have mean mu and covariance S, S full",
    source="4,000 draws, whitened by S; their mean, and variances in six directions, which fix a covariance",
    tolerance="7 standard errors, 1.2 of them for the error of 300 steps: false alarm 2e-7 (nine checks)")
@pytest.mark.parametrize("seed", [4])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_samples_of_a_gaussian_have_its_mean_and_covariance(eta, seed):
    """The mean of n normals has deviation 1/sqrt(n), and their mean square sqrt(2/n), with a tail somewhat heavier
    than normal: beyond 5.8 of them lies 2e-8. By law 23, eta = 1 is ddpm."""
    schedule, n, rng = schedules.cosine(300), 4000, np.random.default_rng(seed)
    Q = rotation(rng, 3)
    mean, S = rng.normal(size=3), Q * np.array([0.5, 1.0, 1.6]) ** 2 @ Q.T
    denoiser, x_T = GaussianDenoiser(schedule, mean, S), rng.standard_normal((n, 3))
    x = sample(ddim(denoiser, x_T, times(schedule, 300), eta=eta, streams=Noise(n, rng)))
    z = np.linalg.solve(np.linalg.cholesky(S), (x - mean).T)       # (3, n), standard normal
    assert (abs(z.mean(1)) < 7 / math.sqrt(n)).all()
    e = np.eye(3)
    for direction in [*e, *((e[i] + e[j]) / math.sqrt(2) for i, j in ((0, 1), (0, 2), (1, 2)))]:
        assert abs(((direction @ z) ** 2).mean() - 1) < 7 * math.sqrt(2 / n)


def energy_statistic(x, y):
    """n/2 times the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, over E|X - Y|, for n samples of each.

    If X and Y have one distribution, it tends to a quadratic form of normals of mean 1, and P(it > c) <= P(z^2 > c)
    for every c > 1.54 (Szekely & Bakirov 2003), z standard normal.
    """
    between = cdist(x, y).mean()
    return len(x) / 2 * (2 * between - cdist(x, x).mean() - cdist(y, y).mean()) / between


@pytest.mark.law(
    27, "samples of a 2-D mixture have its distribution: three projections, mean, covariance, energy distance",
    source="Kolmogorov-Smirnov against known distribution functions; Szekely & Rizzo's energy test against exact draws",
    tolerance="5e-8 a projection, 1e-8 for the moments at 6 standard errors, 1e-7 for the energy: false alarm 3e-7")
@pytest.mark.parametrize("seed", [2])
@pytest.mark.parametrize("name", [*sorted(name for name in SAMPLERS if not SAMPLERS[name].consistency),
                                  "ddim, eta = .5"])
def test_samples_of_a_mixture_have_its_distribution(name, seed):
    schedule, n, rng = schedules.cosine(300), 4000, np.random.default_rng(seed)
    weights = np.array([0.2, 0.3, 0.5])
    means, sd = np.array([[-1.5, 0], [0.5, 1.5], [1, -1]]), np.array([[0.3, 0.8], [0.5, 0.3], [0.7, 0.5]])
    denoiser = MixtureDenoiser(schedule, weights, means, sd**2)
    second_order = name in SAMPLERS and SAMPLERS[name].order >= 2
    x_T, ts = rng.standard_normal((n, 2)), times(schedule, 75 if second_order else 300)
    if "eta" in name:
        x = sample(ddim(denoiser, x_T, ts, eta=0.5, streams=Noise(n, rng)))
    else:
        x = sample(start(SAMPLERS[name], denoiser, x_T, ts, Noise(n, rng)))

    for direction in np.array([[1, 0], [0, 1], [0.6, 0.8]]):
        def cdf(y, d=direction):
            return sum(w * stats.norm.cdf(y, m @ d, np.sqrt(s**2 @ d**2))
                       for w, m, s in zip(weights, means, sd, strict=True))
        assert stats.kstest(x @ direction, cdf).pvalue > 5e-8
    mu = weights @ means
    cov = np.einsum("k,ki,kj->ij", weights, means - mu, means - mu) + np.diag(weights @ sd**2)
    products = (x - mu)[:, :, None] * (x - mu)[:, None, :]
    for got, expected in ((x, mu), (products, cov)):
        assert (abs(got.mean(0) - expected) < 6 * got.std(0) / math.sqrt(n)).all()
    k = rng.choice(3, n // 2, p=weights)
    exact = means[k] + sd[k] * rng.standard_normal((n // 2, 2))
    assert energy_statistic(x[: n // 2], exact) < stats.chi2.isf(1e-7, 1)


# ---- law 28: each sample its own; DDIM backwards -------------------------------------------------------------

@pytest.mark.law(
    28, "a sample depends on its own stream only: each row of a batch of 5 is drawn again alone, and two together",
    source="the same trajectory, run twice", tolerance="1e-10: sums may be taken in another order")
@pytest.mark.parametrize("name", [*sorted(SAMPLERS), "ddim, eta = 1"])
def test_a_sample_does_not_depend_on_its_batch(name):
    """Bug: output depending on batch size."""
    schedule = schedules.linear(200, beta_max=0.1)
    denoiser = MixtureDenoiser(schedule, [0.4, 0.6], np.array([[0.0, 1], [1, -1]]), [0.1, 0.3])

    def run(part):
        streams = SampleStreams(7, 5)[part]
        x_T = streams.normal((2,), np.float64)
        if "eta" in name:
            return sample(ddim(denoiser, x_T, times(schedule, 10), eta=1.0, streams=streams))
        return sample(SAMPLERS[name](denoiser, x_T, times(schedule, 10), streams=streams))

    whole = run(slice(0, 5))
    assert len(np.unique(whole.round(9), axis=0)) == 5
    for part in [*(slice(i, i + 1) for i in range(5)), slice(1, 3)]:
        np.testing.assert_allclose(run(part), whole[part], rtol=1e-10, atol=1e-12)


@pytest.mark.law(
    28, "inverse DDIM after DDIM is the identity up to O(1/N), and its noise is the exact flow's, up to O(1/N)",
    source="DDIM eq. 13; the flow of Gaussian data in closed form",
    tolerance="order 1 within .1, fitted from N = 16 to 256: the remainder of the fit at N = 16")
def test_inverse_ddim_undoes_ddim_up_to_first_order():
    s2 = 4.0
    denoiser, x_T = gaussian_1d(FINE, s2, 0.3), np.array([[1.0], [-0.4]])
    lists = [times(FINE, N + 1, "linspace") for N in NS]
    there = [sample(ddim(denoiser, x_T, ts)) for ts in lists]
    back = [sample(ddim_inverse(denoiser, x, ts)) for x, ts in zip(there, lists, strict=True)]
    errors = [np.linalg.norm(x - x_T) for x in back]
    assert abs(fitted_order(errors, NS) - 1) < 0.1 and errors[-1] < 0.05

    x_0 = np.array([[1.3]])
    alpha, _ = alpha_sigma(FINE, FINE.T - 1)
    exact = alpha * 0.3 + math.sqrt(marginal_variance(FINE, FINE.T - 1, s2) / s2) * (x_0 - 0.3)
    errors = [abs(sample(ddim_inverse(denoiser, x_0, ts)) - exact)[0, 0] for ts in lists]
    assert abs(fitted_order(errors, NS) - 1) < 0.1 and errors[-1] < 0.05
    assert [state.t for state in ddim_inverse(denoiser, x_0, [7, 5, 2])] == [2, 5, 7]
    # each step calls the denoiser at its lower end; the first one, which starts without noise, at its upper end
    asked = []
    listening = NetworkDenoiser(FINE, "x0", lambda x_t, t, cond: asked.append(int(t[0])) or denoiser(x_t, t))
    sample(ddim_inverse(listening, x_0, [7, 5, 2]))
    assert asked == [2, 2, 5]
