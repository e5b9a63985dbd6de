"""What the law tests share. Nothing here calls the code under test, but to wrap it or to make what it takes."""

import math

import numpy as np
from hypothesis import settings

from minidiff.diffusion.denoiser import MixtureDenoiser
from minidiff.diffusion.samplers import ddpm
from minidiff.diffusion.schedules import Schedule

few = settings(deadline=None, max_examples=40)
quickly = settings(deadline=None, max_examples=25)


# ---- numbers and arrays --------------------------------------------------------------------------------------

def one(x: float) -> np.ndarray:
    return np.array([x])


def coefficient(function) -> float:
    """What a linear function of one number multiplies it by."""
    return float((function(one(1.0)) - function(one(0.0)))[0])


def matrix_of(function, D: int) -> np.ndarray:
    """The matrix of an affine function of rows (B, D) -> (B, D): column j is where unit vector j goes."""
    return (function(np.eye(D)) - function(np.zeros((D, D)))).T


def rotation(rng, D: int) -> np.ndarray:
    """An orthogonal (D, D), uniformly distributed."""
    Q, R = np.linalg.qr(rng.normal(size=(D, D)))
    return Q * np.sign(np.diag(R))


def covariance(rng, D: int) -> np.ndarray:
    """A full covariance (D, D), with variances of 0 to about 3 D."""
    A = rng.normal(size=(D, D))
    return A @ A.T


def column(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 1, ..., 1), to multiply x."""
    return a.reshape(-1, *[1] * (x.ndim - 1))


def gradient(f, x, h=1e-4):
    """Central differences of fourth order: f maps (B, D) to (B, ...); the result is (B, ..., D)."""
    def shifted(i, k):
        step = np.zeros(x.shape[1])
        step[i] = k * h
        return f(x + step)
    return np.stack([(8 * (shifted(i, 1) - shifted(i, -1)) - (shifted(i, 2) - shifted(i, -2))) / (12 * h)
                     for i in range(x.shape[1])], axis=-1)


# ---- schedules and data --------------------------------------------------------------------------------------

def alpha_sigma(schedule: Schedule, t: int) -> tuple[float, float]:
    """From the table itself."""
    abar = 1.0 if t == -1 else schedule.alpha_bar[t]
    return math.sqrt(abar), math.sqrt(1 - abar)


def alphas_sigmas(schedule: Schedule, t: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the table itself, each of shape (B, 1, ..., 1)."""
    abar = column(np.concatenate([schedule.alpha_bar, [1.0]])[t], x)
    return np.sqrt(abar), np.sqrt(1 - abar)


def random_mixture(schedule, rng, K=3, shape=(2,)):
    weights = rng.dirichlet(np.full(K, 3.0))
    return MixtureDenoiser(schedule, weights, rng.normal(size=(K, *shape)), rng.uniform(0.05, 1.5, size=(K, *shape)))


# ---- samplers ------------------------------------------------------------------------------------------------

class Noise:
    """Stands in for Streams: hands out given arrays, or those of one generator, which is fast; and counts."""

    def __init__(self, count, rng=None, given=None):
        self.count, self.rng, self.given, self.calls = count, rng, given, 0

    def __len__(self):
        return self.count

    def normal(self, shape, dtype):
        self.calls += 1
        if self.given is not None:
            return np.broadcast_to(self.given, (self.count, *shape)).astype(dtype)
        return self.rng.standard_normal((self.count, *shape)).astype(dtype)


def start(sampler, denoiser, x_T, ts, noise=None):
    """Any sampler, ancestral or not, by one call."""
    return sampler(denoiser, x_T, ts, **({"streams": noise or Noise(len(x_T), np.random.default_rng(0))}
                                         if sampler is ddpm else {}))
