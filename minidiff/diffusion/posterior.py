"""Sampling from p(x_0) r(x_0) with a model of p alone: in-painting, de-noising.

Sohl-Dickstein et al. 2015 (arXiv 1503.03585), section 2.5.  Every marginal of the reverse chain is multiplied by a
function r_t(x_t), with the r that is meant at t = -1, and so every step is, from t to s:

    p~(x_s | x_t)  proportional to  p(x_s | x_t) r_s(x_s)                                   section 2.5.2

p(x_s | x_t) = N(mean, variance) is narrow.  Where r is Gaussian, too, the product is done exactly (`Observed`); where
it is only smooth, the mean moves by its gradient (`Nudged`, appendix C):

    mean~ = mean + variance grad log r_s(mean),     variance~ = variance

In the limit of small beta this is p(x_0) r(x_0) if r_t(x_t) = E[r(x_0) | x_t], and with no other choice in between:
only then is each product normalised already.  The paper holds r the same for all t.  Under p = N(0, 1) that
counts every observation twice: of y with noise v, where the mean should be y / (1 + v), it is y / (1 + v/2).
E[r(x_0) | x_t] is not known for images; each of these stands for it, when y is x_0 with noise of power `noise`:

    Observed          r_t(x_t) = N(x_t; alpha_t y, alpha_t^2 noise + sigma_t^2)         E[r | x_t] for a flat p
    reconstruction    r_t(x_t) = N(y; x0_hat(x_t), noise + sigma_t^2)                   E[r | x_t] for p = N(0, I)

The second sees, through x0_hat, what the unknown pixels make of the known ones, and costs a derivative of the network
(Ho et al. 2022, arXiv 2204.03458, section 3.1; Song et al. 2023, "Pseudoinverse-guided diffusion models").

Neither is exact for data that hang together.  What is hidden hears of what is known too little, and keeps too much
freedom: an in-painted half fits the seen half less well than the model knows how to.  Of two numbers of variance 1 and
correlation rho = .8 the first is known to be a, noise 0.  The second comes out, in the limit of small beta, as

                          mean        variance
    exact                 .8 a        .36               rho a,  1 - rho^2
    Observed              .369 a      .586              to first order in rho, (2 - pi^2/6) rho a: a third of it
    reconstruction        .763 a      .380              to first order in rho, exact

(from `cosine`, T = 256: .365 a and .577, .760 a and .372).  With u = alpha^2 and V the covariance at t, `Observed`
follows u dx/du = x/2 - V^-1 x + (sqrt(u) a - x_1, 0) / (1 - u) + noise.  That of `reconstruction` is a quadrature:
(X, Y) = x0_hat(x_t) is a martingale of the reverse process, and r adds a drift in a - X alone.  With
c = (1 - rho^2 u) / (1 - rho^2 u^2) and d = rho (1 - u) / (1 - rho^2 u^2), d x0_hat / d x_t is alpha [[c, d], [d, c]]:

    dX = (c^2 + d^2) (a - X) / (1 - u) du + noise,      dY = 2 c d (a - X) / (1 - u) du + noise

Exact conditioning divides by noise + Var[x_0 | x_t], here c sigma_t^2, where `reconstruction` has noise + sigma_t^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minidiff.diffusion.denoiser import Denoiser, Differentiable
from minidiff.diffusion.gaussian import per_sample, q_posterior_mean_variance
from minidiff.diffusion.samplers import State, beta_tilde, checked_times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import xp_of
from minidiff.engine.random import SampleStreams

Factor = Callable[[Any, Any, int], tuple[Any, Any]]         # (mean, variance, s) -> mean~, variance~


def posterior(denoiser: Denoiser, x_T, times: Sequence[int], factor: Factor, cond=None, *, streams: SampleStreams,
              variance: Callable[[Schedule, int, int], float] = beta_tilde) -> Iterator[State]:
    """Ancestral sampling (samplers.ddpm) whose every step is multiplied by r.

    x_T: (B, ...) noise, the sample at times[0].  times: integers, strictly falling, within 0..T-1.
    factor: an `Observed`, a `Nudged`, or any function that multiplies N(mean, variance) by r_s: arrays (B, ...) in
    and out.  streams: one for each sample.  variance: `beta_tilde` or `beta`.
    """
    schedule, x_t = denoiser.schedule, x_T
    if len(streams) != len(x_T):
        raise ValueError(f"streams must be one for each of the {len(x_T)} samples, not {len(streams)}")
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
    """r for y = x_0 + sqrt(noise) z, seen where `known` is True.  At noise 0 the result is y there, exactly.

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
        return mean + gain * (alpha * self.y - mean), (1 - gain) * variance


@dataclass(frozen=True, eq=False)
class Nudged:
    """Any smooth r, by its gradient: grad_log_r(x_s, s) -> grad log r_s(x_s), of x_s's shape, for s of 0..T-1."""

    grad_log_r: Callable[[Any, int], Any]

    def __call__(self, mean, variance, s: int):
        if s == -1:                                         # no variance is left, and nothing moves
            return mean, variance
        # mean~ = mean + variance grad log r_s(mean)                                            appendix C
        return mean + variance * self.grad_log_r(mean, s), variance


def reconstruction(denoiser: Differentiable, y, known, noise: float = 0.0, cond=None) -> Nudged:
    """r through what the denoiser makes of x_t; arguments as for `Observed`, and a denoiser that has a vjp."""
    _check(known, noise)

    def grad_log_r(x_s, s: int):
        t = np.full(len(x_s), s)
        x0_hat = denoiser(x_s, t, cond)
        error = xp_of(x_s).where(known, y - x0_hat, 0).astype(x_s.dtype)
        # grad log r = J^T (y - x0_hat) / (noise + sigma^2)
        error = error / per_sample(noise + denoiser.schedule.sigma(t) ** 2, x_s)
        return denoiser.vjp(x_s, t, error, cond)[1]
    return Nudged(grad_log_r)


def _check(known, noise: float) -> None:
    if np.dtype(known.dtype) != bool:
        raise TypeError(f"known must be an array of booleans, True where y was seen, not of {known.dtype}")
    if not 0 <= noise < np.inf:
        raise ValueError(f"noise must be a finite number of at least 0, not {noise!r}")
