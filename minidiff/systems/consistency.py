"""Consistency models (arXiv 2303.01469): a trained text-to-image system, distilled to one step or a few.

    teacher      x0_hat(x_t, t, y), guided: eps = eps_uncond + scale (eps_cond - eps_uncond)      text_to_image.py
    student      f(x_t, t, y) = alpha_t x_t - sigma_t v_theta(x_t, t, y),   f(x_0, 0, y) = x_0          section 3
    pairs        x_t = alpha_t x_0 + sigma_t eps,  x_s one DDIM step of the teacher from x_t        algorithm 2
    training     L = E d(f(x_t, t, y), sg[f(x_s, s, y)])                                              section 4
                 d(a, b) = sqrt(||a - b||^2 + c^2) - c,  c = .00054 sqrt(D)    Song & Dhariwal 2023, section 3.3
    times        T-1 = t_1 > ... > t_N, and then the clean image;  t = t_n, s = t_{n+1}, n uniform      algorithm 2
    sampling     x_0 = f(x_{T-1}, T-1, y);  then, as often as one likes, noise to a lower time s and         algorithm 1
                 x_0 = f(alpha_s x_0 + sigma_s z, s, y)

The teacher's denoiser gives the mean of all images that x_t may come from, which is blurred at high noise, and takes
many small steps to a sharp image.  The student is asked for the end of this path at once.  It needs no images of the
teacher's for that: f must be the same at both ends of a short piece of the path, and at its lower end the student's own
answer, held fixed (sg: stop-gradient), is the target.  The last piece ends at the clean image, where f is right
whatever the network says.  From there what is right spreads to higher noise.

The student starts with the teacher's weights, for a network that predicts v is of the form that f takes.  At first its
answers are the teacher's blurred means.  N is small: every piece of the way from the clean image to noise adds an error
of the student's own, and the teacher's DDIM needs few steps for digits.  If N is a multiple of 4, the times of 1, 2 and
4 steps of sampling are among the N times.

Guidance is distilled too: the pairs follow the guided teacher (Meng et al. 2023), so a step of the student calls one
network once, where a step of the teacher calls it twice.  The scale is that of the configuration, and no option of
sampling: a reader sees one line for it, and the network needs no new input.  Latent consistency models (Luo et al.
2023, arXiv 2310.04378) draw the scale in training and give it to the network; they also step over many times, as here.

What was chosen of the papers: the target is the student itself, not its moving average (Song & Dhariwal 2023, section
3.2), which asks nothing new of the trainer, and their d.  The paper's own choices for distillation are an averaged
target, LPIPS for d, Heun's solver and N = 18.  N is not doubled during training, as it is in section 3.4 of Song &
Dhariwal 2023: each doubling begins with a lowest time at which the student has not been trained and has lost some of
the teacher's precision, and its errors there spread upward as targets.  A trial of 400 steps with N = 4, 8, 16 and 32
gave grainy pictures.  All times have the same weight.  The target is clipped to [-1, 1], as in sampling.

Scaled down or left out: 28 x 28 digits for 64 x 64 images and latents; a few thousand steps for hundreds of thousands;
consistency training, which needs no teacher; the text encoder is the teacher's and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from minidiff import pictures, systems
from minidiff.checks import whole
from minidiff.data.dataset import Dataset
from minidiff.diffusion.consistency import ddim_step, lcm, neighbours
from minidiff.diffusion.denoiser import Denoiser, NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import per_sample, q_sample
from minidiff.diffusion.samplers import State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import TextStates, UNet
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, finite_states
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.systems.training_batches import random_captions
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ConsistencyConfig:
    """Everything that makes one model; it is saved in the model's file."""

    teacher: TextToImageConfig = field(default_factory=TextToImageConfig)
    scale: float = 2.0                      # of the teacher's guidance, which is distilled
    intervals: int = 8                      # N, of time
    steps: int = 3000                       # of training
    batch: int = 32                         # pictures in a training step

    def __post_init__(self):
        if self.teacher.predicted != "v":
            raise ValueError(f"teacher must predict v, so that f is x_0 at the clean image whatever the network says, "
                             f"not {self.teacher.predicts}")
        whole("intervals", self.intervals, 1, self.teacher.T)
        if not math.isfinite(self.scale) or min(self.steps, self.batch) < 1:
            raise ValueError(f"scale must be finite, and steps and batch at least 1, not {self.scale}, {self.steps} "
                             f"and {self.batch}")


