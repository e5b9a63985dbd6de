"""Law 25: how fast each sampler converges to the exact map of the probability-flow ODE, from a fit over N.

With alpha = cos(phi), sigma = sin(phi), d_k = x - alpha mu_k, V_k = alpha^2 s_k^2 + sigma^2 and r_k = p(k | x), data
from a mixture of N(mu_k, s_k^2) have score = sum_k r_k grad log N(x; alpha mu_k, V_k) = -sum_k r_k d_k / V_k, and so

    eps = -sigma score                       =  sigma sum_k r_k d_k / V_k
    x_0 = (x + sigma^2 score) / alpha        =  sum_k r_k (mu_k + alpha s_k^2 d_k / V_k)
    v   = dx/dphi = -tan(phi) (x + score)    = -sigma sum_k r_k (mu_k + alpha (s_k^2 - 1) x) / V_k

The last is the ODE (Karras et al. 2022, eq. 4), finite from pure noise to the clean image. For one
component x_s = alpha_s mu + sqrt(V_s / V_t) (x_t - alpha_t mu) solves it; for more, scipy's DOP853 does, at rtol 1e-12.

The order of a sampler depends on the part of the table. In the middle of a table, |log SNR| < 3, every clock (the time
t, the angle phi, lambda = log(alpha / sigma)) is a smooth function of every other, all strides vanish as 1/N, and the
order is the textbook's: for every spacing, parametrisation and schedule. At the ends it also depends on three things:

    the last step, to sigma = 0    costs sigma^2 / (2 alpha^2 s^2) of x, sigma that of the last time in the list:
                                   nothing if that is t = 0 of a fine table; else 1/N^2 if sigma falls as 1/N near the
                                   clean image (flow matching), and 1/N if as N^-1/2 (betas; the cosine's offset)
    2M where lambda leaps          equal strides of t leap by log 2 and more in lambda at both ends, for every N:
                                   order 2 turns into log(N) / N^2 in the first case, into order 1 in the second
    what no N makes smaller        sigma at t = 0; in 2M, the one stride of `log_snr` spacing over all of log SNR < -10

So no fit goes below 32 steps, where c/N (see `fitted_order`) is not small, nor beyond errors of 1e-6.

A sampler that looks back two steps or more starts with steps of a lower order, whose part of the error falls at another
rate than the rest. Its fit is less exact; and where the rest dominates, the error falls faster than the entry says.
"""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from support.law_tools import Noise, alpha_sigma, fitted_order, quickly, schedule_and_list, start

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.gaussian import PREDICTIONS
from minidiff.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    beta,
    ddim,
    ddim_inverse,
    ddpm,
    dpm_solver_pp_2m,
    heun,
    sample,
    times,
)

ORDERS = {name: sampler.order for name, sampler in SAMPLERS.items() if not sampler.noise}    # of those on the flow
NS = (32, 64, 128, 256)


def assert_order(p, name, within, message=""):
    """The order p is that of the entry; with a memory of two steps or more, it is at least that."""
    if SAMPLERS[name].history < 2:
        assert abs(p - ORDERS[name]) < within, f"order {p:.3f} {message}"
    else:
        assert p > ORDERS[name] - 0.3, f"order {p:.3f} {message}"


# ---- data, and the exact flow --------------------------------------------------------------------------------

class Mixture:
    """sum_k w_k N(mu_k, diag s_k^2); its three predictions, each in a closed form of its own (see above)."""

    def __init__(self, weights, means, variances):
        self.weights, self.means, self.variances = (np.array(a, float) for a in (weights, means, variances))

    def _parts(self, x, alpha, sigma):
        d = x[:, None] - alpha * self.means                                           # (B, K, D)
        V = alpha**2 * self.variances + sigma**2                                      # (K, D)
        log_r = np.log(self.weights) - 0.5 * (d * d / V + np.log(V)).sum(-1)
        r = np.exp(log_r - log_r.max(1, keepdims=True))
        return d, V, (r / r.sum(1, keepdims=True))[..., None]                         # r: (B, K, 1)

    def eps(self, x, alpha, sigma):
        d, V, r = self._parts(x, alpha, sigma)
        return sigma * (r * d / V).sum(1)

    def x0(self, x, alpha, sigma):
        d, V, r = self._parts(x, alpha, sigma)
        return (r * (self.means + alpha * self.variances * d / V)).sum(1)

    def v(self, x, alpha, sigma):
        _, V, r = self._parts(x, alpha, sigma)
        return -sigma * (r * (self.means + alpha * (self.variances - 1) * x[:, None]) / V).sum(1)

    def denoiser(self, schedule, predicts="v"):
        predict = getattr(self, predicts)
        return NetworkDenoiser(schedule, predicts, lambda x_t, t, cond: predict(x_t, *alpha_sigma(schedule, t[0])))


