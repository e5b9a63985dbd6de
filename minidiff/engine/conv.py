"""Convolution, channels last, and changes of resolution.

    y[b, i, j, d] = sum_{m, n, c}  x[b, i s + m - p, j s + n - p, c]  w[m, n, c, d]  + bias[d]

with stride s, zero padding p, images (B, H, W, C) and weights (kh, kw, C_in, C_out).  (What deep learning calls a
convolution is a correlation in mathematics: the kernel is not flipped.)  y is linear in x and in w, so three sums
compute everything, and the derivatives of each are the other two:

    correlate(x, w)             y  from x and w
    correlate_dx(dy, w)         dx from dy and w        a transposed convolution computes this
    correlate_dw(x, dy)         dw from x and dy

This file has the plain algorithm: it copies all patches into the rows of one matrix (im2col), which takes one matrix
product and a buffer kh kw times as large as the image.  Two faster ones, for stride 1, are in:

    conv_winograd.py    a quarter of the multiplications, for 3 x 3 kernels
    conv_blocks.py      the same for large images and many channels, block after block on all cores
    conv_shift.py       the same multiplications without the buffer, for the others

`_fastest` chooses by shape, and a test compares all three.  On a GPU, cuda/conv.py launches our own kernels.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from minidiff.checks import whole
from minidiff.engine import conv_blocks, conv_shift, conv_winograd
from minidiff.engine.backend import narrow, xp_of
from minidiff.engine.cuda import conv as conv_cuda
from minidiff.engine.ops import as_rows, check_same_dtype, in_float32_on_cpu, mean_of, sum_dtype, sum_rows
from minidiff.engine.tensor import Tensor, is_recording, needs_gradient, record


@in_float32_on_cpu
def conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """x (B, H, W, C), w (kh, kw, C, D), bias (D,) -> (B, (H+2p-kh)//s + 1, (W+2p-kw)//s + 1, D)."""
    stride, padding = _check_conv(x, w, bias, 3, stride, padding)
    if x.shape[3] != w.shape[2]:
        raise ValueError(f"conv2d: x has {x.shape[3]} channels and w {w.shape}, (kh, kw, C_in, C_out), takes "
                         f"{w.shape[2]}")
    if min(x.shape[1] + 2 * padding - w.shape[0], x.shape[2] + 2 * padding - w.shape[1]) < 0:
        raise ValueError(f"conv2d: the kernel {w.shape[:2]} is larger than the padded image of x {x.shape}")
    flags = x.requires_grad, w.requires_grad
    if is_recording() and any(flags) and xp_of(x.data, w.data) is np \
            and _fastest(x.shape, w.shape, stride, padding) is conv_winograd:
        y, back = conv_winograd.correlate_and_back(x.data, w.data, padding, *flags)     # it reuses what y computed
        if bias is not None:
            y += bias.data
    else:
        y = correlate(x.data, w.data, stride, padding, None if bias is None else bias.data)

        def back(dy):
            return (correlate_dx(dy, w.data, x.shape, stride, padding) if x.requires_grad else None,
                    correlate_dw(x.data, dy, w.shape, stride, padding) if w.requires_grad else None)

    def pullback(dy):
        return *back(dy), *(() if bias is None else (sum_rows(dy),))
    return record(y, (x, w) if bias is None else (x, w, bias), pullback)


@in_float32_on_cpu
def upsampled_conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(upsample_nearest(x), w, bias, padding=1), without the larger image where no gradient is asked for.

    x (B, H, W, C), w (3, 3, C, D), bias (D,) -> (B, 2H, 2W, D).
    """
    _check_images("upsampled_conv2d", x, 2)
    B, H, W, C = x.shape
    fits = w.ndim == 4 and w.shape[2] == C and xp_of(x.data, w.data) is np
    if not fits or _fastest((B, 2 * H, 2 * W, C), w.shape, 1, 1, y_alone=True) is not conv_blocks \
            or needs_gradient(x, w, *(() if bias is None else (bias,))):
        return conv2d(upsample_nearest(x), w, bias, padding=1)
    _check_conv(x, w, bias, 3, 1, 1)
    return Tensor(conv_blocks.correlate_upsampled(x.data, w.data, None if bias is None else bias.data))


@in_float32_on_cpu
def conv_transpose2d(x: Tensor, w: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """The transpose of conv2d: from the shape of conv2d's result back to the shape of its input.

    x (B, H, W, D), w (kh, kw, C, D), bias (C,) -> (B, (H-1)s + kh - 2p, (W-1)s + kw - 2p, C).
    """
    stride, padding = _check_conv(x, w, bias, 2, stride, padding)
    if x.shape[3] != w.shape[3]:
        raise ValueError(f"conv_transpose2d: x has {x.shape[3]} channels and w (kh, kw, C_out, C_in) {w.shape} "
                         f"takes {w.shape[3]}")
    B, H, W, _ = x.shape
    shape = (B, (H - 1) * stride + w.shape[0] - 2 * padding, (W - 1) * stride + w.shape[1] - 2 * padding, w.shape[2])
    if min(shape[1:3]) < 1:
        raise ValueError(f"conv_transpose2d: padding {padding} leaves no pixel of x {x.shape}")
    y = correlate_dx(x.data, w.data, shape, stride, padding)
    if bias is not None:
        y += bias.data

    def pullback(dy):
        return (correlate(dy, w.data, stride, padding) if x.requires_grad else None,
                correlate_dw(dy, x.data, w.shape, stride, padding) if w.requires_grad else None,
                *(() if bias is None else (sum_rows(dy),)))
    return record(y, (x, w) if bias is None else (x, w, bias), pullback)


# --- the three sums, on arrays ----------------------------------------------------------------------------

def correlate(x, w, stride: int, padding: int, bias=None):
    """y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d]  + bias[d]."""
    if w.shape[:2] == (1, 1) and stride == 1 and padding == 0:
        y = (as_rows(x) @ w[0, 0]).reshape(*x.shape[:3], w.shape[3])
    elif xp_of(x, w) is not np:
        return conv_cuda.correlate(x, w, stride, padding, bias)
    else:
        form = _fastest(x.shape, w.shape, stride, padding, y_alone=True)
        if form is conv_blocks:
            return conv_blocks.correlate(x, w, padding, bias)
        y = form.correlate(x, w, padding) if form else plain_correlate(x, w, stride, padding)
    if bias is not None:
        y += bias
    return y


def correlate_dx(dy, w, x_shape: tuple[int, ...], stride: int, padding: int):
    """dx[b,i,j,c]: a sum over (m,n,d) and the pixels of y that depend on x[b,i,j]."""
    if w.shape[:2] == (1, 1) and stride == 1 and padding == 0:
        return (as_rows(dy) @ w[0, 0].T).reshape(x_shape)
    if xp_of(dy, w) is not np:
        return conv_cuda.correlate_dx(dy, w, x_shape, stride, padding)
    form = _fastest(x_shape, w.shape, stride, padding)
    if form:
        # at stride 1 it is a convolution of dy with the kernel rotated by 180 degrees and its channels swapped
        rotated = np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))                 # (kh, kw, D, C)
        return form.correlate(dy, rotated, w.shape[0] - 1 - padding)
    return plain_correlate_dx(dy, w, x_shape, stride, padding)


def correlate_dw(x, dy, w_shape: tuple[int, ...], stride: int, padding: int):
    """dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d]."""
    if w_shape[:2] == (1, 1) and stride == 1 and padding == 0:
        return (as_rows(x).T @ as_rows(dy)).reshape(w_shape)
    if xp_of(x, dy) is not np:
        return conv_cuda.correlate_dw(x, dy, w_shape, stride, padding)
    form = _fastest(x.shape, w_shape, stride, padding)
    return form.correlate_dw(x, dy, w_shape, padding) if form else plain_correlate_dw(x, dy, w_shape, stride, padding)


WIDE, FEW = 2 ** 17, 1024                                   # numbers of a kernel's C D; pixels of all images


def _fastest(x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: int, padding: int,
             y_alone: bool = False) -> ModuleType | None:
    """The module with the algorithm that is fastest for a shape on a CPU; None for the plain one.

    y_alone: no gradient is asked for.  Where the channels are many, blocks then take as long as whole lines, and a
    sixth of their memory: they keep V and M of one point at a time.

    Measured by `benchmarks/ops.py --forms` (2 cores of an AMD EPYC, Zen 4, 2026-11-24), for y and dw of 128 images:
    3 x 3 kernels take 57 ms by Winograd and 64 by shifts on 32 x 32 pixels, 80 and 81 on 40 x 40, 119 and 112 on
    48 x 48; 5 x 5 kernels take 48 ms both by shifts and by patches on 10 x 10 pixels.

    And for y of one image, by `benchmarks/stable_diffusion.py --forms` (2 cores of an AMD EPYC, Zen 5, 2026-12-01):
    64 x 64 pixels of 640 channels to 320 take 25 ms by blocks and 41 by patches, 32 x 32 of 1920 to 640 take 60 and 56
    (two images 69 and 108, and 67 by whole lines), 16 x 16 of 1280 to 1280 take 79 and 18.
    """
    (kh, kw, C, D), (B, H, W, _) = w_shape, x_shape
    if stride != 1 or kh != kw or padding >= kh or 0 in x_shape:
        return None
    if kh == 3:
        if C * D >= WIDE and B * H * W < FEW:               # the kernels' transform would take longer than it saves
            return None
        if max(H, W) <= conv_winograd.LONGEST and not (C * D >= WIDE and y_alone):
            return conv_winograd
        if C < 16:                                          # few channels make small patches
            return None
        if min(H, W) + 2 * padding >= 4:
            return conv_blocks
    # conv_shift also computes results beyond the edges, and these are a large share in small images
    return conv_shift if H * W >= 100 else None


# --- the plain algorithm: patches as rows -----------------------------------------------------------------

def plain_correlate(x, w, stride: int, padding: int):
    kh, kw, C, D = w.shape
    patches = _patches(_pad(x, padding), kh, kw, stride)                            # (B, Ho, Wo, kh, kw, C)
    return (patches.reshape(-1, kh * kw * C) @ w.reshape(-1, D)).reshape(*patches.shape[:3], D)


def plain_correlate_dx(dy, w, x_shape: tuple[int, ...], stride: int, padding: int):
    xp = xp_of(dy, w)
    (kh, kw, C, D), (B, H, W, _), (_, Ho, Wo, _) = w.shape, x_shape, dy.shape
    dpatches = (as_rows(dy) @ w.reshape(-1, D).T).reshape(B, Ho, Wo, kh, kw, C)
    dx = xp.zeros((B, H + 2 * padding, W + 2 * padding, C), dtype=dy.dtype)         # with its padding
    for m in range(kh):
        for n in range(kw):
            dx[:, m:m + Ho * stride:stride, n:n + Wo * stride:stride] += dpatches[:, :, :, m, n]
    return xp.ascontiguousarray(dx[:, padding:padding + H, padding:padding + W])


def plain_correlate_dw(x, dy, w_shape: tuple[int, ...], stride: int, padding: int):
    kh, kw, C, D = w_shape
    patches = _patches(_pad(x, padding), kh, kw, stride)                            # (B, Ho, Wo, kh, kw, C)
    return (patches.reshape(-1, kh * kw * C).T @ as_rows(dy)).reshape(w_shape)


def _pad(x, padding: int):
    return xp_of(x).pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))) if padding else x


def _patches(x, kh: int, kw: int, stride: int):
    """A view of all patches: (B, H, W, C) -> (B, Ho, Wo, kh, kw, C)."""
    B, H, W, C = x.shape
    b, h, w, c = x.strides
    shape = B, (H - kh) // stride + 1, (W - kw) // stride + 1, kh, kw, C
    return xp_of(x).lib.stride_tricks.as_strided(x, shape, (b, h * stride, w * stride, h, w, c))


def _check_conv(x: Tensor, w: Tensor, bias: Tensor | None, axis_out: int, stride: int,
                padding: int) -> tuple[int, int]:
    """Stride and padding as ints; ValueError or TypeError unless all fit together."""
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"convolution takes x (B, H, W, C) and w (kh, kw, C_in, C_out), not {x.shape} and {w.shape}")
    if 0 in w.shape:
        raise ValueError(f"convolution takes w with at least one element, not {w.shape}")
    if bias is not None and bias.shape != (w.shape[axis_out],):
        raise ValueError(f"convolution: bias must have shape {(w.shape[axis_out],)}, not {bias.shape}")
    check_same_dtype(x, w, *(() if bias is None else (bias,)))
    return whole("stride", stride, 1), whole("padding", padding, 0)


# --- resolution -------------------------------------------------------------------------------------------

def upsample_nearest(x: Tensor, factor: int = 2) -> Tensor:
    """Each pixel becomes a square of factor x factor copies: (B, H, W, C) -> (B, fH, fW, C)."""
    f = _check_images("upsample_nearest", x, factor)
    B, H, W, C = x.shape
    xp = xp_of(x.data)
    y = xp.broadcast_to(x.data[:, :, None, :, None], (B, H, f, W, f, C)).reshape(B, H * f, W * f, C)

    def pullback(dy):
        dx = dy.reshape(B, H, f, W, f, C).sum(axis=(2, 4), dtype=sum_dtype(dy.dtype))
        return (narrow(dx, dy.dtype),)
    return record(y, (x,), pullback)


def average_pool(x: Tensor, factor: int = 2) -> Tensor:
    """The mean of each factor x factor square: (B, H, W, C) -> (B, H/f, W/f, C)."""
    f = _check_divisible("average_pool", x, factor)
    B, H, W, C = x.shape
    xp = xp_of(x.data)
    squares = x.data.reshape(B, H // f, f, W // f, f, C)
    y = narrow(mean_of(squares, axis=(2, 4), dtype=sum_dtype(x.dtype)), x.dtype)

    def pullback(dy):
        dx = xp.broadcast_to((dy / (f * f))[:, :, None, :, None], (B, H // f, f, W // f, f, C))
        return (dx.reshape(x.shape),)
    return record(y, (x,), pullback)


def space_to_depth(x: Tensor, factor: int = 2) -> Tensor:
    """Each square of pixels becomes the channels of one pixel: (B, H, W, C) -> (B, H/f, W/f, f f C)."""
    f = _check_divisible("space_to_depth", x, factor)
    B, H, W, C = x.shape
    y = x.data.reshape(B, H // f, f, W // f, f, C).swapaxes(2, 3).reshape(B, H // f, W // f, f * f * C)
    return record(y, (x,), lambda dy: (_depth_to_space(dy, f),))


def depth_to_space(x: Tensor, factor: int = 2) -> Tensor:
    """The inverse of space_to_depth: (B, H, W, f f C) -> (B, fH, fW, C)."""
    f = _check_images("depth_to_space", x, factor)
    B, H, W, C = x.shape
    if C % (f * f):
        raise ValueError(f"depth_to_space: {C} channels are not a multiple of {f} x {f}")

    def pullback(dy):
        return (dy.reshape(B, H, f, W, f, C // (f * f)).swapaxes(2, 3).reshape(x.shape),)
    return record(_depth_to_space(x.data, f), (x,), pullback)


def _depth_to_space(x, f: int):
    B, H, W, C = x.shape
    return x.reshape(B, H, W, f, f, C // (f * f)).swapaxes(2, 3).reshape(B, H * f, W * f, C // (f * f))


def _check_images(op: str, x: Tensor, factor: int) -> int:
    """The factor as an int."""
    if x.ndim != 4:
        raise ValueError(f"{op} takes x (B, H, W, C), not {x.shape}")
    return whole(f"{op}: factor", factor, 1)


def _check_divisible(op: str, x: Tensor, factor: int) -> int:
    factor = _check_images(op, x, factor)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"{op} takes x (B, H, W, C) with H and W multiples of {factor}, not {x.shape}")
    return factor
