"""The image tower of CLIP: a small convolutional network that maps an image to one vector.

    pixels --> conv --> [block] --down--> [block] --> norm, silu --> linear --> all positions as one vector --> linear
      H x W         H/2 x W/2         H/4 x W/4           H/4 x W/4 x last

All layers but the last treat every position alike; the last one has weights of its own for each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import conv
from minidiff.engine.tensor import Tensor
from minidiff.nn.activations import check_activations
from minidiff.nn.autoencoder import ConvBlock
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module


@dataclass(frozen=True)
class ImageTowerConfig:
    """ValueError unless height and width are multiples of 4, there are 1 to 4 channels, and widths are two
    multiples of groups."""

    shape: tuple[int, int, int] = (28, 28, 1)   # of an image: (H, W, C)
    widths: tuple[int, ...] = (32, 64)      # channels at half and at a quarter of the resolution
    groups: int = 8
    last: int = 16                          # channels of the last grid, which becomes one vector

    def __post_init__(self):
        check_shape("ImageTowerConfig", self.shape)
        if len(self.widths) != 2 or min(self.groups, self.last, *self.widths) < 1 \
                or any(w % self.groups for w in self.widths):
            raise ValueError(f"ImageTowerConfig: widths takes two multiples of groups ({self.groups}), "
                             f"not {self.widths}")
        check_two_halvings("ImageTowerConfig", self.shape, self.widths)

    @property
    def flat(self) -> int:
        """The length of the vector that the last grid becomes: H/4 * W/4 * last."""
        H, W, _ = self.shape
        return H // 4 * (W // 4) * self.last


class ImageTower(Module):
    """Images (B, H, W, C) in [-1, 1] -> embeddings (B, D), not normalised."""

    def __init__(self, config: ImageTowerConfig, D: int, rng: np.random.Generator):
        half, quarter = config.widths
        self.config = config
        self.conv_in, self.block1 = Conv2d(4 * config.shape[2], half, rng), ConvBlock(half, config.groups, rng)
        self.downsample, self.block2 = Linear(4 * half, quarter, rng), ConvBlock(quarter, config.groups, rng)
        self.norm, self.narrow = GroupNorm(quarter, config.groups), Linear(quarter, config.last, rng)
        self.project = Linear(config.flat, D, rng)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.config.shape)
        h = self.block1(self.conv_in(conv.space_to_depth(x)))                       # (B, H/2, W/2, half)
        h = self.block2(self.downsample(conv.space_to_depth(h)))                    # (B, H/4, W/4, quarter)
        h = self.narrow(self.norm.then_silu(h))                                     # (B, H/4, W/4, last)
        return self.project(h.reshape(len(x.data), self.config.flat))


# --- checks -------------------------------------------------------------------------------------------------

def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """ValueError, which names the configuration, unless the shape is one that a network of two halvings takes."""
    if len(shape) != 3 or min(shape) < 1 or shape[0] % 4 or shape[1] % 4 or shape[2] > 4:
        raise ValueError(f"{name}: shape must be (H, W, C), H and W multiples of 4 and C 1 to 4, not {shape}")


def check_two_halvings(name: str, shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    """ValueError where images of this shape are too large for a network of these two widths."""
    n = shape[0] * shape[1]
    check_activations(name, [(4, n // 4, widths[0], 0), (4, n // 16, widths[1], 0)])


def check_images(x, shape: tuple[int, int, int]) -> None:
    """ValueError unless x is a batch of images of this shape (H, W, C)."""
    if x.ndim != 4 or x.shape[1:] != tuple(shape):
        raise ValueError(f"images must be (B, {', '.join(map(str, shape))}), not {x.shape}")
