"""Exercise 6: a perfect denoiser.  20 minutes, chapter docs/course/03_denoiser.md.

The data are two points, x_0 = +1 with probability p and x_0 = -1 with probability 1 - p.  You see x_t = alpha x_0 +
sigma eps.  The best estimate of x_0, in squared error, is its mean given x_t:

    x0_hat = E[x_0 | x_t] = P(+1 | x_t) - P(-1 | x_t),
    P(+1 | x_t) = p N(x_t; alpha, sigma^2) / (p N(x_t; alpha, sigma^2) + (1 - p) N(x_t; -alpha, sigma^2))

Simplify it before you program it: a ratio of two numbers that both round to 0 is NaN.  The same estimate follows from
the score of the density p_t of x_t, by Tweedie's formula, which the laws use (Efron 2011):

    x0_hat = (x_t + sigma^2 d/dx log p_t(x_t)) / alpha

    minidiff check ex06
"""

import numpy as np


def x0_hat(p: float, alpha: float, sigma: float, x_t: np.ndarray) -> np.ndarray:
    """E[x_0 | x_t] for each number in x_t.

    p: the probability of +1, within (0, 1).  alpha, sigma: positive.  x_t: float64 of any shape, of any size.
    Returns an array of x_t's shape, within [-1, 1].
    """
    raise NotImplementedError("your code here")
