"""Latent diffusion, as Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752): a picture is drawn as a 7 x 7 code.

    first stage    z = E(x),  x_hat = D(z)                      a KL autoencoder: systems/autoencoder.py      (sec. 3.1)
    scale          z_0 = scale z,  scale = 1 / std of z over the data                                       (appendix G)
    diffusion      z_t = alpha_t z_0 + sigma_t eps
                   L = E || v - v_theta(z_t, t, tau(y)) ||^2                                          (eq. 3, for eps)
    text           tau(y): the token states of a frozen CLIP, heard through cross-attention           (sec. 3.3)
                   softmax(Q K^T / sqrt(d)) V,  Q of z_t,  K and V of tau(y)
    sampling       z_T ~ N(0, I), DPM-Solver++(2M) with classifier-free guidance, then x = D(z_0 / scale), once
                   eps = eps_uncond + s (eps_cond - eps_uncond),  s the option `scale` of `sample`

The network sees 49 tokens where a picture has 784 pixels. Latents live on no interval: nothing is clipped before D.
With the same weights: image to image (`vary`) and in-painting (`inpaint`), by diffusion/editing.py.

Scaled down and left out: 28 x 28 pixels for 512 x 512, 7 x 7 x 3 latents for 64 x 64 x 4, one level of the UNet for
four; v in place of eps, and a cosine schedule, as everywhere here; the pooled caption enters the norms too, which
Stable Diffusion's does not; the paper's own models train their text encoder, Stable Diffusion's is frozen, as here.
In-painting is by replacement, where the paper trains a model that is given the mask. `vary` and `inpaint` start from
the mean of q(z|x). Times are drawn by T u^(1/3), more of the noisier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import binary_erosion

from minidiff import pictures
from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion import editing
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.gaussian import q_sample, target
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import SAMPLERS, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import cosine
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.autoencoder import KLAutoencoder, KLAutoencoderConfig
from minidiff.systems.clip import CLIP, CLIPConfig
from minidiff.systems.system import Stage, System, check_finite, streams_for
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LatentConfig:
    """Everything that makes one model; it travels in its file."""

    image_size: int = 28
    T: int = 1000
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    autoencoder: KLAutoencoderConfig = field(default_factory=KLAutoencoderConfig)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(
        channels=3, patch=1, widths=(80,), blocks=1, attention=(True,), embedding=128, text=64))
    steps: int = 4000

    def __post_init__(self):
        if self.unet.channels != self.autoencoder.latent or self.unet.text != self.clip.width:
            raise ValueError(f"unet.channels ({self.unet.channels}) must be autoencoder.latent "
                             f"({self.autoencoder.latent}), and unet.text ({self.unet.text}) clip.width "
                             f"({self.clip.width})")
        if not 4 <= self.image_size <= 256 or self.image_size % (4 * self.unet.multiple):
            raise ValueError(f"image_size must be a multiple of {4 * self.unet.multiple} of at most 256, "
                             f"not {self.image_size}")


class LatentDiffusion(System):
    """A KL autoencoder, CLIP's text encoder, and a UNet that hears it and sees latents only."""

    name, Config = "latent", LatentConfig
    needs = ("clip",)

    def __init__(self, config: LatentConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.schedule = cosine(config.T)
        self.clip = CLIP(config.clip, tokenizer, rng)
        self.autoencoder = KLAutoencoder(config.autoencoder, None, rng)
        self.unet = UNet(config.unet, rng)
        self.scale = Tensor(np.ones((), np.float32))        # measured, not trained; a Tensor, so that it is saved

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config: LatentConfig, rng: np.random.Generator) -> Tokenizer:
        """That of the CLIP which comes with minidiff."""
        return CLIP.load().tokenizer

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        self.clip.load_state_dict(CLIP.load().state_dict())
        yield from self.autoencoder.stages(data)
        mean, std = self.autoencoder.posterior(data.x_0)                            # (N, 7, 7, C) twice
        self.measure_scale(mean, std)

        def batch(rng: np.random.Generator, B: int) -> tuple:
            i = rng.integers(0, len(mean), B)
            # one caption in ten is dropped, so that the network also learns to draw without one
            captions = [data.caption(int(k), rng) if rng.random() > 0.1 else "" for k in i]
            # z_0 = scale z,  z ~ q(z|x)
            z = mean[i] + std[i] * rng.standard_normal(mean[i].shape, dtype=np.float32)
            t = (self.config.T * np.cbrt(rng.random(B))).astype(int)                # more of the noisier times
            t = np.minimum(t, self.config.T - 1)            # a root may be rounded up to 1
            eps = rng.standard_normal(z.shape, dtype=np.float32)
            return self.scale.data * z, *self.clip.text_states(captions), t, eps

        shown = [data.caption(i, np.random.default_rng(i)) for i in range(min(12, len(mean)))]
        yield Stage("diffusion", self.unet, batch, self.loss, steps=self.config.steps, size=32,
                    draw=lambda: pictures.sheet(self.sample(shown), shown, columns=6))

    def measure_scale(self, mean: np.ndarray, std: np.ndarray) -> None:
        """scale = 1 / std of z, over the data and q(z|x) = N(mean, std^2), all numbers of z together."""
        # Var z = Var E[z|x] + E Var[z|x]
        variance = np.var(mean, dtype=np.float64) + np.mean(std.astype(np.float64) ** 2)
        self.scale.data = np.asarray(variance**-0.5, np.float32)

    def loss(self, z_0, tokens, pooled, mask, t, eps) -> Tensor:
        """The mean squared error of v at given times and noise, (): z_0, eps (B, 7, 7, C), captions' states, t (B,)."""
        # z_t = alpha_t z_0 + sigma_t eps
        z_t = q_sample(self.schedule, z_0, t, eps)
        v = target(self.schedule, "v", z_0, eps, t)
        # L = || v - v_theta(z_t, t, tau(y)) ||^2
        error = self.unet(Tensor(z_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask)) - v
        return ops.mean(error * error)

    # --- pixels and latents -------------------------------------------------------------------------------

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1] -> z_0 (B, 7, 7, C) of variance about 1."""
        H = self.config.image_size
        if images.ndim != 4 or images.shape[1:3] != (H, H) or len(images) == 0:
            raise ValueError(f"images must be (B, {H}, {H}, 1), not {images.shape}")
        return self.scale.data * self.autoencoder.encode(images.astype(np.float32))

    def decode(self, z_0: np.ndarray) -> np.ndarray:
        """z_0 (B, 7, 7, C) -> images (B, 28, 28, 1) in [-1, 1]."""
        return self.autoencoder.decode(z_0 / self.scale.data)

    # --- sampling -----------------------------------------------------------------------------------------

    def predict(self, z_t, t, cond: tuple) -> np.ndarray:
        """v_theta for arrays z_t (B, 7, 7, C), t (B,) and the states of captions, on all cores."""
        def one(part: slice):
            tokens, pooled, mask = (a[part] for a in cond)
            with no_grad():
                return self.unet(Tensor(z_t[part]), t[part], TextStates(Tensor(tokens), Tensor(pooled), mask)).data
        return np.concatenate(list(parallel_map(one, shards(len(z_t)))))

    def denoiser(self, scale: float = 2.0) -> ClassifierFree:
        """(z_t, t, states) -> z0_hat with classifier-free guidance, unclipped: latents live on no interval."""
        return ClassifierFree(NetworkDenoiser(self.schedule, "v", self.predict), scale, self.clip.text_states([""]))

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
               sampler: str = "dpm++2m", streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption, sample i from its own stream (seed, i).

        scale: of guidance; 0 ignores the caption, 1 follows it.  sampler: a name in samplers.SAMPLERS.
        """
        streams = streams_for(captions, seed, streams)
        return self._drawn(captions, streams.normal(self._shape), times(self.schedule, steps), scale, sampler, streams)

    def vary(self, images: np.ndarray, captions: Sequence[str], *, strength: float = 0.6, scale: float = 2.0,
             steps: int = 20, seed: int = 0, sampler: str = "dpm++2m", streams: SampleStreams | None = None) -> np.ndarray:
        """Image to image: pictures like `images` (B, 28, 28, 1) that fit the captions (SDEdit).

        strength: the share of the steps that is made; 0 gives the image as the autoencoder returns it, 1 a new one.
        """
        streams, z_0 = streams_for(captions, seed, streams), self.encode(images)
        _check_count(images, captions)
        path = editing.shortened(times(self.schedule, steps), strength)
        if not path:
            return self.decode(z_0)
        z_t = q_sample(self.schedule, z_0, path[0], streams.normal(self._shape))
        return self._drawn(captions, z_t, path, scale, sampler, streams)

    def inpaint(self, images: np.ndarray, mask: np.ndarray, captions: Sequence[str], *, repeats: int = 1,
                scale: float = 2.0, steps: int = 50, seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """The images (B, 28, 28, 1) where mask (booleans of that shape) is True; what the captions ask for elsewhere.

        A place of the code counts as known where all of its 4 x 4 pixels are, and those of the places around it.
        What is hidden is black for the encoder, which looks further than a place.  repeats: as editing.inpaint's.
        """
        streams = streams_for(captions, seed, streams)
        _check_count(images, captions)
        if mask.shape != images.shape or mask.dtype != bool:
            raise ValueError(f"mask must be booleans of images' shape {images.shape}, not {mask.dtype} {mask.shape}")
        B, H, W, _ = images.shape
        z_0 = self.encode(np.where(mask, images, -1))
        known = mask.reshape(B, H // 4, 4, W // 4, 4).all(axis=(2, 4))              # (B, 7, 7)
        known = binary_erosion(known, np.ones((1, 3, 3)), border_value=1)[..., None]        # (B, 7, 7, 1)
        z_T = streams.normal(self._shape)
        drawn = last(editing.inpaint(self.denoiser(scale), z_T, times(self.schedule, steps), z_0, known,
                                     self.clip.text_states(captions), streams=streams, repeats=repeats))
        return np.where(mask, images, check_finite(self.decode(drawn)))

    def _drawn(self, captions, z_t, path, scale: float, sampler: str, streams: SampleStreams) -> np.ndarray:
        """From z_t at path[0] down to z_0, and decoded."""
        states = SAMPLERS[sampler](self.denoiser(scale), z_t, path, self.clip.text_states(captions), streams=streams)
        z_0 = last(states)
        return check_finite(self.decode(z_0))

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Of one latent."""
        side = self.config.image_size // 4
        return side, side, self.config.autoencoder.latent


def _check_count(images: np.ndarray, captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise ValueError(f"images must be one for each of the {len(captions)} captions, not {len(images)}")
