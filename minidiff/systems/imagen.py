"""Imagen: a text encoder that has seen text alone, and a cascade of diffusion models (Saharia et al. 2022,
arXiv 2205.11487).

    text        T5: an encoder-decoder fills gaps in text; the encoder is kept, and frozen          section 2.1
                c = encoder(caption)
    training    L = E  w_t || x_hat(alpha_t x + sigma_t eps, c) - x ||^2,   w_t free                eq. 1
                here 1/sigma_t^2, so || v - v_hat ||^2, v = alpha_t eps - sigma_t x; c is '' one time in ten
    guidance    eps_tilde(x_t, c) = w eps(x_t, c) + (1 - w) eps(x_t),  w the scale                  eq. 2
    threshold   static: x_hat clipped to [-1, 1];                                                   section 2.3
                dynamic: q = max(1, a percentile of |x_hat|, here the 99.5th), x_hat <- clip(x_hat, -q, q) / q
    cascade     7 x 7  ->  14 x 14  ->  28 x 28, each from the caption and the image before:        section 2.4
                y_s = alpha_s U x + sigma_s eps, x enlarged and noised; the network sees y_s beside x_t, and s;
                s is random in training, and chosen by aug_level in sampling
    networks    UNets in which c, pooled by attention, enters every norm, and, token by token,      section 2.5
                cross-attention, both after a layer norm

The arithmetic of these lines is in text/t5.py and span_corruption.py, diffusion/cascade.py, guidance.py, denoiser.py.

Scaled down.  T5-XXL's 4.6 billion parameters are 0.14 million here, and the web's text is text of the data set
without images: for the digits, random paragraphs of captions of one imagined digit, so that a gap in one caption can
be filled from another.  From these the encoder may learn that "7" is "seven".  It sees no image, and no caption of
one.  It does see words together that captions of images never join, the held-out ones (140 of 5,000 paragraphs).  64
-> 256 -> 1024 pixels, each four times the last, are 7 -> 14 -> 28, each twice the last.  resolutions=(14, 28, 56)
draws as far as 56, which only shows that the cascade runs there, because MNIST has no detail beyond 28: its data is
28 with every pixel four times.  Times have a density (config.times), which acts as another weight; by default it grows
with t for the base model (t = T u^(1/3)), and is uniform for the others.  DPM-Solver++ draws, in place of the paper's
samplers.  Left out: the Efficient UNet (ours has its conditioning and, at its lowest resolution, its attention; not its
order of layers), and the paper's finding that a larger encoder helps more than a larger UNet, which some sixty words
cannot show.  One of its findings does not hold here: most pixels of MNIST lie at the end of their range, where a
dynamic threshold pulls them inward, so that the static one is the default (docs/imagen.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from minidiff import pictures
from minidiff.checks import one_of
from minidiff.data.dataset import Dataset
from minidiff.diffusion.cascade import Conditioned, augmented, cascade, noise_time, resized
from minidiff.diffusion.denoiser import NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.schedules import cosine
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Linear, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.precision import as_input
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, as_read, check_finite
from minidiff.systems.training_batches import denoising_loss, random_captions
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.t5 import AttentionPooling, EncoderDecoder
from minidiff.text.tokenizer import Tokenizer

THRESHOLDS = {"dynamic": dynamic_threshold, "static": static_threshold}
DROP_CAPTION = 0.1                                          # so that the networks also learn to draw without a caption


def _finer(patch: int, widths: tuple[int, ...]) -> UNetConfig:
    return UNetConfig(channels=2, out=1, patch=patch, widths=widths, attention=(False, False), embedding=128, text=64)


@dataclass(frozen=True)
class ImagenConfig:
    """Everything that makes one Imagen; it is saved in its file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the data's images
    resolutions: tuple[int, ...] = (7, 14, 28)              # heights of the cascade, each twice the last; H among them
    T: int = 1000                                           # training times, of the cosine schedule
    times: str = "power"                                    # how often the base draws each: of DENSITIES
    super_times: str = "power:power=1"                      # how often the others do
    length: int = 24                                        # tokens of a caption
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(vocab=512, length=64))
    sentinels: int = 16                                     # rows of the text's table that are no tokenizer's
    decoder_layers: int = 2                                 # of what is thrown away
    base: UNetConfig = field(default_factory=lambda: UNetConfig(patch=1, widths=(80,), attention=(True,),
                                                                embedding=160, text=64))
    super1: UNetConfig = field(default_factory=lambda: _finer(1, (32, 48)))
    super2: UNetConfig = field(default_factory=lambda: _finer(2, (32, 48)))

    def __post_init__(self):
        r, (H, W, C) = self.resolutions, self.shape
        check_shape(self.shape)
        parse_density(self.times)
        parse_density(self.super_times)
        if len(r) != 3 or H not in r or r[1] != 2 * r[0] or r[2] != 2 * r[1] or W * r[0] % H:
            raise ValueError(f"resolutions must be three heights, each twice the last and {H} one of them, at which "
                             f"the width is whole, not {r}")
        if not 2 <= self.length <= self.text.length:
            raise ValueError(f"length must be within 2 and text.length ({self.text.length}), not {self.length}")
        for k, (c, channels) in enumerate(zip((self.base, self.super1, self.super2), (C, 2 * C, 2 * C), strict=True)):
            h, w, _ = self.shape_of(k)
            if (c.channels, c.out or c.channels, c.text) != (channels, C, self.text.width) \
                    or h % c.multiple or w % c.multiple:
                raise ValueError(f"the UNet of {h} x {w} must take {channels} channels, give {C}, read text of width "
                                 f"{self.text.width} and divide {h} and {w}, not {c}")
            c.check_image(h, w)

    def shape_of(self, k: int) -> tuple[int, int, int]:
        """(H, W, C) of the images of network k."""
        H, W, C = self.shape
        return self.resolutions[k], W * self.resolutions[k] // H, C


