"""Rectified flow: its path, the exact velocity on known data, Euler's method, the density of times and their shift."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from support.diffusion_strategies import any_schedule, seeds, shapes
from support.law_tools import column, few, gradient, quickly

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.densities import density_from
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.rectified_flow import (
    FlowDenoiser,
    interpolate,
    path_time,
    resolution_shift,
    shifted,
    x0_from_flow,
)
from minidiff.diffusion.samplers import ddim, sample, times

any_table = any_schedule(ends_at_zero=None)
inner = st.floats(0.01, 0.99)


def exact_flow(weights, means, variances):
    """E[eps - x_0 | x_u] of a mixture of Gaussians, from the joint distribution of flow and x_u in each component.

    Given k:  Cov[flow, x_u] = u - (1 - u) S,  Var x_u = (1 - u)^2 S + u^2,  so that
    E[flow | x_u, k] = -mu + Cov / Var (x_u - (1 - u) mu).
    """
    def flow(x_u, u, cond=None):
        u, x = u[:, None, None], x_u[:, None]                                       # (B, 1, 1), (B, 1, D)
        var, d = (1 - u) ** 2 * variances + u**2, x - (1 - u) * means               # (B, K, D) twice
        log = np.log(weights) + stats.norm.logpdf(d, scale=np.sqrt(var)).sum(-1)    # (B, K)
        r = np.exp(log - np.logaddexp.reduce(log, axis=1)[:, None])[..., None]
        return (r * (-means + (u - (1 - u) * variances) / var * d)).sum(1)
    return flow


def random_data(rng, K=3, D=2):
    return rng.dirichlet(np.full(K, 3.0)), rng.normal(size=(K, D)), rng.uniform(0.1, 1, size=(K, D))


# ---- the path --------------------------------------------------------------------------------------------------

@pytest.mark.law(
    42, "u = sigma/(alpha + sigma): x_t/(alpha + sigma) = x_u = (1 - u) x_0 + u eps, x_0 = x_u - u (eps - x_0)",
    source="Liu et al. 2022; x_t from the table itself",
    tolerance="1e-9: alpha_bar may be near 1, where sigma has 9 digits")
@few
@given(any_table, shapes, seeds)
def test_every_schedule_runs_on_the_straight_path(schedule, shape, seed):
    rng, t = np.random.default_rng(seed), np.arange(-1, schedule.T)
    x_0, eps = rng.normal(size=(2, len(t), *shape))
    abar = column(np.append(1.0, schedule.alpha_bar), x_0)
    x_t, total = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps, np.sqrt(abar) + np.sqrt(1 - abar)
    u = path_time(schedule, t)
    assert u[0] == 0 and (np.diff(u) > 0).all() and (u[-1] == 1) == (schedule.alpha_bar[-1] == 0)
    x_u = interpolate(x_0, u, eps)
    np.testing.assert_allclose(x_u, x_t / total, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x0_from_flow(x_u, u, eps - x_0), x_0, rtol=1e-9, atol=1e-9)


@quickly
@given(seeds, inner)
def test_the_path_is_straight_and_its_velocity_is_the_noise_less_the_image(seed, u):
    x_0, eps = np.random.default_rng(seed).normal(size=(2, 3, 4))
    assert (interpolate(x_0, 0.0, eps) == x_0).all() and (interpolate(x_0, 1.0, eps) == eps).all()
    slope = (interpolate(x_0, u + 0.005, eps) - interpolate(x_0, u - 0.005, eps)) / 0.01
    np.testing.assert_allclose(slope, eps - x_0, atol=1e-10)


# ---- the exact velocity ----------------------------------------------------------------------------------------

@pytest.mark.law(
    42, "on mixtures of Gaussians, x_u - u E[flow | x_u] is the exact denoiser's x0_hat at every time, SNR 0 included",
    source="Cov[flow, x_u] of each component, with no denoiser; exact.MixtureDenoiser", tolerance="1e-7: as law 13")
@few
@given(any_table, seeds)
def test_the_denoiser_of_the_exact_flow_is_the_exact_denoiser(schedule, seed):
    """Bugs: u for 1 - u; x_t for x_u; the flow with its sign reversed."""
    rng = np.random.default_rng(seed)
    data = random_data(rng)
    x_t, t = 1.5 * rng.normal(size=(8, 2)), rng.integers(0, schedule.T, 8)
    t[0] = schedule.T - 1
    found = FlowDenoiser(schedule, exact_flow(*data))(x_t, t)
    np.testing.assert_allclose(found, MixtureDenoiser(schedule, *data)(x_t, t), rtol=1e-7, atol=1e-7)


@pytest.mark.law(
    42, "FlowDenoiser's vjp is dy^T d x0_hat / d x_t", source="central differences; the exact denoiser's own vjp",
    tolerance="1e-6: central differences of fourth order")
@quickly
@given(any_schedule(ends_at_zero=None, max_T=10), seeds)
def test_the_derivative_of_the_denoiser(schedule, seed):
    rng = np.random.default_rng(seed)
    data = random_data(rng)
    flow = exact_flow(*data)
    x_t, t, dy = rng.normal(size=(4, 2)), np.full(4, schedule.T - 1), rng.normal(size=(4, 2))

    def network_vjp(x_u, u, dy, cond):
        J = gradient(lambda x: flow(x, u), x_u)                                     # (B, 2, 2)
        return flow(x_u, u), np.einsum("bi,bij->bj", dy, J)
    x0_hat, dx = FlowDenoiser(schedule, flow, network_vjp=network_vjp).vjp(x_t, t, dy)
    expected = MixtureDenoiser(schedule, *data).vjp(x_t, t, dy)
    np.testing.assert_allclose(x0_hat, expected[0], atol=1e-6)
    np.testing.assert_allclose(dx, expected[1], atol=1e-6)


@pytest.mark.law(
    "42a", "on data N(mu, S) the least mean squared error of the flow is S / ((1 - u)^2 S + u^2)",
    source="quadrature over x_0 and eps; the flow of GaussianDenoiser's x0_hat",
    tolerance="1e-8: Gauss-Hermite, exact for squares")
@quickly
@given(st.floats(-1, 1), st.floats(0.05, 2), st.integers(2, 20), seeds)
def test_the_floor_of_the_loss_on_gaussian_data(mu, S, T, seed):
    schedule = schedules.flow_matching(T)
    t = int(np.random.default_rng(seed).integers(0, T))
    nodes, w = np.polynomial.hermite_e.hermegauss(8)
    x_0, eps = (a.reshape(-1, 1) for a in np.meshgrid(mu + math.sqrt(S) * nodes, nodes))
    w = np.outer(w, w).ravel() / w.sum() ** 2
    times_of = np.full(len(x_0), t)
    u = path_time(schedule, times_of)
    x_u = interpolate(x_0, u, eps)
    total = (schedule.alpha(t) + schedule.sigma(t))
    flow = (x_u - GaussianDenoiser(schedule, [mu], [S])(total * x_u, times_of)) / u[:, None]
    loss = (w * ((eps - x_0) - flow)[:, 0] ** 2).sum()
    assert loss == pytest.approx(S / ((1 - u[0]) ** 2 * S + u[0] ** 2), rel=1e-8)


# ---- Euler's method --------------------------------------------------------------------------------------------

@pytest.mark.law(
    42, "Euler's step x_s = x_u + (s - u) flow is DDIM's step, on any schedule and list of times",
    source="Euler's method along the path, written out here", tolerance="1e-8: the path's time has 9 digits")
@few
@given(any_table, seeds, st.integers(1, 8))
def test_eulers_method_is_ddim(schedule, seed, steps):
    rng = np.random.default_rng(seed)
    flow = exact_flow(*random_data(rng))
    path, x_T = times(schedule, min(steps, schedule.T)), rng.normal(size=(5, 2))
    states = list(ddim(FlowDenoiser(schedule, flow), x_T, path))

    def scale(t):                                           # x_t = scale x_u
        return np.sqrt(schedule.abar(t)) + np.sqrt(1 - schedule.abar(t))
    x_u, u = x_T / scale(path[0]), path_time(schedule, int(path[0]))
    for state, s in zip(states, [*path[1:], -1], strict=True):
        end = path_time(schedule, int(s))
        x_u = x_u + (end - u) * flow(x_u, np.full(5, u))
        u = end
        np.testing.assert_allclose(state.x_t / scale(int(s)), x_u, rtol=1e-8, atol=1e-8)


@pytest.mark.law(
    42, "where all data are one point, one Euler step from pure noise ends there",
    source="the flow (x_u - x_0)/u of a point, by hand", tolerance="1e-12: rounding")
@quickly
@given(st.integers(1, 50), st.floats(0.2, 5), seeds)
def test_one_step_is_exact_on_a_point(T, shift, seed):
    schedule, rng = schedules.flow_matching(T, shift), np.random.default_rng(seed)
    point, x_T = rng.normal(size=(2, 3, 4))
    denoiser = FlowDenoiser(schedule, lambda x_u, u, cond: (x_u - point) / u[:, None])
    np.testing.assert_allclose(sample(ddim(denoiser, x_T, times(schedule, 1))), point, rtol=1e-12, atol=1e-12)


def test_the_flow_denoiser_agrees_with_one_that_predicts_v():
    """flow = (sigma - alpha) x_t + (alpha + sigma) v: the same network in the other form."""
    schedule, rng = schedules.flow_matching(20), np.random.default_rng(0)
    x_t, v, t = *rng.normal(size=(2, 6, 3)), np.array([0, 3, 7, 12, 18, 19])
    alpha, sigma = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
    flow = FlowDenoiser(schedule, lambda x_u, u, cond: (sigma - alpha) * x_t + (alpha + sigma) * v)
    np.testing.assert_allclose(flow(x_t, t), NetworkDenoiser(schedule, "v", lambda *_: v)(x_t, t), atol=1e-12)


def test_its_answers_are_clipped_on_request():
    denoiser = FlowDenoiser(schedules.flow_matching(5), lambda x_u, u, cond: -4 * x_u, clip=static_threshold)
    assert denoiser(np.ones((1, 3)), np.array([4])).tolist() == [[1.0] * 3]


# ---- the times of training -------------------------------------------------------------------------------------

def pi(u, mean, std):
    """SD3's density of u (section 3.1)."""
    return math.exp(-(math.log(u / (1 - u)) - mean) ** 2 / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * u * (1 - u))


