"""Samplers, step by step, where the exact answer is known: one point of data, or a Gaussian.

    23  DDIM keeps the marginals     (direction)^2 + (noise)^2 = sigma_s^2, for every eta          DDIM eq. 12
    24  one step on Gaussian data    multiplies by (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t
    25  the exact flow               multiplies by sqrt(V_s / V_t); a step of Heun errs by h^3           Karras alg. 1
    26  the end                      every list of times ends at t = -1, at x0_hat, with no noise left
"""

from collections.abc import Iterator

import numpy as np

from minidiff.diffusion import samplers
from minidiff.diffusion.denoiser import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import Streams
from minidiff.verify.forward import pairs
from minidiff.verify.rows import ATOMS, Row, compare, count, skipped

FLOW = "needs two times, T >= 2"
HEUN = 1.2                                                  # |error| <= HEUN h^3 at s^2 = 1/4 and 4; 0.93 is the most


class _Given(Streams):
    """Hands out given numbers for noise, so that a step shows what it multiplies them by."""

    def __init__(self, z: np.ndarray):
        self.z = z

    def __len__(self):
        return len(self.z)

    def normal(self, shape, dtype=np.float32):
        return np.broadcast_to(self.z, (len(self.z), *shape)).astype(dtype)


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
        steps = samplers.ddim(point, x_t, [b, a] if a >= 0 else [b], eta=eta, streams=_Given(z))
        clean, of_eps, of_z = next(steps).x_t[:, 0]
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
        step = samplers.SAMPLERS[name]
        factor = [next(step(GaussianDenoiser(schedule, np.zeros(1), np.full(1, v)), np.ones((1, 1)), [q, p])).x_t[0, 0]
                  for p, q, v in cases]
        yield compare(law, f"factor of one step of {name}", expected, factor, ATOMS * (1 + s2) ** 2 / (1 - abar_t),
                      "x_s = (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t x_t,  V = alpha^2 s^2 + sigma^2",
                      lambda i: "t = {1}, s = {0}, s^2 = {2}".format(*cases[i]), random=True)


def exact_flow(schedule: Schedule, rng) -> Iterator[Row]:
    """25 exact flow: one step of Heun errs in the third order of its stride."""
    law, computed = "25 exact flow", "factor of one step of heun, up to 1.2 h^3"
    if schedule.T < 2:
        yield skipped(law, computed, FLOW)
        return
    s, t = pairs(rng, schedule.T, 24, first=0)
    cases = [(a, b, s2) for a, b in zip(s, t, strict=True) for s2 in (0.25, 4.0)]
    a, b, s2 = np.array(cases).T
    abar_s, abar_t = schedule.alpha_bar[a.astype(int)], schedule.alpha_bar[b.astype(int)]
    # the stride, in the angle of alpha = cos(phi), sigma = sin(phi)
    h = np.arctan2(np.sqrt(1 - abar_t), np.sqrt(abar_t)) - np.arctan2(np.sqrt(1 - abar_s), np.sqrt(abar_s))
    expected = np.sqrt((abar_s * s2 + 1 - abar_s) / (abar_t * s2 + 1 - abar_t))
    factor = [next(samplers.heun(GaussianDenoiser(schedule, np.zeros(1), np.full(1, v)), np.ones((1, 1)),
                                 [q, p])).x_t[0, 0] for p, q, v in cases]
    # HEUN h^3 for these data and every stride up to pi/2; the slopes divide by sigma
    tolerance = HEUN * h**3 + ATOMS * (1 + s2) / np.sqrt(1 - abar_s)
    yield compare(law, computed, expected, factor, tolerance, "x_s = sqrt(V_s / V_t) x_t,  V = alpha^2 s^2 + sigma^2",
                  lambda i: "t = {1}, s = {0}, s^2 = {2}".format(*cases[i]) + f", h = {h[i]:.4g}", random=True)


def the_end(schedule: Schedule, rng) -> Iterator[Row]:
    """26 the end: each sampler walks its own list down to -1, and leaves x0_hat and nothing else."""
    denoiser = MixtureDenoiser(schedule, [0.3, 0.7], rng.standard_normal((2, 2)), [0.1, 0.5])
    names, left, astray = [], [], []
    for name, sampler in samplers.SAMPLERS.items():
        for N in sorted({1, min(2, schedule.T), min(7, schedule.T)}):
            steps = samplers.times(schedule, N)
            streams = {"streams": Streams(int(rng.integers(2**31)), 2)} if name == "ddpm" else {}
            states = list(sampler(denoiser, rng.standard_normal((2, 2)), steps, **streams))
            names.append(f"{name}, {N} steps, times {', '.join(map(str, steps))}")
            left.append(np.abs(states[-1].x_t - states[-1].x0_hat).max())
            astray.append([state.t for state in states] != [*steps[1:].tolist(), -1])
    yield compare("26 the end", "noise left: |x - x0_hat| at the end", 0.0, left, 0.0,
                  "sigma_{-1} = 0: the last state is x0_hat", lambda i: names[i], random=True)
    yield count("26 the end", "samplers that leave their list of times", astray,
                "the next time is the next entry of the list, and the last is -1", lambda i: names[i])


SAMPLING = (marginals, one_step, exact_flow, the_end)
