"""The rival: minidiff's text-to-image model in PyTorch, as a good PyTorch user would write it.

The same layers under the same names, made from the same configurations, with PyTorch's axes, channels first (the memory
may be channels last: `model.to(memory_format=torch.channels_last)`). PyTorch's fused forms are used where there are
any: scaled_dot_product_attention, group_norm, addcmul, pixel_shuffle, a 2x2 convolution of stride 2 where minidiff
folds squares into channels and multiplies.

`in_minidiff_layout` converts between the two: it gives every parameter (or its gradient) minidiff's name and axes, so
that weights and gradients pass through the same transposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minidiff.diffusion.samplers import times
from minidiff.diffusion.schedules import schedule_from
from minidiff.nn.unet import UNetConfig
from minidiff.systems.text_to_image import TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig


class TextToImage(nn.Module):
    """(x_0, ids, mask, t, eps) -> the v-prediction loss; images (B, C, H, W)."""

    def __init__(self, config: TextToImageConfig):
        super().__init__()
        if config.predicted != "v":
            raise ValueError(f"config: this rival predicts v, or a mixture that gives v, not {config.predicts!r}")
        schedule, times = schedule_from(config.schedule, config.T), np.arange(config.T)
        self.config = config
        self.register_buffer("alpha", torch.from_numpy(schedule.alpha(times)))      # float64, as minidiff's
        self.register_buffer("sigma", torch.from_numpy(schedule.sigma(times)))
        self.text = TextEncoder(config.text)
        self.unet = UNet(config.network)

    def predict(self, x_t, t, text):
        """v_hat (B, C, H, W), from the UNet or by Bayes' rule from its mixture (minidiff/nn/pixel_mixture.py)."""
        out = self.unet(x_t, t, text)
        if self.config.predicts == "v":
            return out
        alpha, sigma = self._noise(t, x_t.dtype)
        black, white, m, s2 = out.to(x_t.dtype).unflatten(1, (-1, 4)).unbind(2)     # (B, C, H, W) each
        m, s2 = m.tanh(), s2.sigmoid()
        V = (alpha**2 * s2 + sigma**2)
        log_w = torch.stack([black - sigma.log() - ((x_t + alpha) / sigma) ** 2 / 2,
                             white - sigma.log() - ((x_t - alpha) / sigma) ** 2 / 2,
                             -V.log() / 2 - (x_t - alpha * m) ** 2 / (2 * V)])
        w = log_w.softmax(0)
        between = m + alpha * s2 / V * (x_t - alpha * m)
        return (alpha * x_t - (w[1] - w[0] + w[2] * between)) / sigma

    def _noise(self, t, dtype):
        return (a[t, None, None, None].to(dtype) for a in (self.alpha, self.sigma))

    def forward(self, x_0, ids, mask, t, eps):
        alpha, sigma = self._noise(t, x_0.dtype)
        # x_t = alpha_t x_0 + sigma_t eps,   v = alpha_t eps - sigma_t x_0
        x_t = alpha * x_0 + sigma * eps
        v = alpha * eps - sigma * x_0
        return F.mse_loss(self.predict(x_t, t, self.text(ids, mask)), v)


# --- the networks -----------------------------------------------------------------------------------------

