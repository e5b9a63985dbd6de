"""Winograd convolution with 3 x 3 kernels: a quarter of the multiplications, for a whole line of pixels at a time.

In one dimension, a tile of m results y_i = sum_j w_j d_{i+j} reads m + 2 pixels d.  Take m + 1 points a_k and their
Lagrange polynomials l_k, for which l_k(a_j) = [j = k].  Then every power i + j <= m+1 of x is

    x^(i+j) = sum_k a_k^i a_k^j l_k(x)  +  [i + j = m+1] prod_k (x - a_k)

Both sides are polynomials in x.  Replace each x^c by d_c, which is written l_k(d), multiply by w_j and sum over j:

    y_i = sum_k a_k^i (sum_j a_k^j w_j) l_k(d)  +  [i = m-1] w_2 prod_k (d - a_k)

So a tile takes m + 2 multiplications instead of 3 m: one for each point and one for "infinity" (Toom & Cook; Lavin &
Gray 2016, section 4, who scale each point differently):

    y = A^T [ (G w) * (B^T d) ]     B^T_k = coefficients of l_k           G_kj = a_k^j      A^T_ik = a_k^i
                      at infinity:  B^T   = those of prod_k (x - a_k)     G = (0, 0, 1)     A^T = (0, ..., 0, 1)

A line of pixels is divided into tiles.  The B^T of all its tiles form one matrix L, without the columns of the padding
zeros, and their A^T form one matrix R.  For an image, these act on its rows and on its columns:

    V = L x L^T         U = G w G^T     M = V U, a matrix product over the channels for each pair of points
    y = R M R^T

and the backward pass takes the transpose of each step, with the same V and U:

    dM = R^T dy R       dU = V^T dM     dw = G^T dU G       dV = dM U^T     dx = L^T dV L

The P numbers of a line are ordered by point: those of all tiles at infinity, then those at a_0, and so on.  At one
point all tiles are multiplied by the same U, so one matrix product serves them all.  14 pixels are tiles of 4, 5 and 5
results, with 6, 7 and 7 points:

    infinity  0      1      -1     2      -2     1/2
    3 tiles   3      3      3      3      3      2 tiles         P = 20: a run of 6 points, and one of 1

An image of 14 x 14 takes 20 x 20 products instead of 14 x 14 x 9, which is 4.4 times fewer.  L and R are dense, so a
line of H pixels costs H^2 operations.  That suits small images, and not lines longer than LONGEST;
conv_blocks.py divides large images.

32 images of 14 x 14 x 64 take 4.7 ms on one core, and 9.6 ms by patches (docs/speed.md has more).

In float32 the error is 4e-6 of the result's norm; that of the plain algorithm is 3e-7.  It is proportional to the
largest number that a tile reads.  A NaN or an infinity spreads over its whole image, since L multiplies it by zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.polynomial.polynomial import polyfromroots

POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)                   # and infinity; one more would cost another digit
TILE = len(POINTS) - 1                                      # the most results of a tile
LONGEST = 40                                                # pixels of a line, for which this is the fastest


def correlate(x, w, padding: int):
    """x (B, H, W, C), w (3, 3, C, D), padding < 3 -> (B, H + 2p - 2, W + 2p - 2, D)."""
    rows, columns = _lines(x, padding)
    return forward(x, kernel_points(w, rows, columns), rows, columns)


def correlate_dw(x, dy, w_shape: tuple[int, ...], padding: int):
    """The gradient with respect to w, of shape w_shape (3, 3, C, D), from x and dy."""
    rows, columns = _lines(x, padding)
    X, dY = _down(x, rows.L), _down(dy, rows.R.T)
    dU = np.empty((len(rows.G), len(columns.G), *w_shape[2:]), dtype=dy.dtype)
    for run in rows.runs:
        _sum_products(_along(run.of(X), columns.L), _along(run.of(dY), columns.R.T), dU[run.points], columns)
    return _kernel_gradient(dU, rows, columns)


def correlate_and_back(x, w, padding: int, with_dx: bool, with_dw: bool) -> tuple[np.ndarray, Callable]:
    """y, and the function dy -> (dx, dw), which reuses U and V.  dx or dw is None if it is not asked for.

    V, which dw requires, is two to three times as large as x.
    """
    rows, columns = _lines(x, padding)
    U, V, x_shape = kernel_points(w, rows, columns), [], x.shape

    def back(dy):
        dY = _down(dy, rows.R.T)                                                    # (P, B, W', D)
        dU, dX = np.empty_like(U) if with_dw else None, None
        if with_dx:
            dX = np.empty((len(dY), x_shape[2], x_shape[0], x_shape[3]), dtype=dy.dtype)        # (P, W, B, C)
        for i, run in enumerate(rows.runs):
            dM = _along(run.of(dY), columns.R.T)                                    # (k, Q, n, B, D)
            if with_dw:
                _sum_products(V[i], dM, dU[run.points], columns)
            if with_dx:
                dV = products(dM, U[run.points].swapaxes(2, 3), columns)            # (k, Q, n, B, C)
                _back_along(dV, columns.L.T, run.of(dX))
        return _back_down(dX, rows.L.T) if with_dx else None, _kernel_gradient(dU, rows, columns) if with_dw else None
    return forward(x, U, rows, columns, keep=V if with_dw else None), back


def forward(x, U, rows: Line, columns: Line, keep: list | None = None):
    """y = R M R^T with M = (L x L^T) U; appends V to `keep`."""
    X = _down(x, rows.L)                                                            # (P, B, W, C)
    Y = np.empty((len(X), columns.R.shape[0], len(x), U.shape[3]), dtype=x.dtype)   # (P, W', B, D)
    for run in rows.runs:
        V = _along(run.of(X), columns.L)                                            # (k, Q, n, B, C)
        _back_along(products(V, U[run.points], columns), columns.R, run.of(Y))
        if keep is not None:
            keep.append(V)
    return _back_down(Y, rows.R)


# --- a line of pixels ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """k successive points with the same number n of tiles."""

    points: slice                           # its points
    rows: slice                             # its rows of P: n of the first point, n of the next, ...

    @property
    def k(self) -> int:
        return self.points.stop - self.points.start

    @property
    def n(self) -> int:
        return (self.rows.stop - self.rows.start) // self.k

    def of(self, X):
        """X (P, ...) -> its part in this run, (k, n, ...)."""
        return X[self.rows].reshape(self.k, self.n, *X.shape[1:])


@dataclass(frozen=True)
class Line:
    """The matrices from a line of pixels to the points of its tiles, P numbers ordered by point, and back."""

    L: np.ndarray                           # (P, pixels)
    R: np.ndarray                           # (results, P)
    G: np.ndarray                           # (points, 3)
    runs: tuple[Run, ...]

    def points(self) -> list[tuple[int, slice]]:
        """(k, its rows of P) of each point."""
        return [(run.points.start + k, slice(run.rows.start + k * run.n, run.rows.start + (k + 1) * run.n))
                for run in self.runs for k in range(run.k)]

    def of_half_as_many(self) -> Line:
        """For a line that has each pixel twice, from the line that has it once: L S, where S copies the pixels.

        The line begins with the second copy of its first pixel and ends with the first copy of its last one.
        """
        pixels = self.L.shape[1]
        S = np.zeros((pixels, pixels // 2 + 1), dtype=self.L.dtype)
        S[np.arange(pixels), (np.arange(pixels) + 1) // 2] = 1
        return replace(self, L=self.L @ S)


@cache
def line(pixels: int, padding: int, dtype: np.dtype) -> Line:
    """The matrices for a line that is padded with zeros on both sides."""
    results = pixels + 2 * padding - 2
    n = -(-results // TILE)
    ends = [results * i // n for i in range(n + 1)]         # tiles as equal as can be
    L, R = ([[] for _ in range(TILE + 2)] for _ in "LR")    # for each point the rows of its tiles
    for start, end in zip(ends, ends[1:], strict=False):
        A_T, B_T = toom_cook(end - start)
        at = np.arange(start, start + len(B_T)) - padding   # the places of the tile's pixels in the line
        inside = (at >= 0) & (at < pixels)
        for k in range(len(B_T)):
            of_pixels, of_results = np.zeros(pixels), np.zeros(results)
            of_pixels[at[inside]], of_results[start:end] = B_T[k, inside], A_T[:, k]
            L[k].append(of_pixels), R[k].append(of_results)
    L, R = [rows for rows in L if rows], [rows for rows in R if rows]
    G = [[0, 0, 1], *([1, a, a * a] for a in POINTS)][:len(L)]
    L_R_G = np.concatenate(L), np.concatenate(R).T, np.array(G)
    return Line(*(np.ascontiguousarray(a, dtype=dtype) for a in L_R_G), _runs([len(rows) for rows in L]))


def _runs(tiles: list[int]) -> tuple[Run, ...]:
    """Groups successive points with the same number of tiles."""
    ends = np.cumsum([0, *tiles]).tolist()                  # where each point's rows of P end
    starts = [k for k, n in enumerate(tiles) if k == 0 or n != tiles[k - 1]]
    stops = [*starts[1:], len(tiles)]
    return tuple(Run(slice(k, j), slice(ends[k], ends[j])) for k, j in zip(starts, stops, strict=True))


def toom_cook(m: int) -> tuple[np.ndarray, np.ndarray]:
    """A^T (m, m + 2) and B^T (m + 2, m + 2) of a tile of m results, in float64; infinity comes first."""
    a = np.array(POINTS[:m + 1])
    A_T, B_T = np.zeros((m, m + 2)), np.zeros((m + 2, m + 2))
    A_T[-1, 0], A_T[:, 1:] = 1, a ** np.arange(m)[:, None]
    B_T[0] = polyfromroots(a)
    for k in range(m + 1):
        others = np.delete(a, k)
        B_T[k + 1, :-1] = polyfromroots(others) / np.prod(a[k] - others)            # l_k
    return A_T, B_T


def _lines(x, padding: int) -> tuple[Line, Line]:
    return line(x.shape[1], padding, x.dtype), line(x.shape[2], padding, x.dtype)


# --- from pixels to points and back: products with L or R from the left, along H, then along W ------------------

def _down(x, L):
    """(B, H, W, C) -> (P, B, W, C)."""
    B, H, W, C = x.shape
    X = np.empty((len(L), B, W * C), dtype=x.dtype)
    np.matmul(L, x.reshape(B, H, W * C), out=X.swapaxes(0, 1))
    return X.reshape(len(L), B, W, C)


def _along(X, L):
    """(k, n, B, W, C) -> (k, Q, n, B, C): for each point of the columns, the rows of one matrix are adjacent."""
    k, n, B, _, C = X.shape
    V = np.empty((k, len(L), n, B, C), dtype=X.dtype)
    np.matmul(L, X, out=V.transpose(0, 2, 3, 1, 4))
    return V


def _back_along(M, R, out) -> None:
    """(k, Q, n, B, D) -> out (k, n, W, B, D)."""
    k, Q, n, B, D = M.shape
    np.matmul(R, M.swapaxes(1, 2).reshape(k, n, Q, B * D), out=out.reshape(k, n, len(R), B * D))


def _back_down(Y, R):
    """(P, W, B, D) -> (B, H, W, D)."""
    _, W, B, D = Y.shape
    y = np.empty((B, len(R), W, D), dtype=Y.dtype)
    np.matmul(R, Y.transpose(1, 2, 0, 3), out=y.transpose(2, 0, 1, 3))
    return y


# --- at the points --------------------------------------------------------------------------------------------

def products(V, U, columns: Line):
    """M = V U at each point: (k, Q, n, B, C), (k, points, C, D) -> (k, Q, n, B, D)."""
    M = np.empty((*V.shape[:4], U.shape[3]), dtype=V.dtype)
    for run in columns.runs:
        np.matmul(_matrices(V, run), U[:, run.points], out=_matrices(M, run))
    return M


def _sum_products(V, dM, dU, columns: Line) -> None:
    """dU = V^T dM at each point: (k, Q, n, B, C), (k, Q, n, B, D) -> dU (k, points, C, D)."""
    for run in columns.runs:
        np.matmul(_matrices(V, run).swapaxes(2, 3), _matrices(dM, run), out=dU[:, run.points])


def _matrices(V, run: Run):
    """The matrix of each point of a run of the columns: (k, Q, n, B, C) -> (k, points, tiles n B, C)."""
    k, _, n, B, C = V.shape
    return V[:, run.rows].reshape(k, run.k, run.n * n * B, C)


def kernel_points(w, rows: Line, columns: Line, points: list[int] | slice = slice(None)):
    """U = G w G^T: (3, 3, C, D) -> (points, points, C, D); points: those of the rows, all of them or some."""
    G = rows.G[points]
    U = np.kron(G, columns.G) @ w.reshape(9, -1)
    return U.reshape(len(G), len(columns.G), *w.shape[2:])


def _kernel_gradient(dU, rows: Line, columns: Line):
    """dw = G^T dU G: (points, points, C, D) -> (3, 3, C, D)."""
    dw = np.kron(rows.G, columns.G).T @ dU.reshape(-1, dU.shape[2] * dU.shape[3])
    return dw.reshape(3, 3, *dU.shape[2:])
