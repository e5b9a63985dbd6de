"""Multi-head attention and the transformer block (Vaswani et al. 2017, pre-norm).

    x <- x + attention(norm(x))
    x <- x + mlp(norm(x))
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import LayerNorm, Linear
from minidiff.nn.module import Module


class Attention(Module):
    """Queries from x, keys and values from context: (B, N, C), (B, M, D) -> (B, N, C).

    Self-attention is the case context = x.  It starts at 0 (`zero`), as the end of a residual branch.
    """

    def __init__(self, C: int, heads: int, rng: np.random.Generator, *, context: int | None = None, zero: bool = True):
        if C % heads:
            raise ValueError(f"Attention: {C} channels do not divide into {heads} heads")
        self.heads = heads
        self.q = Linear(C, C, rng)
        self.kv = Linear(context or C, 2 * C, rng)
        self.out = Linear(C, C, rng, zero=zero)

    def forward(self, x: Tensor, context: Tensor | None = None, mask=None, causal: bool = False) -> Tensor:
        context = x if context is None else context
        B, N, C = x.shape
        M, h, d = context.shape[1], self.heads, C // self.heads
        q = self.q(x).reshape(B, N, h, d).transpose(0, 2, 1, 3)                     # (B, h, N, d)
        kv = self.kv(context).reshape(B, M, 2, h, d).transpose(2, 0, 3, 1, 4)       # (2, B, h, M, d)
        y = scaled_dot_product_attention(q, kv[0], kv[1], mask, causal=causal)      # (B, h, N, d)
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, N, C))                   # (B, N, C)


class TransformerBlock(Module):
    """(B, N, C) -> (B, N, C).  causal: a token looks at itself and at those before it."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator, *, expand: int = 4, causal: bool = False):
        self.causal = causal
        self.norm1, self.attention = LayerNorm(C), Attention(C, heads, rng)
        self.norm2, self.mlp_in = LayerNorm(C), Linear(C, expand * C, rng)
        self.mlp_out = Linear(expand * C, C, rng, zero=True)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        x = x + self.attention(self.norm1(x), None, mask, self.causal)
        return x + self.mlp_out(ops.gelu(self.mlp_in(self.norm2(x))))
