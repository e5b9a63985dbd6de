"""Fourier features: waves of the pixels as further input channels, so that a network sees small differences.

    x' = 255/256 x                                            8-bit levels are 2/256 apart, as VDM has them
    sin(2^n pi x'),  cos(2^n pi x')                           for each n of a list              VDM section 3.4

The wave of n = 8 has the period of one level: it says how far x is from the nearest level, where x itself differs by
.004. That of n = 7 tells even levels from odd ones, and so on: the binary digits of a level.

Noise of size sigma leaves of a wave's mean the factor exp(-(2^n pi sigma')^2 / 2), sigma' = 255/256 sigma. Each wave is
multiplied by it: one whose periods the noise has mixed is 0, and not a random number that the network must learn to
ignore. The paper, with n = 7 and 8 alone, has no such factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor, record

SCALE = 255 / 256
FINEST = 8                                                  # the n of one level; a finer wave repeats itself between


def fourier_features(x: Tensor, sigma: np.ndarray, exponents: Sequence[int]) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C (1 + 2 N)): x itself, then sines and cosines of each of the N exponents.

    sigma (B,): the noise in x, on the host.
    """
    xp, data = xp_of(x.data), x.data
    # f = 2^n pi 255/256,   fade = exp(-(f sigma)^2 / 2)
    f = [2.0**n * np.pi * SCALE for n in exponents]
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))                                    # (B, 1, 1, 1)
    fade = [xp.asarray(np.exp(-0.5 * (k * sigma) ** 2), dtype=x.dtype) for k in f]
    sines, cosines = ([a * g(k * data) for a, k in zip(fade, f, strict=True)] for g in (xp.sin, xp.cos))

    def pullback(dy):
        C, N = data.shape[-1], len(f)
        parts = [dy[..., i * C:(i + 1) * C] for i in range(1 + 2 * N)]
        # d sin(f x) = f cos(f x),   d cos(f x) = -f sin(f x)
        return (sum((k * (c * ds - s * dc) for k, s, c, ds, dc in zip(
            f, sines, cosines, parts[1:1 + N], parts[1 + N:], strict=True)), parts[0]),)
    return record(xp.concatenate([data, *sines, *cosines], axis=-1), (x,), pullback)
