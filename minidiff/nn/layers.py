"""The layers of all networks.  Each constructor takes the random generator for the initial weights, or `Unfilled`.

Weights start as N(0, 1/fan_in), so that the output of a layer has about the variance of its input; biases start at 0.
`zero=True` starts the weights at 0.  The last layer of a residual branch does, so that the block starts as the
identity.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.engine import conv, norm, ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.module import Module


class TooManyWeights(ValueError):
    """A network asks for more weights than there may be."""


class Unfilled:
    """Takes the generator's place where a file will set the weights: each is 0, and takes no memory until it is set.

    arrays, weights: how many a network may have, such as those of the file; TooManyWeights for one that asks for
    more.
    """

    def __init__(self, arrays: int, weights: int):
        self.arrays, self.weights = arrays, weights

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        self.arrays, self.weights = self.arrays - 1, self.weights - math.prod(shape)
        if min(self.arrays, self.weights) < 0:
            raise TooManyWeights("it asks for more weights than there may be")
        return np.broadcast_to(np.float32(0), shape)        # read-only: every element is one number


def parameter(shape: tuple[int, ...], std: float, rng: np.random.Generator | Unfilled) -> Tensor:
    """Random numbers of this standard deviation; zeros for 0."""
    if isinstance(rng, Unfilled):
        return Tensor(rng.zeros(shape), requires_grad=True)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) if std else np.zeros(shape, np.float32)
    return Tensor(values, requires_grad=True)


class Linear(Module):
    """y = x w + b on the last axis: (..., C) -> (..., D)."""

    def __init__(self, C: int, D: int, rng: np.random.Generator, *, zero: bool = False):
        _check_sizes("Linear", C=C, D=D)
        self.w = parameter((C, D), 0 if zero else 1 / math.sqrt(C), rng)
        self.b = parameter((D,), 0, rng)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.w, self.b)

    def added_to(self, h: Tensor, x: Tensor) -> Tensor:
        """h + self(x), the end of a residual branch, which a GPU computes in one kernel."""
        return ops.plus_linear(h, x, self.w, self.b)


class Conv2d(Module):
    """(B, H, W, C) -> (B, H', W', D).  With stride 1 the default padding keeps H and W."""

    def __init__(self, C: int, D: int, rng: np.random.Generator, *, kernel: int = 3, stride: int = 1,
                 padding: int | None = None, zero: bool = False):
        _check_sizes("Conv2d", C=C, D=D, kernel=kernel)
        self.w = parameter((kernel, kernel, C, D), 0 if zero else 1 / (kernel * math.sqrt(C)), rng)
        self.b = parameter((D,), 0, rng)
        self.stride, self.padding = stride, kernel // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        return conv.conv2d(x, self.w, self.b, self.stride, self.padding)


class GroupNorm(Module):
    """(B, ..., C) -> (B, ..., C): shifts and scales each group of channels to mean 0 and variance 1, then applies the
    learned gamma and beta."""

    def __init__(self, C: int, groups: int):
        _check_sizes("GroupNorm", C=C, groups=groups)
        if C % groups:
            raise ValueError(f"GroupNorm: {C} channels do not divide into {groups} groups")
        self.groups = groups
        self.gamma, self.beta = _ones(C), _zeros(C)

    def forward(self, x: Tensor) -> Tensor:
        return norm.group_norm(x, self.groups, self.gamma, self.beta)

    def then_silu(self, x: Tensor) -> Tensor:
        """silu(self(x)), which a GPU computes in one kernel."""
        return norm.group_norm(x, self.groups, self.gamma, self.beta, silu=True)


class LayerNorm(Module):
    """(..., C) -> (..., C): shifts and scales each token to mean 0 and variance 1, then applies the learned gamma and
    beta."""

    def __init__(self, C: int):
        _check_sizes("LayerNorm", C=C)
        self.gamma, self.beta = _ones(C), _zeros(C)

    def forward(self, x: Tensor) -> Tensor:
        return norm.layer_norm(x, self.gamma, self.beta)


class Embedding(Module):
    """Rows of a learned table, ids (...) int -> table[ids] (..., C)."""

    def __init__(self, count: int, C: int, rng: np.random.Generator, *, std: float = 1.0):
        _check_sizes("Embedding", count=count, C=C)
        self.table = parameter((count, C), std, rng)

    def forward(self, ids) -> Tensor:
        return ops.embedding(self.table, ids)


class Dropout(Module):
    """During training it sets each element to 0 with probability p, and multiplies the others by 1/(1-p)
    (Srivastava et al. 2014)."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        if self.training and self.p and rng is None:
            raise ValueError("Dropout: training needs the generator rng to draw from; call eval() otherwise")
        return ops.dropout(x, self.p, rng if self.training else None)


def sinusoidal_embedding(t, dim: int, max_period: float = 10_000.0, dtype=np.float32):
    """The number t as cosines and sines of geometrically falling frequencies (Vaswani et al. 2017, section 3.5).

    t (B,) numbers -> (B, dim) of dtype, dim even.
    """
    if dim % 2 or dim < 2:
        raise ValueError(f"sinusoidal_embedding: dim must be even and at least 2, not {dim}")
    xp = xp_of(t)
    # freq_k = max_period^(-k / (dim/2)),   (cos(t freq_k), sin(t freq_k))
    freq = max_period ** -(xp.arange(dim // 2, dtype=xp.float64) / (dim // 2))      # (dim/2,)
    angle = t.astype(xp.float64)[:, None] * freq                                    # (B, dim/2)
    return xp.concatenate([xp.cos(angle), xp.sin(angle)], axis=1).astype(dtype)     # (B, dim)


def _check_sizes(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer}: {name} must be at least 1, not {size}")


def _ones(C: int) -> Tensor:
    return Tensor(np.ones(C, np.float32), requires_grad=True)


def _zeros(C: int) -> Tensor:
    return Tensor(np.zeros(C, np.float32), requires_grad=True)
