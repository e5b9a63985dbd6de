"""Exercise 8: a step of DDIM.  20 minutes, chapter docs/course/05_samplers.md.

DDIM may leap: from time t to any earlier time s, the next one in its list.  It splits x_t into the image and the noise
that the network sees in it, and mixes them again for time s, with fresh noise z or without:

    x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)
    sigma  = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)     DDIM eq. 16
    x_s    = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z            DDIM eq. 12

eta = 0 is deterministic, eta = 1 is DDPM's step.  s = -1 is the clean image, where alpha_bar is 1.

    minidiff check ex08
"""

import numpy as np


def ddim_step(alpha_bar: np.ndarray, x_t: np.ndarray, t: int, s: int, eps_hat: np.ndarray, eta: float,
              z: np.ndarray) -> np.ndarray:
    """x_s, from x_t.

    alpha_bar: (T,) float64.  x_t, eps_hat, z: of one shape and dtype; z is standard normal.
    t, s: integers, -1 <= s < t < T.  eta: within 0..1.
    Returns x_s, of x_t's shape and dtype.
    """
    raise NotImplementedError("your code here")
