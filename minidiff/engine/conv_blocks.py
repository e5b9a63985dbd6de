"""Winograd convolution of large images: block after block of pixels, on all cores.

The matrices L and R of conv_winograd.py are dense, so a line of H pixels costs H^2 operations.  Here an image is
divided into blocks of at most BLOCK x BLOCK results:

    +----+----+----+        a block reads one pixel more on each side; beyond the image and its padding there are zeros
    |    |    |    |
    +----+----+----+        all blocks have the same size, so the last ones may compute results that are dropped
    |    |    |    |
    +----+----+----+        U = G w G^T is the same for all of them, and computed once

GROUP blocks at a time pass through conv_winograd.py as if they were a batch.  Together they have enough rows for the
matrix products, and their V and M fit into the cache.  The groups are shared among the cores, so that one image, too,
keeps all of them busy.
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import conv_shift, conv_winograd
from minidiff.engine.parallel import cores, parallel_map

BLOCK = 18                                                  # the most results of a block, each way
GROUP = 16                                                  # blocks that are computed together

correlate_dw = conv_shift.correlate_dw                      # large images are for sampling; in training they are rare


def correlate(x, w, padding: int):
    """x (B, H, W, C), w (3, 3, C, D), padding < 3 -> (B, H + 2p - 2, W + 2p - 2, D)."""
    B, H, W, C = x.shape
    y = np.empty((B, H + 2 * padding - 2, W + 2 * padding - 2, w.shape[3]), dtype=x.dtype)
    height, width = (_block(results) for results in y.shape[1:3])
    rows, columns = (conv_winograd.line(n + 2, 0, x.dtype) for n in (height, width))
    U = conv_winograd.kernel_points(w, rows, columns)

    def compute(corners) -> None:
        blocks = np.zeros((len(corners), height + 2, width + 2, C), dtype=x.dtype)
        for block, (b, i, j) in zip(blocks, corners, strict=True):
            top, left = i - padding, j - padding            # its first pixel, which may lie in the padding
            pixels = x[b, max(top, 0):top + height + 2, max(left, 0):left + width + 2]
            block[max(-top, 0):, max(-left, 0):][:pixels.shape[0], :pixels.shape[1]] = pixels
        for result, (b, i, j) in zip(conv_winograd.forward(blocks, U, rows, columns), corners, strict=True):
            place = y[b, i:i + height, j:j + width]
            place[...] = result[:place.shape[0], :place.shape[1]]

    corners = [(b, i, j) for b in range(B) for i in range(0, y.shape[1], height) for j in range(0, y.shape[2], width)]
    size = max(1, min(GROUP, -(-len(corners) // cores())))
    parallel_map(compute, [corners[n:n + size] for n in range(0, len(corners), size)])
    return y


def _block(results: int) -> int:
    """The size of blocks that are as equal as can be."""
    count = -(-results // BLOCK)
    return -(-results // count)
