"""A discriminator that looks at patches, and the two losses that it and the decoder play for.

    L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat))       moves the discriminator only         (hinge)
    L_G = -E D(x_hat)                                       moves what made x_hat only

The papers take turns: a step of the one, a step of the other, each with its own optimiser. Here both are one loss,
L_G + L_D, whose gradient each side receives only its own part of: L_D sees sg[x_hat], and L_G a copy of the
discriminator whose weights are constants. So one step of one optimiser moves both from where they stood, which is
simultaneous in place of alternating descent. Reversing a gradient would not do: the hinge's two losses are no
negatives of one another.

    PatchGAN  Isola et al. 2017, arXiv 1611.07004, section 3.2.2
    hinge     Lim & Ye 2017, arXiv 1705.02894; in an autoencoder: Esser et al. 2021, arXiv 2012.09841, eq. 6
"""

from __future__ import annotations

import copy

import numpy as np

from minidiff.engine import conv, ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module


class PatchDiscriminator(Module):
    """(B, H, W, channels) -> (B, H/4, W/4, 1): how real each patch of 16 x 16 pixels looks (and through the norms'
    means and variances, a little, the rest)."""

    def __init__(self, channels: int, width: int, rng: np.random.Generator):
        self.conv1 = Conv2d(4 * channels, width, rng)
        self.downsample, self.norm1 = Linear(4 * width, 2 * width, rng), GroupNorm(2 * width, 4)
        self.conv2, self.norm2 = Conv2d(2 * width, 2 * width, rng), GroupNorm(2 * width, 4)
        self.conv_out = Conv2d(2 * width, 1, rng, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.silu(self.conv1(conv.space_to_depth(x)))                            # (B, H/2, W/2, width)
        h = self.norm1.then_silu(self.downsample(conv.space_to_depth(h)))               # (B, H/4, W/4, 2 width)
        return self.conv_out(self.norm2.then_silu(self.conv2(h)))


def discriminator_loss(D: Module, x: np.ndarray, x_hat: Tensor) -> Tensor:
    """L_D, (): its gradient goes to D's parameters, none to x_hat."""
    # L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(sg[x_hat]))
    return ops.mean(ops.relu(1 - D(Tensor(x)))) + ops.mean(ops.relu(1 + D(x_hat.detach())))


def generator_loss(D: Module, x_hat: Tensor) -> Tensor:
    """L_G, (): its gradient goes to x_hat, none to D's parameters."""
    # L_G = -E sg[D](x_hat)
    return -ops.mean(frozen(D)(x_hat))


def frozen(module: Module) -> Module:
    """The same function, its parameters constants; it shares their arrays as they are now."""
    def constant(value):
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, (list, tuple)):
            return [constant(part) for part in value]
        return frozen(value) if isinstance(value, Module) else value
    twin = copy.copy(module)
    vars(twin).update({name: constant(value) for name, value in vars(module).items()})
    return twin
