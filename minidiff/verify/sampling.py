"""Samplers, step by step, on data for which the exact answer is known: one point, or a Gaussian.

The laws of verify/scheduler check each registered sampler against its entry in SAMPLERS: whether it draws noise, its
order, its calls of the denoiser per step, and whether it extrapolates.

    23  the marginals                are exact on a point, or converge with the entry's order
    24  a point is reached           at the end of a run
        one step on Gaussian data    multiplies by (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t, if its order is 1
    25  the order                    of convergence to the exact flow, sqrt(V_s / V_t)
        second order                 2M uses x0_hat at the middle of each stride           DPM-Solver++ algorithm 2
    26  the end                      every list of times ends at t = -1, at x0_hat, with no noise left
    28  batches                      a sample does not depend on its batch

The other options of minidiff's functions are compared with the exact step:

    23  DDIM, for every eta          (direction)^2 + (noise)^2 = sigma_s^2                         DDIM eq. 12
        ddpm, for both variances     beta~ is exact on a point, beta on N(0, 1)                 DDPM section 3.2
    25  Heun                         averages two slopes                                Karras et al. 2022, algorithm 1
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from minidiff.diffusion import samplers, schedules
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.samplers import SAMPLERS, Sampler
from minidiff.diffusion.schedules import Schedule
from minidiff.errors import user_code
from minidiff.verify.forward import pairs
from minidiff.verify.rows import ATOMS, BROKEN, EPS, KEPT, Law, Row, compare, computed, count, skipped
from minidiff.verify.scheduler.law import worst
from minidiff.verify.scheduler.replay import GivenNoise, Replayed, of_sampler
from minidiff.verify.scheduler.run_laws import (
    alone,
    end_of_a_point,
    marginals,
    middle_of_the_stride,
    noise_left,
    one_step,
    order_of_convergence,
)
from minidiff.verify.scheduler.table_laws import LISTS

TWO_TIMES = "needs two times, T >= 2"
STEPS = (3, 7)                                              # lengths of runs, those longer than the table left out
# Measuring an order requires a long and smooth table, and the user's schedule may be neither.
LONG_TABLE = schedules.linear(1000)


# ---- each registered sampler against its entry --------------------------------------------------------------

def each_sampler(law: Law, schedule: Schedule, rng, *, long: bool = False, or_long: bool = False) -> Iterator[Row]:
    """One row for all samplers that keep the law, and one for each that breaks it.

    long: use LONG_TABLE in place of the schedule. or_long: a sampler that breaks the law on the schedule may keep it
    on LONG_TABLE by its order of convergence.
    """
    rows = {}
    for name in SAMPLERS:
        rows[name] = on_long_table(law, name, SAMPLERS[name]) if long else _on(law, name, schedule)
        if or_long and rows[name].verdict != KEPT:
            of_long = on_long_table(law, name, SAMPLERS[name])
            if of_long.verdict != KEPT or of_long.side:     # not merely exact on the long table
                rows[name] = of_long
    kept = {name: row for name, row in rows.items() if row.verdict == KEPT}
    broken = {name: row for name, row in rows.items() if row.verdict == BROKEN}
    if kept:
        row = worst(list(kept.values()))
        name = next(name for name in kept if kept[name] is row)
        yield _about(row, f"{law.computed}: {', '.join(kept)}", name)
    for name, row in broken.items():
        yield _about(row, f"{law.computed}: {name}", name)
    if not kept and not broken:
        yield skipped(law.name, law.computed, "; ".join(dict.fromkeys(row.reason for row in rows.values())))


@cache
def on_long_table(law: Law, name: str, sampler: Sampler) -> Row:
    """The sampler's row on LONG_TABLE. It does not depend on the user's schedule, so it is computed once."""
    return _on(law, name, LONG_TABLE)


def _on(law: Law, name: str, table: Schedule) -> Row:
    """The sampler's row on this table; the row is broken if the sampler cannot be loaded or raises."""
    if table.T < 2:
        return skipped(law.name, law.computed, TWO_TIMES)

    def rows() -> Iterable[Row]:
        # x_t - alpha_t x_0 has an error of one rounding, and is divided by sigma_t; the power of the noise,
        # 1 - alpha_bar_t / alpha_bar_s, has an error of one rounding, and is divided by sigma_t^2; a sampler that looks
        # back extrapolates, with weights whose sizes sum to at most 20/3 (Adams-Bashforth of order 4)
        sampler, sigma = SAMPLERS[name], float(table.sigma(0))
        rounding = EPS / 2 * (1 + 2 * sampler.history) / (sigma**2 if sampler.noise else sigma)
        return law.rows(of_sampler(sampler, table, rounding=rounding), _steps(table))

    row, = computed(Law(law.name, rows, law.computed))
    return row


