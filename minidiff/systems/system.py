"""What every system has in common: networks that are trained in stages, a file that holds them, and pictures.

A system is a Module with a name, a configuration and, where it reads text, a tokenizer.  It says how it is trained as
a list of stages (stage.py); the trainer needs to know nothing else of it:

    def stages(self, data):
        yield Stage("autoencoder", self.autoencoder, batch, loss, steps=1000)
        # the autoencoder has its averaged weights from here on
        yield Stage("diffusion", self.unet, ...)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from minidiff import checkpoint
from minidiff.data.dataset import Dataset
from minidiff.diffusion.samplers import SAMPLERS, State
from minidiff.engine.backend import to_device, xp_of
from minidiff.engine.random import MovedStreams, SampleStreams, generator, sample_streams
from minidiff.errors import UserError
from minidiff.nn.int8 import SCALE, from_int8, rounded, scale_shapes, to_int8
from minidiff.nn.layers import TooManyWeights, Unfilled
from minidiff.nn.module import Module
from minidiff.registry import NoEntry
from minidiff.systems.config import config_from
from minidiff.systems.stage import Stage
from minidiff.text.tokenizer import Tokenizer

WEIGHTS = Path(__file__).parents[1] / "weights"             # of the systems that are trained already
MOST_ARRAYS = 10_000                                        # of weights in a system
NOT_AN_OPTION = ("seed", "streams")                         # of `sample`: every system has them


class System(Module):
    """A system of the literature.  Subclasses set `name` and `Config`, and define `stages` and, mostly, `sample`.

    `sample(captions, *, seed=0, streams=None, ...)` gives images (B, H, W, C) in [-1, 1], one for each caption; its
    other keywords are the system's own options (scale, steps, temperature), each with its default.
    `trajectory(captions, ...)`, where there is one, takes the same options and gives every state on the way.
    """

    name: ClassVar[str]                                     # in files, and on the command line
    Config: ClassVar[type]                                  # a frozen dataclass whose fields all have defaults
    needs: ClassVar[tuple[str, ...]] = ()                   # the trained systems that it is built on
    reads_captions: ClassVar[bool] = True                   # False where each caption must be ''
    most_weights: ClassVar[int] = 1 << 25                   # a configuration that asks for more is refused
    example: ClassVar[str] = ""                             # the file in examples/ that shows what it does
    count: ClassVar[int] = 16                               # pictures that a user who gives no number wants
    at_a_time: ClassVar[int] = 64                           # pictures in one batch
    slow_trajectory: ClassVar[bool] = False                 # whether its states cost more than its last picture
    when_none: ClassVar[Mapping[str, str]] = {}             # what an option of `sample` takes whose default is None
    previews: ClassVar[bool] = False                        # whether its states have `preview()`, a cheap picture
    no_trajectory: ClassVar[str] = "it does not draw its pictures step by step from noise"      # why there is none
    no_judge: ClassVar[str] = ""                            # why no judge can say how good its pictures are
    no_likelihood: ClassVar[str] = "it has no denoiser of pixels that works without a caption"

    def __init__(self, config, tokenizer: Tokenizer | None, rng: np.random.Generator):
        # its file must be able to give it back
        self.config, self.tokenizer, self.notes = config_from(self.Config, config), tokenizer, {}

    # --- a new system -------------------------------------------------------------------------------------

    @classmethod
    def new(cls, data: Dataset, seed: int = 0, config=None, needed: Mapping[str, System] | None = None) -> Self:
        """An untrained system for this data: its tokenizer learned, its first weights drawn.

        needed: the trained systems named in `needs` (systems.load_needed finds them).
        """
        rng = generator(seed, "first weights")
        needed = needed or {}
        missing = [name for name in cls.needs if name not in needed]
        if missing:
            raise ValueError(f"needed must hold the trained systems {', '.join(cls.needs)}, and lacks {missing[0]}")
        config = config_from(cls.Config, config or cls.default_config(data, needed))
        tokenizer = cls.tokenizer_for(data, config, rng, needed)
        cls.check_size(config, tokenizer)
        system = cls(config, tokenizer, rng)
        system.take(needed)
        return system

    def training_minutes(self) -> float:
        """Of the clock, for its own stages, as its file says; NaN where it does not."""
        seconds = self.notes.get("seconds") or {"all": self.notes.get("train_seconds", float("nan"))}
        return sum(seconds.values()) / 60

    @classmethod
    def check_size(cls, config, tokenizer: Tokenizer | None) -> None:
        """ValueError, before memory is taken, where the configuration makes no system or one with too many weights."""
        try:
            cls(config, tokenizer, Unfilled(MOST_ARRAYS, cls.most_weights))
        except TooManyWeights as error:
            raise ValueError(f"its configuration asks for more than {cls.most_weights:,} weights in {MOST_ARRAYS:,} "
                             "arrays") from error

    @classmethod
    def default_config(cls, data: Dataset, needed: Mapping[str, System]):
        """The configuration of a new system for which none is given."""
        return cls.config_for(data.shape)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]):
        """The default configuration for images of this shape (H, W, C)."""
        return cls.Config()

    @classmethod
    def tokenizer_for(cls, data: Dataset, config, rng: np.random.Generator,
                      needed: Mapping[str, System]) -> Tokenizer | None:
        """The tokenizer of a new system; None where it reads no text."""
        return None

    def take(self, needed: Mapping[str, System]) -> None:
        """Copies what it needs of the trained systems that it is built on; without `needs` there is nothing to do."""

    def stages(self, data: Dataset) -> Iterator[Stage]:
        """How it is trained.  The next stage is asked for when the last one's averaged weights are in place."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    # --- sampling -----------------------------------------------------------------------------------------

    @classmethod
    def options(cls) -> dict[str, Any] | None:
        """The options of its `sample` with their defaults; None where it draws no pictures of captions."""
        own = inspect.signature(cls.sample).parameters if hasattr(cls, "sample") else {}
        if "captions" not in own:
            return None
        return {name: p.default for name, p in own.items() if p.kind is p.KEYWORD_ONLY and name not in NOT_AN_OPTION}

    @classmethod
    def load_options(cls) -> set[str]:
        """The options of its `load`, beside the path."""
        return {name for name, p in inspect.signature(cls.load).parameters.items() if p.kind is p.KEYWORD_ONLY}

    @classmethod
    def check_options(cls, path: str | Path | None, options: Mapping[str, Any]) -> None:
        """UserError where it cannot be sampled with these options; asked before the weights are read."""

    @classmethod
    def option_kinds(cls) -> dict[str, str]:
        """The annotation of each option of its `sample`, such as "float | None"."""
        own = inspect.signature(cls.sample).parameters
        return {name: str(p.annotation) for name, p in own.items() if p.kind is p.KEYWORD_ONLY}

    def steps_made(self, options: Mapping[str, Any]) -> int:
        """How many steps a run with these options makes, for a progress bar."""
        return options.get("steps", self.options().get("steps", 1))

    @classmethod
    def check_memory(cls, path: str | Path | None, options: Mapping[str, Any]) -> None:
        """UserError where sampling with these options will not fit in memory; asked before the weights are read."""

    @classmethod
    def check_sampler(cls, name: str) -> None:
        """UserError where it draws with no sampler of this name."""
        if SAMPLERS[name].consistency:
            raise UserError(f"the sampler {name} is for consistency models, which give the end of the flow in one "
                            f"call, and {cls.name} is none: its pictures would be too smooth")

    @classmethod
    def about(cls, path: str | Path) -> list[tuple[str, str]]:
        """What a model's file holds: rows of a name and a value."""
        model = cls.load(path)
        parts = {part: value.parameter_count() for part, value in vars(model).items() if isinstance(value, Module)}
        rows = [("model", f"{cls.name}, {path}"),
                ("parameters", ", ".join(f"{count:,} {part}" for part, count in parts.items()))]
        rows += [(field, str(value)) for field, value in dataclasses.asdict(model.config).items()]
        if model.tokenizer:
            rows.append(("tokenizer", f"{model.tokenizer.vocab_size} tokens"))
        notes = ", ".join(f"{key} {value}" for key, value in model.notes.items())
        return [*rows, ("trained", notes or "not recorded")]

    def likelihood_denoiser(self):
        """(denoiser, condition): of pixels, without a caption and unclipped; UserError where it has none."""
        raise UserError(f"{self.name} has no likelihood: {self.no_likelihood}")

    def streams_for(self, captions: Sequence[str], seed: int, streams: SampleStreams | None):
        """The streams that were given, or sample i's own (seed, i); their normal numbers are on the system's device."""
        check_captions(captions)
        if streams is None:
            return sample_streams(self.device, seed, len(captions))
        check_streams(captions, streams)
        on_host = self.device != "cpu" and isinstance(streams, SampleStreams)
        return MovedStreams(streams, self.device) if on_host else streams

    def noise(self, streams: SampleStreams, shape: tuple[int, ...]):
        """Standard normal numbers (B, *shape), float32, on the system's device."""
        return to_device(streams.normal(shape), self.device)

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, dtype=np.float32, notes: dict | None = None) -> None:
        """Writes weights, configuration and tokenizer as one safetensors file; float16 halves its size, and int8 makes
        it a quarter (nn/int8.py).

        Numbers that are not float32, such as measured statistics, keep their dtype.  UserError for a weight that the
        dtype cannot hold.
        """
        weights = self.state_dict()
        if np.dtype(dtype) == np.int8:
            weights = to_int8(weights)
        elif np.dtype(dtype).kind != "f":
            raise TypeError(f"dtype must be int8 or a floating dtype, such as float16, not {np.dtype(dtype)}")
        else:
            weights = {name: rounded(name, w, dtype) if w.dtype == np.float32 else w for name, w in weights.items()}
        checkpoint.save(path, weights, self.describe() | {"notes": notes or {}})

    def describe(self) -> dict:
        """The system without its weights, as plain JSON values."""
        description = {"system": self.name, "config": dataclasses.asdict(self.config)}
        return description if self.tokenizer is None else description | {"tokenizer": self.tokenizer.state()}

    @classmethod
    def shipped(cls) -> Path:
        """The file of the weights that come with minidiff, whether or not there is one."""
        return WEIGHTS / f"{cls.name}.safetensors"

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """The system in a file, or without a path the weights that come with minidiff.

        path: a model.safetensors, or a training state whose stage trained the whole system: its averaged weights.
        UserError names the file and what is wrong with it.
        """
        header = checkpoint.read_header(cls.shipped() if path is None else path)
        system = cls.from_header(header)
        shapes = {name: p.shape for name, p in system.parameters().items()}
        _weights_in(header, header.arrays, shapes)          # is it this model? asked before memory is taken
        weights = _weights_in(header, checkpoint.load(header.path).tensors, shapes)
        _check_scales(weights, header.path)
        system.load_state_dict(from_int8(weights))
        notes = header.meta.get("notes")
        system.notes = notes if isinstance(notes, dict) else {}
        return system

    @classmethod
    def from_header(cls, header: checkpoint.Header) -> Self:
        """The system that a file describes, its weights still to be set; UserError names the file where it is none."""
        system, path = header.meta.get("system"), header.path
        if system != cls.name:
            raise UserError(f"{path} holds {str(system)[:40]!r}, and {cls.name!r} was asked for.")
        try:
            config = config_from(cls.Config, header.meta.get("config"))
            state = header.meta.get("tokenizer")
            room = min(cls.most_weights, sum(math.prod(shape) for shape, _ in header.arrays.values()))
            return cls(config, None if state is None else Tokenizer.from_state(state),
                       Unfilled(min(MOST_ARRAYS, len(header.arrays)), room))
        except TooManyWeights as error:
            raise UserError(f"{path} holds a configuration that asks for more weights than the file holds, or than "
                            f"{cls.most_weights:,}.") from error
        except NoEntry as error:
            raise UserError(f"{path} needs an entry that this program does not have ({error}): load it in the program "
                            "that registers it.") from error
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise UserError(f"{path} holds a configuration that makes no model ({error}).") from error


