"""Exercise 12: how far one Gaussian is from another.  10 minutes, chapter docs/course/04_bound.md.

The Kullback-Leibler divergence of q from p is the mean of log(q/p) under q:

    KL(q || p) = E_q[log q(x) - log p(x)],      q = N(mean1, var1),  p = N(mean2, var2)

in nats (natural logarithms).  Each term of the variational bound is one, between two Gaussians, and has a closed form.
Derive it: write down both logarithms, and take the mean of each under q.  Chapter 4 has the result to compare with.

    minidiff check ex12
"""

import numpy as np


def kl_gaussian(mean1: np.ndarray, var1: np.ndarray, mean2: np.ndarray, var2: np.ndarray) -> np.ndarray:
    """The divergence of N(mean1, var1) from N(mean2, var2), in nats, for each element.

    Four float64 arrays of one shape; the variances are positive.
    Returns an array of that shape.
    """
    raise NotImplementedError("your code here")