class UNet(nn.Module):
    """x (B, C, H, W), t (B,), text (tokens, pooled, mask) or None -> (B, C, H, W)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        folded = c.channels * c.patch**2
        self.time1, self.time2 = nn.Linear(c.embedding, c.embedding), nn.Linear(c.embedding, c.embedding)
        self.pooled = nn.Linear(c.text, c.embedding) if c.text else None
        self.conv_in = nn.Conv2d(folded, c.widths[0], 3, padding=1)
        self.down_blocks, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up_blocks, self.upsample = nn.ModuleList(), nn.ModuleList()
        skips, width = [], c.widths[0]
        for level, out in enumerate(c.widths):
            if level:
                self.downsample.append(nn.Conv2d(width, out, 2, stride=2))
                width = out
            for _ in range(c.blocks):
                self.down_blocks.append(UNetBlock(c, width, out, c.attention[level]))
                skips.append(out)
        self.middle = UNetBlock(c, width, width, True)
        for level, out in reversed(list(enumerate(c.widths))):
            for _ in range(c.blocks):
                self.up_blocks.append(UNetBlock(c, width + skips.pop(), out, c.attention[level]))
                width = out
            if level:
                self.upsample.append(nn.Conv2d(width, 4 * c.widths[level - 1], 1))
                width = c.widths[level - 1]
        self.norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = nn.Conv2d(width, (c.out or c.channels) * c.patch**2, 3, padding=1)

    def forward(self, x, t, text=None):
        c = self.config
        emb = self.time2(F.silu(self.time1(sinusoidal_embedding(t, c.embedding, x.dtype))))
        if text is not None:
            emb = emb + self.pooled(text[1])
        emb = F.silu(emb)                                                           # (B, E)
        h = self.conv_in(F.pixel_unshuffle(x, c.patch))                             # (B, D, H/p, W/p)
        skips = []
        for i, block in enumerate(self.down_blocks):
            if i and i % c.blocks == 0:
                h = self.downsample[i // c.blocks - 1](h)
            h = block(h, emb, text)
            skips.append(h)
        h = self.middle(h, emb, text)
        for i, block in enumerate(self.up_blocks):
            if i and i % c.blocks == 0:
                h = F.pixel_shuffle(self.upsample[i // c.blocks - 1](h), 2)
            h = block(torch.cat([h, skips.pop()], dim=1), emb, text)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), c.patch)


class UNetBlock(nn.Module):
    def __init__(self, config: UNetConfig, C: int, D: int, attends: bool):
        super().__init__()
        self.block = ResidualBlock(C, D, config.embedding, config.groups)
        self.attention = SpatialAttention(D, config) if attends else None

    def forward(self, x, emb, text):
        x = self.block(x, emb)
        return x if self.attention is None else self.attention(x, text)


class ResidualBlock(nn.Module):
    def __init__(self, C: int, D: int, E: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, C), nn.Conv2d(C, D, 3, padding=1)
        self.modulation, self.groups = nn.Linear(E, 2 * D), groups
        self.conv2 = nn.Conv2d(D, D, 3, padding=1)
        self.skip = nn.Conv2d(C, D, 1) if C != D else None

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)       # (B, D, 1, 1)
        h = torch.addcmul(shift, F.group_norm(h, self.groups), 1 + scale)
        h = self.conv2(F.silu(h))
        return (x if self.skip is None else self.skip(x)) + h


class SpatialAttention(nn.Module):
    def __init__(self, C: int, config: UNetConfig):
        super().__init__()
        self.norm1, self.self_attention = nn.GroupNorm(config.groups, C), Attention(C, config.heads)
        self.norm2 = nn.GroupNorm(config.groups, C) if config.text else None
        self.norm_text = nn.LayerNorm(config.text) if config.text else None
        self.cross_attention = Attention(C, config.heads, config.text) if config.text else None

    def forward(self, x, text):
        x = x + self._on_tokens(self.norm1(x), self.self_attention)
        if text is not None:
            tokens, _, mask = text
            x = x + self._on_tokens(self.norm2(x), self.cross_attention, self.norm_text(tokens), mask)
        return x

    @staticmethod
    def _on_tokens(x, attention, *context):
        """(B, C, H, W) -> tokens (B, N, C) -> (B, C, H, W), each a view where channels lie last."""
        y = attention(x.flatten(2).transpose(1, 2), *context)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    def __init__(self, C: int, heads: int, context: int | None = None):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(C, C), nn.Linear(context or C, 2 * C), nn.Linear(C, C)

    def forward(self, x, context=None, mask=None):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)                # (B, h, N, d)
        kv = self.kv(x if context is None else context).unflatten(2, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)                                  # (B, h, M, d)
        mask = None if mask is None else mask[:, None, None]                        # (B, 1, 1, M)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))                               # (B, N, C)


class TransformerBlock(nn.Module):
    def __init__(self, C: int, heads: int, expand: int = 4):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(C), Attention(C, heads)
        self.norm2, self.mlp_in = nn.LayerNorm(C), nn.Linear(C, expand * C)
        self.mlp_out = nn.Linear(expand * C, C)

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), None, mask)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class TextEncoder(nn.Module):
    """ids (B, N), mask (B, N) bool -> tokens (B, N, D), pooled (B, D), mask."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        D = config.width
        self.embedding = nn.Embedding(config.vocab, D)
        self.position = nn.Parameter(torch.zeros(config.length, D))
        self.blocks = nn.ModuleList(TransformerBlock(D, config.heads) for _ in range(config.layers))
        self.norm, self.norm_pooled = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, ids, mask):
        h = self.embedding(ids) + self.position[:ids.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        tokens = self.norm(h)
        share = mask.to(tokens.dtype) / mask.sum(dim=1, keepdim=True)               # (B, N)
        return tokens, self.norm_pooled((tokens * share[:, :, None]).sum(dim=1)), mask


def sinusoidal_embedding(t, dim: int, dtype, max_period: float = 10_000.0):
    freq = torch.exp(torch.arange(dim // 2, dtype=torch.float64, device=t.device)
                     * (-math.log(max_period) / (dim // 2)))
    angle = t[:, None].double() * freq
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)                   # (B, dim)


# --- sampling ---------------------------------------------------------------------------------------------

@torch.inference_mode()
def sample(model: TextToImage, x_T, ids, mask, no_ids, no_mask, *, scale: float, steps: int):
    """DPM-Solver++(2M) with classifier-free guidance, as samplers.py and guidance.py do it: x_T -> x_0, (B, C, H, W).

    ids, mask (B, N) captions; no_ids, no_mask (1, N) the null caption.
    """
    schedule, B = schedule_from(model.config.schedule, model.config.T), len(x_T)
    captions, none = model.text(ids, mask), model.text(no_ids, no_mask)
    both = tuple(torch.cat([u.expand(B, *u.shape[1:]), c]) for u, c in zip(none, captions, strict=True))
    x_t, path = x_T, [*times(schedule, steps).tolist(), -1]
    x0_before = h_before = None
    for t, s in pairwise(path):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((float(schedule.alpha(r)), float(schedule.sigma(r))) for r in (t, s))
        v = model.predict(torch.cat([x_t, x_t]), torch.full((2 * B,), t), both)
        # x0_hat = alpha x_t - sigma v, guided like eps: x_t is the same in both branches
        v_uncond, v_cond = v.chunk(2)
        x0_hat = (alpha_t * x_t - sigma_t * (v_uncond + scale * (v_cond - v_uncond))).clamp(-1, 1)
        # e^{-h} = sigma_s alpha_t / (alpha_s sigma_t);  D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_before,  r = h_before / h
        e_h = sigma_s * alpha_t / (alpha_s * sigma_t)
        h = -math.log(e_h) if e_h > 0 else math.inf
        D = x0_hat
        if x0_before is not None and s >= 0:
            half_of_1_r = h / (2 * h_before)
            D = (1 + half_of_1_r) * x0_hat - half_of_1_r * x0_before
        # x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D
        x_t = sigma_s / sigma_t * x_t - alpha_s * (e_h - 1) * D
        x0_before, h_before = x0_hat, h
    return x_t


# --- the door ---------------------------------------------------------------------------------------------

@torch.no_grad()
def load(model: TextToImage, state: Mapping[str, np.ndarray]) -> None:
    """Sets the parameters from a minidiff state_dict; ValueError where names or sizes do not match."""
    views = in_minidiff_layout(model)
    if views.keys() != state.keys():
        raise ValueError(f"state: its names differ from the model's in {sorted(views.keys() ^ state.keys())}")
    for name, view in views.items():
        if view.numel() != state[name].size:
            raise ValueError(f"state: {name!r} has shape {state[name].shape}, not {tuple(view.shape)}")
        view.copy_(torch.from_numpy(state[name]).reshape(view.shape))


@torch.no_grad()
def in_minidiff_layout(model: TextToImage, of: Callable = lambda p: p) -> dict[str, torch.Tensor]:
    """minidiff's name -> a view of `of(parameter)`: the weights, or with of=lambda p: p.grad their gradients.

    A view's axes are minidiff's, some of them still split in two or more: reshape it to minidiff's shape.
    """
    c, views = model.config.unet, {}
    folded_in = {"unet.conv_in": c.patch}
    folded_out = {"unet.conv_out": c.patch} | {f"unet.upsample.{i}": 2 for i in range(len(c.widths) - 1)}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            views |= {f"{name}.w": of(m.weight).T, f"{name}.b": of(m.bias)}
        elif isinstance(m, nn.Conv2d):
            f, g = folded_in.get(name, 1), folded_out.get(name, 1)
            # PyTorch folds a square of f x f pixels into channels as (C, f, f), minidiff as (f, f, C)
            w = of(m.weight).unflatten(1, (-1, f, f)).unflatten(0, (-1, g, g))  # (D, g, g, C, f, f, kh, kw)
            b = of(m.bias).unflatten(0, (-1, g, g))                             # (D, g, g)
            views |= {f"{name}.w": w.permute(6, 7, 4, 5, 3, 1, 2, 0), f"{name}.b": b.permute(1, 2, 0)}
        elif isinstance(m, (nn.GroupNorm, nn.LayerNorm)):
            views |= {f"{name}.gamma": of(m.weight), f"{name}.beta": of(m.bias)}
        elif isinstance(m, nn.Embedding):
            views[f"{name}.table"] = of(m.weight)
        elif isinstance(m, TextEncoder):
            views[f"{name}.position"] = of(m.position)
    return views
