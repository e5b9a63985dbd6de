"""The samplers against exact flows of Gaussians, Runge-Kutta, the papers' marginals, and chance."""

import math

import numpy as np
import pytest
from diffusion_strategies import any_schedule
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import solve_ivp

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser, NetworkDenoiser
from minidiff.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    beta,
    beta_tilde,
    ddim,
    ddim_inverse,
    ddpm,
    dpm_solver_pp_2m,
    heun,
    sample,
    times,
)
from minidiff.engine.backend import Streams

seeds = st.integers(0, 2**32 - 1)
quickly = settings(deadline=None, max_examples=30)
DETERMINISTIC = {name: sampler for name, sampler in SAMPLERS.items() if sampler is not ddpm}


class Noise:
    """Stands in for Streams: hands out given arrays, or those of one generator, which is fast; and counts."""

    def __init__(self, count, rng=None, given=None):
        self.count, self.rng, self.given, self.calls = count, rng, given, 0

    def __len__(self):
        return self.count

    def normal(self, shape, dtype):
        self.calls += 1
        if self.given is not None:
            return np.broadcast_to(self.given, (self.count, *shape)).astype(dtype)
        return self.rng.standard_normal((self.count, *shape)).astype(dtype)


def start(sampler, denoiser, x_T, ts, noise=None):
    """Any sampler, ancestral or not, by one call."""
    return sampler(denoiser, x_T, ts, **({"streams": noise or Noise(len(x_T), np.random.default_rng(0))}
                                         if sampler is ddpm else {}))


def alpha_sigma(schedule, t):
    abar = 1.0 if t == -1 else schedule.alpha_bar[t]
    return math.sqrt(abar), math.sqrt(1 - abar)


def marginal_variance(schedule, t, s2):
    """V = alpha^2 s^2 + sigma^2."""
    alpha, sigma = alpha_sigma(schedule, t)
    return alpha**2 * s2 + sigma**2


def gaussian_1d(schedule, s2, mean=0.0):
    return GaussianDenoiser(schedule, np.array([mean]), np.array([s2]))


@st.composite
def schedule_and_list(draw, ends_at_zero=False, fewest=1):
    """A schedule and any strictly falling list of its times, of no regular stride, from T-1 down."""
    schedule = draw(any_schedule(min_T=fewest, ends_at_zero=ends_at_zero))
    earlier = st.sampled_from(range(schedule.T - 1)) if schedule.T > 1 else st.nothing()
    rest = draw(st.sets(earlier, min_size=fewest - 1))
    return schedule, sorted(rest | {schedule.T - 1}, reverse=True)


# ---- law 23: DDIM keeps the marginals for every eta --------------------------------------------------------

