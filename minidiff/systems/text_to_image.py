"""Text-to-image diffusion in pixel space with classifier-free guidance: the system that minidiff trains by default.

    training    x_t = alpha_t x_0 + sigma_t eps,   y a caption of x_0, replaced by '' now and then
                L = E || v - v_theta(x_t, t, y) ||^2,   v = alpha_t eps - sigma_t x_0     (Salimans & Ho 2022)
    sampling    x_T ~ N(0, I), then DPM-Solver++(2M) down to x_0 with classifier-free guidance
                eps = eps_uncond + scale (eps_cond - eps_uncond)                          (Ho & Salimans 2022)
                optionally only where low < sigma_t / alpha_t <= high                     (Kynkaanniemi et al. 2024)

For grey images the network does not give v itself.  It says of each pixel whether it is black, white or between, and
Bayes' rule makes v_theta of it (nn/pixel_mixture.py): a black background is then black, without grain.  With
predicts="v", as in colour, the network's output is v_theta.

It has a byte-level BPE tokenizer, a small transformer encoder and a UNet.  The caption enters the UNet twice: pooled,
through the norms, and token by token, through cross-attention (as in GLIDE, Imagen and Stable Diffusion).

Training times have a density (config.times).  By default log-SNR is normal, with mean -1 and standard deviation 2:
which digit it will be is decided at noisy times, and Bayes' rule leaves little to learn at the clean ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from minidiff import pictures
from minidiff.checks import one_of
from minidiff.data.dataset import Dataset
from minidiff.diffusion.denoiser import NetworkDenoiser, Remembering, static_threshold
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.gaussian import PREDICTIONS
from minidiff.diffusion.guidance import ClassifierFree, GuidanceInterval
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, recording
from minidiff.nn.pixel_mixture import NUMBERS, v_of_mixture
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, as_read, caption_tokenizer, finite_states
from minidiff.systems.training_batches import coefficients, denoising_loss, random_captions
from minidiff.text.encoder import TextEncoder, TextEncoderConfig, shares
from minidiff.text.tokenizer import Tokenizer

MIXTURE = "mixture"                                         # of config.predicts

# Colour pictures of many things need more weights and more steps than digits.  Patches of 4 x 4 pixels make the steps
# cheap: a network that sees each picture more often learns more than one that looks at it more closely.
COLOUR = UNetConfig(channels=3, patch=4, widths=(128, 256), text=128)


@dataclass(frozen=True)
class TextToImageConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times
    predicts: str = "mixture"               # of the UNet: eps, x0, v, or each pixel's distribution, which gives v
    times: str = "normal:mean=-1,std=2"     # how often each is drawn: NAME[:key=value,...] of densities.DENSITIES
    drop_caption: float = 0.1               # share of captions replaced by '' in training, for classifier-free guidance
    steps: int = 2200                       # of training
    batch: int = 32                         # pictures in a training step
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(text=64))

    @property
    def predicted(self) -> str:
        """What the loss compares and the samplers see: eps, x0 or v."""
        return "v" if self.predicts == MIXTURE else self.predicts

    @property
    def network(self) -> UNetConfig:
        """The UNet that is made: of a mixture it gives four numbers a pixel."""
        return replace(self.unet, out=NUMBERS * self.shape[2]) if self.predicts == MIXTURE else self.unet

    def __post_init__(self):
        one_of("predicts", self.predicts, (*PREDICTIONS, MIXTURE))
        check_schedule(self.schedule)
        parse_density(self.times)
        check_shape(self.shape, self.unet.multiple)
        self.unet.check_image(*self.shape[:2])
        if self.unet.text != self.text.width or not self.unet.channels == (self.unet.out or self.unet.channels) \
                == self.shape[2]:
            raise ValueError(f"unet.text ({self.unet.text}) must be text.width ({self.text.width}), and unet.channels "
                             f"({self.unet.channels}) and unet.out ({self.unet.out}) the channels of shape "
                             f"{self.shape}")
        if not 0 <= self.drop_caption <= 1 or min(self.steps, self.batch) < 1:
            raise ValueError(f"drop_caption must be within 0 and 1, and steps and batch at least 1, not "
                             f"{self.drop_caption}, {self.steps} and {self.batch}")


class TextToImage(System):
    """A caption encoder and a UNet, with the tokenizer and the schedule that they were trained with."""

    name, Config, example = "text-to-image", TextToImageConfig, "train_mnist_text.py"
    when_none = {"interval_low": "no end", "interval_high": "no end"}

    def __init__(self, config: TextToImageConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        super().__init__(config, tokenizer, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.times = density_from(config.times, self.schedule)
        self.text = TextEncoder(config.text, rng)
        self.unet = UNet(config.network, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> TextToImageConfig:
        default, (H, W, C) = TextToImageConfig(), shape
        if C == 1:
            return replace(default, shape=shape)
        # as the emoji were trained that come with minidiff: a mixture, and other times, are not measured in colour
        measured = {"shape": shape, "predicts": "v", "times": "power"}
        if H % COLOUR.multiple or W % COLOUR.multiple:
            return replace(default, unet=replace(default.unet, channels=C), **measured)
        return replace(default, text=replace(default.text, vocab=1024, width=COLOUR.text), unet=COLOUR, steps=9000,
                       batch=64, **measured)

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: TextToImageConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return caption_tokenizer(data, config.text.vocab, rng)

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as ids and mask, (B, N).  A caption of white space only is the null caption."""
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.text.length)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        def batch(step: Step) -> tuple:
            chosen = step.choose(data)
            captions = random_captions(data, chosen, step.rng, self.config.drop_caption)
            ids, mask = self.tokens(captions)
            longest = int(mask.sum(axis=1).max())           # columns with nothing but padding are left out
            t, eps = self.times.draw(step.rng, step.size), step.normal((step.size, *data.shape))
            return step.images(data, chosen), ids[:, :longest], mask[:, :longest], t, eps

        def picture():
            images = self.sample(data.prompts)
            return pictures.sheet(images, [p or "(no caption)" for p in data.prompts], columns=6)
        yield Stage("diffusion", self, batch, TextToImage.loss, self.config.steps, self.config.batch,
                    picture=picture, ahead=TextToImage.ahead)

    def loss(self, x_0, ids, mask, t, eps) -> Tensor:
        """The mean squared error of the prediction at given times and noise, a Tensor of shape ().

        x_0, eps (B, H, W, C) float; ids, mask (B, N) from `tokens`; t (B,) int of 0..T-1.
        """
        # L = || v - v_theta(x_t, t, y) ||^2
        return denoising_loss(self.schedule, self.config.predicted,
                              lambda x_t: self.prediction(self.unet, x_t, t, self.text(ids, mask)), x_0, t, eps)

    def ahead(self, dtype, x_0, ids, mask, t, eps) -> list[np.ndarray]:
        """The small arrays that `loss` computes on the host, of its arguments and for networks of this dtype."""
        return [*coefficients(self.schedule, t), shares(mask, dtype), self.unet.time_embedding(t, dtype)]

    def prediction(self, unet: UNet, x_t, t, text: TextStates) -> Tensor:
        """What the samplers see, at x_t (B, H, W, C), an array or a Tensor; the UNet may be one in half precision."""
        out = unet(as_input(unet, x_t), t, text)                                    # (B, H, W, C), or 4 C
        if self.config.predicts != MIXTURE:
            return out
        out, x_t = as_float32(out), x_t if isinstance(x_t, Tensor) else Tensor(to_device(x_t, unet.device))
        t = np.maximum(t, 0)                                # the clean image, t = -1, has no v: this one is finite
        return v_of_mixture(out, ops.cast(x_t, out.dtype), self.schedule.alpha(t), self.schedule.sigma(t))

    # --- the network as a denoiser ------------------------------------------------------------------------

    def encode(self, captions: Sequence[str]) -> tuple:
        """Captions as the arrays of a condition: tokens (B, N, D), pooled (B, D), mask (B, N)."""
        def states(ids, mask):
            text = self.text(ids, mask)
            return text.tokens, text.pooled, text.mask
        return map_batch(states, *self.tokens(captions), device=self.device)

    def read(self, cond: tuple) -> tuple:
        """An encoded condition with what the UNet reads of it at any x_t and t: keys and values, (B, N, 2 C) each."""
        def keys_values(tokens):
            return tuple(self.unet.keys_values(as_input(self.unet, Tensor(tokens))))
        return *cond, *map_batch(keys_values, cond[0], device=self.device)

    def predict(self, x_t, t, cond: tuple):
        """The prediction for arrays x_t (B, H, W, C), t (B,) and a condition, on all cores, or the GPU.

        cond: of `encode`, or of `read`, which saves work where there are several calls.
        """
        def network(x_t, t, *cond):
            return self.prediction(self.unet, Tensor(x_t), t, self._states(*cond))
        return map_batch(network, x_t, t, *cond, device=self.device)

    def _states(self, tokens, pooled, mask, *keys_values) -> TextStates:
        tokens, pooled, *keys_values = (as_input(self.unet, Tensor(a)) for a in (tokens, pooled, *keys_values))
        return self.unet.with_keys_values(TextStates(tokens, pooled, mask), keys_values)

    def predict_vjp(self, x_t, t, dy, cond: tuple) -> tuple:
        """What `predict` gives, and dy^T d predict / d x_t, of x_t's shape."""
        def network(x_t, t, dy, tokens, pooled, mask):
            x = Tensor(x_t, requires_grad=True)
            with recording():
                y = self.prediction(self.unet, x, t, self._states(tokens, pooled, mask))
            return y.data, gradients(y, [x], dy)[0]
        return map_batch(network, x_t, t, dy, *cond, device=self.device)

    def unguided(self) -> NetworkDenoiser:
        """(x_t, t, cond) -> x0_hat as the network predicts it, unclipped, with its derivative.

        It reads a condition once, for all steps of a sampler: after a change of weights, or of a condition's arrays,
        ask for a new one.
        """
        predict = partial(self._predict, Remembering(self.read))
        return NetworkDenoiser(self.schedule, self.config.predicted, predict, network_vjp=self.predict_vjp)

    def _predict(self, read: Remembering, x_t, t, cond: tuple):
        return self.predict(x_t, t, read(cond))

    def denoiser(self, scale: float = 2.0, low: float | None = None,
                 high: float | None = None) -> ClassifierFree | GuidanceInterval:
        """(x_t, t, cond) -> x0_hat with classifier-free guidance: scale 0 ignores the caption, 1 follows it.

        low, high: the noise levels between which it is guided (GuidanceInterval); None is no end.
        """
        guided = ClassifierFree(self.unguided(), scale, self.encode([""]), clip=static_threshold)
        if low is None and high is None:
            return guided
        return GuidanceInterval(guided, 0.0 if low is None else low, math.inf if high is None else high)

    def likelihood_denoiser(self) -> tuple[NetworkDenoiser, tuple]:
        return self.unguided(), self.encode([""])

    # --- sampling -----------------------------------------------------------------------------------------

    def trajectory(self, captions: Sequence[str], *, scale: float = 2.0, interval_low: float | None = None,
                   interval_high: float | None = None, steps: int = 20, seed: int = 0, sampler: str = "dpm++2m",
                   streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, one sample for each caption, sample i from its own stream (seed, i).

        The last state's x_t is (B, H, W, C) in [-1, 1]; the first is the noise, for which x0_hat is not known yet.
        streams: of the noise; without them each device makes its own, so that the same seed gives other noise on
        another device.  captions: '' is the null caption.  sampler: a name in samplers.SAMPLERS.  Guidance acts at the
        noise levels interval_low < sigma_t / alpha_t <= interval_high; at the others the scale is 1.
        """
        streams, sampler = self.streams_for(captions, seed, streams), SAMPLERS[sampler]
        x_T = self.noise(streams, self.config.shape)                                # (B, H, W, C)
        path = times(self.schedule, steps)                                          # T-1 ... 0
        yield State(0, int(path[0]), x_T, None)
        denoiser = self.denoiser(scale, interval_low, interval_high)
        yield from finite_states(sampler(denoiser, x_T, path, self.encode(captions), streams=streams))

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, interval_low: float | None = None,
               interval_high: float | None = None, steps: int = 20, seed: int = 0, sampler: str = "dpm++2m",
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: the end of `trajectory`."""
        return to_numpy(last(self.trajectory(
            captions, scale=scale, interval_low=interval_low, interval_high=interval_high, steps=steps, seed=seed,
            sampler=sampler, streams=streams)))
