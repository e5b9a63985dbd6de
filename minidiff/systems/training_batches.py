"""What the batches and losses of the systems share.

    captions    a caption of each image, '' now and then, so that guidance has a model without captions
    times       of a density over log-SNR (diffusion/densities.py), or uniform (diffusion/times.py)
    loss        || target - network(alpha_t x_0 + sigma_t eps, t) ||^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minidiff.data.dataset import Dataset
from minidiff.diffusion.gaussian import q_sample, target
from minidiff.diffusion.schedules import Schedule
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.precision import as_float32


def random_indices(data: Dataset, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    """Indices of images, drawn with replacement, all equally likely; ValueError where there are no images."""
    if not len(data):
        raise ValueError(f"the data set {data.name!r} has no images")
    return rng.integers(0, len(data), shape)


def random_captions(data: Dataset, indices: Sequence[int], rng: np.random.Generator, drop: float = 0.0) -> list[str]:
    """A caption of each image; each becomes '' with probability `drop`, independently of the others."""
    dropped = rng.random(len(indices)) < drop
    return ["" if lost else data.caption(int(i), rng) for i, lost in zip(indices, dropped, strict=True)]


def coefficients(schedule: Schedule, t) -> list[np.ndarray]:
    """alpha_t and sigma_t, (B,) float32: what `denoising_loss` moves to a GPU."""
    return [schedule.alpha(t).astype(np.float32), schedule.sigma(t).astype(np.float32)]


def denoising_loss(schedule: Schedule, predicts: str, network: Callable[[np.ndarray], Tensor], x_0, t, eps) -> Tensor:
    """The mean squared error of a network's prediction at given times and noise, (), float32.

    x_0, eps (B, ...) float32; t (B,) of 0..T-1.  network: x_t -> its prediction of `predicts` (eps, x0 or v).
    """
    # x_t = alpha_t x_0 + sigma_t eps
    x_t = q_sample(schedule, x_0, t, eps)
    # L = || target - network(x_t, t) ||^2,   for v the target is alpha_t eps - sigma_t x_0
    error = as_float32(network(x_t)) - target(schedule, predicts, x_0, eps, t)
    return ops.mean(error * error)