@quickly
@given(schedule_and_list(ends_at_zero=None), st.floats(0, 1))
def test_ddim_keeps_the_marginals_for_every_eta(schedule_and_list, eta):
    """Law 23, on a point of data, where x_s = alpha_s x_0 + (a number) eps + (a number) z, read off with
    unit eps and z. Bugs: the direction with sigma_s for sqrt(sigma_s^2 - sigma^2), or with its sign reversed;
    a previous time that is not the list's next."""
    schedule, ts = schedule_and_list
    x_0 = 0.7
    point = gaussian_1d(schedule, 0.0, x_0)
    for t, s in zip(ts, [*ts[1:], -1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
        def step(eps, z, t=t, alpha_t=alpha_t, sigma_t=sigma_t):
            x_t = np.array([[alpha_t * x_0 + sigma_t * eps]])
            streams = Noise(1, given=z)
            return next(ddim(point, x_t, [v for v in ts if v <= t], eta=eta, streams=streams)).x_t[0, 0]
        clean = step(0, 0)
        of_eps, of_z = step(1, 0) - clean, step(0, 1) - clean
        np.testing.assert_allclose(clean, alpha_s * x_0, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(of_eps**2 + of_z**2, sigma_s**2, rtol=1e-8, atol=1e-9)
        # its noise is eta times that of the exact posterior, 1/var = alpha_ts^2 / sigma_ts^2 + 1 / sigma_s^2
        if s >= 0:
            ratio = alpha_t**2 / alpha_s**2
            exact = 1 / (ratio / (1 - ratio) + 1 / sigma_s**2)
            np.testing.assert_allclose(of_z, eta * math.sqrt(exact), rtol=1e-7, atol=1e-9)
            assert of_eps >= 0


@quickly
@given(schedule_and_list(ends_at_zero=None), seeds)
def test_ddim_at_eta_1_is_ddpm(schedule_and_list, seed):
    """Law 23: with the same streams, state by state, on any list; bug: the full chain's beta on a part."""
    schedule, ts = schedule_and_list
    rng = np.random.default_rng(seed)
    denoiser = MixtureDenoiser(schedule, [0.3, 0.7], rng.normal(size=(2, 2)), [0.1, 0.5])
    x_T = rng.normal(size=(3, 2))
    a = ddpm(denoiser, x_T, ts, streams=Streams(seed, 3))
    b = ddim(denoiser, x_T, ts, eta=1.0, streams=Streams(seed, 3))
    for one, other in zip(a, b, strict=True):
        assert one.t == other.t
        np.testing.assert_allclose(one.x_t, other.x_t, rtol=1e-8, atol=1e-8)


# ---- law 24: one step --------------------------------------------------------------------------------------

@quickly
@given(schedule_and_list(ends_at_zero=None, fewest=2), st.floats(0, 9))
def test_one_ddim_step_on_gaussian_data(schedule_and_list, s2):
    """Law 24: the factor (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t."""
    schedule, (t, s, *_) = schedule_and_list
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    state = next(ddim(gaussian_1d(schedule, s2), np.array([[1.0]]), [t, s]))
    factor = (alpha_s * alpha_t * s2 + sigma_s * sigma_t) / (alpha_t**2 * s2 + sigma_t**2)
    np.testing.assert_allclose(state.x_t[0, 0], factor, rtol=1e-8)
    assert (state.step, state.t) == (1, s)


@quickly
@given(schedule_and_list(), seeds)
def test_ddim_and_dpm_solver_are_exact_on_a_point_of_data(schedule_and_list, seed):
    """Law 24: x_t = alpha x_0 + sigma eps all along an irregular list; bug: previous times by stride."""
    schedule, ts = schedule_and_list
    x_0, eps = np.random.default_rng(seed).normal(size=(2, 3, 2))
    point = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: x_0)
    alpha, sigma = alpha_sigma(schedule, ts[0])
    for sampler in (ddim, dpm_solver_pp_2m):
        for state in sampler(point, alpha * x_0 + sigma * eps, ts):
            alpha_t, sigma_t = alpha_sigma(schedule, state.t)
            np.testing.assert_allclose(state.x_t, alpha_t * x_0 + sigma_t * eps, rtol=1e-8, atol=1e-8)


# ---- law 25: the order of each sampler ---------------------------------------------------------------------

NS = np.array([16, 32, 64, 128, 256])
FINE = schedules.log_snr_linear(16 * 256 + 1, 18.0, -9.0)       # every N divides it; ends at sigma = 1.2e-4


def fitted_order(errors):
    """The slope of log error over log N, from N = 16 to 256."""
    return -np.polyfit(np.log(NS), np.log(errors), 1)[0]


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
@pytest.mark.parametrize("s2", [0.25, 4.0])
def test_order_on_gaussian_data(name, order, s2):
    """Law 25: the probability-flow ODE multiplies a Gaussian by sqrt(V_s / V_t), here from T-1 to 0."""
    exact = math.sqrt(s2 / marginal_variance(FINE, FINE.T - 1, s2))
    denoiser, x_T = gaussian_1d(FINE, s2), np.array([[1.0]])
    runs = [SAMPLERS[name](denoiser, x_T, times(FINE, N + 1, "linspace")) for N in NS]
    errors = [abs(sample(run)[0, 0] / exact - 1) for run in runs]
    assert abs(fitted_order(errors) - order) < 0.07 * order
    assert errors[-1] < {1: 0.015, 2: 2e-4}[order]


def runge_kutta(weights, means, variances, x, schedule):
    """The same ODE by DOP853 in u = log(sigma / alpha), with y = x / alpha: dy/du = -e^{2u} grad log p_u(y).

    p_u is the mixture with e^{2u} added to its variances; its score is written out here in one dimension.
    """
    def slope(u, y):
        V = variances[:, None] + math.exp(2 * u)
        log_p = np.log(weights)[:, None] - 0.5 * (y - means[:, None]) ** 2 / V - 0.5 * np.log(V)
        p = np.exp(log_p - log_p.max(0))
        return -math.exp(2 * u) * (p * (means[:, None] - y) / V).sum(0) / p.sum(0)
    alpha, sigma = alpha_sigma(schedule, schedule.T - 1)
    u = (math.log(sigma / alpha), -16.0)                           # to sigma = e^-16: at the data
    solution = solve_ivp(slope, u, x / alpha, method="DOP853", rtol=1e-11, atol=1e-11)
    return solution.y[:, -1]


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_on_a_mixture(name, order):
    """Law 25 where the flow bends: x_0 against scipy's ODE solver."""
    weights, means, variances = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.1, 0.3])
    denoiser = MixtureDenoiser(FINE, weights, means[:, None], variances)
    x_T = np.array([-1.5, -0.3, 0.4, 1.7])
    exact = runge_kutta(weights, means, variances, x_T, FINE)
    runs = [SAMPLERS[name](denoiser, x_T[:, None], times(FINE, N + 1, "linspace")) for N in NS]
    errors = [np.linalg.norm(sample(run)[:, 0] - exact) for run in runs]
    assert abs(fitted_order(errors) - order) < 0.15 * order
    assert errors[-1] < {1: 0.05, 2: 2e-3}[order]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_state_of_an_irregular_list_follows_the_exact_flow(name):
    """Law 25 at each state, law 26: the previous time is the next of its own list, whatever the stride."""
    rng = np.random.default_rng(0)
    ts = [FINE.T - 1, *sorted(rng.choice(FINE.T - 1, 400, replace=False), reverse=True)]
    s2 = 4.0
    for state in DETERMINISTIC[name](gaussian_1d(FINE, s2), np.array([[1.0]]), ts):
        exact = math.sqrt(marginal_variance(FINE, state.t, s2) / marginal_variance(FINE, FINE.T - 1, s2))
        np.testing.assert_allclose(state.x_t[0, 0], exact, rtol=0.02 if name == "ddim" else 1e-3)