def _weights_in(header: checkpoint.Header, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The arrays that are the model's weights: of a training state the averaged ones.  UserError where they are not of
    these shapes, or where the state is of a stage that trained a part of the system only."""
    weights, path = dict(arrays), header.path
    if "stage" in header.meta:
        weights = {name.removeprefix("ema."): a for name, a in arrays.items() if name.startswith("ema.")}
        weights.pop("n", None)                              # how many steps went into the average
        if weights.keys() != shapes.keys():
            raise UserError(f"{path} is the state of one stage: name the run's model.safetensors, which is written "
                            "after the last stage (continue with --resume).")
    checkpoint.check_shapes({**shapes, **scale_shapes(weights, shapes)}, weights, path)
    return weights


def _check_scales(weights: Mapping[str, np.ndarray], path: Path) -> None:
    """UserError unless all scales of weights in 8 bits are float32 numbers whose weights are finite."""
    for name, scale in weights.items():
        if name.endswith(SCALE) and (scale.dtype != np.float32 or not
                                     ((scale >= 0) & (scale <= np.finfo(np.float32).max / 128)).all()):
            raise UserError(f"{path} holds the scale {name!r}, which must be float32 numbers of at least 0 whose "
                            f"weights are finite.")


# --- what samplers of systems check -----------------------------------------------------------------------

def check_captions(captions: Sequence[str]) -> None:
    if isinstance(captions, str) or not isinstance(captions, Sequence) or not captions \
            or not all(isinstance(c, str) for c in captions):
        raise TypeError("captions must be a list of str, one for each picture and at least one, not "
                        f"{str(captions)[:40]!r}")


def check_finite(images):
    """The images; UserError where damaged weights or too large a scale gave NaN or infinity."""
    if not xp_of(images).isfinite(images).all():
        raise UserError("the pictures are not finite: the model's weights are damaged, or the scale is too large")
    return images


def finite_states(states: Iterator[State]) -> Iterator[State]:
    """The states of a sampler; UserError after the last one where its images are not finite."""
    for state in states:
        yield state
    check_finite(state.x_t)


def check_streams(captions: Sequence[str], streams: SampleStreams):
    if not hasattr(streams, "normal"):
        raise TypeError(f"streams must be SampleStreams, one for each caption, not {type(streams).__name__}")
    if len(streams) != len(captions):
        raise ValueError(f"streams must be one for each of the {len(captions)} captions, not {len(streams)}")
    return streams


# --- captions as tokenizers see them ----------------------------------------------------------------------

def as_read(caption: str) -> str:
    """A caption as tokenizers see it: in lower case, and every word with a space before it, the first one too, so
    that "Seven" and "a seven" name the digit by the same token.  An accent is a part of its letter (Unicode's form
    NFC), also where a system such as macOS writes it as a character of its own."""
    words = unicodedata.normalize("NFC", caption).strip().lower()
    return f" {words}" if words else ""


def caption_tokenizer(data: Dataset, vocab: int, rng: np.random.Generator) -> Tokenizer:
    """A tokenizer learned from 20,000 captions of the data."""
    indices = rng.integers(0, len(data), 20_000)
    return Tokenizer.train([as_read(data.caption(int(i), rng)) for i in indices], vocab)
