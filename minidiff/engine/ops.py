"""The elementary ops: each computes y and its pullback, the function dy -> dx (see tensor.py).

    y = f(x)                    dx = dy f'(x)
    z = x + y                   dx = dy = dz,  summed over the axes that broadcasting repeated
    y = sum(x)                  dx = dy, repeated along the summed axes
    z = x @ y                   dx = dz y^T,  dy = x^T dz
    y = x w + b                 dx = dy w^T,  dw = x^T dy,  db = sum(dy)
    y = softmax(x)              dx = y (dy - sum(y dy))

All arrays of an op have one floating dtype: nothing is converted silently, only by `cast`.  A Python number takes the
dtype of the op's Tensor.  float16 and bfloat16 are storage formats: an op that would round more than once, or that
sums, computes in float32 and rounds its result (`in_float32`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np

from minidiff.engine.backend import erf, is_floating, is_half, moved, narrow, plain, wide, xp_of
from minidiff.engine.cuda import activation as activation_cuda
from minidiff.engine.cuda import conv as conv_cuda
from minidiff.engine.cuda import embedding as embedding_cuda
from minidiff.engine.cuda import linear as linear_cuda
from minidiff.engine.cuda import weight_gradients as weights_cuda
from minidiff.engine.cuda.cast import cast_all
from minidiff.engine.parallel import map_rows
from minidiff.engine.tensor import Tensor, adds, needs_gradient, record, unchanged

Axes = int | tuple[int, ...] | None


# --- dtypes -------------------------------------------------------------------------------------------------

def cast(x: Tensor, dtype) -> Tensor:
    """x in another floating dtype; its gradient has x's own dtype."""
    dtype = np.dtype(dtype)
    if not (is_floating(x.dtype) and is_floating(dtype)):
        raise TypeError(f"cast takes one floating dtype to another, not {x.dtype} to {dtype}")
    return x if x.dtype == dtype else record(narrow(x.data, dtype), (x,), lambda dy: (narrow(dy, x.dtype),))


def casts_on_gpu(xs: Sequence[Tensor], dtype) -> dict[int, Tensor]:
    """id(x) -> cast(x, dtype) of the float32 leaves on a GPU, for a dtype of half precision, in one launch.

    Their gradients keep half precision, in which a weight that is used twice sums them, and `gradients` casts them in
    one launch, too.
    """
    if not is_half(np.dtype(dtype)):
        return {}
    xs = [x for x in xs if x.dtype == np.float32 and x._pullback is None and xp_of(x.data) is not np]
    return {id(x): record(y, (x,), unchanged)
            for x, y in zip(xs, cast_all([x.data for x in xs], dtype), strict=True)}


