"""DALL-E 2, or unCLIP (Ramesh et al. 2022, arXiv 2204.06125): a caption's picture by way of its CLIP embedding.

    p(x | y) = p(x, z_i | y) = p(x | z_i, y) p(z_i | y)     z_i is a function of x                  eq. 1

    prior      p(z_i | y): one caption fits many pictures, and so many embeddings.  Two of them     section 2.2
      diffusion       L_prior = E || f(z_i^(t), t, y) - z_i ||^2,  z_i^(t) ~ q_t(z_i)               eq. 2
                      two draws, of which the one with the larger z_i . z_t is kept
      autoregressive  z_i -> its principal components -> codes c_1 ... c_K;  p(c) = prod_k p(c_k | c_<k, y, z_i . z_t)
                      z_i . z_t is a token: known in training, drawn from its upper half in sampling
    decoder    p(x | z_i, y): a diffusion UNet that hears of z_i in its time embedding,             section 2.1
               and as four tokens beside the caption's;  L = E || v - v_theta(x_t, t, z_i, y) ||^2
    guidance   of decoder and priors alike: uncond + scale (cond - uncond), each having learned without its condition

    variations      decode (z_i, x_T) with eta > 0          x_T = inverse DDIM of the picture       section 3.1
    interpolations  decode slerp(z_i, z_i', theta)                                                  section 3.2
    text diffs      decode slerp(z_i, z_d, theta),  z_d = (z_t' - z_t) / ||z_t' - z_t||             section 3.3

CLIP is frozen, the one of systems/clip.py; z_i and z_t are its unit rows, and z enters a network as sqrt(D) z, with
entries of about 1.

Scaled down or left out: 28 x 28 pixels in one model, without the upsamplers to 256 and 1024; D = 64 for 1024, 32
components in 64 buckets for 319 in 1024; transformers of 3 layers and width 80 for 24 and 2048.  The text encoders
that the paper trains with the decoder and the priors are CLIP's frozen one here.  The decoder predicts v for eps, at
times that lean to the noisy (t = T u^(1/3)); the diffusion prior shares its sampler with it, DDIM, where the paper has
64 steps of analytic DPM.  The decoder learns from z_i of length 1, and the priors' are handed to it as they come: of
80 captions, .90 to 1.17 long by the code prior and .96 to 1.01 by the diffusion prior.  "No caption" is '' to all; to
the code prior, also a token "any dot product".

Why a prior: with z_t in place of z_i the decoder draws 65 % of the digits right, and few pictures well, for z_t is no
picture's embedding (z_i . z_t is .74 on average).  With the diffusion prior 99.9 % are right; the code prior is as
good at digits, and less so at words (examples/08_dalle2.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from minidiff import pictures
from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import q_sample, target
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.losses import stratified_uniform
from minidiff.diffusion.samplers import ddim, ddim_inverse, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.engine import ops
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.decoding import next_tokens
from minidiff.nn.embedding_codes import PCA, Buckets, Quantiles, slerp
from minidiff.nn.layers import Linear
from minidiff.nn.module import Module
from minidiff.nn.prior import AutoregressivePrior, DiffusionPrior, PriorConfig
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.clip import CLIP, CLIPConfig, mapped
from minidiff.systems.system import Stage, System, check_finite, streams_for
from minidiff.text.clip import unit
from minidiff.text.tokenizer import Tokenizer

PRIORS = ("diffusion", "autoregressive", "text", "none")    # "text": z_t in place of z_i; "none": no embedding
DROP_EMBEDDING, DROP_CAPTION = 0.1, 0.5                     # of the decoder's examples (section 2.1)
DROP_TEXT = 0.1                                             # of the priors' (section 2.2)


@dataclass(frozen=True)
class UnCLIPConfig:
    """Everything that makes one model; it travels in its file."""

    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times, of decoder and prior
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)             # of each of the two
    components: int = 32                    # K, principal components of z_i that the code prior predicts
    buckets: int = 64                       # values of a code
    dots: int = 16                          # values of the dot product's token
    tokens: int = 4                         # that z_i adds to the caption's
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(widths=(48, 96), embedding=128, text=64))

    def __post_init__(self):
        check_schedule(self.schedule)
        if self.unet.text != self.clip.width:
            raise ValueError(f"unet.text ({self.unet.text}) must be clip.width ({self.clip.width})")
        if self.dots < 2 or self.dots % 2 or self.tokens < 1:
            raise ValueError(f"dots must be even, so as to have an upper half, and tokens at least 1, "
                             f"not {self.dots} and {self.tokens}")


class Decoder(Module):
    """GLIDE's UNet, told of z_i (section 2.1): (x_t, t, z_i, the caption's states) -> v, of x_t's shape."""

    def __init__(self, config: UNetConfig, D: int, tokens: int, rng: np.random.Generator):
        self.unet = UNet(config, rng)
        self.to_time, self.to_tokens = Linear(D, config.embedding, rng), Linear(D, tokens * config.text, rng)

    def forward(self, x_t: Tensor, t, z_i, tokens, pooled, mask) -> Tensor:
        """z_i (B, D) unit rows, or 0 for no embedding; the states as `UnCLIP.hear` gives them: arrays."""
        B, _, W = tokens.shape
        z = Tensor(math.sqrt(z_i.shape[1]) * z_i)
        more = self.to_tokens(z).reshape(B, -1, W)                                  # (B, 4, W)
        mask = np.concatenate([mask, np.ones(more.shape[:2], bool)], axis=1)
        text = TextStates(ops.concat([Tensor(tokens), more], axis=1), Tensor(pooled), mask)
        return self.unet(x_t, t, text, self.to_time(z))


