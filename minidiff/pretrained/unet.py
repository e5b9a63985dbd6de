"""The UNet of Stable Diffusion (Rombach et al. 2022, section 3.3 and appendix; SDXL: Podell et al. 2023).

    z_t --> conv --> [block]...--+--------- skips ---------+--> [block]... --> norm, conv --> eps or v
                       | stride 2                          | nearest x 2
                     [block]...--+-- skips --+--> [block]...
                                 |           |
                               [   middle    ]

A block is a residual block, to which the time is added; and at most resolutions a transformer over its positions: they
attend to each other, then to the states of the prompt, then each passes through an MLP.  nn/unet.py does the same with
fewer parts: there the time scales a norm, and an image is folded by `patch`.

SDXL adds to the time's embedding the embedding of the whole prompt and of six numbers: the size of the training
picture, where it was cropped, and the size that is wanted (its section 2.2).  A latent consistency model adds the scale
of guidance, which it was trained to apply by itself (Luo et al. 2023, arXiv 2310.04378, section 4.2).
"""

from __future__ import annotations

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.pretrained.agreement import axis, cross_keys
from minidiff.pretrained.config import Config
from minidiff.pretrained.layers import (
    Attention,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    ResidualBlock,
    Upsample,
    numbered,
    tried,
)
from minidiff.pretrained.weights import Weights

# whether a kind of block reads the prompt
DOWN, UP = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}, {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
# how many residual blocks a kind of middle has: with two there is a transformer between them
MIDDLE = {None: 0, "UNetMidBlock2D": 1, "UNetMidBlock2DCrossAttn": 2}
MOST_BLOCKS = 64                                            # of a level


class UNet(Module):
    """eps or v of noised latents, from the prompt's states."""

    def __init__(self, config: Config, weights: Weights):
        check(config)
        down, up = config.texts("down_block_types"), config.texts("up_block_types")
        levels = len(down)
        blocks = config.wholes("layers_per_block", levels, 2)
        heads = config.wholes("num_attention_heads" if config.values.get("num_attention_heads") is not None
                              else "attention_head_dim", levels, 8)                 # the second is a misnomer
        if not 1 <= min(blocks) <= max(blocks) <= MOST_BLOCKS:
            raise UserError(f"{config.path}: layers_per_block takes 1 to {MOST_BLOCKS} for each level, not "
                            f"{min(blocks)} to {max(blocks)}.")
        depth_down, depth_up = depths(config, blocks)
        groups, eps = config.whole("norm_num_groups", 32), config.number("norm_eps", 1e-5)
        self.flip, self.shift = config.flag("flip_sin_to_cos", True), config.number("freq_shift", 0)
        self.channels = weights.shape("conv_in.weight")[1]

        self.conv_in = Conv2d(weights.part("conv_in"))
        time = weights.part("time_embedding")
        self.time1, self.time2 = Linear(time.part("linear_1")), Linear(time.part("linear_2"))
        reads_scale = config.values.get("time_cond_proj_dim") is not None
        self.of_scale = Linear(time.part("cond_proj")) if reads_scale else None
        if reads_scale and self.of_scale.w.shape[0] % 2:
            raise UserError(f"{config.path}: time_cond_proj_dim is {self.of_scale.w.shape[0]}; it takes an even one.")
        self.extra = SizeEmbedding(config, weights.part("add_embedding")) if "add_embedding" in weights else None
        self.down_blocks = [
            Level(part, DOWN[kind], blocks[i], heads[i], depth_down[i], groups, eps)
            for i, (part, kind) in enumerate(zip(numbered(weights, "down_blocks", levels), down, strict=True))]
        middle, count = weights.part("mid_block"), MIDDLE[middle_kind(config)]
        residual = [ResidualBlock(part, groups, eps) for part in numbered(middle, "resnets", count, least=0)]
        self.middle1, self.middle2 = (*residual, None, None)[:2]
        self.middle_attention = None
        if self.middle2 is not None:
            part = middle.part("attentions.0")
            self.middle_attention = SpatialTransformer(part, heads[-1], depth_down[-1][0], groups)
        self.up_blocks = [
            Level(part, UP[kind], blocks[-1 - i] + 1, heads[-1 - i], depth_up[i], groups, eps)
            for i, (part, kind) in enumerate(zip(numbered(weights, "up_blocks", levels), up, strict=True))]
        self.norm_out = GroupNorm(weights.part("conv_norm_out"), groups, eps)
        self.conv_out = Conv2d(weights.part("conv_out"))
        weights.check_all_used()
        tried(weights, "UNet", lambda: self._smallest(config, weights))

    @property
    def reads_scale(self) -> bool:
        """Whether the network does guidance by itself, at the scale that it is given."""
        return self.of_scale is not None

    def forward(self, z_t: Tensor, t: np.ndarray, text: Tensor, pooled: Tensor | None = None,
                sizes: np.ndarray | None = None, scale: float = 1.0) -> Tensor:
        """z_t (B, h, w, C), t (B,) training times, text (B, M, D) -> (B, h, w, 4).

        SDXL alone takes pooled (B, P), the embedding of the whole prompt, and sizes (B, 6).  scale: of guidance, for
        a network that reads it.
        """
        waves = self._sinusoidal(t, self.time1.w)                                   # (B, widths[0])
        if self.of_scale is not None:                       # the paper's w is scale - 1
            w = sinusoidal(np.full(len(t), 1000 * (scale - 1)), self.of_scale.w.shape[0], False, 1, waves.dtype)
            waves = waves + self.of_scale(Tensor(xp_of(waves.data).asarray(w)))
        emb = self.time2(ops.silu(self.time1(waves)))                               # (B, E)
        if self.extra is not None:
            emb = emb + self.extra(pooled, sizes)
        emb = ops.silu(emb)

        h = self.conv_in(z_t)                                                       # (B, h, w, widths[0])
        skips = [h]
        for level in self.down_blocks:
            for block, attention in level.pairs():
                h = attention(block(h, emb), text)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)                                                 # (B, h/2, w/2, widths[i])
                skips.append(h)
        if self.middle1 is not None:
            h = self.middle1(h, emb)
        if self.middle2 is not None:
            h = self.middle2(self.middle_attention(h, text), emb)
        for level in self.up_blocks:
            for block, attention in level.pairs():
                h = attention(block(ops.concat([h, skips.pop()]), emb), text)
            if level.resize is not None:
                h = level.resize(h, skips[-1].shape[1:3])                           # an odd size was rounded up
        return self.conv_out(self.norm_out.then_silu(h))                            # (B, h, w, 4)

    def _smallest(self, config: Config, weights: Weights) -> Tensor:
        """Its answer for a latent of one position and a prompt of one token."""
        reads = cross_keys(weights)
        width = axis(weights, reads[0], 1) if reads else 1
        pooled, sizes = None, None
        if self.extra is not None:
            sizes = np.zeros((1, 6), np.float32)
            pooled = self.extra.linear1.w.shape[0] - 6 * self.extra.dim
            pooled = Tensor(np.zeros((1, pooled), weights.dtype))
        z, text = np.zeros((1, 1, 1, self.channels), weights.dtype), np.zeros((1, 1, width), weights.dtype)
        return self.forward(Tensor(z), np.zeros(1), Tensor(text), pooled, sizes)

    def _sinusoidal(self, t: np.ndarray, like: Tensor) -> Tensor:
        return Tensor(xp_of(like.data).asarray(sinusoidal(t, like.shape[0], self.flip, self.shift, like.dtype)))


