"""Two causal transformers that predict an image's embedding z_i from a caption (Ramesh et al. 2022, section 2.2).

    diffusion        [caption's tokens, z_t, time t, z_i^(t), query]        the query's state -> z_i
    autoregressive   [caption's tokens, z_t, dot, c_1 ... c_{K-1}]          the states from dot on -> c_1 ... c_K

As in the paper, z_t is the embedding of the caption's text (not something at time t), z_i that of the image, and
z_i^(t) the image's embedding with the noise of time t.  c_1 ... c_K are the codes of z_i, and dot is a token for the
dot product z_i . z_t that is wanted.  Each token attends to itself and to the tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import moved, xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Embedding, LayerNorm, Linear, parameter, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.transformer import TransformerBlock


@dataclass(frozen=True)
class PriorConfig:
    """The transformer of a prior.  width must be even and a multiple of heads."""

    width: int = 80
    layers: int = 3
    heads: int = 4

    def __post_init__(self):
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads or self.width % 2:
            raise ValueError(f"PriorConfig: width, layers and heads must be at least 1 and width an even multiple of "
                             f"heads, not {self.width}, {self.layers} and {self.heads}")


class Prefixed(Module):
    """A causal transformer over a caption and the R tokens after it: (B, M, W), (B, R, C) -> the R states (B, R, C)."""

    def __init__(self, config: PriorConfig, W: int, length: int, rest: int, rng: np.random.Generator):
        """W: channels of a caption's states.  length, rest: the largest number of tokens of a caption, and after it."""
        C = config.width
        self.caption = Linear(W, C, rng)
        self.caption_position, self.rest_position = parameter((length, C), 0.1, rng), parameter((rest, C), 0.1, rng)
        self.blocks = [TransformerBlock(C, config.heads, rng, causal=True) for _ in range(config.layers)]
        self.norm = LayerNorm(C)

    def forward(self, tokens: Tensor, mask, rest: Tensor) -> Tensor:
        """tokens (B, M, W); mask (B, M), True at a caption's tokens and False at padding; rest (B, R, C)."""
        (B, M, _), R = tokens.shape, rest.shape[1]
        if M > self.caption_position.shape[0] or R > self.rest_position.shape[0] or mask.shape != (B, M):
            raise ValueError(f"a prior takes captions of at most {self.caption_position.shape[0]} tokens with their "
                             f"mask, not {tokens.shape} and {mask.shape}")
        xp = xp_of(rest.data)
        h = ops.concat([self.caption(tokens) + self.caption_position[:M], rest + self.rest_position[:R]], axis=1)
        mask = xp.concatenate([xp.asarray(mask), xp.ones((B, R), bool)], axis=1)    # (B, M + R)
        for block in self.blocks:
            h = block(h, mask[:, None, None])
        return self.norm(h[:, M:])                                                  # (B, R, C)


class DiffusionPrior(Module):
    """z_i^(t), t, and the caption's z_t and states -> an estimate of z_i: (B, D)."""

    def __init__(self, config: PriorConfig, D: int, W: int, length: int, rng: np.random.Generator):
        """D: channels of an embedding.  W, length: channels and largest number of tokens of a caption's states."""
        C = config.width
        self.z_t, self.z_i = Linear(D, C, rng), Linear(D, C, rng)
        self.time1, self.time2 = Linear(C, C, rng), Linear(C, C, rng)
        self.query = parameter((C,), 1.0, rng)
        self.transformer = Prefixed(config, W, length, 4, rng)
        self.out = Linear(C, D, rng)

    def forward(self, z_i_t: Tensor, t, z_t: Tensor, tokens: Tensor, mask) -> Tensor:
        """z_i_t, z_t (B, D) with entries of about 1; t (B,) training times; tokens (B, M, W), mask (B, M)."""
        B, C, xp = z_i_t.shape[0], self.query.shape[0], xp_of(z_i_t.data)
        time = Tensor(moved(sinusoidal_embedding(t, C, dtype=z_i_t.dtype), z_i_t.data))
        time = self.time2(ops.silu(self.time1(time)))                               # (B, C)
        query = self.query + Tensor(xp.zeros((B, C), z_i_t.dtype))
        rest = [self.z_t(z_t), time, self.z_i(z_i_t), query]
        h = self.transformer(tokens, mask, ops.concat([a.reshape(B, 1, C) for a in rest], axis=1))      # (B, 4, C)
        return self.out(h[:, 3])


class AutoregressivePrior(Module):
    """The first k codes and the caption -> logits of the first k + 1 codes, each given the codes before it."""

    def __init__(self, config: PriorConfig, D: int, W: int, length: int, codes: int, values: int, dots: int,
                 rng: np.random.Generator):
        """codes: K.  values: the number of values of a code.  dots: that of the dot product's token; one more means
        "any"."""
        C = config.width
        self.z_t, self.dot = Linear(D, C, rng), Embedding(dots + 1, C, rng)
        self.code = Embedding(values, C, rng)
        # codes are levels of a number, so neighbours start with similar embeddings
        self.code.table.data = sinusoidal_embedding(np.arange(values), C, max_period=4.0 * values)
        self.transformer = Prefixed(config, W, length, codes + 1, rng)
        self.out = Linear(C, values, rng)

    def forward(self, codes, dot, z_t: Tensor, tokens: Tensor, mask) -> Tensor:
        """codes (B, k) whole numbers, 0 <= k < K; dot (B,); z_t (B, D) -> logits (B, k + 1, values)."""
        B, C = z_t.shape[0], self.code.table.shape[1]
        prefix = [self.z_t(z_t).reshape(B, 1, C), self.dot(dot).reshape(B, 1, C)]
        h = self.transformer(tokens, mask, ops.concat([*prefix, self.code(codes)], axis=1))     # (B, k + 2, C)
        return self.out(h[:, 1:])                           # dot's state predicts c_1, that of c_k predicts c_{k+1}
