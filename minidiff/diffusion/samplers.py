"""Samplers: from noise x_T to an image x_0, with a denoiser and nothing else.

A sampler follows a list of times, T-1 = t_1 > t_2 > ... > t_N, and ends at -1, where alpha = 1 and sigma = 0.
A step goes from x_t to x_s, where s is the time after t in the list:

    x_t     = alpha_t x_0 + sigma_t eps,   alpha = sqrt(alpha_bar),   sigma = sqrt(1 - alpha_bar)
    x0_hat  = denoiser(x_t, t)                     the estimate of the clean image
    eps_hat = (x_t - alpha_t x0_hat) / sigma_t     the estimate of the noise

    ddpm                draws x_s from q(x_s | x_t, x0_hat)             Ho et al. 2020       arXiv 2006.11239
    ddim                x_s = alpha_s x0_hat + sigma_s eps_hat          DDIM                 arXiv 2010.02502
    heun                averages the slopes at t and at s               Karras et al. 2022   arXiv 2206.00364
    dpm_solver_pp_2m    extrapolates x0_hat along log(alpha / sigma)    DPM-Solver++         arXiv 2211.01095

Each is a generator that yields a `State` after each step:

    for state in ddim(denoiser, x_T, times(schedule, 20)): show(state.x0_hat)
    x_0 = sample(heun(denoiser, x_T, times(schedule, 20)))

The last state is x0_hat, with no noise left. All states are finite, also if alpha_{T-1} = 0.
Arithmetic is in x_T's dtype, with coefficients computed in float64. Random numbers come from `streams` only.
SAMPLERS, at the end of the file, holds them by name, with those of multistep.py and consistency.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minidiff.checks import finite, one_of, whole
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.gaussian import eps_from_x0, q_posterior_mean_variance, q_step, v_from_x0
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import xp_of
from minidiff.engine.random import SampleStreams
from minidiff.registry import Registry

# A slope that was measured over a stride is not extrapolated over one of 100 times its length: rounding, and the errors
# of earlier steps, would be multiplied by as much.
LEAP = 0.01


@dataclass(frozen=True, eq=False)
class State:
    """The state of a sampler after a step."""

    step: int       # 1 ... N
    t: int          # the time that x_t has reached; -1 at the end
    x_t: Any        # (B, ...)
    x0_hat: Any     # (B, ...), the denoiser's estimate at the start of the step


def sample(states: Iterable[State]):
    """Runs a sampler to its end and returns x_0.  ValueError where there is no state."""
    last = deque(states, maxlen=1)
    if not last:
        raise ValueError("states must be at least one state of a sampler, and there is none")
    return last.pop().x_t


# ---- the four samplers -------------------------------------------------------------------------------------

def beta_tilde(schedule: Schedule, t: int, s: int) -> float:
    """The variance of q(x_s | x_t, x_0). Right for the reverse step if all data are one point (DDPM section 3.2)."""
    # beta~ = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta                                    DDPM eq. 7
    return float((1 - schedule.abar(s)) / (1 - schedule.abar(t))) * beta(schedule, t, s)


def beta(schedule: Schedule, t: int, s: int) -> float:
    """The variance of q(x_t | x_s). Right for the reverse step if x_0 ~ N(0, I) (DDPM section 3.2)."""
    # beta = 1 - alpha_bar_t / alpha_bar_s: of the step from s to t of this list, not the schedule's beta_t
    return float(q_step(schedule, s, t)[1])


def ddpm(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *, streams: SampleStreams,
         variance: Callable[[Schedule, int, int], float] = beta_tilde) -> Iterator[State]:
    """Ancestral sampling, DDPM algorithm 2, on all times or on any list of them.

    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    streams: one for each sample. variance: `beta_tilde` or `beta`.
    """
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        # mu~ = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x0_hat
        #     + sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t   DDPM eq. 7
        x_s, _ = q_posterior_mean_variance(schedule, x0_hat, x_t, t, s)
        if s >= 0:                                          # the last step adds no noise: z = 0
            # x_s = mu~ + sqrt(variance) z,   z ~ N(0, I)                                   DDPM algorithm 2
            x_s = x_s + math.sqrt(variance(schedule, t, s)) * standard_normal(streams, x_t)
        x_t = x_s
        yield State(step, s, x_t, x0_hat)


def ddim(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *, eta: float = 0.0,
         streams: SampleStreams | None = None) -> Iterator[State]:
    """DDIM eq. 12: deterministic at eta = 0; at eta = 1 the ancestral sampler with variance beta_tilde.

    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    eta: within 0..1. streams: one for each sample, needed if eta > 0.
    """
    finite("eta, from deterministic to ancestral,", eta, 0, 1)
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in steps_along(schedule, times):
        alpha_s, sigma_s = alpha_sigma(schedule, s)
        x0_hat = denoise(denoiser, x_t, t, cond)
        eps_hat = eps_from_x0(schedule, x_t, t, x0_hat)
        # sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)  DDIM eq. 16
        sigma = eta * math.sqrt(beta_tilde(schedule, t, s))
        # x_s = alpha_s x0_hat  +  sqrt(1 - alpha_bar_s - sigma^2) eps_hat  +  sigma z        DDIM eq. 12
        x_t = alpha_s * x0_hat + math.sqrt(max(sigma_s**2 - sigma**2, 0)) * eps_hat
        if sigma > 0:
            x_t = x_t + sigma * standard_normal(streams, x_t)
        yield State(step, s, x_t, x0_hat)


def heun(denoiser: Denoiser, x_T, times: Sequence[int], cond=None) -> Iterator[State]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); two denoiser calls a step, one in the last.

    Its variable of time is the angle phi with alpha = cos(phi), sigma = sin(phi) (in the paper's symbols s(t) = cos t
    and sigma(t) = tan t). The slope dx/dphi is v, which is finite also at alpha = 0.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    """
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in steps_along(schedule, times):
        # dx/dphi = v = (alpha x - x0_hat) / sigma                                          Karras et al. 2022, eq. 4
        x0_hat = denoise(denoiser, x_t, t, cond)
        v_t = v_from_x0(schedule, x_t, t, x0_hat)
        if s >= 0:
            h = angle(schedule, s) - angle(schedule, t)
            # Euler:  x_s = x_t + h v_t
            x_s = x_t + h * v_t
            # Heun:   x_s = x_t + h (v_t + v_s) / 2
            v_s = v_from_x0(schedule, x_s, s, denoise(denoiser, x_s, s, cond))
            x_t = x_t + h * (v_t + v_s) / 2
        else:
            # v needs sigma > 0, so the last step is of first order, as in the paper. It rotates by phi instead of
            # going straight, and so ends at the clean image:  x_s = cos(phi) x_t - sin(phi) v_t = x0_hat
            x_t = x0_hat
        yield State(step, s, x_t, x0_hat)


