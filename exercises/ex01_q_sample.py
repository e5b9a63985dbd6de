"""Exercise 1: noise an image in one step.  5 minutes, chapter docs/course/01_noise.md.

The forward process adds a little noise in each step.  The sum of many small Gaussian steps is one Gaussian, so you can
jump to any time t at once:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)                    DDPM eq. 4

Each image of the batch has a time of its own.

    minidiff check ex01
"""

import numpy as np


def q_sample(alpha_bar: np.ndarray, x_0: np.ndarray, t: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Draws from q(x_t | x_0) with the noise eps.

    alpha_bar: (T,) float64, the power of the signal that is left at each time.
    x_0: (B, ...) images: B of them, of any shape.
    t: (B,) integers of 0..T-1, one for each image.
    eps: standard normal numbers of x_0's shape and dtype.  Use these, and draw none.
    Returns x_t, of x_0's shape and dtype (a float32 image stays float32).
    """
    raise NotImplementedError("your code here")
