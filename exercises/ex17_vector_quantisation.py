"""Exercise 17: vectors from a codebook, and a gradient through what has none. 45 minutes, chapter
docs/course/08_latents.md.

Each vector is replaced by the nearest of K codes. The choice has no useful derivative: a small change of z changes
nothing, until it changes all. So the gradient of z_q is passed to z as it is (straight-through), and two losses pull
the codes to the vectors and the vectors to the codes (van den Oord et al. 2017, eq. 3):

    k(i) = argmin_j ||z_i - e_j||^2,      z_q = e_k
    L    = mean (sg[z] - e_k)^2  +  beta mean (z - sg[e_k])^2          the means are over all N D numbers

sg[.] stops gradients: the first term moves the codes only, and the second z only.  So, for cotangents dz_q and dL,

    dz   = dz_q + dL beta 2 (z - e_k) / (N D)
    de_j = sum over the rows i that chose j of  dL 2 (e_j - z_i) / (N D)

    minidiff check ex17
"""

from collections.abc import Callable

import numpy as np


def quantise(z: np.ndarray, codes: np.ndarray, beta: float) -> tuple[np.ndarray, float, Callable]:
    """The quantised vectors, the loss, and the pullback of both.

    z: (N, D) float64.  codes: (K, D) float64.  Both may lie far from 0, close together.
    Returns z_q (N, D), L, and a function (dz_q (N, D), dL) -> (dz (N, D), dcodes (K, D)).
    """
    raise NotImplementedError("your code here")
