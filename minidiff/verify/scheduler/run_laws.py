"""Laws of the results of a run, on data for which the network's answers are known (runs.py).

    x_0 is a point        the sample at t is alpha_t x_0 + sigma_t N(0, 1), and at the end x_0
    x_0 ~ N(0, s^2)       one step of DDIM multiplies the sample by (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
                          the exact probability-flow ODE by sqrt(V_s / V_t),   V = alpha^2 s^2 + sigma^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.engine.random import generator
from minidiff.verify.rows import Row, compare, skipped
from minidiff.verify.scheduler.law import BOTH, Named, compare_noise, excess, law, worst
from minidiff.verify.scheduler.protocol import Scheduler, rounding, shown
from minidiff.verify.scheduler.runs import PIXEL, X_0, allowed, draws_noise, gaussian, last_spread, point, spreads, walk

VARIANCE = 0.25                                             # s^2 of the Gaussian data
MANY = (16, 32, 64)                                         # lengths of the runs that measure an order
# Orders are whole numbers, so 1/4 is far from the next lower order. A second term of about half the first at N = 16
# lowers the fitted order by as much: for errors N^-p (1 + c/N) by log((1 + c/16) / (1 + c/64)) / log 4 = 1/4 at c = 9.
ORDER_MISSED = 0.25
VANISHES = ORDER_MISSED + 0.25              # measured: .02 to .12 for wrong noise, .5 and more for right noise
SLOPE = 0.05                                                # of x0_hat over log(alpha / sigma); |x0_hat| stays < 1
SHORTEST = 1e-6                                             # stride of log(alpha / sigma) that is checked
COARSE = 0.01                                               # a step with a larger tolerance would show nothing
LOWEST = -20.0                                              # least log(alpha / sigma), so that SNR 0 is finite


@law("1 q(x_t | x_0)", "the network's input from add_noise in a run")
def noise_of_a_run(named: Named, scheduler: Scheduler, steps) -> Row:
    """add_noise, followed by scale_input, must give the network's input with its scale at that time."""
    x_0, eps = (np.reshape(a, (3, *PIXEL)) for a in zip((1.0, 0.0), (0.0, 1.0), BOTH, strict=True))
    rows = []
    for n in steps:
        scheduler.set_steps(n)
        times, seen = np.array(scheduler.timesteps), []
        # scale_input may depend on the state of the run, so a run on x_0 = 0 takes all steps but the last
        for t, (alpha, sigma, _) in zip(times, walk(scheduler, n, np.zeros((1, *PIXEL)), point(0.0)), strict=False):
            x_t = np.asarray(scheduler.add_noise(x_0, eps, np.full(3, t)))
            seen.append((alpha, sigma, *shown(scheduler, x_t, t).reshape(-1)))
        alpha, sigma, *noised = np.array(seen).T
        rows.append(compare_noise(named, scheduler, times, alpha, sigma, np.stack(noised), f"N = {n}"))
    return worst(rows)


@law("23 marginals", "mean, spread at the list's next time")
def marginals(named: Named, scheduler: Scheduler, steps) -> Row:
    """The marginals are exact on a point, as DDIM's are, or converge with the order that the scheduler claims.

    Noise may have the variance that is exact for a point (beta~) or for N(0, I) (beta), see DDPM section 3.2.  On the
    other kind of data the error then vanishes as the number of steps grows, on some lists at less than its order.
    """
    data = (0.0, 1.0) if draws_noise(scheduler) else (0.0,)
    rows = {s2: worst(_on_the_way(named, scheduler, steps, s2)) for s2 in data}
    row = min(rows.values(), key=excess)
    inexact = [s2 for s2 in data if not rows[s2].passed]
    if not inexact or rows[0.0].passed and getattr(scheduler, "consistency", False):
        return row
    if not _has_room(scheduler):
        if row.passed:
            return skipped(*named, f"it is exact on one kind of data, and for the other {_no_room(scheduler)}")
        return row if _order(scheduler) == 1 else skipped(*named, f"a run of order {_order(scheduler)} is not exact on "
                                                                  f"a point, and {_no_room(scheduler)}")
    order = VANISHES if row.passed else _order(scheduler)
    limit = worst([_converges(named, order, [_error_on_the_way(scheduler, n, s2) for n in MANY],
                              "the error of mean and spread vanishes as N^-order") for s2 in inexact])
    return limit if row.passed or limit.passed else row


