"""Guidance: wraps a denoiser in one that follows its condition more closely.

    classifier-free   eps = eps_uncond + scale (eps_cond - eps_uncond)            Ho & Salimans 2022, eq. 6
    classifier        score = score + scale grad log p(y | x_t)                   Dhariwal & Nichol 2021, section 4
    CLIP              the same, with grad (f(x_t) . g(y)) for its gradient        GLIDE section 2.4
    interval          classifier-free, with scale 1 outside some noise levels     Kynkaanniemi et al. 2024, section 3

scale: 0 is unconditional, 1 is conditional, more than 1 is guided. Ho & Salimans 2022 write
(1 + w) eps_cond - w eps_uncond: their w is scale - 1. Imagen and GLIDE count as we do. A guided denoiser is a denoiser,
so it works with every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from minidiff.checks import finite
from minidiff.diffusion.denoiser import Denoiser, Remembering, Wrapper
from minidiff.diffusion.gaussian import per_sample
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import xp_of


@dataclass(frozen=True, eq=False)
class ClassifierFree(Wrapper):
    """Classifier-free guidance of a denoiser that was trained with and without its condition.

    Conditions are tuples of arrays whose axis 0 is the batch. uncond is the null condition: such a tuple, each array
    with B rows, or with one row for all samples. Both branches are one call on the doubled batch, the unconditional
    half first; at scale 0 and 1 only one branch is computed.  The doubled condition is kept for the next call: nothing
    may write into a condition's arrays between two calls.
    clip: thresholds the guided x0_hat. The denoiser itself must not clip, because its two answers are extrapolated.
    """

    denoiser: Denoiser
    scale: float
    uncond: tuple
    clip: Callable[[Any], Any] | None = None
    _both: Remembering = field(init=False, repr=False)      # (cond, B) -> the condition of the doubled batch

    def __post_init__(self):
        _check(self.denoiser, self.scale)
        object.__setattr__(self, "_both", Remembering(partial(_doubled, self.uncond)))

    def __call__(self, x_t, t, cond=None):
        x0_hat = self._guided(x_t, t, cond)
        return x0_hat if self.clip is None else self.clip(x0_hat)

    def _guided(self, x_t, t, cond):
        B, scale = len(x_t), float(self.scale)
        for a in self.uncond:
            _check_rows(a, B)
        if scale == 0:
            uncond = tuple(_rows(a, B) for a in self.uncond)
            return self.denoiser(x_t, t, uncond)
        _check_condition(cond)
        if scale == 1:
            return self.denoiser(x_t, t, cond)
        x_twice, t_twice = xp_of(x_t).concatenate([x_t, x_t]), np.concatenate([t, t])
        both = self.denoiser(x_twice, t_twice, self._both(cond, B))
        x0_uncond, x0_cond = both[:B], both[B:]                                       # (B, ...) twice
        # eps = eps_uncond + scale (eps_cond - eps_uncond), where eps = (x_t - alpha x0_hat) / sigma. x_t is the same in
        # all three, so the same equation holds for x0_hat (also where alpha = 0)
        return x0_uncond + scale * (x0_cond - x0_uncond)


@dataclass(frozen=True, eq=False)
class GuidanceInterval:
    """Classifier-free guidance within an interval of noise levels; at all others the conditional model, scale 1.

    guided: a `ClassifierFree`. low, high: noise levels sigma_t / alpha_t, 0 <= low <= high; guidance acts where
    low < sigma_t / alpha_t <= high. At high noise it takes variety away and at low noise it changes little (arXiv
    2404.07724); outside the interval only one branch is computed, which halves the cost of a step where no
    sample is inside.
    """

    guided: ClassifierFree
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self):
        _check_interval(self.guided, self.low, self.high)

    @property
    def schedule(self) -> Schedule:
        return self.guided.schedule

    @property
    def predicts(self) -> str:
        return self.guided.predicts

    def __call__(self, x_t, t, cond=None):
        # w(sigma) = scale where low < sigma <= high, and 1 elsewhere;  sigma = sigma_t / alpha_t
        level = np.exp(-self.schedule.half_log_snr(t))                                # (B,)
        inside = (self.low < level) & (level <= self.high)
        if inside.all():
            return self.guided(x_t, t, cond)
        conditional = replace(self.guided, scale=1.0)(x_t, t, cond)
        if not inside.any():
            return conditional
        return xp_of(x_t).where(per_sample(inside, x_t) == 1, self.guided(x_t, t, cond), conditional)


@dataclass(frozen=True, eq=False)
class ClassifierGuidance(Wrapper):
    """Classifier guidance of an unconditional denoiser.

    grad_log_prob: `(x_t, t, y) -> grad log p(y | x_t)`, of x_t's shape, of a classifier of *noised* data; y is cond.
    The gradient is evaluated at x_t and added to the score at x_t, not at the mean of the step.
    At scale 1, with the exact classifier, the result is E[x_0 | x_t, y]. clip: thresholds the guided x0_hat. The
    denoiser itself must not clip, because a clipped x0_hat no longer matches its score.
    """

    denoiser: Denoiser
    grad_log_prob: Callable[[Any, Any, Any], Any]
    scale: float = 1.0
    clip: Callable[[Any], Any] | None = None

    def __post_init__(self):
        _check(self.denoiser, self.scale)
        _check_signal(self.schedule)

    def __call__(self, x_t, t, cond=None):
        x0_hat = self.denoiser(x_t, t)
        # score' = score + scale grad log p(y | x_t), and x0_hat = (x_t + sigma^2 score) / alpha:
        # x0_hat' = x0_hat + sigma^2 / alpha  scale grad log p(y | x_t)
        coefficient = self.scale * self.schedule.sigma(t) ** 2 / self.schedule.alpha(t)     # (B,)
        x0_hat = x0_hat + per_sample(coefficient, x_t) * self.grad_log_prob(x_t, t, cond)
        return x0_hat if self.clip is None else self.clip(x0_hat)


def stack_conditions(first: tuple, second: tuple) -> tuple:
    """One condition for two batches: each array has the rows of the first, then those of the second."""
    _check_alike(first, second)
    return tuple(xp_of(a, b).concatenate([a, b]) for a, b in zip(first, second, strict=True))


def _doubled(uncond: tuple, cond: tuple, B: int) -> tuple:
    return stack_conditions(tuple(_rows(a, B) for a in uncond), cond)


def _rows(a, B: int):
    """a with B rows; a single row is repeated."""
    return a if len(a) == B else xp_of(a).broadcast_to(a, (B, *a.shape[1:]))


# ---- checks ------------------------------------------------------------------------------------------------

def _check(denoiser: Denoiser, scale: float) -> None:
    finite("scale", scale)
    if getattr(denoiser, "clip", None) is not None:
        raise ValueError("denoiser must not clip before guidance: build it with clip=None and pass clip here")


def _check_interval(guided: ClassifierFree, low: float, high: float) -> None:
    if not (all(np.asarray(level).dtype.kind in "iuf" for level in (low, high)) and 0 <= low <= high):
        raise ValueError(f"the guidance interval's low and high must be noise levels sigma / alpha with "
                         f"0 <= low <= high, got {low!r} and {high!r}")
    if not isinstance(guided, ClassifierFree):
        raise TypeError(f"guided must be a ClassifierFree, got {type(guided).__name__}")


def _check_condition(cond: tuple | None) -> None:
    if cond is None:
        raise ValueError("cond must be a tuple of arrays unless scale is 0, not None: there is nothing to guide toward")


def _check_signal(schedule: Schedule) -> None:
    if schedule.alpha_bar[-1] == 0:
        raise ValueError("denoiser must not have zero terminal SNR, where the classifier's share of x_0 "
                         "is 0/0: use a schedule with alpha_bar[-1] > 0")


def _check_alike(first: tuple, second: tuple) -> None:
    shapes = [[a.shape[1:] for a in condition] for condition in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError("conditions must be tuples of as many arrays that differ along axis 0 only, "
                         f"got samples of shapes {shapes[0]} and {shapes[1]}")


def _check_rows(a, B: int) -> None:
    if len(a) not in (1, B):
        raise ValueError(f"uncond must have 1 row or {B}, one for each sample, got {len(a)}")
