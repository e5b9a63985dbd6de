"""One run of a checkpoint: a schedule of its own with one row for each time, and the steps from row to row.

A run from a given image makes the last k of its N steps, k = int(N strength).

PNDM's first step evaluates the network twice, at t_0 and at t_1.  So diffusers lists PNDM's times with t_1 twice:

    t_0, t_1, t_1, t_2, ..., t_{N-1}

A run from an image takes the last k + 1 of these N + 1 times, though the list now means something else.  It starts at
t_{N-k-1}, a time earlier than other samplers, its first step ends at t_{N-k}, and the next begins at t_{N-k+1}: the
same x then has more noise than belongs to the time that the network is given.  With k = N - 1 it starts at t_1, asks
at t_1 again after a step to t_2, and makes the step from t_0 to t_1 with x at t_1.  `PndmPlan` follows.

LMS from an image takes the weights of the polynomial through four slopes from its first step on, and the slopes that
it does not have for 0.  `LmsPlan` follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from minidiff.diffusion.consistency import BoundaryCondition
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.gaussian import eps_from_x0, q_sample, to_x0
from minidiff.diffusion.multistep import adams_bashforth
from minidiff.diffusion.samplers import Sampler, State, denoise
from minidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Plan:
    """One run: row k of `schedule` is its k-th smallest noise, for which the network is asked at time t[k].

    steps       (from row, to row) of each step; -1 is the clean image
    first_std   of x_T: the run starts at first_std times standard normal noise
    boundary    the scaling of a consistency model's times (`BoundaryCondition`); None for other models
    last_alone  the last step does not look back to earlier ones
    unscaled    a run that ends above the clean image ends with x / alpha
    """

    schedule: Schedule
    t: np.ndarray                           # (rows,) training times, maybe fractions
    steps: tuple[tuple[int, int], ...]
    first_std: float
    sampler: Sampler
    boundary: float | None = None
    last_alone: bool = False
    unscaled: bool = False

    @property
    def start(self) -> int:
        """The row of the first time."""
        return self.steps[0][0]

    def run(self, denoiser: Denoiser, x_T, cond=None, streams=None) -> Iterator[State]:
        """The states of the sampler; denoiser.schedule is this plan's."""
        if self.boundary is not None:
            denoiser = BoundaryCondition(denoiser, self.t, self.boundary)
        step = 0
        for chain in self._chains():
            rows = [t for t, _ in chain] + [s for _, s in chain[-1:] if s >= 0]
            # a run that ends above the clean image stops before the sampler's own last step
            for state in islice(self.sampler(denoiser, x_T, rows, cond, streams=streams), len(chain)):
                x_T, step = state.x_t, step + 1
                last = self.unscaled and step == len(self.steps)
                yield replace(state, step=step, x_t=x_T / float(self.schedule.alpha(state.t)) if last else x_T)

    def _chains(self) -> Iterator[list[tuple[int, int]]]:
        """The steps, in parts of which each is a run of the sampler: a step begins where the last one ended."""
        chain: list[tuple[int, int]] = []
        for number, (t, s) in enumerate(self.steps, start=1):
            if chain and (chain[-1][1] != t or self.last_alone and number == len(self.steps)):
                yield chain
                chain = []
            chain.append((t, s))
        if chain:
            yield chain

    def shortened(self, N: int, k: int) -> Plan:
        """The last k of N steps, of which this plan may leave out the last, where it would go nowhere."""
        return replace(self, steps=self.steps[N - k:])


class LmsPlan(Plan):
    """A run of LMS: from an image its polynomial goes through earlier times, too, where no slope is known."""

    def shortened(self, N: int, k: int) -> LmsPlan:
        left_out = [float(self.schedule.sigma(t) / self.schedule.alpha(t)) for t, _ in self.steps[:N - k]]
        sampler = replace(self.sampler, function=partial(self.sampler.function, before=left_out[-3:]))
        return replace(super().shortened(N, k), sampler=sampler)


@dataclass(frozen=True)
class PndmPlan(Plan):
    """A run of PNDM; visits: the rows of a run from an image, as diffusers lists its times."""

    visits: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        return self.visits[0] if self.visits else super().start

    def shortened(self, N: int, k: int) -> PndmPlan:
        if k in (0, N) or len(self.steps) < 2:
            return super().shortened(N, k)
        rows = (self.steps[0][0], *(s for _, s in self.steps if s >= 0))[:N]
        return replace(self, visits=(rows[:2] + rows[1:])[N - k:])

    def run(self, denoiser: Denoiser, x_T, cond=None, streams=None) -> Iterator[State]:
        if not self.visits:
            yield from super().run(denoiser, x_T, cond, streams)
            return
        schedule, x_t, slopes = self.schedule, x_T, deque(maxlen=4)
        after, before = dict(self.steps), {s: t for t, s in self.steps}
        for step, row in enumerate(self.visits):
            x0_hat = denoise(denoiser, x_t, row, cond)
            eps = eps_from_x0(schedule, x_t, row, x0_hat)
            if step == 1:                                   # the first step again, with the mean of both slopes
                t, s, x_t, eps = before[row], row, x_T, (slopes[0] + eps) / 2
            elif row in after:
                t, s = row, after[row]
                slopes.appendleft(eps)
                eps = adams_bashforth(slopes)
            else:                                           # a step from time 0 to the noise of time 0
                return
            # x_s = alpha_s x_0 + sigma_s eps,   x_0 = (x_t - sigma_t eps) / alpha_t             DDIM eq. 12, sigma 0
            x_t = q_sample(schedule, to_x0(schedule, "eps", x_t, t, eps), s, eps)
            if step:
                yield State(step, s, x_t, x0_hat)
