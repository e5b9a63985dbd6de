"""The Swiss roll in two dimensions: points that can be drawn, with a density that can be computed.

    c(u)  = phi (cos phi, sin phi),   phi = 3 pi/2 (1 + 2 u),   u ~ uniform(0, 1)          one and a half turns
    x     = sqrt(1 - noise^2) (c(u) - mean) / std + noise z,    z ~ N(0, I)

mean and std are those of c(u), so that both coordinates have mean 0 and variance 1 exactly, with any noise.
"""

from __future__ import annotations

import math

import numpy as np

FINE = 4096                                                 # points along the roll, in sums that replace integrals


def points(rng: np.random.Generator, count: int, noise: float = 0.05) -> np.ndarray:
    """Random points (count, 2) float32.  noise: standard deviation around the roll, between 0 and 1."""
    _check_noise(noise)
    if count < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    curve = _curve(rng.random(count), noise)
    return (curve + noise * rng.standard_normal((count, 2))).astype(np.float32)


def log_prob(x: np.ndarray, noise: float = 0.05) -> np.ndarray:
    """log p(x) for points x (B, 2), by the midpoint rule along the roll: (B,) float64, in nats (natural logarithms)."""
    _check_noise(noise)
    _check_points(x)
    curve = _curve((np.arange(FINE) + 0.5) / FINE, noise)                             # (FINE, 2)
    result = np.empty(len(x))
    for start in range(0, len(x), 512):
        part = x[start:start + 512].astype(np.float64)
        # p(x) = int_0^1 N(x; c(u), noise^2 I) du
        logits = -0.5 * ((part[:, None] - curve) ** 2).sum(-1) / noise**2             # (512, FINE)
        top = logits.max(1)
        result[start:start + 512] = top + np.log(np.exp(logits - top[:, None]).mean(1))
    return result - math.log(2 * math.pi * noise**2)


def _spiral(u: np.ndarray) -> np.ndarray:
    """c(u), (n, 2)."""
    phi = 1.5 * math.pi * (1 + 2 * u)
    return phi[:, None] * np.stack([np.cos(phi), np.sin(phi)], axis=1)                # (n, 2)


def _curve(u: np.ndarray, noise: float) -> np.ndarray:
    """The points of the roll before noise is added, (n, 2)."""
    return math.sqrt(1 - noise**2) * (_spiral(u) - MEAN) / STD


_WHOLE = _spiral((np.arange(FINE) + 0.5) / FINE)
MEAN, STD = _WHOLE.mean(0), _WHOLE.std(0)


# --- checks -----------------------------------------------------------------------------------------------

def _check_noise(noise: float) -> None:
    if not 0 < noise < 1:
        raise ValueError(f"noise must lie between 0 and 1, such as 0.05, not {noise!r}")


def _check_points(x: np.ndarray) -> None:
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x must be points (B, 2), not {x.shape}")
