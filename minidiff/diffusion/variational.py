"""Diffusion in continuous time, and its bound on -log p(x_0) (variational diffusion models, VDM, arXiv 2107.00630).

Time t runs from 0, the least noise, to 1. A path gamma(t) rises strictly from gamma_0 to gamma_1; it is -log SNR:

    sigma_t^2 = sigmoid(gamma(t)),   alpha_t^2 = sigmoid(-gamma(t)),   SNR = exp(-gamma)           VDM section 3.2
    x_t       = alpha_t x_0 + sigma_t eps                                              the paper's z_t and x

    -log p(x_0) <= prior + diffusion + decoder                                                     VDM section 3.5
    prior      = KL(q(x_t | x_0) || N(0, I))                                 at t = 1
    diffusion  = 1/2 E_{t, eps}[ gamma'(t) ||eps - eps_hat(x_t)||^2 ]        of infinitely many steps, VDM section 5
    decoder    = -E log p(x_0 | x_t)                                         at t = 0
                 p(x_0 = level k | x_t) = exp(-e_k^2 / 2) / sum_j exp(-e_j^2 / 2),   each pixel by itself
                 e_k = (x_t - alpha x_k) / sigma,  x_k = k / 127.5 - 1,  k = 0 ... 255             VDM section 3.3

e_k is the noise of a pixel whose level was k. With gamma in the place of t, the path is gone from the second term:

    diffusion  = int_{gamma_0}^{gamma_1} m(gamma) d gamma,   m = 1/2 E ||eps - eps_hat||^2         VDM section 5.1

So all paths with the same ends give the same bound, and its derivative by an end is m there (Leibniz):

    d diffusion / d gamma_1 = m(gamma_1),    d diffusion / d gamma_0 = -m(gamma_0)

The path decides only how many times go where: a time drawn uniformly has gamma with the density 1 / gamma'. So it
decides the variance of the estimate gamma' m, which is smallest if the density follows the root mean square of m:

    E[(gamma' m)^2] = int gamma' E[m^2] d gamma,   least for   1 / gamma' ~ sqrt(E[m^2])           VDM appendix I.2

Arrays are (B, ...), gamma is (B,), float64, on the host. `predict(x_t, gamma) -> eps_hat` is the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from minidiff.checks import whole
from minidiff.diffusion.gaussian import per_sample, prior_kl
from minidiff.diffusion.likelihood import Bound, bits_per_dim, levels_of
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.random import SampleStreams

LEVELS = np.arange(256) / 127.5 - 1                         # x_k
Predict = Callable[[Any, np.ndarray], Any]                  # (x_t (B, ...), gamma (B,)) -> eps_hat (B, ...)


def alpha_of(gamma):
    """alpha, float64. alpha^2 and sigma^2 are sigmoids, each computed without taking the other from 1."""
    return np.sqrt(special.expit(-np.asarray(gamma, np.float64)))


def sigma_of(gamma):
    """sigma, float64; at gamma = -13.3 sigma^2 is 1.7e-6, and 1 - alpha^2 in float32 can be wrong by 1.8%."""
    return np.sqrt(special.expit(np.asarray(gamma, np.float64)))


def noised(x_0, gamma: np.ndarray, eps):
    """x_t = alpha x_0 + sigma eps, in x_0's dtype."""
    return per_sample(alpha_of(gamma), x_0) * x_0 + per_sample(sigma_of(gamma), x_0) * eps


# ---- paths from gamma_0 to gamma_1 ---------------------------------------------------------------------------

