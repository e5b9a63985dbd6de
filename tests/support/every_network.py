"""Every network of floors II and IV, small: how to make it, and a loss of it on fixed inputs, in float32 at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.adversary import PatchDiscriminator, discriminator_loss, generator_loss
from minidiff.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from minidiff.nn.classifier import NOT_ASKED, NoisyClassifier
from minidiff.nn.gumbel import gumbel, gumbel_softmax, kl_to_uniform
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig, perceptual_distance
from minidiff.nn.image_tower import ImageTower, ImageTowerConfig
from minidiff.nn.kl import kl
from minidiff.nn.layers import Linear
from minidiff.nn.mmdit import MMDiT, MMDiTConfig
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.prior import AutoregressivePrior, DiffusionPrior, PriorConfig
from minidiff.nn.quantise import Codebook
from minidiff.nn.unet import UNet, UNetConfig
from minidiff.text.clip import TextTower, clip_loss, first_log_scale
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.t5 import AttentionPooling, EncoderDecoder

TEXT = TextEncoderConfig(vocab=9, length=4, width=8, layers=1, heads=2)
UNET = UNetConfig(channels=2, patch=2, widths=(4, 8), heads=2, groups=2, embedding=8)
AE = AutoencoderConfig(channels=2, widths=(4, 8), groups=2)
IDS, MASK = np.array([[1, 3, 4, 2], [1, 5, 2, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
TARGETS = np.array([[8, 3, 7], [8, 4, 0]])
WEIGHT = np.array([[1, 1, 1], [1, 1, 0]], np.float32) * np.float32(2 / 5)
T, LABELS = np.array([3, 40]), np.array([2, 0])
PRIOR = PriorConfig(width=8, layers=1, heads=2)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


X, Y = normal(2, 8, 4, 2), normal(2, 8, 4, 2, seed=2)


def squared(y: Tensor) -> Tensor:
    y = as_float32(y)
    return ops.mean(y * y)


class Several(Module):
    """Networks with one common loss."""

    def __init__(self, *parts: Module):
        self.parts = list(parts)


class Contrast(Module):
    def __init__(self, rng):
        self.text = TextTower(TEXT, 6, rng)
        self.image = ImageTower(ImageTowerConfig(shape=(8, 4, 2), widths=(4, 8), groups=2, last=2), 6, rng)
        self.log_scale = first_log_scale()


@dataclass(frozen=True)
class Network:
    make: Callable[[np.random.Generator], Module]
    loss: Callable[[Module], Tensor]                        # (), of a module in any precision, on any device

    def new(self) -> Module:
        """Every parameter is changed from its first value, so that no branch is zero."""
        rng = np.random.default_rng(0)
        made = self.make(rng)
        for p in made.parameters().values():
            p.data = np.asarray(p.data + 0.1 * rng.standard_normal(p.shape), np.float32)
        return made


def unet_loss(m: Several) -> Tensor:
    unet, text = m.parts
    return squared(unet(as_input(unet, X), T, text(IDS, MASK)))


def transformer_loss(m: Several) -> Tensor:
    network, text = m.parts
    return squared(network(as_input(network, X), np.array([0.3, 0.9]), text(IDS, MASK)))


def discrete_loss(m: Several) -> Tensor:
    """As in DALL-E's first stage: logits, the relaxed sample, its image."""
    encoder, codebook, decoder = m.parts
    logits = as_float32(encoder(as_input(encoder, X)))                              # (B, H/4, W/4, K)
    noise = as_input_array(gumbel(np.random.default_rng(3), logits.shape), encoder)
    x_hat = decoder(codebook(as_input(codebook, gumbel_softmax(logits, noise, 0.7))))
    return squared(x_hat) + ops.mean(kl_to_uniform(logits))


def quantised_loss(m: Several) -> Tensor:
    encoder, codebook, decoder = m.parts
    q = codebook(encoder(as_input(encoder, X)))
    return squared(decoder(q.z_q)) + q.codebook + 0.25 * q.commitment


