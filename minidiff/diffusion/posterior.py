"""Sampling from p(x_0) r(x_0) with a model of p alone: in-painting, de-noising.

Sohl-Dickstein et al. 2015 (arXiv 1503.03585), section 2.5.  Each marginal of the reverse chain is multiplied by a
function r_t(x_t), where r_{-1} = r, and so each step from t to s becomes:

    p~(x_s | x_t)  proportional to  p(x_s | x_t) r_s(x_s)                                          eq. 22

p(x_s | x_t) = N(mean, variance) is narrow.  If r is Gaussian too, the product is computed exactly (`Observed`); if r
is only smooth, its gradient shifts the mean (`Nudged`, appendix C):

    mean~ = mean + variance grad log r_s(mean),     variance~ = variance

In the limit of small beta the samples have the density p(x_0) r(x_0) if and only if r_t(x_t) = E[r(x_0) | x_t]: only
then is each product normalised.  The paper uses the same r for all t (eq. 23).  Under p = N(0, 1) that counts every
observation twice: for y with noise of variance n, the mean should be y / (1 + n), but is y / (1 + n/2).
E[r(x_0) | x_t] is unknown for images.  There are two approximations of it, for y = x_0 with noise of variance `noise`:

    Observed          r_t(x_t) = N(x_t; alpha_t y, alpha_t^2 noise + sigma_t^2)         E[r | x_t] for a flat p
    reconstruction    r_t(x_t) = N(y; x0_hat(x_t), noise + sigma_t^2)                   E[r | x_t] for p = N(0, I)

The second uses x0_hat, which depends on all pixels, known and unknown, and needs a derivative of the network
(Ho et al. 2022, arXiv 2204.03458, section 3.1; Song et al. 2023).

Neither is exact for correlated data.  The hidden pixels depend too little on the known ones, and vary too much: an
in-painted half fits the known half less well than the model could.  Example: two numbers have variance 1 and
correlation rho = .8, and the first is known to be a, with noise 0.  In the limit of small beta the second has

                          mean        variance
    exact                 .8 a        .36               rho a,  1 - rho^2
    Observed              .369 a      .586              to first order in rho, (2 - pi^2/6) rho a: a third of it
    reconstruction        .763 a      .380              to first order in rho, exact

(with `cosine` and T = 256: .365 a and .577, .760 a and .372).  With u = alpha^2 and V the covariance at t, `Observed`
follows u dx/du = x/2 - V^-1 x + (sqrt(u) a - x_1, 0) / (1 - u) + noise.  The result for `reconstruction` is an
integral: (X, Y) = x0_hat(x_t) is a martingale of the reverse process, to which r adds a drift that depends on a - X
only.  With c = (1 - rho^2 u) / (1 - rho^2 u^2) and d = rho (1 - u) / (1 - rho^2 u^2), the derivative of x0_hat by x_t
is alpha [[c, d], [d, c]]:

    dX = (c^2 + d^2) (a - X) / (1 - u) du + noise,      dY = 2 c d (a - X) / (1 - u) du + noise

Exact conditioning divides by noise + Var[x_0 | x_t], here c sigma_t^2; `reconstruction` divides by noise + sigma_t^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minidiff.checks import finite
from minidiff.diffusion.denoiser import Denoiser, Differentiable
from minidiff.diffusion.gaussian import per_sample, q_posterior_mean_variance
from minidiff.diffusion.samplers import State, beta_tilde, checked_times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import xp_of
from minidiff.engine.random import SampleStreams

Factor = Callable[[Any, Any, int], tuple[Any, Any]]         # (mean, variance, s) -> mean~, variance~


def posterior(denoiser: Denoiser, x_T, times: Sequence[int], factor: Factor, cond=None, *, streams: SampleStreams,
              variance: Callable[[Schedule, int, int], float] = beta_tilde) -> Iterator[State]:
    """Ancestral sampling (samplers.ddpm) with each step's density multiplied by r.

    x_T: (B, ...) noise, the sample at times[0].  times: integers, strictly falling, within 0..T-1.
    factor: an `Observed`, a `Nudged`, or any function that multiplies N(mean, variance) by r_s; all its arrays are
    (B, ...).  streams: one for each sample.  variance: `beta_tilde` or `beta`.
    """
    schedule, x_t = denoiser.schedule, x_T
    _check_streams(streams, len(x_T))
    times = checked_times(times, range(schedule.T), f"within {schedule.T - 1}..0")
    for step, (t, s) in enumerate(pairwise([*times, -1]), start=1):
        x0_hat = denoiser(x_t, np.full(len(x_t), t), cond)
        mean, var = q_posterior_mean_variance(schedule, x0_hat, x_t, t, s)
        # p~(x_s | x_t) = p(x_s | x_t) r_s(x_s) / Z; the last step has no noise
        var = xp_of(x_t).full_like(x_t, variance(schedule, t, s) if s >= 0 else 0)
        x_t, var = factor(mean, var, s)
        if s >= 0:
            x_t = x_t + xp_of(x_t).sqrt(var) * xp_of(x_t).asarray(streams.normal(x_t.shape[1:], x_t.dtype))
        yield State(step, s, x_t, x0_hat)


@dataclass(frozen=True, eq=False)
class Observed:
    """r for y = x_0 + sqrt(noise) z, observed where `known` is True.  With noise 0 the result is exactly y there.

    y: (B, ...), or what broadcasts to it.  known: booleans, likewise.  noise: at least 0.
    """

    schedule: Schedule
    y: Any
    known: Any
    noise: float = 0.0

    def __post_init__(self):
        _check(self.known, self.noise)

    def __call__(self, mean, variance, s: int):
        xp = xp_of(mean)
        alpha, sigma = float(self.schedule.alpha(s)), float(self.schedule.sigma(s))
        # r_s(x_s) = N(x_s; alpha y, width),   width = alpha^2 noise + sigma^2
        width = alpha**2 * self.noise + sigma**2
        # the product of two Gaussians:  mean~ = mean + gain (alpha y - mean),   variance~ = (1 - gain) variance
        gain = variance / (variance + width) if width > 0 else xp.ones_like(mean)
        gain = xp.where(self.known, gain, 0).astype(mean.dtype)
        y = xp.where(self.known, self.y, 0).astype(mean.dtype)      # what is not known may be NaN
        return mean + gain * (alpha * y - mean), (1 - gain) * variance


@dataclass(frozen=True, eq=False)
class Nudged:
    """Any smooth r, by its gradient: grad_log_r(x_s, s) -> grad log r_s(x_s), of x_s's shape, for s of 0..T-1."""

    grad_log_r: Callable[[Any, int], Any]

    def __call__(self, mean, variance, s: int):
        if s == -1:                                         # the variance is 0, so the mean does not move
            return mean, variance
        # mean~ = mean + variance grad log r_s(mean)                                    appendix C, eq. 61
        return mean + variance * self.grad_log_r(mean, s), variance


def reconstruction(denoiser: Differentiable, y, known, noise: float = 0.0, cond=None) -> Nudged:
    """r of the denoiser's estimate of x_0; arguments as for `Observed`, and a denoiser with a vjp."""
    _check(known, noise)

    def grad_log_r(x_s, s: int):
        t = np.full(len(x_s), s)
        x0_hat = denoiser(x_s, t, cond)
        error = xp_of(x_s).where(known, y - x0_hat, 0).astype(x_s.dtype)
        # grad log r = J^T (y - x0_hat) / (noise + sigma^2)
        error = error / per_sample(noise + denoiser.schedule.sigma(t) ** 2, x_s)
        return denoiser.vjp(x_s, t, error, cond)[1]
    return Nudged(grad_log_r)


# ---- checks ------------------------------------------------------------------------------------------------

def _check_streams(streams: SampleStreams, B: int) -> None:
    if len(streams) != B:
        raise ValueError(f"streams must be one for each of the {B} samples, not {len(streams)}")


def _check(known, noise: float) -> None:
    if np.dtype(known.dtype) != bool:
        raise TypeError(f"known must be an array of booleans, True where y was observed, not of {known.dtype}")
    finite("noise", noise, 0)
