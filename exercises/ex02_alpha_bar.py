"""Exercise 2: from the noise of each step to the signal that is left.  5 minutes, chapter docs/course/01_noise.md.

Step t multiplies the image by sqrt(1 - beta_t) and adds noise of power beta_t.  So each step keeps the share 1 - beta_t
of the signal's power:

    alpha_bar_t = prod_{i <= t} (1 - beta_i)                                                     DDPM eq. 4

    minidiff check ex02
"""

import numpy as np


def alpha_bar(betas: np.ndarray) -> np.ndarray:
    """The power of the signal that is left after each step.

    betas: (T,) float64 in (0, 1).
    Returns (T,) float64: entry t is the power left after the steps 0 ... t.
    """
    raise NotImplementedError("your code here")
