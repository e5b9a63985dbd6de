"""The convolutional encoder and decoder of autoencoders: an image to a grid of a quarter of its height and width, and
back.

    encoder    x --patch--> conv --> [block] --down--> [block] [block] --> norm, conv --> (B, H/4, W/4, out)
    decoder    z --> conv --> [block] [block] --up--> [block] --> norm, conv --unpatch--> (B, H, W, channels)

The system decides what the numbers of the grid mean: the mean and variance of a Gaussian, logits of a codebook, or a
vector to quantise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import conv
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths must be multiples of groups; an image's height and width must be multiples of 4."""

    channels: int = 1                       # of the image
    widths: tuple[int, ...] = (32, 64)      # channels at half and at a quarter of the resolution
    groups: int = 8

    def __post_init__(self):
        if len(self.widths) != 2 or min(self.channels, self.groups, *self.widths) < 1 \
                or any(w % self.groups for w in self.widths):
            raise ValueError(f"AutoencoderConfig: widths takes two multiples of groups ({self.groups}), "
                             f"not {self.widths}")


class Encoder(Module):
    """(B, H, W, channels) -> (B, H/4, W/4, out)."""

    def __init__(self, config: AutoencoderConfig, out: int, rng: np.random.Generator):
        half, quarter = config.widths
        self.conv_in = Conv2d(4 * config.channels, half, rng)
        self.block1 = ConvBlock(half, config.groups, rng)
        self.downsample = Linear(4 * half, quarter, rng)
        self.block2, self.block3 = ConvBlock(quarter, config.groups, rng), ConvBlock(quarter, config.groups, rng)
        self.norm_out, self.conv_out = GroupNorm(quarter, config.groups), Conv2d(quarter, out, rng, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block1(self.conv_in(conv.space_to_depth(x)))                       # (B, H/2, W/2, half)
        h = self.downsample(conv.space_to_depth(h))                                 # (B, H/4, W/4, quarter)
        return self.conv_out(self.norm_out.then_silu(self.block3(self.block2(h))))


class Decoder(Module):
    """(B, H/4, W/4, code) -> (B, H, W, channels)."""

    def __init__(self, config: AutoencoderConfig, code: int, rng: np.random.Generator):
        half, quarter = config.widths
        self.conv_in = Conv2d(code, quarter, rng)
        self.block1, self.block2 = ConvBlock(quarter, config.groups, rng), ConvBlock(quarter, config.groups, rng)
        self.upsample = Linear(quarter, 4 * half, rng)
        self.block3 = ConvBlock(half, config.groups, rng)
        self.norm_out, self.conv_out = GroupNorm(half, config.groups), Conv2d(half, 4 * config.channels, rng)

    def forward(self, z: Tensor) -> Tensor:
        h = self.block2(self.block1(self.conv_in(z)))                               # (B, H/4, W/4, quarter)
        h = self.block3(conv.depth_to_space(self.upsample(h)))                      # (B, H/2, W/2, half)
        return conv.depth_to_space(self.conv_out(self.norm_out.then_silu(h)))       # (B, H, W, channels)


class ConvBlock(Module):
    """y = x + conv(silu(norm(conv(silu(norm(x)))))), of x's shape (B, H, W, C).  The last convolution starts at 0."""

    def __init__(self, C: int, groups: int, rng: np.random.Generator):
        self.norm1, self.conv1 = GroupNorm(C, groups), Conv2d(C, C, rng)
        self.norm2, self.conv2 = GroupNorm(C, groups), Conv2d(C, C, rng, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2.then_silu(self.conv1(self.norm1.then_silu(x))))
