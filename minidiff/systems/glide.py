"""GLIDE's CLIP guidance (Nichol et al. 2021, arXiv 2112.10741, section 2.4): a denoiser without captions, steered by
CLIP.

    training    x_t = alpha_t x_0 + sigma_t eps,   c a caption of x_0
                L = CLIP's loss of f(x_t, t) and g(c)                               a noised CLIP; text/clip.py
    sampling    mu  = mu + scale Sigma grad (f(x_t) . g(c))                         section 2.4
            or  score = score + scale grad (f(x_t) . g(c))                          the same at small steps

f and g have length 1 and a factor exp(log_scale) here, so that f . g is the logit of the loss.  The best logits are
log p(x_t, c) / p(x_t) p(c), whose gradient is grad log p(c | x_t).  With these, scale 1 would draw from p(x_0 | c), as
classifier guidance would, and a larger scale guides more strongly.  This requires the symmetric loss: picture-to-text
alone leaves an arbitrary function of x_t in the logits, and so in the gradient; text-to-picture determines it.

At SNR 0 a picture says nothing, and the tower is built accordingly: its last layer sees alpha_t h(x_t, t), and at
alpha_t = 0 only its bias is left, one embedding for all.  So the gradient falls with alpha_t, and guidance divides by
alpha_t.

The file holds the noised CLIP and no denoiser.  x0_hat is that of the trained text-to-image system with the null
caption, which is an unconditional model since 10 % of its captions were dropped in training.  So CLIP guidance and
classifier-free guidance, the paper's other half (section 2.3, and the one that it prefers), use one network, and are
compared in docs/glide.md.  Classifier-free guidance is systems/text_to_image.py.

CLIP guidance follows captions less well, as in the paper: 97.6 % of digits and 95 % of attributes at the best scale,
where the same UNet with classifier-free guidance, called as often, has 99.8 and 99.5 %.  The loss trains the logits,
and nothing trains their slope, which is what guides.  At t = 700 the gradient has a cosine of .51 with the denoiser's
own, score(x_t | c) - score(x_t), and 0.7 of its length; at 500, .31 and 0.6.  So early decisions are good, and the
strokes follow whatever raises f . g.  A larger scale makes up for the length and not for the direction: docs/glide.md
has the numbers.  (The noised CLIP trained for 12 minutes on a shared core of an AMD EPYC, 2026-11-23.)

Scaled down or left out: everything by four orders of magnitude; the 64 -> 256 upsampler; inpainting; fine-tuning the
denoiser; a ViT for f, which is a convolutional network whose norms depend on t.  Times have a density (config.times)
that grows with t by default (t = T u^(1/2)).  The steps are DPM-Solver++'s, which see the guided score, where the paper
shifts the mean of a DDPM step: sampler="ddpm" is that, with beta / sqrt(1 - beta) of the step for Sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minidiff import systems
from minidiff.data.dataset import Dataset
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.densities import density_from, parse_density
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.engine import conv, ops
from minidiff.engine.backend import moved, to_numpy
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, recording
from minidiff.errors import UserError
from minidiff.nn.image_tower import ImageTowerConfig, check_images
from minidiff.nn.layers import Conv2d, GroupNorm, Linear, parameter, sinusoidal_embedding
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import ResidualBlock
from minidiff.systems.clip import Contrastive, by_shards
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import finite_states
from minidiff.text.clip import capped, clip_loss, unit
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GLIDEConfig:
    """Everything that makes one noised CLIP; it is saved in its file."""

    schedule: str = "cosine"                # NAME[:key=value,...]: the schedule of the denoiser that it guides
    T: int = 1000                           # training times
    times: str = "power:power=0.5"          # how often each is drawn: NAME[:key=value,...] of densities.DENSITIES
    pairs: int = 128                        # N, the pairs that a loss classifies among
    embedding: int = 64                     # channels of the time's embedding
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self):
        check_schedule(self.schedule)
        parse_density(self.times)
        if self.pairs < 2:
            raise ValueError(f"pairs must be at least 2, since one pair cannot be told from another, not {self.pairs}")
        if self.embedding < 2 or self.embedding % 2:
            raise ValueError(f"embedding must be even and at least 2, not {self.embedding}")

    @property
    def width(self) -> int:
        """D of the space of both towers."""
        return self.text.width


class NoisedImageTower(Module):
    """Noised pictures x_t (B, H, W, C), t (B,), alpha_t (B,) -> embeddings (B, D), not normalised."""

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
        emb = Tensor(moved(sinusoidal_embedding(t, c.embedding, dtype=x_t.dtype), x_t.data))          # (B, E)
        emb = ops.silu(self.time2(ops.silu(self.time1(emb))))
        h = self.block1(self.conv_in(conv.space_to_depth(x_t)), emb)                # (B, H/2, W/2, half)
        h = self.block2(self.downsample(conv.space_to_depth(h)), emb)                   # (B, H/4, W/4, quarter)
        h = self.narrow(self.norm.then_silu(h)).reshape(len(t), c.image.flat)
        # f = (alpha_t h) W + b
        alpha = moved(np.asarray(alpha_t, np.float32).astype(h.dtype)[:, None], h.data)             # (B, 1)
        return self.project(h * Tensor(alpha))


class GLIDE(Contrastive):
    """A noised CLIP, with the tokenizer and the schedule that it was trained with."""

    name, Config, example = "glide", GLIDEConfig, "05_glide.py"
    needs = ("text-to-image",)

    def __init__(self, config: GLIDEConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.times = density_from(config.times, self.schedule)
        self.image = NoisedImageTower(config, config.width, rng)
        self._borrowed: dict = {}                           # the guided system, which is not saved with this one

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        def batch(step: Step) -> tuple:
            x_0, ids, mask = self.random_pairs(data, step)
            # noisy times more often, since they decide what is drawn
            t = self.times.draw(step.rng, x_0.shape[:2], stratified=False)                          # (batches, N)
            return x_0, ids, mask, t, step.normal(x_0.shape)
        yield Stage("contrast", self, batch, GLIDE.loss, steps=1300, batch_size=2, ema=0.995)

    def contrast(self, x_0, ids, mask, t, eps) -> Tensor:
        """The loss of one batch of N pairs, (): x_0, eps (N, H, W, C); ids, mask (N, tokens); t (N,)."""
        x_t, alpha_t = q_sample(self.schedule, x_0, t, eps), self.schedule.alpha(t)

        def tower(shard: slice) -> Tensor:
            return as_float32(self.image(as_input(self.image, x_t[shard]), t[shard], alpha_t[shard]))
        image = by_shards(tower, len(t))                                                            # (N, D)
        text = by_shards(lambda shard: as_float32(self.text(ids[shard], mask[shard])), len(t))      # (N, D)
        return clip_loss(image, text, capped(as_float32(self.log_scale)))

    # --- guidance -----------------------------------------------------------------------------------------

    def features(self, x_t: Tensor, t) -> Tensor:
        """exp(log_scale) f(x_t, t), rows (B, D) whose product with a caption's row is the logit; differentiable."""
        f = as_float32(self.image(as_input(self.image, x_t), t, self.schedule.alpha(t)))
        return ops.exp(capped(as_float32(self.log_scale))) * unit("x_t", f)

    def grad_log_prob(self, x_t, t, g):
        """grad (f(x_t) . g), of x_t's shape (B, H, W, C), on all cores, or the GPU; t (B,), g (B, D) captions' rows."""
        return map_batch(similarity_gradient(self.features), x_t, t, g, device=self.device)

    def take(self, needed) -> None:
        """Borrows the text-to-image system whose denoiser is guided; UserError where it has another schedule or draws
        images of another shape."""
        model = needed["text-to-image"]
        if tuple(model.config.shape) != tuple(self.config.image.shape):
            file = systems.weights_of("text-to-image")
            raise UserError(f"glide guides pictures of the shape {tuple(self.config.image.shape)}, and the "
                            f"text-to-image system ({getattr(model, 'file', file)}) draws {tuple(model.config.shape)}: "
                            "train that system on these pictures, and name it with --needs text-to-image=FILE")
        if not np.array_equal(model.schedule.alpha_bar, self.schedule.alpha_bar):
            raise UserError(f"config: schedule must be that of the model that is guided, {model.schedule.name} with "
                             f"T = {model.schedule.T}, not {self.schedule.name} with T = {self.schedule.T}")
        self._borrowed["text-to-image"] = model

    def borrowed(self) -> dict:
        """The systems that it draws with and whose weights are not in its own file, by name."""
        return {"text-to-image": self.unconditional()}

    def unconditional(self):
        """The text-to-image system whose denoiser is guided: the one of `take`, or else as `load_system` finds it."""
        if "text-to-image" not in self._borrowed:
            self.take({"text-to-image": systems.load_system("text-to-image")})
        return self._borrowed["text-to-image"].to(self.device)

    def denoiser(self, scale: float) -> ClassifierGuidance:
        """(x_t, t, g(c)) -> x0_hat of the unconditional model, guided by CLIP."""
        model = self.unconditional()
        alone = ClassifierFree(model.unguided(), 0.0, model.encode([""]))
        return ClassifierGuidance(alone, self.grad_log_prob, scale, clip=static_threshold)

    def trajectory(self, captions: Sequence[str], *, scale: float = 4.0, steps: int = 20, sampler: str = "dpm++2m",
                   seed: int = 0, streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, one sample for each caption, sample i from its own stream (seed, i)."""
        streams, sampler = self.streams_for(captions, seed, streams), SAMPLERS[sampler]
        x_T, path = self.noise(streams, self.config.image.shape), times(self.schedule, steps)
        yield State(0, int(path[0]), x_T, None)
        yield from finite_states(sampler(self.denoiser(scale), x_T, path, self.embed_captions(captions),
                                         streams=streams))

    def sample(self, captions: Sequence[str], *, scale: float = 4.0, steps: int = 20, sampler: str = "dpm++2m",
               seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption, sample i from its own stream (seed, i).

        scale: of the guidance; 0 ignores the caption.  steps: each calls the UNet once, where classifier-free guidance
        calls it twice, and takes one gradient of CLIP's image tower.  sampler: a name in samplers.SAMPLERS.
        """
        return to_numpy(last(self.trajectory(captions, scale=scale, steps=steps, sampler=sampler, seed=seed,
                                             streams=streams)))


def similarity_gradient(features: Callable[[Tensor, Any], Tensor]) -> Callable[[Any, Any, Any], Any]:
    """CLIP guidance's counterpart of a classifier's gradient: `(x_t, t, y) -> grad (f(x_t, t) . y)`, of x_t's shape.

    features: f, `(x_t (B, ...), t (B,)) -> (B, D)`, of *noised* pictures, each row by itself.  y (B, D): g, of
    captions.  Where f . g is pointwise mutual information, which the contrastive loss estimates, this is grad log p(y
    | x_t).
    """
    def gradient(x_t, t, y):
        x = Tensor(x_t, requires_grad=True)
        with recording():
            f = features(x, t)
        # row i of f depends on x_i alone: the gradient of sum_i f_i . y_i is that of each
        return gradients(f, [x], y)[0]
    return gradient
