"""Text-to-image diffusion in pixel space: the system of the main job.

    training    x_t = alpha_t x_0 + sigma_t eps,   y a caption of x_0, dropped to '' now and then
                L = E || v - v_theta(x_t, t, y) ||^2,   v = alpha_t eps - sigma_t x_0     (Salimans & Ho 2022)
    sampling    x_T ~ N(0, I), then DPM-Solver++(2M) down to x_0 with classifier-free guidance
                eps = eps_uncond + scale (eps_cond - eps_uncond)                          (Ho & Salimans 2022)

A byte-level BPE tokenizer, a small transformer encoder and a UNet that hears the caption twice: pooled,
through its norms, and word by word, through cross-attention (as GLIDE, Imagen and Stable Diffusion do).
"""

from __future__ import annotations

import dataclasses
import math
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
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.engine import ops
from minidiff.engine.backend import Streams, device_of, streams_on, to_device, to_numpy, xp_of
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextToImageConfig:
    """Everything that makes one model; it travels in the checkpoint."""

    image_size: int = 28
    schedule: str = "cosine"                # a name in schedules.SCHEDULES
    T: int = 1000                           # training times
    predicts: str = "v"                     # eps, x0 or v
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(text=64))

    def __post_init__(self):
        check_predicts(self.predicts)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.image_size < 1 or self.image_size % self.unet.multiple:
            raise ValueError(f"image_size must be a multiple of {self.unet.multiple}, not {self.image_size}")
        if self.unet.text != self.text.width:
            raise ValueError(f"unet.text ({self.unet.text}) must be text.width ({self.text.width})")


class TextToImage(Module):
    """A caption encoder and a UNet, with the tokenizer and the schedule that they were trained with."""

    def __init__(self, config: TextToImageConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        self.config, self.tokenizer, self.notes = config, tokenizer, {}
        self.schedule = SCHEDULES[config.schedule](config.T)
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
        """Captions as ids and mask, (B, N): in lower case, and every word with a space before it, the first one too,
        so that "Seven" and "a seven" name the digit by the same token.  Nothing but white space is the null caption."""
        return self.tokenizer.batch([_as_read(c) for c in captions], self.config.text.length)

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
                   sampler: str = "dpm++2m", streams: Streams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, one sample for each caption, sample i from its own stream (seed, i).

        The last state's x_t is (B, H, W, C) in [-1, 1]; the first is the noise, of which no x0_hat is known yet.
        streams: of the noise; without them a device makes its own, and the same seed's are others on another device.
        captions: '' is the null caption.  sampler: a name in samplers.SAMPLERS.
        """
        if isinstance(captions, str) or not captions or not all(isinstance(c, str) for c in captions):
            raise TypeError(f"captions must be a list of str, one for each picture, not {str(captions)[:40]!r}")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
        streams = streams or streams_on(self.device, seed, len(captions))
        size = self.config.image_size
        x_T = to_device(streams.normal((size, size, self.config.unet.channels)), self.device)   # (B, H, W, C)
        path = times(self.schedule, steps)                                          # T-1 ... 0
        noise = {"streams": streams} if sampler == "ddpm" else {}
        yield State(0, int(path[0]), x_T, None)
        for state in SAMPLERS[sampler](self.denoiser(scale), x_T, path, self.encode(captions), **noise):
            yield state
        if not xp_of(state.x_t).isfinite(state.x_t).all():
            raise UserError("the pictures are not finite: the model's weights are damaged, or the scale is too large")

    def sample(self, captions: Sequence[str], *, scale: float = 2.0, steps: int = 20, seed: int = 0,
               sampler: str = "dpm++2m", streams: Streams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption: the end of `trajectory`."""
        return to_numpy(last(self.trajectory(captions, scale=scale, steps=steps, seed=seed, sampler=sampler,
                                             streams=streams)))

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, dtype=np.float32, notes: dict | None = None) -> None:
        """Writes weights, configuration and tokenizer as one safetensors file; float16 halves its size."""
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"dtype must be a floating dtype, such as float16, not {np.dtype(dtype)}")
        weights = {name: w.astype(dtype) for name, w in self.state_dict().items()}
        checkpoint.save(path, weights, self.describe() | {"notes": notes or {}})

    def describe(self) -> dict:
        """The model without its weights, as plain JSON values."""
        return {"system": SYSTEM, "config": dataclasses.asdict(self.config), "tokenizer": self.tokenizer.state()}

    @classmethod
    def load(cls, path: str | Path | None = None) -> TextToImage:
        """The model in a file, or without a path the weights that come with minidiff.

        Of a training state (step-*.safetensors) it takes the averaged weights.  UserError names the file and what is
        wrong with it.
        """
        saved = checkpoint.load(SHIPPED if path is None else path)
        model, weights = cls.from_checkpoint(saved), saved.tensors
        if "train" in saved.meta:
            weights = {name.removeprefix("ema."): w for name, w in weights.items() if name.startswith("ema.")}
            weights.pop("n", None)                          # how many steps went into the average
        checkpoint.check_shapes({name: p.shape for name, p in model.parameters().items()}, weights, saved.path)
        model.load_state_dict(weights)
        notes = saved.meta.get("notes")
        model.notes = notes if isinstance(notes, dict) else {}
        return model

    @classmethod
    def from_checkpoint(cls, saved: checkpoint.Checkpoint) -> TextToImage:
        """The model that a file describes, its weights still to be set; UserError, naming the file, if it is none."""
        system, path = saved.meta.get("system"), saved.path
        if system != SYSTEM:
            raise UserError(f"{path} holds {str(system)[:40]!r}, and {SYSTEM!r} was asked for.")
        try:
            config = _config_from(TextToImageConfig, saved.meta.get("config"))
            room = sum(w.size for w in saved.tensors.values())
            return cls(config, Tokenizer.from_state(saved.meta.get("tokenizer")), _Blank(room))
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"{path} holds a configuration that makes no model ({error}).") from error


def _as_read(caption: str) -> str:
    words = caption.strip().lower()
    return f" {words}" if words else ""


SYSTEM = "text-to-image"
SHIPPED = Path(__file__).parents[1] / "weights" / "mnist.safetensors"
LARGEST = 4096                                              # no whole number in a configuration is larger


class _Blank:
    """Stands for the generator where a file will set the weights: zeros, and no more of them than the file holds."""

    def __init__(self, room: int):
        self.room = room

    def standard_normal(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        self.room -= math.prod(shape)
        if self.room < 0:
            raise ValueError("it asks for more weights than the file holds")
        return np.zeros(shape, dtype)


def _config_from(kind: type, values):
    """A configuration dataclass from a stranger's JSON: every field there, of its type, within reason."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is no dict")
    default, fields = kind(), {}
    for f in dataclasses.fields(kind):
        value, like = values[f.name], getattr(default, f.name)
        if dataclasses.is_dataclass(like):
            value = _config_from(type(like), value)
        elif isinstance(like, tuple):
            value = tuple(_checked(f.name, v, like[0]) for v in list(value)[:16])
        else:
            value = _checked(f.name, value, like)
        fields[f.name] = value
    return kind(**fields)


def _checked(name: str, value, like):
    if type(value) is not type(like) or (isinstance(value, int) and not 0 <= value <= LARGEST):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value
