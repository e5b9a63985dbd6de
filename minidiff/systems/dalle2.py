"""DALL-E 2, or unCLIP (Ramesh et al. 2022, arXiv 2204.06125): from a caption to a picture through its CLIP embedding.

    p(x | y) = p(x, z_i | y) = p(x | z_i, y) p(z_i | y)     z_i is a function of x                  section 2

    prior      p(z_i | y): one caption fits many pictures, and so many embeddings.  Two of them     section 2.2
      diffusion       L_prior = E || f(z_i^(t), t, y) - z_i ||^2,  z_i^(t) ~ q_t(z_i)
                      two draws, of which the one with the larger z_i . z_t is kept
      autoregressive  z_i -> its principal components -> codes c_1 ... c_K;  p(c) = prod_k p(c_k | c_<k, y, z_i . z_t)
                      z_i . z_t is a token: known in training, drawn from its upper half in sampling
    decoder    p(x | z_i, y): a diffusion UNet.  z_i enters through the time embedding,             section 2.1
               and as four tokens beside the caption's;  L = E || v - v_theta(x_t, t, z_i, y) ||^2
    guidance   of decoder and priors alike: uncond + scale (cond - uncond), each trained with its condition dropped

    variations      decode (z_i, x_T) with eta > 0          x_T = inverse DDIM of the picture       section 3.1
    interpolations  decode slerp(z_i, z_i', theta)                                                  section 3.2
    text diffs      decode slerp(z_i, z_d, theta),  z_d = (z_t' - z_t) / ||z_t' - z_t||             section 3.3

CLIP is frozen (systems/clip.py).  z_i and z_t are its unit rows; a network reads z as sqrt(D) z, with entries of
about 1.

Scaled down or left out: 28 x 28 pixels in one model, without the upsamplers to 256 and 1024; D = 64 for 1024, 32
components in 64 buckets for 319 in 1024; transformers of 3 layers and width 80 for 24 and 2048.  The paper trains text
encoders with the decoder and the priors; here they are CLIP's frozen one.  The decoder predicts v instead of eps, at
times whose density is config.times.  The diffusion prior uses DDIM like the decoder, where the paper has 64 steps of
analytic DPM.  The decoder is trained with z_i of length 1, and the priors' z_i are not normalised: for 300 captions
their lengths were .88 to 1.12 (code prior) and .97 to 1.00 (diffusion prior).  Without a caption all networks read '';
the code prior then also reads the token "any dot product".

Why a prior: with z_t in place of z_i the decoder draws 74 % of the digits right, and few pictures well, because z_t
is not the embedding of any picture (z_i . z_t is .74 on average).  With the diffusion prior all of 300 are right, and
99 % with the code prior, which is less good at words, 93 % against 99 %, and has the better FID: its pictures vary
more (examples/08_dalle2.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff import pictures
from minidiff.checks import finite, one_of, whole
from minidiff.data.dataset import Dataset
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import State, ddim, ddim_inverse, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.decoding import next_tokens
from minidiff.nn.embedding_codes import PCA, Buckets, Quantiles, slerp
from minidiff.nn.images import clean_images
from minidiff.nn.layers import Linear
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.prior import AutoregressivePrior, DiffusionPrior, PriorConfig
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.clip import CLIP, CLIPConfig
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, finite_states
from minidiff.systems.training_batches import denoising_loss, random_captions
from minidiff.text.clip import unit
from minidiff.text.tokenizer import Tokenizer

PRIORS = ("diffusion", "autoregressive", "text", "none")    # "text": z_t in place of z_i; "none": no embedding
DROP_EMBEDDING, DROP_CAPTION = 0.1, 0.5                     # of the decoder's examples (section 2.1)
DROP_TEXT = 0.1                                             # of the priors' (section 2.2)


@dataclass(frozen=True)
class UnCLIPConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times, of decoder and prior
    times: str = "normal:mean=-1,std=2"     # how often the decoder draws each: NAME[:key=value,...] of DENSITIES
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)             # of each of the two
    components: int = 32                    # K, principal components of z_i that the code prior predicts
    buckets: int = 64                       # values of a code
    dots: int = 16                          # values of the dot product's token
    tokens: int = 4                         # that z_i adds to the caption's
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(widths=(48, 96), embedding=128, text=64))

    def __post_init__(self):
        check_schedule(self.schedule)
        parse_density(self.times)
        check_shape(self.shape, self.unet.multiple)
        self.unet.check_image(*self.shape[:2])
        if self.unet.text != self.clip.width or not self.unet.channels == (self.unet.out or self.unet.channels) \
                == self.shape[2]:
            raise ValueError(f"unet.text ({self.unet.text}) must be clip.width ({self.clip.width}), and unet.channels "
                             f"({self.unet.channels}) and unet.out ({self.unet.out}) the channels of shape "
                             f"{self.shape}")
        if self.dots < 2 or self.dots % 2 or self.tokens < 1:
            raise ValueError(f"dots must be even, so as to have an upper half, and tokens at least 1, "
                             f"not {self.dots} and {self.tokens}")


class ImageDecoder(Module):
    """GLIDE's UNet with z_i (section 2.1): (x_t, t, z_i, the caption's states) -> v, of x_t's shape."""

    def __init__(self, config: UNetConfig, D: int, tokens: int, rng: np.random.Generator):
        self.unet = UNet(config, rng)
        self.to_time, self.to_tokens = Linear(D, config.embedding, rng), Linear(D, tokens * config.text, rng)

    def forward(self, x_t: Tensor, t, z_i, tokens, pooled, mask) -> Tensor:
        """z_i (B, D) unit rows, or 0 for no embedding; the states as `UnCLIP.encode_text` gives them: arrays."""
        B, _, W = tokens.shape
        z = as_input(self, math.sqrt(z_i.shape[1]) * z_i)
        more = self.to_tokens(z).reshape(B, -1, W)                                  # (B, 4, W)
        xp = xp_of(more.data)
        mask = xp.concatenate([xp.asarray(mask), xp.ones(more.shape[:2], bool)], axis=1)
        states = TextStates(ops.concat([as_input(self, tokens), more], axis=1), as_input(self, pooled), mask)
        return self.unet(x_t, t, states, self.to_time(z))


