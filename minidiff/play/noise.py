"""One image at every time, and the mean and standard deviation that q(x_t | x_0) predicts beside the measured ones.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)                                                     DDPM eq. 4

Over the n numbers of one image of mean m_0 and variance v_0 (verify/watch.py):

    mean(x_t)               is alpha_t m_0                        give or take sigma_t / sqrt(n)
    std(x_t)                is sqrt(alpha_t^2 v_0 + sigma_t^2)
    std(x_t - alpha_t x_0)  is sigma_t: what is left when the mean of q is taken away is the noise
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from minidiff.data.dataset import DATASETS, Dataset, load_dataset
from minidiff.data.download import offline
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import generator
from minidiff.errors import UserError
from minidiff.play.drawing import png
from minidiff.verify import watch
from minidiff.verify.rows import as_dicts

MOST_STATES = 101
LARGEST = 128 * 128 * 3                                     # numbers of an image


def noised(schedule: Schedule, image: Callable[[], tuple[np.ndarray, str]], seed: int) -> Iterator[dict]:
    """One event: an image at up to 101 times, computed by the chain, each state from the one before.

    image: gives x_0 (H, W, C) and its caption, when the job's turn has come.
    """
    x_0, caption = image()
    if x_0.size > LARGEST:
        raise UserError(f"the image has {x_0.shape[1]} x {x_0.shape[0]} pixels, and at most 128 x 128 are taken here")
    states = watch.watch(schedule, x_0, min(schedule.T + 1, MOST_STATES), seed=seed)
    yield {"event": "noised", "T": schedule.T, "schedule": schedule.name, "caption": caption, "numbers": x_0.size,
           "states": [_state(schedule, x_0, w) for w in states], "rows": as_dicts(watch.rows(states, seed))}


def _state(schedule: Schedule, x_0: np.ndarray, w: watch.Watched) -> dict:
    alpha, sigma, n = float(schedule.alpha(w.t)), float(schedule.sigma(w.t)), x_0.size
    std, expected_std = math.sqrt(w.variance), math.sqrt(w.expected_variance)
    return {"t": w.t, "x_t": png(w.x_t), "mean_picture": png(alpha * x_0), "alpha": alpha, "sigma": sigma,
            # (predicted, its standard error, measured); std is the root of a variance: d std = d var / (2 std)
            "mean": [w.expected_mean, w.mean_error, w.mean],
            "std": [expected_std, w.variance_error / (2 * expected_std) if expected_std else 0.0, std],
            "noise": [sigma, sigma / math.sqrt(2 * (n - 1)), float(np.std(w.x_t - alpha * x_0, ddof=1))]}


def image_of(name: str, index: int) -> tuple[np.ndarray, str]:
    """An image (H, W, C) of a registered data set, and its caption; an index beyond the end starts again."""
    data = _data(name)
    i = index % len(data)
    return data.images([i])[0], data.caption(i, generator(i, "the caption of an image on the page"))


@lru_cache(maxsize=4)
def _data(name: str) -> Dataset:
    """The data set from what is on this machine: the page downloads nothing."""
    if name not in DATASETS:
        raise UserError(f"there is no data set {name[:40]!r}: it is one of {', '.join(DATASETS)}")
    with offline():
        return load_dataset(name)