@quickly
@given(schedule_and_list(fewest=2), seeds)
def test_ddim_is_dpm_solver_1(schedule_and_list, seed):
    """Law 25: x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps (DPM-Solver eq. 3.7), and 2M's first step."""
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


# ---- law 26: where samplers start and end ------------------------------------------------------------------

@quickly
@given(schedule_and_list(ends_at_zero=None), st.sampled_from(sorted(SAMPLERS)), seeds)
def test_every_sampler_walks_its_list_and_ends_without_noise(schedule_and_list, name, seed):
    """Law 26. Bugs: noise at the last step, -inf at sigma = 0 in the last DPM-Solver step, and at SNR 0.
    Any overflow, division by zero or NaN raises."""
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
    twice = [t for t in ts[1:] for _ in (0, 1)]                    # Heun asks at s, then again as its next t
    assert [int(t[0]) for t in asked] == ([ts[0], *twice] if name == "heun" else ts)
    assert noise.calls == (len(ts) - 1 if name == "ddpm" else 0)


@quickly
@given(any_schedule(ends_at_zero=None), st.data(), st.sampled_from(sorted(SPACINGS)))
def test_times_begin_at_the_last_and_fall_strictly(schedule, data, spacing):
    """Law 26, for every N and spacing. Bugs: leading spacing from 980 of 1000, or past the table."""
    N = data.draw(st.integers(1, schedule.T))
    ts = times(schedule, N, spacing)
    assert ts.shape == (N,) and ts.dtype.kind == "i"
    assert ts[0] == schedule.T - 1 and ts[-1] >= 0 and (np.diff(ts) < 0).all()


