"""A diffusion transformer with rectified flow, as Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206; SD3).

    path        x_u = (1 - u) x_0 + u eps                                             SD3 section 3, rectified flow
    training    L = E || (eps - x_0) - flow_theta(x_u, u, y) ||^2,   y a caption of x_0, '' now and then
                u ~ logit-normal: log-SNR = -2 logit u ~ N(0, 2^2)                    SD3 section 3.1
    resolution  u <- shift u / (1 + (shift - 1) u),   shift = sqrt(pixels / 784)      SD3 section 5.3.2
    network     patches and words as tokens; adaLN-Zero; joint attention              Peebles & Xie 2023; SD3 section 4
    sampling    x_1 = eps, then Euler's method  x_s = x_u + (s - u) flow  down to u = 0, with classifier-free guidance
                flow = flow_uncond + scale (flow_cond - flow_uncond)                  Ho & Salimans 2022

Two ideas meet here.  The network is a transformer (nn/mmdit.py): an image is a sequence of patches, without a UNet's
levels and convolutions, and a caption is a second sequence in the same attention.  The path from one image to one noise
is straight (diffusion/rectified_flow.py): its velocity eps - x_0 does not depend on the time.  The network learns the
mean of these velocities at x_u, and the flow along this mean is curved.  So one step is not enough, and a few steps of
the simplest method give a good picture.  In the terms of the other pages this is the schedule
`flow_matching`, and Euler's method is DDIM; the other samplers work, too.

Scaled down and left out: 28 x 28 pixels and 49 tokens for 1024 x 1024 pixels, which are 64 x 64 tokens of an
autoencoder's latents; 5 blocks of width 128 for 38 of 2432; one small text encoder, trained with the rest, for three
large frozen ones; no norm of queries and keys.  Times are the T of a table, where SD3's are continuous.  SD3 shifts the
times where it trains on after the resolution has grown; here each size has its shift from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff import pictures
from minidiff.data.dataset import Dataset
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.rectified_flow import FlowDenoiser, interpolate, path_time, resolution_shift
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import flow_matching
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, recording
from minidiff.nn.mmdit import MMDiT, MMDiTConfig
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import TextStates
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, as_read, caption_tokenizer, finite_states
from minidiff.systems.training_batches import random_captions
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

PIXELS = 28 * 28                                            # of pictures whose times need no shift
# Colour pictures of many things need more weights and more steps than digits.
COLOUR = MMDiTConfig(channels=3, width=192, text=128)


@dataclass(frozen=True)
class DiTConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    T: int = 1000                                           # times between image and noise
    times: str = "normal"                   # how often each is drawn, before the shift: of DENSITIES
    shift: float = 1.0                                      # of the times: more than 1 for more noise
    drop_caption: float = 0.1               # share of captions replaced by '' in training, for classifier-free guidance
    steps: int = 2200                                       # of training
    batch: int = 32                                         # pictures in a training step
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    network: MMDiTConfig = field(default_factory=MMDiTConfig)

    def __post_init__(self):
        parse_density(self.times)
        check_shape(self.shape, self.network.patch)
        self.network.check_image(*self.shape[:2], self.text.length)
        if self.network.text != self.text.width or self.network.channels != self.shape[2]:
            raise ValueError(f"network.text ({self.network.text}) must be text.width ({self.text.width}), and "
                             f"network.channels ({self.network.channels}) the channels of shape {self.shape}")
        if not 0 <= self.drop_caption <= 1 or min(self.T, self.steps, self.batch) < 1:
            raise ValueError(f"drop_caption must be within 0 and 1, and T, steps and batch at least 1, not "
                             f"{self.drop_caption}, {self.T}, {self.steps} and {self.batch}")
        if not 0 < self.shift <= 100:
            raise ValueError(f"shift must be positive and at most 100, not {self.shift}")


class DiffusionTransformer(System):
    """A caption encoder and an MM-DiT, with the tokenizer and the times that they were trained with."""

    name, Config = "dit", DiTConfig

    def __init__(self, config: DiTConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        super().__init__(config, tokenizer, rng)
        # u is drawn, and then shifted: the density is that of the path without the shift
        self.times = density_from(config.times, flow_matching(config.T))
        self.schedule = flow_matching(config.T, config.shift)
        self.text = TextEncoder(config.text, rng)
        self.network = MMDiT(config.network, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> DiTConfig:
        default, (H, W, C) = DiTConfig(), shape
        shift = round(resolution_shift(H * W, PIXELS), 3)
        if C == 1:
            return replace(default, shape=shape, shift=shift)
        return replace(default, shape=shape, shift=shift, network=COLOUR, steps=9000, batch=64,
                       text=replace(default.text, vocab=1024, width=COLOUR.text))

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: DiTConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return caption_tokenizer(data, config.text.vocab, rng)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        c = self.config

        def batch(step: Step) -> tuple:
            chosen = step.choose(data)
            captions = random_captions(data, chosen, step.rng, c.drop_caption)
            ids, mask = self.tokens(captions)
            longest = int(mask.sum(axis=1).max())           # columns with nothing but padding are left out
            t = self.times.draw(step.rng, step.size)
            eps = step.normal((step.size, *data.shape))
            return step.images(data, chosen), ids[:, :longest], mask[:, :longest], t, eps

        def picture():
            return pictures.sheet(self.sample(data.prompts), [p or "(no caption)" for p in data.prompts], columns=6)
        yield Stage("diffusion", self, batch, DiffusionTransformer.loss, c.steps, c.batch, picture=picture)

    def loss(self, x_0, ids, mask, t, eps) -> Tensor:
        """The mean squared error of the flow at given times and noise, a Tensor of shape ().

        x_0, eps (B, H, W, C) float; ids, mask (B, N) from `tokens`; t (B,) int of 0..T-1.
        """
        u = path_time(self.schedule, t)                                             # (B,)
        # x_u = (1 - u) x_0 + u eps
        x_u = interpolate(x_0, u, eps)
        # L = || (eps - x_0) - flow_theta(x_u, u, y) ||^2
        error = as_float32(self.network(as_input(self.network, x_u), u, self.text(ids, mask))) - (eps - x_0)
        return ops.mean(error * error)

    # --- the network as a denoiser ------------------------------------------------------------------------

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as ids and mask, (B, N).  A caption of white space only is the null caption."""
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.text.length)

    def encode(self, captions: Sequence[str]) -> tuple:
        """Captions as the arrays of a condition: tokens (B, N, D), pooled (B, D), mask (B, N)."""
        def states(ids, mask):
            text = self.text(ids, mask)
            return text.tokens, text.pooled, text.mask
        return map_batch(states, *self.tokens(captions), device=self.device)

    def flow(self, x_u: Tensor, u, tokens, pooled, mask) -> Tensor:
        """flow_theta at x_u (B, H, W, C), u (B,), for an encoded condition."""
        x_u, tokens, pooled = (as_input(self.network, a) for a in (x_u, Tensor(tokens), Tensor(pooled)))
        return self.network(x_u, u, TextStates(tokens, pooled, mask))

    def predict(self, x_u, u, cond: tuple):
        """flow_theta as an array (B, H, W, C), on all cores, or the GPU."""
        return map_batch(lambda x_u, u, *cond: self.flow(Tensor(x_u), u, *cond), x_u, u, *cond, device=self.device)

    def predict_vjp(self, x_u, u, dy, cond: tuple) -> tuple:
        """What `predict` gives, and dy^T d predict / d x_u, of x_u's shape."""
        def network(x_u, u, dy, *cond):
            x = Tensor(x_u, requires_grad=True)
            with recording():
                y = self.flow(x, u, *cond)
            return y.data, gradients(y, [x], dy)[0]
        return map_batch(network, x_u, u, dy, *cond, device=self.device)

    def unguided(self) -> FlowDenoiser:
        """(x_t, t, cond) -> x0_hat as the network predicts it, unclipped, with its derivative."""
        return FlowDenoiser(self.schedule, self.predict, network_vjp=self.predict_vjp)

    def denoiser(self, scale: float = 2.0) -> ClassifierFree:
        """(x_t, t, cond) -> x0_hat with classifier-free guidance: scale 0 ignores the caption, 1 follows it."""
        return ClassifierFree(self.unguided(), scale, self.encode([""]), clip=static_threshold)

    def likelihood_denoiser(self) -> tuple[FlowDenoiser, tuple]:
        return self.unguided(), self.encode([""])

    # --- sampling -----------------------------------------------------------------------------------------

    def trajectory(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
                   sampler: str = "ddim", streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from noise to image, one sample for each caption, sample i from its own stream (seed, i).

        The last state's x_t is (B, H, W, C) in [-1, 1]; a state's x_u is x_t / (alpha_t + sigma_t).  The steps are
        equal in u, but for the shift.  captions: '' is the null caption.  sampler: a name in samplers.SAMPLERS; "ddim"
        is Euler's method.
        """
        streams = self.streams_for(captions, seed, streams)
        x_T, path = self.noise(streams, self.config.shape), times(self.schedule, steps)     # u = 1 ... 1/steps
        yield State(0, int(path[0]), x_T, None)
        yield from finite_states(SAMPLERS[sampler](self.denoiser(scale), x_T, path, self.encode(captions),
                                                   streams=streams))

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
               sampler: str = "ddim", streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: the end of `trajectory`."""
        return to_numpy(last(self.trajectory(captions, scale=scale, steps=steps, seed=seed, sampler=sampler,
                                             streams=streams)))
