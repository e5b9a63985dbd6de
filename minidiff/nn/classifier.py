"""A classifier of noisy images: half a UNet, then attention pooling (Dhariwal & Nichol 2021, section 4.3).

    x_t --patch--> conv --> [block] --down--> [block] --> norm, silu --pool--> logits of every question

    pool:    q = mean of the pixels,  h = q + attention(q, the pixels)
    log p(y | x_t) = sum over the questions a that y answers of log softmax(logits_a)[y_a]

The classifier answers several questions at once (which digit, how thick, ...), each with its own classes.  It treats
the answers as independent given x_t.  The gradient of log p(y | x_t) by x_t guides a sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidiff.engine import conv, ops
from minidiff.engine.backend import moved, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.tensor import Tensor, gradients, no_grad, recording
from minidiff.nn.layers import Conv2d, GroupNorm, LayerNorm, Linear, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.transformer import Attention
from minidiff.nn.unet import UNetBlock, UNetConfig

NOT_ASKED = -1


class NoisyClassifier(Module):
    """(x_t, t) -> the logits of all questions, side by side.

    config: of the UNet whose downward half it is, without captions.  classes: the number of classes of each question.
    """

    def __init__(self, config: UNetConfig, classes: Sequence[int], rng: np.random.Generator):
        if config.text or not classes or min(classes) < 2:
            raise ValueError("NoisyClassifier: config must have text = 0, and classes numbers of at least 2, not "
                             f"text = {config.text} and classes {tuple(classes)}")
        c, self.config, self.classes = config, config, tuple(classes)
        self.time1, self.time2 = Linear(c.embedding, c.embedding, rng), Linear(c.embedding, c.embedding, rng)
        self.conv_in = Conv2d(c.channels * c.patch**2, c.widths[0], rng)
        self.down_blocks, self.downsample, width = [], [], c.widths[0]
        for level, out in enumerate(c.widths):
            if level:
                self.downsample.append(Linear(4 * width, out, rng))
                width = out
            self.down_blocks += [UNetBlock(c, width, out, c.attention[level], rng) for _ in range(c.blocks)]
        self.norm_out, self.pool = GroupNorm(width, c.groups), Attention(width, c.heads, rng)
        self.norm_pool, self.logits = LayerNorm(width), Linear(width, sum(classes), rng)

    def forward(self, x: Tensor, t) -> Tensor:
        """x (B, H, W, C), t (B,) training times -> (B, K), where K is the sum of all classes."""
        c, m = self.config, self.config.multiple
        if x.ndim != 4 or x.shape[3] != c.channels or x.shape[1] % m or x.shape[2] % m or t.shape != x.shape[:1]:
            raise ValueError(f"NoisyClassifier: x must be (B, H, W, {c.channels}) with H and W multiples of {m}, and t "
                             f"(B,), not {x.shape} and {t.shape}")
        emb = Tensor(moved(sinusoidal_embedding(t, c.embedding, dtype=x.dtype), x.data))              # (B, E)
        emb = ops.silu(self.time2(ops.silu(self.time1(emb))))
        h = self.conv_in(conv.space_to_depth(x, c.patch))                           # (B, H/p, W/p, C), p the patch
        for i, block in enumerate(self.down_blocks):        # c.blocks of each level
            if i and i % c.blocks == 0:                     # the next level: half the resolution
                h = self.downsample[i // c.blocks - 1](conv.space_to_depth(h))
            h = block(h, emb, None)
        pixels = self.norm_out.then_silu(h)
        pixels = pixels.reshape(h.shape[0], h.shape[1] * h.shape[2], h.shape[3])    # (B, N, D)
        q = ops.mean(pixels, axis=1, keepdims=True)                                 # (B, 1, D)
        h = q + self.pool(q, pixels)
        return self.logits(self.norm_pool(h).reshape(h.shape[0], h.shape[2]))       # (B, K)

    def log_prob(self, x: Tensor, t, y) -> Tensor:
        """log p(y | x_t), (B,).  y (B, A) whole numbers: the class of each of A questions, or NOT_ASKED.

        x may have another dtype than the network, which computes in its own; the logarithm is float32 at least.
        """
        y = np.asarray(y)
        if y.shape != (x.shape[0], len(self.classes)) or y.dtype.kind not in "iu" \
                or (y < NOT_ASKED).any() or (y >= self.classes).any():
            raise ValueError(f"y must be whole numbers ({x.shape[0]}, {len(self.classes)}), a class each of "
                             f"{self.classes} or {NOT_ASKED} for none, not {y.dtype} {y.shape}")
        logits, total, start = as_float32(self(as_input(self, x), t)), 0, 0
        for answer, K in zip(y.T, self.classes, strict=True):
            # log p(y_a | x_t), and 0 if a is not asked
            log_p = ops.log_softmax(logits[:, start:start + K])                     # (B, K)
            chosen = xp_of(x.data).asarray(answer[:, None] == np.arange(K))         # (B, K)
            total, start = total + ops.sum(ops.where(chosen, log_p, 0.0), axis=1), start + K
        return total

    def grad_log_prob(self, x_t, t, y) -> np.ndarray:
        """The gradient of log p(y | x_t) by x_t, of x_t's shape, for `diffusion.guidance.ClassifierGuidance`."""
        def gradient(x_t, t, y):
            x = Tensor(x_t, requires_grad=True)
            with recording():
                log_p = self.log_prob(x, t, y)
            # a cotangent of ones (docs/glossary.md): log_p of one sample does not depend on the other samples
            return gradients(log_p, [x], xp_of(x_t).ones(log_p.shape, log_p.dtype))[0]
        return map_batch(gradient, x_t, t, y, device=self.device)

    def read(self, x_t, t) -> list[np.ndarray]:
        """p(y_a | x_t) of every question a: arrays (B, K_a), each row with the sum 1."""
        logits = map_batch(lambda x_t, t: as_float32(self(as_input(self, x_t), t)), x_t, t, device=self.device)
        with no_grad():
            return [ops.softmax(Tensor(of_one)).data
                    for of_one in xp_of(logits).split(logits, np.cumsum(self.classes)[:-1].tolist(), axis=1)]