def test_times_as_one_would_write_them():
    schedule = schedules.linear()
    assert list(times(schedule, 10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert list(times(schedule, 5, "leading")) == [999, 600, 400, 200, 0]
    assert list(times(schedule, 4, "linspace")) == [999, 666, 333, 0]
    for spacing in SPACINGS:
        assert list(times(schedule, 1000, spacing)) == list(range(999, -1, -1))
    even = schedules.log_snr_linear(901, 9.0, -9.0)
    assert list(times(even, 4, "log_snr")) == [900, 600, 300, 0]
    steps = np.diff(schedule.log_snr(times(schedule, 20, "log_snr")))
    assert 0.7 < steps.min() and steps.max() < 1.3                 # 19 steps from -10 to 9.2, of whole times
    zero = schedules.zero_terminal_snr(schedule)
    assert (np.diff(zero.log_snr(times(zero, 20, "log_snr")))[1:] < 1.3).all()


# ---- law 27: the distribution of samples -------------------------------------------------------------------

def assert_normal(x, mean, variance):
    """Mean and variance of x as those of n draws from N(mean, variance); false alarm 1e-7 for the two."""
    n = x.size
    z = (x.mean() - mean) / math.sqrt(variance / n)
    chi2 = stats.chi2.cdf(((x - mean) ** 2).sum() / variance, n)
    assert 2 * stats.norm.sf(abs(z)) > 5e-8, f"mean {x.mean()} for {mean}"
    assert 2.5e-8 < chi2 < 1 - 2.5e-8, f"variance {((x - mean) ** 2).mean()} for {variance}"


@pytest.mark.parametrize("variance, s2", [(beta_tilde, 0.0), (beta, 1.0)])
@pytest.mark.parametrize("ts", [[199, 120, 119, 60, 7], [199]])
def test_ancestral_variances_are_exact_where_ddpm_says_so(variance, s2, ts):
    """Laws 16, 27: beta~ on a point, beta on N(mu, 1): each state is N(alpha mu, V), in few irregular steps.

    20,000 draws; a false alarm in 1e6 runs (ten checks at 1e-7). Bugs: no noise at the step before the last,
    the full chain's beta on a part. The last state is E[x_0 | x_t], of variance alpha_t^2 where s = 1."""
    schedule, mu, n = schedules.cosine(200), 0.8, 20_000
    rng = np.random.default_rng(1)
    alpha, sigma = alpha_sigma(schedule, ts[0])
    x_T = alpha * mu + math.sqrt(alpha**2 * s2 + sigma**2) * rng.standard_normal((n, 1))
    *states, last = ddpm(gaussian_1d(schedule, s2, mu), x_T, ts, streams=Noise(n, rng), variance=variance)
    for state in states:
        alpha = alpha_sigma(schedule, state.t)[0]
        assert_normal(state.x_t, alpha * mu, marginal_variance(schedule, state.t, s2))
    if s2 == 0:
        np.testing.assert_allclose(last.x_t, mu)
    else:
        assert_normal(last.x_t, mu, alpha_sigma(schedule, ts[-1])[0] ** 2)


@pytest.mark.parametrize("name", [*sorted(SAMPLERS), "ddim, eta = .5"])
def test_samples_of_a_mixture_have_its_distribution(name):
    """Law 27: Kolmogorov-Smirnov on three projections of a 2-D mixture with known distribution functions.

    4,000 samples, 5e-8 a projection: a false alarm in 1e6 runs of all five. Then mean and covariance, within
    6 standard errors that are taken from the sample (1e-8 together)."""
    schedule, n, rng = schedules.cosine(300), 4000, np.random.default_rng(2)
    weights = np.array([0.2, 0.3, 0.5])
    means, sd = np.array([[-1.5, 0], [0.5, 1.5], [1, -1]]), np.array([[0.3, 0.8], [0.5, 0.3], [0.7, 0.5]])
    denoiser = MixtureDenoiser(schedule, weights, means, sd**2)
    x_T, ts = rng.standard_normal((n, 2)), times(schedule, 75 if name in ("heun", "dpm++2m") else 300)
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


# ---- law 28: each sample its own; DDIM backwards -----------------------------------------------------------

@pytest.mark.parametrize("name", [*sorted(SAMPLERS), "ddim, eta = 1"])
def test_a_sample_does_not_depend_on_its_batch(name):
    """Law 28: each row of a batch of 5 again alone, and two together; bug: output depending on batch size."""
    schedule = schedules.linear(200, beta_max=0.1)
    denoiser = MixtureDenoiser(schedule, [0.4, 0.6], np.array([[0.0, 1], [1, -1]]), [0.1, 0.3])

    def run(part):
        streams = Streams(7, 5)[part]
        x_T = streams.normal((2,), np.float64)
        if name == "ddpm":
            return sample(ddpm(denoiser, x_T, times(schedule, 10), streams=streams))
        if "eta" in name:
            return sample(ddim(denoiser, x_T, times(schedule, 10), eta=1.0, streams=streams))
        return sample(SAMPLERS[name](denoiser, x_T, times(schedule, 10)))

    whole = run(slice(0, 5))
    assert len(np.unique(whole.round(9), axis=0)) == 5
    for part in [*(slice(i, i + 1) for i in range(5)), slice(1, 3)]:
        np.testing.assert_allclose(run(part), whole[part], rtol=1e-10, atol=1e-12)


def test_inverse_ddim_undoes_ddim_up_to_first_order():
    """Law 28: from x_T to x_0 and back, the error falls as 1/N; and its noise is the exact flow's, as 1/N."""
    s2 = 4.0
    denoiser, x_T = gaussian_1d(FINE, s2, 0.3), np.array([[1.0], [-0.4]])
    lists = [times(FINE, N + 1, "linspace") for N in NS]
    there = [sample(ddim(denoiser, x_T, ts)) for ts in lists]
    back = [sample(ddim_inverse(denoiser, x, ts)) for x, ts in zip(there, lists, strict=True)]
    errors = [np.linalg.norm(x - x_T) for x in back]
    assert abs(fitted_order(errors) - 1) < 0.1 and errors[-1] < 0.05

    x_0 = np.array([[1.3]])
    alpha, _ = alpha_sigma(FINE, FINE.T - 1)
    exact = alpha * 0.3 + math.sqrt(marginal_variance(FINE, FINE.T - 1, s2) / s2) * (x_0 - 0.3)
    errors = [abs(sample(ddim_inverse(denoiser, x_0, ts)) - exact)[0, 0] for ts in lists]
    assert abs(fitted_order(errors) - 1) < 0.1 and errors[-1] < 0.05
    assert [state.t for state in ddim_inverse(denoiser, x_0, [7, 5, 2])] == [2, 5, 7]


# ---- the contract ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("terminal", [lambda s: s, schedules.zero_terminal_snr])
def test_float32_stays_float32_and_agrees_with_float64(name, terminal):
    schedule = terminal(schedules.linear())
    rng = np.random.default_rng(3)
    denoiser = MixtureDenoiser(schedule, [0.4, 0.6], rng.normal(size=(2, 3, 3, 1)), [0.1, 0.3])
    x_T, z = rng.normal(size=(2, 3, 3, 1)), Noise(2, given=rng.normal(size=(2, 3, 3, 1)))
    double, single = (sample(start(SAMPLERS[name], denoiser, x_T.astype(dtype), times(schedule, 20), z))
                      for dtype in (np.float64, np.float32))
    assert double.dtype == np.float64 and single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=2e-4)


def test_a_sampler_does_not_touch_x_T_and_hands_cond_on():
    schedule, seen = schedules.linear(), []
    denoiser = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: seen.append(cond) or x_t)
    x_T, cond = np.ones((2, 3), np.float32), (np.arange(2),)
    for sampler in (ddim, heun, dpm_solver_pp_2m):
        sample(sampler(denoiser, x_T, times(schedule, 3), cond))
    sample(ddpm(denoiser, x_T, times(schedule, 3), cond, streams=Streams(0, 2)))
    assert all(c is cond for c in seen) and (x_T == 1).all()


def refused(sampler=ddim, ts=(3, 1), **options):
    schedule = schedules.linear(10, beta_max=0.9)
    sample(sampler(gaussian_1d(schedule, 1.0), np.zeros((2, 1)), ts, **options))


@pytest.mark.parametrize("make, sentence", [
    (lambda: refused(ts=[]), "times must be integers that fall"),
    (lambda: refused(ts=[10, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[3, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[1, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[3, -1]), "times must be integers that fall"),
    (lambda: refused(eta=1.5), "eta must lie within"),
    (lambda: refused(eta=math.nan), "eta must lie within"),
    (lambda: refused(eta=0.5), "streams must be Streams, one for each of the 2 samples, got None"),
    (lambda: refused(ddpm, streams=Streams(0, 3)), "streams must be .* got 3"),
    (lambda: times(schedules.linear(), 0), "steps must be"),
    (lambda: times(schedules.linear(), 1001), "steps must be .* within 1..1000"),
    (lambda: times(schedules.linear(), 10.0), "steps must be"),
    (lambda: times(schedules.linear(), 10, "karras"), "spacing must be one of trailing"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
