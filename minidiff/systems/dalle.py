"""DALL-E: words and pictures as one sequence of tokens (Ramesh et al. 2021, arXiv 2102.12092).

    ln p(x, y) >= E_{z ~ q_phi(z|x)} [ ln p_theta(x|z) - beta KL(q_phi(y, z|x) || p_psi(y, z)) ]            eq. 1

with a picture x, its caption y, and z, the picture's tokens: a 7 x 7 grid, each one of K codes.  (It is a bound where
beta is 1, as here, and z is drawn from q.  Training uses a relaxed draw, and stage two the likeliest codes.  Given z
the picture does not depend on y.)

Stage one, the visual codebook: a discrete VAE (section 2.1).  p_psi is uniform, and the draw from q is relaxed, so that
gradients pass through it:

    z = softmax((l(x) + g) / tau),   g ~ Gumbel(0, 1),   tau falling from 1 to 1/16       nn/gumbel.py
    f(x | mu, b) = 1/(2 b x (1 - x)) exp(-|logit(x) - mu| / b)      the logit-Laplace density                eq. 2
    x <- (1 - 2 eps) x + eps,   eps = 0.1                           of grey levels 0..1, away from 0 and 1   eq. 3

Stage two, the prior: z = argmax l(x), without noise, and one decoder-only transformer learns the sequence
y_1 ... y_L z_1 ... z_49 from left to right (section 2.2):

    L = 1/8 CE(text) + 7/8 CE(image),   each the mean over the tokens of its kind in the batch

Sampling: the transformer reads the caption, the 49 tokens are drawn one after another (keys and values are kept,
nn/transformer.py), and the decoder draws them.  Of `rerank` candidates CLIP keeps the one nearest to the caption
(section 2.6).

Scaled down: photographs of 256 x 256 to digits of 28 x 28; 32 x 32 tokens of 8192 codes to 7 x 7 of 64; 256 text
tokens to 20; 12 billion parameters in 64 layers to 0.5 million in 4.  Left out: the row, column and convolutional
attention masks (with 49 tokens every layer attends to all), BPE dropout, and 16-bit training on many machines.
Different: b of eq. 2 is a constant, because on MNIST's even background a learned b falls to 0 and the likelihood has no
bound.  Not in the paper: top_k, and `scale`, classifier-free guidance of the logits (Gafni et al. 2022,
arXiv 2203.13131), for which every tenth caption is dropped in training.  By default sampling draws one candidate at
temperature 0.9, of digits with guidance, where the paper draws 512 at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff import pictures, systems
from minidiff.checks import finite, whole
from minidiff.data.dataset import Dataset
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.nn.activations import check_activations
from minidiff.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from minidiff.nn.decoding import check_choices, check_logits, next_tokens
from minidiff.nn.gumbel import gumbel, gumbel_softmax, kl_to_uniform
from minidiff.nn.image_tower import check_two_halvings
from minidiff.nn.images import clean_images
from minidiff.nn.layers import Embedding, LayerNorm, Linear, parameter
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.transformer import KVCache, TransformerBlock
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, as_read, caption_tokenizer, check_finite
from minidiff.systems.training_batches import random_captions
from minidiff.text.tokenizer import PAD, Tokenizer

EPS = 0.1                                                   # of eq. 3
DROP_CAPTION = 0.1                                          # of the prior's examples, for guidance


@dataclass(frozen=True)
class DALLEConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    autoencoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(widths=(16, 32)))
    codes: int = 64                         # K
    beta: float = 1.0                       # of the KL in stage one (the paper's 6.6 is for photographs)
    b: float = 0.25                         # of the logit-Laplace density
    vocab: int = 400                        # text ids that the embedding has rows for
    length: int = 20                        # L, text tokens, BOS and EOS included
    width: int = 96                         # channels D of the transformer, a multiple of heads
    layers: int = 4
    heads: int = 4
    scale: float = 3.0                      # of guidance in sampling, where no other is asked for

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self.shape[0] // 4, self.shape[1] // 4

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return self.grid[0] * self.grid[1]

    def __post_init__(self):
        check_shape(self.shape, 4)
        check_two_halvings("DALLEConfig", self.shape, self.autoencoder.widths)
        check_activations("DALLEConfig", [(self.layers, self.length + self.tokens, self.width, self.heads)])
        if self.autoencoder.channels != self.shape[2]:
            raise ValueError(f"autoencoder.channels ({self.autoencoder.channels}) must be the channels of shape "
                             f"{self.shape}")
        if min(self.codes, self.vocab, self.length) < 2 or min(self.width, self.layers, self.heads) < 1:
            raise ValueError("DALLEConfig: codes, vocab and length must be at least 2, width, layers and heads 1")
        if not (self.b > 0 and self.beta >= 0):
            raise ValueError(f"DALLEConfig: b must be above 0 and beta at least 0, not {self.b} and {self.beta}")
        finite("DALLEConfig: scale", self.scale)


# --- stage one: the visual codebook -----------------------------------------------------------------------

class DiscreteVAE(Module):
    """Images in [-1, 1] (B, H, W, C) to logits of codes (B, H/4, W/4, K), and weights of codes back to images."""

    def __init__(self, config: DALLEConfig, rng: np.random.Generator):
        self.b, self.grid, quarter = config.b, config.grid, config.autoencoder.widths[1]
        self.encoder = Encoder(config.autoencoder, config.codes, rng)                # q_phi
        self.codebook = Linear(config.codes, quarter, rng)                           # a one-hot row selects a code
        self.decoder = Decoder(config.autoencoder, quarter, rng)                     # p_theta

    def decode(self, z: Tensor) -> Tensor:
        """Weights of codes (B, H/4, W/4, K), one-hot or relaxed -> mu of eq. 2 (B, H, W, C)."""
        return self.decoder(self.codebook(z))

    def loss(self, x, g, tau, beta) -> Tensor:
        """Minus the bound of eq. 1 in nats a pixel (docs/glossary.md), up to a constant, with the relaxed draw at tau.

        x (B, H, W, C) in [-1, 1]; g (B, H/4, W/4, K) Gumbel noise; tau, beta (B,), where beta has one value.
        """
        logits = as_float32(self.encoder(as_input(self.encoder, x)))                # (B, H/4, W/4, K)
        z = gumbel_softmax(logits, g, tau[:, None, None, None])
        mu = as_float32(self.decode(as_input(self.codebook, z)))                    # (B, H, W, C)
        # -ln f = |logit(x) - mu| / b + what no parameter changes
        misfit = ops.sum(ops.absolute(mu - logit(squeeze(x)))) * (1 / self.b)
        kl = ops.sum(kl_to_uniform(logits)) * float(beta[0])
        return (misfit + kl) / x.size

    def tokens(self, x, device: str = "cpu") -> np.ndarray:
        """z = argmax l(x): images (B, H, W, C) -> (B, tokens) int on the host, row by row."""
        x = to_device(clean_images(x), device)
        logits = map_batch(lambda x: self.encoder(as_input(self.encoder, x)), x, device=device)
        check_logits(logits)
        return to_numpy(logits.argmax(axis=3)).reshape(len(x), -1)

    def images(self, z, device: str = "cpu"):
        """Tokens (B, tokens) -> the likeliest images (B, H, W, C) in [-1, 1], by the mode mu."""
        def one(z):
            one_hot = np.eye(self.codebook.w.shape[0], dtype=self.codebook.w.dtype)[z]
            one_hot = to_device(one_hot.reshape(-1, *self.grid, one_hot.shape[-1]), device)
            return unsqueeze(as_float32(self.decode(Tensor(one_hot))).data)
        return map_batch(one, z, device=device)


def squeeze(x):
    """[-1, 1] to [eps, 1 - eps], by eq. 3."""
    return (1 - 2 * EPS) * (x + 1) / 2 + EPS


def unsqueeze(mu):
    """The image in [-1, 1] whose logit is mu: the inverse of logit(squeeze(x))."""
    return (((1 / (1 + xp_of(mu).exp(-mu)) - EPS) / (1 - 2 * EPS)).clip(0, 1) * 2 - 1).astype(mu.dtype)


def logit(x):
    return xp_of(x).log(x / (1 - x)).astype(x.dtype)


def log_density(x, mu, b: float):
    """ln f(x | mu, b) of eq. 2, x in (0, 1)."""
    # f = 1/(2 b x (1 - x)) exp(-|logit(x) - mu| / b)
    return -np.abs(logit(x) - mu) / b - np.log(2 * b * x * (1 - x))


def cosine_ramp(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, as share goes from 0 to 1; end beyond it."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


# --- stage two: the prior over text and image tokens ------------------------------------------------------

class Prior(Module):
    """p_psi(y, z): the next token's logits after each token of the sequence y_1 ... y_L z_1 ... z_49."""

    def __init__(self, config: DALLEConfig, rng: np.random.Generator):
        self.config, D, L, std = config, config.width, config.length, 0.5
        self.text, self.image = Embedding(config.vocab, D, rng, std=std), Embedding(config.codes, D, rng, std=std)
        self.padding = parameter((L, D), std, rng)          # each position of the text has its own padding token
        self.place = parameter((L, D), std, rng)
        self.row, self.column = (parameter((side, D), std, rng) for side in config.grid)
        self.blocks = [TransformerBlock(D, config.heads, rng, causal=True) for _ in range(config.layers)]
        self.norm = LayerNorm(D)
        self.to_text, self.to_image = Linear(D, config.vocab, rng, zero=True), Linear(D, config.codes, rng, zero=True)

    def forward(self, ids, z) -> tuple[Tensor, Tensor]:
        """ids (B, L), z (B, M), M below 49 -> logits of y_2 ... y_L (B, L-1, V) and of z_1 ... z_M+1 (B, M+1, K)."""
        L = self.config.length
        h = ops.concat([self._embed_text(ids), self._embed_image(z, 0)], axis=1)    # (B, L + M, D)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.to_text(h[:, :L - 1]), self.to_image(h[:, L - 1:])

    def loss(self, ids, weight, z) -> Tensor:
        """1/8 CE(text) + 7/8 CE(image), in nats a token.

        ids (B, L); weight (B, L): of each text token in CE(text), 0 for padding, adding up to B; z (B, 49).
        """
        text, image = self(ids, z[:, :-1])
        text, image = as_float32(text), as_float32(image)
        B, image_weight = len(z), np.full(z.shape, 1 / z.shape[1])
        return ((1 / 8) * ops.cross_entropy(text, ids[:, 1:], weight[:, 1:])
                + (7 / 8) * ops.cross_entropy(image, z, image_weight)) / B

    # the same, one token at a time; caches keep the keys and values that were computed

    def start(self, ids) -> tuple[np.ndarray, list[KVCache]]:
        """Reads captions (B, L): the logits of z_1 (B, K), and the caches for `step`."""
        caches = [KVCache(self.config.length + self.config.tokens) for _ in self.blocks]
        return self._next(self._embed_text(ids), caches), caches

    def step(self, z_n, n: int, caches: list[KVCache]) -> np.ndarray:
        """The token of position n, (B,), to the logits of the next, (B, K)."""
        return self._next(self._embed_image(z_n[:, None], n), caches)

    def _next(self, h: Tensor, caches: list[KVCache]) -> np.ndarray:
        for block, cache in zip(self.blocks, caches, strict=True):
            h = block.step(h, cache)
        return as_float32(self.to_image(self.norm(h[:, -1]))).data

    def _embed_text(self, ids) -> Tensor:
        real = xp_of(self.place.data).asarray(ids != PAD)[:, :, None]               # (B, L, 1)
        return ops.where(real, self.text(ids), self.padding) + self.place           # (B, L, D)

    def _embed_image(self, z, first: int) -> Tensor:
        """Tokens z (B, M) of the positions first, first + 1, ... -> (B, M, D)."""
        at, columns = np.arange(first, first + z.shape[1]), self.config.grid[1]
        return self.image(z) + ops.embedding(self.row, at // columns) + ops.embedding(self.column, at % columns)


# --- the system -------------------------------------------------------------------------------------------

class DALLE(System):
    """A discrete VAE, and a transformer over the tokens of captions and images."""

    name, Config, example = "dalle", DALLEConfig, "07_dalle.py"
    no_trajectory = "it draws its image tokens one after another, and no noised images"
    when_none = {"scale": "the configuration's"}

    def __init__(self, config: DALLEConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.vocab:
            raise ValueError(f"config: vocab ({config.vocab}) must be at least the tokenizer's {tokenizer.vocab_size}")
        super().__init__(config, tokenizer, rng)
        self.vae, self.prior = DiscreteVAE(config, rng), Prior(config, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> DALLEConfig:
        default, C = DALLEConfig(), shape[2]
        # A prior that knows its pictures by heart is certain of each token.  The difference of two such logits is noise
        # where both are far below the largest, and a large scale makes that noise decide.
        scale = default.scale if C == 1 else 1.0
        return replace(default, shape=shape, autoencoder=replace(default.autoencoder, channels=C), scale=scale)

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: DALLEConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return caption_tokenizer(data, config.vocab, rng)

    def ids(self, captions: Sequence[str]) -> np.ndarray:
        """Captions as text tokens (B, L)."""
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.length)[0]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        config = self.config
        shown = data.images(np.arange(min(12, len(data))))

        def pictures_batch(step: Step) -> tuple:
            x = step.images(data, step.choose(data))
            tau = cosine_ramp(1, 1 / 16, step.progress / 0.75)                       # 1/16 in the last quarter
            beta = cosine_ramp(0, config.beta, step.progress / 0.1)
            g = gumbel(step.rng, (step.size, *config.grid, config.codes))
            return x, g, np.full(step.size, tau, np.float32), np.full(step.size, beta)

        def reconstructions():
            x_hat = to_numpy(self.vae.images(self.vae.tokens(shown, self.device), self.device))
            return pictures.sheet(np.concatenate([shown, x_hat]), columns=len(shown))
        yield Stage("dvae", self.vae, pictures_batch, DiscreteVAE.loss, steps=1200, batch_size=64, lr=3e-3,
                    picture=reconstructions)

        # stage two: the pictures' tokens, computed once
        z = np.concatenate([self.vae.tokens(data.images(np.arange(i, min(i + 1024, len(data)))), self.device)
                            for i in range(0, len(data), 1024)])                     # (N, tokens)

        def sequences_batch(step: Step) -> tuple:
            chosen = step.choose(data)
            ids = self.ids(random_captions(data, chosen, step.rng, DROP_CAPTION))
            predicted = ids != PAD
            predicted[:, 0] = False                         # BOS is given
            return ids, predicted * (step.size / predicted.sum()), z[chosen]
        prompts = list(data.prompts[:6])
        yield Stage("prior", self.prior, sequences_batch, Prior.loss, steps=3000,
                    picture=lambda: pictures.sheet(self.sample(prompts), [p or "(no caption)" for p in prompts]))

    # --- sampling -----------------------------------------------------------------------------------------

    def draw_tokens(self, captions: Sequence[str], u: np.ndarray, *, scale: float = 1.0, temperature: float = 1.0,
                    top_k: int = 0) -> np.ndarray:
        """Image tokens (B, tokens), drawn one after another by the numbers u (B, tokens), uniform on [0, 1).

        scale: l = l_uncond + scale (l_cond - l_uncond), so that 1 is the model itself.
        """
        check_choices(temperature, top_k)
        finite("scale", scale)
        ids, guided = self.ids(captions), scale != 1
        null = self.ids([""])

        def one(ids, u) -> np.ndarray:
            B = len(ids)
            both = np.concatenate([ids, null.repeat(B, axis=0)]) if guided else ids
            z = np.empty(u.shape, np.int64)
            with np.errstate(over="ignore"):                # of a scale that is too large, which `next_tokens` reports
                logits, caches = self.prior.start(both)                             # (B, K), guided (2 B, K)
                for n in range(u.shape[1]):
                    if n:
                        before = np.concatenate([z[:, n - 1]] * (1 + guided))
                        logits = self.prior.step(before, n - 1, caches)
                    # l = l_uncond + scale (l_cond - l_uncond)
                    l_n = logits[B:] + np.float32(scale) * (logits[:B] - logits[B:]) if guided else logits
                    z[:, n] = next_tokens(to_numpy(l_n), u[:, n], temperature, top_k)
            return z
        return map_batch(one, ids, u, device=self.device)

    def sample(self, captions: Sequence[str], *, scale: float | None = None, temperature: float = 0.9, top_k: int = 0,
               rerank: int = 1, seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption.

        scale: of the guidance, 1 for none; by default the configuration's.  temperature, top_k (0: all codes): of each
        token's draw, as nn/decoding.py describes.  rerank: how many candidates are drawn for each caption, the first of
        them as with rerank=1; CLIP keeps the one nearest to the caption.  The paper's way is scale=1, temperature=1,
        rerank=512.

        An image depends on its own stream and caption.  The batch around it changes its logits by rounding, 1e-6 of
        their size, which changes a token only where its u is that close to a step of the CDF.
        """
        streams = self.streams_for(captions, seed, streams)
        rerank = whole("rerank", rerank, 1, 512)
        tokens = self.config.tokens
        u = streams.uniform((rerank, tokens)).reshape(-1, tokens)                    # (B rerank, tokens)
        repeated = [caption for caption in captions for _ in range(rerank)]
        scale = self.config.scale if scale is None else scale
        z = self.draw_tokens(repeated, u, scale=scale, temperature=temperature, top_k=top_k)
        images = to_numpy(check_finite(self.vae.images(z, self.device)))
        return images if rerank == 1 else best_by_clip(images, captions, rerank)


def best_by_clip(images: np.ndarray, captions: Sequence[str], rerank: int) -> np.ndarray:
    """Of each caption's `rerank` candidates, (B rerank, H, W, C), the one with the largest cosine to the caption."""
    clip = systems.load_system("clip")
    text = clip.embed_captions(list(captions))                                       # (B, D), rows of length 1
    candidates = clip.embed_images(images).reshape(len(captions), rerank, -1)        # (B, rerank, D)
    best = np.einsum("brd,bd->br", candidates, text).argmax(axis=1)
    return images[np.arange(len(captions)) * rerank + best]