def dpm_solver_pp_2m(denoiser: Denoiser, x_T, times: Sequence[int], cond=None) -> Iterator[State]:
    """DPM-Solver++(2M) (DPM-Solver++ algorithm 2): second order at one denoiser call a step.

    The first step has no earlier x0_hat to extrapolate from, and the last ends at lambda = infinity: both are of first
    order, equal to DDIM. So is a step after a stride that is much shorter (LEAP). The whole is still of second order if
    all strides of lambda shrink as 1/N, as with log_snr spacing; with equal strides of t the last ones do not
    (docs/convergence.md).
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    """
    schedule, x_t = denoiser.schedule, x_T
    x0_before, h_before = None, None
    for step, t, s in steps_along(schedule, times):
        alpha_t, sigma_t = alpha_sigma(schedule, t)
        alpha_s, sigma_s = alpha_sigma(schedule, s)
        # h = lambda_s - lambda_t,  lambda = log(alpha / sigma);  e^{-h} = sigma_s alpha_t / (alpha_s sigma_t)
        e_h = sigma_s * alpha_t / (alpha_s * sigma_t)
        h = -math.log(e_h) if e_h > 0 else math.inf         # infinite in the last step, and from alpha_t = 0
        x0_hat = denoise(denoiser, x_t, t, cond)
        if step == 1 or s == -1 or h_before < LEAP * h:
            D = x0_hat
        else:
            # D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_before,   r = h_before / h
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_before
        # x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D
        x_t = sigma_s / sigma_t * x_t - alpha_s * (e_h - 1) * D
        x0_before, h_before = x0_hat, h
        yield State(step, s, x_t, x0_hat)


