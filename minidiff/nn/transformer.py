"""Multi-head attention and the transformer block (Vaswani et al. 2017, pre-norm).

    x <- x + attention(norm(x))
    x <- x + mlp(norm(x))

In a causal block a token's keys and values do not depend on what follows it: kept in a KVCache, they need not be
computed anew for each token that is drawn.  `step` is `forward` for the next tokens alone; what it gives is the same
but for rounding, for its products are of other shapes.
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import ops
from minidiff.engine.attention import causal_mask, scaled_dot_product_attention
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import LayerNorm, Linear
from minidiff.nn.module import Module


class KVCache:
    """The keys and values of one attention layer for the tokens so far: M of at most `room`."""

    def __init__(self, room: int):
        self.room, self.M, self.k, self.v = room, 0, None, None

    def append(self, k, v) -> tuple:
        """Takes in k, v (B, h, N, d), and gives all that it holds: two arrays (B, h, M, d), which are views."""
        B, h, N, d = k.shape
        if self.M + N > self.room:
            raise ValueError(f"KVCache: it has room for {self.room} tokens, and {self.M + N} were put in")
        if self.k is None:
            self.k, self.v = xp_of(k).empty((2, B, h, self.room, d), k.dtype)
        self.k[:, :, self.M:self.M + N], self.v[:, :, self.M:self.M + N] = k, v
        self.M += N
        return self.k[:, :, :self.M], self.v[:, :, :self.M]


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
        q, kv = self._project(x, x if context is None else context)
        return self._merge(scaled_dot_product_attention(q, kv[0], kv[1], mask, causal=causal))

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Causal self-attention of the tokens x (B, N, C) that follow those in the cache, which takes them in.

        For sampling: no gradient flows back into the cache.
        """
        q, kv = self._project(x, x)
        k, v = cache.append(kv.data[0], kv.data[1])                                 # (B, h, M, d)
        N, M = x.shape[1], k.shape[2]
        # the new token n is token M - N + n of all; one alone may look at every one
        mask = None if N == 1 else causal_mask(M, xp_of(k))[M - N:]                 # (N, M)
        return self._merge(scaled_dot_product_attention(q, Tensor(k), Tensor(v), mask))

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        B, N, C = x.shape
        M, h, d = context.shape[1], self.heads, C // self.heads
        q = self.q(x).reshape(B, N, h, d).transpose(0, 2, 1, 3)                     # (B, h, N, d)
        return q, self.kv(context).reshape(B, M, 2, h, d).transpose(2, 0, 3, 1, 4)  # (2, B, h, M, d)

    def _merge(self, y: Tensor) -> Tensor:
        B, N, C = y.shape[0], y.shape[2], y.shape[1] * y.shape[3]
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
        return self._mlp(x)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """What a causal block's forward gives for the tokens x (B, N, C) that follow those in the cache."""
        if not self.causal:
            raise ValueError("TransformerBlock: step needs causal=True: without it, early tokens look at later ones")
        return self._mlp(x + self.attention.step(self.norm1(x), cache))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp_out(ops.gelu(self.mlp_in(self.norm2(x))))
