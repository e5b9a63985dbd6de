"""Exercise 12: how far one Gaussian is from another.  10 minutes, chapter docs/course/04_bound.md.

The Kullback-Leibler divergence is the mean of log p/q under p.  Each term of the variational bound is one, between two
Gaussians, and has a closed form:

    KL(N(m1, v1) || N(m2, v2)) = int p log(p/q) dx = (v1/v2 - 1 - log(v1/v2) + (m1 - m2)^2 / v2) / 2

in nats (natural logarithms).

    minidiff check ex12
"""

import numpy as np


def kl_gaussian(mean1: np.ndarray, var1: np.ndarray, mean2: np.ndarray, var2: np.ndarray) -> np.ndarray:
    """The divergence of N(mean1, var1) from N(mean2, var2), in nats, for each element.

    Four float64 arrays of one shape; the variances are positive, and may be as small as 1e-300.
    Returns an array of that shape.
    """
    raise NotImplementedError("your code here")
