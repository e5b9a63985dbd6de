"""Exercise 7: a step of DDPM's sampler.  20 minutes, chapter docs/course/05_samplers.md.

A network has estimated the noise in x_t.  One step of ancestral sampling goes to time t-1: it takes the mean that the
estimate suggests, and adds fresh noise z:

    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t) + sqrt(beta~_t) z    DDPM algorithm 2
    beta_t  = 1 - alpha_bar_t / alpha_bar_{t-1},     alpha_bar_{-1} = 1
    beta~_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t                                       DDPM eq. 7

Chapter docs/course/03_denoiser.md derives the mean ("DDPM's mean, in eps"), and docs/course/02_reverse.md derives beta~
("Completing the square").

The last step, from t = 0, adds no noise.  (DDPM's sigma_t^2 may be beta_t or beta~_t: here it is beta~_t.)

    minidiff check ex07
"""

import numpy as np


def ddpm_step(alpha_bar: np.ndarray, x_t: np.ndarray, t: int, eps_hat: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x_{t-1}, a draw from q(x_{t-1} | x_t, x_0 = x0_hat).

    alpha_bar: (T,) float64.  x_t, eps_hat, z: of one shape and dtype; z is standard normal.  t: an integer of 0..T-1.
    Returns x_{t-1}, of x_t's shape and dtype.
    """
    raise NotImplementedError("your code here")
