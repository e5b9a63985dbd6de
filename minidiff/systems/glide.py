"""GLIDE's CLIP guidance (Nichol et al. 2021, arXiv 2112.10741, section 2.4): pictures by a denoiser that hears no text.

    training    x_t = alpha_t x_0 + sigma_t eps,   c a caption of x_0
                L = CLIP's loss of f(x_t, t) and g(c)                               a noised CLIP; text/clip.py
    sampling    mu  = mu + s Sigma grad (f(x_t) . g(c))                             section 2.4
            or  score = score + s grad (f(x_t) . g(c))                              the same at small steps

f and g are of length 1 and times exp(log_scale) here, so that f . g is the logit which the loss is made of. The best
logits are log p(x_t, c) / p(x_t) p(c), whose gradient is grad log p(c | x_t): s = 1 would draw from p(x_0 | c), as
classifier guidance would, and s > 1 leans further. The loss must be symmetric for that: picture-to-text alone leaves
the logits a function of x_t that is arbitrary, and so the gradient; choosing among pictures for a caption pins it.

At SNR 0 a picture tells nothing, and the tower is built so: its last layer sees alpha_t h(x_t, t), and what is left
at alpha_t = 0 is its bias, one embedding for all. So the gradient falls with alpha_t, by which guidance divides.

What the file holds is the noised CLIP and no denoiser: x0_hat is that of TextToImage.load(), asked with the null
caption, which is the unconditional model that its training made (10 % of captions dropped). So CLIP guidance and
classifier-free guidance, the paper's other half (section 2.3, and the one it prefers), lean on one network, and are
compared in docs/glide.md. That half is TextToImage's page and is not built again here.

It follows less well than it ought to, as in the paper: 93.4 % of digits at the best scale, where the same UNet with
classifier-free guidance, called as often, has 99.4 %. The loss trains the logits and nothing trains their slope, which
is what guides. At t = 700 the gradient has a cosine of .59 with the one that the denoiser itself has,
score(x_t | c) - score(x_t), and 0.7 of its length; at 500, .32 and 0.6. So what is decided early is decided well, and
the strokes are left to whatever raises f . g. A greater s makes up for the length and not for the direction:
docs/glide.md has the numbers. (The noised CLIP trained for 12 minutes on a shared core of an AMD EPYC, 2026-11-23.)

Scaled down or left out: everything by four orders of magnitude; the 64 -> 256 upsampler; inpainting; fine-tuning
the denoiser; a ViT for f. f is a convolutional network whose blocks hear of t through their norms. Times are drawn
with a density that grows with t, and not evenly. The steps are DPM-Solver++'s, which see the guided score, where the
paper shifts the mean of a DDPM step: sampler="ddpm" is that, with beta / sqrt(1 - beta) of the step for Sigma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.gaussian import per_sample, q_sample
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, similarity_gradient
from minidiff.diffusion.samplers import SAMPLERS, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.engine import conv, ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.nn.image_tower import ImageTowerConfig, check_images
from minidiff.nn.layers import Conv2d, GroupNorm, Linear, parameter, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.unet import ResidualBlock
from minidiff.systems.clip import Contrastive, by_shards
from minidiff.systems.system import Stage, check_finite, streams_for
from minidiff.systems.text_to_image import TextToImage
from minidiff.text.clip import capped, clip_loss, unit
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GLIDEConfig:
    """Everything that makes one noised CLIP; it travels in its file."""

    schedule: str = "cosine"                # NAME[:key=value,...], that of the denoiser that it guides
    T: int = 1000                           # training times
    pairs: int = 128                        # N, among which a loss classifies
    embedding: int = 64                     # channels of the time's embedding
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self):
        check_schedule(self.schedule)
        if self.pairs < 2:
            raise ValueError(f"pairs must be at least 2, or there is nothing to tell apart, not {self.pairs}")
        if self.embedding < 2 or self.embedding % 2:
            raise ValueError(f"embedding must be even and at least 2, not {self.embedding}")

    @property
    def width(self) -> int:
        """D of the space that both towers end in."""
        return self.text.width


class NoisedImageTower(Module):
    """Noised pictures x_t (B, H, W, 1), t (B,), alpha_t (B,) -> embeddings (B, D), of any length."""

    def __init__(self, config: GLIDEConfig, D: int, rng: np.random.Generator):
        c, E = config.image, config.embedding
        half, quarter = c.widths
        self.config = config
        self.time1, self.time2 = Linear(E, E, rng), Linear(E, E, rng)
        self.conv_in, self.block1 = Conv2d(4 * c.shape[2], half, rng), ResidualBlock(half, half, E, c.groups, rng)
        self.downsample, self.block2 = Linear(4 * half, quarter, rng), ResidualBlock(quarter, quarter, E, c.groups, rng)
        self.norm, self.narrow = GroupNorm(quarter, c.groups), Linear(quarter, c.last, rng)
        self.project = Linear(c.flat, D, rng)
        self.project.b = parameter((D,), 1.0, rng)          # not 0: at alpha_t = 0 it is all there is

    def forward(self, x_t: Tensor, t, alpha_t) -> Tensor:
        c = self.config
        check_images(x_t, c.image.shape)
        emb = Tensor(sinusoidal_embedding(t, c.embedding, dtype=x_t.dtype))         # (B, E)
        emb = ops.silu(self.time2(ops.silu(self.time1(emb))))
        h = self.block1(self.conv_in(conv.space_to_depth(x_t)), emb)                # (B, H/2, W/2, half)
        h = self.block2(self.downsample(conv.space_to_depth(h)), emb)                   # (B, H/4, W/4, quarter)
        h = self.narrow(self.norm.then_silu(h)).reshape(len(t), c.image.flat)
        # f = (alpha_t h) W + b
        return self.project(h * Tensor(per_sample(alpha_t, h.data)))


class GLIDE(Contrastive):
    """A noised CLIP, with the tokenizer and the schedule that it was trained with."""

    name, Config = "glide", GLIDEConfig
    needs = ("text-to-image",)

    def __init__(self, config: GLIDEConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.image = NoisedImageTower(config, config.width, rng)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        def batch(rng: np.random.Generator, B: int) -> tuple:
            x_0, ids, mask = self.draw_pairs(data, B, rng)
            # t = T u^(1/2): a density that grows with t, as what is drawn is decided while there is much noise
            t = (self.schedule.T * np.sqrt(rng.random(x_0.shape[:2]))).astype(np.int64)
            t = np.minimum(t, self.schedule.T - 1)          # a root may be rounded up to 1
            return x_0, ids, mask, t, rng.standard_normal(x_0.shape, dtype=np.float32)
        yield Stage("contrast", self, batch, self.loss, steps=1300, size=2, lr=2e-3, ema=0.995)

    def contrast(self, x_0, ids, mask, t, eps) -> Tensor:
        """The loss of one batch of N pairs, (): x_0, eps (N, H, W, 1); ids, mask (N, tokens); t (N,)."""
        x_t, alpha_t = q_sample(self.schedule, x_0, t, eps), self.schedule.alpha(t)
        image = by_shards(lambda p: self.image(Tensor(x_t[p]), t[p], alpha_t[p]), len(t))           # (N, D)
        text = by_shards(lambda p: self.text(ids[p], mask[p]), len(t))                              # (N, D)
        return clip_loss(image, text, capped(self.log_scale))

    # --- guidance -----------------------------------------------------------------------------------------

    def features(self, x_t: Tensor, t) -> Tensor:
        """exp(log_scale) f(x_t, t), rows (B, D) whose product with a caption's is the logit; differentiable."""
        return ops.exp(capped(self.log_scale)) * unit("x_t", self.image(x_t, t, self.schedule.alpha(t)))

    def grad_log_prob(self, x_t, t, g) -> np.ndarray:
        """grad (f(x_t) . g), of x_t's shape (B, H, W, 1), on all cores; t (B,), g (B, D) of `embed_captions`."""
        gradient = similarity_gradient(self.features)
        return np.concatenate(list(parallel_map(lambda p: gradient(x_t[p], t[p], g[p]), shards(len(x_t)))))

    def denoiser(self, scale: float) -> ClassifierGuidance:
        """(x_t, t, g(c)) -> x0_hat of the unconditional model, guided by CLIP."""
        base = unconditional()
        if not np.array_equal(base.schedule.alpha_bar, self.schedule.alpha_bar):
            raise ValueError(f"config: schedule must be that of the model that is guided, {base.schedule.name} with "
                             f"T = {base.schedule.T}, not {self.schedule.name} with T = {self.schedule.T}")
        alone = ClassifierFree(base.unguided(), 0.0, base.encode([""]))
        return ClassifierGuidance(alone, self.grad_log_prob, scale, clip=static_threshold)

    def sample(self, captions: Sequence[str], *, scale: float = 4.0, steps: int = 20, sampler: str = "dpm++2m",
               seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption, sample i from its own stream (seed, i).

        scale: s; 0 does not hear the caption.  steps: each asks the UNet once, where classifier-free guidance asks
        twice, and CLIP's image tower for a gradient.  sampler: a name in samplers.SAMPLERS.
        """
        streams = streams_for(captions, seed, streams)
        x_T = streams.normal(self.config.image.shape)
        return check_finite(last(SAMPLERS[sampler](self.denoiser(scale), x_T, times(self.schedule, steps),
                                                   self.embed_captions(captions), streams=streams)))


@cache
def unconditional() -> TextToImage:
    """The model that is guided, which comes with minidiff."""
    return TextToImage.load()