def gaussian(variances, mean=0.0):
    return Mixture([1.0], [np.full(len(variances), mean)], [variances])


# One run measures both: the first two of five dimensions are a mixture; the others are Gaussians, equal in every
# component, so that the two flows are independent.
BENT = Mixture([0.3, 0.5, 0.2], [[-1.2, 0.4], [0.9, 0.8], [0.3, -1.1]], [[0.15, 0.4], [0.3, 0.2], [0.25, 0.1]])
STRAIGHT = gaussian([0.25, 1.7, 4.0], 0.3)
DATA = Mixture(BENT.weights, np.hstack([BENT.means, np.repeat(STRAIGHT.means, 3, axis=0)]),
               np.hstack([BENT.variances, np.repeat(STRAIGHT.variances, 3, axis=0)]))
X = np.array([[-1.5, 0.3, 1.0, 1.0, 1.0], [-0.3, -1.0, -0.7, 0.2, -1.3],
              [0.4, 1.1, 0.5, -1.6, 0.2], [1.7, -0.2, -0.4, 0.9, 2.1]])               # (B, D) at the first time


@cache
def exact(first, last, rtol=1e-12):
    """The point to which the flow moves X, from time `first` to `last`, each given by its (alpha, sigma)."""
    def slope(phi, y):
        return BENT.v(y.reshape(-1, 2), math.cos(phi), math.sin(phi)).ravel()
    interval = [math.atan2(sigma, alpha) for alpha, sigma in (first, last)]
    bent = solve_ivp(slope, interval, X[:, :2].ravel(), method="DOP853", rtol=rtol, atol=1e-13).y[:, -1]
    (mean,), (variance,) = STRAIGHT.means, STRAIGHT.variances
    V_t, V_s = (alpha**2 * variance + sigma**2 for alpha, sigma in (first, last))
    straight = last[0] * mean + np.sqrt(V_s / V_t) * (X[:, 2:] - first[0] * mean)
    return np.hstack([bent.reshape(-1, 2), straight])                                 # (B, D)


