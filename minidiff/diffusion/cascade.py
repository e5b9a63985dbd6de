"""Cascaded diffusion: a small image, then larger ones that add its detail (Ho et al. 2021, arXiv 2106.15282).

    x^1, x^2, ... x^K       one image at rising resolution: x^{k-1} = P x^k, the means of squares of pixels
    p(x^K) = sum over x^1 ... x^{K-1} of  p(x^1) p(x^2 | x^1) ... p(x^K | x^{K-1})

A super-resolution model is trained on true small images, but samples from generated ones, and would copy their
faults.  So its condition is the small image with noise, and the amount of noise (noise conditioning augmentation;
section 3.3, and Imagen section 2.4):

    y_s = alpha_s U x^{k-1} + sigma_s eps,   eps ~ N(0, I)          U enlarges; s = -1 adds no noise
    x^k ~ p(x^k | y_s)

Training draws s at random; sampling chooses it.  If every model is exact, x^K has the distribution of the data for
every s.  The choice of s decides how closely x^k follows x^{k-1}, and so how many of its faults remain.

Small images are enlarged, and scaled to [-1, 1], BEFORE noise is added, both in training and in sampling: both call
`augmented`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidiff.checks import finite
from minidiff.diffusion.denoiser import Denoiser, Wrapper
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.samplers import dpm_solver_pp_2m, sample, times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import xp_of
from minidiff.engine.random import SampleStreams

Finer = Callable[[Any, np.ndarray], Denoiser]               # (y_s (B, H, W, C), s (B,)) -> the denoiser of x given y_s


@dataclass(frozen=True, eq=False)
class Conditioned(Wrapper):
    """A denoiser with a fixed condition, `cond`; the condition of a call is ignored."""

    denoiser: Denoiser
    cond: tuple

    def __call__(self, x_t, t, cond=None):
        return self.denoiser(x_t, t, self.cond)


def resized(x, height: int):
    """Images (B, H, W, C) at another height, with the width in proportion.

    Smaller: the mean of each square of pixels (P).  Larger: each pixel becomes a square (U).  P U x = x.
    ValueError unless squares of whole pixels do it.
    """
    B, H, W, C = x.shape
    _check_height(H, W, height)
    if height <= H:
        f = H // height
        squares = x.reshape(B, height, f, W // f, f, C)
        return squares.mean(axis=(2, 4), dtype=np.result_type(x.dtype, np.float32)).astype(x.dtype)   # (B, H/f, W/f, C)
    f = height // H
    return x.repeat(f, axis=1).repeat(f, axis=2)                                      # (B, f H, f W, C)


def noise_time(schedule: Schedule, aug_level: float) -> int:
    """The time s of an augmentation level from 0 (no noise, s = -1) to 1 (only noise, s = T-1)."""
    finite("aug_level", aug_level, 0, 1)
    return round(aug_level * schedule.T) - 1


def augmented(schedule: Schedule, small, height: int, s, eps):
    """y_s: small images (B, h, w, C) in [-1, 1], enlarged to `height`, with the noise of times s (B,), -1 for none.

    eps: (B, H, W, C) of the enlarged images, standard normal, of small's dtype.
    """
    # y_s = alpha_s U x + sigma_s eps
    return q_sample(schedule, resized(small, height), s, eps)


def cascade(base: Denoiser, finer: Sequence[Finer], shapes: Sequence[tuple[int, int, int]], streams: SampleStreams, *,
            s: int, steps: Sequence[int], dtype=np.float32) -> list:
    """The images of every resolution, x^1 ... x^K: a list of (B, H, W, C), with the (H, W, C) of `shapes`.

    base: the denoiser of images of shapes[0].  finer: for each further shape, a function of y_s and the times s (B,).
    s: the noise time of the small images, -1 ... T-1.  steps: of the sampler, DPM-Solver++(2M), for each shape.
    streams: one for each sample; each draws x_T for the first shape, and eps and x_T for each further one.
    """
    _check_counts(finer, shapes, steps)
    drawn = []
    for k, shape in enumerate(shapes):
        denoiser = base
        if k:
            eps, at = streams.normal(shape, dtype), np.full(len(streams), s)
            denoiser = finer[k - 1](augmented(base.schedule, drawn[-1], shape[0], at, eps), at)
        x_T = streams.normal(shape, dtype)
        x_0 = sample(dpm_solver_pp_2m(denoiser, x_T, times(denoiser.schedule, steps[k])))
        drawn.append(xp_of(x_0).asarray(x_0, dtype=dtype))
    return drawn


# ---- checks ------------------------------------------------------------------------------------------------

def _check_height(H: int, W: int, height: int) -> None:
    smaller = height >= 1 and H % height == 0 and W % (H // height) == 0
    larger = height >= 1 and height % H == 0
    if not (smaller or larger):
        raise ValueError(f"height must be a multiple of the image's {H} pixels, or divide it (and its width of {W} "
                         f"alike), not {height}")


def _check_counts(finer: Sequence, shapes: Sequence, steps: Sequence) -> None:
    if not len(finer) + 1 == len(shapes) == len(steps):
        raise ValueError(f"finer, shapes and steps must be K-1, K and K of them, not {len(finer)}, {len(shapes)} "
                         f"and {len(steps)}")