class Base(Module):
    """v_hat(x_t, t, c), the first of the cascade: it pools the frozen states in its own way, and attends to each."""

    def __init__(self, config: UNetConfig, rng: np.random.Generator):
        self.pool = AttentionPooling(config.text, config.heads, rng)
        self.unet = UNet(config, rng)

    def states(self, tokens, mask) -> TextStates:
        tokens = as_input(self, tokens)
        return TextStates(tokens, self.pool(tokens, mask), mask)

    def forward(self, x_t: Tensor, t, tokens, mask) -> Tensor:
        """x_t (B, H, W, C), t (B,), tokens (B, N, D) and mask (B, N) of the frozen encoder -> (B, H, W, C)."""
        return self.unet(x_t, t, self.states(tokens, mask))


class SuperResolution(Base):
    """v_hat(x_t, t, c, y_s, s): it also sees the small image with noise, and how much noise that is."""

    def __init__(self, config: UNetConfig, rng: np.random.Generator):
        super().__init__(config, rng)
        self.level = Linear(config.embedding, config.embedding, rng)

    def forward(self, x_t: Tensor, t, tokens, mask, y_s, s) -> Tensor:
        """Besides what the base takes: y_s (B, H, W, C) and its times s (B,), -1 for no noise."""
        level = sinusoidal_embedding(s, self.unet.config.embedding, dtype=x_t.dtype)
        level = self.level(Tensor(xp_of(x_t.data).asarray(level)))                  # (B, E)
        return self.unet(ops.concat([x_t, as_input(self, y_s)]), t, self.states(tokens, mask), level)