class Level(Module):
    """The blocks of one resolution: a residual block and a transformer, `blocks` times, then a change of resolution."""

    def __init__(self, weights: Weights, attends: bool, blocks: int, heads: int, depth: tuple[int, ...], groups: int,
                 eps: float):
        self.blocks = [ResidualBlock(part, groups, eps) for part in numbered(weights, "resnets", blocks)]
        self.attentions = [no_attention] * blocks
        if attends:
            self.attentions = [SpatialTransformer(part, heads, count, groups)
                               for part, count in zip(numbered(weights, "attentions", blocks), depth, strict=True)]
        self.resize = None
        if "downsamplers" in weights:
            self.resize = Conv2d(weights.part("downsamplers.0.conv"), stride=2)
        elif "upsamplers" in weights:
            self.resize = Upsample(weights.part("upsamplers.0"))

    def pairs(self):
        return zip(self.blocks, self.attentions, strict=True)


def no_attention(x: Tensor, text: Tensor) -> Tensor:
    return x


class SpatialTransformer(Module):
    """x + proj(blocks(proj(norm(x)))), each position a token: (B, H, W, C), (B, M, D) -> (B, H, W, C)."""

    def __init__(self, weights: Weights, heads: int, depth: int, groups: int):
        self.norm = GroupNorm(weights.part("norm"), groups, 1e-6)
        self.proj_in, self.proj_out = Linear(weights.part("proj_in")), Linear(weights.part("proj_out"))
        parts = numbered(weights, "transformer_blocks", depth, least=0)
        self.blocks = [TransformerBlock(part, heads) for part in parts]

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x).reshape(B, H * W, C))                         # (B, N, C)
        for block in self.blocks:
            h = block(h, text)
        return x + self.proj_out(h).reshape(B, H, W, C)


class TransformerBlock(Module):
    """Attention to each other, attention to the prompt, an MLP: (B, N, C), (B, M, D) -> (B, N, C)."""

    def __init__(self, weights: Weights, heads: int):
        self.norm1, self.self_attention = LayerNorm(weights.part("norm1")), Attention(weights.part("attn1"), heads)
        self.norm2, self.cross_attention = LayerNorm(weights.part("norm2")), Attention(weights.part("attn2"), heads)
        self.norm3 = LayerNorm(weights.part("norm3"))
        self.mlp_in, self.mlp_out = Linear(weights.part("ff.net.0.proj")), Linear(weights.part("ff.net.2"))

    def forward(self, h: Tensor, text: Tensor) -> Tensor:
        h = h + self.self_attention(self.norm1(h))
        h = h + self.cross_attention(self.norm2(h), text)
        return h + self.mlp_out(geglu(self.mlp_in(self.norm3(h))))


