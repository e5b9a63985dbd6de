"""A text encoder that learns from text alone, together with a decoder (T5: Raffel et al. 2020, arXiv 1910.10683).

    states   = encoder(input)                                       the text with gaps; each token attends to all
    h        = embedding[<start>, target_1 ... target_M-1] + position
    h        = blocks: causal self-attention, attention to the states, mlp
    logits   = layer_norm(h) embedding^T / sqrt(D)                  the next token of the target, by the same table
    L        = - mean log softmax(logits)[target]

After training, only the encoder is used, and the decoder is discarded.  Unlike T5, which is also larger: positions are
learned and absolute, not relative; layer norms have biases; each row holds one text, and texts are not packed together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import LayerNorm, Linear, parameter
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32
from minidiff.nn.transformer import Attention
from minidiff.text.encoder import TextEncoder
from minidiff.text.span_corruption import corrupt, random_spans
from minidiff.text.tokenizer import BOS, EOS, PAD


class EncoderDecoder(Module):
    """A TextEncoder and a decoder of the same width, trained together.

    targets: the largest number of tokens of a target.  The last `sentinels` rows of the encoder's table belong to the
    sentinels (span_corruption.py), counted from the end, as in T5.
    """

    def __init__(self, encoder: TextEncoder, layers: int, targets: int, sentinels: int, rng: np.random.Generator):
        c = encoder.config
        if min(layers, targets, sentinels) < 1 or sentinels > c.vocab:
            raise ValueError(f"layers, targets and sentinels must be at least 1, and sentinels at most the "
                             f"{c.vocab} rows of the table, not {layers}, {targets} and {sentinels}")
        self.encoder, self.targets = encoder, targets
        self.sentinels = range(c.vocab - 1, c.vocab - 1 - sentinels, -1)
        self.position = parameter((targets, c.width), 0.1, rng)
        self.blocks = [DecoderBlock(c.width, c.heads, rng) for _ in range(layers)]
        self.norm = LayerNorm(c.width)

    def forward(self, ids, mask, target_ids) -> Tensor:
        """ids, mask (B, N) of the input, target_ids (B, M) -> logits (B, M, vocab), each given the target before it."""
        table = self.encoder.embedding.table
        encoded = self.encoder(ids, mask)
        states, keys = encoded.tokens, encoded.mask[:, None, None]                  # (B, N, D), (B, 1, 1, N)
        start = np.full_like(target_ids[:, :1], BOS)
        before = np.concatenate([start, target_ids[:, :-1]], axis=1)                # (B, M)
        h = ops.embedding(table, before) + self.position[:before.shape[1]]          # (B, M, D)
        for block in self.blocks:
            h = block(h, states, keys)
        return self.norm(h) @ table.transpose(1, 0) * (1 / math.sqrt(table.shape[1]))

    def loss(self, ids, mask, target_ids, weight) -> Tensor:
        """The mean cross-entropy of a token in nats, (), float32 at least.  weight (B, M) is that of `batch`."""
        logits = as_float32(self(ids, mask, target_ids))                            # (B, M, vocab)
        return ops.cross_entropy(logits, target_ids, weight) / len(target_ids)

    def batch(self, texts: Sequence[Sequence[int]], rng: np.random.Generator) -> tuple:
        """Lists of tokens -> ids, mask (B, N), target_ids (B, M), weight (B, M), with random gaps in each text.

        A text longer than the encoder's context is cut.  weight is B over the number of tokens in all targets, and 0 on
        padding, so that the mean over samples is the mean over tokens.
        """
        pairs = []
        for text in texts:
            text = text[:self.encoder.config.length - 2]
            corrupted, target = corrupt(text, random_spans(len(text), rng), self.sentinels)
            pairs.append(([BOS, *corrupted, EOS], target[:self.targets]))
        ids, target_ids = (_padded(rows) for rows in zip(*pairs, strict=True))
        real = target_ids != PAD
        weight = real * np.float32(len(pairs) / real.sum())
        return ids, ids != PAD, target_ids, weight


class DecoderBlock(Module):
    """(B, M, C), context (B, N, C) and its mask of keys (B, 1, 1, N) -> (B, M, C).

    x <- x + self_attention(norm(x)), causal: each token to itself and to those before it
    x <- x + cross_attention(norm(x), context)
    x <- x + mlp(norm(x))
    """

    def __init__(self, C: int, heads: int, rng: np.random.Generator, *, expand: int = 4):
        self.norm1, self.self_attention = LayerNorm(C), Attention(C, heads, rng)
        self.norm2, self.cross_attention = LayerNorm(C), Attention(C, heads, rng, context=C)
        self.norm3, self.mlp_in = LayerNorm(C), Linear(C, expand * C, rng)
        self.mlp_out = Linear(expand * C, C, rng, zero=True)

    def forward(self, x: Tensor, context: Tensor, mask) -> Tensor:
        x = x + self.self_attention(self.norm1(x), None, None, True)
        x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.mlp_out(ops.gelu(self.mlp_in(self.norm3(x))))


class AttentionPooling(Module):
    """One learned query attends to all tokens: (B, N, C), mask (B, N) -> (B, C), with mean 0 and variance 1."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator):
        self.query = parameter((1, 1, C), 1.0, rng)
        self.norm_tokens, self.norm = LayerNorm(C), LayerNorm(C)
        self.attention = Attention(C, heads, rng, zero=False)

    def forward(self, tokens: Tensor, mask) -> Tensor:
        B, _, C = tokens.shape
        xp = xp_of(tokens.data)
        query = self.query + Tensor(xp.zeros((B, 1, C), tokens.dtype))
        pooled = self.attention(query, self.norm_tokens(tokens), xp.asarray(mask)[:, None, None])       # (B, 1, C)
        return self.norm(pooled.reshape(B, C))


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, longest) int32, with PAD after the end of each row."""
    return np.array(list(zip_longest(*rows, fillvalue=PAD)), dtype=np.int32).T
