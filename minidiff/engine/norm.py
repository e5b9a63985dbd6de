"""Group norm and layer norm.

    x_hat = (x - mean) / sqrt(var + eps)            mean, var over the group
    y     = gamma x_hat + beta

Group norm (Wu & He 2018) takes the mean and the variance over all pixels of an image and the channels of one of G
groups; layer norm (Ba et al. 2016) over the channels of one token.  gamma and beta are (C,), or (B, C) if each sample
has its own: this adaptive norm is how the time and the caption enter a UNet.

For an image, both passes are affine in each channel, y = a (x - mean) + b and dx = a dy + p (x - mean) + q, with
coefficients (B, C) that come from a few sums.  So the backward pass keeps only x, mean and rstd, and no x_hat.

A SiLU often follows.  It is applied before the result is stored, and the backward pass computes
z = gamma x_hat + beta again from x.  That saves the memory of z and takes about the same time (8.5 ms, and 8.2 ms as
two ops, for 128 images of 14 x 14 x 64).  On a GPU the kernels launched by cuda/norm.py compute both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from minidiff.checks import whole
from minidiff.engine import ops
from minidiff.engine.backend import narrow, wide, xp_of
from minidiff.engine.cuda import norm as norm_cuda
from minidiff.engine.ops import check_same_dtype
from minidiff.engine.parallel import map_rows, parallel_map, pieces
from minidiff.engine.tensor import Tensor, adds, needs_gradient, record


def group_norm(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, eps: float = 1e-5, *,
               silu: bool = False) -> Tensor:
    """x (B, ..., C), gamma and beta (C,) or (B, C) -> (B, ..., C), or its silu.  C must be a multiple of groups."""
    B, C = x.shape[0], x.shape[-1]
    groups = whole("groups", groups, 1)
    if C % groups:
        raise ValueError(f"group_norm: {C} channels do not divide into {groups} groups")
    if gamma.shape not in ((C,), (B, C)) or beta.shape != gamma.shape:
        raise ValueError(f"group_norm: gamma and beta must both be {(C,)} or {(B, C)}, not {gamma.shape}, {beta.shape}")
    check_same_dtype(x, gamma, beta)
    xp = xp_of(x.data, gamma.data, beta.data)
    if xp is not np:
        return _group_norm_on_gpu(x, groups, gamma, beta, eps, silu)
    N = math.prod(x.shape[1:-1])
    if N * C >= LARGE and gamma.ndim == 1 and not needs_gradient(x, gamma, beta):
        y = _group_norm_in_pieces(wide(x.data).reshape(B, N, C), groups, wide(gamma.data), wide(beta.data), eps, silu)
        if y is not None:
            return Tensor(narrow(y.reshape(x.shape), x.dtype))
    rows, g, b = wide(x.data).reshape(B, N, C), wide(gamma.data), wide(beta.data)     # (B, N, C)
    n = max(N * C // groups, 1)                             # elements of a group; 1 where there are none

    def per_group(sums):
        """(B, C) sums over pixels -> the sums of each channel's whole group, (B, C)."""
        sums = sums.reshape(B, groups, C // groups).sum(axis=2, keepdims=True)
        return xp.broadcast_to(sums, (B, groups, C // groups)).reshape(B, C)

    def centred_and_std(rows, eps):
        # mean = sum x / n,   var = sum (x - mean)^2 / n  (in two passes: a large mean would cost var its digits)
        mean = per_group(_sum_pixels(rows)) / n                                     # (B, C)
        y = rows - mean[:, None]
        var = per_group(_sum_products(y, y)) / n                                    # (B, C)
        return mean, y, xp.sqrt(var + eps)

    scale = None
    with np.errstate(over="ignore", invalid="ignore"):
        mean, y, std = centred_and_std(rows, eps)
    out = _out_of_range(mean, std)
    if out.any():
        def largest(x):
            return np.abs(x).max(axis=1).reshape(B, groups, -1).max(axis=2).repeat(C // groups, axis=1)[:, None]
        rows, eps, scale = _conditioned(rows, eps, out[:, None], largest,
                                        lambda x: (per_group(_sum_pixels(x)) / n)[:, None])
        mean, y, std = centred_and_std(rows, eps[:, 0])
    rstd = 1 / std                                                                  # (B, C)

    def affine(centred, out=None):
        """z = gamma (x - mean) rstd + beta, or z / 2 if a SiLU follows: `silu_of_half` takes half its argument."""
        half = 0.5 if silu else 1.0
        z = xp.multiply(centred, (half * g * rstd)[:, None], out=out)
        z += half * (b[:, None] if b.ndim == 2 else b)
        return z
    y = affine(y, out=y)
    if silu:
        y = ops.silu_of_half(y)

    def pullback(dy):
        dy = wide(dy).reshape(B, N, C)
        centred = rows - mean[:, None]                                              # (B, N, C)
        if silu:
            dy = ops.silu_slope(affine(centred)) * dy                               # dz
        sum_dy = _sum_pixels(dy)                                                    # (B, C)
        sum_dy_xhat = _sum_products(dy, centred) * rstd                             # (B, C)
        dgamma, dbeta = sum_dy_xhat, sum_dy
        if gamma.ndim == 1:
            dgamma, dbeta = dgamma.sum(axis=0), dbeta.sum(axis=0)
        dx = None
        if x.requires_grad:
            # dx_hat = gamma dy,   dx = rstd (dx_hat - mean(dx_hat) - x_hat mean(dx_hat x_hat))
            m0 = per_group(g * sum_dy) / n                                          # mean(dx_hat)
            m1 = per_group(g * sum_dy_xhat) / n                                     # mean(dx_hat x_hat)
            a, p, q = g * rstd, -rstd * rstd * m1, -rstd * m0
            # dx = a dy + p (x - mean) + q
            dx = centred
            dx *= p[:, None]
            dx += q[:, None]
            dx += dy * a[:, None]
            if scale is not None:
                dx /= scale
            dx = narrow(dx.reshape(x.shape), x.dtype)
        return dx, narrow(dgamma, x.dtype), narrow(dbeta, x.dtype)
    return record(narrow(y.reshape(x.shape), x.dtype), (x, gamma, beta), pullback)


def modulated_group_norm(x: Tensor, groups: int, gamma_beta: Tensor, eps: float = 1e-5, *,
                         silu: bool = False) -> Tensor:
    """y = gamma x_hat + beta, or its silu: x (B, ..., C), gamma and beta side by side (B, 2 C) -> (B, ..., C)."""
    C = x.shape[-1]
    if gamma_beta.shape != (x.shape[0], 2 * C):
        raise ValueError(f"modulated_group_norm: gamma_beta must be {(x.shape[0], 2 * C)}, not {gamma_beta.shape}")
    if xp_of(x.data, gamma_beta.data) is np:
        return group_norm(x, groups, gamma_beta[:, :C], gamma_beta[:, C:], eps, silu=silu)
    check_same_dtype(x, gamma_beta)
    # the same without slices, whose way back writes zeros: gamma and beta stay, and come back, as halves of one array
    both = gamma_beta.data                                                          # (B, 2 C)
    gamma, beta = both[:, :C], both[:, C:]
    y, mean, rstd = norm_cuda.group_norm(x.data, groups, gamma, beta, eps, silu)

    @adds
    def pullback(dy, plus=None):
        dx, dboth = norm_cuda.group_norm_backward_of_pairs(x.data, dy, groups, gamma, beta, mean, rstd, silu, plus)
        return dx, dboth.reshape(both.shape)
    return record(y, (x, gamma_beta), pullback)


def one_and_zero(like, C: int):
    """The gamma_beta that changes nothing, C ones and C zeros for each row of the array `like` (B, ...): (B, 2 C)."""
    if xp_of(like) is np:
        return _one_and_zero(len(like), C, like.dtype)
    import cupy
    return _one_and_zero_on_gpu(cupy.cuda.Device().id, len(like), C, like.dtype)


def _one_and_zero(B: int, C: int, dtype) -> np.ndarray:
    return np.tile(np.repeat(np.array([1, 0], dtype), C), (B, 1))


@functools.lru_cache(maxsize=64)
def _one_and_zero_on_gpu(device: int, B: int, C: int, dtype):
    """On the current GPU, whose number is `device`; it stays there, for every step needs it."""
    import cupy
    return cupy.asarray(_one_and_zero(B, C, dtype))


LARGE = 2 ** 22                                             # numbers of an image: 16 MB; smaller ones gain nothing


def _group_norm_in_pieces(x, groups: int, g, b, eps: float, silu: bool):
    """The same of x (B, N, C) without a gradient: a piece of pixels at a time, on all cores.

    x is read three times and y is written once; the plain form above reads and writes it about ten times.  None where
    the numbers need the care of `_conditioned`.
    """
    B, N, C = x.shape
    n = N * C // groups
    places = [(i, piece) for i in range(B) for piece in pieces(N, C)]
    y = np.empty_like(x)

    def per_group(sums):
        """(pieces, C) sums -> (B, C): the sums of each channel's whole group."""
        sums = np.array(sums).reshape(B, -1, groups, C // groups).sum(axis=(1, 3))                  # (B, groups)
        return sums.repeat(C // groups, axis=1)

    def sum_of(place):
        return _sum_pixels(x[place][None])[0]

    def sum_of_squares(place):
        centred = x[place] - mean[place[0]]
        return _sum_products(centred[None], centred[None])[0]

    def apply(place):
        z = np.subtract(x[place], mean[place[0]], out=y[place])
        z *= a[place[0]]
        z += b
        if silu:
            y[place] = ops.silu_of_half(z)

    with np.errstate(over="ignore", invalid="ignore"):
        mean = per_group(parallel_map(sum_of, places)) / n                          # (B, C)
        std = np.sqrt(per_group(parallel_map(sum_of_squares, places)) / n + eps)
    if _out_of_range(mean, std).any():
        return None
    if silu:                                                # `silu_of_half` takes half its argument
        g, b = g / 2, b / 2
    a = g / std
    parallel_map(apply, places)
    return y


def _group_norm_on_gpu(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, eps: float, silu: bool) -> Tensor:
    y, mean, rstd = norm_cuda.group_norm(x.data, groups, gamma.data, beta.data, eps, silu)

    @adds
    def pullback(dy, plus=None):
        return norm_cuda.group_norm_backward(x.data, dy, groups, gamma.data, beta.data, mean, rstd, silu, plus)
    return record(y, (x, gamma, beta), pullback)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """x (..., C), gamma and beta (C,) -> (..., C)."""
    C = x.shape[-1]
    if C < 1 or gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"layer_norm: gamma and beta must be {(max(C, 1),)}, not {gamma.shape} and {beta.shape}")
    check_same_dtype(x, gamma, beta)
    xp = xp_of(x.data, gamma.data, beta.data)
    if xp is not np:
        return _layer_norm_on_gpu(x, gamma, beta, eps)
    if x.ndim > 2 and x.size >= LARGE and not needs_gradient(x, gamma, beta):
        return Tensor(map_rows(lambda rows: layer_norm(Tensor(rows), gamma, beta, eps).data, x.data))

    def mean(x):
        return x.mean(axis=-1, keepdims=True)

    def centred_and_std(x, eps):
        m = x @ ones
        x_hat = x - m
        var = np.einsum("...c,...c->...", x_hat, x_hat)[..., None] / C
        return m, x_hat, np.sqrt(var + eps)

    rows, g, scale = wide(x.data), wide(gamma.data), None
    ones = np.full((C, 1), 1 / C, dtype=rows.dtype)         # a mean as a product is twice as fast
    with np.errstate(over="ignore", invalid="ignore"):
        m, x_hat, std = centred_and_std(rows, eps)
    out = _out_of_range(m, std)
    if out.any():
        rows, eps, scale = _conditioned(rows, eps, out, lambda x: np.abs(x).max(axis=-1, keepdims=True), mean)
        _, x_hat, std = centred_and_std(rows, eps)
    rstd = 1 / std
    x_hat *= rstd

    def pullback(dy):
        dy = wide(dy)
        dx_hat = dy * g
        dx = rstd * (dx_hat - dx_hat.mean(axis=-1, keepdims=True)
                     - x_hat * (dx_hat * x_hat).mean(axis=-1, keepdims=True))
        if scale is not None:
            dx /= scale
        dgamma, dbeta = (dy * x_hat).reshape(-1, C).sum(axis=0), dy.reshape(-1, C).sum(axis=0)
        return narrow(dx, x.dtype), narrow(dgamma, x.dtype), narrow(dbeta, x.dtype)
    y = x_hat * g
    y += wide(beta.data)
    return record(narrow(y, x.dtype), (x, gamma, beta), pullback)


def _layer_norm_on_gpu(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    y, mean, rstd = norm_cuda.layer_norm(x.data, gamma.data, beta.data, eps)

    @adds
    def pullback(dy, plus=None):
        return norm_cuda.layer_norm_backward(x.data, dy, gamma.data, mean, rstd, plus)
    return record(y, (x, gamma, beta), pullback)


# --- means and variances that the plain way would lose ----------------------------------------------------

FAR = 1000                                                  # standard deviations; float32 has 7 digits


def _out_of_range(mean, std):
    """Where squares are out of range, or the variance is lost in the digits of a mean that is far from 0."""
    return ~((np.abs(mean) <= FAR * std) & (std < _limit(std.dtype)))


def _conditioned(x, eps: float, where, largest: Callable, mean: Callable):
    """x centred and scaled, eps for it, and the scale: norm(x, eps) = norm((x - c) / s, eps / s^2) for all c and s.

    where: the groups that need it; the others keep every bit, so that one sample does not depend on another.
    largest, mean: functions of x, the largest |x| and the mean of what is normalised together.
    """
    power = np.where(where, np.maximum(np.frexp(largest(x))[1] - 1, 0), 0)
    p = np.ldexp(np.ones(power.shape, x.dtype), power)      # powers of 2, by which one divides without rounding
    x = x / p
    for _ in range(2):                                      # the second time the mean is the rounding of the first
        x = x - np.where(where, mean(x), 0)
    s = np.where(largest(x) > _limit(x.dtype) / p, p, 1).astype(x.dtype)            # 1 where squares are in range
    scaled_eps = np.maximum((eps ** 0.5 / s) ** 2, np.finfo(x.dtype).tiny)
    return x * (p / s), np.where(s == 1, x.dtype.type(eps), scaled_eps), s


def _limit(dtype) -> float:
    return float(np.finfo(dtype).max) ** 0.25               # sums of squares up to this are far from overflow


def _sum_pixels(x):
    """(B, N, C) -> (B, C), as a product with ones, for which BLAS reads x once and in order."""
    ones = xp_of(x).ones((1, x.shape[1]), dtype=x.dtype)
    return (ones @ x)[:, 0]


def _sum_products(x, y):
    """sum_n x[b, n, c] y[b, n, c], (B, C)."""
    return xp_of(x).einsum("bnc,bnc->bc", x, y)
