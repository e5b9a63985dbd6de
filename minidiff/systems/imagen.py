"""Imagen: a text encoder that has seen text alone, and a cascade of diffusion models (Saharia et al. 2022,
arXiv 2205.11487).

    text        T5: an encoder-decoder fills gaps in text; the encoder is kept, and frozen          section 2.1
                c = encoder(caption)
    training    L = E  w_t || x_hat(alpha_t x + sigma_t eps, c) - x ||^2,   w_t = 1/sigma_t^2       eq. 1
                which is || v - v_hat ||^2, v = alpha_t eps - sigma_t x; c dropped to '' one time in ten
    guidance    eps_tilde(x_t, c) = w eps(x_t, c) + (1 - w) eps(x_t),  w the scale                  eq. 2
    threshold   static: x_hat clipped to [-1, 1];                                                   section 2.3
                dynamic: s = max(1, the 99.5th percentile of |x_hat|), x_hat <- clip(x_hat, -s, s) / s
    cascade     7 x 7  ->  14 x 14  ->  28 x 28, each from the caption and the image before:        section 2.4
                y_s = alpha_s U x + sigma_s eps, x enlarged and noised; the network is shown y_s beside x_t and told s;
                s is random in training, and chosen by aug_level in sampling
    networks    UNets that hear c pooled by attention, in every norm, and token by token, by        section 2.5
                cross-attention, both behind a layer norm

Where the arithmetic of these lies: text/t5.py and span_corruption.py, diffusion/cascade.py, guidance.py, denoiser.py.

Scaled down.  T5-XXL's 4.6 billion parameters are 0.14 million here, and the web's text is random paragraphs of our
own grammar: captions of one imagined digit, so that a gap in one can be filled from another, which is how the encoder
may learn that "7" is "seven".  It sees no image, and no caption of one; words that captions of images never join, the
held-out ones, it does see together (140 of 5,000 paragraphs).  64 -> 256 -> 1024 pixels, each four times the last, are
7 -> 14 -> 28, each twice; resolutions=(14, 28, 56) draws as far as 56, which shows that the cascade runs there and no
more, since MNIST has no detail beyond 28: its data is 28 with every pixel four times.  Times lean to the noisy
(t = T u^(1/3)), so that the weight is not eq. 1's; DPM-Solver++ draws, in place of the paper's samplers.  Left out: the
Efficient UNet (ours has its conditioning and, at its lowest resolution, its attention; not its order of layers), and
the paper's finding that a larger encoder helps more than a larger UNet: some sixty words cannot show it.  And one of
its findings does not hold here: most pixels of MNIST lie at the end of their range, where a dynamic threshold pulls
them inward, so that the static one is the default (docs/imagen.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from minidiff import pictures
from minidiff.data import digit_captions as grammar
from minidiff.data.attributes import VOCABULARY, Words
from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion.cascade import Conditioned, augmented, cascade, noise_time, resized
from minidiff.diffusion.denoiser import NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.gaussian import q_sample, target
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.losses import stratified_uniform
from minidiff.diffusion.schedules import cosine
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.layers import Linear, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.system import Stage, System, as_read, check_finite, streams_for
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.t5 import AttentionPooling, EncoderDecoder
from minidiff.text.tokenizer import Tokenizer

THRESHOLDS = {"dynamic": dynamic_threshold, "static": static_threshold}
PROMPTS = ("a bold seven leaning left", "the digit three", "a wide zero", "5", "a thin eight leaning right", "")


def _finer(patch: int, widths: tuple[int, ...]) -> UNetConfig:
    return UNetConfig(channels=2, out=1, patch=patch, widths=widths, attention=(False, False), embedding=128, text=64)


@dataclass(frozen=True)
class ImagenConfig:
    """Everything that makes one Imagen; it travels in the file."""

    resolutions: tuple[int, ...] = (7, 14, 28)              # of the cascade, each twice the last; 28 among them
    T: int = 1000                                           # training times, of the cosine schedule
    length: int = 24                                        # tokens of a caption
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(vocab=512, length=64))
    sentinels: int = 16                                     # rows of the text's table that are no tokenizer's
    decoder_layers: int = 2                                 # of what is thrown away
    base: UNetConfig = field(default_factory=lambda: UNetConfig(patch=1, widths=(80,), attention=(True,),
                                                                embedding=160, text=64))
    super1: UNetConfig = field(default_factory=lambda: _finer(1, (32, 48)))
    super2: UNetConfig = field(default_factory=lambda: _finer(2, (32, 48)))

    def __post_init__(self):
        r = self.resolutions
        if len(r) != 3 or 28 not in r or r[1] != 2 * r[0] or r[2] != 2 * r[1]:
            raise ValueError(f"resolutions must be three, each twice the last and 28 one of them, not {r}")
        if not 2 <= self.length <= self.text.length:
            raise ValueError(f"length must be within 2 and text.length ({self.text.length}), not {self.length}")
        for size, c, channels in zip(r, (self.base, self.super1, self.super2), (1, 2, 2), strict=True):
            if (c.channels, c.out or c.channels, c.text) != (channels, 1, self.text.width) or size % c.multiple:
                raise ValueError(f"the UNet of {size} x {size} must take {channels} channels, give 1, hear text of "
                                 f"width {self.text.width} and divide {size}, not {c}")


class Base(Module):
    """v_hat(x_t, t, c), the first of the cascade: it pools the frozen states in its own way, and attends to each."""

    def __init__(self, config: UNetConfig, rng: np.random.Generator):
        self.pool = AttentionPooling(config.text, config.heads, rng)
        self.unet = UNet(config, rng)

    def states(self, tokens, mask) -> TextStates:
        return TextStates(Tensor(tokens), self.pool(Tensor(tokens), mask), mask)

    def forward(self, x_t: Tensor, t, tokens, mask) -> Tensor:
        """x_t (B, H, W, 1), t (B,), tokens (B, N, D) and mask (B, N) of the frozen encoder -> (B, H, W, 1)."""
        return self.unet(x_t, t, self.states(tokens, mask))


class SuperResolution(Base):
    """v_hat(x_t, t, c, y_s, s): shown the small image with noise, and told how much."""

    def __init__(self, config: UNetConfig, rng: np.random.Generator):
        super().__init__(config, rng)
        self.level = Linear(config.embedding, config.embedding, rng)

    def forward(self, x_t: Tensor, t, tokens, mask, y_s, s) -> Tensor:
        """Besides what the base takes: y_s (B, H, W, 1) and its times s (B,), -1 for no noise."""
        level = self.level(Tensor(sinusoidal_embedding(s, self.unet.config.embedding, dtype=x_t.dtype)))    # (B, E)
        return self.unet(ops.concat([x_t, Tensor(y_s)]), t, self.states(tokens, mask), level)


class Imagen(System):
    """A frozen text encoder, a base model and two super-resolution models."""

    name, Config = "imagen", ImagenConfig

    def __init__(self, config: ImagenConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab - config.sentinels:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size} and the {config.sentinels} sentinels")
        super().__init__(config, tokenizer, rng)
        self.schedule = cosine(config.T)
        self.text = TextEncoder(config.text, rng)
        self.base = Base(config.base, rng)
        self.super1 = SuperResolution(config.super1, rng)
        self.super2 = SuperResolution(config.super2, rng)

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config: ImagenConfig, rng: np.random.Generator) -> Tokenizer:
        return Tokenizer.train([as_read(paragraph(rng)) for _ in range(5000)], config.text.vocab - config.sentinels)

    @property
    def networks(self) -> list[Base]:
        return [self.base, self.super1, self.super2]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        c = self.config
        # the decoder is no part of the system: it is thrown away, and its first weights are always the same
        t5 = EncoderDecoder(self.text, c.decoder_layers, c.text.length, c.sentinels, np.random.default_rng(0))

        def texts(rng: np.random.Generator, B: int) -> tuple:
            return t5.batch([self.tokenizer.encode(as_read(paragraph(rng))) for _ in range(B)], rng)
        yield Stage("text", t5, texts, t5.loss, steps=1500, size=32)
        for k, steps in enumerate((3000, 3000, 2000)):
            yield Stage(f"pixels-{c.resolutions[k]}", self.networks[k], partial(self.batch, data, k),
                        partial(self.loss, k), steps=steps, size=32, draw=partial(self._draw, k))

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The frozen encoder's states (B, N, D), and mask (B, N): no gradient reaches it."""
        ids, mask = self.tokenizer.batch([as_read(caption) for caption in captions], self.config.length)
        with no_grad():
            return self.text(ids, mask).tokens.data, mask

    def batch(self, data: CaptionedDigits, k: int, rng: np.random.Generator, B: int) -> tuple:
        """x_0, t, eps and the condition of network k, for random images and captions of theirs."""
        T, sizes = self.schedule.T, self.config.resolutions
        chosen = rng.integers(0, len(data.digits), B)
        captions = ["" if rng.random() < 0.1 else data.caption(int(i), rng) for i in chosen]
        x_0 = resized(data.x_0[chosen], sizes[k])                                   # (B, size, size, 1)
        # u_i = u_0 + i/B mod 1: each uniform on [0, 1), together spread evenly (Kingma et al. 2021, I.1)
        u = stratified_uniform(rng, B)
        # t = T u^(1/3) for the base, which decides at noisy times what to draw; the others paint in detail: t = T u
        t = np.minimum((T * (np.cbrt(u) if k == 0 else u)).astype(np.int64), T - 1)
        eps = rng.standard_normal(x_0.shape, dtype=np.float32)
        condition = self.encode(captions)
        if k:
            s = rng.integers(-1, T, B)                      # aug_level ~ uniform(0, 1)
            noise = rng.standard_normal(x_0.shape, dtype=np.float32)
            condition += augmented(self.schedule, resized(x_0, sizes[k - 1]), sizes[k], s, noise), s
        return x_0, t, eps, *condition

    def loss(self, k: int, x_0, t, eps, *condition) -> Tensor:
        """The mean squared error of network k in v, (): x_0, eps (B, H, W, 1), t (B,), and what `batch` gives more."""
        # L = || v - v_hat(alpha_t x_0 + sigma_t eps, t, c) ||^2
        x_t, v = q_sample(self.schedule, x_0, t, eps), target(self.schedule, "v", x_0, eps, t)
        error = self.networks[k](Tensor(x_t), t, *condition) - v
        return ops.mean(error * error)

    def _draw(self, k: int):
        size = self.config.resolutions[k]
        images = self.cascade(PROMPTS, until=size)[-1]
        return pictures.sheet(images, [p or "(no caption)" for p in PROMPTS], columns=6, scale=max(84 // size, 1))

    # --- sampling -----------------------------------------------------------------------------------------

    def denoiser(self, k: int, cond: tuple, scale: float, threshold: str = "static") -> Conditioned:
        """(x_t, t) -> x_hat of network k for settled captions, guided and then thresholded.

        cond: what network k takes beside x_t and t, each array (B, ...).
        """
        def predict(x_t, t, cond):
            def one(part: slice):
                with no_grad():
                    return self.networks[k](Tensor(x_t[part]), t[part], *(a[part] for a in cond)).data
            return np.concatenate(list(parallel_map(one, shards(len(x_t)))))
        if threshold not in THRESHOLDS:
            raise ValueError(f"threshold must be one of {', '.join(THRESHOLDS)}, not {threshold!r}")
        # the null caption, beside the same small image
        uncond = (*self.encode([""]), *cond[2:])
        return Conditioned(ClassifierFree(NetworkDenoiser(self.schedule, "v", predict), scale, uncond,
                                    clip=THRESHOLDS[threshold]), cond)

    def cascade(self, captions: Sequence[str], *, scale: float = 2.0, super_scale: float = 2.0, steps: int = 20,
                super_steps: int = 10, threshold: str = "static", aug_level: float = 0.0, until: int | None = None,
                seed: int = 0, streams: SampleStreams | None = None) -> list[np.ndarray]:
        """The images of every resolution, as far as `until`: a list of (B, size, size, 1) in [-1, 1].

        scale, steps: of the base; super_scale, super_steps: of the others.  threshold: "dynamic" or "static", of all.
        aug_level: how much noise the small images get, 0 (none) to 1 (nothing else).  Sample i draws from its own
        stream (seed, i), or from streams[i].  ValueError for numbers out of range.
        """
        streams, sizes = streams_for(captions, seed, streams), self.config.resolutions
        until = sizes[-1] if until is None else until
        if until not in sizes:
            raise ValueError(f"until must be one of {sizes}, not {until!r}")
        count, text = sizes.index(until) + 1, self.encode(captions)

        def finer(k: int):
            return lambda y_s, s: self.denoiser(k, (*text, y_s, s), super_scale, threshold)
        drawn = cascade(self.denoiser(0, text, scale, threshold), [finer(k) for k in range(1, count)],
                        [(size, size, 1) for size in sizes[:count]], streams, s=noise_time(self.schedule, aug_level),
                        steps=[steps, super_steps, super_steps][:count])
        return [check_finite(x) for x in drawn]

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, super_scale: float = 2.0, steps: int = 20,
               super_steps: int = 10, threshold: str = "static", aug_level: float = 0.0, seed: int = 0,
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption: `cascade`, until 28."""
        return self.cascade(captions, scale=scale, super_scale=super_scale, steps=steps, super_steps=super_steps,
                            threshold=threshold, aug_level=aug_level, until=28, seed=seed, streams=streams)[-1]


def paragraph(rng: np.random.Generator) -> str:
    """Five captions of one imagined digit.  Each mentions what it likes; none is of an image."""
    digit = int(rng.integers(0, 10))
    words = Words(*(("", *options)[int(rng.integers(0, len(options) + 1))] for options in VOCABULARY))
    return ". ".join(grammar.caption(rng, digit, words) for _ in range(5))
