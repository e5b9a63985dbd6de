"""Rectified flow: a straight path from image to noise, whose velocity a network learns (Liu et al. 2022, SD3).

    x_u  = (1 - u) x_0 + u eps                  0 <= u <= 1: the image at u = 0, the noise at u = 1
    flow = dx_u/du = eps - x_0                  the velocity of this path, the same at every u
    x_0  = x_u - u flow                         the image that a velocity points to

The network learns E[flow | x_u], the minimiser of E ||flow - network(x_u, u)||^2.  The ODE dx/du = E[flow | x_u]
carries noise to images, and one step of Euler's method is  x_s = x_u + (s - u) flow,  s < u.

**As a schedule.**  Scaled, x_u is the x_t of a variance-preserving diffusion, `schedules.flow_matching`:

    u   = sigma_t / (alpha_t + sigma_t)         1 - u = alpha_t / (alpha_t + sigma_t)
    x_u = x_t / (alpha_t + sigma_t)             SNR = (1 - u)^2 / u^2,   log-SNR = -2 logit u

Euler's step is DDIM's, since both keep x0_hat and eps_hat and mix them with other weights.  (The papers write t for u,
and v for flow; here t counts 0..T-1 and v is alpha eps - sigma x_0.)  `FlowDenoiser` makes a denoiser of the network,
so that all samplers, guidance and likelihood work with it.

**Times.**  At u = 0 the best answer is minus the image, at u = 1 the noise less the mean image.  Both are easy, and
most is to be learned in between.  So SD3 draws the times of training from a logit-normal density (section 3.1):

    u  = sigmoid(mean + std z),  z ~ N(0, 1)
    pi(u) = exp(-(logit u - mean)^2 / 2 std^2) / (std sqrt(2 pi) u (1 - u))

log-SNR is -2 logit u, so it is normal, with mean -2 mean and standard deviation 2 std.  This is the density `normal` of
densities.py: there each of the T times stands for the u that are nearest to it in log-SNR.  Fine noise is rare among
these times.

**Resolution.**  The mean of n pixels of the same value, each with noise, is known to u/(1 - u) / sqrt(n).  A picture
with more pixels needs more noise for the same uncertainty (SD3 section 5.3.2):

    u_m / (1 - u_m) / sqrt(m) = u_n / (1 - u_n) / sqrt(n)
    u_m = shift u_n / (1 + (shift - 1) u_n),   shift = sqrt(m / n)

This lowers log-SNR by 2 log shift, adds log shift to logit u, and makes one logit-normal density of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidiff.checks import whole
from minidiff.diffusion.denoiser import check_differentiable
from minidiff.diffusion.gaussian import Times, per_sample
from minidiff.diffusion.schedules import Schedule

Array = np.ndarray  # or cupy.ndarray


# ---- the path --------------------------------------------------------------------------------------------


def path_time(schedule: Schedule, t: Times) -> np.ndarray:
    """u, where time t of any schedule stands on the straight path: float64 of t's shape, 0 at t = -1, 1 at SNR 0."""
    # u = sigma_t / (alpha_t + sigma_t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return sigma / (alpha + sigma)


def interpolate(x_0: Array, u: np.ndarray | float, eps: Array) -> Array:
    """x_u on the path from x_0 to eps, both (B, ...) of one dtype; u a number or (B,)."""
    u = _checked_time(u)
    _check_alike("x_0", x_0, u, "eps", eps)
    # x_u = (1 - u) x_0 + u eps                                                                  SD3 section 3
    return per_sample(1 - u, x_0) * x_0 + per_sample(u, eps) * eps


def x0_from_flow(x_u: Array, u: np.ndarray | float, flow: Array) -> Array:
    """x_0 (B, ...), from x_u and the flow there, of one shape and dtype; u a number or (B,)."""
    u = _checked_time(u)
    _check_alike("x_u", x_u, u, "flow", flow)
    # x_0 = x_u - u flow
    return x_u - per_sample(u, x_u) * flow


@dataclass(frozen=True, eq=False)
class FlowDenoiser:
    """A network that predicts the flow, as a denoiser: (x_t, t, cond) -> x0_hat.

    network: `(x_u, u, cond) -> flow`, with u (B,) float64.  clip: applied to x0_hat, as in NetworkDenoiser.
    network_vjp: `(x_u, u, dy, cond) -> (flow, dx_u)`; only `vjp` needs it.
    """

    schedule: Schedule
    network: Callable[[Any, Any, Any], Any]
    clip: Callable[[Any], Any] | None = None
    network_vjp: Callable[[Any, Any, Any, Any], tuple[Any, Any]] | None = None
    predicts = "v"                                          # flow and v differ by a multiple of x_t and a factor

    def __call__(self, x_t, t, cond=None):
        x_u, u, _ = self._on_path(x_t, t)
        # x0_hat = x_u - u flow
        x0_hat = x0_from_flow(x_u, u, self.network(x_u, u, cond))
        return x0_hat if self.clip is None else self.clip(x0_hat)

    def vjp(self, x_t, t, dy, cond=None):
        """(x0_hat, dy^T J), as `Differentiable` says.  Raises TypeError without network_vjp, or with clip."""
        check_differentiable(self)
        x_u, u, total = self._on_path(x_t, t)
        # dy^T J = (dy - (u dy)^T d flow / d x_u) / (alpha_t + sigma_t)
        flow, dx_u = self.network_vjp(x_u, u, per_sample(u, dy) * dy, cond)
        return x0_from_flow(x_u, u, flow), (dy - dx_u) / total

    def _on_path(self, x_t, t) -> tuple:
        """x_u, u, and alpha_t + sigma_t."""
        total = per_sample(self.schedule.alpha(t) + self.schedule.sigma(t), x_t)
        # x_u = x_t / (alpha_t + sigma_t)
        return x_t / total, path_time(self.schedule, t), total


# ---- resolution ------------------------------------------------------------------------------------------


def shifted(u: np.ndarray | float, shift: float) -> np.ndarray:
    """The time u of a picture, moved to where a picture with shift^2 times as many pixels is as uncertain."""
    _check_shift(shift)
    u = _checked_time(u)
    # u' = shift u / (1 + (shift - 1) u),  whose denominator is shift u + (1 - u)             SD3 section 5.3.2
    return shift * u / (shift * u + (1 - u))                # exactly 1 at u = 1


def resolution_shift(m: int, n: int) -> float:
    """The shift for pictures of m pixels, of times that suit n pixels."""
    # shift = sqrt(m / n)
    return math.sqrt(whole("m", m, 1) / whole("n", n, 1))


# ---- checks ----------------------------------------------------------------------------------------------


def _checked_time(u: np.ndarray | float) -> np.ndarray:
    u = np.asarray(u, np.float64)
    if not ((0 <= u) & (u <= 1)).all():                     # NaN is outside, too
        raise ValueError(f"u must lie within 0 (the image) and 1 (noise), got {u}")
    return u


def _check_alike(name: str, x: Array, u: np.ndarray, other_name: str, other: Array) -> None:
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(f"{other_name} must have {name}'s shape and dtype, {x.shape} {x.dtype}, got {other.shape} "
                         f"{other.dtype}")
    if np.ndim(u) and np.shape(u) != x.shape[:1]:
        raise ValueError(f"u must be a number, or one for each sample of {name} {x.shape}, got an array {np.shape(u)}")


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, such as 3.0, got {shift!r}")
