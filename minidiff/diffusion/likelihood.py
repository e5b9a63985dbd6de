"""Likelihood: -log p(x_0) in nats, bounded by the variational bound and computed by the probability-flow ODE.

(A nat is 1 / log 2 = 1.44 bits.) The bound, term by term (`variational_bound`). Each step of the reverse chain p is a
Gaussian around the posterior's mean:

    -log p(x_0) <= E_q[ L_T + sum_{t=1}^{T-1} L_{t-1} - log p(x_0 | x_{t=0}) ]                         DDPM eq. 5
        L_T     = KL( q(x_{T-1} | x_0) || N(0, I) )
        L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || N(mu~(x_t, x0_hat), variance_t I) )
        -log p(x_0 | x_{t=0})    the decoder's part                                                    DDPM eq. 13

It is tight for Gaussian data with independent pixels, where the true reverse chain is Gaussian, with variance_t =
beta~_t + c_0^2 Var[x_0 | x_t]. If pixels are correlated, they are also correlated in q(x_{t-1} | x_t), but not in p,
and a gap remains (unless the pixels are written in the eigenbasis of their covariance, in which the noise is the same).
The flow (`log_prob`), in the angle phi with alpha = cos phi, sigma = sin phi, transports its density:

    dx/dphi     = v = (alpha x - x0_hat) / sigma                                                       samplers.heun
    log p_t(x)  = log N(x_{T-1}; 0, I) + int_{phi_t}^{phi_{T-1}} div v dphi                            Score SDE eq. 39
    div v       = (alpha D - tr J) / sigma,   J = d x0_hat / d x
    tr J        = sum_i e_i^T J e_i  =  E z^T J z  over random signs z      Score SDE eq. 40

8-bit images have probabilities, but p_t is a density. There are two ways to compare them. The usual one adds uniform
noise as wide as one level (Theis et al. 2016), and reports -log p / (D log 2) + log2(127.5) bits/dim: the offset,
6.9944 and not 7, converts a density over [-1, 1] to one over 0..255. But the flow ends at sigma_0 > 0, and this
neglects the difference. `flow_bound` includes it: its noise is the chain's own, which the decoder removes:

    -log P(x_0) <= E_q[ log q(x_t | x_0) - log p_t(x_t) - log P(x_0 | x_t) ],   x_t ~ q(x_t | x_0)     Jensen

It bounds the same probability as the variational bound, and neither has an offset.

x_0 has any shape (B, ...), D numbers a sample. Results are float64 (B,) on the host, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import special

from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.gaussian import kl_gaussian, prior_kl, q_posterior_mean_variance, q_sample, v_from_x0
from minidiff.diffusion.losses import bound_weight
from minidiff.diffusion.samplers import angle, beta_tilde, checked_times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.random import SampleStreams

Decoder = Callable[[Any, Any], np.ndarray]      # (x_0, x0_hat) -> log p(x_0 | x_{t=0}) of every pixel, (B, ...)
Variance = Callable[[Schedule, int, int], Any]  # (schedule, t, t-1) -> variance_t: a number, or one for each pixel
OFFSET = math.log2(127.5)                       # bits/dim: a density per unit of [-1, 1] is 127.5 times that per level


def bits_per_dim(nats, D: int):
    """Bits/dim of a probability of 8-bit values, such as both bounds with `DiscretisedGaussian`. No offset."""
    _check_dimensions(D)
    return nats / (D * math.log(2))


def density_bits_per_dim(nats, D: int):
    """Bits/dim of -log density over [-1, 1]: log2(127.5) = 6.9944 more per pixel, for the 8 bits of precision."""
    return bits_per_dim(nats, D) + OFFSET


# ---- decoders: log p(x_0 | x_{t=0}) --------------------------------------------------------------------------

@dataclass(frozen=True)
class DiscretisedGaussian:
    """P of an 8-bit value: N(x0_hat, sigma^2) integrated over its bin of width 2/255, the outer bins open: DDPM eq. 13.

    x_0 must lie on the levels u / 127.5 - 1, u = 0..255; otherwise ValueError.
    """

    sigma: float

    def __post_init__(self):
        _check_positive("sigma", self.sigma)

    def __call__(self, x_0, x0_hat) -> np.ndarray:
        a, b = self._edges(x_0, x0_hat)
        # P(u) = Phi(b) - Phi(a) = Phi(-a) - Phi(-b): use the one in the lower tail, where no digits are lost
        a, b = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)
        # log P = log Phi(b) + log(1 - Phi(a) / Phi(b))
        log_a, log_b = special.log_ndtr(a), special.log_ndtr(b)
        return log_b + np.log(-np.expm1(log_a - log_b))

    def slope(self, x_0, x0_hat) -> np.ndarray:
        """d log P / d log sigma, of x_0's shape: the gradient for a learned variance."""
        a, b = self._edges(x_0, x0_hat)
        # dP / d log sigma = a phi(a) - b phi(b),   phi(z) = exp(-z^2 / 2) / sqrt(2 pi),  over P
        log_P = self(x_0, x0_hat)
        return sum(sign * np.where(np.isinf(z), 0, z) * np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_P)
                   for sign, z in ((1, a), (-1, b)))

    def _edges(self, x_0, x0_hat) -> tuple[np.ndarray, np.ndarray]:
        u, mean = levels_of(x_0), to_numpy(x0_hat).astype(np.float64)
        # a, b = ((u -+ 1/2) / 127.5 - 1 - x0_hat) / sigma,  infinite at u = 0 and u = 255
        return (np.where(u == 0, -np.inf, ((u - 0.5) / 127.5 - 1 - mean) / self.sigma),
                np.where(u == 255, np.inf, ((u + 0.5) / 127.5 - 1 - mean) / self.sigma))