@dataclass(frozen=True)
class PiecewiseLinear:
    """A path of K straight pieces, each as long in gamma as the others; piece k takes shares[k] of all times.

        t_k = shares[0] + ... + shares[k-1],   gamma(t_k) = gamma_0 + (gamma_1 - gamma_0) k / K
        gamma'(t) = (gamma_1 - gamma_0) / (K shares[k])   within piece k

    shares: K positive numbers of sum 1. Equal shares make a straight line. ValueError for anything else, and unless
    gamma_0 < gamma_1.
    """

    gamma_0: float
    gamma_1: float
    shares: Sequence[float] = (1.0,)

    def __post_init__(self):
        _check_path(self)

    @property
    def knots(self) -> np.ndarray:
        """t_0 = 0 ... t_K = 1, (K + 1,)."""
        knots = np.concatenate([[0.0], np.cumsum(np.asarray(self.shares, np.float64))])
        return knots / knots[-1]

    def piece(self, t) -> np.ndarray:
        """k of each time, in 0 .. K-1."""
        return np.clip(np.searchsorted(self.knots, t, side="right") - 1, 0, len(self.shares) - 1)

    def __call__(self, t) -> np.ndarray:
        K = len(self.shares)
        return np.interp(t, self.knots, self.gamma_0 + (self.gamma_1 - self.gamma_0) * np.arange(K + 1) / K)

    def slope(self, t) -> np.ndarray:
        """gamma'(t)."""
        shares = np.asarray(self.shares, np.float64)
        return (self.gamma_1 - self.gamma_0) / (len(shares) * shares[self.piece(t)])

    def table(self, T: int) -> Schedule:
        """The path at T even times from 0 to 1, for the samplers."""
        return Schedule(special.expit(-self(np.arange(T) / (T - 1))), "a path in log-SNR")


Path = PiecewiseLinear | Any                                # callable as gamma(t), with a method slope(t)


# ---- the three terms, in nats --------------------------------------------------------------------------------

@dataclass(frozen=True)
class LevelDecoder:
    """log p(x_0 | x_t) of 8-bit values at one gamma: each level by the noise that it would mean, no level preferred.

    x_0 must lie on the levels u / 127.5 - 1, u = 0..255; otherwise ValueError.
    """

    gamma: float

    def noise_of_levels(self, x_t) -> np.ndarray:
        """e_k for all levels, (..., 256)."""
        # e_k = (x_t - alpha x_k) / sigma
        x_t = to_numpy(x_t).astype(np.float64)[..., None]
        return (x_t - alpha_of(self.gamma) * LEVELS) / sigma_of(self.gamma)

    def log_probabilities(self, x_t) -> np.ndarray:
        """log p of all levels, (..., 256)."""
        # p = softmax(-e_k^2 / 2)
        return special.log_softmax(-0.5 * self.noise_of_levels(x_t) ** 2, axis=-1)

    def __call__(self, x_0, x_t) -> np.ndarray:
        """log p(x_0 | x_t) of every pixel, of x_0's shape."""
        u = levels_of(x_0).astype(int)[..., None]                                     # (B, ..., 1)
        # one sample after the other, since 256 numbers for each pixel are many
        return np.array([np.take_along_axis(self.log_probabilities(x), k, -1)[..., 0]
                         for k, x in zip(u, x_t, strict=True)]).reshape(x_0.shape)

    def slope(self, x_0, eps) -> np.ndarray:
        """d log p(x_0 | alpha x_0 + sigma eps) / d gamma of every pixel, eps the same."""
        x_t, eps = noised(x_0, np.full(len(x_0), self.gamma), eps), to_numpy(eps).astype(np.float64)
        slopes = []
        for x, noise in zip(x_t, eps, strict=True):
            e, p = self.noise_of_levels(x), np.exp(self.log_probabilities(x))
            # e_j = eps + (x_0 - x_j) exp(-gamma / 2)  gives  d e_j / d gamma = (eps - e_j) / 2
            # d log p_u / d gamma = sum_j p_j e_j d e_j / d gamma,  since that of e_u = eps itself is 0
            slopes.append((p * e * (noise[..., None] - e) / 2).sum(-1))
        return np.array(slopes).reshape(x_0.shape)


def prior_nats(x_0, gamma_1: float):
    """KL(q(x_t | x_0) || N(0, I)) at t = 1, elementwise: gaussian.prior_kl at one gamma."""
    return prior_kl(Schedule(special.expit([-gamma_1])), x_0)