def of_logit_u(mean, std, schedule):
    """The density over log-SNR = -2 logit u that logit u ~ N(mean, std^2) is."""
    return density_from(f"normal:mean={-2 * mean!r},std={2 * std!r}", schedule).P


@pytest.mark.law(
    "42b", "logit-normal u is normal log-SNR, N(-2 mean, (2 std)^2): P(t) is the integral of pi(u) over the u that are "
           "nearest to (t + 1)/T in logit u", source="SD3 section 3.1: pi(u), by quadrature",
    tolerance="1e-7: quadrature")
@quickly
@given(st.integers(3, 12), st.floats(-2, 2), st.floats(0.3, 2))
def test_logit_normal_times_are_normal_in_log_snr(T, mean, std):
    """Bugs: mean with its sign reversed; log-SNR for logit u, or for -logit u; bounds half-way in u."""
    place = [math.log(k / (T - k)) for k in range(1, T)]                            # logit u of all times but the last,
    place.append(2 * place[-1] - place[-2])                                         # u = 1, which counts as one step on
    middle = [(a + b) / 2 for a, b in zip(place, place[1:], strict=False)]
    bounds = [1 / (1 + math.exp(-x)) for x in (2 * place[0] - middle[0], *middle, 2 * place[-1] - middle[-1])]
    mass = np.array([integrate.quad(pi, a, b, (mean, std), epsabs=1e-11)[0]
                     for a, b in zip(bounds, bounds[1:], strict=False)])
    np.testing.assert_allclose(of_logit_u(mean, std, schedules.flow_matching(T)), mass / mass.sum(), atol=1e-7)


