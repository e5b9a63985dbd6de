"""Exercise 4: one step back, if you knew x_0.  20 minutes, chapter docs/course/02_reverse.md.

Bayes' rule turns the forward step around.  Both factors are Gaussian, so their product is Gaussian again:

    q(x_{t-1} | x_t, x_0)  is proportional to  q(x_t | x_{t-1}) q(x_{t-1} | x_0)

    mean     = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
             + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t                    DDPM eq. 7
    variance = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t

with beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}.  Before the first step, alpha_bar_{-1} = 1: the image is clean.

    minidiff check ex04
"""

import numpy as np


def posterior(alpha_bar: np.ndarray, x_0: np.ndarray, x_t: np.ndarray, t: int) -> tuple[np.ndarray, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0).

    alpha_bar: (T,) float64.  x_0, x_t: images of any one shape and dtype.  t: an integer of 0..T-1, the same for all.
    Returns the mean, of x_0's shape and dtype, and the variance, one number.
    """
    raise NotImplementedError("your code here")
