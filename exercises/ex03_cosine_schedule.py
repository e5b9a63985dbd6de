"""Exercise 3: the cosine schedule.  10 minutes, chapter docs/course/01_noise.md.

Linear betas destroy small images too early.  The cosine schedule chooses alpha_bar itself, as a function of
u = (t + 1)/T, the share of the way, and limits each beta so that no step destroys everything:

    f(u)        = cos((u + offset)/(1 + offset) pi/2)^2
    alpha_bar_t = f((t + 1)/T) / f(0)                    as long as no beta is limited    Improved DDPM eq. 17
    beta_t      = min(1 - alpha_bar_t / alpha_bar_{t-1}, beta_max),      alpha_bar_{-1} = 1

The table that is used is the product of all 1 - beta, with the limited betas.  Times count 0 ... T-1 here, and t = -1
is the clean image, u = 0.  (In the paper the times count from 1, and u = t/T.)

    minidiff check ex03
"""

import numpy as np


def cosine(T: int, offset: float, beta_max: float) -> np.ndarray:
    """alpha_bar of the cosine schedule.

    T: the number of times.  offset: small and positive, 0.008 in the paper.  beta_max: the largest beta, below 1.
    Returns (T,) float64, strictly falling within (0, 1).
    """
    raise NotImplementedError("your code here")
