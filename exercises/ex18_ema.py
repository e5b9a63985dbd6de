"""Exercise 18: the average of the weights.  10 minutes, chapter docs/course/03_denoiser.md.

Weights jitter from step to step.  Pictures are made with an average in which old weights fade away:

    average <- d_n average + (1 - d_n) weights,      d_n = min(decay, (1 + n) / (10 + n)),      n = 0, 1, 2, ...

At first d_n is small, so that the random weights of the beginning are forgotten at once.

    minidiff check ex18
"""

import numpy as np


def ema_step(average: np.ndarray, weights: np.ndarray, n: int, decay: float) -> np.ndarray:
    """The average after one more step.

    average, weights: arrays of one shape and dtype.  n: how many steps the average has had before.
    decay: within [0, 1), such as 0.999.
    Returns a new array of that shape and dtype; `average` and `weights` stay as they are.
    """
    raise NotImplementedError("your code here")
