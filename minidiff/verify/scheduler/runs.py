"""Runs of a scheduler on data for which the network's answers are known, and statistics of these runs.

For two kinds of data, the best prediction x0_hat of the network on its input u has a closed form:

    x_0 is a point        x0_hat = x_0
    x_0 ~ N(0, s^2)       x0_hat = alpha s^2 / V u,   V = alpha^2 s^2 + sigma^2

The result of a run is then an affine function of its starting noise and of the noise of each step. A batch of unit
vectors gives the coefficients, and the sum of their squares is the variance of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from minidiff.verify.scheduler.protocol import Scheduler, levels, rounding, shown

PIXEL = (1, 1, 1)                                           # shape of a sample: some schedulers require images
X_0 = 0.7                                                   # the point, inside [-1, 1] for schedulers that clip

Answer = Callable[[np.ndarray, float, float], np.ndarray]   # x0_hat of the input, alpha and sigma


def point(x_0) -> Answer:
    return lambda u, alpha, sigma: x_0 + np.zeros_like(u)


def gaussian(s2: float) -> Answer:
    return lambda u, alpha, sigma: alpha * s2 / (alpha**2 * s2 + sigma**2) * u


def walk(scheduler: Scheduler, n: int, start, answer: Answer, z=None,
         first: int = 0) -> Iterator[tuple[float, float, np.ndarray]]:
    """Yields (alpha, sigma, the network's input) at each time of a run of n steps, and finally (1, 0, the sample).

    start: (B, ...), the input at the first time. z: (length of the list, B, ...), the noise of each step, by default 0.
    first: the index in the list at which the run begins.
    """
    scheduler.set_steps(n)
    level, x_t = levels(scheduler), None
    for i, t in list(enumerate(scheduler.timesteps))[first:]:
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
    """At each time, and at the end: alpha, sigma, mean and standard deviation, and the noise's part of the latter.

    Data: the point X_0, or N(0, s2) if s2 > 0. The start has the correct mean and variance of its level.
    The last number is the standard deviation due to the noise drawn during the run.
    """
    scheduler.set_steps(n)
    draws, (alpha, sigma) = len(scheduler.timesteps), levels(scheduler)[0]
    z = np.concatenate([np.zeros((draws, 2)), np.eye(draws)], axis=1).reshape(draws, 2 + draws, *PIXEL)
    start = np.full((2 + draws, *PIXEL), 0.0 if s2 else alpha * X_0)                  # (2 + draws, 1, 1, 1)
    start[1] += math.sqrt(alpha**2 * s2 + sigma**2)
    for alpha, sigma, u in walk(scheduler, n, start, gaussian(s2) if s2 else point(X_0), z):
        u = u.reshape(-1)
        moved = u[1:] - u[0]                                # by a unit of starting noise, and of each step's noise
        yield alpha, sigma, float(u[0]), float(np.linalg.norm(moved)), float(np.linalg.norm(moved[1:]))


def last_spread(scheduler: Scheduler, n: int) -> Spread:
    *_, last = spreads(scheduler, n)
    return last


def draws_noise(scheduler: Scheduler) -> bool:
    return any(drawn > 0 for *_, drawn in spreads(scheduler, min(4, len(scheduler.alpha_bar))))


def allowed(scheduler: Scheduler, n: int, at: int = 0) -> float:
    """The tolerance of a run: 100 roundings of the largest numbers in it.

    Their size is 1, or 1 / alpha if x_0 is computed from eps or from samples kept as x_0 + (sigma / alpha) eps.
    at: the index in the list at which alpha is taken, by default the first time, where alpha is smallest.
    """
    scheduler.set_steps(n)
    scale = abs(float(shown(scheduler, np.ones((1, *PIXEL)), scheduler.timesteps[at]).item()))
    if scheduler.predicts == "eps":
        scale = min(scale, float(levels(scheduler)[at, 0]))
    return 100 * rounding(scheduler) / min(1.0, max(scale, 1e-4))


def refusal(scheduler: Scheduler, n: int) -> str:
    """The message with which the scheduler refuses a run that predicts eps at SNR 0; "" if it does not refuse.

    A ValueError counts as a refusal only if the same list runs to its end when begun at alpha > 0. Otherwise it is a
    failure.
    """
    start, message = np.full((1, *PIXEL), X_0), ""
    try:
        scheduler.set_steps(n)
        signal = np.flatnonzero(levels(scheduler)[:, 0] > 0)
        if scheduler.predicts != "eps" or not 0 < signal.size < len(scheduler.timesteps):
            return ""
        try:
            list(walk(scheduler, n, start, point(X_0)))
        except ValueError as error:
            message = str(error) or "ValueError"
            list(walk(scheduler, n, start, point(X_0), first=signal[0]))
    except KeyboardInterrupt:
        raise
    except BaseException:                                   # a failure, which the laws report
        return ""
    return message
