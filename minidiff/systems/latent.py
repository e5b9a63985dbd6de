"""Latent diffusion, as Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752): a picture is drawn as a 7 x 7 code.

    first stage    z = E(x),  x_hat = D(z)                      a KL autoencoder: systems/autoencoder.py     section 3.1
    scale          z_0 = scale z,  scale = 1 / std of z over the data                                       appendix G
    diffusion      z_t = alpha_t z_0 + sigma_t eps
                   L = E || v - v_theta(z_t, t, tau(y)) ||^2                                          eq. 3, for eps
    text           tau(y): the token states of a frozen CLIP, read through cross-attention            section 3.3
                   softmax(Q K^T / sqrt(d)) V,  Q of z_t,  K and V of tau(y)
    sampling       z_T ~ N(0, I), DPM-Solver++(2M) with classifier-free guidance, then x = D(z_0 / scale), once
                   eps = eps_uncond + s (eps_cond - eps_uncond),  s the option `scale` of `sample`

The network sees 49 tokens where a picture has 784 pixels.  Latents have no bounds: nothing is clipped before D.
The same weights serve image to image (`vary`) and in-painting (`inpaint`), by diffusion/editing.py.

Scaled down and left out: 28 x 28 pixels for 512 x 512, 7 x 7 x 3 latents for 64 x 64 x 4, one level of the UNet for
four; v in place of eps, and a cosine schedule, as everywhere here; the pooled caption enters the norms too, which
it does not in Stable Diffusion; the paper's own models train their text encoder, Stable Diffusion's is frozen, as here.
In-painting is by replacement, where the paper trains a model that sees the mask.  `vary` and `inpaint` start from
the mean of q(z|x).  Training times have a density (config.times), which grows with t by default (t = T u^(1/3)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.ndimage import binary_erosion

from minidiff import pictures
from minidiff.data.dataset import Dataset
from minidiff.diffusion import editing
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import cosine
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.nn.image_tower import check_two_halvings
from minidiff.nn.images import clean_images
from minidiff.nn.precision import as_input
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.autoencoder import KLAutoencoder, KLAutoencoderConfig
from minidiff.systems.clip import CLIP, CLIPConfig
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, check_finite
from minidiff.systems.training_batches import denoising_loss, random_captions
from minidiff.text.tokenizer import Tokenizer

DROP_CAPTION = 0.1                                          # so that the network also learns to draw without a caption


@dataclass(frozen=True)
class LatentConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    T: int = 1000                           # training times, of the cosine schedule
    times: str = "power"                    # how often each is drawn: NAME[:key=value,...] of densities.DENSITIES
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    autoencoder: KLAutoencoderConfig = field(default_factory=KLAutoencoderConfig)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(
        channels=3, patch=1, widths=(80,), blocks=1, attention=(True,), embedding=128, text=64))
    steps: int = 4000

    def __post_init__(self):
        parse_density(self.times)
        if self.unet.text != self.clip.width or not self.unet.channels == (self.unet.out or self.unet.channels) \
                == self.autoencoder.latent:
            raise ValueError(f"unet.channels ({self.unet.channels}) and unet.out ({self.unet.out}) must be "
                             f"autoencoder.latent ({self.autoencoder.latent}), and unet.text ({self.unet.text}) "
                             f"clip.width ({self.clip.width})")
        if self.autoencoder.network.channels != self.shape[-1]:
            raise ValueError(f"autoencoder.network.channels ({self.autoencoder.network.channels}) must be the channels "
                             f"of shape {self.shape}")
        check_shape(self.shape, 4 * self.unet.multiple)
        self.unet.check_image(self.shape[0] // 4, self.shape[1] // 4)
        check_two_halvings("LatentConfig", self.shape, self.autoencoder.network.widths)


class LatentDiffusion(System):
    """A KL autoencoder, CLIP's text encoder, and a UNet that reads it and sees latents only."""

    name, Config, example = "latent", LatentConfig, "11_latent_diffusion.py"
    needs = ("clip", "digit-classifier")
    slow_trajectory = True                                  # each state is decoded
    no_likelihood = "its denoiser works on latents, not on pixels"

    def __init__(self, config: LatentConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.schedule = cosine(config.T)
        self.times = density_from(config.times, self.schedule)
        self.clip = CLIP(config.clip, tokenizer, rng)
        self.autoencoder = KLAutoencoder(config.autoencoder, None, rng)
        self.unet = UNet(config.unet, rng)
        self.scale = Tensor(np.ones((), np.float32))        # measured, not trained; a Tensor, so that it is saved

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> LatentConfig:
        default = LatentConfig()
        return replace(default, shape=shape, clip=CLIP.config_for(shape), autoencoder=KLAutoencoder.config_for(shape))

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: LatentConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return needed["clip"].tokenizer

    def take(self, needed) -> None:
        self.clip.copy_from(needed["clip"])
        self.autoencoder.take(needed)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        yield from self.autoencoder.stages(data)
        mean, std = self.autoencoder.posterior_of(data)                             # (N, H/4, W/4, C) twice
        self.measure_scale(mean, std)

        def batch(step: Step) -> tuple:
            i = step.choose(data)
            captions = random_captions(data, i, step.rng, DROP_CAPTION)
            # z_0 = scale z,  z ~ q(z|x)
            z = to_device(mean[i], self.device) + to_device(std[i], self.device) * step.normal(mean[i].shape)
            t = self.times.draw(step.rng, step.size)
            return self.scale.data * z, *self.clip.text_states(captions), t, step.normal(z.shape)

        def picture():
            return pictures.sheet(self.sample(data.prompts), [p or "(no caption)" for p in data.prompts], columns=6)
        yield Stage("diffusion", self.unet, batch, self.loss, steps=self.config.steps, picture=picture)

    def measure_scale(self, mean: np.ndarray, std: np.ndarray) -> None:
        """scale = 1 / std of z, over the data and q(z|x) = N(mean, std^2), all numbers of z together."""
        # Var z = Var E[z|x] + E Var[z|x]
        variance = np.var(mean, dtype=np.float64) + np.mean(std.astype(np.float64) ** 2)
        self.scale.data = to_device(np.asarray(variance**-0.5, np.float32), self.device)

    def loss(self, unet: UNet, z_0, tokens, pooled, mask, t, eps) -> Tensor:
        """The mean squared error of v at given times and noise, (): z_0, eps (B, h, w, C), captions' states, t (B,)."""
        def network(z_t) -> Tensor:
            text = TextStates(as_input(unet, tokens), as_input(unet, pooled), mask)
            return unet(as_input(unet, z_t), t, text)
        # L = || v - v_theta(z_t, t, tau(y)) ||^2
        return denoising_loss(self.schedule, "v", network, z_0, t, eps)

    # --- pixels and latents -------------------------------------------------------------------------------

    def encode(self, images: np.ndarray):
        """Images (B, H, W, C) in [-1, 1] -> z_0 (B, H/4, W/4, latent) of variance about 1."""
        images = clean_images(images, self.config.shape)
        if len(images) == 0:
            raise ValueError("images must be at least one")
        return self.scale.data * self.autoencoder.encode(images.astype(np.float32))

    def decode(self, z_0):
        """z_0 (B, H/4, W/4, latent) -> images (B, H, W, C) in [-1, 1]."""
        return self.autoencoder.decode(z_0 / self.scale.data)

    # --- sampling -----------------------------------------------------------------------------------------

    def predict(self, z_t, t, cond: tuple):
        """v_theta for arrays z_t (B, h, w, C), t (B,) and the states of captions, on all cores, or the GPU."""
        def network(z_t, t, tokens, pooled, mask):
            z_t, tokens, pooled = (as_input(self.unet, Tensor(a)) for a in (z_t, tokens, pooled))
            return self.unet(z_t, t, TextStates(tokens, pooled, mask))
        return map_batch(network, z_t, t, *cond, device=self.device)

    def denoiser(self, scale: float = 2.0) -> ClassifierFree:
        """(z_t, t, states) -> z0_hat with classifier-free guidance, unclipped, since latents have no bounds."""
        return ClassifierFree(NetworkDenoiser(self.schedule, "v", self.predict), scale, self.clip.text_states([""]))

    def trajectory(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, sampler: str = "dpm++2m",
                   seed: int = 0, streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from z_T to z_0, decoded: its x_t are images.  Each decoding costs about as much as a step."""
        streams = self.streams_for(captions, seed, streams)
        z_T, path = self.noise(streams, self._latent_shape), times(self.schedule, steps)
        yield State(0, int(path[0]), self.decode(z_T), None)
        for state in self._states(captions, z_T, path, scale, sampler, streams):
            yield replace(state, x_t=self.decode(state.x_t), x0_hat=None)

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, sampler: str = "dpm++2m",
               seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption, sample i from its own stream (seed, i).

        scale: of guidance; 0 ignores the caption, 1 follows it.  sampler: a name in samplers.SAMPLERS.
        """
        streams = self.streams_for(captions, seed, streams)
        z_T = self.noise(streams, self._latent_shape)
        return self._drawn(captions, z_T, times(self.schedule, steps), scale, sampler, streams)

    def vary(self, images: np.ndarray, captions: Sequence[str], *, strength: float = 0.6, scale: float = 2.0,
             steps: int = 20, seed: int = 0, sampler: str = "dpm++2m",
             streams: SampleStreams | None = None) -> np.ndarray:
        """Image to image: pictures like `images` (B, H, W, C) that fit the captions (SDEdit).

        strength: the share of the steps that is made; 0 gives the image as the autoencoder returns it, 1 a new one.
        """
        streams, z_0 = self.streams_for(captions, seed, streams), self.encode(images)
        _check_count(images, captions)
        path = editing.shortened(times(self.schedule, steps), strength)
        if not path:
            return to_numpy(self.decode(z_0))
        z_t = q_sample(self.schedule, z_0, path[0], self.noise(streams, self._latent_shape))
        return self._drawn(captions, z_t, path, scale, sampler, streams)

    def inpaint(self, images: np.ndarray, mask: np.ndarray, captions: Sequence[str], *, repeats: int = 1,
                scale: float = 2.0, steps: int = 50, seed: int = 0,
                streams: SampleStreams | None = None) -> np.ndarray:
        """The images (B, H, W, C) where mask (booleans of that shape) is True; what the captions ask for elsewhere.

        A position of the code counts as known where all of its 4 x 4 pixels and those of its neighbours are known.
        Hidden pixels are black for the encoder, which sees beyond one position.  repeats: as in editing.inpaint.
        """
        streams, images = self.streams_for(captions, seed, streams), clean_images(images, self.config.shape)
        _check_count(images, captions)
        if mask.shape != images.shape or mask.dtype != bool:
            raise ValueError(f"mask must be booleans of images' shape {images.shape}, not {mask.dtype} {mask.shape}")
        B, H, W, C = images.shape
        z_0 = self.encode(np.where(mask, images, -1))
        known = mask.reshape(B, H // 4, 4, W // 4, 4, C).all(axis=(2, 4, 5))        # (B, h, w)
        known = binary_erosion(known, np.ones((1, 3, 3)), border_value=1)[..., None]        # (B, h, w, 1)
        z_T = self.noise(streams, self._latent_shape)
        drawn = last(editing.inpaint(self.denoiser(scale), z_T, times(self.schedule, steps), z_0,
                                     xp_of(z_0).asarray(known), self.clip.text_states(captions), streams=streams,
                                     repeats=repeats))
        return np.where(mask, images, to_numpy(check_finite(self.decode(drawn))))

    def _states(self, captions, z_t, path, scale: float, sampler: str, streams) -> Iterator[State]:
        """From z_t at path[0] down to z_0."""
        return SAMPLERS[sampler](self.denoiser(scale), z_t, path, self.clip.text_states(captions), streams=streams)

    def _drawn(self, captions, z_t, path, scale: float, sampler: str, streams) -> np.ndarray:
        """The images that `_states` ends at."""
        return to_numpy(check_finite(self.decode(last(self._states(captions, z_t, path, scale, sampler, streams)))))

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        H, W, _ = self.config.shape
        return H // 4, W // 4, self.config.autoencoder.latent


def _check_count(images: np.ndarray, captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise ValueError(f"images must be one for each of the {len(captions)} captions, not {len(images)}")
