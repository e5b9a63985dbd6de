"""The autoencoder of Stable Diffusion: pictures to latents an eighth as high and wide, and back (Rombach et al. 2022,
section 3.1).

    encoder    x --> conv --> [block] [block] --stride 2--> ... --> middle --> norm, conv --> mean, log variance
    decoder    z --> conv --> middle --> [block] [block] [block] --nearest x 2--> ... --> norm, conv --> x_hat

The middle is a residual block, attention of one head over all positions, and a residual block.  nn/autoencoder.py is a
small one of the same kind.  The scale between these latents and those of the diffusion is the system's matter.
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.pretrained.config import Config
from minidiff.pretrained.layers import Attention, Conv2d, GroupNorm, Linear, ResidualBlock, Upsample, numbered, tried
from minidiff.pretrained.weights import Weights

EPS = 1e-6                                                  # of all norms
LOG_VARIANCE = (-30.0, 20.0)                                # what the encoder's log variance is clipped to


class Autoencoder(Module):
    """encode: (B, H, W, 3) -> mean and variance (B, H/8, W/8, 4); decode: back.  Pictures are in [-1, 1]."""

    def __init__(self, config: Config, weights: Weights):
        check(config)
        levels = len(config.texts("down_block_types"))
        blocks, groups = config.whole("layers_per_block", 1), config.whole("norm_num_groups", 32)
        attends = config.flag("mid_block_add_attention", True)
        self.factor = 2 ** (levels - 1)                     # pixels a latent, each way
        self.encoder = Encoder(weights.part("encoder"), levels, blocks, groups, attends)
        self.decoder = Decoder(weights.part("decoder"), levels, blocks + 1, groups, attends)
        self.quant = Linear(weights.part("quant_conv")) if "quant_conv" in weights else None
        self.post_quant = Linear(weights.part("post_quant_conv")) if "post_quant_conv" in weights else None
        weights.check_all_used()
        latents, f = weights.shape("decoder.conv_in.weight")[1], self.factor
        tried(weights, "decoder", lambda: self.decode(Tensor(np.zeros((1, 1, 1, latents), weights.dtype))))
        tried(weights, "encoder", lambda: self.encode(Tensor(np.zeros((1, f, f, 3), weights.dtype))))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) of q(z | x)."""
        h = self.encoder(x)
        h = h if self.quant is None else self.quant(h)                              # (B, H/8, W/8, 8)
        C = h.shape[-1] // 2
        return h[..., :C], ops.clip(h[..., C:], *LOG_VARIANCE)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant is None else self.post_quant(z))


class Encoder(Module):
    """(B, H, W, 3) -> (B, H/8, W/8, 2 C)."""

    def __init__(self, weights: Weights, levels: int, blocks: int, groups: int, attends: bool):
        self.conv_in = Conv2d(weights.part("conv_in"))
        parts = numbered(weights, "down_blocks", levels)
        self.levels = [Blocks(part, blocks, groups) for part in parts]
        self.downsample = [Conv2d(part.part("downsamplers.0.conv"), stride=2, padding=0) for part in parts[:-1]]
        self.middle = Middle(weights.part("mid_block"), groups, attends)
        self.norm_out = GroupNorm(weights.part("conv_norm_out"), groups, EPS)
        self.conv_out = Conv2d(weights.part("conv_out"))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.downsample):
                h = self.downsample[i](padded(h))                                   # (B, H/2, W/2, C)
        return self.conv_out(self.norm_out.then_silu(self.middle(h)))


class Decoder(Module):
    """(B, h, w, C) -> (B, 8 h, 8 w, 3)."""

    def __init__(self, weights: Weights, levels: int, blocks: int, groups: int, attends: bool):
        self.conv_in = Conv2d(weights.part("conv_in"))
        self.middle = Middle(weights.part("mid_block"), groups, attends)
        parts = numbered(weights, "up_blocks", levels)
        self.levels = [Blocks(part, blocks, groups) for part in parts]
        self.upsample = [Upsample(part.part("upsamplers.0")) for part in parts[:-1]]
        self.norm_out = GroupNorm(weights.part("conv_norm_out"), groups, EPS)
        self.conv_out = Conv2d(weights.part("conv_out"))

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.upsample):
                h = self.upsample[i](h)                                             # (B, 2h, 2w, C)
        return self.conv_out(self.norm_out.then_silu(h))


class Blocks(Module):
    """The residual blocks of one resolution: (B, H, W, C) -> (B, H, W, D)."""

    def __init__(self, weights: Weights, blocks: int, groups: int):
        self.blocks = [ResidualBlock(part, groups, EPS) for part in numbered(weights, "resnets", blocks)]

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


class Middle(Module):
    """Block, attention, block at the lowest resolution: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, weights: Weights, groups: int, attends: bool):
        self.block1, self.block2 = (ResidualBlock(part, groups, EPS) for part in numbered(weights, "resnets", 2))
        part = weights.part("attentions.0")
        self.norm = GroupNorm(part.part("group_norm"), groups, EPS) if attends else None
        self.attention = Attention(part, heads=1) if attends else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.block1(h)
        if self.attention is not None:
            B, H, W, C = h.shape
            h = h + self.attention(self.norm(h).reshape(B, H * W, C)).reshape(B, H, W, C)
        return self.block2(h)


def padded(x: Tensor) -> Tensor:
    """A row of zeros below and a column to the right: how this encoder halves a resolution."""
    return Tensor(xp_of(x.data).pad(x.data, ((0, 0), (0, 1), (0, 1), (0, 0))))


def scaling(config: Config) -> tuple[float, float]:
    """(factor, shift): the diffusion's latents are factor (z - shift)."""
    return config.positive("scaling_factor", 0.18215), config.number("shift_factor", 0.0)


def check(config: Config) -> None:
    """UserError where the configuration names another kind of autoencoder."""
    config.require(_class_name="AutoencoderKL", act_fn="silu", latents_mean=None, latents_std=None)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        for found in config.texts(name):
            if found != kind:
                raise UserError(f"{config.path}: {name} has {found[:60]!r}; it takes {kind}.")
