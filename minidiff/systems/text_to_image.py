"""Text-to-image diffusion in pixel space: the system of the main job.

    training    x_t = alpha_t x_0 + sigma_t eps,   y a caption of x_0, dropped to '' now and then
                L = E || v - v_theta(x_t, t, y) ||^2,   v = alpha_t eps - sigma_t x_0     (Salimans & Ho 2022)
    sampling    x_T ~ N(0, I), then DPM-Solver++(2M) down to x_0 with classifier-free guidance
                eps = eps_uncond + scale (eps_cond - eps_uncond)                          (Ho & Salimans 2022)

A byte-level BPE tokenizer, a small transformer encoder and a UNet that hears the caption twice: pooled,
through its norms, and word by word, through cross-attention (as GLIDE, Imagen and Stable Diffusion do).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minidiff import checkpoint
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import check_predicts, q_sample, target
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import check_schedule, schedule_from
from minidiff.engine import ops
from minidiff.engine.backend import device_of, to_device, to_numpy, xp_of
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams, sample_streams
from minidiff.engine.tensor import Tensor, gradients, no_grad, recording
from minidiff.errors import UserError
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.systems.system import WEIGHTS, System, as_read, check_captions, check_streams
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextToImageConfig:
    """Everything that makes one model; it travels in the checkpoint."""

    image_size: int = 28
    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times
    predicts: str = "v"                     # eps, x0 or v
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(text=64))

    def __post_init__(self):
        check_predicts(self.predicts)
        check_schedule(self.schedule)
        if not 1 <= self.image_size <= 256 or self.image_size % self.unet.multiple:
            raise ValueError(f"image_size must be a multiple of {self.unet.multiple} of at most 256, "
                             f"not {self.image_size}")
        if self.unet.text != self.text.width:
            raise ValueError(f"unet.text ({self.unet.text}) must be text.width ({self.text.width})")


class TextToImage(System):
    """A caption encoder and a UNet, with the tokenizer and the schedule that they were trained with."""

    name, Config = "text-to-image", TextToImageConfig

    def __init__(self, config: TextToImageConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        super().__init__(config, tokenizer, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.text = TextEncoder(config.text, rng)
        self.unet = UNet(config.unet, rng)

    @property
    def device(self) -> str:
        """"cpu" or "cuda": where the weights are, and where it computes."""
        return device_of(self.text.position.data)

    @property
    def dtype(self):
        """What it computes in."""
        return self.text.position.dtype

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as ids and mask, (B, N).  Nothing but white space is the null caption."""
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.text.length)

    # --- training -----------------------------------------------------------------------------------------

    def loss(self, x_0, ids, mask, t, eps) -> Tensor:
        """The mean squared error of the prediction at given times and noise, a Tensor of shape ().

        x_0, eps (B, H, W, C) float; ids, mask (B, N) from `tokens`; t (B,) int of 0..T-1.
        """
        x_0, eps = to_device(x_0, self.device), to_device(eps, self.device)
        # x_t = alpha_t x_0 + sigma_t eps
        x_t = q_sample(self.schedule, x_0, t, eps)
        v = target(self.schedule, self.config.predicts, x_0, eps, t)
        # L = || v - v_theta(x_t, t, y) ||^2
        error = ops.cast(self.unet(ops.cast(Tensor(x_t), self.dtype), t, self.text(ids, mask)), v.dtype) - v
        return ops.mean(error * error)                      # of x_0's dtype, whatever the network computes in

    # --- sampling -----------------------------------------------------------------------------------------

    def encode(self, captions: Sequence[str]) -> tuple:
        """Captions as the arrays of a condition: tokens (B, N, D), pooled (B, D), mask (B, N)."""
        ids, mask = self.tokens(captions)
        with no_grad():
            states = self.text(ids, mask)
        return states.tokens.data, states.pooled.data, states.mask

    def predict(self, x_t, t, cond: tuple):
        """The UNet's output for arrays x_t (B, H, W, C), t (B,) and an encoded condition, on all cores, or the GPU."""
        def one(part: slice):
            tokens, pooled, mask = (a[part] for a in cond)
            with no_grad():
                return self.unet(Tensor(x_t[part]), t[part], TextStates(Tensor(tokens), Tensor(pooled), mask)).data
        return xp_of(x_t).concatenate(list(parallel_map(one, self._parts(len(x_t)))))

    def predict_vjp(self, x_t, t, dy, cond: tuple) -> tuple:
        """What `predict` gives, and dy^T d predict / d x_t, of x_t's shape."""
        def one(part: slice):
            tokens, pooled, mask = (a[part] for a in cond)
            x = Tensor(x_t[part], requires_grad=True)
            with recording():
                y = self.unet(x, t[part], TextStates(Tensor(tokens), Tensor(pooled), mask))
            return y.data, gradients(y, [x], dy[part])[0]
        ys, dxs = zip(*parallel_map(one, self._parts(len(x_t))), strict=True)
        return xp_of(x_t).concatenate(ys), xp_of(x_t).concatenate(dxs)

    def _parts(self, count: int) -> list[slice]:
        """A batch as shards for the cores; a GPU is busy with the whole of it."""
        return shards(count) if self.device == "cpu" else [slice(0, count)]

    def unguided(self) -> NetworkDenoiser:
        """(x_t, t, cond) -> x0_hat as the network says it, unclipped, with its derivative."""
        return NetworkDenoiser(self.schedule, self.config.predicts, self.predict, network_vjp=self.predict_vjp)

    def denoiser(self, scale: float = 2.0) -> ClassifierFree:
        """(x_t, t, cond) -> x0_hat with classifier-free guidance: scale 0 ignores the caption, 1 follows it."""
        return ClassifierFree(self.unguided(), scale, self.encode([""]), clip=static_threshold)

    def trajectory(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
                   sampler: str = "dpm++2m", streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, one sample for each caption, sample i from its own stream (seed, i).

        The last state's x_t is (B, H, W, C) in [-1, 1]; the first is the noise, of which no x0_hat is known yet.
        streams: of the noise; without them a device makes its own, and the same seed's are others on another device.
        captions: '' is the null caption.  sampler: a name in samplers.SAMPLERS.
        """
        check_captions(captions)
        streams = check_streams(captions, streams or sample_streams(self.device, seed, len(captions)))
        size = self.config.image_size
        x_T = to_device(streams.normal((size, size, self.config.unet.channels)), self.device)   # (B, H, W, C)
        path = times(self.schedule, steps)                                          # T-1 ... 0
        states = SAMPLERS[sampler](self.denoiser(scale), x_T, path, self.encode(captions), streams=streams)
        yield State(0, int(path[0]), x_T, None)
        for state in states:
            yield state
        if not xp_of(state.x_t).isfinite(state.x_t).all():
            raise UserError("the pictures are not finite: the model's weights are damaged, or the scale is too large")

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
               sampler: str = "dpm++2m", streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: the end of `trajectory`."""
        return to_numpy(last(self.trajectory(captions, scale=scale, steps=steps, seed=seed, sampler=sampler,
                                             streams=streams)))

    # --- files --------------------------------------------------------------------------------------------

    @classmethod
    def weights_in(cls, saved: checkpoint.Checkpoint) -> dict:
        """The weights in a file; of a training state (step-*.safetensors) the averaged ones."""
        if "train" not in saved.meta:
            return saved.tensors
        weights = {name.removeprefix("ema."): w for name, w in saved.tensors.items() if name.startswith("ema.")}
        weights.pop("n", None)                              # how many steps went into the average
        return weights

    @classmethod
    def shipped(cls) -> Path:
        return SHIPPED


SHIPPED = WEIGHTS / "mnist.safetensors"
