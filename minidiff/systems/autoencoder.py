"""Autoencoders: an image as a code on a grid of a quarter of its size, without detail that cannot be seen.

    encoder    E(x) --> (B, H/4, W/4, .),    decoder    x_hat = D(z)                   28 x 28 pixels, a 7 x 7 grid

    KL (Kingma & Welling 2014)                                  q(z|x) = N(mu, sigma^2),  (mu, log sigma^2) = E(x)
        z = mu + sigma eps,  eps ~ N(0, I)                                                        section 2.4
        L = || x - x_hat ||^2  +  w KL(q(z|x) || N(0, I))                                         eq. 10, w = 2 s^2
    VQ (van den Oord et al. 2017)                               z = E(x),  k = argmin_j || z - e_j ||
        L = || x - D(e_k) ||^2  +  || sg[z] - e_k ||^2  +  beta || z - sg[e_k] ||^2               eq. 3

and with both, as in latent diffusion (Rombach et al. 2022, section 3.1 and appendix G; after Esser et al. 2021):

        + perceptual d(x, x_hat)                    distance of feature maps, LPIPS: nn/image_classifier.py
        + adversary (L_G + L_D)                     a patch discriminator, off by default: nn/adversary.py

All terms are means, over pixels, or over positions and their channels.  The KL loss with w = 2 s^2, divided by 2 s^2,
is the bound on -log p(x) of a decoder N(x_hat, s^2).  So the small w of the papers says how precisely the picture is
kept.

Scaled down and left out: 28 x 28 in place of 256 x 256; no attention in encoder and decoder; the weights of LPIPS are
not learned, and its network is the digit classifier, which also judges the results and therefore favours them
(docs/latent.md compares with another judge); the reconstruction error is squared, not absolute; the adversary is
trained simultaneously from the first step, at a fixed weight (the papers begin later, with a weight from a ratio of
gradients, Esser et al. 2021, eq. 7); the codebook learns by its loss, not by moving averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from minidiff import pictures
from minidiff.data.dataset import Dataset
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy, wide, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.tensor import Tensor
from minidiff.nn.adversary import PatchDiscriminator, discriminator_loss, generator_loss
from minidiff.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig, perceptual_distance
from minidiff.nn.images import clean_images
from minidiff.nn.kl import kl
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.quantise import Codebook, usage
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System
from minidiff.systems.training_batches import random_indices

PERCEPTUAL = "digit-classifier"                             # the system whose feature maps compare images


class Autoencoder(System):
    """What both have in common.  Its z is what the decoder takes, (B, H/4, W/4, C)."""

    example = "10_autoencoders.py"
    needs = (PERCEPTUAL,)
    out: ClassVar[int]                                      # numbers that the encoder gives for each channel of z

    def __init__(self, config, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.encoder = Encoder(config.network, self.out * config.latent, rng)
        self.decoder = Decoder(config.network, config.latent, rng)
        self.discriminator = PatchDiscriminator(config.network.channels, 32, rng) if config.adversary else None
        self._borrowed: dict[str, ImageClassifier] = {}     # for the perceptual distance; not saved with this system

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]):
        """The default; without the perceptual term where the digit classifier cannot read images.  ValueError."""
        check_shape(shape, 4)
        default = cls.Config()
        perceptual = default.perceptual if tuple(shape) == ImageClassifierConfig().shape else 0.0
        return replace(default, network=replace(default.network, channels=shape[2]), perceptual=perceptual)

    def take(self, needed) -> None:
        if self.config.perceptual:
            self._borrowed[PERCEPTUAL] = needed[PERCEPTUAL].classifier

    def encode(self, x: np.ndarray):
        """Images (B, H, W, C) in [-1, 1] -> z (B, H/4, W/4, latent), without noise."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decode(self, z):
        """z (B, H/4, W/4, latent) -> images (B, H, W, C) in [-1, 1]."""
        return self._map(self.decoder, z).clip(-1, 1)

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        return to_numpy(self.decode(self.encode(x)))

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """What the code of an image costs: "bits", and for a codebook how it is used."""
        raise NotImplementedError(f"{type(self).__name__} has no rate")

    def image_loss(self, x, x_hat: Tensor) -> Tensor:
        """The terms that compare images x and x_hat (B, H, W, C), (): squared error, perceptual distance, adversary."""
        c, d = self.config, x_hat - x
        loss = ops.mean(d * d)
        if c.perceptual:
            loss = loss + c.perceptual * perceptual_distance(self.perceptual_network(), x, x_hat)
        if c.adversary:
            loss = loss + c.adversary * generator_loss(self.discriminator, x_hat) \
                + discriminator_loss(self.discriminator, x, x_hat)
        return loss

    def perceptual_network(self) -> ImageClassifier:
        """The frozen classifier whose feature maps compare images, in float32 on the system's device."""
        if PERCEPTUAL not in self._borrowed:
            raise ValueError(f"an autoencoder with a perceptual term needs the trained {PERCEPTUAL}: create it by "
                             f"{type(self).__name__}.new(..., needed=load_needed({type(self).__name__}))")
        return self._borrowed[PERCEPTUAL]

    def _stage(self, data: Dataset, batch: Callable[[Step], tuple], loss: Callable) -> Stage:
        if self.config.perceptual:
            self.perceptual_network().to(self.device)
        shown = data.images(np.arange(min(16, len(data))))

        def picture():
            both = np.stack([shown, self.reconstruct(shown)], axis=1).reshape(-1, *shown.shape[1:])
            return pictures.sheet(both, columns=8, title="images, each beside its reconstruction")
        return Stage("autoencoder", self, batch, loss, steps=self.config.steps, picture=picture)

    def _map(self, module, x):
        """A module's output for arrays (N, ...), without gradients, on all cores, or the GPU."""
        x = wide(to_device(x, self.device))
        return map_batch(lambda x: module(as_input(self, Tensor(x))), x, device=self.device)