def gaussian_loss(m: Several) -> Tensor:
    encoder, decoder = m.parts
    moments = encoder(as_input(encoder, X))
    mean, log_variance = moments[..., :2], moments[..., 2:]
    zero = as_input(encoder, np.zeros(1, np.float32))
    return squared(decoder(mean)) + ops.mean(kl(mean, log_variance, zero, zero))


def adversarial_loss(m: Several) -> Tensor:
    decoder, D = m.parts
    x_hat = as_float32(decoder(as_input(decoder, normal(2, 2, 1, 3))))
    return discriminator_loss(D, X, x_hat) + generator_loss(D, x_hat)


def classifier_loss(m: ImageClassifier) -> Tensor:
    x = as_input(m, X)
    return ops.cross_entropy(as_float32(m(x)), LABELS) + perceptual_distance(m, Y, x)


def diffusion_prior_loss(m: DiffusionPrior) -> Tensor:
    return squared(m(*prior_inputs(m), T, *prior_inputs(m), as_input(m, normal(2, 4, 8)), MASK))


def prior_inputs(m: Module) -> list[Tensor]:
    return [as_input(m, normal(2, 6))]


def codes_loss(m: AutoregressivePrior) -> Tensor:
    logits = m(np.array([[1, 0], [2, 1]]), np.array([0, 3]), *prior_inputs(m), as_input(m, normal(2, 4, 8)), MASK)
    return -ops.mean(ops.log_softmax(as_float32(logits)))


def as_input_array(a: np.ndarray, m: Module):
    return as_float32(as_input(m, a)).data


def contrast_loss(m: Contrast) -> Tensor:
    return clip_loss(m.image(as_input(m, X)), m.text(IDS, MASK), m.log_scale)


NETWORKS: dict[str, Network] = {
    "UNet with captions": Network(
        lambda rng: Several(UNet(UNetConfig(**{**vars(UNET), "text": 8}), rng), TextEncoder(TEXT, rng)), unet_loss),
    "MM-DiT with captions": Network(
        lambda rng: Several(MMDiT(MMDiTConfig(2, 2, 8, 2, 2, 8), rng), TextEncoder(TEXT, rng)), transformer_loss),
    "noisy classifier": Network(
        lambda rng: NoisyClassifier(UNET, (3, 2), rng),
        lambda m: -ops.mean(m.log_prob(as_input(m, X), T, np.array([[2, 1], [0, NOT_ASKED]])))),
    "image classifier": Network(
        lambda rng: ImageClassifier(ImageClassifierConfig((8, 4, 2), 3, (4, 8), 2, 6), rng), classifier_loss),
    "CLIP": Network(Contrast, contrast_loss),
    "T5": Network(lambda rng: EncoderDecoder(TextEncoder(TEXT, rng), 1, 3, 2, rng),
                  lambda m: m.loss(IDS, MASK, TARGETS, WEIGHT)),
    "attention pooling": Network(lambda rng: AttentionPooling(8, 2, rng),
                                 lambda m: squared(m(as_input(m, normal(2, 4, 8)), MASK)[:, :3])),
    "discrete autoencoder": Network(
        lambda rng: Several(Encoder(AE, 5, rng), Linear(5, 3, rng), Decoder(AE, 3, rng)), discrete_loss),
    "vector-quantised autoencoder": Network(
        lambda rng: Several(Encoder(AE, 3, rng), Codebook(4, 3, rng), Decoder(AE, 3, rng)), quantised_loss),
    "KL autoencoder": Network(lambda rng: Several(Encoder(AE, 4, rng), Decoder(AE, 2, rng)), gaussian_loss),
    "adversary": Network(lambda rng: Several(Decoder(AE, 3, rng), PatchDiscriminator(2, 4, rng)), adversarial_loss),
    "diffusion prior": Network(partial(DiffusionPrior, PRIOR, 6, 8, 4), diffusion_prior_loss),
    "autoregressive prior": Network(
        lambda rng: AutoregressivePrior(PRIOR, 6, 8, 4, codes=3, values=5, dots=3, rng=rng), codes_loss),
}