def geglu(x: Tensor) -> Tensor:
    """a gelu(b) of x = (a, b) (Shazeer 2020, arXiv 2002.05202, eq. 5): (..., 2 D) -> (..., D)."""
    D = x.shape[-1] // 2
    return x[..., :D] * ops.gelu_exact(x[..., D:])


class SizeEmbedding(Module):
    """SDXL's second embedding: pooled (B, P), sizes (B, 6) -> (B, E)."""

    def __init__(self, config: Config, weights: Weights):
        self.dim = config.whole("addition_time_embed_dim", 256)
        self.flip, self.shift = config.flag("flip_sin_to_cos", True), config.number("freq_shift", 0)
        self.linear1, self.linear2 = Linear(weights.part("linear_1")), Linear(weights.part("linear_2"))

    def forward(self, pooled: Tensor, sizes: np.ndarray) -> Tensor:
        waves = sinusoidal(sizes.ravel(), self.dim, self.flip, self.shift, pooled.dtype)            # (6 B, dim)
        waves = Tensor(xp_of(pooled.data).asarray(waves.reshape(len(sizes), -1)))                   # (B, 6 dim)
        return self.linear2(ops.silu(self.linear1(ops.concat([pooled, waves]))))


def sinusoidal(t: np.ndarray, dim: int, flip: bool, shift: float, dtype) -> np.ndarray:
    """Numbers t (B,) as waves (B, dim), as in layers.sinusoidal_embedding; flip puts the cosines first."""
    # freq_k = 10000^(-k / (dim/2 - shift))
    freq = 10_000.0 ** -(np.arange(dim // 2) / (dim // 2 - shift))                  # (dim/2,)
    angle = np.asarray(t, np.float64)[:, None] * freq
    waves = [np.cos(angle), np.sin(angle)] if flip else [np.sin(angle), np.cos(angle)]
    return np.concatenate(waves, axis=1).astype(dtype)                              # (B, dim)


def depths(config: Config, blocks: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The depth of each transformer, by levels: on the way down, and on the way up, which has one more a level."""
    name, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down, more = config.nested(name, blocks, 1), [n + 1 for n in blocks[::-1]]
    if config.values.get(reverse) is not None:
        return down, config.nested(reverse, more, 1)
    given = config.values.get(name)
    if isinstance(given, list) and any(isinstance(level, list) for level in given):
        raise UserError(f"{config.path}: {name} has lists for levels, and {reverse} is not given, so that the depths "
                        "on the way up are not known.")
    return down, [(level[0],) * n for level, n in zip(down[::-1], more, strict=True)]


def middle_kind(config: Config) -> str | None:
    """A key of MIDDLE: nothing stands there only where the configuration says so."""
    return config.values.get("mid_block_type", "UNetMidBlock2DCrossAttn")


def check(config: Config) -> None:
    """UserError where the configuration names another kind of network."""
    config.require(_class_name="UNet2DConditionModel", act_fn="silu", resnet_time_scale_shift="default",
                   time_embedding_type="positional",
                   dual_cross_attention=False, center_input_sample=False, class_embeddings_concat=False,
                   conv_in_kernel=3, conv_out_kernel=3, downsample_padding=1, resnet_skip_time_act=False,
                   resnet_out_scale_factor=1.0, mid_block_scale_factor=1, attention_type="default",
                   time_embedding_act_fn=None, timestep_post_act=None)
    if type(config.values.get("only_cross_attention")) is not list or any(config.values["only_cross_attention"]):
        config.require(only_cross_attention=False)
    for name in ("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "cross_attention_norm",
                 "num_class_embeds"):
        if config.values.get(name) is not None:
            raise UserError(f"{config.path}: {name} is {str(config.values[name])[:60]!r}, a kind of UNet that minidiff "
                            "does not have.")
    added = config.values.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise UserError(f"{config.path}: addition_embed_type is {str(added)[:60]!r}, a kind of UNet that minidiff does "
                        "not have.")
    middle = middle_kind(config)
    if not isinstance(middle, str | None) or middle not in MIDDLE:
        raise UserError(f"{config.path}: mid_block_type is {str(middle)[:60]!r}; it takes "
                        f"{', '.join(filter(None, MIDDLE))}, or null.")
    for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        for kind in config.texts(name):
            if kind not in kinds:
                raise UserError(f"{config.path}: {name} has {kind[:60]!r}; it takes {', '.join(kinds)}.")
    if len(config.texts("down_block_types")) != len(config.texts("up_block_types")):
        raise UserError(f"{config.path}: down_block_types and up_block_types must be equally many.")