def _steps(table: Schedule) -> Sequence[int]:
    return [n for n in STEPS if n <= table.T] or [table.T]


def _about(row: Row, compared: str, name: str) -> Row:
    return replace(row, computed=compared, where=f"{name}, {row.where}".rstrip(", "))


def list_of_times(law: Law, schedule: Schedule, rng) -> Iterator[Row]:
    """The laws of the lists of times, which are the same for every sampler."""
    listed = Replayed(None, schedule.alpha_bar, "x0", partial(samplers.times, schedule))
    yield from law.rows(listed, _steps(schedule))


class RecordingDenoiser:
    """A denoiser that records each question's time and each answer."""

    def __init__(self, denoiser: Denoiser):
        self.schedule, self.denoiser = denoiser.schedule, denoiser
        self.times: list[int] = []
        self.answers: list[np.ndarray] = []

    def __call__(self, x_t, t, cond=None):
        self.times.append(int(t[0]))
        self.answers.append(self.denoiser(x_t, t, cond))
        return self.answers[-1].copy()


def the_end(schedule: Schedule, rng) -> Iterator[Row]:
    """26 the end: each sampler follows its list of times to -1, ends at x0_hat, and agrees with its entry.

    The states are compared with the calls and answers that the denoiser recorded.
    """
    law, mixture = "26 the end", MixtureDenoiser(schedule, [0.3, 0.7], rng.standard_normal((2, 2)), [0.1, 0.5])
    names, left, astray, invented, misnamed = [], [], [], [], []
    for name, sampler in SAMPLERS.items():
        for N in sorted({1, min(2, schedule.T), min(7, schedule.T)}):
            times = samplers.times(schedule, N).tolist()
            names.append(f"{name}, {N} steps, times {', '.join(map(str, times))}")
            asked, noise = RecordingDenoiser(mixture), GivenNoise(2, lambda: rng.standard_normal((2, 2)))
            states, questions = [], []                      # of each step: its state, and the times of its calls
            with user_code(f"the sampler {name!r} ended with an error"):
                for state in sampler(asked, rng.standard_normal((2, 2)), times, streams=noise):
                    states.append(state)
                    questions.append(asked.times[sum(map(len, questions)):])
            left.append(np.abs(states[-1].x_t - asked.answers[-1]).max())
            astray.append([at[0] for at in questions if at] != times or [s.t for s in states] != [*times[1:], -1])
            invented.append(not all(any(np.array_equal(state.x0_hat, answer) for answer in asked.answers)
                                    for state in states))
            # the last step may need fewer calls, and draws no noise
            more = [len(at) - sampler.calls for at in questions[:-1]]
            misnamed.append(any(more[1:]) or any(m not in (0, sampler.first_calls) for m in more[:1])
                            or (noise.drawn > 0) != (sampler.noise and N > 1))
    yield compare(law, "noise left: |x - x0_hat| at the end", 0.0, left, 0.0,
                  "sigma_{-1} = 0: the last state is the denoiser's last x0_hat", lambda i: names[i], random=True)
    yield count(law, "samplers that leave their list of times", astray,
                "each step first asks the denoiser at its time of the list; its state is at the next, the last at -1",
                lambda i: names[i])
    yield count(law, "samplers that show an x0_hat of their own", invented,
                "a state's x0_hat is the denoiser's answer", lambda i: names[i])
    yield count(law, "samplers whose entry is wrong", misnamed,
                "a step makes the entry's number of calls, and draws noise exactly if the entry says so",
                lambda i: names[i])


