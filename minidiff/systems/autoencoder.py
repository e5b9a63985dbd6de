"""Autoencoders: what a picture is, without the detail that nobody sees, on a 7 x 7 grid.

    encoder    E(x) --> (B, 7, 7, .),    decoder    x_hat = D(z)                       28 x 28 pixels there and back

    KL (Kingma & Welling 2014)                                  q(z|x) = N(mu, sigma^2),  (mu, log sigma^2) = E(x)
        z = mu + sigma eps,  eps ~ N(0, I)                                                        (sec. 2.4)
        L = || x - x_hat ||^2  +  w KL(q(z|x) || N(0, I))                                         (eq. 10), w = 2 s^2
    VQ (van den Oord et al. 2017)                               z = E(x),  k = argmin_j || z - e_j ||
        L = || x - D(e_k) ||^2  +  || sg[z] - e_k ||^2  +  beta || z - sg[e_k] ||^2               (eq. 3)

and with both, as in latent diffusion (Rombach et al. 2022, sec. 3.1 and appendix G; after Esser et al. 2021):

        + perceptual d(x, x_hat)                    distance of feature maps, LPIPS: nn/image_classifier.py
        + adversary (L_G + L_D)                     a patch discriminator, off by default: nn/adversary.py

All terms are means, over pixels, or over positions and their channels. Of the KL loss w = 2 s^2: divided by 2 s^2 it is
the bound on -log p(x) of a decoder N(x_hat, s^2), so that the small w of the papers says how finely the picture is to
be kept.

Scaled down and left out: 28 x 28 in place of 256 x 256; no attention in encoder and decoder; LPIPS' weights are not
learned, and its network is the digit classifier of minidiff/weights, which also judges the results, and so is kinder to
them than a stranger would be (docs/latent.md asks one); the reconstruction is squared, not absolute, error;
the adversary plays from the first step at a fixed weight (the papers begin later, and weigh it by a ratio of gradients,
Esser et al. eq. 7), and simultaneously; the codebook learns by its loss, not by moving averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from minidiff import pictures
from minidiff.data.digits import CaptionedDigits
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.adversary import PatchDiscriminator, discriminator_loss, generator_loss
from minidiff.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from minidiff.nn.digit_classifier import shipped
from minidiff.nn.image_classifier import ImageClassifier, perceptual_distance
from minidiff.nn.kl import kl
from minidiff.nn.quantise import Codebook, usage
from minidiff.systems.system import Stage, System


@dataclass(frozen=True)
class Reconstruction:
    """What `measure` finds."""

    mse: float                              # mean (x - x_hat)^2, pixels in [-1, 1]
    psnr: float                             # dB: 10 log10(2^2 / mse)
    accuracy: float                         # the share of reconstructions that the judge reads as the right digit
    bits: float                             # that the code of a picture costs
    perplexity: float = math.nan            # of the codebook
    alive: float = math.nan                 # the share of its codes that are used


class Autoencoder(System):
    """What both have in common.  Its z is what a decoder takes, (B, 7, 7, C)."""

    out: ClassVar[int]                                      # numbers that the encoder gives for each of z

    def __init__(self, config, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.encoder = Encoder(config.network, self.out * config.latent, rng)
        self.decoder = Decoder(config.network, config.latent, rng)
        self.discriminator = PatchDiscriminator(config.network.channels, 32, rng) if config.adversary else None

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 1) in [-1, 1] -> z (B, H/4, W/4, C), without noise."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decode(self, z: np.ndarray) -> np.ndarray:
        """z (B, H/4, W/4, C) -> images (B, H, W, 1) in [-1, 1]."""
        return np.clip(_mapped(self.decoder, z), -1, 1)

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        return self.decode(self.encode(x))

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """What the code of images costs: bits (of Reconstruction), and of a codebook how it is used."""
        raise NotImplementedError(f"{type(self).__name__} has no rate")

    def measure(self, x: np.ndarray, digits: np.ndarray) -> Reconstruction:
        """How well images (N, 28, 28, 1) with these digits (N,) come back, and at what rate."""
        x_hat = self.reconstruct(x)
        mse = float(np.mean((x - x_hat) ** 2, dtype=np.float64))
        _, read = shipped().read(x_hat)
        # PSNR = 10 log10(peak^2 / mse),  peak = 1 - -1
        return Reconstruction(mse, 10 * math.log10(4 / max(mse, 1e-12)), float((read == digits).mean()), **self.rate(x))

    def image_loss(self, x: np.ndarray, x_hat: Tensor, judge: ImageClassifier | None) -> Tensor:
        """The terms that compare images, (): squared error, what looks alike, what looks real."""
        c, d = self.config, x_hat - x
        loss = ops.mean(d * d)
        if c.perceptual:
            loss = loss + c.perceptual * perceptual_distance(judge, x, x_hat)
        if c.adversary:
            loss = loss + c.adversary * generator_loss(self.discriminator, x_hat) \
                + discriminator_loss(self.discriminator, x, x_hat)
        return loss

    def _stage(self, data: CaptionedDigits, batch: Callable, loss: Callable, paced: bool = False) -> Stage:
        shown = data.x_0[:16]

        def draw():
            return pictures.sheet(np.stack([shown, self.reconstruct(shown)], axis=1).reshape(-1, *shown.shape[1:]),
                                  columns=8, title="images, each beside its reconstruction")
        return Stage("autoencoder", self, batch, loss, steps=self.config.steps, size=32, draw=draw,
                     paced=paced)

    def _judge(self) -> ImageClassifier | None:
        return shipped() if self.config.perceptual else None


# --- a Gaussian for each place ----------------------------------------------------------------------------

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

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of q(z|x): images (B, H, W, 1) -> (B, H/4, W/4, C) twice."""
        mean, log_var = np.split(_mapped(self.encoder, x), 2, axis=-1)
        return mean, np.exp(log_var.clip(*LOG_VAR) / 2)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The posterior's mean."""
        return self.posterior(x)[0]

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """KL(q(z|x) || N(0, I)) in bits, the mean over images."""
        mean, std = self.posterior(x)
        nats = rate(Tensor(mean), Tensor(2 * np.log(std))).data.sum(dtype=np.float64)
        return {"bits": float(nats) / len(x) / math.log(2)}

    def loss(self, x: np.ndarray, eps: np.ndarray, judge: ImageClassifier | None = None) -> Tensor:
        """L of images x (B, H, W, 1) with noise eps (B, H/4, W/4, C), ()."""
        moments, C = self.encoder(Tensor(x)), self.config.latent                    # (B, H/4, W/4, 2 C)
        mean, log_var = moments[..., :C], ops.clip(moments[..., C:], *LOG_VAR)
        # z = mu + sigma eps
        x_hat = self.decoder(mean + ops.exp(log_var / 2) * eps)                     # (B, H, W, 1)
        # L = || x - x_hat ||^2 + w KL(q(z|x) || N(0, I)),  both divided by the number of pixels
        return self.image_loss(x, x_hat, judge) + self.config.kl * ops.sum(rate(mean, log_var)) / x.size

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        judge, (H, W) = self._judge(), data.x_0.shape[1:3]

        def batch(rng, B):
            eps = rng.standard_normal((B, H // 4, W // 4, self.config.latent), dtype=np.float32)
            return data.x_0[rng.integers(0, len(data.x_0), B)], eps
        yield self._stage(data, batch, lambda x, eps: self.loss(x, eps, judge))


LOG_VAR = (-30.0, 20.0)                                     # of q(z|x), lest its exponential overflow


def rate(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats, elementwise."""
    zero = np.zeros((), mean.dtype)
    return kl(mean, log_var, zero, zero)


# --- one of K codes for each place ------------------------------------------------------------------------

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
    """Each place is one of K codes: a picture is 49 whole numbers."""

    name, Config, out = "autoencoder-vq", VQAutoencoderConfig, 1

    def __init__(self, config: VQAutoencoderConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.codebook = Codebook(config.codes, config.latent, rng)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 1) -> ids (B, H/4, W/4), of 0..K-1."""
        return self.codebook.nearest(_mapped(self.encoder, x))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The nearest codes themselves."""
        return self.codebook.look_up(self.codes(x))

    def rate(self, x: np.ndarray) -> dict[str, float]:
        """log2 K for each place."""
        ids, K = self.codes(x), self.config.codes
        perplexity, alive = usage(ids, K)
        return {"bits": ids[0].size * math.log2(K), "perplexity": perplexity, "alive": alive}

    def loss(self, x: np.ndarray, judge: ImageClassifier | None = None) -> Tensor:
        """L of images x (B, H, W, 1), ()."""
        q = self.codebook(self.encoder(Tensor(x)))
        # L = || x - D(e_k) ||^2  +  || sg[z] - e_k ||^2  +  beta || z - sg[e_k] ||^2
        return self.image_loss(x, self.decoder(q.z_q), judge) + q.codebook + self.config.beta * q.commitment

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        judge = self._judge()

        def batch(rng, B, made):
            # now and then, before a step, codes that these images do not choose are put where vectors are: from this
            # step's own random numbers, so that a resumed run does the same; late codes would be lost in the average
            if made < 0.7 and rng.random() < REVIVE:
                z = _mapped(self.encoder, data.x_0[rng.integers(0, len(data.x_0), 4 * B)])
                self.codebook.revive(z.reshape(-1, self.config.latent), rng)
            return (data.x_0[rng.integers(0, len(data.x_0), B)],)
        yield self._stage(data, batch, lambda x: self.loss(x, judge), paced=True)


REVIVE = 0.05                                               # how often, of all steps


# --- what both share --------------------------------------------------------------------------------------

def _mapped(module, x: np.ndarray) -> np.ndarray:
    """A frozen module's answer for arrays (N, ...), on all cores."""
    def one(part: slice) -> np.ndarray:
        with no_grad():
            return module(Tensor(x[part])).data
    return np.concatenate(list(parallel_map(one, shards(len(x)))))


def _check_weights(config) -> None:
    if min(config.perceptual, config.adversary, getattr(config, "kl", 0)) < 0:
        raise ValueError("kl, perceptual and adversary are weights, of at least 0")
    if min(config.latent, config.steps) < 1:
        raise ValueError(f"latent and steps must be at least 1, not {config.latent} and {config.steps}")