class Consistency(System):
    """A text-to-image system whose network gives the end of the teacher's guided flow."""

    name, Config, example = "consistency", ConsistencyConfig, "13_consistency.py"
    needs = ("text-to-image",)
    no_likelihood = "its network gives the end of the flow, and not the mean of x_0 that a likelihood needs"

    def __init__(self, config: ConsistencyConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.student = TextToImage(config.teacher, tokenizer, rng)
        self.schedule = self.student.schedule
        self._borrowed: dict = {}                           # the teacher, which is not saved with the student

    @classmethod
    def default_config(cls, data: Dataset, needed) -> ConsistencyConfig:
        return ConsistencyConfig(teacher=needed["text-to-image"].config)

    @classmethod
    def tokenizer_for(cls, data: Dataset, config: ConsistencyConfig, rng: np.random.Generator, needed) -> Tokenizer:
        return needed["text-to-image"].tokenizer

    def take(self, needed) -> None:
        """Borrows the teacher, and copies its weights to the student."""
        self._borrowed["text-to-image"] = needed["text-to-image"]
        self.student.load_state_dict(self.teacher().state_dict())

    def teacher(self) -> TextToImage:
        """The system of `take`, or else as `load_system` finds it; UserError where it has another configuration."""
        if "text-to-image" not in self._borrowed:
            self._borrowed["text-to-image"] = systems.load_system("text-to-image")
        teacher = self._borrowed["text-to-image"]
        if teacher.config != self.config.teacher:
            raise UserError("the trained text-to-image system has another configuration than this consistency model "
                            "was made for: train it with that configuration, or leave out what changes `teacher`")
        return teacher.to(self.device)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        c = self.config
        if tuple(data.shape) != tuple(c.teacher.shape):
            raise UserError(f"the teacher draws images of shape {c.teacher.shape}, and {data.title} has {data.shape}: "
                            "train a text-to-image system on the same data first")

        def batch(step: Step) -> tuple:
            chosen = step.choose(data)
            captions = random_captions(data, chosen, step.rng, c.teacher.drop_caption)
            # t and s are the ends of interval n,   n uniform on 0 .. N-1
            n = training_times(step.rng, step.size, c.intervals, power=1)
            t, s = neighbours(self.schedule, c.intervals, n)
            eps = step.normal((step.size, *data.shape))
            return step.images(data, chosen), *self.student.encode(captions), t, s, eps

        def picture():
            one = self.sample(data.prompts, steps=1)        # the hardest
            return pictures.sheet(one, [p or "(no caption)" for p in data.prompts], columns=6, title="one step")
        teacher = self.teacher().denoiser(c.scale)          # with guidance
        yield Stage("distillation", self.student.unet, batch, partial(self.loss, teacher), c.steps, c.batch,
                    lr=5e-4, picture=picture)

    def loss(self, teacher: Denoiser, unet: UNet, x_0, tokens, pooled, mask, t, s, eps) -> Tensor:
        """The mean distance of f at x_t from f at x_s, held fixed, a Tensor of shape ().

        x_0, eps (B, H, W, C); the captions' states; t, s (B,), -1 <= s < t.
        """
        text = TextStates(as_input(unet, tokens), as_input(unet, pooled), mask)
        # x_t = alpha_t x_0 + sigma_t eps,   x_s = alpha_s x0_hat + sigma_s eps_hat
        x_t = q_sample(self.schedule, x_0, t, eps)
        # one call of the teacher with these captions: what it keeps of them (Remembering) is never read again
        x_s = ddim_step(teacher, x_t, t, s, (tokens, pooled, mask))
        with no_grad():                                     # sg[.]: what learns is f at x_t
            target = static_threshold(self.f(unet, x_s, s, text).data)
        # L = d(f(x_t, t), sg[f(x_s, s)])
        return pseudo_huber(self.f(unet, x_t, t, text) - target)

    def f(self, unet: UNet, x_t, t, text: TextStates) -> Tensor:
        """Where the flow through x_t ends, (B, H, W, C); at t = -1 it is x_t itself, for any finite v."""
        v = as_float32(self.student.prediction(unet, x_t, t, text))
        alpha, sigma = per_sample(self.schedule.alpha(t), x_t), per_sample(self.schedule.sigma(t), x_t)
        # f(x_t, t) = alpha_t x_t - sigma_t v_theta(x_t, t)
        return Tensor(alpha * x_t) - Tensor(sigma) * v

    # --- sampling -----------------------------------------------------------------------------------------

    def consistency_function(self) -> NetworkDenoiser:
        """f as samplers take it, clipped: (x_t, t, cond) -> the end of the guided flow through x_t."""
        return replace(self.student.unguided(), clip=static_threshold)

    def trajectory(self, captions: Sequence[str], *, steps: int = 4, seed: int = 0,
                   streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, one sample for each caption, sample i from its own stream (seed, i)."""
        streams = self.streams_for(captions, seed, streams)
        x_T, path = self.noise(streams, self.config.teacher.shape), times(self.schedule, steps)
        yield State(0, int(path[0]), x_T, None)
        yield from finite_states(lcm(self.consistency_function(), x_T, path, self.student.encode(captions),
                                     streams=streams))

    def sample(self, captions: Sequence[str], *, steps: int = 4, seed: int = 0,
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption.

        steps: calls of the network, 1 or a few; every one but the first noises the picture and draws it once more.
        """
        return to_numpy(last(self.trajectory(captions, steps=steps, seed=seed, streams=streams)))


def pseudo_huber(error: Tensor) -> Tensor:
    """The mean over samples of sqrt(||error||^2 + c^2) - c, (): the length of a large error, the square of a small one.

    error: (B, ...), D numbers a sample.  Its gradient has at most the length 1, so that no sample outweighs the rest.
    """
    # c = .00054 sqrt(D)                                                      Song & Dhariwal 2023, section 3.3
    c = 0.00054 * math.sqrt(error.size // len(error.data))
    squares = ops.sum(error * error, axis=tuple(range(1, error.ndim)))                # (B,)
    return ops.mean(ops.sqrt(squares + c * c) - c)
