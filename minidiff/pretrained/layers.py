"""The layers of pretrained networks: as in nn/layers.py, but their parameters come from a checkpoint.

PyTorch's layouts are changed when the tensors are read:

    linear          (D, C)              ->  (C, D)
    convolution     (D, C, kh, kw)      ->  (kh, kw, C, D)

A 1 x 1 convolution is a linear layer here, since a pixel is a token.
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import conv, norm, ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError, brief
from minidiff.nn.module import Module
from minidiff.pretrained.weights import Weights


class Linear(Module):
    """y = x w + b on the last axis: (..., C) -> (..., D).  b is 0 where the checkpoint has none."""

    def __init__(self, weights: Weights):
        kernel = weights.shape("weight")[2:]                # () or (1, 1)
        if kernel not in ((), (1, 1)):
            raise UserError(f"{weights.source} holds {weights.prefix}weight with a kernel of {kernel}; it takes 1 x 1.")
        self.w = weights.tensor("weight", 1, 0, dropped=(2, 3) if kernel else ())   # (C, D)
        self.b = weights.vector("bias", self.w.shape[1]) if "bias" in weights else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.matmul(x, self.w) if self.b is None else ops.linear(x, self.w, self.b)


class Conv2d(Module):
    """(B, H, W, C) -> (B, H', W', D)."""

    def __init__(self, weights: Weights, *, stride: int = 1, padding: int = 1):
        self.w = weights.tensor("weight", 2, 3, 1, 0)
        self.b = weights.vector("bias", self.w.shape[3])
        self.stride, self.padding = stride, padding
        if self.w.shape[:2] != (3, 3):
            raise UserError(f"{weights.source} holds {weights.prefix}weight with a kernel of {self.w.shape[:2]}; it "
                            "takes 3 x 3.")

    def forward(self, x: Tensor) -> Tensor:
        return conv.conv2d(x, self.w, self.b, self.stride, self.padding)


class GroupNorm(Module):
    """(B, ..., C) -> (B, ..., C); see engine/norm.py."""

    def __init__(self, weights: Weights, groups: int, eps: float):
        self.gamma = weights.tensor("weight", 0)
        self.beta = weights.vector("bias", len(self.gamma))
        self.groups, self.eps = groups, eps
        if groups < 1 or len(self.gamma) % groups:
            raise UserError(f"{weights.source}: {len(self.gamma)} channels of {weights.prefix[:-1]} do not divide into "
                            f"{groups} groups.")

    def forward(self, x: Tensor) -> Tensor:
        return norm.group_norm(x, self.groups, self.gamma, self.beta, self.eps)

    def then_silu(self, x: Tensor) -> Tensor:
        """silu(self(x))."""
        return norm.group_norm(x, self.groups, self.gamma, self.beta, self.eps, silu=True)


class LayerNorm(Module):
    """(..., C) -> (..., C); see engine/norm.py."""

    def __init__(self, weights: Weights, eps: float = 1e-5):
        self.gamma, self.eps = weights.tensor("weight", 0), eps
        self.beta = weights.vector("bias", len(self.gamma))

    def forward(self, x: Tensor) -> Tensor:
        return norm.layer_norm(x, self.gamma, self.beta, self.eps)


class Attention(Module):
    """Queries from x, keys and values from context: (B, N, C), (B, M, D) -> (B, N, C).

    names: of the projections q, k, v and out in the checkpoint.
    """

    def __init__(self, weights: Weights, heads: int,
                 names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out.0")):
        self.heads = heads
        self.q, self.k, self.v, self.out = (Linear(weights.part(name)) for name in names)
        if heads < 1 or self.q.w.shape[1] % heads:
            raise UserError(f"{weights.source}: {self.q.w.shape[1]} channels of {weights.prefix[:-1]} do not divide "
                            f"into {heads} heads.")

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        context = x if context is None else context
        q, k, v = (self._heads(y) for y in (self.q(x), self.k(context), self.v(context)))
        y = scaled_dot_product_attention(q, k, v, causal=causal)                    # (B, h, N, d)
        B, h, N, d = y.shape
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, N, h * d))               # (B, N, C)

    def _heads(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        return x.reshape(B, N, self.heads, C // self.heads).transpose(0, 2, 1, 3)   # (B, h, N, d)


class ResidualBlock(Module):
    """y = x + conv(silu(norm(conv(silu(norm(x))) + time))):  (B, H, W, C) -> (B, H, W, D).

    time: a linear function of silu(emb) (B, E), added to each channel; without emb there is none (autoencoders).
    """

    def __init__(self, weights: Weights, groups: int, eps: float):
        self.norm1, self.conv1 = GroupNorm(weights.part("norm1"), groups, eps), Conv2d(weights.part("conv1"))
        self.time = Linear(weights.part("time_emb_proj")) if "time_emb_proj" in weights else None
        self.norm2, self.conv2 = GroupNorm(weights.part("norm2"), groups, eps), Conv2d(weights.part("conv2"))
        self.skip = Linear(weights.part("conv_shortcut")) if "conv_shortcut" in weights else None

    def forward(self, x: Tensor, silu_emb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1.then_silu(x))                                     # (B, H, W, D)
        if self.time is not None:
            h = h + self.time(silu_emb)[:, None, None]
        h = self.conv2(self.norm2.then_silu(h))
        return (x if self.skip is None else self.skip(x)) + h


class Upsample(Module):
    """Nearest neighbours to twice the size, or to a given one, then a convolution: (B, H, W, C) -> (B, 2H, 2W, C)."""

    def __init__(self, weights: Weights):
        self.conv = Conv2d(weights.part("conv"))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        _, H, W, _ = x.shape
        if size in (None, (2 * H, 2 * W)):
            return conv.upsampled_conv2d(x, self.conv.w, self.conv.b)
        # row i of H' rows is a copy of row floor(i H / H')
        rows, columns = np.arange(size[0]) * H // size[0], np.arange(size[1]) * W // size[1]
        return self.conv(x[:, rows][:, :, columns])


def tried(weights: Weights, what: str, call) -> None:
    """Calls a new network on its smallest input; UserError where its layers do not fit together.

    Else this would be seen after all weights are read, or after all steps of a run.
    """
    try:
        with no_grad():
            call()
    except (ValueError, IndexError) as error:
        raise UserError(f"{weights.source}: the layers of its {what} do not fit together ({brief(error)}).") from error


def numbered(weights: Weights, name: str, count: int, least: int = 1) -> list[Weights]:
    """The parts name.0 ... name.(count - 1); UserError where the checkpoint has more or fewer of them."""
    found = 0
    while found <= count and f"{name}.{found}" in weights:
        found += 1
    if found != count or count < least:
        has = f"{found} or more" if found > count else found
        raise UserError(f"{weights.source}: its configuration names {count} of the parts {weights.prefix}{name}, and "
                        f"it has {has}.")
    return [weights.part(f"{name}.{i}") for i in range(count)]
