"""The times of a training batch: which noise levels a network sees, and how often.

    t = floor(T u^power),   u uniform on [0, 1)

    P(t < k) = P(u^power < k/T) = (k/T)^(1/power)           k = 0 .. T

so that the density of t/T is that of u^power, (1/power) (t/T)^(1/power - 1):

    power = 1      uniform, as in DDPM algorithm 1
    power = 1/2    rising linearly: noisy times are drawn more often
    power = 1/3    rising as the square: more often still

The times decide what the loss is worth at each t, as a weight does (losses.py): the mean of a loss over times of this
density is the mean over uniform times of that loss, weighted by the density.

The u of a batch may be stratified: each is uniform, and together they cover [0, 1) evenly. The batch's mean loss then
varies less from step to step (VDM, arXiv 2107.00630, appendix I.1).
"""

from __future__ import annotations

import numpy as np

from minidiff.checks import whole


def training_times(rng: np.random.Generator, shape: int | tuple[int, ...], T: int, power: float = 1 / 3,
                   stratified: bool = True) -> np.ndarray:
    """Times t of `shape`, int64 in 0..T-1, with P(t < k) = (k/T)^(1/power).

    shape: B for (B,). power: in (0, 1]. stratified: the batch covers all times evenly (`stratified_uniform`); only for
    a batch (B,). Otherwise all times are independent. ValueError for anything else.
    """
    T = whole("T", T, 1)
    _check(shape, power, stratified)
    u = stratified_uniform(rng, shape) if stratified else rng.random(shape)
    # t = floor(T u^power), and T - 1 if rounding makes T of it
    return np.minimum((T * _root(u, power)).astype(np.int64), T - 1)


def stratified_uniform(rng: np.random.Generator, B: int) -> np.ndarray:
    """u (B,), each uniform on [0, 1), evenly spread: one in each interval of length 1/B."""
    # u_i = u_0 + i/B mod 1                                                                     VDM appendix I.1
    return (rng.random() + np.arange(B) / B) % 1


def _root(u: np.ndarray, power: float) -> np.ndarray:
    """u^power; the usual roots by functions that are faster and more exact than a power."""
    root = {1: np.asarray, 1 / 2: np.sqrt, 1 / 3: np.cbrt}.get(power)
    return u**power if root is None else root(u)


def _check(shape: int | tuple[int, ...], power: float, stratified: bool) -> None:
    if not 0 < power <= 1:
        raise ValueError(f"power must be in (0, 1], where 1 draws all times equally often, got {power!r}")
    if stratified:
        whole("shape, for stratified times,", shape, 0)
