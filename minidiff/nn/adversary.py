"""A discriminator of image patches, and the losses of the discriminator and of the decoder that it trains.

    L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat))       trains the discriminator only         (hinge)
    L_G = -E D(x_hat)                                       trains the network that made x_hat only

The papers alternate: a step for the discriminator, then a step for the decoder, each with its own optimiser. Here both
losses are added, L_G + L_D, and each network receives only the gradient of its own loss: L_D sees sg[x_hat] (sg stops
the gradient), and L_G sees a copy of the discriminator with constant weights. One step of one optimiser then updates
both networks simultaneously. A reversed gradient would be wrong, since the two hinge losses are not the negative of
each other.

    PatchGAN  Isola et al. 2017, arXiv 1611.07004, section 3.2.2
    hinge     Lim & Ye 2017, arXiv 1705.02894
    both in an autoencoder: Esser et al. 2021, arXiv 2012.09841, eq. 5 to 7, which prints logarithms for the hinge
"""

from __future__ import annotations

import copy

import numpy as np

from minidiff.engine import conv, ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input


class PatchDiscriminator(Module):
    """(B, H, W, channels) -> (B, H/4, W/4, 1), a logit for each patch of 16 x 16 pixels: larger looks more real.

    The norms take their means and variances over the whole image, so a logit depends a little on the rest too.
    """

    def __init__(self, channels: int, width: int, rng: np.random.Generator):
        self.conv1 = Conv2d(4 * channels, width, rng)
        self.downsample, self.norm1 = Linear(4 * width, 2 * width, rng), GroupNorm(2 * width, 4)
        self.conv2, self.norm2 = Conv2d(2 * width, 2 * width, rng), GroupNorm(2 * width, 4)
        self.conv_out = Conv2d(2 * width, 1, rng, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.silu(self.conv1(conv.space_to_depth(x)))                            # (B, H/2, W/2, width)
        h = self.norm1.then_silu(self.downsample(conv.space_to_depth(h)))           # (B, H/4, W/4, 2 width)
        return self.conv_out(self.norm2.then_silu(self.conv2(h)))


def discriminator_loss(D: Module, x: np.ndarray, x_hat: Tensor) -> Tensor:
    """L_D, ().  Its gradient reaches D's parameters, and not x_hat.  x, x_hat: (B, H, W, channels)."""
    real, fake = (as_float32(D(as_input(D, images))) for images in (x, x_hat.detach()))
    # L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(sg[x_hat]))
    return ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + fake))


def generator_loss(D: Module, x_hat: Tensor) -> Tensor:
    """L_G, ().  Its gradient reaches x_hat, and not D's parameters."""
    # L_G = -E sg[D](x_hat)
    return -ops.mean(as_float32(frozen(D)(as_input(D, x_hat))))


def frozen(module: Module) -> Module:
    """A copy of the module with constant parameters, which share the arrays that the module has now."""
    def constant(value):
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, (list, tuple)):
            return [constant(part) for part in value]
        return frozen(value) if isinstance(value, Module) else value
    twin = copy.copy(module)
    vars(twin).update({name: constant(value) for name, value in vars(module).items()})
    return twin
