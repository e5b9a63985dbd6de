"""Convolution with 3 x 3 kernels in a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3).

A tile of 4 x 4 results needs a patch of 6 x 6 pixels.  In one dimension (Lavin & Gray 2016, section 4), with
d the 6 pixels, g the 3 weights and y the 4 results,

    y = A^T [ (G g) * (B^T d) ]             * element by element: 6 multiplications in place of 12

and in two dimensions each matrix acts on rows and on columns, 36 multiplications in place of 144.  Read as
vectors, a patch of 36, a kernel of 9 and a tile of 16 numbers are each multiplied by one Kronecker product,

    V = (B^T x B^T) patch     U = (G x G) w     M_k = V_k U_k  for k = 1..36     y = (A^T x A^T) M

so that everything is a matrix product: V and U by one each, M by 36, of (tiles, C) with (C, D).

The matrices, of integers and sixths, cost about one digit in float32: a relative error of 1e-5 against 1e-6.
"""

from __future__ import annotations

import numpy as np

TILE, PATCH = 4, 6                                          # results and pixels on a side

B_T = np.array([[4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1]], dtype=np.float64)
G = np.array([[1 / 4, 0, 0],
              [-1 / 6, -1 / 6, -1 / 6],
              [-1 / 6, 1 / 6, -1 / 6],
              [1 / 24, 1 / 12, 1 / 6],
              [1 / 24, -1 / 12, 1 / 6],
              [0, 0, 1]], dtype=np.float64)
A_T = np.array([[1, 1, 1, 1, 1, 0],
                [0, 1, -1, 2, -2, 0],
                [0, 1, 1, 4, 4, 0],
                [0, 1, -1, 8, -8, 1]], dtype=np.float64)

_OF_PATCH, _OF_KERNEL, _OF_TILE = (
    {np.dtype(t): np.kron(a, a).astype(t) for t in (np.float32, np.float64)} for a in (B_T, G, A_T))


def correlate(x, w, padding: int):
    """x (B, H, W, C), w (3, 3, C, D), padding < 3 -> (B, H + 2p - 2, W + 2p - 2, D)."""
    B, H, W, C = x.shape
    D, H_out, W_out = w.shape[3], H + 2 * padding - 2, W + 2 * padding - 2
    V = _transformed_patches(x, padding, H_out, W_out)                              # (36, B th tw, C)
    U = (_OF_KERNEL[w.dtype] @ w.reshape(9, C * D)).reshape(PATCH**2, C, D)
    M = V @ U                                                                       # (36, B th tw, D)
    y = _OF_TILE[x.dtype] @ M.reshape(PATCH**2, -1)                                 # (16, B th tw D)
    return _join_tiles(y, B, H_out, W_out, D)


def correlate_dw(x, dy, w_shape: tuple[int, ...], padding: int):
    """The gradient to w, of shape w_shape (3, 3, C, D), from x and dy: each step of the above, transposed."""
    _, _, C, D = w_shape
    V = _transformed_patches(x, padding, *dy.shape[1:3])                            # (36, B th tw, C)
    dM = (_OF_TILE[dy.dtype].T @ _cut_tiles(dy)).reshape(PATCH**2, -1, D)           # (36, B th tw, D)
    dU = V.swapaxes(1, 2) @ dM                                                      # (36, C, D)
    return (_OF_KERNEL[dy.dtype].T @ dU.reshape(PATCH**2, C * D)).reshape(w_shape)


def _transformed_patches(x, padding: int, H_out: int, W_out: int):
    """V = (B^T x B^T) patch, for the patch of every tile."""
    B, H, W, C = x.shape
    th, tw = _tiles(H_out, W_out)
    padded = np.zeros((B, TILE * th + 2, TILE * tw + 2, C), dtype=x.dtype)
    padded[:, padding:padding + H, padding:padding + W] = x
    b, h, w, c = padded.strides
    patches = np.lib.stride_tricks.as_strided(                      # a view: pixel (i, j) of every tile's patch
        padded, (PATCH, PATCH, B, th, tw, C), (h, w, b, TILE * h, TILE * w, c))
    return (_OF_PATCH[x.dtype] @ patches.reshape(PATCH**2, -1)).reshape(PATCH**2, -1, C)


def _cut_tiles(y):
    """(B, H, W, D) -> (16, B th tw D), zeros beyond the image's edge."""
    B, H, W, D = y.shape
    th, tw = _tiles(H, W)
    if (TILE * th, TILE * tw) != (H, W):
        y, inner = np.zeros((B, TILE * th, TILE * tw, D), dtype=y.dtype), y
        y[:, :H, :W] = inner
    tiles = y.reshape(B, th, TILE, tw, TILE, D).transpose(2, 4, 0, 1, 3, 5)         # (4, 4, B, th, tw, D)
    return tiles.reshape(TILE**2, -1)


def _join_tiles(tiles, B: int, H: int, W: int, D: int):
    """(16, B th tw D) -> (B, H, W, D)."""
    th, tw = _tiles(H, W)
    y = tiles.reshape(TILE, TILE, B, th, tw, D).transpose(2, 3, 0, 4, 1, 5)         # (B, th, 4, tw, 4, D)
    return np.ascontiguousarray(y.reshape(B, TILE * th, TILE * tw, D)[:, :H, :W])


def _tiles(H: int, W: int) -> tuple[int, int]:
    return -(-H // TILE), -(-W // TILE)
