"""Winograd convolution of large images and of wide layers: strip after strip of blocks of pixels, on all cores.

The matrices L and R of conv_winograd.py are dense, so a line of H pixels costs H^2 operations.  Here an image is
divided into blocks of at most BLOCK x BLOCK results, and a row of blocks is a strip:

    +----+----+----+        a block reads one pixel more on each side; beyond the image and its padding there are zeros
    |    |    |    | strip
    +----+----+----+        all blocks have the same size, so the last ones may compute results that are dropped
    |    |    |    | strip
    +----+----+----+        X = L x                         of the rows of a whole strip
                            V = X L^T,  M = V U,  Y = M R^T     for one point of the rows at a time, on each block
                            y = R Y                         of the whole strip

V and M of one point stay in the cache.  Small images are computed whole: the strips, then the points are shared among
the cores, and each point of U = G w G^T is computed where it is needed.  Of larger ones each core takes some strips at
a time, and U is computed once.  So one image, too, keeps all cores busy.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minidiff.engine import conv_shift, conv_winograd
from minidiff.engine.parallel import cores, parallel_map

BLOCK, LONG, BLOCK_OF_LONG = 18, 128, 12                    # the most results of a block, and of one of longer lines
GROUP = 32                                                  # blocks that a core computes together
WHOLE = 2 ** 23                                             # numbers of X or Y of an image that is computed whole

correlate_dw = conv_shift.correlate_dw                      # large images are for sampling; in training they are rare


def correlate(x, w, padding: int, bias=None):
    """x (B, H, W, C), w (3, 3, C, D), padding < 3, bias (D,) -> (B, H + 2p - 2, W + 2p - 2, D)."""
    return _correlate(x, w, padding, bias, 1)


def correlate_upsampled(x, w, bias=None):
    """The same with padding 1 for x with each pixel four times, twice each way: (B, H, W, C) -> (B, 2H, 2W, D).

    S x S^T takes the place of x, where S copies pixels: so L S takes the place of L, and no copy is made.
    """
    return _correlate(x, w, 1, bias, 2)


def _correlate(x, w, padding: int, bias, copies: int):
    (B, H, W, C), D = x.shape, w.shape[3]
    y = np.empty((B, copies * H + 2 * padding - 2, copies * W + 2 * padding - 2, D), dtype=x.dtype)
    height, width = (_block(results, copies) for results in y.shape[1:3])
    rows, columns = (conv_winograd.line(n + 2, 0, x.dtype) for n in (height, width))
    if copies == 2:
        rows, columns = rows.of_half_as_many(), columns.of_half_as_many()
    (P, high), (Q, wide) = rows.L.shape, columns.L.shape    # a block reads high x wide pixels
    across, step, left = -(-y.shape[2] // width), width // copies, -(-padding // copies)
    strips = [(b, i) for b in range(B) for i in range(0, y.shape[1], height)]
    groups = _groups(strips, across, P * across * width * max(C, D))
    U = conv_winograd.kernel_points(w, rows, columns) if len(groups) > 1 else None

    def compute(strips) -> None:
        S = len(strips)
        X = np.empty((S, P, (across - 1) * step + wide, C), dtype=x.dtype)
        blocks = as_strided(X, (S, P, across, wide, C), (*X.strides[:2], step * X.strides[2], *X.strides[2:]))
        Y = np.empty((S, P, across, width, D), dtype=x.dtype)

        def down(s: int) -> None:
            b, i = strips[s]
            top = (i - padding) // copies                   # the strip's first row, which may lie in the padding
            a, z = max(top, 0), min(top + high, H)
            X[s, :, :left], X[s, :, left + W:] = 0, 0
            np.matmul(rows.L[:, a - top:z - top], x[b, a:z].reshape(z - a, W * C),
                      out=X[s, :, left:left + W].reshape(P, W * C))

        def at_point(point: tuple[int, slice]) -> None:
            k, place = point
            n = place.stop - place.start
            U_k = conv_winograd.kernel_points(w, rows, columns, [k]) if U is None else U[[k]]
            V = np.empty((Q, S, n, across, C), dtype=x.dtype)
            np.matmul(columns.L, blocks[:, place], out=V.transpose(1, 2, 3, 0, 4))
            M = conv_winograd.products(V.reshape(1, Q, S * n, across, C), U_k, columns)
            np.matmul(columns.R, M.reshape(Q, S, n, across, D).transpose(1, 2, 3, 0, 4), out=Y[:, place])

        def up(s: int) -> None:
            b, i = strips[s]
            place = y[b, i:i + height]
            results = Y[s].reshape(P, across * width, D)[:, :y.shape[2]]
            np.matmul(rows.R[:len(place)], results.reshape(P, -1), out=place.reshape(len(place), -1))
            if bias is not None:
                place += bias

        # on all cores where the image is computed whole, else on this one
        parallel_map(down, range(S))
        parallel_map(at_point, rows.points())
        parallel_map(up, range(S))
    # now and then OpenBLAS reports an invalid value where there is none, of unused lanes of a register; a real one is
    # in the result
    with np.errstate(invalid="ignore"):
        parallel_map(compute, groups)
    return y


def _block(results: int, copies: int) -> int:
    """The size of blocks that are as equal as can be; even where pixels have two copies."""
    count = -(-results // (BLOCK if results <= LONG else BLOCK_OF_LONG))
    return -(-results // (count * copies)) * copies


def _groups(strips: list, across: int, numbers: int) -> list[list]:
    """The strips in one group where they are few, or else as many groups for each core.

    across: blocks of a strip.  numbers: of a strip's X or Y.
    """
    if len(strips) * numbers <= WHOLE:
        return [strips]
    count = -(-len(strips) // (max(1, GROUP // across) * cores())) * cores()
    ends = [len(strips) * g // count for g in range(count + 1)]
    return [strips[a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b]
