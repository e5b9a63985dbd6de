"""The density of training times, over log-SNR: how often a network sees each noise level.

    lambda_t = log(alpha_t^2 / sigma_t^2)               log-SNR, strictly falling in t                  VDM eq. 2
    P(t)     ~ F(edge_{t-1}) - F(edge_t)                F: distribution function of a density over lambda
    edge_t   = (lambda_t + lambda_{t+1}) / 2            each time stands for the noise levels that are nearest to it

lambda is a better clock than t: the same t is another noise level in another schedule, but lambda_t says what the
network sees.  A density over lambda, and a loss over lambda, mean the same in every schedule (Kingma & Gao 2023).
These are the densities of the literature:

    uniform     p(lambda) constant                      every noise level equally often: VDM, with its linear gamma
    normal      lambda ~ N(mean, std^2)                 EDM: log sigma ~ N(m, s^2), and lambda = -2 log sigma has mean
                                                        -2m and std 2s.  Stable Diffusion 3: logit u ~ N(m, s^2) for
                                                        x = (1-u) x_0 + u eps, and lambda = -2 logit u, too
                                                        (rectified_flow.py)
    sech        p(lambda) = sech((lambda - shift)/2) / 2 pi     the cosine schedule with uniform times; shifted, the
                                                        cosine schedule of larger images (Hoogeboom et al. 2023)
    power       t = T u^power                           of t, not of lambda; times.py

A text names one, with its parameters, or a mixture of several with their shares: "0.7*power + 0.3*uniform".

A density is a weight.  The mean of a loss L_t over times of density P, and the mean over times of density Q where each
L_t counts Q(t)/P(t) times as much, are one objective:

    E_{t ~ P} [Q(t)/P(t) L_t] = sum_t Q(t) L_t = E_{t ~ Q} [L_t]                        importance sampling

Only the variance differs.  So a density is chosen for one of two reasons: what the network should be good at, if the
loss keeps its weight; or how noisy the gradient is, if the weight is divided by the density.

    Karras et al. 2022 (EDM), arXiv 2206.00364;  Kingma & Gao 2023, arXiv 2303.00848;  Hoogeboom et al. 2023 (simple
    diffusion), arXiv 2301.11093;  Esser et al. 2024 (Stable Diffusion 3), arXiv 2403.03206
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr

from minidiff import named
from minidiff.checks import whole
from minidiff.diffusion.schedules import Schedule
from minidiff.diffusion.times import stratified_uniform
from minidiff.errors import UserError
from minidiff.registry import Registry


class TimeDensity:
    """P(t), t = 0 .. T-1, as a table.  ValueError unless it is (T,), not negative, finite and not all 0."""

    def __init__(self, P: np.ndarray):
        P = np.asarray(P, np.float64)
        if P.ndim != 1 or not P.size or not (np.isfinite(P).all() and (P >= 0).all() and P.sum() > 0):
            raise ValueError(f"P must be probabilities (T,), at least one of them positive, got {np.shape(P)}")
        self.P = P / P.sum()                                                        # (T,)
        below = np.cumsum(self.P)                                                   # P(t' <= t)
        self._below = below / below[-1]                     # the last is 1 exactly, so that no u finds no time

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...], stratified: bool = True) -> np.ndarray:
        """Times t of `shape`, int64: each has the probability P(t).

        shape: B for (B,).  stratified: together they are spread evenly; only for a batch (B,).  Otherwise all are
        independent.  ValueError for stratified times of another shape.
        """
        if stratified:
            u = stratified_uniform(rng, whole("shape, for stratified times,", shape, 0))
        else:
            u = rng.random(shape)
        # t = the first with P(t' <= t) > u
        return np.searchsorted(self._below, u, side="right")

    def weight_for(self, Q: TimeDensity) -> np.ndarray:
        """Q(t)/P(t), (T,): a loss with this weight, over times of this density, is the loss over times of Q.

        ValueError where this density never draws a time that Q draws, or where Q has another number of times.
        """
        if Q.P.shape != self.P.shape:
            raise ValueError(f"Q must have {len(self.P)} times, as this density, got {len(Q.P)}")
        if ((self.P == 0) & (Q.P > 0)).any():
            raise ValueError("Q must be 0 where this density is 0: no weight makes up for times that are never drawn")
        return np.divide(Q.P, self.P, out=np.zeros_like(self.P), where=self.P > 0)


# ---- densities by name -----------------------------------------------------------------------------------
# An entry is a function (schedule, parameter=default, ...) -> P (T,), up to a factor.

def uniform(schedule: Schedule) -> np.ndarray:
    """Every log-SNR between the schedule's ends equally often."""
    # P(t) ~ edge_{t-1} - edge_t
    return -np.diff(log_snr_edges(schedule))


