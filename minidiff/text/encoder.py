"""The text encoder: from a caption's tokens to the states that condition a UNet.

    h        = embedding[ids] + position                            (B, N, D)
    h        = transformer blocks; each token attends to all tokens of its caption
    tokens   = layer_norm(h)                                        one state per token, for cross-attention
    pooled   = layer_norm(mean of tokens over the caption)          one state per caption, for the norms

It is small, and trained together with the UNet by the diffusion loss alone.  The null caption '' is an ordinary caption
without words (BOS, EOS); it is the only sign of "unconditional".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import device_of, moved_together
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Embedding, LayerNorm, parameter
from minidiff.nn.module import Module
from minidiff.nn.transformer import TransformerBlock
from minidiff.nn.unet import TextStates


@dataclass(frozen=True)
class TextEncoderConfig:
    vocab: int = 512                        # rows of the embedding table: ids are 0..vocab-1
    length: int = 24                        # most tokens of a caption, with BOS and EOS
    width: int = 64                         # channels D, a multiple of heads
    layers: int = 2
    heads: int = 4

    def __post_init__(self):
        if min(self.vocab, self.width, self.layers, self.heads) < 1 or self.length < 2:
            raise ValueError("TextEncoderConfig: vocab, width, layers and heads must be at least 1, and length 2")


class TextEncoder(Module):
    """ids (B, N) int, mask (B, N) bool -> TextStates."""

    def __init__(self, config: TextEncoderConfig, rng: np.random.Generator):
        self.config, D = config, config.width
        self.embedding = Embedding(config.vocab, D, rng, std=1.0)
        # small, so that at first a word counts more than its position
        self.position = parameter((config.length, D), 0.1, rng)
        self.blocks = [TransformerBlock(D, config.heads, rng) for _ in range(config.layers)]
        self.norm, self.norm_pooled = LayerNorm(D), LayerNorm(D)

    def forward(self, ids, mask) -> TextStates:
        if ids.shape != mask.shape or ids.ndim != 2 or ids.shape[1] > self.config.length:
            raise ValueError(f"TextEncoder: ids and mask must both be (B, N), N at most {self.config.length}, "
                             f"not {ids.shape} and {mask.shape}")
        if not mask.any(axis=1).all():
            raise ValueError("TextEncoder: mask must be True for at least one token of each caption")
        N = ids.shape[1]
        h = self.embedding(ids) + self.position[:N]                                 # (B, N, D)
        share, mask = moved_together([shares(mask, h.dtype), mask], device_of(h.data))      # (B, N) each
        for block in self.blocks:
            h = block(h, mask[:, None, None])                                       # mask of keys (B, 1, 1, N)
        tokens = self.norm(h)
        # pooled = sum_n share_n tokens_n
        words = ops.where(mask[:, :, None], tokens, 0.0)    # padding has no influence, even if it is NaN
        pooled = self.norm_pooled(ops.sum(words * Tensor(share[:, :, None]), axis=1))       # (B, D)
        return TextStates(tokens, pooled, mask)


def shares(mask: np.ndarray, dtype) -> np.ndarray:
    """The share of each token in its caption's mean, (B, N) of dtype, of a mask (B, N)."""
    # share_n = mask_n / sum_n mask_n
    return (mask / mask.sum(axis=1, keepdims=True)).astype(dtype)