def _error_on_the_way(scheduler: Scheduler, n: int, s2: float) -> float:
    alpha, sigma, mean, spread, _ = _until_half_way(spreads(scheduler, n, s2))[-1]
    return max(abs(spread - math.sqrt(alpha**2 * s2 + sigma**2)), abs(mean - (0.0 if s2 else alpha * X_0)))


def _on_the_way(named: Named, scheduler: Scheduler, steps, s2: float) -> list[Row]:
    rows = []
    for n in steps:
        alpha, sigma, mean, spread, _ = np.array(list(spreads(scheduler, n, s2))[1:-1]).T
        data = f"data N(0, {s2:g})" if s2 else f"data x_0 = {X_0}"
        expected = np.sqrt(alpha**2 * s2 + sigma**2)

        def where(i, n=n, data=data):
            return f"after {i + 1} of the list, N = {n}, {data}"

        rows.append(compare(*named, expected, spread, allowed(scheduler, n),
                            "Var x_t = alpha_t^2 s^2 + sigma_t^2", where))
        rows.append(compare(*named, 0 if s2 else alpha * X_0, mean, allowed(scheduler, n),
                            "E x_t = alpha_t E x_0", where))
    return rows


@law("24 a point is reached", "the end of a run without noise")
def end_of_a_point(named: Named, scheduler: Scheduler, steps) -> Row:
    ends = {n: last_spread(scheduler, n) for n in steps}
    # only the roundings of the last x0_hat reach the end, and of the one before if the step extrapolates from it
    return worst([compare(*named, X_0, end[2], allowed(scheduler, n, at=-2), "x_0 = the point", f"N = {n}")
                  for n, end in ends.items()])


@law("26 no noise is left", "spread at the end, on a point")
def noise_left(named: Named, scheduler: Scheduler, steps) -> Row:
    ends = {n: last_spread(scheduler, n) for n in steps}
    return worst([compare(*named, 0.0, end[3], allowed(scheduler, n), "sigma = 0 at the end", f"N = {n}")
                  for n, end in ends.items()])


@law("24 one step", "its factor on Gaussian data")
def one_step(named: Named, scheduler: Scheduler, steps) -> Row:
    """Compares the factor with DDIM's. The law is skipped for other steps that converge with order 1."""
    if draws_noise(scheduler):
        return skipped(*named, "it draws noise")
    if _order(scheduler) != 1:
        return skipped(*named, f"its steps are of order {scheduler.order}")
    rows = []
    for n in steps:
        states = list(_flow(scheduler, n))[:-1]
        alpha, sigma, u = (np.array(a) for a in zip(*((a, s, float(u.item())) for a, s, u in states), strict=True))
        # (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
        factor = (alpha[1:] * alpha[:-1] * VARIANCE + sigma[1:] * sigma[:-1]) / _variance(alpha, sigma)[:-1]
        rows.append(compare(*named, factor, u[1:] / u[:-1], allowed(scheduler, n),
                            "x_s / x_t = (alpha_s alpha_t s^2 + sigma_s sigma_t) / (alpha_t^2 s^2 + sigma_t^2)",
                            lambda i, n=n: f"step {i + 1} of {n}, s^2 = {VARIANCE}"))
    row = worst(rows)
    if not row.passed and _has_room(scheduler) and _flow_order(named, scheduler).passed:
        return skipped(*named, "its step is not DDIM's, and it converges with order 1")
    return row


