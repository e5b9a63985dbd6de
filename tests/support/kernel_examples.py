"""One small launch of every kernel, with sizes that do not fill its tiles, for tests and tools that run all kernels."""

from collections.abc import Callable, Iterator

import numpy as np

from minidiff.engine.cuda import activation as activation_cuda
from minidiff.engine.cuda import attention as attention_cuda
from minidiff.engine.cuda import conv as conv_cuda
from minidiff.engine.cuda import embedding as embedding_cuda
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda import linear as linear_cuda
from minidiff.engine.cuda import norm as norm_cuda
from minidiff.engine.cuda import pixel_mixture as pixel_mixture_cuda
from minidiff.engine.cuda import reduce as reduce_cuda
from minidiff.engine.cuda.random import DeviceSampleStreams


def _normal(xp, dtype: str, *shapes: tuple[int, ...]) -> list:
    rng = np.random.default_rng(0)
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (it makes NumPy know the name)
    return [xp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def conv(xp, dtype: str, version: int) -> None:
    """3 x 3, stride 2 and 1, channels that are not a multiple of 4, a tile that is not full."""
    for stride, shape, w_shape, splits in ((2, (2, 5, 7, 5), (3, 3, 5, 7), 1), (1, (1, 9, 8, 8), (3, 3, 8, 36), 3)):
        x, w, bias = _normal(xp, dtype, shape, w_shape, w_shape[3:])
        y = conv_cuda.correlate(x, w, stride, 1, bias, silu=True, version=version, splits=splits)
        conv_cuda.correlate_dx(y, w, x.shape, stride, 1, version=version, splits=splits)
        conv_cuda.correlate_dw(x, y, w.shape, stride, 1, version=version, splits=splits)


def attention_forward(xp, dtype: str, version: int) -> None:
    for N, M, d, causal in ((37, 19, 24, False), (70, 70, 16, True), (33, 20, 100, False)):
        q, k, v = _normal(xp, dtype, (1, 2, N, d), (1, 2, M, d), (1, 2, M, d))
        mask = xp.asarray(np.random.default_rng(1).random((1, 1, N, M)) < 0.7)
        attention_cuda.forward(q, k, v, None if causal else mask, causal, d**-0.5, version=version)


def attention_backward(xp, dtype: str, version: int) -> None:
    for N, M, d, causal in ((37, 19, 24, False), (70, 70, 16, True), (33, 20, 100, False)):
        q, k, v = _normal(xp, dtype, (1, 2, N, d), (1, 2, M, d), (1, 2, M, d))
        mask = None if causal else xp.asarray(np.random.default_rng(1).random((1, 1, N, M)) < 0.7)
        y, lse = attention_cuda.forward(q, k, v, mask, causal, d**-0.5)
        attention_cuda.backward(q, k, v, mask, causal, d**-0.5, y, lse, y, version=version)


def group_norm(xp, dtype: str, version: int) -> None:
    for shape, groups in (((2, 5, 7, 12), 3), ((1, 3, 3, 40), 4)):
        x, gamma, beta = _normal(xp, dtype, shape, shape[3:], shape[3:])
        y, mean, rstd = norm_cuda.group_norm(x, groups, gamma, beta, 1e-5, True, version=version)
        norm_cuda.group_norm_backward(x, y, groups, gamma, beta, mean, rstd, True, version=version)


def layer_norm(xp, dtype: str, version: int) -> None:
    for shape in ((5, 7), (3, 40)):
        x, gamma, beta = _normal(xp, dtype, shape, shape[1:], shape[1:])
        y, mean, rstd = norm_cuda.layer_norm(x, gamma, beta, 1e-5, version=version)
        norm_cuda.layer_norm_backward(x, y, gamma, mean, rstd, version=version)


def normal(xp, dtype: str, version: int) -> None:
    DeviceSampleStreams(0, 3).normal((5, 7), dtype, version=version)


def sum_partials(xp, dtype: str, version: int) -> None:
    """The second half of a sum that several blocks share."""
    partial, result = _normal(xp, dtype, (3, 300), (10, 30))
    reduce_cuda.sum_partials(partial.astype(reduce_cuda.accumulator_dtype(result.dtype)), result)


def sum_rows(xp, dtype: str, version: int) -> None:
    """Several blocks share each group of columns, of which the last is not full."""
    x, = _normal(xp, dtype, (200, 37))
    reduce_cuda.sum_rows(x)


def activation(xp, dtype: str, version: int) -> None:
    x, dy = _normal(xp, dtype, (5, 61), (5, 61))
    for name in activation_cuda.NAMES:
        activation_cuda.forward(name, x)
        activation_cuda.backward(name, x, dy)


def linear(xp, dtype: str, version: int) -> None:
    """Tiles that are not full, in all three sizes."""
    x, w, b, y = _normal(xp, dtype, (35, 41), (41, 37), (37,), (35, 37))
    linear_cuda.forward(x, w, b, y)
    linear_cuda.backward(y, w, x)


def embedding_backward(xp, dtype: str, version: int) -> None:
    """70 ids of 11 rows, most of them several times, and 37 columns."""
    dy, = _normal(xp, dtype, (70, 37))
    embedding_cuda.embedding_backward(xp.asarray(np.random.default_rng(1).integers(0, 11, 70)), dy, 11)


def pixel_mixture(xp, dtype: str, version: int) -> None:
    """Two samples of 3 x 25 pixels of 2 channels."""
    out, x, dy = _normal(xp, dtype, (2, 3, 25, 8), (2, 3, 25, 2), (2, 3, 25, 2))
    alpha, sigma = (xp.asarray(np.array(c).astype(dtype)) for c in ([0.8, 0.6], [0.6, 0.8]))
    pixel_mixture_cuda.forward(out, x, alpha, sigma)
    pixel_mixture_cuda.backward(out, x, alpha, sigma, dy)


# These get their arrays by a table of addresses, which are invalid in another process.
BY_ADDRESS = {"adamw", "cast_all", "weight_gradients"}
EXAMPLES: dict[str, Callable] = {f.__name__: f for f in (
    conv, attention_forward, attention_backward, group_norm, layer_norm, normal, sum_partials, sum_rows, activation,
    linear, embedding_backward, pixel_mixture)}


def every_version() -> Iterator[tuple[str, int, str]]:
    """(family, version, dtype) of every version of the families in EXAMPLES, with the first dtype that it takes."""
    for family in EXAMPLES:
        for number, source in cuda.versions(family).items():
            yield family, number, "float32" if source.takes[0] == "tf32" else source.takes[0]
