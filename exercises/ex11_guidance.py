"""Exercise 11: classifier-free guidance.  5 minutes, chapter docs/course/07_guidance.md.

One network predicts the noise twice, with the caption and without it. Guidance goes from the second in the direction
of the first, and may go further than it:

    eps = eps_uncond + scale (eps_cond - eps_uncond)                             Ho & Salimans 2022, eq. 6

scale = 0 ignores the caption, 1 follows it, more than 1 exaggerates it.  (Ho & Salimans 2022 count by w = scale - 1.)

    minidiff check ex11
"""

import numpy as np


def guided(eps_uncond: np.ndarray, eps_cond: np.ndarray, scale: float) -> np.ndarray:
    """The guided prediction.

    eps_uncond, eps_cond: predictions without and with the caption, of one shape and dtype.  scale: a Python float.
    Returns an array of the same shape and dtype.
    """
    raise NotImplementedError("your code here")