@pytest.mark.law(
    "42b", "of the times before k there are as many as of logit-normal u below a number between k/T and (k + 1)/T",
    source="scipy's normal distribution function", tolerance="1e-6: u beyond the first and the last time are cut off")
@quickly
@given(st.integers(300, 1000), st.floats(-1, 1), st.floats(0.3, 1))
def test_a_table_of_times_follows_continuous_u_to_half_a_step(T, mean, std):
    """So no u is moved by more than a step of 1/T to its time."""
    below, u = np.cumsum(of_logit_u(mean, std, schedules.flow_matching(T)))[:-1], np.arange(1, T + 1) / T
    F = stats.norm.cdf(np.log(u[:-1] / (1 - u[:-1])), mean, std)                    # P(u < k/T), k = 1 .. T-1
    assert (below > F - 1e-6).all() and (below < np.append(F[1:], 1) + 1e-6).all()


# ---- resolution ------------------------------------------------------------------------------------------------

@pytest.mark.law(
    "42c", "shift u/(1 + (shift - 1) u) rises from 0 to 1, is undone by 1/shift, adds log shift to logit u, and two "
           "shifts are one by their product", source="algebra", tolerance="1e-9: 1 - u near 1 has 14 digits")
@quickly
@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_shift(shift, other):
    u = np.linspace(0, 1, 41)
    moved = shifted(u, shift)
    assert moved[0] == 0 and moved[-1] == 1 and (np.diff(moved) > 0).all()
    assert ((moved > u)[1:-1] == (shift > 1)).all() or shift == 1
    np.testing.assert_allclose(shifted(moved, 1 / shift), u, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shifted(moved, other), shifted(u, shift * other), rtol=1e-9, atol=1e-9)
    inside = slice(1, -1)
    np.testing.assert_allclose(stats.logistic.ppf(moved[inside]), stats.logistic.ppf(u[inside]) + math.log(shift),
                               rtol=1e-9, atol=1e-9)