# ---- the exact steps of minidiff's samplers ---------------------------------------------------------------

def _one_step(sampler: Callable, denoiser: Denoiser, x_t: np.ndarray, t: int, s: int, **options) -> np.ndarray:
    """The sampler's x_s (B,) after one step from x_t (B, 1) at time t."""
    return next(sampler(denoiser, x_t, [t, s] if s >= 0 else [t], **options)).x_t[:, 0]


def ddim_marginals(schedule: Schedule, rng) -> Iterator[Row]:
    """23 DDIM marginals: a step from x_t = alpha_t x_0 + sigma_t eps to x_s, where x_0 is a point."""
    x_0, law = 0.7, "23 DDIM marginals"
    point = GaussianDenoiser(schedule, np.array([x_0]), np.zeros(1))
    s, t = pairs(rng, schedule.T, 24, first=-1)
    cases = [(a, b, eta) for a, b in zip(s, t, strict=True) for eta in (0.0, 0.5, 1.0)]
    mean, power = [], []
    for a, b, eta in cases:
        alpha, sigma = np.sqrt(schedule.alpha_bar[b]), np.sqrt(1 - schedule.alpha_bar[b])
        # three samples: eps = z = 0, then eps = 1, then z = 1
        x_t, z = alpha * x_0 + sigma * np.array([[0.0], [1.0], [0.0]]), np.array([[0.0], [0.0], [1.0]])
        clean, of_eps, of_z = _one_step(samplers.ddim, point, x_t, b, a, eta=eta, streams=GivenNoise(3, lambda z=z: z))
        mean.append(clean)
        power.append((of_eps - clean) ** 2 + (of_z - clean) ** 2)
    abar_s = np.array([schedule.alpha_bar[a] if a >= 0 else 1.0 for a, _, _ in cases])
    # eps_hat is divided by sigma_t, which magnifies the rounding of x_t
    sigma_t = np.array([np.sqrt(1 - schedule.alpha_bar[b]) for _, b, _ in cases])

    def at(i):
        return "t = {1}, s = {0}, eta = {2}".format(*cases[i])

    yield compare(law, "mean of x_s, x_0 = 0.7", np.sqrt(abar_s) * x_0, mean, ATOMS / sigma_t,
                  "E[x_s] = alpha_s x_0", at, random=True)
    yield compare(law, "variance of x_s, eta = 0, 0.5, 1", 1 - abar_s, power, ATOMS / sigma_t,
                  "(sqrt(sigma_s^2 - sigma^2))^2 + sigma^2 = sigma_s^2", at, random=True)


def ddpm_marginals(schedule: Schedule, rng) -> Iterator[Row]:
    """23 ddpm marginals: a step of ddpm with variance beta~ on a point, and with beta on N(0, 1)."""
    law = "23 ddpm marginals"
    s, t = pairs(rng, schedule.T, 24, first=-1)
    abar_s, abar_t = np.where(s >= 0, schedule.alpha_bar[s], 1.0), schedule.alpha_bar[t]
    beta = 1 - abar_t / abar_s
    # ddpm's noise has the variance beta~ by default; the last step adds no noise
    data = {"beta~ on x_0 = 0.7": (0.7, 0.0, {}, (1 - abar_s) / (1 - abar_t) * beta),
            "beta on N(0, 1)": (0.0, 1.0, {"variance": samplers.beta}, np.where(s >= 0, beta, 0.0))}
    # 1 - alpha_bar_t / alpha_bar_s has an error of eps, and is divided by sigma_t^2
    tolerance = ATOMS / (1 - abar_t)

    def at(i):
        return f"t = {t[i]}, s = {s[i]}"

    for which, (x_0, s2, options, drawn) in data.items():
        denoiser = GaussianDenoiser(schedule, np.array([x_0]), np.full(1, s2))
        mean, of_start, of_z = [], [], []
        for a, b, abar in zip(s, t, abar_t, strict=True):
            # three samples x_t: the mean, one standard deviation above it, and the mean again with z = 1
            x_t = np.sqrt(abar) * x_0 + np.sqrt(abar * s2 + 1 - abar) * np.array([[0.0], [1.0], [0.0]])
            x_s = _one_step(samplers.ddpm, denoiser, x_t, b, a, **options,
                            streams=GivenNoise(3, lambda: np.array([[0.0], [0.0], [1.0]])))
            mean.append(x_s[0])
            of_start.append((x_s[1] - x_s[0]) ** 2)
            of_z.append((x_s[2] - x_s[0]) ** 2)
        yield compare(law, f"power of the noise, {which}", drawn, of_z, tolerance,
                      "x_s = mu~ + sqrt(variance) z", at, random=True)
        yield compare(law, f"mean of x_s, {which}", np.sqrt(abar_s) * x_0, mean, tolerance,
                      "E[x_s] = alpha_s E[x_0]", at, random=True)
        # the last step returns E[x_0 | x_t], whose variance is that of x_0 only if x_0 is a point
        inner = s >= 0 if s2 else s >= -1
        if inner.any():
            yield compare(law, f"variance of x_s, {which}", (abar_s * s2 + 1 - abar_s)[inner],
                          np.add(of_start, of_z)[inner], tolerance[inner],
                          "(coefficient of x_t)^2 V_t + variance = V_s,  V = alpha^2 s^2 + sigma^2",
                          lambda i, inner=inner: at(np.flatnonzero(inner)[i]), random=True)