@law("25 order", "of convergence to the exact flow")
def order_of_convergence(named: Named, scheduler: Scheduler, steps) -> Row:
    if draws_noise(scheduler):
        return skipped(*named, "it draws noise")
    return _flow_order(named, scheduler) if _has_room(scheduler) else skipped(*named, _no_room(scheduler))


def _flow_order(named: Named, scheduler: Scheduler) -> Row:
    errors = []
    for n in MANY:
        states = _until_half_way(_flow(scheduler, n))
        (alpha_t, sigma_t, x_t), (alpha_s, sigma_s, x_s) = states[0], states[-1]
        # x_s / x_t = sqrt(V_s / V_t)
        exact = math.sqrt(_variance(alpha_s, sigma_s) / _variance(alpha_t, sigma_t))
        errors.append(abs(float(x_s.item() / x_t.item()) / exact - 1))
    return _converges(named, _order(scheduler), errors, "x_s / x_t = sqrt(V_s / V_t)")


@law("25 second order", "x0_hat in the middle of each stride")
def middle_of_the_stride(named: Named, scheduler: Scheduler, steps) -> Row:
    """Checks each step alone: errors of extrapolation may cancel along a list, so that no order shows them."""
    if not getattr(scheduler, "extrapolates", False):
        return skipped(*named, "it does not say that it extrapolates x0_hat along log(alpha / sigma)")

    def half_log_snr(alpha, sigma):
        return np.maximum(np.log(alpha / sigma), LOWEST)

    def linear(u, alpha, sigma):
        return SLOPE * half_log_snr(alpha, sigma) + np.zeros_like(u)

    k = 2 if draws_noise(scheduler) else 1                  # the reverse SDE doubles the pull towards x0_hat
    rows = []
    for n in steps:
        # the first step cannot extrapolate, and the last ends at log(alpha / sigma) = infinity: both are left out
        states = list(walk(scheduler, n, np.full((1, *PIXEL), 0.1), linear))[:-1]
        alpha, sigma, u = (np.array(a) for a in zip(*((a, s, float(u.item())) for a, s, u in states), strict=True))
        half = half_log_snr(alpha, sigma)
        h = np.diff(half)
        e_h = sigma[1:] * alpha[:-1] / (alpha[1:] * sigma[:-1])
        # x_s = sigma_s / sigma_t e^{-(k-1)h} x_t + alpha_s (1 - e^{-kh}) D,  without the noise
        D = (u[1:] - sigma[1:] / sigma[:-1] * e_h ** (k - 1) * u[:-1]) / (alpha[1:] * (1 - e_h**k))
        # x_s and each x0_hat have an error of one rounding.  x0_hat is extrapolated, and from eps divided by alpha.
        # The power of drawn noise, 1 - alpha_bar_t / alpha_bar_s, has that error too, and is divided by sigma_t^2.
        power = sigma[:-1] ** 2 if k == 2 else np.ones(len(h))
        tolerance = 100 * rounding(scheduler) * (
            1 / (alpha[1:] * (1 - e_h) * power)[1:] + (1 + h[1:] / h[:-1]) / np.maximum(alpha[:-2], 1e-4))
        # at SNR 0 there is no stride, and a very short one has too few digits
        steps_of = np.flatnonzero((half[:-2] > LOWEST) & (h[:-1] > SHORTEST) & (h[1:] > SHORTEST)
                                  & (tolerance < COARSE))
        if steps_of.size:
            expected = SLOPE * (half[:-1] + h / 2)
            rows.append(compare(*named, expected[1:][steps_of], D[1:][steps_of], tolerance[steps_of],
                                "D = x0_hat at lambda_t + h / 2,   lambda = log(alpha / sigma)",
                                lambda i, n=n, k=steps_of: f"step {k[i] + 2} of {n}"))
    return worst(rows) if rows else skipped(*named, "no run has a step that extrapolates over two strides: N >= 3")


