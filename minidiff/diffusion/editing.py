"""Editing images with a denoiser that was trained for generation only.

    image to image    x_t = q_sample(x_0, t), then the sampler from t down        SDEdit, arXiv 2108.01073, section 3
    in-painting       after every step the known part is replaced by the true one, with the noise of time s:
                      x_s = m q_sample(x_0, s) + (1 - m) x_s'                           RePaint, arXiv 2201.09865, eq. 8
                      and the step is repeated from x_t ~ q(x_t | x_s)                  its section 4.2, algorithm 1
    by any sampler    the denoiser sees m (alpha_t x_0 + sigma_t eps) + (1 - m) x_t, with the same eps at all times

In image to image, a larger t allows larger changes.

Replacing is not conditioning. Each step treats the known part as if it were as uncertain as the rest, so the unknown
part depends on it too little. Let two numbers have variance 1 and correlation rho, and let the first be known to be a.
The second should be N(rho a, 1 - rho^2). In the limit of many steps, for every schedule, it has

    mean       a (1 - sqrt(1 - rho^2)) / rho                between one half of rho a and all of it
    variance   (1 - rho^2) atanh(rho) / rho                 too large

Proof: let u = alpha_t^2. The correlation at t is r = u rho. The noise of the known part is drawn again at each step and
averages out, so the known part acts as sqrt(u) a. The mean m and variance V of the reverse SDE then satisfy
u dm/du = m/2 - (m - u^{3/2} rho a)/(1 - r^2) and u dV/du = V - 2V/(1 - r^2) + 1, with m = 0 and V = 1 at u = 0; their
values at u = 1 are those above. Repeated steps bring the mean closer to rho a; the variance falls, finally too far.

With the same eps at all times and the steps of ddim, the mean is

    mean       a rho/2 (1 - rho^2)^{1/4} int_1^inf (w^2 - rho^2)^{-5/4} dw      between a third of rho a and all of it

Proof: let w = 1 + sigma^2 / alpha^2, and g a the mean of x_t / alpha. From d(x / alpha) / d(sigma / alpha) = eps_hat,
dg/dw = (w g - rho) / (2 (w^2 - rho^2)), which (w^2 - rho^2)^{1/4} solves without its last term; g = 0 at w = infinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from minidiff.checks import whole
from minidiff.diffusion.denoiser import Denoiser, Wrapper
from minidiff.diffusion.gaussian import q_sample, q_step
from minidiff.diffusion.samplers import State, checked_times, ddpm
from minidiff.engine.backend import xp_of
from minidiff.engine.random import SampleStreams


def shortened(times: Sequence[int], strength: float) -> list[int]:
    """The last part of a sampler's times: a share `strength` of them, all for 1 and none for 0."""
    _check_strength(strength)
    times = list(times)
    return times[len(times) - round(strength * len(times)):]


def inpaint(denoiser: Denoiser, x_T, times: Sequence[int], known, mask, cond=None, *, streams: SampleStreams,
            repeats: int = 1) -> Iterator[State]:
    """Ancestral sampling that replaces the known part after every step; the last state equals it there.

    x_T: (B, ...) noise, the sample at times[0]. known: the image, of x_T's shape. mask: booleans that broadcast to
    x_T, True where the image is known. repeats: how often each step but the last is made; 1 for replacement alone.
    streams: one for each sample.
    """
    repeats = whole("repeats", repeats, 1)
    _check_known(known, mask, x_T)
    schedule, x_t, xp = denoiser.schedule, x_T, xp_of(x_T)
    path = [*checked_times(times, range(schedule.T), f"within {schedule.T - 1}..0"), -1]

    def normal():
        return xp.asarray(streams.normal(x_T.shape[1:], x_T.dtype))

    for step, (t, s) in enumerate(pairwise(path), start=1):
        for again in reversed(range(repeats if s >= 0 else 1)):
            state = next(ddpm(denoiser, x_t, [t, s] if s >= 0 else [t], cond, streams=streams))
            # x_s = m q_sample(x_0, s) + (1 - m) x_s'
            noised = q_sample(schedule, known, s, normal()) if s >= 0 else known
            x_s = xp.where(mask, noised, state.x_t)
            if again:
                # x_t ~ q(x_t | x_s)
                alpha_ts, sigma2_ts = q_step(schedule, s, t)
                x_t = float(alpha_ts) * x_s + float(sigma2_ts)**0.5 * normal()
        x_t = x_s
        yield State(step, s, x_t, state.x0_hat)


@dataclass(frozen=True, eq=False)
class KnownPart(Wrapper):
    """A denoiser that sees the known part of an image instead of x_t there, so that any sampler fills in the rest.

    A sampler computes each pixel of x_s from this pixel of x_t and of x0_hat alone. So it suffices to replace what the
    denoiser sees: a sampler with a memory of earlier steps needs no change.

    known: the image, of x_t's shape. mask: booleans that broadcast to x_t, True where the image is known. eps: the
    noise of the known part, of x_t's shape. noise_at: a time at which nothing is replaced, for an x_T of noise alone.
    """

    denoiser: Denoiser
    known: Any
    mask: Any
    eps: Any
    noise_at: int | None = None

    def __post_init__(self):
        _check_known(self.known, self.mask, self.eps, "eps")

    def __call__(self, x_t, t, cond: Any = None):
        return self.denoiser(x_t if int(t[0]) == self.noise_at else self.replaced(x_t, int(t[0])), t, cond)

    def replaced(self, x_t, t: int):
        """m (alpha_t x_0 + sigma_t eps) + (1 - m) x_t; at t = -1 the known part is the image."""
        known = q_sample(self.schedule, self.known, t, self.eps) if t >= 0 else self.known
        return xp_of(x_t).where(self.mask, known, x_t)

    def states(self, states: Iterable[State], end: int = -1) -> Iterator[State]:
        """The states of a sampler, with the known part in them; end: its last time, where this part is the image."""
        return (replace(state, x_t=self.replaced(state.x_t, -1 if state.t == end else state.t)) for state in states)


# ---- checks ------------------------------------------------------------------------------------------------

def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie within 0 (the image as it is) and 1 (none of it), not {strength!r}")


def _check_known(known, mask, x, name: str = "x_T") -> None:
    if known.shape != x.shape or mask.dtype != bool:
        raise ValueError(f"known must be of {name}'s shape {x.shape} and mask of booleans, not {known.shape} and "
                         f"{mask.dtype}")