@pytest.mark.parametrize("abar_T", [0.05, 1e-4, 0.0])
def test_the_reference_is_right(abar_T):
    """The reference of the next tests, to 1e-9, where the samplers' errors are at least 1e-6; not a law of minidiff.

    Against itself at rtol 1e-10, which is off by 1e-11; the closed form on a Gaussian; and, where alpha > 0,
    the same ODE in other variables, u = log(sigma / alpha) and y = x / alpha: dy/du = -e^{2u} grad log p_u(y), where
    p_u is the mixture with e^{2u} added to its variances."""
    first, clean = (math.sqrt(abar_T), math.sqrt(1 - abar_T)), (1.0, 0.0)
    x_0 = exact(first, clean)
    assert abs(x_0 - exact(first, clean, rtol=1e-10)).max() < 1e-9

    def gaussian_slope(phi, y):
        return STRAIGHT.v(y.reshape(-1, 3), math.cos(phi), math.sin(phi)).ravel()
    interval = (math.atan2(first[1], first[0]), 0)
    solved = solve_ivp(gaussian_slope, interval, X[:, 2:].ravel(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    np.testing.assert_allclose(solved.reshape(-1, 3), x_0[:, 2:], atol=1e-10)

    if abar_T > 0:
        def slope(u, y):
            V = BENT.variances + math.exp(2 * u)                                      # (K, D)
            d = BENT.means - y.reshape(-1, 1, 2)                                      # (B, K, D)
            p = BENT.weights * np.exp(-0.5 * (d**2 / V).sum(-1)) / np.sqrt(V.prod(-1))
            score = (p[..., None] * d / V).sum(1) / p.sum(1)[:, None]
            return (-math.exp(2 * u) * score).ravel()
        u = (math.log(first[1] / first[0]), -14.0)             # e^-28 of variance is left: 1e-12 of the way
        solved = solve_ivp(slope, u, X[:, :2].ravel() / first[0], method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        np.testing.assert_allclose(solved.reshape(-1, 2), x_0[:, :2], atol=1e-9)


# ---- the order of a sampler ----------------------------------------------------------------------------------

def errors_of(sampler, schedule, spacing, predicts="v", Ns=NS, whole=False):
    """||x - exact|| for each N, of the mixture and of the Gaussians: two lists.

    spacing: the name of one, or a function that makes a list of N times. The flow is compared at the last time of the
    list; with `whole`, a step later, at the clean image.
    """
    denoiser, pairs = DATA.denoiser(schedule, predicts), []
    for N in Ns:
        ts = times(schedule, N, spacing) if isinstance(spacing, str) else spacing(schedule, N)
        *_, before, clean = sampler(denoiser, X, ts)
        end = clean if whole else before
        assert end.t == (-1 if whole else ts[-1])
        d = end.x_t - exact(alpha_sigma(schedule, ts[0]), alpha_sigma(schedule, end.t))
        pairs.append((np.linalg.norm(d[:, :2]), np.linalg.norm(d[:, 2:])))
    return np.transpose(pairs)


def middle(schedule):
    """The part of a table with |log SNR| < 3, a multiple of 256 entries long, so that `leading` has equal strides."""
    t = np.flatnonzero(abs(schedule.log_snr(np.arange(schedule.T))) < 3)
    return schedules.respaced(schedule, t[:len(t) // 256 * 256])


FINE = 2**16                                                   # times
TABLES = {
    "linear": schedules.linear(FINE, 0.1 / FINE, 20 / FINE),
    "scaled_linear": schedules.scaled_linear(FINE, 0.85 / FINE, 12 / FINE),
    "cosine": schedules.cosine(FINE),
    "log_snr_linear": schedules.log_snr_linear(FINE, 12.0, -9.0),
    "vp_sde": schedules.vp_sde(FINE, 0.3, 14.0),
    "flow_matching": schedules.flow_matching(FINE),
}
MIDDLES = {name: middle(table) for name, table in TABLES.items()}


def assert_orders_in_the_middle(name, spacing, predicts, table):
    for errors, what in zip(errors_of(SAMPLERS[name], MIDDLES[table], spacing, predicts), ("mixture", "Gaussian"),
                            strict=True):
        assert_order(fitted_order(errors, NS), name, 0.08, f"on the {what} with {table}: {errors}")


in_the_middle = pytest.mark.law(
    25, "||x - exact flow|| = C N^-p, p = 1 for DDIM, 2 for Heun and DPM-Solver++(2M), at least 2 for UniPC and LMS "
        "and 1 for PLMS; any parametrisation and spacing",
    source="DDIM eq. 14, Karras et al. 2022, section 3, DPM-Solver++ section 4 and its appendix, UniPC theorem 3.1; "
           "DPM-Solver-2, of the earlier paper, is not offered",
    tolerance="p within .08: .03 of what the fit leaves out, .03 of rounded times (see `fitted_order`); the last three "
              "no more than .3 below, since their first steps have another order")


@in_the_middle
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_in_every_parametrisation_and_spacing(name, spacing, predicts):
    """On two of the six schedules, in turn; all combinations are in the next test, which is slow."""
    i = (list(SPACINGS).index(spacing) + PREDICTIONS.index(predicts)) % 3
    for table in list(TABLES)[i::3]:
        assert_orders_in_the_middle(name, spacing, predicts, table)


def alternating(schedule, N):
    """Strides of one and two in turn: each is twice or half the one before."""
    at = np.cumsum(np.arange(N) % 2 + 1)
    return np.round((schedule.T - 1) * (1 - (at - at[0]) / (at[-1] - at[0]))).astype(int)


@in_the_middle
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_lists_of_alternating_strides(name, table):
    """Bug: 2M with r = 1, which is of order 2 where strides change gently, and of order 1 here."""
    assert_orders_in_the_middle(name, alternating, "v", table)


@pytest.mark.law("25d", "2M's D is x0_hat in the middle of the stride, lambda_t + h/2, if it is linear in lambda",
                 source="DPM-Solver++ section 4, by Taylor",
                 tolerance="1e-8: lambda is off by 1e-16 / sigma^2, sigma > .002, and r by that over the stride")
@quickly
@given(schedule_and_list(), st.floats(-2, 2))
def test_2m_extrapolates_to_the_middle_of_each_stride(schedule_and_list, slope):
    """Bug: r inverted. Its errors, (h_before^2 - h^2) / 2, cancel along any list, so no order shows them."""
    schedule, ts = schedule_and_list
    def half_log_snr(t):
        alpha, sigma = alpha_sigma(schedule, t)
        return math.log(alpha / sigma)
    linear = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: np.full((1, 1), 0.7 + slope * half_log_snr(t[0])))
    x_t = np.ones((1, 1))
    for state, t, s in zip(dpm_solver_pp_2m(linear, x_t, ts), ts, ts[1:], strict=False):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
        h = half_log_snr(s) - half_log_snr(t)
        D = 0.7 + slope * (half_log_snr(t) + (h / 2 if state.step > 1 else 0))
        expected = sigma_s / sigma_t * x_t + alpha_s * (1 - sigma_s * alpha_t / (alpha_s * sigma_t)) * D
        np.testing.assert_allclose(state.x_t, expected, rtol=1e-8, atol=1e-8)
        x_t = state.x_t


@pytest.mark.slow
@in_the_middle
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_every_schedule(name, spacing, table):
    for predicts in PREDICTIONS:
        assert_orders_in_the_middle(name, spacing, predicts, table)


@pytest.mark.law(25, "x_0 does not depend on whether the network says eps, x_0 or v",
                 source="law 10: each is the others' conditional mean",
                 tolerance="1e-8 of the largest number met: x_0 from eps loses 1e-16 / alpha, alpha > .002, a step")
@quickly
@given(schedule_and_list(), st.sampled_from(sorted(SAMPLERS)), st.integers(0, 2**32 - 1))
def test_parametrisations_agree_to_rounding(schedule_and_list, name, seed):
    """So the order does not depend on the parametrisation. Each has its own closed form. Any schedule and list."""
    schedule, ts = schedule_and_list
    runs = [list(start(SAMPLERS[name], DATA.denoiser(schedule, predicts), X, ts, Noise(4, np.random.default_rng(seed))))
            for predicts in PREDICTIONS]
    size = max(abs(array).max() for run in runs for state in run for array in (state.x_t, state.x0_hat))
    for run in runs[1:]:
        np.testing.assert_allclose(run[-1].x_t, runs[0][-1].x_t, rtol=0, atol=1e-8 * size)


# ---- the whole way, from T-1 to the clean image --------------------------------------------------------------

EVEN = schedules.log_snr_linear(2**14, 18.0, -9.0)             # ends at sigma^2 = 1.5e-8; half of that stays


@pytest.mark.law(25, "||x_0 - exact|| = C N^-p from noise to the clean image, with first and last steps of first order",
                 source="DPM-Solver++ section 4, Karras et al. 2022, algorithm 1",
                 tolerance="p within .1: as in the middle, and sigma(0)^2 / 2 = 8e-9 of errors of 1e-5 that never fall")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ORDERS)
def test_the_first_and_last_steps_cost_no_order(name, spacing):
    """lambda is linear in t: no stride is much the longest. The local order is .99 or 1.99 from N = 128 to 256."""
    for errors in errors_of(SAMPLERS[name], EVEN, spacing, whole=True):
        assert_order(fitted_order(errors, NS), name, 0.1)
        assert_order(math.log2(errors[-2] / errors[-1]), name, 0.1)
        assert errors[-1] < (2e-3 if ORDERS[name] >= 2 else 0.1)


@pytest.mark.law(25, "from SNR 0, along the straight path, in equal strides: DDIM 1, Heun 2 (in phi, no stride leaps)",
                 source="Flow matching; Karras et al. 2022, algorithm 1", tolerance="p within .1: as in the middle")
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", [name for name in ORDERS if not SAMPLERS[name].history])
@pytest.mark.parametrize("predicts", ["x0", "v"])              # eps does not determine x_0 at SNR 0, and is refused
def test_order_of_a_flow_from_pure_noise(name, spacing, predicts):
    for errors in errors_of(SAMPLERS[name], TABLES["flow_matching"], spacing, predicts, whole=True):
        assert abs(fitted_order(errors, NS) - ORDERS[name]) < 0.1


@pytest.mark.law(25, "2M on equal strides of t: log(N) / N^2 where sigma falls as 1/N, order 1 where as N^-1/2",
                 source="sum_k h_k^3 sigma_k^2 over strides h_k = log(1 + 1/k) or so of lambda, sigma_k = (k/N)^rate",
                 tolerance="p within .3 of 2: the slope of log(N) / N^2 is 2 - 1/log N; within .4 of 1: the last "
                           "stride brings a log(T/N), whose slope is 1/log(T/N) = .2")
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_2m_needs_even_strides_of_lambda(spacing):
    Ns = (64, 128, 256, 512)
    for errors in errors_of(dpm_solver_pp_2m, TABLES["flow_matching"], spacing, Ns=Ns, whole=True):
        assert abs(-np.polyfit(np.log(Ns), np.log(errors), 1)[0] - 2) < 0.3
    root = schedules.linear(2**14, 10 / 2**14, 10 / 2**14)     # one beta for all: sigma^2 = 10 u at first
    for errors in errors_of(dpm_solver_pp_2m, root, spacing, Ns=Ns):
        assert abs(-np.polyfit(np.log(Ns), np.log(errors), 1)[0] - 1) < 0.4


@pytest.mark.law("25a", "DDIM on N(0, s^2): x_0 / exact = prod_steps cos(psi_t - psi_s), tan psi = sigma / (alpha s); "
                 "so its error is sum (psi_t - psi_s)^2 / 2, of order 1 and always too small",
                 source="law 24 over law 25: (alpha_s alpha_t s^2 + sigma_s sigma_t) / sqrt(V_s V_t) is a dot product",
                 tolerance="1e-9: rounding / sigma a step, sigma > .002")
@quickly
@given(schedule_and_list(ends_at_zero=None), st.floats(0.1, 3))
def test_the_error_of_ddim_in_closed_form(schedule_and_list, s):
    """At every state, on any list, the last step to sigma = 0 included. Bug: a previous time by stride."""
    schedule, ts = schedule_and_list
    angles = [math.atan2(sigma, alpha * s) for alpha, sigma in (alpha_sigma(schedule, t) for t in [*ts, -1])]
    lengths = [math.hypot(alpha * s, sigma) for alpha, sigma in (alpha_sigma(schedule, t) for t in [*ts, -1])]
    shrunk = np.cumprod(np.cos(np.diff(angles)))
    states = list(ddim(gaussian([s * s]).denoiser(schedule), np.array([[lengths[0]]]), ts))
    np.testing.assert_allclose([state.x_t[0, 0] for state in states], shrunk * lengths[1:], rtol=1e-9, atol=1e-12)


@pytest.mark.law("25b", "the last step, to sigma = 0: x_0 / exact = cos psi = 1 - sigma^2 / (2 alpha^2 s^2) + ...",
                 source="x0_hat = alpha s^2 / V x_t (law 12) over the flow's s / sqrt(V)", tolerance="1e-10: rounding")
@quickly
@given(schedule_and_list(), st.sampled_from(sorted(ORDERS)), st.floats(0.1, 3))
def test_the_error_of_the_last_step(schedule_and_list, name, s):
    schedule, ts = schedule_and_list
    alpha, sigma = alpha_sigma(schedule, ts[-1])
    exact, seen = gaussian([s * s]).denoiser(schedule), []
    denoiser = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: seen.append(x_t[0, 0]) or exact(x_t, t))
    states = list(SAMPLERS[name](denoiser, np.ones((1, 1)), ts))
    exactly = seen[-1] * s / math.hypot(alpha * s, sigma)
    np.testing.assert_allclose(states[-1].x_t[0, 0], exactly * math.cos(math.atan2(sigma, alpha * s)), rtol=1e-10)


@pytest.mark.law(25, "trailing, with sigma^2 = beta_min u: Heun as a whole is of order 1, and its error "
                     "is that of the last step",
                 source="law 25b at u = 1/N", tolerance="p within .1, the error within 10 %: a rest of order 2")
def test_a_long_last_step_costs_an_order():
    """As with the table of Stable Diffusion: its last time is T/N - 1, where sigma^2 is .85 / N or more."""
    schedule = TABLES["scaled_linear"]
    errors = errors_of(heun, schedule, "trailing", whole=True)
    assert (abs(np.array([fitted_order(e, NS) for e in errors]) - 1) < 0.1).all()
    alpha, sigma = alpha_sigma(schedule, times(schedule, 256, "trailing")[-1])
    (variance,) = STRAIGHT.variances
    x_0 = exact(alpha_sigma(schedule, schedule.T - 1), (1.0, 0.0))[:, 2:]
    expected = np.linalg.norm(sigma**2 / (2 * alpha**2 * variance) * (x_0 - STRAIGHT.means))
    np.testing.assert_allclose(errors[1][-1], expected, rtol=0.1)


@pytest.mark.law(28, "ddim_inverse: x_0 to its noise by the exact flow, and back by ddim, each within C / N",
                 source="DDIM eq. 13, 14", tolerance="p within .1: as in the middle")
def test_inverse_ddim_is_of_first_order():
    first = alpha_sigma(EVEN, EVEN.T - 1)
    denoiser, x_0 = DATA.denoiser(EVEN), exact(first, (1.0, 0.0))
    lists = [times(EVEN, N, spacing) for spacing in SPACINGS for N in NS]
    up = [sample(ddim_inverse(denoiser, x_0, ts)) for ts in lists]
    back = [sample(ddim(denoiser, x_T, ts)) for x_T, ts in zip(up, lists, strict=True)]
    for ends, exactly in ((up, X), (back, x_0)):
        errors = np.array([[np.linalg.norm(d[:, :2]), np.linalg.norm(d[:, 2:])] for d in np.array(ends) - exactly])
        for e in errors.reshape(len(SPACINGS), len(NS), 2).transpose(0, 2, 1).reshape(-1, len(NS)):
            assert abs(fitted_order(e, NS) - 1) < 0.1 and e[-1] < 0.5


# ---- with noise: the order of the distribution ---------------------------------------------------------------

def one_at_a_time(count):
    """A substitute for SampleStreams: draw number i is 1 for sample i, and 0 for the others."""
    return Noise(count, given=lambda draw: np.eye(count)[draw][:, None])


VARIANCES = np.array([0.25, 1.0, 4.0])
RANDOM = {
    **{name: sampler for name, sampler in SAMPLERS.items()                                # ddpm is with beta_tilde
       if sampler.noise and not sampler.consistency},
    "ddpm, beta": lambda *a, streams: ddpm(*a, streams=streams, variance=beta),
    **{f"ddim, eta = {eta}": lambda *a, streams, eta=eta: ddim(*a, eta=eta, streams=streams)
       for eta in (0.1, 0.5, 1.0)},
}


WEAK = {name: getattr(run, "order", 1) for name, run in RANDOM.items()}


def excess_of_variance(run, schedule, ts, whole=False):
    """(variance of the sampler's x_t) / V_t - 1 for each of VARIANCES, started from N(0, V), without a random number.

    On N(0, s^2) every step is linear in x_t and z: the end is A x_T + sum_i b_i z_i, of variance A^2 V_T + sum_i b_i^2.
    Sample 0 starts from 1 and gets no noise: it ends at A. Sample i starts from 0 and gets draw i only: it ends at b_i.
    """
    V_T, V = (alpha**2 * VARIANCES + sigma**2
              for alpha, sigma in (alpha_sigma(schedule, t) for t in (ts[0], -1 if whole else ts[-1])))
    x_T = np.zeros((len(ts) + 1, 3))
    x_T[0] = 1
    *_, before, clean = run(gaussian(VARIANCES).denoiser(schedule), x_T, ts, streams=one_at_a_time(len(x_T)))
    A, b = np.split(clean.x_t if whole else before.x_t, [1])
    return (A[0] ** 2 * V_T + (b**2).sum(0)) / V - 1


@pytest.mark.law("25c", "variance of the samples = V (1 + C N^-p): weak order p = 1 for beta, beta~ and every eta, and "
                 "2 for DPM-Solver++(2M) SDE",
                 source="DDPM eq. 7, algorithm 2, DDIM eq. 12 and law 40 are linear in x_t and z on Gaussian data",
                 tolerance="p within .08: as for the samplers without noise; of 2M SDE no more than .08 below, since C "
                           "passes through 0 near some of the variances")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", RANDOM)
def test_weak_order_of_the_samplers_with_noise(name, spacing):
    i = (list(SPACINGS).index(spacing) + list(RANDOM).index(name)) % 3
    for table in list(TABLES)[i::3]:
        schedule = MIDDLES[table]
        errors = abs(np.array([excess_of_variance(RANDOM[name], schedule, times(schedule, N, spacing)) for N in NS]))
        for s2, e in zip(VARIANCES, errors.T, strict=True):
            exact = e.max() < 1e-12                         # for every N, as beta is where it is the true variance
            if name == "ddpm, beta":
                assert exact == (s2 == 1)
            if not exact:
                p = fitted_order(e, NS)
                assert -0.08 < p - WEAK[name] < (0.08 if WEAK[name] == 1 else 2), f"{table}, s^2 = {s2}: {p}, {e}"


@pytest.mark.law("25c", "variance of x_0 = s^2 (1 + C N^-p), from T-1 to the clean image",
                 source="as above", tolerance="p within .08: as above")
@pytest.mark.parametrize("name", RANDOM)
def test_weak_order_of_whole_runs(name):
    errors = np.array([excess_of_variance(RANDOM[name], EVEN, times(EVEN, N), whole=True) for N in NS])
    for s2, e in zip(VARIANCES, errors.T, strict=True):
        exact = abs(e).max() < 1e-7                         # but for what the last step loses: 2 sigma(0)^2
        if name == "ddpm, beta":
            assert exact == (s2 == 1)
        if not exact:
            assert abs(fitted_order(abs(e), NS) - WEAK[name]) < 0.08
            if name.startswith(("ddpm", "ddim")):
                assert (e < 0).all() == (name != "ddpm, beta" or s2 > 1)      # beta~ is too little noise, beta too much


@pytest.mark.law(16, "states of the ancestral sampler have variance V exactly: s = 1 with beta, s = 0 with beta~",
                 source="DDPM section 3.2", tolerance="1e-9: rounding / sigma a step")
@quickly
@given(schedule_and_list(ends_at_zero=None))
def test_ancestral_variances_are_exact_in_any_number_of_steps(schedule_and_list):
    schedule, ts = schedule_and_list
    if len(ts) < 2:
        return
    excess = excess_of_variance(RANDOM["ddpm, beta"], schedule, ts)
    assert abs(excess[1]) < 1e-9
    x_T = np.zeros((len(ts) + 1, 1))
    x_T[0] = 1
    *_, before, _ = ddpm(gaussian([0.0]).denoiser(schedule), x_T, ts, streams=one_at_a_time(len(x_T)))
    A, b = np.split(before.x_t, [1])
    (_, sigma_T), (_, sigma) = (alpha_sigma(schedule, t) for t in (ts[0], ts[-1]))
    np.testing.assert_allclose(A[0] ** 2 * sigma_T**2 + (b**2).sum(), sigma**2, rtol=1e-9)