def in_float32(op: Callable) -> Callable:
    """The op, computed in float32, forward and backward, if its first Tensor has half precision."""
    def widened(a):
        return cast(a, np.float32) if isinstance(a, Tensor) else a

    @wraps(op)
    def wide_op(x, *args, **kwargs):
        dtype = x.dtype
        check_floating(op.__name__, x)
        if not is_half(dtype):
            return op(x, *args, **kwargs)
        check_same_dtype(x, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        args, kwargs = map(widened, args), {name: widened(a) for name, a in kwargs.items()}
        return cast(op(widened(x), *args, **kwargs), dtype)
    return wide_op


def in_float32_on_cpu(op: Callable) -> Callable:
    """The same, for an op that has a GPU kernel for half precision: the kernel itself sums in float32."""
    wide_op = in_float32(op)
    return wraps(op)(lambda x, *args, **kwargs: (
        wide_op if isinstance(x, Tensor) and xp_of(x.data) is np else op)(x, *args, **kwargs))


# --- arithmetic, with broadcasting ------------------------------------------------------------------------

def add(x, y) -> Tensor:
    check_floating("add", x if isinstance(x, Tensor) else y)
    x, y = _pair(x, y)
    return record(x.data + y.data, (x, y), lambda dz: (_unbroadcast(dz, x) if x.requires_grad else None,
                                                       _unbroadcast(dz, y) if y.requires_grad else None))


def sub(x, y) -> Tensor:
    check_floating("sub", x if isinstance(x, Tensor) else y)
    x, y = _pair(x, y)
    return record(x.data - y.data, (x, y), lambda dz: (_unbroadcast(dz, x) if x.requires_grad else None,
                                                       _unbroadcast(-dz, y) if y.requires_grad else None))


def mul(x, y) -> Tensor:
    check_floating("mul", x if isinstance(x, Tensor) else y)
    x, y = _pair(x, y)

    def pullback(dz):
        dx = _unbroadcast_product(dz, y.data, x) if x.requires_grad else None
        if x is y:                                          # a square: both are the same
            return dx, dx
        return dx, _unbroadcast_product(dz, x.data, y) if y.requires_grad else None
    return record(x.data * y.data, (x, y), pullback)


def div(x, y) -> Tensor:
    x, y = _pair(x, y)

    def pullback(dz):
        dz, a, b = wide(dz), wide(x.data), wide(y.data)
        # not a / b^2: the square easily becomes inf or 0
        return (narrow(_unbroadcast(dz / b, x), x.dtype) if x.requires_grad else None,
                narrow(_unbroadcast(-dz * (a / b) / b, y), y.dtype) if y.requires_grad else None)
    return record(x.data / y.data, (x, y), pullback)


@in_float32
def power(x: Tensor, n: float) -> Tensor:
    """x**n for a constant n."""
    if isinstance(n, Tensor):
        raise TypeError("power takes a constant exponent; write exp(y * log(x)) for a Tensor y")
    n = float(n)                                            # a NumPy float64 would convert x to float64
    return record(x.data ** n, (x,), lambda dy: (dy * (n * x.data ** (n - 1)) if n else 0 * dy,))


@in_float32_on_cpu
def matmul(x, y) -> Tensor:
    """x (..., M, K) @ y (..., K, N) -> (..., M, N); leading axes broadcast."""
    x, y = _pair(x, y)
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-2]:
        raise ValueError(f"matmul takes x (..., M, K) and y (..., K, N), not {x.shape} and {y.shape}")
    if y.ndim == 2:                                         # one product for all rows of x, not one for each matrix
        rows = as_rows(x.data)                              # (M', K)

        def pullback(dz):
            dz = as_rows(dz)                                # (M', N)
            return (dz @ y.data.T).reshape(x.shape) if x.requires_grad else None, \
                rows.T @ dz if y.requires_grad else None
        return record((rows @ y.data).reshape(*x.shape[:-1], y.shape[1]), (x, y), pullback)

    def pullback(dz):
        return (_unbroadcast(dz @ y.data.swapaxes(-1, -2), x) if x.requires_grad else None,
                _unbroadcast(x.data.swapaxes(-1, -2) @ dz, y) if y.requires_grad else None)
    return record(x.data @ y.data, (x, y), pullback)


@in_float32_on_cpu
def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y = x w + b on the last axis: x (..., C), w (C, D), b (D,) -> (..., D).  One op, since `add` would copy y."""
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0] or b.shape != w.shape[1:]:
        raise ValueError(f"linear takes x (..., C), w (C, D) and b (D,), not {x.shape}, {w.shape} and {b.shape}")
    check_same_dtype(x, w, b)
    if xp_of(x.data, w.data, b.data) is not np:
        return _linear_on_gpu(x, w, b)
    rows = as_rows(x.data)                                  # (M, C)
    y = rows @ w.data
    y += b.data

    def pullback(dy):
        dy = as_rows(dy)                                    # (M, D)
        dx = (dy @ w.data.T).reshape(x.shape) if x.requires_grad else None
        return (dx,
                rows.T @ dy if w.requires_grad else None,
                sum_rows(dy) if b.requires_grad else None)
    return record(y.reshape(*x.shape[:-1], w.shape[1]), (x, w, b), pullback)


def plus_linear(plus: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """plus + linear(x, w, b), the end of a residual branch, for `plus` of the result's shape; one kernel on a GPU."""
    if xp_of(plus.data, x.data, w.data, b.data) is np or plus.shape != (*x.shape[:-1], *b.shape) \
            or w.ndim != 2 or x.shape[-1] != len(w.data) \
            or not linear_cuda.is_small(as_rows(x.data).shape[0], *w.shape):
        return linear(x, w, b) + plus
    check_same_dtype(plus, x, w, b)
    return _linear_on_gpu(x, w, b, plus)


