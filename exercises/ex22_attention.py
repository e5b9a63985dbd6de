"""Exercise 22: attention and its pullback.  45 minutes, chapter docs/course/10_engine.md.

N queries look at M keys; each takes a weighted mean of the M values (Vaswani et al. 2017, eq. 1):

    S = q k^T / sqrt(d)         (N, M)      scores
    P = softmax(S)              (N, M)      weights: each row sums to 1
    y = P v                     (N, e)

Where mask is False, the weight is 0: that query does not see that key, whatever stands there.

The pullback is made of pullbacks that you know: two of matrix products and one of a softmax.  Keep P for it.

    minidiff check ex22
"""

from collections.abc import Callable

import numpy as np


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, Callable]:
    """Attention of one head, and its pullback.

    q: (N, d).  k: (M, d).  v: (M, e).  mask: (N, M) booleans with at least one True in each row, or None for all True.
    Returns (y, pullback).  y: (N, e), of q's dtype.  pullback: a function dy -> (dq, dk, dv), of the
    shapes of q, k and v.
    """
    raise NotImplementedError("your code here")
