"""Exercise 20: group norm and its pullback.  30 minutes, chapter docs/course/10_engine.md.

Group norm (Wu & He 2018) divides the C channels of an image into groups of neighbours, and shifts and scales each group
of each image to mean 0 and variance 1.  Then each channel is scaled by its gamma and shifted by its beta.

    x_hat = (x - mean) / sqrt(variance + eps)       mean, variance: over all pixels and the channels of the group
    y     = gamma x_hat + beta

The variance is the mean of (x - mean)^2, divided by the count n and not by n - 1.  In the pullback, do not forget that
mean and variance depend on x, too.

    minidiff check ex20
"""

from collections.abc import Callable

import numpy as np


def group_norm(x: np.ndarray, groups: int, gamma: np.ndarray, beta: np.ndarray,
               eps: float) -> tuple[np.ndarray, Callable]:
    """Group norm, and its pullback.

    x: (B, H, W, C).  groups: divides C; channels 0 ... C/groups - 1 are the first group.  gamma, beta: (C,).
    Returns (y, pullback).  y: of x's shape and dtype.  pullback: a function dy -> (dx, dgamma, dbeta), of the shapes of
    x, gamma and beta.
    """
    raise NotImplementedError("your code here")