def ddim_inverse(denoiser: Denoiser, x_0, times: Sequence[int], cond=None) -> Iterator[State]:
    """DDIM in reverse, from x_0 to the noise x_T (Dhariwal & Nichol 2021, appendix F).

    `ddim` on the same times returns from x_T approximately to x_0. Each step evaluates eps_hat at its lower end, an
    error that vanishes as 1 / len(times).
    x_0: (B, ...). times: as for `ddim`, strictly falling. The last state is at times[0].
    """
    schedule, x_s = denoiser.schedule, x_0
    for step, (_, t, s) in enumerate(reversed(list(steps_along(schedule, times))), start=1):
        alpha_t, sigma_t = alpha_sigma(schedule, t)
        alpha_s, sigma_s = alpha_sigma(schedule, s)
        lower = s if s >= 0 else t                          # there is no eps at s = -1: evaluate at the lowest t
        x0_hat = denoise(denoiser, x_s, lower, cond)
        eps_hat = eps_from_x0(schedule, x_s, lower, x0_hat)
        # x_t / alpha_t = x_s / alpha_s + (sigma_t / alpha_t - sigma_s / alpha_s) eps_hat   DDIM eq. 13
        x_s = alpha_t / alpha_s * x_s + (sigma_t - alpha_t * sigma_s / alpha_s) * eps_hat
        yield State(step, t, x_s, x0_hat)


# ---- lists of times ----------------------------------------------------------------------------------------
# A spacing returns the ideal times, maybe fractions; `times` rounds them to a valid list.

def trailing(schedule: Schedule, steps: int):
    """Equal strides counted down from T-1 (Zero SNR section 3.3)."""
    return np.round(schedule.T * np.arange(steps, 0, -1) / steps) - 1


def leading(schedule: Schedule, steps: int):
    """Equal strides counted up from 0 (Zero SNR table 2), with the largest moved to T-1.

    Without that it is 980 for 50 steps of T = 1000, but x_T is pure noise: more than at t = 980.
    """
    t = schedule.T // steps * np.arange(steps - 1, -1, -1)
    t[0] = schedule.T - 1
    return t


def linspace(schedule: Schedule, steps: int):
    """Equal strides with both ends, T-1 and 0 (Zero SNR table 2)."""
    return np.linspace(schedule.T - 1, 0, steps)


def log_snr(schedule: Schedule, steps: int):
    """Equal strides of log(alpha^2 / sigma^2) with both ends (DPM-Solver); below -10 (alpha < .007) counts as -10."""
    t = np.arange(schedule.T)
    level = np.maximum(schedule.log_snr(t), -10)                                      # (T,), falling
    wanted = np.linspace(level[-1], level[0], steps)
    return np.concatenate([[schedule.T - 1], np.interp(wanted[1:], level[::-1], t[::-1])])


SPACINGS = {"trailing": trailing, "leading": leading, "linspace": linspace, "log_snr": log_snr}


def times(schedule: Schedule, steps: int, spacing: str = "trailing"):
    """The times of a sampler: `steps` integers, strictly falling, the first T-1 and none below 0."""
    steps = whole("steps", steps, 1, schedule.T)
    one_of("spacing", spacing, SPACINGS)
    k = np.arange(steps)
    t = np.round(SPACINGS[spacing](schedule, steps)).astype(int)
    # if rounding makes two times equal, the second moves down; times that would fall below 0 become 0, 1, 2, ...
    t = np.minimum.accumulate(t + k) - k
    return np.maximum(t, k[::-1])                                                     # (steps,)


# ---- what the samplers share -------------------------------------------------------------------------------

def checked_times(times: Sequence[int], first: range, where: str) -> list[int]:
    """The times as Python integers, if they fall strictly from one of `first` to 0 or more; else ValueError.

    where: the range, for the message. 9.0 and True are not integers here.
    """
    times = [t.item() if np.ndim(t) == 0 and hasattr(t, "item") else t for t in times]
    if (not times or any(type(t) is not int for t in times) or times[0] not in first or times[-1] < 0
            or any(t <= s for t, s in pairwise(times))):
        raise ValueError(f"times must be integers that fall strictly {where}, got {times}")
    return times


