"""The UNet (Ronneberger et al. 2015; as a denoiser: Ho et al. 2020, Dhariwal & Nichol 2021).

    x_t --patch--> conv --> [block] --+--------- skip ---------+--> [block] --> norm, conv --unpatch--> output
                              | down                           | up
                            [block] --+-- skip --+--> [block]
                                      |          |
                                      [  middle  ]

The time t and the pooled caption reach each block through its norm, y = (1 + scale) x_hat + shift, where scale and
shift are computed from them (Dhariwal & Nichol 2021, section 3.1).  At low resolution, each word also reaches the
pixels through cross-attention.  The first step folds squares of pixels into channels (`patch`), so that an image of
28 x 28 is processed at 14 x 14 and 7 x 7.  Residual branches and the output start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff.engine import conv, norm, ops
from minidiff.engine.backend import moved
from minidiff.engine.tensor import Tensor
from minidiff.nn.activations import check_activations
from minidiff.nn.layers import Conv2d, GroupNorm, LayerNorm, Linear, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.transformer import Attention


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet.

    An image's height and width must be multiples of patch * 2**(levels - 1).  The widths, and the sums of widths where
    a skip is concatenated, must be multiples of groups, and of heads at levels with attention.
    """

    channels: int = 1                       # input channels, of the image
    patch: int = 2                          # squares of patch x patch pixels become channels
    widths: tuple[int, ...] = (64, 128)     # channels of each level; each next one has half the resolution
    blocks: int = 1                         # residual blocks of a level, on the way down and on the way up
    attention: tuple[bool, ...] = (False, True)     # which levels have attention; the middle always has
    heads: int = 4
    groups: int = 8                         # of the group norms
    embedding: int = 256                    # channels of the time's embedding
    text: int = 0                           # channels of a caption's token states; 0 for a UNet without captions
    out: int = 0                            # output channels; 0 for as many as input channels

    def __post_init__(self):
        if len(self.attention) != len(self.widths):
            raise ValueError(f"UNetConfig: attention takes one entry for each of the {len(self.widths)} widths, "
                             f"not {self.attention}")
        if not self.widths or min(self.channels, self.patch, self.blocks, self.heads, self.groups, *self.widths) < 1:
            raise ValueError("UNetConfig: channels, patch, widths, blocks, heads and groups must be at least 1")
        if self.embedding < 2 or self.embedding % 2 or min(self.text, self.out) < 0:
            raise ValueError(f"UNetConfig: embedding must be even and at least 2, and text and out at "
                             f"least 0, not {self.embedding}, {self.text} and {self.out}")

    @property
    def multiple(self) -> int:
        """What an image's height and width must be multiples of."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_image(self, H: int, W: int) -> None:
        """ValueError unless images of this size divide into the UNet's levels and are not too large for it."""
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"UNetConfig: an image's sides must be multiples of {self.multiple}, not {H} and {W}")
        sizes = [H * W // (self.patch * 2**level) ** 2 for level in range(len(self.widths))]
        levels = [(2 * self.blocks, n, width, self.heads * attention)
                  for n, width, attention in zip(sizes, self.widths, self.attention, strict=True)]
        check_activations("UNetConfig", [*levels, (1, sizes[-1], self.widths[-1], self.heads)])


class UNet(Module):
    """(x_t, t, text) -> output, of x_t's height and width.  The system decides what it is: eps, x0, v, or numbers of a
    mixture (pixel_mixture.py)."""

    def __init__(self, config: UNetConfig, rng: np.random.Generator):
        c = self.config = config
        folded = c.channels * c.patch**2
        self.time1, self.time2 = Linear(c.embedding, c.embedding, rng), Linear(c.embedding, c.embedding, rng)
        self.pooled = Linear(c.text, c.embedding, rng) if c.text else None
        self.conv_in = Conv2d(folded, c.widths[0], rng)

        self.down_blocks, self.downsample, skips, width = [], [], [], c.widths[0]
        for level, out in enumerate(c.widths):
            if level:
                self.downsample.append(Linear(4 * width, out, rng))
                width = out
            for _ in range(c.blocks):
                self.down_blocks.append(UNetBlock(c, width, out, c.attention[level], rng))
                skips.append(out)
        self.middle = UNetBlock(c, width, width, True, rng)
        self.up_blocks, self.upsample = [], []
        for level, out in reversed(list(enumerate(c.widths))):
            for _ in range(c.blocks):
                self.up_blocks.append(UNetBlock(c, width + skips.pop(), out, c.attention[level], rng))
                width = out
            if level:
                self.upsample.append(Linear(width, 4 * c.widths[level - 1], rng))
                width = c.widths[level - 1]
        self.norm_out = GroupNorm(width, c.groups)
        self.conv_out = Conv2d(width, (c.out or c.channels) * c.patch**2, rng, zero=True)

    def forward(self, x: Tensor, t, text: TextStates | None = None, extra: Tensor | None = None) -> Tensor:
        """x (B, H, W, C), t (B,) training times, text the captions' states -> (B, H, W, C), or with `out` channels.

        extra (B, E): added to the embedding of the time, which has E channels.
        """
        c = self.config
        self._check(x, t, text)
        emb = Tensor(moved(self.time_embedding(t, x.dtype), x.data))                # (B, E)
        emb = self.time2(ops.silu(self.time1(emb)))
        if text is not None:
            emb = self.pooled.added_to(emb, text.pooled)    # emb + pooled(text)
        if extra is not None:
            emb = emb + extra
        emb = ops.silu(emb)

        h = conv.space_to_depth(x, c.patch)                                         # (B, H/p, W/p, p p C)
        h = self.conv_in(h)                                                         # (B, H/p, W/p, widths[0])
        skips = []
        for i, block in enumerate(self.down_blocks):        # c.blocks of each level
            if i and i % c.blocks == 0:                     # the next level: half the resolution
                h = self.downsample[i // c.blocks - 1](conv.space_to_depth(h))      # (B, H/2p, W/2p, widths[1])
            h = block(h, emb, text)
            skips.append(h)
        h = self.middle(h, emb, text)
        for i, block in enumerate(self.up_blocks):
            if i and i % c.blocks == 0:                     # back to twice the resolution
                h = conv.depth_to_space(self.upsample[i // c.blocks - 1](h))        # (B, H/p, W/p, widths[0])
            h = block(ops.concat([h, skips.pop()]), emb, text)
        h = self.conv_out(self.norm_out.then_silu(h))                               # (B, H/p, W/p, p p C)
        return conv.depth_to_space(h, c.patch)                                      # (B, H, W, C)

    def time_embedding(self, t, dtype) -> np.ndarray:
        """What `forward` moves to its device for times t (B,): (B, E)."""
        return sinusoidal_embedding(t, self.config.embedding, dtype=dtype)

    def keys_values(self, tokens: Tensor) -> list[Tensor]:
        """What each cross-attention reads of the captions' tokens (B, M, D): keys and values, (B, M, 2 C), in order.

        They depend on neither x_t nor t, so a sampler computes them once for all its steps.
        """
        return [layer.keys_values(tokens) for layer in self._cross_attentions()]

    def with_keys_values(self, text: TextStates, keys_values: Sequence[Tensor]) -> TextStates:
        """The states with what `keys_values` gave for them, or with nothing."""
        layers = self._cross_attentions() if keys_values else []
        return replace(text, keys_values=dict(zip(layers, keys_values, strict=True)))

    def _cross_attentions(self) -> list[SpatialAttention]:
        return [part for _, part in self.modules() if isinstance(part, SpatialAttention) and part.cross_attention]

    def _check(self, x: Tensor, t, text) -> None:
        c, m = self.config, self.config.multiple
        if x.ndim != 4 or x.shape[3] != c.channels or x.shape[1] % m or x.shape[2] % m:
            raise ValueError(f"UNet: x must be (B, H, W, {c.channels}) with H and W multiples of {m} "
                             f"(patch {c.patch}, {len(c.widths)} levels), not {x.shape}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"UNet: t must have one time for each image, shape {x.shape[:1]}, not {t.shape}")
        if (text is None) != (c.text == 0):
            raise ValueError(f"UNet: this one was made {'without' if c.text == 0 else 'with'} captions "
                             f"(text={c.text}), and was called {'without' if text is None else 'with'} them")


@dataclass(frozen=True)
class TextStates:
    """The output of a text encoder for B captions of M tokens."""

    tokens: Tensor                          # (B, M, D) one state a token
    pooled: Tensor                          # (B, D)    one state a caption
    mask: np.ndarray                        # (B, M)    True where there is a token, False where padding
    keys_values: Mapping[SpatialAttention, Tensor] = field(default_factory=dict)    # those known (UNet.keys_values)


class UNetBlock(Module):
    """A residual block; then, if `attends`, self-attention and cross-attention to the caption."""

    def __init__(self, config: UNetConfig, C: int, D: int, attends: bool, rng: np.random.Generator):
        self.block = ResidualBlock(C, D, config.embedding, config.groups, rng)
        self.attention = SpatialAttention(D, config, rng) if attends else None

    def forward(self, x: Tensor, emb: Tensor, text: TextStates | None) -> Tensor:
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x, text)


class ResidualBlock(Module):
    """y = x + conv(silu(adaptive_norm(conv(silu(norm(x))), emb))):  (B, H, W, C), (B, E) -> (B, H, W, D)."""

    def __init__(self, C: int, D: int, E: int, groups: int, rng: np.random.Generator):
        self.norm1, self.conv1 = GroupNorm(C, groups), Conv2d(C, D, rng)
        self.groups, self.modulation = groups, Linear(E, 2 * D, rng, zero=True)
        self.conv2 = Conv2d(D, D, rng, zero=True)
        self.skip = Linear(C, D, rng) if C != D else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1.then_silu(x))
        # gamma = 1 + scale,   beta = 0 + shift
        unchanged = Tensor(norm.one_and_zero(emb.data, h.shape[3]))                 # (B, 2 D)
        gamma_beta = self.modulation.added_to(unchanged, emb)
        h = norm.modulated_group_norm(h, self.groups, gamma_beta, silu=True)
        h = self.conv2(h)
        # y = x + h
        return x + h if self.skip is None else self.skip.added_to(h, x)


class SpatialAttention(Module):
    """Each position of the grid is a token: it attends to all positions, then to the words of the caption."""

    def __init__(self, C: int, config: UNetConfig, rng: np.random.Generator):
        self.norm1, self.self_attention = GroupNorm(C, config.groups), Attention(C, config.heads, rng)
        self.norm2 = GroupNorm(C, config.groups) if config.text else None
        self.norm_text = LayerNorm(config.text) if config.text else None
        self.cross_attention = Attention(C, config.heads, rng, context=config.text) if config.text else None

    def forward(self, x: Tensor, text: TextStates | None) -> Tensor:
        B, H, W, C = x.shape
        h = x.reshape(B, H * W, C)                                                  # (B, N, C)
        # h <- h + attention(norm(h))
        h = self.self_attention.added_to(h, self.norm1(h))
        if text is not None:
            mask = text.mask[:, None, None]                                         # (B, 1, 1, M)
            kv = text.keys_values[self] if text.keys_values else self.keys_values(text.tokens)
            h = self.cross_attention.read_into(h, self.norm2(h), kv, mask)
        return h.reshape(B, H, W, C)

    def keys_values(self, tokens: Tensor) -> Tensor:
        """The keys and values of the caption's tokens (B, M, D), side by side: (B, M, 2 C)."""
        return self.cross_attention.kv(self.norm_text(tokens))
