"""The multimodal diffusion transformer, MM-DiT (Peebles & Xie 2023, DiT; Esser et al. 2024, SD3 section 4).

    image --patches--> x (B, N, C) --+          +--> x --> norm, linear --> patches of the output
                                     | [block]  |
    words --linear---> c (B, M, C) --+          +--> c, which the last block drops

Image and text are two streams of tokens.  In a block each stream has its own weights, and both meet in one attention:

    x_hat, c_hat = norm(x), norm(c)                                 layer norm without gamma and beta
    q_x, k_x, v_x = linear((1 + scale) x_hat + shift),  and q_c, k_c, v_c of c_hat by other weights
    y     = softmax([q_x; q_c] [k_x; k_c]^T / sqrt(d)) [v_x; v_c]   joint attention: every token attends to all
    x     <- x + gate linear(y_x)                                   and c <- c + gate linear(y_c)
    x     <- x + gate' mlp((1 + scale') norm(x) + shift')           and c in the same way

shift, scale and gate come from the time u and the pooled caption by a linear layer that starts at 0 (adaLN-Zero, DiT
section 3.2).  So each block starts as the identity, and the output starts at 0.  Only the gate makes the branch 0:
if the branch's last layer were 0 too, neither would ever have a gradient.

A patch's place is added to it as sines and cosines, half of the channels for its row and half for its column (DiT
section 3.2).  Left out: the norm of queries and keys, which SD3 needs in half precision at high resolution (section
5.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import conv, norm, ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.backend import moved, xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.activations import check_activations
from minidiff.nn.layers import Linear, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.unet import TextStates

EXPAND = 4                                                  # hidden channels of an MLP, in widths
TIME_RANGE = 1000                                           # u in [0, 1] is embedded as 1000 u, as training times are


@dataclass(frozen=True)
class MMDiTConfig:
    """The sizes of an MM-DiT.  An image's sides must be multiples of patch, and width one of heads and of 4."""

    channels: int = 1                       # of the image
    patch: int = 4                          # a square of patch x patch pixels is a token
    width: int = 128                        # channels C of a token, in both streams
    blocks: int = 5                         # with the last, from which no text goes on
    heads: int = 4
    text: int = 64                          # channels of a caption's token states

    def __post_init__(self):
        if min(self.channels, self.patch, self.width, self.blocks, self.heads, self.text) < 1:
            raise ValueError("MMDiTConfig: channels, patch, width, blocks, heads and text must be at least 1")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"MMDiTConfig: width must be a multiple of 4 and of heads ({self.heads}), "
                             f"not {self.width}")

    def check_image(self, H: int, W: int, words: int) -> None:
        """ValueError unless images of this size, with captions of so many tokens, fit the network's patches and are
        not too large for it."""
        if H % self.patch or W % self.patch:
            raise ValueError(f"MMDiTConfig: an image's sides must be multiples of {self.patch}, not {H} and {W}")
        tokens = H * W // self.patch**2 + words
        check_activations("MMDiTConfig", [(self.blocks, tokens, self.width, self.heads)])