def heun_step(schedule: Schedule, rng) -> Iterator[Row]:
    """25 Heun: the factor by which a step of Heun's method multiplies Gaussian data."""
    law, computed = "25 Heun", "factor of one step of heun"
    if schedule.T < 2:
        yield skipped(law, computed, TWO_TIMES)
        return
    s, t = pairs(rng, schedule.T, 24, first=0)
    cases = [(a, b, s2) for a, b in zip(s, t, strict=True) for s2 in (0.25, 4.0)]
    a, b, s2 = np.array(cases).T
    abar_s, abar_t = schedule.alpha_bar[a.astype(int)], schedule.alpha_bar[b.astype(int)]

    def angle(abar):                                        # alpha = cos(phi), sigma = sin(phi)
        return np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))

    def slope(abar):                                        # dx/dphi = v = g x,  g = alpha sigma (1 - s^2) / V
        return np.sqrt(abar * (1 - abar)) * (1 - s2) / (abar * s2 + 1 - abar)

    one = np.ones((1, 1))
    measured = [_one_step(samplers.heun, GaussianDenoiser(schedule, np.zeros(1), np.full(1, s2)), one, t, s)[0]
                for s, t, s2 in cases]
    h, g_t, g_s = angle(abar_s) - angle(abar_t), slope(abar_t), slope(abar_s)
    # the difference v = (alpha x - x0_hat) / sigma magnifies rounding by 1 / sigma; every slope is below 3/4
    tolerance = ATOMS * (1 + s2) * (1 + abs(h) / np.sqrt(1 - abar_s))
    yield compare(law, computed, 1 + h / 2 * (g_t + g_s * (1 + h * g_t)), measured, tolerance,
                  "x_s = (1 + h/2 (g_t + g_s (1 + h g_t))) x_t,  g = alpha sigma (1 - s^2) / V",
                  lambda i: "t = {1}, s = {0}, s^2 = {2}".format(*cases[i]) + f", h = {h[i]:.4g}", random=True)


SAMPLING = (
    Law("23 marginals", partial(each_sampler, marginals, or_long=True)),
    Law("24 a point is reached", partial(each_sampler, end_of_a_point)),
    Law("24 one step", partial(each_sampler, one_step, or_long=True)),
    Law("25 order", partial(each_sampler, order_of_convergence, long=True)),
    Law("25 second order", partial(each_sampler, middle_of_the_stride)),
    Law("26 no noise is left", partial(each_sampler, noise_left)),
    Law("28 batches", partial(each_sampler, alone)),
    *(Law(law.name, partial(list_of_times, law)) for law in LISTS),
    Law("26 the end", the_end),
    Law("23 DDIM marginals", ddim_marginals), Law("23 ddpm marginals", ddpm_marginals), Law("25 Heun", heun_step))