@pytest.mark.law(
    "42c", "the mean of m noisy pixels at the shifted time is as uncertain as that of n at the time itself",
    source="SD3 section 5.3.2: the standard error of an average of x_u/(1 - u), by simulation-free algebra",
    tolerance="1e-9: rounding")
@quickly
@given(st.integers(1, 10**6), st.integers(1, 10**6), inner)
def test_the_shift_for_a_resolution_keeps_the_uncertainty(m, n, u):
    """x_u/(1 - u) is the pixel plus noise of size u/(1 - u); an average of m of them has 1/sqrt(m) of it."""
    def uncertainty(u, pixels):
        return u / (1 - u) / math.sqrt(pixels)
    moved = float(shifted(u, resolution_shift(m, n)))
    assert uncertainty(moved, m) == pytest.approx(uncertainty(u, n), rel=1e-9)


@pytest.mark.law(
    "42c", "the schedule flow_matching:shift=... stands at the shifted times; log-SNR is lower by 2 log shift",
    source="`shifted`, and the table of the schedule without shift", tolerance="1e-9: alpha_bar near 1")
@quickly
@given(st.integers(2, 60), st.floats(0.2, 8))
def test_a_shifted_schedule(T, shift):
    plain, moved, t = schedules.flow_matching(T), schedules.flow_matching(T, shift), np.arange(T)
    np.testing.assert_allclose(path_time(moved, t), shifted((t + 1) / T, shift), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moved.log_snr(t[:-1]), plain.log_snr(t[:-1]) - 2 * math.log(shift), rtol=1e-9, atol=1e-9)
    assert moved.alpha_bar[-1] == 0


@pytest.mark.law(
    "42c", "logit-normal times, then shifted, are those of mean + log shift on the shifted schedule",
    source="change of variables: logit u' = logit u + log shift", tolerance="1e-6: log-SNR from alpha_bar near 1")
@quickly
@given(st.integers(3, 60), st.floats(-2, 2), st.floats(0.3, 2), st.floats(0.2, 5))
def test_a_shifted_logit_normal_density_is_one(T, mean, std, shift):
    """Bugs: a density that ignores the shift; one that is shifted twice."""
    before = of_logit_u(mean, std, schedules.flow_matching(T))
    after = of_logit_u(mean + math.log(shift), std, schedules.flow_matching(T, shift))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-9)


# ---- what is refused -------------------------------------------------------------------------------------------

X = np.zeros((2, 3))


@pytest.mark.parametrize("sentence, call", [
    ("u must lie within 0 .* and 1 .*, got 1.5", lambda: interpolate(X, 1.5, X)),
    ("u must lie within 0 .* and 1 .*, got nan", lambda: x0_from_flow(X, np.nan, X)),
    ("u must lie within 0 .* got -0.1", lambda: shifted(-0.1, 2.0)),
    ("eps must have x_0's shape and dtype", lambda: interpolate(X, 0.5, X.astype(np.float16))),
    ("eps must have x_0's shape and dtype", lambda: interpolate(X, 0.5, X[:1])),
    ("flow must have x_u's shape and dtype", lambda: x0_from_flow(X, 0.5, X[:1])),
    ("u must be a number, or one for each sample of x_0", lambda: interpolate(X, np.full(len(X) + 1, 0.5), X)),
    ("shift must be a positive number, .* got 0", lambda: shifted(0.5, 0)),
    ("shift must be a positive number, .* got inf", lambda: shifted(0.5, math.inf)),
    ("shift must be a positive number, got -1", lambda: schedules.flow_matching(10, -1.0)),
    ("m must be a whole number of at least 1, not 0", lambda: resolution_shift(0, 784)),
    ("n must be a whole number of at least 1, not 7.5", lambda: resolution_shift(784, 7.5)),
])
def test_what_is_refused(sentence, call):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_denoiser_without_a_derivative_has_none():
    denoiser = FlowDenoiser(schedules.flow_matching(5), lambda x_u, u, cond: x_u)
    with pytest.raises(TypeError, match="denoiser must have a network_vjp"):
        denoiser.vjp(X, np.array([1, 2]), X)
    with pytest.raises(TypeError, match="denoiser must have a network_vjp, and no clip"):
        replace(denoiser, clip=static_threshold, network_vjp=lambda *_: None).vjp(X, np.array([1, 2]), X)
    with_one = replace(denoiser, network_vjp=lambda x_u, u, dy, cond: (x_u, dy))
    assert with_one.vjp(X, np.array([1, 2]), X)[1].shape == (2, 3)