def steps_along(schedule: Schedule, times: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(step, t, s) for step = 1 ... N: s is the next time in the list, whatever its strides; -1 after the last."""
    times = checked_times(times, range(schedule.T), f"within {schedule.T - 1}..0")
    for step, (t, s) in enumerate(pairwise([*times, -1]), start=1):
        yield step, t, s


def denoise(denoiser: Denoiser, x_t, t: int, cond):
    return denoiser(x_t, np.full(len(x_t), t), cond)                                  # (B, ...)


def alpha_sigma(schedule: Schedule, t: int) -> tuple[float, float]:
    """As Python floats, which do not change the dtype of an array that they multiply."""
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def angle(schedule: Schedule, t: int) -> float:
    """The angle phi with alpha = cos(phi), sigma = sin(phi): 0 at the clean image, pi/2 at pure noise."""
    alpha, sigma = alpha_sigma(schedule, t)
    return math.atan2(sigma, alpha)


def standard_normal(streams: SampleStreams | None, x_t):
    """Standard normal numbers of x_t's shape, dtype and device, each sample's from its own stream."""
    if streams is None or len(streams) != len(x_t):
        got = "None" if streams is None else f"{len(streams)} streams"
        raise ValueError(f"streams must be SampleStreams, one for each of the {len(x_t)} samples, got {got}")
    return xp_of(x_t).asarray(streams.normal(x_t.shape[1:], x_t.dtype))


# ---- checks ------------------------------------------------------------------------------------------------

def _check_sampler(entry: Sampler) -> None:
    if not callable(entry.function):
        raise TypeError(f"function must be a sampler (denoiser, x_T, times, cond) -> states, got {entry.function!r}")
    if isinstance(entry.order, bool) or not isinstance(entry.order, (int, float)) or not 0 < entry.order < math.inf:
        raise ValueError(f"order must be a positive number, such as 1 or 2, got {entry.order!r}")
    whole("calls", entry.calls, 1)
    whole("history", entry.history, 0)
    whole("first_calls", entry.first_calls, 0)


# ---- samplers by name --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampler:
    """An entry of SAMPLERS: a sampler, and what its callers must know about it.

    function: `(denoiser, x_T, times, cond=None) -> Iterator[State]`; one that draws noise also takes `streams=`.
    """

    function: Callable[..., Iterator[State]]
    order: float                    # of its error, N^-order in N steps; of the samples' moments if it draws noise
    calls: int = 1                  # of the denoiser in a step
    noise: bool = False             # draws from `streams` in each step but the last
    extrapolates: bool = False      # uses x0_hat at the middle of its stride of log(alpha / sigma), as 2M does
    history: int = 0                # how many earlier steps a step looks back to; the first steps have fewer
    first_calls: int = 0            # of the denoiser, by which the first step may exceed `calls`
    consistency: bool = False       # takes the answer for the end of the flow: for consistency models alone

    def __post_init__(self):
        _check_sampler(self)

    def __call__(self, denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *,
                 streams: SampleStreams | None = None) -> Iterator[State]:
        """Runs the sampler; `streams` reach it only if it draws noise."""
        if self.noise:
            return self.function(denoiser, x_T, times, cond, streams=streams)
        return self.function(denoiser, x_T, times, cond)


DDPM = Sampler(ddpm, order=1, noise=True)
DDIM = Sampler(ddim, order=1)
HEUN = Sampler(heun, order=2, calls=2)
DPM_SOLVER_PP_2M = Sampler(dpm_solver_pp_2m, order=2, extrapolates=True, history=1)

SAMPLERS: Registry[Sampler] = Registry("sampler", "minidiff.samplers", {
    "ddpm": f"{__name__}:DDPM", "ddim": f"{__name__}:DDIM", "heun": f"{__name__}:HEUN",
    "dpm++2m": f"{__name__}:DPM_SOLVER_PP_2M",
    "dpm++2m-sde": "minidiff.diffusion.multistep:DPM_SOLVER_PP_2M_SDE",
    "unipc": "minidiff.diffusion.multistep:UNIPC",
    "plms": "minidiff.diffusion.multistep:PLMS",
    "lms": "minidiff.diffusion.multistep:LMS",
    "lcm": "minidiff.diffusion.consistency:LCM"})