class MMDiT(Module):
    """(x_u, u, text) -> output, of x_u's shape.  The system decides what it predicts."""

    def __init__(self, config: MMDiTConfig, rng: np.random.Generator):
        c = self.config = config
        C, folded = c.width, c.channels * c.patch**2
        self.time1, self.time2, self.pooled = Linear(C, C, rng), Linear(C, C, rng), Linear(c.text, C, rng)
        self.patches, self.words = Linear(folded, C, rng), Linear(c.text, C, rng)
        self.blocks = [JointBlock(C, c.heads, rng) for _ in range(c.blocks - 1)]
        self.last = LastBlock(C, c.heads, rng)
        self.modulation = Linear(C, 2 * C, rng, zero=True)
        self.out = Linear(C, folded, rng, zero=True)

    def forward(self, x: Tensor, u, text: TextStates) -> Tensor:
        """x (B, H, W, C), u (B,) in [0, 1], text the captions' states -> (B, H, W, C)."""
        self._check(x, u, text)
        p, C, xp = self.config.patch, self.config.width, xp_of(x.data)
        (B, H, W, _), M = x.shape, text.tokens.shape[1]
        emb = Tensor(moved(sinusoidal_embedding(TIME_RANGE * u, C, dtype=x.dtype), x.data))         # (B, C)
        emb = ops.silu(self.time2(ops.silu(self.time1(emb))) + self.pooled(text.pooled))

        h = conv.space_to_depth(x, p).reshape(B, H // p * (W // p), -1)             # (B, N, p p channels)
        N = h.shape[1]
        h = self.patches(h) + Tensor(moved(grid_embedding(H // p, W // p, C, x.dtype), x.data))     # (B, N, C)
        words = self.words(text.tokens)                                             # (B, M, C)
        # every token attends to all patches, and to the words of its caption, but not to padding
        mask = xp.concatenate([xp.ones((B, N), bool), xp.asarray(text.mask)], axis=1).reshape(B, 1, 1, N + M)
        for block in self.blocks:
            h, words = block(h, words, emb, mask)
        h = self.last(h, words, emb, mask)
        shift, scale = parts(self.modulation(emb), 2)
        h = self.out(modulated(h, shift, scale))                                    # (B, N, p p channels)
        return conv.depth_to_space(h.reshape(B, H // p, W // p, -1), p)             # (B, H, W, channels)

    def _check(self, x: Tensor, u, text: TextStates) -> None:
        c = self.config
        if x.ndim != 4 or x.shape[3] != c.channels or x.shape[1] % c.patch or x.shape[2] % c.patch:
            raise ValueError(f"MMDiT: x must be (B, H, W, {c.channels}) with H and W multiples of {c.patch}, "
                             f"not {x.shape}")
        if u.shape != x.shape[:1]:
            raise ValueError(f"MMDiT: u must have one time for each image, shape {x.shape[:1]}, not {u.shape}")
        if text.tokens.shape[2] != c.text:
            raise ValueError(f"MMDiT: text.tokens must have {c.text} channels, not {text.tokens.shape[2]}")


class JointBlock(Module):
    """x (B, N, C) and c (B, M, C) -> x and c, both changed by what they read in each other."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator):
        self.image, self.text = Stream(C, heads, rng), Stream(C, heads, rng)

    def forward(self, x: Tensor, c: Tensor, emb: Tensor, mask) -> tuple[Tensor, Tensor]:
        """emb (B, C): of the time and the pooled caption.  mask (B, 1, 1, N + M): the tokens that are attended to."""
        N, m_x, m_c = x.shape[1], self.image.modulation_of(emb), self.text.modulation_of(emb)
        qkv = ops.concat([self.image.read(x, m_x), self.text.read(c, m_c)], axis=3)     # (3, B, h, N + M, d)
        # y = softmax([q_x; q_c] [k_x; k_c]^T / sqrt(d)) [v_x; v_c]
        y = join_heads(scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], mask))  # (B, N + M, C)
        return self.image.write(x, y[:, :N], m_x), self.text.write(c, y[:, N:], m_c)


class LastBlock(Module):
    """x (B, N, C) and c (B, M, C) -> x: the text is read for the last time, and its stream ends."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator):
        self.heads, self.image = heads, Stream(C, heads, rng)
        self.modulation, self.text_kv = Linear(C, 2 * C, rng, zero=True), Linear(C, 2 * C, rng)

    def forward(self, x: Tensor, c: Tensor, emb: Tensor, mask) -> Tensor:
        m_x, (shift, scale) = self.image.modulation_of(emb), parts(self.modulation(emb), 2)
        qkv, kv = self.image.read(x, m_x), split_heads(self.text_kv(modulated(c, shift, scale)), 2, self.heads)
        kv = ops.concat([qkv[1:], kv], axis=3)                                      # (2, B, h, N + M, d)
        # y_x = softmax(q_x [k_x; k_c]^T / sqrt(d)) [v_x; v_c]
        return self.image.write(x, join_heads(scaled_dot_product_attention(qkv[0], kv[0], kv[1], mask)), m_x)


class Stream(Module):
    """The weights that a block has for one kind of tokens, around the attention."""

    def __init__(self, C: int, heads: int, rng: np.random.Generator):
        self.heads = heads
        self.modulation = Linear(C, 6 * C, rng, zero=True)  # adaLN-Zero
        self.qkv, self.out = Linear(C, 3 * C, rng), Linear(C, C, rng)
        self.mlp_in, self.mlp_out = Linear(C, EXPAND * C, rng), Linear(EXPAND * C, C, rng)

    def modulation_of(self, emb: Tensor) -> list[Tensor]:
        """shift, scale and gate of the attention, then those of the MLP: (B, 1, C) each."""
        return parts(self.modulation(emb), 6)

    def read(self, x: Tensor, m: list[Tensor]) -> Tensor:
        """The queries, keys and values of the tokens x (B, N, C): (3, B, h, N, d)."""
        shift, scale = m[:2]
        return split_heads(self.qkv(modulated(x, shift, scale)), 3, self.heads)

    def write(self, x: Tensor, y: Tensor, m: list[Tensor]) -> Tensor:
        """The tokens x (B, N, C) after what they read, y (B, N, C), and after the MLP."""
        gate, mlp_shift, mlp_scale, mlp_gate = m[2:]
        # x <- x + gate linear(y)
        x = x + gate * self.out(y)
        # x <- x + gate' mlp((1 + scale') norm(x) + shift')
        return x + mlp_gate * self.mlp_out(ops.gelu(self.mlp_in(modulated(x, mlp_shift, mlp_scale))))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) norm(x) + shift: x (B, N, C), shift and scale (B, 1, C)."""
    C, xp = x.shape[2], xp_of(x.data)
    x_hat = norm.layer_norm(x, Tensor(xp.ones(C, x.dtype)), Tensor(xp.zeros(C, x.dtype)))
    return x_hat * (1 + scale) + shift


def parts(m: Tensor, count: int) -> list[Tensor]:
    """(B, count C) -> count Tensors (B, 1, C), which broadcast over tokens."""
    m = m.reshape(m.shape[0], count, 1, -1)
    return [m[:, i] for i in range(count)]


def split_heads(y: Tensor, count: int, heads: int) -> Tensor:
    """(B, N, count C) -> (count, B, h, N, d): each of `count` rows of C channels in h heads."""
    B, N, D = y.shape
    return y.reshape(B, N, count, heads, D // (count * heads)).transpose(2, 0, 3, 1, 4)


def join_heads(y: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, C)."""
    B, h, N, d = y.shape
    return y.transpose(0, 2, 1, 3).reshape(B, N, h * d)


def grid_embedding(rows: int, columns: int, C: int, dtype=np.float32) -> np.ndarray:
    """The places of a grid's tokens, row by row, (rows columns, C): the first half of the channels tells the row."""
    row, column = (sinusoidal_embedding(np.arange(n), C // 2, dtype=dtype) for n in (rows, columns))
    shape = rows, columns, C // 2
    both = np.broadcast_to(row[:, None], shape), np.broadcast_to(column[None], shape)
    return np.concatenate(both, axis=2).reshape(rows * columns, C)