@law("28 batches", "the end, alone and in a batch of 3")
def alone(named: Named, scheduler: Scheduler, steps) -> Row:
    n = steps[-1]
    scheduler.set_steps(n)
    rng = generator(0, "noise alone and in a batch")
    start = 0.1 * rng.standard_normal((3, 2, 2, 1))
    z = 0.1 * rng.standard_normal((len(scheduler.timesteps), *start.shape))
    *_, (_, _, together) = walk(scheduler, n, start, gaussian(VARIANCE), z)
    by_itself = []
    for i in range(3):
        *_, (_, _, end) = walk(scheduler, n, start[i:i + 1], gaussian(VARIANCE), z[:, i:i + 1])
        by_itself.append(end[0])
    return compare(*named, together, by_itself, allowed(scheduler, n), "f(x)[i] = f(x[i])", f"N = {n}")


@law("32 thresholding", "the end, for x_0 in [-1, 1]")
def thresholding(named: Named, scheduler: Scheduler, steps) -> Row:
    """Detects clipping by linearity: without clipping, the end is a multiple of x_0. Laws 24 and 26 check that the
    multiple is 1."""
    n, ends = steps[-1], {}
    for most in (1 / 8, 1.0, 3.0):
        x_0 = np.linspace(-most, most, 9).reshape(1, 3, 3, 1)
        *_, (_, _, end) = walk(scheduler, n, np.zeros_like(x_0), point(x_0))
        ends[most] = end.reshape(-1)
    tolerance = allowed(scheduler, n)                       # for |x_0| <= 1; in proportion for a larger x_0
    unclipped = 8 * ends[1 / 8]                             # too small to be clipped, then scaled by linearity
    if abs(ends[3.0] - 3 * unclipped).max() <= 3 * tolerance and abs(ends[1.0] - unclipped).max() <= tolerance:
        return skipped(*named, "it clips nothing: an x_0 up to 3 keeps its size")
    row = compare(*named, unclipped, ends[1.0], tolerance, "end(x_0) = 8 end(x_0 / 8) where |x_0| <= 1", f"N = {n}")
    return worst([row, compare(*named, np.clip(ends[3.0], -1, 1), ends[3.0], 3 * tolerance,
                               "|x_0| <= 1 after clipping", f"x_0 up to 3, N = {n}")])


def _flow(scheduler: Scheduler, n: int):
    return walk(scheduler, n, np.full((1, *PIXEL), 0.1), gaussian(VARIANCE))   # small, so that nothing is clipped


def _variance(alpha, sigma):
    return alpha**2 * VARIANCE + sigma**2


def _order(scheduler: Scheduler) -> float:
    return getattr(scheduler, "order", 1)


def _has_room(scheduler: Scheduler) -> bool:
    return len(scheduler.alpha_bar) >= 8 * MANY[-1]


def _no_room(scheduler: Scheduler) -> str:
    return f"T = {len(scheduler.alpha_bar)} has no room for even lists of {MANY[-1]} times"


def _until_half_way(states):
    """The states up to the first with sigma <= alpha. After it, strides of log(sigma / alpha) are too long to show an
    order with so few steps."""
    kept = []
    for state in states:
        kept.append(state)
        if state[1] <= state[0]:
            return kept
    return kept


def _converges(named: Named, order: float, errors: Sequence[float], formula: str) -> Row:
    measured = -float(np.polyfit(np.log(MANY), np.log(errors), 1)[0])
    error = max(0.0, order - measured) if math.isfinite(measured) else math.inf
    return Row(*named, order, measured, error, ORDER_MISSED, formula,
               f"errors {', '.join(f'{e:.2g}' for e in errors)} at N = {', '.join(map(str, MANY))}", side=">=")


RUNS = (noise_of_a_run, marginals, end_of_a_point, one_step, order_of_convergence, middle_of_the_stride, noise_left,
        alone, thresholding)
