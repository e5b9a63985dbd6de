"""Exercise 13: how many bits a pixel costs.  30 minutes, chapter docs/course/09_likelihood.md.

An 8-bit pixel u = 0 ... 255 is the number x_0 = u / 127.5 - 1.  The last step of the chain must give each of the 256
values a probability, so the Gaussian N(x0_hat, sigma^2) is integrated over the bin around each value, from half a level
below it to half a level above it.  The outer bins are open, so that the 256 probabilities sum to 1:

    P(u) = Phi((high - x0_hat) / sigma) - Phi((low - x0_hat) / sigma)                            DDPM eq. 13
    high = (u + 1/2) / 127.5 - 1, and infinity for u = 255;   low = (u - 1/2) / 127.5 - 1, and -infinity for u = 0

Phi is the distribution function of N(0, 1).  A probability P costs -log2 P bits, and bits/dim is the mean over all
pixels.  Far from x0_hat, P rounds to 0 although its logarithm is an ordinary number: work with logarithms there.
`from scipy import special` gives you a module that has the logarithm of Phi.

    minidiff check ex13
"""

import numpy as np


def bits_per_dim(x_0: np.ndarray, x0_hat: np.ndarray, sigma: float) -> float:
    """The mean of -log2 P over all pixels.

    x_0: images of any shape, float64, on the levels u / 127.5 - 1.  x0_hat: of x_0's shape.  sigma: positive.
    Returns a number.
    """
    raise NotImplementedError("your code here")