@dataclass(frozen=True)
class GaussianDensity:
    """log N(x_0; x0_hat, variance), for data other than 8-bit values.

    variance: a number, or an array of a sample's shape x_0.shape[1:], one number for each pixel; otherwise ValueError.
    """

    variance: Any

    def __post_init__(self):
        _check_positive("variance", self.variance)

    def __call__(self, x_0, x0_hat) -> np.ndarray:
        _check_variance(self.variance, x_0)
        d = to_numpy(x_0).astype(np.float64) - to_numpy(x0_hat)
        return -0.5 * (d * d / self.variance + np.log(2 * np.pi * self.variance))


# ---- the variational bound -----------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Bound:
    """The three parts of the variational bound: nats, (B,) each."""

    prior: np.ndarray       # L_T
    steps: np.ndarray       # the sum of all L_{t-1}
    decoder: np.ndarray     # -log p(x_0 | x_{t=0})

    @property
    def total(self) -> np.ndarray:
        return self.prior + self.steps + self.decoder


def variational_bound(denoiser: Denoiser, x_0, cond=None, *, streams: SampleStreams, decoder: Decoder,
                      variance: Variance = beta_tilde, terms: int | None = None) -> Bound:
    """An unbiased estimate of the bound for each sample: one eps for the decoder, and one for every L_{t-1}.

    streams: one for each sample. terms: how many of the T-1 L_{t-1} are computed; None for all. Their times are drawn
    for each sample separately, so that samples are independent and their spread gives the standard error.
    """
    schedule, B = denoiser.schedule, len(x_0)
    _check_streams(streams, B)
    _check_terms(terms)

    def normal():
        return xp_of(x_0).asarray(streams.normal(x_0.shape[1:], x_0.dtype))

    if terms is None or schedule.T == 1:
        draws = [(np.full(B, t), 1.0) for t in range(1, schedule.T)]
    else:
        draws = draw_times(schedule, terms, special.ndtr(streams.normal((), np.float64)))
    steps = sum((w * reverse_kl(denoiser, x_0, t, normal(), cond, variance) for t, w in draws), np.zeros(B))
    t = np.zeros(B, int)
    x0_hat = denoiser(q_sample(schedule, x_0, t, normal()), t, cond)
    return Bound(_per_sample_sum(prior_kl(schedule, _wide(x_0))), steps, -_per_sample_sum(decoder(x_0, x0_hat)))


def reverse_kl(denoiser: Denoiser, x_0, t: np.ndarray, eps, cond=None, variance: Variance = beta_tilde) -> np.ndarray:
    """L_{t-1} at x_t = alpha_t x_0 + sigma_t eps, for times t (B,) of at least 1."""
    schedule = denoiser.schedule
    _check_first(t)
    x_t = q_sample(schedule, x_0, t, eps)
    x0_hat = denoiser(x_t, t, cond)
    # float64 from here: at small t the two means differ by less than float32 resolves
    x_0, x_t, x0_hat = _wide(x_0), _wide(x_t), _wide(x0_hat)
    mean_q, var_q = q_posterior_mean_variance(schedule, x_0, x_t, t)
    mean_p, _ = q_posterior_mean_variance(schedule, x0_hat, x_t, t)
    var_p = [np.broadcast_to(variance(schedule, int(i), int(i) - 1), x_0.shape[1:]) for i in t]
    var_p = np.reshape(var_p, x_0.shape)                                              # (B, ...), for B = 0 too
    return _per_sample_sum(kl_gaussian(mean_q, var_q, mean_p, xp_of(x_0).asarray(var_p)))


