"""The bound of the first diffusion paper, in entropies of Gaussians (Sohl-Dickstein et al. 2015, arXiv 1503.03585).

    H_q(X_t | X_s) = D/2 log(2 pi e sigma2_ts)                                 the entropy of one step, or of many

The bound K on the log likelihood of a reverse chain of Gaussians p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t)):

    K = - sum_{t=2}^T E_q KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) )
        + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)   <=   E log p(x_0)                                    eq. 14

The last step, p(x_0 | x_1), is not learned. It is the reverse of q(x_1 | x_0) under pi = N(0, I) (eq. 44), that
is N(sqrt(1 - beta_1) x_1, beta_1 I), and contributes E[log pi(x_0) - log pi(x_1)]. The first factor, p(x_T) = pi,
contributes E log pi(x_T), which is -H_p(X_T) in eq. 14. For data of mean 0 and variance 1, E log pi is the same at
every t, and eq. 14 is complete. For other data the difference is kept here as `edge`, so that K is a bound for every
x_0.

The entropy of a true reverse step is unknown, but lies between two that are known (eq. 24, appendix A):

    H_q(X_t|X_{t-1}) + H_q(X_{t-1}|X_0) - H_q(X_t|X_0)  <=  H_q(X_{t-1}|X_t)  <=  H_q(X_t|X_{t-1})

The lower bound is the entropy of q(x_{t-1} | x_t, x_0), a Gaussian of variance beta~_t, and is exact for data of one
point. The upper one is that of variance beta_t, and is exact for N(0, I). It assumes that noise increases entropy,
H(X_t) >= H(X_{t-1}), which fails for data wider than the noise. (The paper counts t = 1..T; the code 0..T-1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff.diffusion.gaussian import kl_gaussian, q_posterior_mean_variance, q_sample, q_step
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams

Reverse = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]     # (x_t, t) -> mean, variance


def gaussian_entropy(variance: float, D: int) -> float:
    """The entropy of N(., variance I) in D dimensions, nats."""
    _check_gaussian(D, variance)
    return 0.5 * D * math.log(2 * math.pi * math.e * variance)


def entropy_of_step(schedule: Schedule, t: int, s: int, D: int) -> float:
    """H_q(X_t | X_s) in nats, for -1 <= s < t; s = -1 is the clean image."""
    return gaussian_entropy(float(q_step(schedule, s, t)[1]), D)


def reverse_entropy_bounds(schedule: Schedule, t: int, D: int) -> tuple[float, float]:
    """(lower, upper) bounds of H_q(X_{t-1} | X_t) in nats, for t >= 1; the upper for data no wider than N(0, I)."""
    _check_step(t)
    upper = entropy_of_step(schedule, t, t - 1, D)
    return upper + entropy_of_step(schedule, t - 1, -1, D) - entropy_of_step(schedule, t, -1, D), upper


def log_likelihood_of_noise(D: int) -> float:
    """L_null, in nats: the mean log likelihood under N(0, I) of data of mean 0 and variance 1."""
    return -gaussian_entropy(1.0, D)


def bits(nats):
    return nats / math.log(2)


@dataclass(frozen=True, eq=False)
class KBound:
    """The parts of K in nats: (B,) each, except `ends`, which is the same for all points."""

    steps: np.ndarray       # the sum of all divergences
    ends: float             # H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)
    edge: np.ndarray        # log pi(x_0) - E log pi(x_1) + E log pi(x_T) + H_p(X_T)

    @property
    def total(self) -> np.ndarray:
        return -self.steps + self.ends + self.edge


def k_bound(schedule: Schedule, reverse: Reverse, x_0: np.ndarray, *, streams: SampleStreams) -> KBound:
    """An unbiased estimate of K for each point x_0 (B, D), from one draw of noise at every step.

    reverse: (x_t (B, D), t (B,)) -> mean and variance of p(x_{t-1} | x_t), each (B, D).  streams: one for each point.
    """
    _check_points(x_0, streams)
    B, D = x_0.shape
    x_0, last = x_0.astype(np.float64), schedule.T - 1
    steps = np.zeros(B)
    for i in range(1, schedule.T):
        t = np.full(B, i)
        x_t = q_sample(schedule, x_0, t, streams.normal((D,), np.float64))
        steps += kl_gaussian(*q_posterior_mean_variance(schedule, x_0, x_t, t), *reverse(x_t, t)).sum(1)
    # H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T),   p(x_T) = N(0, I)
    ends = entropy_of_step(schedule, last, -1, D) - entropy_of_step(schedule, 0, -1, D) - gaussian_entropy(1.0, D)
    # E log pi(x_t) + H_p(X_T) = (D - E ||x_t||^2) / 2 = alpha_bar_t (D - ||x_0||^2) / 2,   at t = 0, 1 and T
    edge = 0.5 * float(1 - schedule.abar(0) + schedule.abar(last)) * (D - (x_0**2).sum(1))
    return KBound(steps, ends, edge)


# ---- checks ------------------------------------------------------------------------------------------------

def _check_gaussian(D: int, variance: float) -> None:
    if D < 1 or not variance > 0:
        raise ValueError(f"D must be at least 1 and variance positive, not {D} and {variance}")


def _check_step(t: int) -> None:
    if t < 1:
        raise ValueError(f"t must be at least 1, not {t}: a step to the data itself has no such bounds")


def _check_points(x_0: np.ndarray, streams: SampleStreams) -> None:
    if x_0.ndim != 2 or len(streams) != len(x_0):
        raise ValueError(f"x_0 must be points (B, D), and streams one for each, not {x_0.shape} and {len(streams)}")