def normal(schedule: Schedule, mean: float = 0.0, std: float = 2.0) -> np.ndarray:
    """lambda ~ N(mean, std^2), cut off at the schedule's ends.  EDM's training has mean 2.4 and std 2.4; Stable
    Diffusion 3's best had mean 0 and std 2."""
    if not std > 0:
        raise ValueError(f"std must be positive, got {std:g}")
    # F(lambda) = Phi((lambda - mean) / std)
    return _reached(_mass(ndtr, (log_snr_edges(schedule) - mean) / std), f"mean {mean:g} and std {std:g}")


def sech(schedule: Schedule, shift: float = 0.0) -> np.ndarray:
    """The density that uniform times have in the cosine schedule, moved by `shift` in log-SNR: below 0, to more noise.

    For images d times as wide as those that a cosine schedule suits, shift = -2 log d (Hoogeboom et al. 2023).
    """
    # alpha^2 = cos^2(pi u/2), so u = 2/pi atan(e^(-lambda/2)), and F(lambda) = 1 - u = 2/pi atan(e^(lambda/2))
    return _reached(_mass(lambda x: 2 / np.pi * np.arctan(np.exp(x / 2)), log_snr_edges(schedule) - shift),
                    f"shift {shift:g}")


def power(schedule: Schedule, power: float = 1 / 3) -> np.ndarray:
    """t = T u^power: uniform times for 1, and the noisier times more often below 1 (times.py)."""
    if not 0 < power <= 1:
        raise ValueError(f"power must be in (0, 1], where 1 draws all times equally often, got {power:g}")
    # P(t < k) = (k/T)^(1/power)
    return np.diff((np.arange(schedule.T + 1) / schedule.T) ** (1 / power))


DENSITIES: Registry[Callable[..., np.ndarray]] = Registry("density of times", "minidiff.densities")
for _entry in (power, uniform, normal, sech):
    DENSITIES.register(_entry.__name__, _entry)


def density_from(text: str, schedule: Schedule) -> TimeDensity:
    """The density that a text names: NAME[:key=value,...], or a mixture SHARE*NAME[:...] + SHARE*NAME[:...] + ...

    The shares sum to 1, and the parts stand between ' + ' with its spaces.  UserError, in one sentence, if the
    text is wrong or the density cannot be made.
    """
    try:
        with np.errstate(all="ignore"):                     # overflow leaves a table that is refused
            # P = sum_k share_k P_k
            return TimeDensity(sum(share * TimeDensity(DENSITIES[name](schedule, **parameters)).P
                                   for share, name, parameters in parse_density(text)))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"density of times {text!r}: {error}") from error


def parse_density(text: str) -> list[tuple[float, str, dict[str, float]]]:
    """(share, name, parameters) of each part of a mixture; UserError, in one sentence, if the text is wrong."""
    if not isinstance(text, str) or "*" not in text:
        return [(1.0, *named.parse(DENSITIES, text))]
    shares, names = zip(*((share, name.strip()) for share, _, name in
                          (part.partition("*") for part in text.split(" + "))), strict=True)
    try:
        shares = [float(share) for share in shares]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not abs(sum(shares) - 1) < 1e-6:
        raise UserError(f"density of times {text[:80]!r}: the shares of a mixture must be numbers that sum to 1, as in "
                        "'0.7*power + 0.3*uniform'")
    return [(share, *named.parse(DENSITIES, name)) for share, name in zip(shares, names, strict=True)]


def log_snr_edges(schedule: Schedule) -> np.ndarray:
    """The bounds of the log-SNRs that each time stands for, falling: (T + 1,).

    Between neighbours the bound is half-way; the outer ones are as far from the first and the last as these are from
    the next bound.  ValueError for fewer than two times of finite log-SNR.  A last time of SNR 0 counts as one step
    further than the one before, with the same step.
    """
    lambda_t = schedule.log_snr(np.arange(schedule.T))                              # (T,)
    if np.isneginf(lambda_t[-1]) and schedule.T > 2:
        lambda_t[-1] = 2 * lambda_t[-2] - lambda_t[-3]
    if schedule.T < 2 or not np.isfinite(lambda_t).all():
        raise ValueError(f"a density over log-SNR needs at least two times of an SNR above 0, and the schedule has "
                         f"{np.isfinite(lambda_t).sum()}: take a larger T, or times=power, which is a density over t")
    middle = (lambda_t[1:] + lambda_t[:-1]) / 2
    return np.concatenate([[2 * lambda_t[0] - middle[0]], middle, [2 * lambda_t[-1] - middle[-1]]])


def _mass(F: Callable[[np.ndarray], np.ndarray], edges: np.ndarray) -> np.ndarray:
    """F(edge_{t-1}) - F(edge_t), (T,), for F(-x) = 1 - F(x): from the tail that is nearer, where F is near 0 and its
    difference is exact."""
    upper, lower = edges[:-1], edges[1:]
    return np.where(lower > 0, F(-lower) - F(-upper), F(upper) - F(lower))


def _reached(P: np.ndarray, parameters: str) -> np.ndarray:
    """P; ValueError where all of it rounds to 0."""
    if not P.sum() > 0:
        raise ValueError(f"{parameters} leave no chance to the schedule's log-SNRs")
    return P