class UnCLIP(System):
    """CLIP, the decoder that inverts its image tower, and two priors from captions to embeddings."""

    name, Config, example = "dalle2", UnCLIPConfig, "08_dalle2.py"
    needs = ("clip",)

    def __init__(self, config: UnCLIPConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        D, N = config.clip.width, config.clip.text.length
        self.D, self.schedule = D, schedule_from(config.schedule, config.T)
        self.times = density_from(config.times, self.schedule)
        self.clip = CLIP(config.clip, tokenizer, rng)
        self.decoder = ImageDecoder(config.unet, D, config.tokens, rng)
        self.prior = DiffusionPrior(config.prior, D, D, N, rng)
        self.pca, self.buckets = PCA(D, config.components), Buckets(config.components, config.buckets)
        self.dots = Quantiles(config.dots)
        self.codes = AutoregressivePrior(config.prior, D, D, N, config.components, config.buckets, config.dots, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> UnCLIPConfig:
        default = UnCLIPConfig()
        return replace(default, shape=shape, clip=CLIP.config_for(shape), unet=replace(default.unet, channels=shape[2]))

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: UnCLIPConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return needed["clip"].tokenizer

    def take(self, needed) -> None:
        self.clip.copy_from(needed["clip"])

    def encode_text(self, captions: Sequence[str], longest: int | None = None) -> tuple:
        """z_t (B, D), and CLIP's states of the captions: tokens (B, N, W), pooled (B, W), mask (B, N).

        N: `longest`, or without it the length of the longest of these captions.
        """
        tokens, pooled, mask = self.clip.text_states(captions)
        longest = longest or int(mask.sum(axis=1).max())
        with no_grad():
            z_t = unit("captions", as_float32(self.clip.text.project(Tensor(pooled)))).data     # as embed_captions does
        return z_t, tokens[:, :longest], pooled, mask[:, :longest]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        count, T = len(data), self.schedule.T
        z_i = np.concatenate([to_numpy(self.clip.embed_images(data.images(np.arange(i, min(i + 1024, count)))))
                              for i in range(0, count, 1024)])                      # (N, D)

        def decoder_batch(step: Step) -> tuple:
            i = step.choose(data)
            captions = random_captions(data, i, step.rng, DROP_CAPTION)
            kept = step.rng.random((step.size, 1), dtype=np.float32) >= DROP_EMBEDDING
            t = self.times.draw(step.rng, step.size)
            states = self.encode_text(captions)[1:]
            return step.images(data, i), z_i[i] * kept, *states, t, step.normal((step.size, *data.shape))

        def prior_batch(step: Step) -> tuple:
            i = step.choose(data)
            z_t, tokens, _, mask = self.encode_text(random_captions(data, i, step.rng, DROP_TEXT))
            t = training_times(step.rng, step.size, T, power=1)
            return z_i[i], z_t, tokens, mask, t, step.normal((step.size, self.D))

        def codes_batch(step: Step) -> tuple:
            i = step.choose(data)
            captions = random_captions(data, i, step.rng, DROP_TEXT)
            z_t, tokens, _, mask = self.encode_text(captions)
            dot = to_numpy(self.dots.quantise(to_device((z_i[i] * to_numpy(z_t)).sum(axis=1), self.device)))
            dot[[c == "" for c in captions]] = self.config.dots                     # any
            return to_numpy(self.encode(to_device(z_i[i], self.device))), dot, z_t, tokens, mask

        prompts, shown = list(data.prompts[:10]), data.images(np.arange(min(10, count)))

        def drawn(prior: str):
            return pictures.sheet(self.sample(prompts, steps=12, prior=prior), [p or "(no caption)" for p in prompts],
                                  columns=5)
        yield Stage("decoder", self.decoder, decoder_batch, self.decoder_loss, steps=2000,
                    picture=lambda: pictures.sheet(self.variations(shown, steps=12), columns=5))
        yield Stage("prior", self.prior, prior_batch, self.prior_loss, steps=1200, batch_size=128, ema=0.995,
                    picture=lambda: drawn("diffusion"))

        # what the code prior's codes mean: the principal axes of z_i and their ranges, and how large z_i . z_t is
        self.pca.fit(z_i)
        self.buckets.fit((z_i - self.pca.mean.data) @ self.pca.axes.data)
        rng = generator(0, "captions of the dot products")
        i = rng.permutation(count)[:5000]
        z_t = to_numpy(self.clip.embed_captions(random_captions(data, i, rng)))
        self.dots.fit((z_i[i] * z_t).sum(axis=1))
        for fitted in (self.pca, self.buckets, self.dots):
            fitted.to(self.device)
        yield Stage("codes", self.codes, codes_batch, self.codes_loss, steps=2000, batch_size=64, ema=0.995,
                    picture=lambda: drawn("autoregressive"))

    def decoder_loss(self, decoder: ImageDecoder, x_0, z_i, tokens, pooled, mask, t, eps) -> Tensor:
        """x_0, eps (B, H, W, C); z_i (B, D), 0 where dropped; the captions' states; t (B,) -> ()."""
        # L = || v - v_theta(x_t, t, z_i, y) ||^2
        return denoising_loss(self.schedule, "v",
                              lambda x_t: decoder(as_input(decoder, x_t), t, z_i, tokens, pooled, mask), x_0, t, eps)

    def prior_loss(self, prior: DiffusionPrior, z_i, z_t, tokens, mask, t, eps) -> Tensor:
        """z_i, z_t, eps (B, D); the captions' states; t (B,) -> ()."""
        def network(z_i_t) -> Tensor:
            return prior(as_input(prior, z_i_t), t, as_input(prior, self.scaled(z_t)), as_input(prior, tokens), mask)
        # L_prior = || f(z_i^(t), t, y) - z_i ||^2                                            section 2.2
        return denoising_loss(self.schedule, "x0", network, self.scaled(z_i), t, eps)

    def codes_loss(self, prior: AutoregressivePrior, codes, dot, z_t, tokens, mask) -> Tensor:
        """codes (B, K), dot (B,), z_t (B, D), the captions' states -> (), nats a code."""
        # L = -1/K sum_k log p(c_k | c_<k, y)
        logits = as_float32(prior(codes[:, :-1], dot, as_input(prior, self.scaled(z_t)), as_input(prior, tokens),
                                  mask))                                            # (B, K, values)
        return ops.cross_entropy(logits.reshape(codes.size, -1), codes.reshape(-1))

    def scaled(self, z):
        """sqrt(D) z: a unit row with entries of about 1."""
        return np.float32(math.sqrt(self.D)) * z

    def encode(self, z_i):
        """z_i (B, D) -> codes (B, K)."""
        return self.buckets.quantise(self.pca.reduce(z_i))

    # --- the prior: p(z_i | y) ----------------------------------------------------------------------------

    def prior_denoiser(self, scale: float, null: tuple) -> ClassifierFree:
        """(z_i^(t), t, (z_t, tokens, mask)) -> an estimate of sqrt(D) z_i, guided; `null` is the condition of ''."""
        def predict(z_i_t, t, cond):
            def network(z_i_t, t, z_t, tokens, mask):
                z_i_t, z_t, tokens = (as_input(self.prior, Tensor(a)) for a in (z_i_t, self.scaled(z_t), tokens))
                return self.prior(z_i_t, t, z_t, tokens, mask)
            return map_batch(network, z_i_t, t, *cond, device=self.device)
        return ClassifierFree(NetworkDenoiser(self.schedule, "x0", predict), scale, null)

    def embed(self, captions: Sequence[str], *, prior: str = "diffusion", scale: float = 1.5, steps: int = 20,
              candidates: int = 2, temperature: float = 1.0, seed: int = 0, streams: SampleStreams | None = None):
        """Image embeddings (B, D) drawn from p(z_i | y), one for each caption.

        prior: one of PRIORS; "text" gives z_t itself, "none" zeros, which is no embedding to the decoder.
        scale: of the prior's guidance.  steps, candidates: of the diffusion prior.  temperature: of the code prior.
        """
        one_of("prior", prior, PRIORS)
        candidates = whole("candidates", candidates, 1, 64)
        finite("the prior's scale", scale)
        finite("temperature", temperature, 0)
        streams = self.streams_for(captions, seed, streams)
        z_t, tokens, _, mask = self.encode_text(captions)
        null = self.encode_text([""], tokens.shape[1])
        cond, null = (z_t, tokens, mask), (null[0], null[1], null[3])
        if prior == "text":
            return z_t
        if prior == "none":
            return 0 * z_t
        if prior == "autoregressive":
            return self._embed_by_codes(cond, null, scale, temperature, streams)
        # `candidates` embeddings of each caption, from its own stream
        z_T = self.noise(streams, (candidates, self.D)).reshape(-1, self.D)         # (B candidates, D)
        repeated = tuple(a.repeat(candidates, axis=0) for a in cond)
        z_0 = last(ddim(self.prior_denoiser(scale, null), z_T, times(self.schedule, steps), repeated))
        return best_of(z_0.reshape(-1, candidates, self.D) / np.float32(math.sqrt(self.D)), z_t)

    def _embed_by_codes(self, cond: tuple, null: tuple, scale: float, temperature: float, streams: SampleStreams):
        """(B, D): the codes one after another, then the embedding that they stand for."""
        B, half = len(cond[0]), self.config.dots // 2
        # "sample the dot product from the top half of the distribution"
        dot = half + (half * streams.uniform()).astype(np.int64)                    # (B,)
        no_dot, null = np.full(B, self.config.dots), tuple(a.repeat(B, axis=0) for a in null)
        codes = np.zeros((B, 0), np.int64)
        for u in streams.uniform((self.config.components,)).T:                      # (B,) for each code
            logits = self.code_logits(codes, dot, cond)                             # (B, values)
            if scale != 1:                                  # p(c | y)^scale p(c)^(1 - scale), up to a factor
                uncond = self.code_logits(codes, no_dot, null)
                logits = uncond + np.float32(scale) * (logits - uncond)
            codes = np.concatenate([codes, next_tokens(to_numpy(logits), u, temperature)[:, None]], axis=1)
        return self.pca.restore(self.buckets.dequantise(to_device(codes, self.device)))

    def code_logits(self, codes, dot, cond: tuple):
        """The logits of the next code, (B, values), after codes (B, k)."""
        def network(codes, dot, z_t, tokens, mask):
            z_t, tokens = (as_input(self.codes, Tensor(a)) for a in (self.scaled(z_t), tokens))
            return self.codes(codes, dot, z_t, tokens, mask).data[:, -1]
        return map_batch(network, codes, dot, *cond, device=self.device)

    # --- the decoder: p(x | z_i, y) -----------------------------------------------------------------------

    def decoder_denoiser(self, scale: float, null: tuple) -> ClassifierFree:
        """(x_t, t, (z_i, tokens, pooled, mask)) -> x0_hat, guided; `null` is the condition of 0 and ''."""
        def predict(x_t, t, cond):
            return map_batch(lambda x_t, t, *cond: self.decoder(as_input(self.decoder, Tensor(x_t)), t, *cond),
                             x_t, t, *cond, device=self.device)
        return ClassifierFree(NetworkDenoiser(self.schedule, "v", predict), scale, null, clip=static_threshold)

    def conditioned(self, z_i, captions: Sequence[str], scale: float) -> tuple:
        """The decoder's denoiser and its condition."""
        if z_i.shape != (len(captions), self.D):
            raise ValueError(f"z_i must be one row of {self.D} for each of the {len(captions)} captions, "
                             f"not {z_i.shape}")
        cond = (to_device(z_i.astype(np.float32), self.device), *self.encode_text(captions)[1:])
        null = self.encode_text([""], cond[1].shape[1])
        return self.decoder_denoiser(scale, (0 * cond[0][:1], *null[1:])), cond

    def decode_states(self, z_i, captions: Sequence[str], x_T, *, scale: float, steps: int, eta: float,
                      streams: SampleStreams) -> Iterator[State]:
        """Every state of the decoder from x_T to x_0, by DDIM with eta."""
        denoiser, cond = self.conditioned(z_i, captions, scale)
        path = times(self.schedule, steps)
        yield State(0, int(path[0]), x_T, None)
        yield from finite_states(ddim(denoiser, x_T, path, cond, eta=eta, streams=streams))

    def decode(self, z_i, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, eta: float = 0.0,
               seed: int = 0, streams: SampleStreams | None = None, x_T=None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1] of embeddings z_i (B, D), by DDIM with eta, from noise or from x_T."""
        streams = self.streams_for(captions, seed, streams)
        x_T = self.noise(streams, self.config.shape) if x_T is None else to_device(x_T, self.device)
        return to_numpy(last(self.decode_states(z_i, captions, x_T, scale=scale, steps=steps, eta=eta,
                                                streams=streams)))

    # --- what can be done with it -------------------------------------------------------------------------

    def trajectory(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, prior: str = "diffusion",
                   prior_scale: float = 1.5, prior_steps: int = 20, candidates: int = 2, temperature: float = 1.0,
                   seed: int = 0, streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state of the decoder, from noise to picture, after the prior has drawn z_i."""
        streams = self.streams_for(captions, seed, streams)
        z_i = self.embed(captions, prior=prior, scale=prior_scale, steps=prior_steps, candidates=candidates,
                         temperature=temperature, streams=streams)
        x_T = self.noise(streams, self.config.shape)
        yield from self.decode_states(z_i, captions, x_T, scale=scale, steps=steps, eta=0.0, streams=streams)

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, prior: str = "diffusion",
               prior_scale: float = 1.5, prior_steps: int = 20, candidates: int = 2, temperature: float = 1.0,
               seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: z_i ~ p(z_i | y), then x ~ p(x | z_i, y).

        scale, steps: of the decoder.  The others: of the prior, as in `embed`.
        """
        return to_numpy(last(self.trajectory(
            captions, scale=scale, steps=steps, prior=prior, prior_scale=prior_scale, prior_steps=prior_steps,
            candidates=candidates, temperature=temperature, seed=seed, streams=streams)))

    def invert(self, images: np.ndarray, *, scale: float = 2.0, steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
        """The two parts of images (B, H, W, C), section 3: z_i (B, D), and x_T, which holds all that z_i does not."""
        images = to_device(clean_images(images, self.config.shape).astype(np.float32), self.device)
        z_i = self.clip.embed_images(images)
        denoiser, cond = self.conditioned(z_i, [""] * len(images), scale)
        x_T = last(ddim_inverse(denoiser, images, times(self.schedule, steps), cond))
        return to_numpy(z_i), to_numpy(x_T)

    def variations(self, images: np.ndarray, *, eta: float = 1.0, scale: float = 2.0, steps: int = 40, seed: int = 0,
                   streams: SampleStreams | None = None) -> np.ndarray:
        """Other images of the same z_i, (B, H, W, C); eta 0 gives the same images again (section 3.1)."""
        z_i, x_T = self.invert(images, scale=scale, steps=steps)
        return self.decode(z_i, [""] * len(images), eta=eta, scale=scale, steps=steps, seed=seed, streams=streams,
                           x_T=x_T)

    def interpolations(self, first: np.ndarray, second: np.ndarray, thetas: Sequence[float], *, scale: float = 2.0,
                       steps: int = 40) -> np.ndarray:
        """The path from one image (H, W, C) to another, an image for each theta: 0 the first, 1 the second."""
        z_i, x_T = self.invert(np.stack([first, second]), scale=scale, steps=steps)
        theta, n = np.asarray(thetas), len(thetas)
        z = slerp(*(np.repeat(z_i[k:k + 1], n, axis=0) for k in (0, 1)), theta)
        x = slerp(*(np.repeat(x_T[k].reshape(1, -1), n, axis=0) for k in (0, 1)), theta).reshape(n, *x_T.shape[1:])
        return self.decode(z, [""] * n, scale=scale, steps=steps, x_T=x)

    def text_diff(self, image: np.ndarray, before: str, after: str, thetas: Sequence[float], *, scale: float = 2.0,
                  steps: int = 40) -> np.ndarray:
        """An image (H, W, C) moved from what `before` says toward what `after` says, once for each theta."""
        z_i, x_T = self.invert(image[None], scale=scale, steps=steps)
        z_t, n = to_numpy(self.clip.embed_captions([before, after])), len(thetas)
        # z_d = (z_t' - z_t) / ||z_t' - z_t||
        z_d = (z_t[1] - z_t[0]) / np.linalg.norm(z_t[1] - z_t[0])
        z = slerp(np.repeat(z_i, n, axis=0), np.repeat(z_d[None], n, axis=0), np.asarray(thetas))
        return self.decode(z, [""] * n, scale=scale, steps=steps, x_T=np.repeat(x_T, n, axis=0))


def best_of(z_i, z_t):
    """Of candidates z_i (B, n, D) the one with the largest dot product with z_t (B, D): (B, D)."""
    chosen = (z_i @ z_t[:, :, None])[..., 0].argmax(axis=1)
    return z_i[xp_of(z_i).arange(len(z_i)), chosen]

