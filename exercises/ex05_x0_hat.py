"""Exercise 5: the image that a network's output stands for.  10 minutes, chapter docs/course/03_denoiser.md.

A network may predict the noise eps, the image x_0, or the velocity v.  With x_t, each of them determines an estimate of
x_0:

    x_t = alpha x_0 + sigma eps,      alpha = sqrt(alpha_bar_t),  sigma = sqrt(1 - alpha_bar_t)
    v   = alpha eps - sigma x_0

Solve these equations for x_0, given x_t and eps, and given x_t and v.  The second solution needs no division, and it
holds at alpha = 0, too, where x_t is pure noise and eps says nothing about x_0.  (For "eps" no answer exists there, and
none is judged: return what you like, or raise an error.)  Beware of the dtype: a NumPy scalar such as
np.sqrt(alpha_bar[t]) is float64, and makes a float32 array float64.  Use math.sqrt, or .astype at the end.  Compare
with chapter 3, DDPM eq. 15, and Salimans & Ho 2022, section 4.

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