def draw_times(schedule: Schedule, terms: int, u: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """`terms` pairs of times t (B,) and weights w (B,), with E[sum w f(t)] = sum_{t=1}^{T-1} f(t) over u ~ U(0, 1).

    The probability of a time is proportional to L_{t-1} as it would be if the error of v were the same at all times,
    and the times of each sample are stratified, from one u. Few terms then estimate the sum well.
    """
    _check_two_times(schedule)
    p = bound_weight(schedule, np.arange(1, schedule.T), "v")
    p = p / p.sum()                                                                   # (T-1,) of t = 1 ... T-1
    cdf = np.cumsum(p)
    draws = []
    for k in range(terms):
        i = np.minimum(np.searchsorted(cdf, (k + u) / terms, side="right"), len(p) - 1)
        draws.append((1 + i, 1 / (terms * p[i])))
    return draws


# ---- the probability-flow ODE --------------------------------------------------------------------------------

def exact_trace(denoiser: Denoiser, x_t, t: np.ndarray, cond=None):
    """x0_hat (B, ...) and tr J (B,), from D products with unit vectors: for data of few dimensions."""
    _check_dimensions(math.prod(x_t.shape[1:]))
    vjp, xp = _vjp(denoiser), xp_of(x_t)
    trace = np.zeros(len(x_t))
    for i in np.ndindex(x_t.shape[1:]):
        e_i = xp.zeros_like(x_t)
        e_i[(slice(None), *i)] = 1
        x0_hat, row = vjp(x_t, t, e_i, cond)
        trace += to_numpy(row[(slice(None), *i)])
    return x0_hat, trace


@dataclass(frozen=True, eq=False)
class Hutchinson:
    """Hutchinson's estimate of tr J: the mean of z^T J z over K probes z (K, B, ...) of random signs.

    The probes are the same along the whole flow. The variance is sum_{i<j} (J_ij + J_ji)^2 / K, 0 if J is diagonal
    (Hutchinson 1990).
    """

    probes: Any

    @classmethod
    def draw(cls, streams: SampleStreams, like, count: int = 1) -> Hutchinson:
        """`count` probes for each sample of `like` (B, ...), with its dtype and device."""
        _check_streams(streams, len(like))
        _check_count(count)
        z = np.stack([streams.normal(like.shape[1:], like.dtype) for _ in range(count)])
        return cls(xp_of(like).asarray(np.where(z < 0, -1, 1).astype(like.dtype)))

    def __call__(self, denoiser: Denoiser, x_t, t: np.ndarray, cond=None):
        vjp, trace = _vjp(denoiser), np.zeros(len(x_t))
        for z in self.probes:
            x0_hat, zJ = vjp(x_t, t, z, cond)
            # tr J = E z^T J z
            trace += _per_sample_sum(_wide(zJ) * z) / len(self.probes)
        return x0_hat, trace


Divergence = Callable[[Denoiser, Any, np.ndarray, Any], tuple[Any, np.ndarray]]  # exact_trace, or a Hutchinson


def log_prob(denoiser: Denoiser, x, times: Sequence[int], cond=None, *, divergence: Divergence = exact_trace):
    """log p_t(x) (B,) at t = times[-1], the flow's log density at x, by Heun's method; its error is O(1/N^2).

    x: (B, ...). times: as for a sampler, integers that fall strictly from T-1. denoiser: one with a `vjp`.
    """
    schedule, D = denoiser.schedule, math.prod(x.shape[1:])
    up = _upward(schedule, times)

    def velocity(x, t: int):
        return v_from_x0(schedule, x, t, denoiser(x, np.full(len(x), t), cond))

    def velocity_and_divergence(x, t: int):
        x0_hat, trace = divergence(denoiser, x, np.full(len(x), t), cond)
        # div v = (alpha D - tr J) / sigma
        return v_from_x0(schedule, x, t, x0_hat), (schedule.alpha(t) * D - trace) / schedule.sigma(t)

    total = np.zeros(len(x))
    v_s, div_s = velocity_and_divergence(x, up[0])
    for s, t in pairwise(up):
        h = angle(schedule, t) - angle(schedule, s)
        # x_t = x_s + h (v_s + v_t) / 2,   v_t at the Euler step x_s + h v_s                           samplers.heun
        x = x + h * (v_s + velocity(x + h * v_s, t)) / 2
        # int div v dphi, by the trapezoidal rule
        v_t, div_t = velocity_and_divergence(x, t)
        total += h * (div_s + div_t) / 2
        v_s, div_s = v_t, div_t
    # log N(x_{T-1}; 0, I) = -(||x||^2 + D log 2 pi) / 2
    return total - 0.5 * (_per_sample_sum(_wide(x) ** 2) + D * math.log(2 * math.pi))


@dataclass(frozen=True, eq=False)
class FlowBound:
    """The two parts of `flow_bound`: nats, (B,) each."""

    flow: np.ndarray        # log q(x_t | x_0) - log p_t(x_t)
    decoder: np.ndarray     # -log p(x_0 | x_t)

    @property
    def total(self) -> np.ndarray:
        return self.flow + self.decoder


def flow_bound(denoiser: Denoiser, x_0, times: Sequence[int], cond=None, *, eps, decoder: Decoder,
               divergence: Divergence = exact_trace) -> FlowBound:
    """A bound on -log p(x_0) by the flow, with the chain's own noise at t = times[-1] as dequantisation.

    eps: standard normal, of x_0's shape and dtype. The bound holds in the mean over eps, up to the error of `log_prob`.
    """
    schedule, D = denoiser.schedule, math.prod(x_0.shape[1:])
    t = np.full(len(x_0), _upward(schedule, times)[0])
    x_t = q_sample(schedule, x_0, t, eps)
    # log q(x_t | x_0) = -(||eps||^2 + D log(2 pi sigma_t^2)) / 2
    log_q = -0.5 * (_per_sample_sum(_wide(eps) ** 2) + D * np.log(2 * np.pi * schedule.sigma(t) ** 2))
    log_p = log_prob(denoiser, x_t, times, cond, divergence=divergence)
    return FlowBound(log_q - log_p, -_per_sample_sum(decoder(x_0, denoiser(x_t, t, cond))))


# ---- what they share -----------------------------------------------------------------------------------------

def _wide(a):
    return a.astype(np.float64)


def _per_sample_sum(a) -> np.ndarray:
    """(B, ...) -> (B,), float64 on the host."""
    return to_numpy(a.reshape(len(a), math.prod(a.shape[1:])).sum(1, dtype=np.float64))


def levels_of(x_0) -> np.ndarray:
    """u = 0..255 of x_0 = u / 127.5 - 1, float64."""
    x_0 = to_numpy(x_0)
    u = np.rint(127.5 * (x_0.astype(np.float64) + 1))
    _check_levels(x_0, u)
    return u


def _upward(schedule: Schedule, times: Sequence[int]) -> list[int]:
    last = schedule.T - 1
    return checked_times(times, range(last, last + 1), f"from {last}, where all is noise, to 0 or more")[::-1]


def _vjp(denoiser: Denoiser):
    _check_differentiable(denoiser)
    return denoiser.vjp


# ---- checks --------------------------------------------------------------------------------------------------

def _check_differentiable(denoiser: Denoiser) -> None:
    if not hasattr(denoiser, "vjp"):
        raise TypeError("denoiser must have a method vjp(x_t, t, dy, cond), the derivative that the flow's density "
                        f"depends on, but {type(denoiser).__name__} has none")


def _check_variance(variance, x_0) -> None:
    if np.shape(variance) not in ((), x_0.shape[1:]):
        raise ValueError(f"variance must be one number, or one for each pixel of a sample {x_0.shape[1:]}, got an "
                         f"array {np.shape(variance)}")


def _check_terms(terms: int | None) -> None:
    if terms is not None and terms < 1:
        raise ValueError(f"terms must be None, for all, or at least 1, got {terms}")


def _check_dimensions(D: int) -> None:
    if D < 1:
        raise ValueError(f"a sample must have at least one number, not D = {D}")


def _check_two_times(schedule: Schedule) -> None:
    if schedule.T < 2:
        raise ValueError("schedule.T must be at least 2: with T = 1 the bound has no L_{t-1}, only L_T and the decoder")


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}: the trace is a mean over the probes")


def _check_first(t: np.ndarray) -> None:
    if np.any(np.less(t, 1)):
        raise ValueError(f"t must be at least 1, got {t}: the term at 0 is the decoder's")


def _check_levels(x_0: np.ndarray, u: np.ndarray) -> None:
    on_levels = (np.abs(x_0 - (u / 127.5 - 1)) < 1e-5) & (u >= 0) & (u <= 255)
    if x_0.dtype.kind != "f" or not on_levels.all():
        extent = f" from {x_0.min():g} to {x_0.max():g}" if x_0.size else ""
        raise ValueError(f"x_0 must be 8-bit values as floats, u / 127.5 - 1 with u = 0..255, got {x_0.dtype}{extent}")


def _check_streams(streams: SampleStreams, B: int) -> None:
    if len(streams) != B:
        raise ValueError(f"streams must be SampleStreams, one for each of the {B} samples, got {len(streams)}")


def _check_positive(name: str, value) -> None:
    if not (np.asarray(value) > 0).all() or not np.isfinite(value).all():
        raise ValueError(f"{name} must be positive and finite, got {value}")
