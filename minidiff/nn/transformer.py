"""Multi-head attention and the transformer block (Vaswani et al. 2017, pre-norm).

    x <- x + attention(norm(x))
    x <- x + mlp(norm(x))

In a causal block, a token's keys and values do not depend on later tokens.  A KVCache keeps them, so that they are
computed once and not again for each new token.  `step` computes `forward` for the next tokens alone, and gives the same
result up to rounding.  (q, k and v are queries, keys and values here; v is not a velocity.)

`watching_attention` shows a function the queries and keys of each Attention, for maps of who attends to whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from minidiff.engine import ops
from minidiff.engine.attention import attention_of_pairs, causal_mask, scaled_dot_product_attention
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import LayerNorm, Linear
from minidiff.nn.module import Module


class KVCache:
    """The keys and values of one attention layer for the M tokens so far, at most `room`."""

    def __init__(self, room: int):
        self.room, self.M, self.k, self.v = room, 0, None, None

    def append(self, k, v) -> tuple:
        """Adds k, v (B, h, N, d), and returns all keys and values: two arrays (B, h, M, d), which are views."""
        B, h, N, d = k.shape
        if self.M + N > self.room:
            raise ValueError(f"KVCache: it has room for {self.room} tokens, and {self.M + N} were put in")
        if self.k is not None and ((B, h, d) != (*self.k.shape[:2], self.k.shape[3]) or k.dtype != self.k.dtype):
            raise ValueError(f"KVCache: it holds {self.k.dtype} keys of {self.k.shape[0]} sequences, {self.k.shape[1]} "
                             f"heads and {self.k.shape[3]} channels, and takes no {k.dtype} keys of {B}, {h} and {d}")
        if self.k is None:
            self.k, self.v = xp_of(k).empty((2, B, h, self.room, d), k.dtype)
        self.k[:, :, self.M:self.M + N], self.v[:, :, self.M:self.M + N] = k, v
        self.M += N
        return self.k[:, :, :self.M], self.v[:, :, :self.M]


class Attention(Module):
    """Queries from x, keys and values from context: (B, N, C), (B, M, D) -> (B, N, C).

    Self-attention is the case context = x.  zero: the output starts at 0, as the end of a residual branch should.
    """

    def __init__(self, C: int, heads: int, rng: np.random.Generator, *, context: int | None = None, zero: bool = True):
        if C % heads:
            raise ValueError(f"Attention: {C} channels do not divide into {heads} heads")
        self.heads = heads
        self.q = Linear(C, C, rng)
        self.kv = Linear(context or C, 2 * C, rng)
        self.out = Linear(C, C, rng, zero=zero)

    def forward(self, x: Tensor, context: Tensor | None = None, mask=None, causal: bool = False) -> Tensor:
        return self.out(self._attend(x, context, mask, causal))                     # (B, N, C)

    def added_to(self, h: Tensor, x: Tensor, context: Tensor | None = None, mask=None, causal: bool = False) -> Tensor:
        """h + self(x, context, mask, causal), for h (B, N, C): the end of a residual branch."""
        return self.out.added_to(h, self._attend(x, context, mask, causal))

    def read_into(self, h: Tensor, x: Tensor, kv: Tensor, mask=None) -> Tensor:
        """`added_to` where the keys and values of the context are known: kv (B, M, 2 C), from `self.kv(context)`."""
        return self.out.added_to(h, self._attend(x, None, mask, False, kv))

    def _attend(self, x: Tensor, context: Tensor | None, mask, causal: bool, kv: Tensor | None = None) -> Tensor:
        q, kv = self._project(x, x if context is None else context, kv)
        if (watcher := _watcher.get()) is not None:
            watcher(self, q.data, kv.data[0], mask, causal)
        return self._merge(attention_of_pairs(q, kv, mask, causal=causal))

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Causal self-attention of the tokens x (B, N, C) that follow those in the cache, and adds them to the cache.

        For sampling only: no gradient flows into the cache.
        """
        q, kv = self._project(x, x)
        k, v = cache.append(kv.data[0], kv.data[1])                                 # (B, h, M, d)
        N, M = x.shape[1], k.shape[2]
        # the new token n is token M - N + n of all; a single new token attends to all, and needs no mask
        mask = None if N == 1 else causal_mask(M, xp_of(k))[M - N:]                 # (N, M)
        return self.out(self._merge(scaled_dot_product_attention(q, Tensor(k), Tensor(v), mask)))

    def _project(self, x: Tensor, context: Tensor, kv: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, N, C = x.shape
        h, d = self.heads, C // self.heads
        q = self.q(x).reshape(B, N, h, d).transpose(0, 2, 1, 3)                     # (B, h, N, d)
        kv = self.kv(context) if kv is None else kv                                 # (B, M, 2 C)
        return q, kv.reshape(B, kv.shape[1], 2, h, d).transpose(2, 0, 3, 1, 4)      # (2, B, h, M, d)

    def _merge(self, y: Tensor) -> Tensor:
        B, N, C = y.shape[0], y.shape[2], y.shape[1] * y.shape[3]
        return y.transpose(0, 2, 1, 3).reshape(B, N, C)                             # the heads side by side


# each thread and each asynchronous task has its own; parallel_map hands the caller's on
_watcher: ContextVar[Callable | None] = ContextVar("watcher", default=None)


@contextmanager
def watching_attention(watcher: Callable) -> Iterator[None]:
    """Within it, in this thread, each Attention's `forward` first calls watcher(attention, q, k, mask, causal).

    q (B, h, N, d) and k (B, h, M, d) are arrays, which the watcher must not write into.  What forward returns is the
    same with and without a watcher.
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


class TransformerBlock(Module):
    """(B, N, C) -> (B, N, C).  causal: a token attends to itself and to the tokens before it."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator, *, expand: int = 4, causal: bool = False):
        self.causal = causal
        self.norm1, self.attention = LayerNorm(C), Attention(C, heads, rng)
        self.norm2, self.mlp_in = LayerNorm(C), Linear(C, expand * C, rng)
        self.mlp_out = Linear(expand * C, C, rng, zero=True)

    def forward(self, x: Tensor, mask=None) -> Tensor:
        # x <- x + attention(norm(x))
        x = self.attention.added_to(x, self.norm1(x), None, mask, self.causal)
        return self._mlp(x)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """The result of a causal block's forward for the tokens x (B, N, C) that follow those in the cache."""
        if not self.causal:
            raise ValueError("TransformerBlock: step needs causal=True: without it, early tokens attend to later ones")
        return self._mlp(x + self.attention.step(self.norm1(x), cache))

    def _mlp(self, x: Tensor) -> Tensor:
        # x <- x + mlp(norm(x))
        return self.mlp_out.added_to(x, ops.gelu(self.mlp_in(self.norm2(x))))