# --- a Gaussian for each position ----------------------------------------------------------------------------

@dataclass(frozen=True)
class KLAutoencoderConfig:
    network: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(widths=(24, 48)))
    latent: int = 3                         # C of z
    kl: float = 0.02                        # w; the decoder's noise is s = sqrt(w/2)
    perceptual: float = 0.05
    adversary: float = 0.0
    steps: int = 1500

    def __post_init__(self):
        _check_weights(self)


class KLAutoencoder(Autoencoder):
    """A variational autoencoder with a small weight on its rate."""

    name, Config, out = "autoencoder-kl", KLAutoencoderConfig, 2

    def posterior(self, x: np.ndarray) -> tuple:
        """Mean and standard deviation of q(z|x): images (B, H, W, C) -> (B, H/4, W/4, latent) twice, on the device."""
        moments, C = self._map(self.encoder, clean_images(x)), self.config.latent
        return moments[..., :C], xp_of(moments).exp(moments[..., C:].clip(*LOG_VAR) / 2)

    def posterior_of(self, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of q(z|x) for all images of a data set, (N, H/4, W/4, latent) twice."""
        starts = range(0, max(len(data), 1), 1024)          # one even where there are no images, for their shape
        parts = [self.posterior(data.images(np.arange(i, min(i + 1024, len(data))))) for i in starts]
        mean, std = zip(*parts, strict=True)
        return np.concatenate([to_numpy(a) for a in mean]), np.concatenate([to_numpy(a) for a in std])

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The posterior's mean."""
        return self.posterior(x)[0]

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """KL(q(z|x) || N(0, I)) in bits, the mean over images; ValueError where there are none."""
        _check_some(x)
        mean, std = (to_numpy(a) for a in self.posterior(x))
        nats = rate(Tensor(mean), Tensor(2 * np.log(std))).data.sum(dtype=np.float64)
        return {"bits": float(nats) / len(x) / math.log(2)}

    def loss(self, x: np.ndarray, eps: np.ndarray) -> Tensor:
        """L of images x (B, H, W, C) with noise eps (B, H/4, W/4, latent), ()."""
        C = self.config.latent
        moments = as_float32(self.encoder(as_input(self.encoder, x)))               # (B, H/4, W/4, 2 latent)
        mean, log_var = moments[..., :C], ops.clip(moments[..., C:], *LOG_VAR)
        # z = mu + sigma eps
        z = mean + ops.exp(log_var / 2) * eps
        x_hat = as_float32(self.decoder(as_input(self.decoder, z)))                 # (B, H, W, C)
        # L = || x - x_hat ||^2 + w KL(q(z|x) || N(0, I)),  both divided by the number of pixels
        return self.image_loss(x, x_hat) + self.config.kl * ops.sum(rate(mean, log_var)) / x.size

    def stages(self, data: Dataset) -> Iterator[Stage]:
        H, W, _ = data.shape

        def batch(step: Step) -> tuple:
            x = step.images(data, step.choose(data))
            return x, step.normal((step.size, H // 4, W // 4, self.config.latent))
        yield self._stage(data, batch, KLAutoencoder.loss)


LOG_VAR = (-30.0, 20.0)                                     # bounds of log sigma^2: its exponential must not overflow


def rate(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats (docs/glossary.md), elementwise."""
    zero = xp_of(mean.data).zeros((), mean.dtype)
    return kl(mean, log_var, zero, zero)


# --- one of K codes for each position ------------------------------------------------------------------------

@dataclass(frozen=True)
class VQAutoencoderConfig:
    network: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(widths=(24, 48)))
    latent: int = 4                         # C of z
    codes: int = 256                        # K
    beta: float = 0.25                      # weight of the commitment
    perceptual: float = 0.05
    adversary: float = 0.0
    steps: int = 1200

    def __post_init__(self):
        _check_weights(self)
        if self.codes < 2 or self.beta < 0:
            raise ValueError(f"codes must be at least 2 and beta at least 0, not {self.codes} and {self.beta}")


class VQAutoencoder(Autoencoder):
    """Each position is one of K codes: a picture is 49 whole numbers."""

    name, Config, out = "autoencoder-vq", VQAutoencoderConfig, 1

    def __init__(self, config: VQAutoencoderConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.codebook = Codebook(config.codes, config.latent, rng)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Images (B, H, W, C) -> ids (B, H/4, W/4), of 0..K-1, on the host."""
        return to_numpy(self.codebook.nearest(self._map(self.encoder, clean_images(x))))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The nearest codes themselves."""
        return self.codebook.look_up(self.codes(x))

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """log2 K for each position, and how the codebook is used; ValueError where there are no images."""
        _check_some(x)
        ids, K = self.codes(x), self.config.codes
        perplexity, alive = usage(ids, K)
        return {"bits": ids[0].size * math.log2(K), "perplexity": perplexity, "alive": alive}

    def loss(self, x: np.ndarray) -> Tensor:
        """L of images x (B, H, W, C), ()."""
        q = self.codebook(as_float32(self.encoder(as_input(self.encoder, x))))
        # L = || x - D(e_k) ||^2  +  || sg[z] - e_k ||^2  +  beta || z - sg[e_k] ||^2
        x_hat = as_float32(self.decoder(as_input(self.decoder, q.z_q)))             # (B, H, W, C)
        return self.image_loss(x, x_hat) + q.codebook + self.config.beta * q.commitment

    def stages(self, data: Dataset) -> Iterator[Stage]:
        def batch(step: Step) -> tuple:
            # Before some steps, codes that these images do not use are moved to outputs of the encoder; late in
            # training, the average of the weights would not follow.
            if step.progress < 0.7 and step.rng.random() < REVIVE:
                z = self._map(self.encoder, data.images(random_indices(data, step.rng, 4 * step.size)))
                self.codebook.revive(z.reshape(-1, self.config.latent), step.rng)
            return (step.images(data, step.choose(data)),)
        yield self._stage(data, batch, VQAutoencoder.loss)


REVIVE = 0.05                                               # the share of the steps that revive codes


# --- what both share --------------------------------------------------------------------------------------

def _check_some(x: np.ndarray) -> None:
    if not len(x):
        raise ValueError("x must hold at least one image: a rate is a mean over images")


def _check_weights(config) -> None:
    if min(config.perceptual, config.adversary, getattr(config, "kl", 0)) < 0:
        raise ValueError("kl, perceptual and adversary are weights, of at least 0")
    if min(config.latent, config.steps) < 1:
        raise ValueError(f"latent and steps must be at least 1, not {config.latent} and {config.steps}")
