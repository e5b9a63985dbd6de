"""How many operations a UNet makes, counted from the shapes of its products while it runs.

    convolution     y (B, H, W, D) from w (k, k, C, D)          2 B H W k k C D
    linear layer    y = x w, x (N, C), w (C, D)                 2 N C D
    attention       S = q k^T, q (B, h, N, d), k (B, h, M, d)   2 B h N M d
                    y = P v, v (B, h, M, d)                     2 B h N M d

A multiply-add counts as two operations.  The sums count as they are defined, whatever algorithm computes them: neither
what Winograd's saves nor its transforms count.  Norms, activations, softmax, biases and the update of the weights do
not count either.

A product has two factors.  The gradient of each factor is one more product of the same size,

    dx = dy w^T         dw = x^T dy

so a training step takes three times the operations of an evaluation, less the gradients of inputs that need none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from minidiff.engine import attention, conv, ops
from minidiff.engine.tensor import Tensor, is_recording, needs_gradient
from minidiff.nn.unet import UNet

CONV, PIXELS = "3 x 3 convolutions", "linear layers of the pixels"
SELF, CROSS = "self-attention, its two products", "cross-attention, its two products"
TOKENS, PICTURE = "keys and values of the text", "linear layers of the time and the pooled caption"
KINDS = (CONV, PIXELS, SELF, CROSS, TOKENS, PICTURE)


@dataclass(frozen=True)
class Product:
    """The operations of one convolution, linear layer or attention."""

    kind: str                               # one of KINDS
    forward: int
    backward: int                           # 0 where nothing is recorded for the backward pass


@contextmanager
def counting(unet: UNet) -> Iterator[list[Product]]:
    """Within it, the list that it gives receives every product of this UNet, in all threads."""
    names = {id(w): name for name, w in unet.parameters().items()}
    own = conv.conv2d, ops.linear, attention.scaled_dot_product_attention
    found: list[Product] = []

    def of_weights(op):
        def call(x: Tensor, w: Tensor, *args, **kwargs) -> Tensor:
            y = op(x, w, *args, **kwargs)
            forward = 2 * y.size * math.prod(w.shape[:-1])
            gradients = (x.requires_grad + w.requires_grad) * is_recording()
            found.append(Product(kind_of(names[id(w)]), forward, gradients * forward))
            return y
        return call

    def attend(q: Tensor, k: Tensor, v: Tensor, mask=None, **kwargs) -> Tensor:
        y, M = own[2](q, k, v, mask, **kwargs), k.shape[2]
        forward = 2 * q.size * M + 2 * y.size * M
        # only captions have a mask; the pullback computes all four gradients, dq, dk, dP and dv
        found.append(Product(SELF if mask is None else CROSS, forward, 2 * forward * needs_gradient(q, k, v)))
        return y
    conv.conv2d, ops.linear = of_weights(own[0]), of_weights(own[1])
    attention.scaled_dot_product_attention = attend
    try:
        yield found
    finally:
        conv.conv2d, ops.linear, attention.scaled_dot_product_attention = own


def kind_of(name: str) -> str:
    """The kind of the product with a weight of the UNet, by its name, such as down_blocks.0.block.conv1.w."""
    *parts, _ = name.split(".")
    if parts[-1].startswith("conv"):
        return CONV
    if parts[-1] in ("time1", "time2", "pooled", "modulation"):
        return PICTURE
    return TOKENS if parts[-2:] == ["cross_attention", "kv"] else PIXELS


def by_kind(products: Sequence[Product]) -> Counter:
    """The operations of each kind, forward and backward."""
    total = Counter()
    for product in products:
        total[product.kind] += product.forward + product.backward
    return total
