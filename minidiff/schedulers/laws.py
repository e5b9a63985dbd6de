"""The laws that apply to a scheduler, whoever wrote it. Nothing here is random, and no law needs a network.

Two kinds of data have a known answer to every question that a scheduler asks of the network, shown u:

    x_0 is a point        x0_hat = x_0;   the sample at t is alpha_t x_0 + sigma_t N(0, 1), and at the end x_0
    x_0 ~ N(0, s^2)       x0_hat = alpha s^2 / V u,   V = alpha^2 s^2 + sigma^2
                          one step of first order multiplies by (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
                          the exact flow of the probability-flow ODE by sqrt(V_s / V_t)

On both, a run is affine in its starting noise and in every draw on the way: a batch of unit vectors reads off the
coefficients, and the sum of their squares is the variance of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from minidiff.diffusion.schedules import MOST_SIGNAL_AT_THE_END
from minidiff.errors import UserError
from minidiff.schedulers.protocol import Scheduler, check, levels, rounding, shown
from minidiff.verify.rows import Row, compare, count, skipped

STEPS = (3, 7, 10, 20, 50)                                  # lengths of runs; 3 and 7 do not divide T = 1000
PIXEL = (1, 1, 1)                                           # a sample: some schedulers want images
X_0 = 0.7                                                   # the point: within [-1, 1], for those who clip
VARIANCE = 0.25                                             # s^2 of the Gaussian data
LONGEST = 200                                               # lists of 1 to so many times are read, and that of T
MANY = (16, 32, 64)                                    # runs whose errors show an order of convergence


def report(scheduler: Scheduler, steps: Sequence[int] = STEPS) -> list[Row]:
    """A row for each law. steps: the lengths of the runs that are tried, 2 or more; a row tells the worst of them.

    UserError where the scheduler lacks a method, or no such run fits in its table. A law whose computation fails is
    broken, and says how.
    """
    check(scheduler)
    T = len(scheduler.alpha_bar)
    steps = [n for n in steps if 2 <= n <= T]
    if not steps:
        raise UserError(f"the laws need runs of 2 to {T} steps, the times of this scheduler's training")
    rows = []
    with np.errstate(all="ignore"):
        for law in (*TABLE, *RUNS):
            try:
                if law in RUNS and rows[REFUSAL].passed:
                    rows.append(skipped(*_named(law), f"it refuses to run: {rows[REFUSAL].where}"))
                else:
                    rows.append(law(scheduler, steps))
            except Exception as error:                      # one failure does not hide what the others find
                rows.append(Row(*_named(law), math.nan, math.nan, math.inf, 0.0,
                                where=f"{type(error).__name__}: {error}"))
    return rows


def as_dicts(rows: Sequence[Row]) -> list[dict]:
    """The rows as JSON has them: what is no finite number is null."""
    def plain(a):
        return None if isinstance(a, float) and not math.isfinite(a) else a

    return [{k: plain(v) for k, v in asdict(row).items()} | {"verdict": row.verdict} for row in rows]


# ---- runs on data whose answers are known ------------------------------------------------------------------

Answer = Callable[[np.ndarray, float, float], np.ndarray]   # x0_hat of what is shown, alpha and sigma


def point(x_0) -> Answer:
    return lambda u, alpha, sigma: x_0 + np.zeros_like(u)


def gaussian(s2: float) -> Answer:
    return lambda u, alpha, sigma: alpha * s2 / (alpha**2 * s2 + sigma**2) * u


def walk(scheduler: Scheduler, n: int, start, answer: Answer, z=None) -> Iterator[tuple[float, float, np.ndarray]]:
    """(alpha, sigma, what is shown) at each time of a run of n steps; at last (1, 0, the sample).

    start: (B, ...), what is shown at the first time. z: (the list's length, B, ...), the noise of each step; else 0.
    """
    scheduler.set_steps(n)
    level, x_t = levels(scheduler), None
    for i, t in enumerate(scheduler.timesteps):
        if x_t is None:
            x_t = start / shown(scheduler, np.ones_like(start), t)
        u, (alpha, sigma) = shown(scheduler, x_t, t), level[i]
        yield alpha, sigma, u
        x0_hat = answer(u, alpha, sigma)
        # eps = (u - alpha x_0) / sigma,   v = alpha eps - sigma x_0 = (alpha u - x_0) / sigma
        prediction = {"x0": x0_hat, "eps": (u - alpha * x0_hat) / sigma, "v": (alpha * u - x0_hat) / sigma}
        x_t = scheduler.step(prediction[scheduler.predicts], t, x_t, np.zeros_like(start) if z is None else z[i])
    yield 1.0, 0.0, x_t


Spread = tuple[float, float, float, float, float]


def spreads(scheduler: Scheduler, n: int, s2: float = 0.0) -> Iterator[Spread]:
    """At each time, and at the end: alpha, sigma, the sample's mean, its standard deviation, and the draws' part of it.

    Data: the point X_0; or N(0, s2) if s2 is given. The start has the spread of its own level.
    """
    scheduler.set_steps(n)
    draws, (alpha, sigma) = len(scheduler.timesteps), levels(scheduler)[0]
    z = np.concatenate([np.zeros((draws, 2)), np.eye(draws)], axis=1).reshape(draws, 2 + draws, *PIXEL)
    start = np.full((2 + draws, *PIXEL), 0.0 if s2 else alpha * X_0)                  # (2 + draws, 1, 1, 1)
    start[1] += math.sqrt(alpha**2 * s2 + sigma**2)
    for alpha, sigma, u in walk(scheduler, n, start, gaussian(s2) if s2 else point(X_0), z):
        u = u.reshape(-1)
        moved = u[1:] - u[0]                                # by a unit of the start's noise, and of each draw
        yield alpha, sigma, float(u[0]), float(np.linalg.norm(moved)), float(np.linalg.norm(moved[1:]))


def last_spread(scheduler: Scheduler, n: int) -> Spread:
    *_, last = spreads(scheduler, n)
    return last


def draws_noise(scheduler: Scheduler) -> bool:
    return any(drawn > 0 for *_, drawn in spreads(scheduler, min(4, len(scheduler.alpha_bar))))


def allowed(scheduler: Scheduler, n: int) -> float:
    """100 roundings of what a run adds and subtracts: 1; or 1 / alpha_1 where eps, or a sample kept as
    x_0 + (sigma / alpha) eps, has to give x_0 back."""
    scheduler.set_steps(n)
    scale = abs(float(shown(scheduler, np.ones((1, *PIXEL)), scheduler.timesteps[0]).item()))
    if scheduler.predicts == "eps":
        scale = min(scale, float(levels(scheduler)[0, 0]))
    return 100 * rounding(scheduler) / min(1.0, max(scale, 1e-4))


def worst(rows: Sequence[Row]) -> Row:
    """The one furthest beyond what it is allowed; what is not finite is worse than any number."""
    return max(rows, key=lambda r: r.error / r.tolerance if math.isfinite(r.error) else math.inf)


# ---- the table, and the noise that it stands for -----------------------------------------------------------

def training_noise(scheduler: Scheduler, steps) -> Row:
    """1 q(x_t | x_0): sigma of add_noise at all times of training"""
    abar = np.asarray(scheduler.alpha_bar, np.float64)
    return _noising(training_noise, scheduler, np.arange(len(abar)), np.sqrt(abar), np.sqrt(1 - abar), "before any run")


def noise_of_a_run(scheduler: Scheduler, steps) -> Row:
    """1 q(x_t | x_0): sigma of add_noise at the times of a run"""
    rows = []
    for n in steps:
        scheduler.set_steps(n)
        t, (alpha, sigma) = np.asarray(scheduler.timesteps), levels(scheduler).T
        rows.append(_noising(noise_of_a_run, scheduler, t, alpha, sigma, f"N = {n}"))
    return worst(rows)


def _noising(law, scheduler: Scheduler, t, alpha, sigma, when: str) -> Row:
    """add_noise at times t, in whatever scale, against alpha x_0 + sigma eps; t[i] is the i-th sample's."""
    def noised(x_0, eps):
        x_0, eps = (np.broadcast_to(a, len(t)).reshape(-1, *PIXEL) for a in (x_0, eps))
        return np.asarray(scheduler.add_noise(x_0, eps, t)).reshape(-1)

    a, b = noised(1.0, 0.0), noised(0.0, 1.0)
    scale = np.hypot(a, b)
    x_0, eps = np.cos(np.arange(1, len(t) + 1)), np.sin(np.arange(len(t)))
    bent = abs(noised(x_0, eps) - a * x_0 - b * eps) / scale
    row = compare(*_named(law), sigma, b / scale, 100 * rounding(scheduler), "x_t = alpha_t x_0 + sigma_t eps",
                  lambda i: f"t = {t[i]:g}, {when}")
    i = int(np.argmax(np.nan_to_num(bent, nan=np.inf)))
    return worst([row, Row(*_named(law), 0.0, float(bent[i]), float(bent[i]), 100 * rounding(scheduler),
                           "add_noise is linear in x_0 and eps", f"t = {t[i]:g}, {when}")])


def snr_falls(scheduler: Scheduler, steps) -> Row:
    """3 the SNR falls: times at which alpha_bar does not"""
    abar = np.concatenate([[1.0], scheduler.alpha_bar])
    return count(*_named(snr_falls), ~((np.diff(abar) < 0) & (abar[1:] >= 0)),
                 "1 > alpha_bar_0 > alpha_bar_1 > ... >= 0", lambda i: f"t = {i}")


def ends_in_noise(scheduler: Scheduler, steps) -> Row:
    """4 the end is noise: alpha_bar of the last time"""
    return compare(*_named(ends_in_noise), 0.0, float(scheduler.alpha_bar[-1]), MOST_SIGNAL_AT_THE_END,
                   "alpha_bar_{T-1} = 0, where sampling starts from N(0, I)", f"T = {len(scheduler.alpha_bar)}")


def no_eps_without_signal(scheduler: Scheduler, steps) -> Row:
    """5 no eps at SNR 0: runs that should be refused"""
    name, abar = _named(no_eps_without_signal), scheduler.alpha_bar[-1]
    if not abar == 0:
        return skipped(*name, f"alpha_bar ends at {abar:.2g}, above 0")
    if scheduler.predicts != "eps":
        return skipped(*name, f"it predicts {scheduler.predicts}, which says what x_0 is at SNR 0, too")
    scheduler.set_steps(steps[-1])
    if not (levels(scheduler)[:, 0] == 0).any():
        return skipped(*name, f"alpha_bar ends at 0, where no run of {steps[-1]} steps asks")
    try:
        end = last_spread(scheduler, steps[-1])[2]
    except ValueError as error:
        return Row(*name, 0.0, 0.0, 0.0, 0.0, where=str(error))
    return Row(*name, 0.0, 1.0, 1.0, 0.0, "x_t = eps at SNR 0 says nothing of x_0",
               f"N = {steps[-1]}: it ends at {end:.3g} for x_0 = {X_0}")


# ---- the list of times -------------------------------------------------------------------------------------

def first_time(scheduler: Scheduler, steps) -> Row:
    """26 starts at T-1: the first time of a list"""
    return _first(first_time, scheduler, steps[-1])


def only_time(scheduler: Scheduler, steps) -> Row:
    """26 starts at T-1: the only time where N = 1"""
    return _first(only_time, scheduler, 1)


def _first(law, scheduler: Scheduler, n: int) -> Row:
    scheduler.set_steps(n)
    return compare(*_named(law), len(scheduler.alpha_bar) - 1, float(scheduler.timesteps[0]), 1e-3,
                   "t_1 = T - 1: what is noise is told to be noise", f"N = {n}")


def lists(scheduler: Scheduler, steps) -> Row:
    """26 N falling times: lists without them, N = 1 to 200, T"""
    T, faults = len(scheduler.alpha_bar), {}
    for n in sorted({*range(1, min(T, LONGEST) + 1), T}):
        scheduler.set_steps(n)
        t = np.asarray(scheduler.timesteps, np.float64)
        t = np.concatenate([t[:1], t[1::getattr(scheduler, "evaluations", 1)]])
        wrong = {f"{len(t)} times": len(t) != n, "a time that does not fall": (np.diff(t) >= 0).any(),
                 f"t = {t.min():g}": t.min() < 0, f"t = {t.max():g}": t.max() > T - 1}
        faults[n] = ", ".join(what for what, is_so in wrong.items() if is_so)
    first = next((f"first at N = {n}: {fault}" for n, fault in faults.items() if fault), "")
    return count(*_named(lists), [bool(fault) for fault in faults.values()], "T - 1 >= t_1 > ... > t_N >= 0", first)


def told_what_is_shown(scheduler: Scheduler, steps) -> Row:
    """26 told what is shown: log(sigma / alpha) of a run, at its t"""
    abar, rows = np.asarray(scheduler.alpha_bar, np.float64), []
    table = 0.5 * (np.log1p(-abar) - np.log(abar))          # log(sigma / alpha) at 0 .. T-1, rising
    for n in steps:
        scheduler.set_steps(n)
        t, (alpha, sigma) = np.asarray(scheduler.timesteps, np.float64), levels(scheduler).T
        inside = np.clip(t, 0, len(abar) - 1)
        low, high = table[np.floor(inside).astype(int)], table[np.ceil(inside).astype(int)]
        level = np.log(sigma) - np.log(alpha)
        # a fractional t may have any noise between that of its neighbours
        expected = np.clip(level, low, high)
        same = np.isinf(level) & (level == expected)
        rows.append(compare(*_named(told_what_is_shown), np.where(same, 0, expected), np.where(same, 0, level),
                            100 * rounding(scheduler), "sigma / alpha of what is shown at t = the table's at t",
                            lambda i, t=t, n=n: f"t = {t[i]:g}, N = {n}"))
    return worst(rows)


# ---- runs --------------------------------------------------------------------------------------------------

def marginals(scheduler: Scheduler, steps) -> Row:
    """23 the marginals: mean, spread at the list's next time"""
    if draws_noise(scheduler):
        # the variance of a draw is right for a point (beta~) or for N(0, I) (beta): DDPM section 3.2 has both
        return min(worst(_on_the_way(scheduler, steps, 0.0)), worst(_on_the_way(scheduler, steps, 1.0)),
                   key=lambda r: r.error / r.tolerance if math.isfinite(r.error) else math.inf)
    row = worst(_on_the_way(scheduler, steps, 0.0))
    order = getattr(scheduler, "order", 1)
    if row.passed or order == 1 or not _has_room(scheduler):
        return row
    # of higher order and not exact on a point, as it is where the slope is not constant: then its error vanishes
    errors = []
    for n in MANY:
        alpha, sigma, mean, spread, _ = _until_half_way(spreads(scheduler, n))[-1]
        errors.append(max(abs(spread - sigma), abs(mean - alpha * X_0)))
    return _converges(marginals, order, errors, "the error on a point vanishes as N^-order")


def _on_the_way(scheduler: Scheduler, steps, s2: float) -> list[Row]:
    rows = []
    for n in steps:
        alpha, sigma, mean, spread, _ = np.array(list(spreads(scheduler, n, s2))[1:-1]).T
        data = f"data N(0, {s2:g})" if s2 else f"data x_0 = {X_0}"
        expected = np.sqrt(alpha**2 * s2 + sigma**2)
        where = lambda i, n=n, data=data: f"after {i + 1} of the list, N = {n}, {data}"  # noqa: E731
        rows.append(compare(*_named(marginals), expected, spread, allowed(scheduler, n),
                            "Var x_t = alpha_t^2 s^2 + sigma_t^2", where))
        rows.append(compare(*_named(marginals), 0 if s2 else alpha * X_0, mean, allowed(scheduler, n),
                            "E x_t = alpha_t E x_0", where))
    return rows


def end_of_a_point(scheduler: Scheduler, steps) -> Row:
    """24 a point is reached: the end of a run without noise"""
    ends = {n: last_spread(scheduler, n) for n in steps}
    return worst([compare(*_named(end_of_a_point), X_0, end[2], allowed(scheduler, n), "x_0 = the point", f"N = {n}")
                  for n, end in ends.items()])


def noise_left(scheduler: Scheduler, steps) -> Row:
    """26 no noise is left: spread at the end, on a point"""
    ends = {n: last_spread(scheduler, n) for n in steps}
    return worst([compare(*_named(noise_left), 0.0, end[3], allowed(scheduler, n), "sigma = 0 at the end", f"N = {n}")
                  for n, end in ends.items()])


def one_step(scheduler: Scheduler, steps) -> Row:
    """24 one step: its factor on Gaussian data"""
    if draws_noise(scheduler):
        return skipped(*_named(one_step), "it draws noise")
    if getattr(scheduler, "order", 1) > 1:
        return skipped(*_named(one_step), f"its steps are of order {scheduler.order}")
    rows = []
    for n in steps:
        states = list(_flow(scheduler, n))[:-1]
        alpha, sigma, u = (np.array(a) for a in zip(*((a, s, float(u.item())) for a, s, u in states), strict=True))
        # (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
        factor = (alpha[1:] * alpha[:-1] * VARIANCE + sigma[1:] * sigma[:-1]) / _variance(alpha, sigma)[:-1]
        rows.append(compare(*_named(one_step), factor, u[1:] / u[:-1], allowed(scheduler, n),
                            "x_s / x_t = (alpha_s alpha_t s^2 + sigma_s sigma_t) / (alpha_t^2 s^2 + sigma_t^2)",
                            lambda i, n=n: f"step {i + 1} of {n}, s^2 = {VARIANCE}"))
    return worst(rows)


def order_of_convergence(scheduler: Scheduler, steps) -> Row:
    """25 order: of convergence to the exact flow"""
    name = _named(order_of_convergence)
    if draws_noise(scheduler):
        return skipped(*name, "it draws noise")
    if not _has_room(scheduler):
        return skipped(*name, f"T = {len(scheduler.alpha_bar)} has no room for even lists of 64 times")
    errors = []
    for n in MANY:
        states = _until_half_way(_flow(scheduler, n))
        (alpha_t, sigma_t, x_t), (alpha_s, sigma_s, x_s) = states[0], states[-1]
        # x_s / x_t = sqrt(V_s / V_t)
        exact = math.sqrt(_variance(alpha_s, sigma_s) / _variance(alpha_t, sigma_t))
        errors.append(abs(float(x_s.item() / x_t.item()) / exact - 1))
    return _converges(order_of_convergence, getattr(scheduler, "order", 1), errors, "x_s / x_t = sqrt(V_s / V_t)")


def alone(scheduler: Scheduler, steps) -> Row:
    """28 batches: the end, alone and in a batch of 3"""
    n = steps[-1]
    scheduler.set_steps(n)
    rng = np.random.default_rng(0)
    start = 0.1 * rng.standard_normal((3, 2, 2, 1))
    z = 0.1 * rng.standard_normal((len(scheduler.timesteps), *start.shape))
    *_, (_, _, together) = walk(scheduler, n, start, gaussian(VARIANCE), z)
    by_itself = []
    for i in range(3):
        *_, (_, _, end) = walk(scheduler, n, start[i:i + 1], gaussian(VARIANCE), z[:, i:i + 1])
        by_itself.append(end[0])
    return compare(*_named(alone), together, by_itself, allowed(scheduler, n), "f(x)[i] = f(x[i])", f"N = {n}")


def thresholding(scheduler: Scheduler, steps) -> Row:
    """32 thresholding: the end, for x_0 in [-1, 1]"""
    n, ends = steps[-1], []
    for most in (1.0, 3.0):
        x_0 = np.linspace(-most, most, 9).reshape(1, 3, 3, 1)
        *_, (_, _, end) = walk(scheduler, n, np.zeros_like(x_0), point(x_0))
        ends.append(end.reshape(-1))
    tolerance, clips = 3 * allowed(scheduler, n), abs(ends[1] - np.linspace(-3, 3, 9)).max() > 0.1
    row = compare(*_named(thresholding), np.linspace(-1, 1, 9), ends[0], tolerance, "|x_0| <= 1", f"N = {n}")
    if not clips:
        return row
    return worst([row, compare(*_named(thresholding), np.clip(ends[1], -1, 1), ends[1], tolerance,
                               "|x_0| <= 1 after clipping", f"x_0 up to 3, N = {n}")])


def _flow(scheduler: Scheduler, n: int):
    return walk(scheduler, n, np.full((1, *PIXEL), 0.1), gaussian(VARIANCE))   # small: who clips has nothing to clip


def _variance(alpha, sigma):
    return alpha**2 * VARIANCE + sigma**2


def _has_room(scheduler: Scheduler) -> bool:
    return len(scheduler.alpha_bar) >= 8 * MANY[-1]


def _until_half_way(states):
    """As far as the first with sigma <= alpha. Below it strides of t are huge in log(sigma / alpha), and an order is
    not seen with so few steps."""
    kept = []
    for state in states:
        kept.append(state)
        if state[1] <= state[0]:
            return kept
    return kept


def _converges(law, order: float, errors: Sequence[float], formula: str) -> Row:
    measured = -float(np.polyfit(np.log(MANY), np.log(errors), 1)[0])
    error = max(0.0, order - measured) if math.isfinite(measured) else math.inf
    return Row(*_named(law), order, measured, error, 0.25, formula,
               f"errors {', '.join(f'{e:.2g}' for e in errors)} at N = {', '.join(map(str, MANY))}")


def _named(law: Callable) -> tuple[str, str]:
    """A law's docstring is its number and name, and what is computed."""
    name, computed = law.__doc__.split(": ")
    return name, computed


TABLE = (no_eps_without_signal, training_noise, noise_of_a_run, snr_falls, ends_in_noise, first_time, only_time, lists,
         told_what_is_shown)
RUNS = (marginals, end_of_a_point, noise_left, one_step, order_of_convergence, alone, thresholding)
REFUSAL = TABLE.index(no_eps_without_signal)
