"""Exercise 21: the gradients of a convolution.  30 minutes, chapter docs/course/10_engine.md.

    y[b, i, j, d] = sum_{m, n, c} x[b, i s + m - p, j s + n - p, c] w[m, n, c, d]

with the stride s and p rows and columns of zeros around the image.  (What deep learning calls a convolution is a
correlation in mathematics: the kernel is not flipped.)

Each number of x meets several numbers of w, at several places (i, j).  So its gradient is a sum over these.  You may
write it with loops over m and n, and let NumPy do all the rest at once.

    minidiff check ex21
"""

import numpy as np


def conv_backward(x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, padding: int) -> tuple:
    """The gradients of L by x and w, from that by y.

    x: (B, H, W, C).  w: (kh, kw, C, D).
    dy: (B, Ho, Wo, D) with Ho = (H + 2 padding - kh) // stride + 1, and Wo from W and kw in the same way.
    Returns (dx, dw), of the shapes and dtype of x and w.
    """
    raise NotImplementedError("your code here")
