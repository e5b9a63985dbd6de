"""Exercise 21: the gradients of a convolution, judged by SciPy's correlation.

y is linear in x and in w.  So dL/dx[k] is sum(dy y(e_k, w)), where e_k is 1 at k and 0 elsewhere; and so is dL/dw[k].
"""

import numpy as np
from scipy import signal

from minidiff.course.compare import differs, not_tuple, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.engine import conv

CASES = [((1, 4, 4, 1), (3, 3, 1, 1), 1, 1), ((2, 4, 5, 2), (3, 2, 2, 3), 1, 0), ((1, 5, 4, 2), (3, 3, 2, 2), 2, 1),
         ((2, 6, 5, 1), (2, 3, 1, 2), 3, 2), ((1, 3, 4, 3), (1, 1, 3, 2), 1, 0)]     # of x, of w, stride, padding


def solution(x, w, dy, stride, padding):
    return (conv.plain_correlate_dx(dy, w, x.shape, stride, padding),
            conv.plain_correlate_dw(x, dy, w.shape, stride, padding))


# ---- laws --------------------------------------------------------------------------------------------------

def _y(x, w, stride, padding):
    """The convolution, by SciPy's correlation of one image with one channel of the result."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    maps = [[signal.correlate(image, w[..., d], "valid", "direct")[::stride, ::stride, 0] for d in range(w.shape[3])]
            for image in x]
    return np.moveaxis(np.array(maps), 1, 3)                                          # (B, Ho, Wo, D)


def _cases(law: int):
    rng = stream(21, law)
    for x_shape, w_shape, stride, padding in CASES:
        x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
        dy = rng.standard_normal(_y(x, w, stride, padding).shape)
        yield x, w, dy, stride, padding, f"for x {x_shape}, w {w_shape}, stride = {stride}, padding = {padding}"


def gradient_of_x(conv_backward):
    """dx[k] is the change of sum(y dy) if pixel k of x grows by 1"""
    for x, w, dy, stride, padding, where in _cases(1):
        expected = np.empty(x.shape)
        for k in np.ndindex(x.shape):
            one = np.zeros(x.shape)
            one[k] = 1
            expected[k] = (_y(one, w, stride, padding) * dy).sum()
        got = conv_backward(x, w, dy, stride, padding)
        if (said := not_tuple("dx, dw", got, 2, where)) or (said := differs("dx", got[0], expected, where)):
            return said


def gradient_of_w(conv_backward):
    """dw[k] is the change of sum(y dy) if number k of w grows by 1"""
    for x, w, dy, stride, padding, where in _cases(2):
        expected = np.empty(w.shape)
        for k in np.ndindex(w.shape):
            one = np.zeros(w.shape)
            one[k] = 1
            expected[k] = (_y(x, one, stride, padding) * dy).sum()
        if (said := differs("dw", conv_backward(x, w, dy, stride, padding)[1], expected, where)):
            return said


def keeps_the_dtype(conv_backward):
    """dx and dw have the dtype of x and w"""
    for x, w, dy, stride, padding, where in _cases(3):
        got = conv_backward(*(a.astype(np.float32) for a in (x, w, dy)), stride, padding)
        for what, a, b in zip(("dx", "dw"), got, conv_backward(x, w, dy, stride, padding), strict=True):
            if (said := differs(what, a, b, f"{where} in float32", dtype=np.float32, like="x")):
                return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _taps(w, dy, stride):
    """Each tap (m, n), with the places of the padded image that it meets."""
    Ho, Wo = dy.shape[1:3]
    for m, n in np.ndindex(w.shape[:2]):
        yield m, n, (slice(None), slice(m, m + Ho * stride, stride), slice(n, n + Wo * stride, stride))


def _padded(x, padding):
    return np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _dx(x, w, dy, stride, padding, *, add=True, crop=None):
    B, H, W, C = x.shape
    dx = np.zeros_like(_padded(x, padding))
    for m, n, places in _taps(w, dy, stride):
        dx[places] = dy @ w[m, n].T + (dx[places] if add else 0)
    return dx[:, padding:padding + H, padding:padding + W] if crop is None else crop(dx)


def _dw(x, w, dy, stride, padding, *, pad=_padded):
    dw, x = np.zeros_like(w), pad(x, padding)
    for m, n, places in _taps(w, dy, stride):
        dw[m, n] = np.einsum("bijc,bijd->cd", x[places], dy)
    return dw


def _both(x, w, dy, stride, padding, *, dx=None, dw=None):
    return (_dx(x, w, dy, stride, padding) if dx is None else dx, _dw(x, w, dy, stride, padding) if dw is None else dw)


def _dx_with_flipped_kernel(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dx=_dx(x, w[::-1, ::-1], dy, stride, padding))


def _dw_flipped(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dw=_dw(x, w, dy, stride, padding)[::-1, ::-1])


def _both_flipped(x, w, dy, stride, padding):
    return _dx(x, w[::-1, ::-1], dy, stride, padding), _dw(x, w, dy, stride, padding)[::-1, ::-1]


def _overwritten(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dx=_dx(x, w, dy, stride, padding, add=False))


def _with_its_padding(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dx=_dx(x, w, dy, stride, padding, crop=lambda dx: dx))


def _padding_cut_at_the_end(x, w, dy, stride, padding):
    H, W = x.shape[1:3]
    return _both(x, w, dy, stride, padding, dx=_dx(x, w, dy, stride, padding, crop=lambda dx: dx[:, :H, :W]))


def _edge_in_place_of_zeros(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dw=_dw(x, w, dy, stride, padding, pad=lambda x, p: np.pad(
        x, ((0, 0), (p, p), (p, p), (0, 0)), mode="edge")))


def _padding_behind(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dw=_dw(x, w, dy, stride, padding, pad=lambda x, p: np.pad(
        x, ((0, 0), (0, 2 * p), (0, 2 * p), (0, 0)))))


def _spread_without_stride(x, w, dy, stride, padding):
    return _dx(x, w, dy, 1, padding), _dw(x, w, dy, 1, padding)


def _mean_over_the_batch(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dw=_dw(x, w, dy, stride, padding) / len(x))


def _last_image_only(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding, dw=_dw(x[-1:], w, dy[-1:], stride, padding))


def _swapped(x, w, dy, stride, padding):
    return _both(x, w, dy, stride, padding)[::-1]


def probe(conv_backward):
    rng = stream(21)
    x, w, dy = rng.standard_normal((2, 7, 5, 2)), rng.standard_normal((3, 3, 2, 3)), rng.standard_normal((2, 4, 3, 3))
    return list(conv_backward(x, w, dy, 2, 1))


EXERCISE = Exercise(
    title="The gradients of a convolution", answer="conv_backward", minutes=30, chapter="10_engine",
    hint="Pad x, and make zeros of the padded shape for dx. For each tap (m, n), the places padded[:, m:m + Ho * "
         "stride:stride, n:n + Wo * stride:stride] meet dy: there dx grows by dy @ w[m, n].T, and dw[m, n] is the sum "
         "of x^T dy. At the end, cut the padding off dx.",
    solution=solution, place="minidiff/engine/conv.py plain_correlate_dx",
    laws=(gradient_of_x, gradient_of_w, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_dx_with_flipped_kernel, "dx is made with a flipped kernel: tap (m, n) of y(i, j) comes from pixel (i "
                                       "s + m - p, j s + n - p), and its cotangent goes back there"),
        Wrong(_dw_flipped, "dw is flipped: here a convolution does not flip its kernel"),
        Wrong(_both_flipped, "dx and dw are those of a convolution with a flipped kernel: here it is not flipped"),
        Wrong(_overwritten, "dx is overwritten in place of added to: a pixel lies below several places of the "
                            "kernel, and their parts add up"),
        Wrong(_with_its_padding, "dx has the gradient of the padding, too: cut it off"),
        Wrong(_padding_cut_at_the_end, "the padding is cut off dx at the end only: there are `padding` rows and "
                                       "columns on each side"),
        Wrong(_edge_in_place_of_zeros, "for dw, x is padded with its edge: it is padded with zeros"),
        Wrong(_padding_behind, "for dw, x is padded behind only: there are `padding` zeros on each side"),
        Wrong(_spread_without_stride, "the stride is not used: y(i, j) belongs to the pixels around (i s, j s)"),
        Wrong(_mean_over_the_batch, "dw is a mean over the batch: it is the sum, since w is used for every image"),
        Wrong(_last_image_only, "dw has the part of the last image only: it is the sum over the batch"),
        Wrong(_swapped, "dx and dw have changed places"),
    ))
