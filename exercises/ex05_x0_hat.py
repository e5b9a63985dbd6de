"""Exercise 5: the image that a network's output stands for.  10 minutes, chapter docs/course/03_denoiser.md.

A network may predict the noise, the image, or the velocity.  With x_t, each of them determines an estimate of x_0:

    alpha = sqrt(alpha_bar_t),  sigma = sqrt(1 - alpha_bar_t),  x_t = alpha x_0 + sigma eps,  v = alpha eps - sigma x_0

    "eps"    x_0 = (x_t - sigma eps) / alpha                                                     DDPM eq. 15
    "x0"     x_0
    "v"      x_0 = alpha x_t - sigma v                                       Salimans & Ho 2022, section 4

The last holds at alpha = 0, too, where x_t is pure noise and eps says nothing about x_0.

    minidiff check ex05
"""

import numpy as np


def to_x0(alpha_bar: np.ndarray, predicts: str, x_t: np.ndarray, t: int, out: np.ndarray) -> np.ndarray:
    """The estimate of x_0 that a network's output stands for.

    alpha_bar: (T,) float64; the last entry may be 0.  predicts: "eps", "x0" or "v".
    x_t, out: the noisy image and the network's output, of one shape and dtype.  t: an integer of 0..T-1.
    Returns x0_hat, of x_t's shape and dtype.
    """
    raise NotImplementedError("your code here")
