"""Convolution at stride 1 without a buffer of patches: shifts of one long list of pixels.

If the zero-padded images are stored as one long list of pixels, a shift of the image is a shift of the list:

    y[r] = sum_{m, n} pixels[r + m P + n] @ w[m, n]         P = pixels in a padded row

These are k k matrix products, which BLAS sums in place.  The list has p zero pixels after each row of an image and p
zero rows after each image.  They are both the right padding of one row and the left padding of the next, so the list
is hardly longer than x:

    . . . .        p = 1, an image of 2 x 3; the zeros before the first pixel are the margin of the list
    a b c .        P = W + p = 4
    d e f .        the result of pixel (i, j) is r = i P + j,  and it reads pixels r + m P + n,  m, n in 0..2
    . . . .        results at j >= W_out or i >= H_out are computed too, and dropped
"""

from __future__ import annotations

import numpy as np

from minidiff.engine.blas import add_product


def correlate(x, w, padding: int):
    """x (B, H, W, C), w (k, k, C, D), padding < k -> (B, H + 2p - k + 1, W + 2p - k + 1, D)."""
    k, _, C, D = w.shape
    B, H, W, _ = x.shape
    w = np.ascontiguousarray(w)
    pixels, P, R = _pixel_list(x, k, padding)
    y = np.empty((R, D), dtype=x.dtype)
    for m in range(k):
        for n in range(k):
            r = m * P + n
            add_product(y, pixels[r:r + R], w[m, n], first=r == 0)
    H_out, W_out = H + 2 * padding - k + 1, W + 2 * padding - k + 1
    return np.ascontiguousarray(y.reshape(B, H + padding, P, D)[:, :H_out, :W_out])


def correlate_dw(x, dy, w_shape: tuple[int, ...], padding: int):
    """The gradient with respect to w, of shape w_shape (k, k, C, D), from x and dy."""
    k, _, C, D = w_shape
    B, H, W, _ = x.shape
    pixels, P, R = _pixel_list(x, k, padding)
    spread = np.zeros((B, H + padding, P, D), dtype=dy.dtype)       # dy at its places r in the list, 0 elsewhere
    spread[:, :dy.shape[1], :dy.shape[2]] = dy
    dw = np.empty(w_shape, dtype=dy.dtype)
    for m in range(k):
        for n in range(k):
            r = m * P + n
            np.matmul(pixels[r:r + R].T, spread.reshape(R, D), out=dw[m, n])
    return dw


def _pixel_list(x, k: int, padding: int):
    """The list, the length P of a padded row, and the number R of results.

    The list is (R + n, C): the last shift reads n pixels beyond R.
    """
    B, H, W, C = x.shape
    P = W + padding
    R, margin = B * (H + padding) * P, padding * (P + 1)
    pixels = np.zeros((R + max((k - 1) * (P + 1), margin), C), dtype=x.dtype)
    pixels[margin:margin + R].reshape(B, H + padding, P, C)[:, :H, :W] = x
    return pixels, P, R
