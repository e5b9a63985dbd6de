"""Exercise 14: telling a network the time.  10 minutes, chapter docs/course/06_text.md.

A network needs the number t in a form that it can use: as cosines and sines of many frequencies, like the hands of
clocks that run at different speeds.  A fast hand tells neighbours apart, a slow one tells early from late.

    freq_k = max_period^(-k / (dim/2)),     k = 0 ... dim/2 - 1                  Vaswani et al. 2017, section 3.5
    embedding(t) = (cos(t freq_0), ..., cos(t freq_{dim/2-1}), sin(t freq_0), ..., sin(t freq_{dim/2-1}))

All cosines come first, then all sines.  The same form tells a text encoder where a word stands.

    minidiff check ex14
"""

import numpy as np


def sinusoidal_embedding(t: np.ndarray, dim: int, max_period: float) -> np.ndarray:
    """One row for each time.

    t: (B,) numbers, integers or not.  dim: even, at least 2.  max_period: above 1, such as 10000.
    Returns (B, dim) float64.
    """
    raise NotImplementedError("your code here")