def diffusion_draws(predict: Predict, path: Path, x_0, *, streams: SampleStreams,
                    terms: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`terms` pairs of gamma (B,) and nats (B,); the mean over the pairs estimates the second term, without bias.

    Each sample has one time in each of `terms` equal parts of [0, 1], and new noise at each.  streams: one for each
    sample.
    """
    terms = whole("terms", terms, 1)
    for k in range(terms):
        t = (k + streams.uniform()) / terms                                           # (B,)
        gamma = path(t)
        eps = xp_of(x_0).asarray(streams.normal(x_0.shape[1:], x_0.dtype))
        eps_hat = predict(noised(x_0, gamma, eps), gamma)
        # 1/2 gamma'(t) ||eps - eps_hat||^2                                                       VDM section 5
        yield gamma, 0.5 * path.slope(t) * _sum((eps - eps_hat).astype(np.float64) ** 2)


def continuous_bound(predict: Predict, path: Path, x_0, *, streams: SampleStreams, terms: int = 32) -> Bound:
    """An unbiased estimate of the bound of each sample x_0 (B, ...), 8-bit values, by `terms` times and a decoding."""
    diffusion = sum(nats for _, nats in diffusion_draws(predict, path, x_0, streams=streams, terms=terms)) / terms
    eps = xp_of(x_0).asarray(streams.normal(x_0.shape[1:], x_0.dtype))
    gamma_0, gamma_1 = float(path(0.0)), float(path(1.0))
    decoder = LevelDecoder(gamma_0)(x_0, noised(x_0, np.full(len(x_0), gamma_0), eps))
    return Bound(_sum(prior_nats(x_0.astype(np.float64), gamma_1)), diffusion, -_sum(decoder))


# ---- where the bits go ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class NoiseLevel:
    """A row of `bits_by_noise`: the bits/dim of the noise levels between two gammas, and their standard error."""

    start: float
    stop: float
    bits: float
    error: float


def bits_by_noise(predict: Predict, path: Path, x_0, edges: Sequence[float], *, streams: SampleStreams,
                  terms: int = 32) -> list[NoiseLevel]:
    """The second term of the bound, divided among the levels of noise between `edges`, which rise; means over samples.

    The rows sum to the whole term if the edges run from gamma_0 to gamma_1.  ValueError for fewer than two samples,
    which have no standard error.
    """
    _check_edges(edges)
    whole("the number of samples", len(x_0), 2)
    D, shape = math.prod(x_0.shape[1:]), (len(edges) - 1, len(x_0))
    nats = np.zeros(shape)
    for gamma, drawn in diffusion_draws(predict, path, x_0, streams=streams, terms=terms):
        row = np.searchsorted(edges, gamma, side="right") - 1
        row[gamma == edges[-1]] = shape[0] - 1              # the last edge belongs to the last row
        inside = np.flatnonzero((row >= 0) & (row < shape[0]))                        # others are in no row
        nats[row[inside], inside] += drawn[inside] / terms
    bits = bits_per_dim(nats, D)
    return [NoiseLevel(float(a), float(b), float(row.mean()), float(row.std(ddof=1) / len(row) ** 0.5))
            for a, b, row in zip(edges, edges[1:], bits, strict=False)]


def _sum(a) -> np.ndarray:
    """(B, ...) -> (B,), on the host."""
    return to_numpy(a.reshape(len(a), math.prod(a.shape[1:])).sum(1))


# ---- checks --------------------------------------------------------------------------------------------------

def _check_path(path: PiecewiseLinear) -> None:
    shares = np.asarray(path.shares, np.float64)
    if shares.ndim != 1 or not len(shares) or not (shares > 0).all() or not math.isclose(shares.sum(), 1, rel_tol=1e-6):
        raise ValueError(f"shares must be positive numbers of sum 1, one for each piece, not {path.shares}")
    if not -math.inf < path.gamma_0 < path.gamma_1 < math.inf:
        raise ValueError(f"gamma_0 must be less than gamma_1, both finite, not {path.gamma_0} and {path.gamma_1}")


def _check_edges(edges: Sequence[float]) -> None:
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges must be two or more gammas that rise, not {edges}")
