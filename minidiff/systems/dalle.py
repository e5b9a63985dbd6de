"""DALL-E: words and pictures as one stream of tokens (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation",
arXiv 2102.12092).

    ln p(x, y) >= E_{z ~ q_phi(z|x)} [ ln p_theta(x|z) - beta KL(q_phi(y, z|x) || p_psi(y, z)) ]            (eq. 1)

with a picture x, its caption y, and z, the picture's tokens: a 7 x 7 grid, each one of K codes.  (A bound it is where
beta is 1, as here, and z is drawn from q; what is trained is the relaxed form, and then its likeliest codes.  Given z
the picture does not depend on y.)

Stage one, the visual codebook: a discrete VAE (section 2.1).  p_psi is held uniform, and the draw from q relaxed,
so that gradients pass through it:

    z = softmax((l(x) + g) / tau),   g ~ Gumbel(0, 1),   tau falling from 1 to 1/16       nn/gumbel.py
    f(x | mu, b) = 1/(2 b x (1 - x)) exp(-|logit(x) - mu| / b)      the logit-Laplace density                (eq. 2)
    x <- (1 - 2 eps) x + eps,   eps = 0.1                           of grey levels 0..1, off the ends        (eq. 3)

Stage two, the prior: z = argmax l(x) now, without noise, and one decoder-only transformer learns the stream
y_1 ... y_L z_1 ... z_49 from left to right (section 2.2):

    L = 1/8 CE(text) + 7/8 CE(image),   each the mean over the tokens of its kind in the batch

Drawing: the caption is read, the 49 tokens are drawn one after another (keys and values kept, nn/transformer.py), and
the decoder shows them.  Of `rerank` candidates CLIP keeps the one that it finds nearest to the caption (section 2.6).

Scaled down: photographs of 256 x 256 to digits of 28 x 28; 32 x 32 tokens of 8192 codes to 7 x 7 of 64; 256 text
tokens to 20; 12 billion parameters in 64 layers to 0.5 million in 4.  Left out: the row, column and convolutional
attention masks (with 49 tokens every layer looks at all), BPE dropout, and the engineering of 16-bit precision on
many machines.  Otherwise: b of eq. 2 is a constant, for MNIST's background is so even that a learned b falls to 0
there, and the likelihood has no bound.  Not in the paper: top_k, and `scale`, classifier-free guidance of the logits
(Gafni et al. 2022, "Make-A-Scene", arXiv 2203.13131), for which every tenth caption is dropped in training.  By default
it draws one guided candidate at temperature 0.9, and not, as the paper, the best of 512 at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from minidiff import pictures
from minidiff.data.digits import CaptionedDigits
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.autoencoder import AutoencoderConfig, Decoder, Encoder
from minidiff.nn.decoding import check_choices, next_tokens
from minidiff.nn.gumbel import gumbel, gumbel_softmax, kl_to_uniform
from minidiff.nn.layers import Embedding, LayerNorm, Linear, parameter
from minidiff.nn.module import Module
from minidiff.nn.transformer import KVCache, TransformerBlock
from minidiff.systems.system import Stage, System, as_read, caption_tokenizer, check_finite, streams_for
from minidiff.text.tokenizer import PAD, Tokenizer

SIDE, PLACES = 7, 49                                        # of the grid of image tokens
PIXELS = 28 * 28
EPS = 0.1                                                   # of eq. 3
PROMPTS = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four")


@dataclass(frozen=True)
class DALLEConfig:
    autoencoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(widths=(16, 32)))
    codes: int = 64                         # K
    beta: float = 1.0                       # of the KL in stage one (the paper's 6.6 is for photographs)
    b: float = 0.25                         # of the logit-Laplace density
    vocab: int = 400                        # text ids that the embedding has rows for
    length: int = 20                        # L, text tokens, BOS and EOS included
    width: int = 96                         # channels D of the transformer, a multiple of heads
    layers: int = 4
    heads: int = 4

    def __post_init__(self):
        if min(self.codes, self.vocab, self.length) < 2 or min(self.width, self.layers, self.heads) < 1:
            raise ValueError("DALLEConfig: codes, vocab and length must be at least 2, width, layers and heads 1")
        if not (self.b > 0 and self.beta >= 0):
            raise ValueError(f"DALLEConfig: b must be above 0 and beta at least 0, not {self.b} and {self.beta}")


# --- stage one: the visual codebook -----------------------------------------------------------------------

class DiscreteVAE(Module):
    """Images in [-1, 1] (B, 28, 28, 1) to logits of codes (B, 7, 7, K), and weights of codes back to images."""

    def __init__(self, config: DALLEConfig, rng: np.random.Generator):
        self.b, quarter = config.b, config.autoencoder.widths[1]
        self.encoder = Encoder(config.autoencoder, config.codes, rng)                # q_phi
        self.codebook = Linear(config.codes, quarter, rng)                           # a one-hot row picks a code
        self.decoder = Decoder(config.autoencoder, quarter, rng)                     # p_theta

    def decode(self, z: Tensor) -> Tensor:
        """Weights of codes (B, 7, 7, K), one-hot or relaxed -> mu of eq. 2 (B, 28, 28, 1)."""
        return self.decoder(self.codebook(z))

    def loss(self, x, g, tau, beta) -> Tensor:
        """Minus the bound of eq. 1 in nats a pixel, up to a constant, with the relaxed draw at temperature tau.

        x (B, 28, 28, 1) in [-1, 1]; g (B, 7, 7, K) Gumbel noise; tau, beta (B,), of which beta has one value.
        """
        logits = self.encoder(Tensor(x))                                            # (B, 7, 7, K)
        z = gumbel_softmax(logits, g, tau[:, None, None, None])
        # -ln f = |logit(x) - mu| / b + what no parameter changes
        misfit = ops.sum(ops.absolute(self.decode(z) - logit(squeeze(x)))) * (1 / self.b)
        kl = ops.sum(kl_to_uniform(logits)) * float(beta[0])
        return (misfit + kl) / (len(x) * PIXELS)

    def tokens(self, x) -> np.ndarray:
        """z = argmax l(x): images (B, 28, 28, 1) -> (B, 49) int, row by row."""
        def one(part: slice):
            with no_grad():
                return self.encoder(Tensor(x[part])).data.argmax(axis=3).reshape(-1, PLACES)
        return np.concatenate(list(parallel_map(one, shards(len(x)))))

    def images(self, z) -> np.ndarray:
        """Tokens (B, 49) -> the images (B, 28, 28, 1) in [-1, 1] that the decoder finds likeliest, by the mode mu."""
        def one(part: slice):
            one_hot = np.eye(self.codebook.w.shape[0], dtype=self.codebook.w.dtype)[z[part]]
            with no_grad():
                return unsqueeze(self.decode(Tensor(one_hot.reshape(-1, SIDE, SIDE, one_hot.shape[-1]))).data)
        return np.concatenate(list(parallel_map(one, shards(len(z)))))


def squeeze(x):
    """[-1, 1] to [eps, 1 - eps], by eq. 3."""
    return (1 - 2 * EPS) * (x + 1) / 2 + EPS


def unsqueeze(mu):
    """The image in [-1, 1] whose logit is mu, the other way."""
    return (((1 / (1 + np.exp(-mu)) - EPS) / (1 - 2 * EPS)).clip(0, 1) * 2 - 1).astype(mu.dtype)


def logit(x):
    return np.log(x / (1 - x)).astype(x.dtype)


def log_density(x, mu, b: float):
    """ln f(x | mu, b) of eq. 2, x in (0, 1)."""
    # f = 1/(2 b x (1 - x)) exp(-|logit(x) - mu| / b)
    return -np.abs(logit(x) - mu) / b - np.log(2 * b * x * (1 - x))


def cosine_ramp(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, as share goes from 0 to 1 and beyond."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


# --- stage two: the prior over text and image tokens ------------------------------------------------------

class Prior(Module):
    """p_psi(y, z): the next token's logits after each token of the stream y_1 ... y_L z_1 ... z_49."""

    def __init__(self, config: DALLEConfig, rng: np.random.Generator):
        self.config, D, L, std = config, config.width, config.length, 0.5
        self.text, self.image = Embedding(config.vocab, D, rng, std=std), Embedding(config.codes, D, rng, std=std)
        self.padding = parameter((L, D), std, rng)          # each place of the text has a padding of its own
        self.place = parameter((L, D), std, rng)
        self.row, self.column = parameter((SIDE, D), std, rng), parameter((SIDE, D), std, rng)
        self.blocks = [TransformerBlock(D, config.heads, rng, causal=True) for _ in range(config.layers)]
        self.norm = LayerNorm(D)
        self.to_text, self.to_image = Linear(D, config.vocab, rng, zero=True), Linear(D, config.codes, rng, zero=True)

    def forward(self, ids, z) -> tuple[Tensor, Tensor]:
        """ids (B, L), z (B, M), M of 0..48 -> logits of y_2 ... y_L (B, L-1, V) and of z_1 ... z_M+1 (B, M+1, K)."""
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
        return (1 / 8) * _cross_entropy(text, ids[:, 1:], weight[:, 1:]) \
            + (7 / 8) * _cross_entropy(image, z, np.full(z.shape, 1 / PLACES))

    # the same one token at a time, with what was computed kept in caches

    def start(self, ids) -> tuple[np.ndarray, list[KVCache]]:
        """Reads captions (B, L): the logits of z_1 (B, K), and the caches to go on with."""
        caches = [KVCache(self.config.length + PLACES) for _ in self.blocks]
        return self._next(self._embed_text(ids), caches), caches

    def step(self, z_n, n: int, caches: list[KVCache]) -> np.ndarray:
        """The token of place n of 0..47, (B,), to the logits of the next, (B, K)."""
        return self._next(self._embed_image(z_n[:, None], n), caches)

    def _next(self, h: Tensor, caches: list[KVCache]) -> np.ndarray:
        for block, cache in zip(self.blocks, caches, strict=True):
            h = block.step(h, cache)
        return self.to_image(self.norm(h[:, -1])).data

    def _embed_text(self, ids) -> Tensor:
        return ops.where((ids != PAD)[:, :, None], self.text(ids), self.padding) + self.place       # (B, L, D)

    def _embed_image(self, z, first: int) -> Tensor:
        """Tokens z (B, M) of the places first, first + 1, ... -> (B, M, D)."""
        at = np.arange(first, first + z.shape[1])
        return self.image(z) + ops.embedding(self.row, at // SIDE) + ops.embedding(self.column, at % SIDE)


def _cross_entropy(logits: Tensor, labels, weight) -> Tensor:
    """sum weight (-log softmax(logits)[label]) / B: logits (B, N, V), labels and weight (B, N)."""
    B, N, V = logits.shape
    log_p = ops.log_softmax(logits).reshape(B * N, V)[np.arange(B * N), labels.reshape(-1)]
    return -ops.sum(log_p * weight.reshape(-1).astype(logits.dtype)) / B


# --- the system -------------------------------------------------------------------------------------------

class DALLE(System):
    name, Config = "dalle", DALLEConfig

    def __init__(self, config: DALLEConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.vocab:
            raise ValueError(f"config: vocab ({config.vocab}) must be at least the tokenizer's {tokenizer.vocab_size}")
        super().__init__(config, tokenizer, rng)
        self.vae, self.prior = DiscreteVAE(config, rng), Prior(config, rng)

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config: DALLEConfig, rng: np.random.Generator) -> Tokenizer:
        return caption_tokenizer(data, config.vocab, rng)

    def ids(self, captions: Sequence[str]) -> np.ndarray:
        """Captions as text tokens (B, L)."""
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.length)[0]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        config = self.config
        shown = data.x_0[:12]

        def pictures_batch(rng: np.random.Generator, B: int, share: float) -> tuple:
            x = data.x_0[rng.integers(0, len(data.x_0), B)]
            tau = cosine_ramp(1, 1 / 16, share / 0.75)      # the last quarter of the steps stays at 1/16
            beta = cosine_ramp(0, config.beta, share / 0.1)
            return x, gumbel(rng, (B, SIDE, SIDE, config.codes)), np.full(B, tau), np.full(B, beta)

        def reconstructions():
            return pictures.sheet(np.concatenate([shown, self.vae.images(self.vae.tokens(shown))]), columns=len(shown))

        yield Stage("dvae", self.vae, pictures_batch, self.vae.loss, steps=1200, lr=3e-3, draw=reconstructions,
                    paced=True)

        # stage two: the picture's tokens, once and for all
        z = self.vae.tokens(data.x_0)                                                # (N, 49)

        def streams_batch(rng: np.random.Generator, B: int) -> tuple:
            chosen = rng.integers(0, len(z), B)
            ids = self.ids(["" if rng.random() < 0.1 else data.caption(int(i), rng) for i in chosen])
            predicted = ids != PAD
            predicted[:, 0] = False                         # BOS is given
            return ids, predicted * (B / predicted.sum()), z[chosen]

        yield Stage("prior", self.prior, streams_batch, self.prior.loss, steps=3000, size=32,
                    draw=lambda: pictures.sheet(self.sample(PROMPTS), PROMPTS))

    # --- sampling -----------------------------------------------------------------------------------------

    def draw_tokens(self, captions: Sequence[str], u: np.ndarray, *, scale: float = 1.0, temperature: float = 1.0,
                    top_k: int = 0) -> np.ndarray:
        """Image tokens (B, 49), drawn one after another by the numbers u (B, 49), uniform on [0, 1).

        scale: l = l_uncond + scale (l_cond - l_uncond), so that 1 is the model itself.
        """
        check_choices(temperature, top_k)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, not {scale!r}")
        ids, guided = self.ids(captions), scale != 1
        null = self.ids([""])

        def one(part: slice) -> np.ndarray:
            B = part.stop - part.start
            both = np.concatenate([ids[part], null.repeat(B, axis=0)]) if guided else ids[part]
            z = np.empty((B, PLACES), np.int64)
            with no_grad(), np.errstate(over="ignore"):     # of a scale too large, which `check_finite` says
                logits, caches = self.prior.start(both)                             # (B, K), guided (2 B, K)
                for n in range(PLACES):
                    if n:
                        last = np.concatenate([z[:, n - 1]] * (1 + guided))
                        logits = self.prior.step(last, n - 1, caches)
                    # l = l_uncond + scale (l_cond - l_uncond)
                    l_n = logits[B:] + np.float32(scale) * (logits[:B] - logits[B:]) if guided else logits
                    z[:, n] = next_tokens(check_finite(l_n), u[part, n], temperature, top_k)
            return z
        return np.concatenate(list(parallel_map(one, shards(len(ids)))))

    def sample(self, captions: Sequence[str], *, scale: float = 3.0, temperature: float = 0.9, top_k: int = 0,
               rerank: int = 1, seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption.

        scale: of the guidance, 1 for none.  temperature, top_k (0: all codes): of each token's draw, as nn/decoding.py
        says.  rerank: how many candidates are drawn for each caption, the first of them as with rerank=1; CLIP keeps
        the one nearest to the caption.  The paper's way is scale=1, temperature=1, rerank=512.

        An image depends on its own stream and caption; the batch around it moves its logits by rounding, 1e-6 of them,
        which changes a token where its u falls that near to a step of the CDF.
        """
        streams = streams_for(captions, seed, streams)
        if isinstance(rerank, bool) or not isinstance(rerank, int) or not 1 <= rerank <= 512:
            raise ValueError(f"rerank must be a whole number from 1 to 512, not {rerank!r}")
        u = streams.uniform((rerank, PLACES)).reshape(-1, PLACES)                    # (B rerank, 49)
        repeated = [caption for caption in captions for _ in range(rerank)]
        z = self.draw_tokens(repeated, u, scale=scale, temperature=temperature, top_k=top_k)
        images = check_finite(self.vae.images(z))
        return images if rerank == 1 else best_by_clip(images, captions, rerank)


def best_by_clip(images: np.ndarray, captions: Sequence[str], rerank: int) -> np.ndarray:
    """Of each caption's `rerank` candidates, (B rerank, 28, 28, 1), the one whose cosine with it is largest."""
    from minidiff.systems.clip import CLIP
    clip = CLIP.load()
    text = clip.embed_captions(list(captions))                                       # (B, D), rows of length 1
    candidates = clip.embed_images(images).reshape(len(captions), rerank, -1)        # (B, rerank, D)
    best = np.einsum("brd,bd->br", candidates, text).argmax(axis=1)
    return images[np.arange(len(captions)) * rerank + best]