class Imagen(System):
    """A frozen text encoder, a base model and two super-resolution models."""

    name, Config, example = "imagen", ImagenConfig, "09_imagen.py"
    no_trajectory = "it draws a cascade of images of several sizes, not one image from its noise"
    no_likelihood = "its images come from a cascade of three models"

    def __init__(self, config: ImagenConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab - config.sentinels:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size} and the {config.sentinels} sentinels")
        super().__init__(config, tokenizer, rng)
        self.schedule = cosine(config.T)
        # the base decides at noisy times what to draw; the others paint in detail
        self.times, self.super_times = (density_from(text, self.schedule)
                                        for text in (config.times, config.super_times))
        self.text = TextEncoder(config.text, rng)
        self.base = Base(config.base, rng)
        self.super1 = SuperResolution(config.super1, rng)
        self.super2 = SuperResolution(config.super2, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> ImagenConfig:
        default, (H, _, C) = ImagenConfig(), shape
        if H % 4:
            raise ValueError(f"imagen's cascade needs images whose height is a multiple of 4, not {H}")
        return replace(default, shape=shape, resolutions=(H // 4, H // 2, H), base=replace(default.base, channels=C),
                       super1=replace(default.super1, channels=2 * C, out=C),
                       super2=replace(default.super2, channels=2 * C, out=C))

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: ImagenConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return Tokenizer.train([as_read(data.text(rng)) for _ in range(5000)], config.text.vocab - config.sentinels)

    @property
    def networks(self) -> list[Base]:
        return [self.base, self.super1, self.super2]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        c = self.config
        # the decoder is thrown away after training
        t5 = EncoderDecoder(self.text, c.decoder_layers, c.text.length, c.sentinels,
                            generator(0, "first weights of a decoder that is thrown away")).to(self.device)

        def texts(step: Step) -> tuple:
            return t5.batch([self.tokenizer.encode(as_read(data.text(step.rng))) for _ in range(step.size)], step.rng)
        yield Stage("text", t5, texts, EncoderDecoder.loss, steps=1500)
        for k, steps in enumerate((3000, 3000, 2000)):
            yield Stage(f"pixels-{c.resolutions[k]}", self.networks[k], partial(self.batch, data, k), self.loss,
                        steps=steps, picture=partial(self._picture, data.prompts[:6], k))

    def encode(self, captions: Sequence[str]) -> tuple:
        """The frozen encoder's states (B, N, D), and mask (B, N): no gradient reaches it."""
        ids, mask = self.tokenizer.batch([as_read(caption) for caption in captions], self.config.length)
        def states(ids, mask):
            text = self.text(ids, mask)
            return text.tokens, text.mask
        return map_batch(states, ids, mask, device=self.device)

    def batch(self, data: Dataset, k: int, step: Step) -> tuple:
        """x_0, t, eps and the condition of network k, for random images and captions of theirs."""
        T, shape = self.schedule.T, self.config.shape_of(k)
        chosen = step.choose(data)
        captions = random_captions(data, chosen, step.rng, DROP_CAPTION)
        x_0 = to_device(resized(step.images(data, chosen), shape[0]), self.device)        # (B, h, w, C)
        t = (self.super_times if k else self.times).draw(step.rng, step.size)
        eps, condition = step.normal(x_0.shape), self.encode(captions)
        if k:
            s = step.rng.integers(-1, T, step.size)         # aug_level ~ uniform(0, 1)
            small = resized(x_0, self.config.shape_of(k - 1)[0])
            condition += augmented(self.schedule, small, shape[0], s, step.normal(x_0.shape)), s
        return x_0, t, eps, *condition

    def loss(self, network: Base, x_0, t, eps, *condition) -> Tensor:
        """The mean squared error of a network in v, (): x_0, eps (B, H, W, C), t (B,), and what `batch` gives more."""
        # L = || v - v_hat(alpha_t x_0 + sigma_t eps, t, c) ||^2
        return denoising_loss(self.schedule, "v", lambda x_t: network(as_input(network, x_t), t, *condition),
                              x_0, t, eps)

    def _picture(self, prompts: Sequence[str], k: int):
        size = self.config.resolutions[k]
        images = self.cascade(prompts, until=size)[-1]
        return pictures.sheet(images, [p or "(no caption)" for p in prompts], columns=6, scale=max(84 // size, 1))

    # --- sampling -----------------------------------------------------------------------------------------

    def denoiser(self, k: int, cond: tuple, scale: float, threshold: str = "static") -> Conditioned:
        """(x_t, t) -> x_hat of network k for given captions, guided and then thresholded.

        cond: what network k takes beside x_t and t, each array (B, ...).
        """
        def predict(x_t, t, cond):
            network = self.networks[k]
            return map_batch(lambda x_t, t, *cond: network(as_input(network, Tensor(x_t)), t, *cond), x_t, t, *cond,
                             device=self.device)
        one_of("threshold", threshold, THRESHOLDS)
        # the null caption, beside the same small image
        uncond = (*self.encode([""]), *cond[2:])
        return Conditioned(ClassifierFree(NetworkDenoiser(self.schedule, "v", predict), scale, uncond,
                                          clip=THRESHOLDS[threshold]), cond)

    def cascade(self, captions: Sequence[str], *, scale: float = 2.0, super_scale: float = 2.0, steps: int = 20,
                super_steps: int = 10, threshold: str = "static", aug_level: float = 0.0, until: int | None = None,
                seed: int = 0, streams: SampleStreams | None = None) -> list[np.ndarray]:
        """The images of every resolution, as far as the height `until`: a list of (B, H, W, C) in [-1, 1].

        scale, steps: of the base; super_scale, super_steps: of the others.  threshold: "dynamic" or "static", of all.
        aug_level: how much noise the small images get, 0 (none) to 1 (nothing else).  Sample i draws from its own
        stream (seed, i), or from streams[i].  ValueError for numbers out of range.
        """
        streams, sizes = self.streams_for(captions, seed, streams), self.config.resolutions
        until = sizes[-1] if until is None else until
        if until not in sizes:
            raise ValueError(f"until must be one of {sizes}, not {until!r}")
        count, text = sizes.index(until) + 1, self.encode(captions)

        def finer(k: int):
            return lambda y_s, s: self.denoiser(k, (*text, y_s, s), super_scale, threshold)
        drawn = cascade(self.denoiser(0, text, scale, threshold), [finer(k) for k in range(1, count)],
                        [self.config.shape_of(k) for k in range(count)], streams,
                        s=noise_time(self.schedule, aug_level), steps=[steps, super_steps, super_steps][:count])
        return [to_numpy(check_finite(x)) for x in drawn]

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, super_scale: float = 2.0, steps: int = 20,
               super_steps: int = 10, threshold: str = "static", aug_level: float = 0.0, seed: int = 0,
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: `cascade`, until the data's height."""
        return self.cascade(captions, scale=scale, super_scale=super_scale, steps=steps, super_steps=super_steps,
                            threshold=threshold, aug_level=aug_level, until=self.config.shape[0], seed=seed,
                            streams=streams)[-1]
