"""Turns a sampler, which calls the network itself, into a scheduler, whose caller takes one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidiff.diffusion import samplers
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.samplers import Sampler
from minidiff.diffusion.schedules import Schedule


class Replayed:
    """A function that runs from noise to image, adapted to the protocol.

    Each step runs the function again from the start with all previous answers, until it calls the network once more.
    This costs N^2 / 2 calls instead of N, but the sampler's code is used unchanged.

    run(network, x_T, times, draw) -> x_0: network(x_t, t) returns a prediction, and draw() the next noise.
    list_of(n): the times of a run of n steps, among the training times 0 .. T-1. x_t is alpha x_0 + sigma eps.
    questions(times): the times of the network's calls in such a run, in order. By default the first time occurs once,
    and every other one `evaluations` times.
    order, evaluations, first_evaluations, extrapolates, consistency, rounding: as in the protocol.
    """

    def __init__(self, run: Callable[..., Any], alpha_bar, predicts: str, list_of: Callable[[int], Any],
                 order: float = 1, evaluations: int = 1, extrapolates: bool = False, rounding: float = 2.0**-53,
                 questions: Callable[[np.ndarray], np.ndarray] | None = None, first_evaluations: int = 0,
                 consistency: bool = False):
        self.run, self.alpha_bar, self.predicts, self.list_of = run, alpha_bar, predicts, list_of
        self.order, self.evaluations, self.extrapolates = order, evaluations, extrapolates
        self.rounding, self.questions = rounding, questions or self._each_time
        self.first_evaluations, self.consistency = first_evaluations, consistency
        self.timesteps = np.arange(len(alpha_bar))[::-1]

    def set_steps(self, n: int) -> None:
        self.times = np.asarray(self.list_of(n))
        self.timesteps = self.questions(self.times)
        self.answers, self.draws = [], []

    def _each_time(self, times: np.ndarray) -> np.ndarray:
        return np.concatenate([times[:1], np.repeat(times[1:], self.evaluations)])

    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[np.asarray(t)].reshape(-1, *[1] * (np.ndim(x_0) - 1))
        return np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps

    def step(self, prediction, t, x_t, z):
        if not self.answers:
            # a run may begin at any time of its list
            self.x_T, self.times = x_t, self.times[self.times <= t]
        self.answers.append(prediction)
        self.draws.append(z)
        asked = 0

        def network(x_t, t):
            nonlocal asked
            asked += 1
            if asked > len(self.answers):
                raise _NextQuestion(x_t)
            return self.answers[asked - 1]

        try:
            return self.run(network, self.x_T, self.times, lambda: self.draws[asked - 1])
        except _NextQuestion as question:
            return question.x_t


class _NextQuestion(Exception):
    """The sampler calls the network on x_t, and the answer is not yet known."""

    def __init__(self, x_t):
        self.x_t = x_t


class GivenNoise:
    """Replaces SampleStreams: each draw is the result of draw(), (count, ...)."""

    def __init__(self, count: int, draw: Callable[[], Any]):
        self.count, self.draw, self.drawn = count, draw, 0

    def __len__(self) -> int:
        return self.count

    def normal(self, shape, dtype=np.float32):
        self.drawn += 1
        return self.draw().astype(dtype)


def of_sampler(sampler: Sampler, schedule: Schedule, predicts: str = "x0", spacing: str = "trailing",
               rounding: float = 2.0**-53, **options) -> Replayed:
    """A registered sampler as a scheduler on this schedule. options: for its function, such as ddim's eta."""
    def run(network, x_T, times, draw, predicts=predicts):
        # NetworkDenoiser refuses eps if its schedule ends at SNR 0, so its schedule is cut off at the run's first time
        known = Schedule(schedule.alpha_bar[:times[0] + 1], schedule.name)
        denoiser = NetworkDenoiser(known, predicts, lambda x_t, t, cond: network(x_t, t))
        streams = GivenNoise(len(x_T), draw)
        if options:
            return samplers.sample(sampler.function(denoiser, x_T, times, streams=streams, **options))
        return samplers.sample(sampler(denoiser, x_T, times, streams=streams))

    def questions(times):
        """The times of the network's calls, recorded in a run of the sampler on zeros."""
        asked, zero = [], np.zeros((1, 1))

        def network(x_t, t):
            asked.append(int(t[0]))
            return zero

        run(network, zero, times, lambda: zero, predicts="x0")
        return np.array(asked)

    return Replayed(run, schedule.alpha_bar, predicts, lambda n: samplers.times(schedule, n, spacing),
                    order=sampler.order, evaluations=sampler.calls, extrapolates=sampler.extrapolates,
                    rounding=rounding, questions=questions, first_evaluations=sampler.first_calls,
                    consistency=sampler.consistency)
