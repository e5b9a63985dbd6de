"""Samplers, step by step, where the exact answer is known: one point of data, or a Gaussian.

    23  the marginals are kept       by DDIM, for every eta: (direction)^2 + (noise)^2 = sigma_s^2      DDIM eq. 12
        and by ddpm                  if its noise has power beta~ on a point, beta on N(0, 1)       DDPM sec. 3.2
    24  one step on Gaussian data    multiplies by (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
    25  second order                 Heun averages two slopes; 2M's x0_hat is that of the stride's middle
                                                           Karras et al. alg. 1, Lu et al. alg. 2
    26  the end                      every list of times ends at t = -1, at x0_hat, with no noise left

What a sampler yields is its own word for it. Where it stands, and what it was told there, is read off a denoiser that
keeps its questions and answers.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from minidiff.diffusion import samplers
from minidiff.diffusion.denoiser import Denoiser, NetworkDenoiser
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams
from minidiff.verify.forward import pairs
from minidiff.verify.rows import ATOMS, Law, Row, compare, count, skipped

FLOW = "needs two times, T >= 2"
STRIDES = "needs three times of alpha_bar > 0, whose log-SNRs are apart by 1e-6"


class _Given(SampleStreams):
    """Hands out given numbers for noise, so that a step shows what it multiplies them by."""

    def __init__(self, z: np.ndarray):
        self.z = z

    def __len__(self):
        return len(self.z)

    def normal(self, shape, dtype=np.float32):
        return np.broadcast_to(self.z, (len(self.z), *shape)).astype(dtype)


class _Asked:
    """A denoiser that keeps what it was asked and what it said."""

    def __init__(self, denoiser: Denoiser):
        self.schedule, self.denoiser = denoiser.schedule, denoiser
        self.times: list[int] = []
        self.answers: list[np.ndarray] = []

    def __call__(self, x_t, t, cond=None):
        self.times.append(int(t[0]))
        self.answers.append(self.denoiser(x_t, t, cond))
        return self.answers[-1].copy()


def _one_step(name: str, denoiser: Denoiser, x_t: np.ndarray, t: int, s: int, **options) -> np.ndarray:
    """Where a step of the sampler takes x_t, (B,): from t to s, as the first of its list."""
    return next(samplers.SAMPLERS[name].function(denoiser, x_t, [t, s] if s >= 0 else [t], **options)).x_t[:, 0]


def marginals(schedule: Schedule, rng) -> Iterator[Row]:
    """23 DDIM marginals: from x_t = alpha_t x_0 + sigma_t eps to x_s, on one point of data."""
    x_0, law = 0.7, "23 DDIM marginals"
    point = GaussianDenoiser(schedule, np.array([x_0]), np.zeros(1))
    s, t = pairs(rng, schedule.T, 24, first=-1)
    cases = [(a, b, eta) for a, b in zip(s, t, strict=True) for eta in (0.0, 0.5, 1.0)]
    mean, power = [], []
    for a, b, eta in cases:
        alpha, sigma = np.sqrt(schedule.alpha_bar[b]), np.sqrt(1 - schedule.alpha_bar[b])
        # three samples: no noise at all, eps = 1, z = 1
        x_t, z = alpha * x_0 + sigma * np.array([[0.0], [1.0], [0.0]]), np.array([[0.0], [0.0], [1.0]])
        clean, of_eps, of_z = _one_step("ddim", point, x_t, b, a, eta=eta, streams=_Given(z))
        mean.append(clean)
        power.append((of_eps - clean) ** 2 + (of_z - clean) ** 2)
    abar_s = np.array([schedule.alpha_bar[a] if a >= 0 else 1.0 for a, _, _ in cases])
    # eps_hat divides by sigma_t, which magnifies the rounding of x_t
    sigma_t = np.array([np.sqrt(1 - schedule.alpha_bar[b]) for _, b, _ in cases])

    def at(i):
        return "t = {1}, s = {0}, eta = {2}".format(*cases[i])

    yield compare(law, "mean of x_s, x_0 = 0.7", np.sqrt(abar_s) * x_0, mean, ATOMS / sigma_t,
                  "E[x_s] = alpha_s x_0", at, random=True)
    yield compare(law, "variance of x_s, eta = 0, 0.5, 1", 1 - abar_s, power, ATOMS / sigma_t,
                  "(sqrt(sigma_s^2 - sigma^2))^2 + sigma^2 = sigma_s^2", at, random=True)


def ancestral(schedule: Schedule, rng) -> Iterator[Row]:
    """23 ddpm marginals: a step of ddpm on a point with beta~, and on N(0, 1) with beta."""
    law = "23 ddpm marginals"
    s, t = pairs(rng, schedule.T, 24, first=-1)
    abar_s, abar_t = np.where(s >= 0, schedule.alpha_bar[s], 1.0), schedule.alpha_bar[t]
    beta = 1 - abar_t / abar_s
    # beta~ is what ddpm draws unasked; the last step knows the clean image and adds nothing
    data = {"beta~ on x_0 = 0.7": (0.7, 0.0, {}, (1 - abar_s) / (1 - abar_t) * beta),
            "beta on N(0, 1)": (0.0, 1.0, {"variance": samplers.beta}, np.where(s >= 0, beta, 0.0))}
    # 1 - alpha_bar_t / alpha_bar_s is off by eps, and is divided by sigma_t^2
    tolerance = ATOMS / (1 - abar_t)

    def at(i):
        return f"t = {t[i]}, s = {s[i]}"

    for which, (x_0, s2, options, drawn) in data.items():
        denoiser = GaussianDenoiser(schedule, np.array([x_0]), np.full(1, s2))
        mean, of_start, of_z = [], [], []
        for a, b, abar in zip(s, t, abar_t, strict=True):
            # x_t is its mean, one standard deviation above, and its mean again, with z = 1
            x_t = np.sqrt(abar) * x_0 + np.sqrt(abar * s2 + 1 - abar) * np.array([[0.0], [1.0], [0.0]])
            x_s = _one_step("ddpm", denoiser, x_t, b, a, streams=_Given(np.array([[0.0], [0.0], [1.0]])),
                            **options)
            mean.append(x_s[0])
            of_start.append((x_s[1] - x_s[0]) ** 2)
            of_z.append((x_s[2] - x_s[0]) ** 2)
        yield compare(law, f"power of the noise, {which}", drawn, of_z, tolerance,
                      "x_s = mu~ + sqrt(variance) z", at, random=True)
        yield compare(law, f"mean of x_s, {which}", np.sqrt(abar_s) * x_0, mean, tolerance,
                      "E[x_s] = alpha_s E[x_0]", at, random=True)
        # the last step leaves the mean of x_0 given x_t, which is x_0 itself only if that is a point
        inner = s >= 0 if s2 else s >= -1
        if inner.any():
            yield compare(law, f"variance of x_s, {which}", (abar_s * s2 + 1 - abar_s)[inner],
                          np.add(of_start, of_z)[inner], tolerance[inner],
                          "(what multiplies x_t)^2 V_t + variance = V_s,  V = alpha^2 s^2 + sigma^2",
                          lambda i, inner=inner: at(np.flatnonzero(inner)[i]), random=True)


def one_step(schedule: Schedule, rng) -> Iterator[Row]:
    """24 one step: the factor by which DDIM and DPM-Solver++ multiply Gaussian data."""
    law = "24 one step"
    if schedule.T < 2:
        yield skipped(law, "factor of one step of ddim and dpm++2m", FLOW)
        return
    s, t = pairs(rng, schedule.T, 24, first=0)
    cases = [(a, b, s2) for a, b in zip(s, t, strict=True) for s2 in (0.0, 0.25, 4.0)]
    a, b, s2 = np.array(cases).T
    abar_s, abar_t = schedule.alpha_bar[a.astype(int)], schedule.alpha_bar[b.astype(int)]
    V_t = abar_t * s2 + 1 - abar_t
    expected = (np.sqrt(abar_s * abar_t) * s2 + np.sqrt((1 - abar_s) * (1 - abar_t))) / V_t
    for name in ("ddim", "dpm++2m"):                        # the first step of 2M has nothing to extrapolate from
        yield compare(law, f"factor of one step of {name}", expected, _factors(name, schedule, cases),
                      ATOMS * (1 + s2) ** 2 / (1 - abar_t),
                      "x_s = (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t x_t,  V = alpha^2 s^2 + sigma^2",
                      lambda i: "t = {1}, s = {0}, s^2 = {2}".format(*cases[i]), random=True)


def two_slopes(schedule: Schedule, rng) -> Iterator[Row]:
    """25 second order: the factor by which a step of Heun multiplies Gaussian data."""
    law, computed = "25 second order", "factor of one step of heun"
    if schedule.T < 2:
        yield skipped(law, computed, FLOW)
        return
    s, t = pairs(rng, schedule.T, 24, first=0)
    cases = [(a, b, s2) for a, b in zip(s, t, strict=True) for s2 in (0.25, 4.0)]
    a, b, s2 = np.array(cases).T
    abar_s, abar_t = schedule.alpha_bar[a.astype(int)], schedule.alpha_bar[b.astype(int)]

    def angle(abar):                                        # alpha = cos(phi), sigma = sin(phi)
        return np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))

    def slope(abar):                                        # dx/dphi = v = g x,  g = alpha sigma (1 - s^2) / V
        return np.sqrt(abar * (1 - abar)) * (1 - s2) / (abar * s2 + 1 - abar)

    h, g_t, g_s = angle(abar_s) - angle(abar_t), slope(abar_t), slope(abar_s)
    # v = (alpha x - x0_hat) / sigma cancels, and magnifies by 1 / sigma; every slope is below 3/4
    tolerance = ATOMS * (1 + s2) * (1 + abs(h) / np.sqrt(1 - abar_s))
    yield compare(law, computed, 1 + h / 2 * (g_t + g_s * (1 + h * g_t)), _factors("heun", schedule, cases), tolerance,
                  "x_s = (1 + h/2 (g_t + g_s (1 + h g_t))) x_t,  g = alpha sigma (1 - s^2) / V",
                  lambda i: "t = {1}, s = {0}, s^2 = {2}".format(*cases[i]) + f", h = {h[i]:.4g}", random=True)


def middle_of_the_stride(schedule: Schedule, rng) -> Iterator[Row]:
    """25 second order: the second step of 2M where x0_hat is linear in lambda, which it has to extrapolate exactly."""
    law, computed = "25 second order", "step 2 of dpm++2m, x0_hat linear in lambda"
    with_signal, rise = int((schedule.alpha_bar > 0).sum()), 0.3
    drawn = rng.integers(0, max(with_signal, 1), (24, 3)).tolist()
    ends = [(0, 1, 2), (0, with_signal - 2, with_signal - 1), (0, 1, with_signal - 1)]
    s, t, r = np.unique([sorted(case) for case in [*ends, *drawn]], axis=0).T         # from r to t to s
    abar_s, abar_t, abar_r = (schedule.alpha_bar[np.clip(i, 0, schedule.T - 1)] for i in (s, t, r))

    def half_log_snr(abar):
        return 0.5 * (np.log(abar) - np.log1p(-abar))

    lambda_s, lambda_t, lambda_r = half_log_snr(abar_s), half_log_snr(abar_t), half_log_snr(abar_r)
    # lambda is off by eps: of a shorter stride too few digits are left
    apart = (s >= 0) & (r < with_signal) & (lambda_s - lambda_t > 1e-6) & (lambda_t - lambda_r > 1e-6)
    if not apart.any():
        yield skipped(law, computed, STRIDES)
        return
    s, t, r, abar_s, abar_t, abar_r, lambda_s, lambda_t, lambda_r = (
        a[apart] for a in (s, t, r, abar_s, abar_t, abar_r, lambda_s, lambda_t, lambda_r))

    def network(x_t, t, cond):
        return 0.7 + rise * half_log_snr(schedule.alpha_bar[t])[:, None]              # (1, 1)

    denoiser = NetworkDenoiser(schedule, "x0", network)
    measured = [list(samplers.SAMPLERS["dpm++2m"](denoiser, np.ones((1, 1)), case))[1].x_t[0, 0]
                for case in zip(r, t, s, strict=True)]

    def step(x, abar_from, abar_to, D):
        # x_s = sigma_s / sigma_t x_t + (alpha_s - sigma_s alpha_t / sigma_t) D
        shrink = np.sqrt((1 - abar_to) / (1 - abar_from))
        return shrink * x + (np.sqrt(abar_to) - shrink * np.sqrt(abar_from)) * D

    first = step(1.0, abar_r, abar_t, 0.7 + rise * lambda_r)
    # D = x0_hat at lambda_t + h/2, h = lambda_s - lambda_t
    D = 0.7 + rise * (lambda_t + lambda_s) / 2
    # x0_hat and lambda are off by eps of their size, which the quotient of the strides magnifies
    size = 1 + abs(lambda_s) + abs(lambda_t) + abs(lambda_r)
    tolerance = ATOMS * size**2 * (1 + (1 + lambda_s - lambda_t) / (lambda_t - lambda_r))
    yield compare(law, computed, step(first, abar_t, abar_s, D), measured, tolerance,
                  "x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) x0_hat(lambda_t + h/2)",
                  lambda i: f"times {r[i]}, {t[i]}, {s[i]}", random=True)


def the_end(schedule: Schedule, rng) -> Iterator[Row]:
    """26 the end: each sampler walks its own list down to -1, and leaves x0_hat and nothing else."""
    law, mixture = "26 the end", MixtureDenoiser(schedule, [0.3, 0.7], rng.standard_normal((2, 2)), [0.1, 0.5])
    names, left, astray, untold = [], [], [], []
    for name, sampler in samplers.SAMPLERS.items():
        for N in sorted({1, min(2, schedule.T), min(7, schedule.T)}):
            steps = samplers.times(schedule, N)
            streams = SampleStreams(int(rng.integers(2**31)), 2) if sampler.noise else None
            asked = _Asked(mixture)
            states = list(sampler(asked, rng.standard_normal((2, 2)), steps, streams=streams))
            names.append(f"{name}, {N} steps, times {', '.join(map(str, steps))}")
            # what the denoiser said last, whatever the sampler says that it said
            left.append(np.abs(states[-1].x_t - asked.answers[-1]).max())
            # a method of two evaluations asks at a time twice, one after the other
            astray.append([t for t, _ in groupby(asked.times)] != steps.tolist()
                          or [state.t for state in states] != [*steps[1:].tolist(), -1])
            untold.append(not all(any(np.array_equal(state.x0_hat, answer) for answer in asked.answers)
                                  for state in states))
    yield compare(law, "noise left: |x - x0_hat| at the end", 0.0, left, 0.0,
                  "sigma_{-1} = 0: the last state is the denoiser's last x0_hat", lambda i: names[i], random=True)
    yield count(law, "samplers that leave their list of times", astray,
                "the denoiser is asked at the list's times, each state is at the next, and the last at -1",
                lambda i: names[i])
    yield count(law, "samplers that show an x0_hat of their own", untold,
                "a state's x0_hat is the denoiser's answer", lambda i: names[i])


SAMPLING = (Law("23 DDIM marginals", marginals), Law("23 ddpm marginals", ancestral), Law("24 one step", one_step),
            Law("25 second order", two_slopes), Law("25 second order", middle_of_the_stride),
            Law("26 the end", the_end))


# ---- what the laws share -----------------------------------------------------------------------------------


def _factors(name: str, schedule: Schedule, cases) -> list[float]:
    """By what a sampler's first step multiplies x_t, for data N(0, s^2) and cases (s, t, s^2)."""
    return [_one_step(name, GaussianDenoiser(schedule, np.zeros(1), np.full(1, s2)), np.ones((1, 1)), t, s)[0]
            for s, t, s2 in cases]