def _linear_on_gpu(x: Tensor, w: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    rows = as_rows(x.data)                                  # (M, C)
    small = linear_cuda.is_small(len(rows), *w.shape)
    if small:
        y = linear_cuda.forward(rows, w.data, b.data, None if plus is None else as_rows(plus.data))
    elif 0 < rows.size * w.shape[1] <= MIDDLING:
        y = conv_cuda.correlate(rows[None, None], w.data[None, None], 1, 0, b.data)     # a convolution of 1 x 1
    else:
        y = rows @ w.data
        y += b.data

    @adds
    def pullback(dy, held=None):
        dy_rows, dx = xp_of(dy).ascontiguousarray(as_rows(dy)), None    # (M, D); for both products below
        if x.requires_grad and small:
            dx = linear_cuda.backward(dy_rows, w.data, None if held is None else as_rows(held)).reshape(x.shape)
        elif x.requires_grad:
            dx = (dy_rows @ w.data.T).reshape(x.shape)
            dx = dx if held is None else held + dx
        weights = weights_cuda.weight_gradients(rows, dy_rows, w.requires_grad, b.requires_grad)
        return dx, *weights, *(() if plus is None else (dy,))
    return record(y.reshape(*x.shape[:-1], w.shape[1]), (x, w, b) if plus is None else (x, w, b, plus), pullback)


MIDDLING = 2 ** 28                                          # multiplications: about what two launches cost (estimated)


# --- elementwise functions --------------------------------------------------------------------------------

def exp(x: Tensor) -> Tensor:
    check_floating("exp", x)
    y = xp_of(x.data).exp(x.data)
    return record(y, (x,), lambda dy: (dy * y,))


def log(x: Tensor) -> Tensor:
    check_floating("log", x)
    return record(xp_of(x.data).log(x.data), (x,), lambda dy: (dy / x.data,))


@in_float32
def sqrt(x: Tensor) -> Tensor:
    y = xp_of(x.data).sqrt(x.data)
    return record(y, (x,), lambda dy: (dy / (2 * y),))


@in_float32
def expm1(x: Tensor) -> Tensor:
    """e^x - 1, to full precision also where x is small."""
    xp = xp_of(x.data)
    return record(xp.expm1(x.data), (x,), lambda dy: (dy * xp.exp(x.data),))


@in_float32
def tanh(x: Tensor) -> Tensor:
    # dy/dx = 1 - y^2 = 4 sigmoid(2x) sigmoid(-2x), without the rounding of 1 - y
    return record(xp_of(x.data).tanh(x.data), (x,),
                  lambda dy: (4 * dy * _sigmoid(2 * x.data) * _sigmoid(-2 * x.data),))


@in_float32
def sigmoid(x: Tensor) -> Tensor:
    y = _sigmoid(x.data)
    return record(y, (x,), lambda dy: (dy * y * _sigmoid(-x.data),))    # 1 - y, without its rounding


@in_float32
def log_sigmoid(x: Tensor) -> Tensor:
    """log(sigmoid(x)), finite for every finite x."""
    # = min(x, 0) - log(1 + e^-|x|)
    xp = xp_of(x.data)
    y = xp.minimum(x.data, 0) - xp.log1p(xp.exp(-xp.abs(x.data)))
    return record(y, (x,), lambda dy: (dy * _sigmoid(-x.data),))


def relu(x: Tensor) -> Tensor:
    return record(xp_of(x.data).maximum(x.data, 0), (x,), lambda dy: (dy * (x.data > 0),))


@in_float32_on_cpu
def silu(x: Tensor) -> Tensor:
    """y = x sigmoid(x)  (Elfwing et al. 2018)."""
    if xp_of(x.data) is not np:
        return _by_kernel("silu", x)
    return record(silu_of_half(x.data * 0.5), (x,), lambda dy: (silu_slope(x.data * 0.5) * dy,))


@in_float32_on_cpu
def gelu(x: Tensor) -> Tensor:
    """y = x Phi(x), in the tanh form (Hendrycks & Gimpel 2016, section 2)."""
    if xp_of(x.data) is not np:
        return _by_kernel("gelu", x)
    # u = sqrt(2/pi) (x + 0.044715 x^3),     y = x (1 + tanh u)/2
    c, k = math.sqrt(2 / math.pi), 0.044715
    xp = xp_of(x.data)
    z = x.data.clip(-10, 10)                                # beyond that tanh u is 1 or -1, and x^3 might overflow
    tanh_u = xp.tanh(c * z * (1 + k * z * z))

    def pullback(dy):
        du = c * (1 + 3 * k * z * z)
        return (dy * 0.5 * (1 + tanh_u + x.data * (1 - tanh_u * tanh_u) * du),)
    return record(0.5 * x.data * (1 + tanh_u), (x,), pullback)


def _by_kernel(name: str, x: Tensor) -> Tensor:
    y = activation_cuda.forward(name, x.data)
    return record(y, (x,), lambda dy: (activation_cuda.backward(name, x.data, dy),))


@in_float32
def gelu_exact(x: Tensor) -> Tensor:
    """y = x Phi(x), with the distribution function Phi of N(0, 1) (Hendrycks & Gimpel 2016, section 2)."""
    # Phi(x) = (1 + erf(x / sqrt 2)) / 2,     Phi'(x) = exp(-x^2 / 2) / sqrt(2 pi)
    xp = xp_of(x.data)

    def cumulative(x):
        Phi = (erf_in_float32 if xp is np and x.dtype == np.float32 else erf)(x * x.dtype.type(math.sqrt(0.5)))
        Phi += 1
        Phi *= 0.5
        return Phi
    if xp is np and x.ndim and x.size and not needs_gradient(x):
        return Tensor(map_rows(lambda x: x * cumulative(x), x.data))    # a piece at a time, on all cores
    Phi = cumulative(x.data)

    def pullback(dy):
        return (dy * (Phi + x.data * xp.exp(-0.5 * x.data * x.data) / math.sqrt(2 * math.pi)),)
    return record(x.data * Phi, (x,), pullback)


def absolute(x: Tensor) -> Tensor:
    xp = xp_of(x.data)
    return record(xp.abs(x.data), (x,), lambda dy: (dy * xp.sign(x.data),))


@in_float32
def clip(x: Tensor, low: float, high: float) -> Tensor:
    """x clipped to [low, high]; no gradient passes where it was clipped."""
    low, high = float(low), float(high)                     # a NumPy float64 would convert x to float64
    if not low <= high:
        raise ValueError(f"clip: low must be at most high, not {low} and {high}")
    return record(x.data.clip(low, high), (x,), lambda dy: (dy * ((x.data >= low) & (x.data <= high)),))


def where(condition, x, y) -> Tensor:
    """x where condition (a boolean array), else y."""
    (x, y), condition = _pair(x, y), plain(condition)
    if condition.dtype != bool:
        raise TypeError(f"where takes a condition of bools, not {condition.dtype}")
    xp = xp_of(condition, x.data)
    condition = _own(condition)

    def pullback(dz):
        return (_unbroadcast(xp.where(condition, dz, 0), x) if x.requires_grad else None,
                _unbroadcast(xp.where(condition, 0, dz), y) if y.requires_grad else None)
    return record(xp.where(condition, x.data, y.data), (x, y), pullback)


# --- reductions -------------------------------------------------------------------------------------------

@in_float32
def sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:  # noqa: A001  (the field's name)
    xp = xp_of(x.data)

    def pullback(dy):
        return (xp.broadcast_to(_restore(dy, x, axis, keepdims), x.shape),)
    return record(xp.asarray(x.data.sum(axis=axis, keepdims=keepdims)), (x,), pullback)


@in_float32
def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    _check_not_empty("mean", x, axis)
    xp = xp_of(x.data)
    y = xp.asarray(mean_of(x.data, axis, keepdims))
    n = x.size // max(y.size, 1)                            # elements in each mean

    def pullback(dy):
        return (xp.broadcast_to(_restore(dy, x, axis, keepdims) / n, x.shape),)
    return record(y, (x,), pullback)


@in_float32
def maximum_of(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    """The largest element along an axis; ties share the gradient equally."""
    _check_not_empty("maximum_of", x, axis)
    xp = xp_of(x.data)
    y = x.data.max(axis=axis, keepdims=True)

    def pullback(dy):
        chosen = x.data == y
        return (_restore(dy, x, axis, keepdims) * chosen / chosen.sum(axis=axis, keepdims=True).astype(x.dtype),)
    return record(xp.asarray(y if keepdims else y.squeeze(axis)), (x,), pullback)


# --- shapes -----------------------------------------------------------------------------------------------

def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return record(x.data.reshape(shape), (x,), lambda dy: (dy.reshape(x.shape),))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    back = np.argsort([a % x.ndim for a in axes])
    return record(x.data.transpose(axes), (x,), lambda dy: (dy.transpose(back),))


def concat(xs: Sequence[Tensor], axis: int = -1) -> Tensor:
    if not xs:
        raise ValueError("concat takes at least one Tensor")
    xp = xp_of(*(x.data for x in xs))
    ends = np.cumsum([x.shape[axis] for x in xs])[:-1].tolist()
    check_same_dtype(*xs)
    return record(xp.concatenate([x.data for x in xs], axis=axis), xs, lambda dy: xp.split(dy, ends, axis=axis))


def getitem(x: Tensor, index) -> Tensor:
    """x[index] for ints, slices, None, boolean masks and integer arrays; gradients of a repeated index add up."""
    xp = xp_of(x.data)
    index = _own(index) if xp is np else index

    def pullback(dy):
        dx = xp.zeros(x.shape, sum_dtype(x.dtype))
        if _is_basic(index):
            dx[index] = dy
        elif xp is np:
            np.add.at(dx, index, dy)
        else:
            xp.add.at(dx, index, wide(dy))
        return (narrow(dx, x.dtype),)
    return record(xp.asarray(x.data[index]), (x,), pullback)


def embedding(table: Tensor, ids) -> Tensor:
    """table (V, C), ids (...) int -> (..., C): row ids[...] of the table.

    ids should be on the host, even if the table is on a GPU: they are checked, and on a GPU that means to wait.
    """
    ids = plain(ids)
    _check_ids("embedding takes ids", ids, table.shape[0])
    xp = xp_of(table.data)
    ids = _own(ids) if xp is np else moved(ids, table.data)

    def pullback(dy):
        if xp is not np:                                    # CuPy's add.at adds in a different order each time
            return (embedding_cuda.embedding_backward(ids, dy, table.shape[0]),)
        dtable = xp.zeros(table.shape, sum_dtype(dy.dtype))                         # (V, C)
        xp.add.at(dtable, ids.reshape(-1), dy.reshape(-1, table.shape[1]))
        return (narrow(dtable, dy.dtype),)
    return record(table.data[ids], (table,), pullback)


# --- softmax, cross entropy, dropout ----------------------------------------------------------------------

@in_float32
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    _check_not_empty("softmax", x, axis)
    y = _softmax(x.data, axis)
    return record(y, (x,), lambda dy: (y * (dy - (y * dy).sum(axis=axis, keepdims=True)),))


@in_float32
def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    _check_not_empty("log_softmax", x, axis)
    xp = xp_of(x.data)
    y = x.data - x.data.max(axis=axis, keepdims=True)       # then no exponential overflows
    y = y - xp.log(xp.exp(y).sum(axis=axis, keepdims=True))

    def pullback(dy):
        return (dy - xp.exp(y) * dy.sum(axis=axis, keepdims=True),)
    return record(y, (x,), pullback)


def cross_entropy(logits: Tensor, labels, weight=None) -> Tensor:
    """Mean of -log softmax(logits)[label], in nats.  logits (..., K), labels (...) int of 0..K-1 -> ().

    weight: an array of labels' shape.  The result is then the sum of weight times -log softmax(logits)[label]; what
    stands at a weight of 0 has no influence.
    """
    labels = plain(labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or (weight is not None and weight.shape != labels.shape):
        raise ValueError("cross_entropy takes logits (..., K), with labels and weight (...), not "
                         f"{logits.shape}, {labels.shape} and {'no weight' if weight is None else weight.shape}")
    _check_ids("cross_entropy takes labels", labels, logits.shape[-1])
    xp = xp_of(logits.data)
    rows, labels = xp.arange(labels.size), xp.asarray(labels.reshape(-1))
    logits = reshape(logits, (len(rows), logits.shape[-1]))
    if weight is not None:
        weight = xp.asarray(_own(weight).reshape(-1), dtype=logits.dtype)
        logits = where(weight[:, None] != 0, logits, 0.0)   # 0 times NaN or -inf would be NaN
    log_p = getitem(log_softmax(logits), (rows, labels))
    return -mean(log_p) if weight is None else -sum(log_p * Tensor(weight))


def dropout(x: Tensor, p: float, rng: np.random.Generator | None) -> Tensor:
    """Each element is 0 with probability p, else x/(1-p).  rng None (evaluation) or p = 0: x itself."""
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), not {p}")
    if rng is None or p == 0:
        return x
    xp = xp_of(x.data)
    scale = xp.asarray((rng.random(x.shape, dtype=np.float32) >= p) / np.float32(1 - p)).astype(x.dtype)
    return record(x.data * scale, (x,), lambda dy: (dy * scale,))


# --- what the ops share -----------------------------------------------------------------------------------

def _pair(x, y) -> tuple[Tensor, Tensor]:
    """Both as Tensors of one dtype; a bare number takes the Tensor's."""
    if not isinstance(x, Tensor):
        x = _like(x, y)
    if not isinstance(y, Tensor):
        y = _like(y, x)
    check_same_dtype(x, y)
    return x, y


def _like(number, x: Tensor) -> Tensor:
    if type(number) not in (int, float):
        keeps, number = hasattr(number, "dtype"), plain(number)
        if number.ndim and keeps:                           # an array keeps its dtype, which must match
            return Tensor(number)
    if not is_floating(x.dtype) and not isinstance(number, (int, np.integer)):
        raise TypeError(f"a Tensor of {x.dtype} does not take the number {number!r}: convert it to a floating dtype")
    if xp_of(x.data) is not np and x.dtype.kind != "V":     # "V" is bfloat16's kind
        value = x.dtype.type(number)                        # a number is a kernel's argument; an array would be copied
    else:
        value = xp_of(x.data).asarray(number, dtype=x.dtype)
    if isinstance(number, int | float | np.number) and number and not x.dtype.type(number):     # on the host
        raise ValueError(f"the number {number!r} is 0 in {x.dtype}: cast the Tensor to float32 or float64 first")
    return Tensor(value)


def check_floating(op: str, x) -> None:
    """TypeError for whole numbers, whose arithmetic wraps around: -x is 254 for the uint8 x = 2."""
    if not is_floating(x.dtype):
        raise TypeError(f"{op} takes a floating dtype, not {x.dtype}: convert x, images with pixels.to_float")


def check_same_dtype(*xs: Tensor) -> None:
    """TypeError unless the Tensors have one dtype."""
    if any(x.dtype != xs[0].dtype for x in xs):
        raise TypeError(f"an op takes one dtype, not {' and '.join(str(x.dtype) for x in xs)}: convert one of them")


def _check_not_empty(op: str, x: Tensor, axis: Axes) -> None:
    """ValueError where there is no element along the axes, of which there is no mean and no largest."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if 0 in x.shape and any(x.shape[a] == 0 for a in axes):
        raise ValueError(f"{op} takes at least one element along axis {axis}, not x {x.shape}")


def _check_ids(takes: str, ids, count: int) -> None:
    """Raises for ids outside 0..count-1.  NumPy would silently take -1 as the last row."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{takes} that are whole numbers, not {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= count):
        raise IndexError(f"{takes} of 0..{count - 1}, not {int(ids.min())}..{int(ids.max())}")


def _unbroadcast(dz, x: Tensor):
    """Sums dz over the axes along which broadcasting repeated x."""
    if dz.shape == x.shape:
        return dz
    extra = dz.ndim - x.ndim
    repeated = tuple(i + extra for i, n in enumerate(x.shape) if n == 1 and dz.shape[i + extra] != 1)
    axes = (*range(extra), *repeated)
    return narrow(dz.sum(axis=axes, dtype=sum_dtype(dz.dtype), keepdims=True).reshape(x.shape), dz.dtype)


def as_rows(x):
    """(..., C) -> (M, C)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1, which NumPy cannot tell where C is 0


def _unbroadcast_product(dz, y, x: Tensor):
    """`_unbroadcast` of dz y; half precision is multiplied in float32 if it is then summed."""
    if dz.shape == x.shape:
        return dz * y
    return narrow(_unbroadcast(wide(dz) * wide(y), x), x.dtype)


def mean_of(x, axis: Axes = None, keepdims: bool = False, dtype=None):
    """x.mean(axis), finite also where the sum is not.  A GPU does not test for that, since it would wait."""
    with np.errstate(over="ignore"):
        y = x.mean(axis=axis, keepdims=keepdims, dtype=dtype)
    if xp_of(x) is np and x.size and not np.isfinite(y).all():
        n = np.asarray(x.size // np.size(y), y.dtype)
        y = np.where(np.isfinite(y), y, (x / n).sum(axis=axis, keepdims=keepdims, dtype=dtype))
    return y


def sum_rows(x):
    """(..., C) -> (C,), as a product with ones, for which BLAS reads x once and in order; on a GPU by a kernel.

    It is the gradient of a bias: in a pullback on a GPU, the array may be filled later (cuda/weight_gradients.py).
    """
    rows = as_rows(x)
    return weights_cuda.sum_of_rows(rows) if xp_of(x) is not np else (np.ones((1, len(rows)), dtype=x.dtype) @ rows)[0]


def sum_dtype(dtype):
    """The dtype in which numbers of `dtype` are added: float32 for half precision, otherwise the same."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def _restore(dy, x: Tensor, axis: Axes, keepdims: bool):
    """A reduction's cotangent with the reduced axes restored, with length 1."""
    if keepdims:
        return dy
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {operator.index(a) % x.ndim for a in axes}
    return dy.reshape([1 if i in axes else n for i, n in enumerate(x.shape)])


def _is_basic(index) -> bool:
    """Whether an index selects each element at most once, by slices and ints alone."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in parts)


def _own(index):
    """The index with copies of its arrays, which their owner may change before the backward pass.

    Those on a GPU are not copied, since each copy would cost a launch.
    """
    if isinstance(index, tuple | list):
        return (tuple if isinstance(index, tuple) else list)(map(_own, index))
    return index.copy() if isinstance(index, np.ndarray) else index


def silu_of_half(h):
    """silu(2 h) of an array h."""
    # sigmoid(x) = (1 + u)/2  with  h = x/2, u = tanh(h):     y = h (1 + u)
    y = xp_of(h).tanh(h)
    y *= h
    y += h
    return y


def silu_slope(h):
    """The derivative of silu at 2 h; overwrites h."""
    # dy/dx = (1 + u)/2 (1 + h (1 - u)),  u = tanh(h)
    u = xp_of(h).tanh(h)
    h -= h * u
    h += 1
    u += 1
    h *= u
    h *= 0.5
    return h


# erf(x) = tanh(x P(x^2)) for |x| < 4, to 6e-8: the P of degree 6 with the least largest error (Lawson's method)
ERF = (1.12837971, 1.02765482e-1, -1.84384127e-4, -6.25719015e-4, 8.97122809e-5, -5.98561857e-6, 1.58954312e-7)


def erf_in_float32(x):
    """erf of a float32 array of NumPy, to 2e-7: five times as fast as SciPy's, which computes each number by itself."""
    x = np.clip(x, -5, 5)                                   # from 4 on erf is 1 in float32, and so is the tanh
    square = x * x
    y = np.full_like(x, ERF[-1])
    for coefficient in ERF[-2::-1]:
        y *= square
        y += np.float32(coefficient)
    y *= x
    return np.tanh(y, out=y)


def _sigmoid(x):
    # sigmoid(x) = 1/(1 + e^-x) = e^x/(1 + e^x), of which one never overflows, and both keep their digits
    xp = xp_of(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0, e, 1) / (1 + e)


def _softmax(x, axis: int):
    xp = xp_of(x)
    y = xp.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


def _install_operators() -> None:
    """Gives Tensor its operators: x + y, x @ y, x[i], ..."""
    Tensor.__add__, Tensor.__radd__ = add, lambda x, y: add(y, x)
    Tensor.__sub__, Tensor.__rsub__ = sub, lambda x, y: sub(y, x)
    Tensor.__mul__, Tensor.__rmul__ = mul, lambda x, y: mul(y, x)
    Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda x, y: div(y, x)
    Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda x, y: matmul(y, x)
    Tensor.__neg__ = lambda x: mul(x, -1)
    Tensor.__pow__ = power
    Tensor.__getitem__ = getitem
    Tensor.sum, Tensor.mean = sum, mean
    Tensor.reshape = lambda x, *shape: reshape(x, shape[0] if isinstance(shape[0], tuple) else shape)
    Tensor.transpose = lambda x, *axes: transpose(x, axes)


_install_operators()