class UnCLIP(System):
    """CLIP, the decoder that undoes its image tower, and two priors that go from captions to embeddings."""

    name, Config = "dalle2", UnCLIPConfig
    needs = ("clip",)

    def __init__(self, config: UnCLIPConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        D, N = config.clip.width, config.clip.text.length
        self.D, self.schedule = D, schedule_from(config.schedule, config.T)
        self.clip = CLIP(config.clip, tokenizer, rng)
        self.decoder = Decoder(config.unet, D, config.tokens, rng)
        self.prior = DiffusionPrior(config.prior, D, D, N, rng)
        self.pca, self.buckets = PCA(D, config.components), Buckets(config.components, config.buckets)
        self.dots = Quantiles(config.dots)
        self.codes = AutoregressivePrior(config.prior, D, D, N, config.components, config.buckets, config.dots, rng)

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config: UnCLIPConfig, rng: np.random.Generator) -> Tokenizer:
        """That of the CLIP which comes with minidiff."""
        return CLIP.load().tokenizer

    def encode_text(self, captions: Sequence[str], longest: int | None = None) -> tuple[np.ndarray, ...]:
        """z_t (B, D), and CLIP's states of the captions: tokens (B, N, W), pooled (B, W), mask (B, N).

        N: `longest`, or without it as long as the longest of these captions is.
        """
        tokens, pooled, mask = self.clip.text_states(captions)
        longest = longest or int(mask.sum(axis=1).max())
        with no_grad():
            z_t = unit("captions", self.clip.text.project(Tensor(pooled))).data     # as clip.embed_captions does
        return z_t, tokens[:, :longest], pooled, mask[:, :longest]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        self.clip.load_state_dict(CLIP.load().state_dict())
        z_i, count, T = self.clip.embed_images(data.x_0), len(data.digits), self.schedule.T     # (N, D)

        def chosen(rng: np.random.Generator, B: int, drop: float) -> tuple[np.ndarray, list[str]]:
            """B images, and a caption of each, '' with probability `drop`."""
            i = rng.integers(0, count, B)
            return i, ["" if rng.random() < drop else data.caption(int(k), rng) for k in i]

        def decoder_batch(rng: np.random.Generator, B: int) -> tuple:
            i, captions = chosen(rng, B, DROP_CAPTION)
            kept = rng.random((B, 1), dtype=np.float32) >= DROP_EMBEDDING
            # t = T u^(1/3): which digit it will be is decided at the noisy times
            t = np.minimum((T * np.cbrt(stratified_uniform(rng, B))).astype(np.int64), T - 1)
            eps = rng.standard_normal((B, *data.x_0.shape[1:]), dtype=np.float32)
            return data.x_0[i], z_i[i] * kept, *self.encode_text(captions)[1:], t, eps

        def prior_batch(rng: np.random.Generator, B: int) -> tuple:
            i, captions = chosen(rng, B, DROP_TEXT)
            z_t, tokens, _, mask = self.encode_text(captions)
            eps = rng.standard_normal((B, self.D), dtype=np.float32)
            return z_i[i], z_t, tokens, mask, (T * stratified_uniform(rng, B)).astype(np.int64), eps

        def codes_batch(rng: np.random.Generator, B: int) -> tuple:
            i, captions = chosen(rng, B, DROP_TEXT)
            z_t, tokens, _, mask = self.encode_text(captions)
            dot = self.dots.quantise((z_i[i] * z_t).sum(axis=1))
            dot[[c == "" for c in captions]] = self.config.dots                     # any
            return self.encode(z_i[i]), dot, z_t, tokens, mask

        digits = [str(digit) for digit in range(10)]

        def drawn(prior: str):
            return pictures.sheet(self.sample(digits, steps=12, prior=prior), digits, columns=5)
        yield Stage("decoder", self.decoder, decoder_batch, self.decoder_loss, steps=2000, size=32, lr=2e-3,
                    draw=lambda: pictures.sheet(self.variations(data.x_0[:10], steps=12), columns=5))
        yield Stage("prior", self.prior, prior_batch, self.prior_loss, steps=1200, size=128, lr=2e-3, ema=0.995,
                    draw=lambda: drawn("diffusion"))

        # what the code prior's codes mean: z_i's principal axes and ranges, and how large z_i . z_t is in the data
        self.pca.fit(z_i)
        self.buckets.fit(self.pca.reduce(z_i))
        rng = np.random.default_rng(0)
        i = rng.permutation(count)[:5000]
        self.dots.fit((z_i[i] * self.clip.embed_captions([data.caption(int(k), rng) for k in i])).sum(axis=1))
        yield Stage("codes", self.codes, codes_batch, self.codes_loss, steps=2000, size=64, lr=2e-3, ema=0.995,
                    draw=lambda: drawn("autoregressive"))

    def decoder_loss(self, x_0, z_i, tokens, pooled, mask, t, eps) -> Tensor:
        """x_0, eps (B, H, W, 1); z_i (B, D), 0 where dropped; the captions' states; t (B,) -> ()."""
        # L = || v - v_theta(x_t, t, z_i, y) ||^2
        x_t, v = q_sample(self.schedule, x_0, t, eps), target(self.schedule, "v", x_0, eps, t)
        error = self.decoder(Tensor(x_t), t, z_i, tokens, pooled, mask) - v
        return ops.mean(error * error)

    def prior_loss(self, z_i, z_t, tokens, mask, t, eps) -> Tensor:
        """z_i, z_t, eps (B, D); the captions' states; t (B,) -> ()."""
        z_0 = self.scaled(z_i)
        # L_prior = || f(z_i^(t), t, y) - z_i ||^2                                                  eq. 2
        z_i_t = q_sample(self.schedule, z_0, t, eps)
        error = self.prior(Tensor(z_i_t), t, Tensor(self.scaled(z_t)), Tensor(tokens), mask) - z_0
        return ops.mean(error * error)

    def codes_loss(self, codes, dot, z_t, tokens, mask) -> Tensor:
        """codes (B, K), dot (B,), z_t (B, D), the captions' states -> (), nats a code."""
        # L = -1/K sum_k log p(c_k | c_<k, y)
        logits = self.codes(codes[:, :-1], dot, Tensor(self.scaled(z_t)), Tensor(tokens), mask)     # (B, K, values)
        return ops.cross_entropy(logits.reshape(codes.size, -1), codes.reshape(-1))

    def scaled(self, z: np.ndarray) -> np.ndarray:
        """sqrt(D) z: a unit row with entries of about 1."""
        return np.float32(math.sqrt(self.D)) * z

    def encode(self, z_i: np.ndarray) -> np.ndarray:
        """z_i (B, D) -> codes (B, K)."""
        return self.buckets.quantise(self.pca.reduce(z_i))

    # --- the prior: p(z_i | y) ----------------------------------------------------------------------------

    def prior_denoiser(self, scale: float, null: tuple):
        """(z_i^(t), t, (z_t, tokens, mask)) -> an estimate of sqrt(D) z_i, guided; `null` is the condition of ''."""
        def network(z_i_t, t, cond):
            def one(p: slice):
                z_t, tokens, mask = (a[p] for a in cond)
                return self.prior(Tensor(z_i_t[p]), t[p], Tensor(self.scaled(z_t)), Tensor(tokens), mask).data
            return mapped(one, len(z_i_t))
        return ClassifierFree(NetworkDenoiser(self.schedule, "x0", network), scale, null)

    def embed(self, captions: Sequence[str], *, prior: str = "diffusion", scale: float = 1.5, steps: int = 20,
              candidates: int = 2, temperature: float = 1.0, seed: int = 0, streams: SampleStreams | None = None):
        """Image embeddings (B, D) drawn from p(z_i | y), one for each caption.

        prior: one of PRIORS; "text" gives z_t itself, "none" zeros, which is no embedding to the decoder.
        scale: of the prior's guidance.  steps, candidates: of the diffusion prior.  temperature: of the code prior.
        """
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, not {prior!r}")
        if type(candidates) is not int or not 1 <= candidates <= 64:
            raise ValueError(f"candidates must be a whole number within 1 and 64, not {candidates!r}")
        if not math.isfinite(scale):
            raise ValueError(f"the prior's scale must be a finite number, such as 1.0, not {scale!r}")
        streams = streams_for(captions, seed, streams)
        z_t, tokens, _, mask = self.encode_text(captions)
        null = self.encode_text([""], tokens.shape[1])
        cond, null = (z_t, tokens, mask), (null[0], null[1], null[3])
        if prior == "text":
            return z_t
        if prior == "none":
            return np.zeros_like(z_t)
        if prior == "autoregressive":
            return self._embed_by_codes(cond, null, scale, temperature, streams)
        # `candidates` embeddings of each caption, from its own stream
        z_T = streams.normal((candidates, self.D)).reshape(-1, self.D)              # (B candidates, D)
        repeated = tuple(np.repeat(a, candidates, axis=0) for a in cond)
        z_0 = last(ddim(self.prior_denoiser(scale, null), z_T, times(self.schedule, steps), repeated))
        return best_of(z_0.reshape(-1, candidates, self.D) / np.float32(math.sqrt(self.D)), z_t)

    def _embed_by_codes(self, cond: tuple, null: tuple, scale: float, temperature: float, streams: SampleStreams):
        """(B, D): the codes one after another, then the embedding that they stand for."""
        B, half = len(cond[0]), self.config.dots // 2
        # "sample the dot product from the top half of the distribution"
        dot = half + (half * streams.uniform()).astype(np.int64)                    # (B,)
        no_dot, null = np.full(B, self.config.dots), tuple(np.repeat(a, B, axis=0) for a in null)
        codes = np.zeros((B, 0), np.int64)
        for u in streams.uniform((self.config.components,)).T:                      # (B,) for each code
            logits = self.code_logits(codes, dot, cond)                             # (B, values)
            if scale != 1:                                  # p(c | y)^scale p(c)^(1 - scale), up to a factor
                uncond = self.code_logits(codes, no_dot, null)
                logits = uncond + np.float32(scale) * (logits - uncond)
            codes = np.concatenate([codes, next_tokens(logits, u, temperature)[:, None]], axis=1)
        return self.pca.restore(self.buckets.dequantise(codes))

    def code_logits(self, codes, dot, cond: tuple) -> np.ndarray:
        """The logits of the next code, (B, values), after codes (B, k)."""
        def one(p: slice):
            z_t, tokens, mask = (a[p] for a in cond)
            return self.codes(codes[p], dot[p], Tensor(self.scaled(z_t)), Tensor(tokens), mask).data[:, -1]
        return mapped(one, len(codes))

    # --- the decoder: p(x | z_i, y) -----------------------------------------------------------------------

    def decoder_denoiser(self, scale: float, null: tuple) -> ClassifierFree:
        """(x_t, t, (z_i, tokens, pooled, mask)) -> x0_hat, guided; `null` is the condition of 0 and ''."""
        def network(x_t, t, cond):
            return mapped(lambda p: self.decoder(Tensor(x_t[p]), t[p], *(a[p] for a in cond)).data, len(x_t))
        return ClassifierFree(NetworkDenoiser(self.schedule, "v", network), scale, null, clip=static_threshold)

    def decode(self, z_i: np.ndarray, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20,
               eta: float = 0.0, seed: int = 0, streams: SampleStreams | None = None, x_T: np.ndarray | None = None):
        """Images (B, 28, 28, 1) in [-1, 1] of embeddings z_i (B, D), by DDIM with eta, from noise or from x_T."""
        streams = streams_for(captions, seed, streams)
        x_T = streams.normal((28, 28, 1)) if x_T is None else x_T
        denoiser, cond = self.conditioned(z_i, captions, scale)
        return check_finite(last(ddim(denoiser, x_T, times(self.schedule, steps), cond, eta=eta, streams=streams)))

    def conditioned(self, z_i, captions: Sequence[str], scale: float) -> tuple:
        """The decoder's denoiser and its condition."""
        if z_i.shape != (len(captions), self.D):
            raise ValueError(f"z_i must be one row of {self.D} for each of the {len(captions)} captions, "
                             f"not {z_i.shape}")
        cond = (z_i.astype(np.float32), *self.encode_text(captions)[1:])
        null = self.encode_text([""], cond[1].shape[1])
        return self.decoder_denoiser(scale, (np.zeros((1, self.D), np.float32), *null[1:])), cond

    # --- what can be done with it -------------------------------------------------------------------------

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, prior: str = "diffusion",
               prior_scale: float = 1.5, prior_steps: int = 20, candidates: int = 2, temperature: float = 1.0,
               seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption: z_i ~ p(z_i | y), then x ~ p(x | z_i, y).

        scale, steps: of the decoder.  The others: of the prior, as `embed` has them.
        """
        streams = streams_for(captions, seed, streams)
        z_i = self.embed(captions, prior=prior, scale=prior_scale, steps=prior_steps, candidates=candidates,
                         temperature=temperature, streams=streams)
        return self.decode(z_i, captions, scale=scale, steps=steps, streams=streams)

    def invert(self, images: np.ndarray, *, scale: float = 2.0, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
        """The bipartite latent of images (B, 28, 28, 1), section 3: z_i (B, D), and x_T, all that z_i does not say."""
        z_i = self.clip.embed_images(images)
        denoiser, cond = self.conditioned(z_i, [""] * len(images), scale)
        return z_i, last(ddim_inverse(denoiser, images.astype(np.float32), times(self.schedule, steps), cond))

    def variations(self, images: np.ndarray, *, eta: float = 1.0, scale: float = 2.0, steps: int = 40, seed: int = 0,
                   streams: SampleStreams | None = None) -> np.ndarray:
        """Other images of the same z_i, (B, 28, 28, 1); eta 0 gives the same images again (section 3.1)."""
        z_i, x_T = self.invert(images, scale=scale, steps=steps)
        return self.decode(z_i, [""] * len(images), eta=eta, scale=scale, steps=steps, seed=seed, streams=streams,
                           x_T=x_T)

    def interpolations(self, first: np.ndarray, second: np.ndarray, thetas: Sequence[float], *, scale: float = 2.0,
                       steps: int = 40) -> np.ndarray:
        """The way from one image (28, 28, 1) to another, an image for each theta: 0 the first, 1 the second."""
        z_i, x_T = self.invert(np.stack([first, second]), scale=scale, steps=steps)
        theta, n = np.asarray(thetas), len(thetas)
        z = slerp(*(np.repeat(z_i[k:k + 1], n, axis=0) for k in (0, 1)), theta)
        x = slerp(*(np.repeat(x_T[k].reshape(1, -1), n, axis=0) for k in (0, 1)), theta).reshape(n, *x_T.shape[1:])
        return self.decode(z, [""] * n, scale=scale, steps=steps, x_T=x)

    def text_diff(self, image: np.ndarray, before: str, after: str, thetas: Sequence[float], *, scale: float = 2.0,
                  steps: int = 40) -> np.ndarray:
        """An image (28, 28, 1) moved from what `before` says toward what `after` says, once for each theta."""
        z_i, x_T = self.invert(image[None], scale=scale, steps=steps)
        z_t, n = self.clip.embed_captions([before, after]), len(thetas)
        # z_d = (z_t' - z_t) / ||z_t' - z_t||
        z_d = (z_t[1] - z_t[0]) / np.linalg.norm(z_t[1] - z_t[0])
        z = slerp(np.repeat(z_i, n, axis=0), np.repeat(z_d[None], n, axis=0), np.asarray(thetas))
        return self.decode(z, [""] * n, scale=scale, steps=steps, x_T=np.repeat(x_T, n, axis=0))


def best_of(z_i: np.ndarray, z_t: np.ndarray) -> np.ndarray:
    """Of candidates z_i (B, n, D) the one with the largest dot product with z_t (B, D): (B, D)."""
    chosen = (z_i @ z_t[:, :, None])[..., 0].argmax(axis=1)
    return z_i[np.arange(len(z_i)), chosen]

