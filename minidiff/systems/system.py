"""What every system has in common: networks that are trained in stages, a file that holds them, and pictures.

A system is a Module with a name, a configuration and, where it hears text, a tokenizer.  It says how it is trained as
a list of stages, each a part of it, a batch and a loss; whoever trains it need not know more:

    def stages(self, data):
        yield Stage("autoencoder", self.autoencoder, batch, loss, steps=1000)
        z_0 = self.autoencoder.encode(data.x_0)             # the first stage is trained by now, and frozen
        yield Stage("diffusion", self.unet, ...)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from minidiff import checkpoint
from minidiff.data.digits import CaptionedDigits
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.text.tokenizer import Tokenizer

WEIGHTS = Path(__file__).parents[1] / "weights"
LARGEST = 4096                                              # no whole number in a configuration is larger


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a system, trained at one go while everything else in it is frozen."""

    name: str                                               # one word, of the stage's folder
    module: Module                                          # whose parameters are trained
    batch: Callable[..., tuple]                             # (rng, B) -> arrays with the batch along axis 0
    loss: Callable[..., Tensor]                             # (*arrays) -> the mean loss of these samples, ()
    steps: int
    size: int = 64                                          # B
    lr: float = 2e-3                                        # peak of the learning rate
    ema: float = 0.998
    draw: Callable[[], Any] | None = None                   # the picture (pictures.sheet, ...) of how it goes
    paced: bool = False                                     # batch takes a third argument, the share of steps made


class System(Module):
    """A system of the literature.  Subclasses set `name` and `Config`, and define `stages` and, mostly, `sample`.

    `sample(captions, *, seed=0, streams=None, ...)` gives images (B, 28, 28, 1) in [-1, 1], one for each caption;
    its other keywords are the system's own choices (scale, steps, temperature), each with its default.
    """

    name: ClassVar[str]                                     # in files, and on the command line
    Config: ClassVar[type]                                  # a frozen dataclass whose fields all have defaults
    needs: ClassVar[tuple[str, ...]] = ()                   # trained systems that it stands on

    def __init__(self, config, tokenizer: Tokenizer | None, rng: np.random.Generator):
        self.config, self.tokenizer, self.notes = config, tokenizer, {}

    @classmethod
    def new(cls, data: CaptionedDigits, seed: int = 0, config=None) -> Self:
        """An untrained system for this data: its tokenizer learned, its first weights drawn."""
        rng = np.random.default_rng([seed, 1])
        config = config or cls.Config()
        return cls(config, cls.tokenizer_for(data, config, rng), rng)

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config, rng: np.random.Generator) -> Tokenizer | None:
        """The tokenizer of a new system; None where it hears no text."""
        return None

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        """How it is trained.  The next stage is asked for when the last one's averaged weights are in place."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    @classmethod
    def options(cls) -> dict[str, Any] | None:
        """The options of its `sample` with their defaults; None where it draws no pictures of captions."""
        own = inspect.signature(cls.sample).parameters if hasattr(cls, "sample") else {}
        if "captions" not in own:
            return None
        return {name: p.default for name, p in own.items()
                if p.kind is p.KEYWORD_ONLY and name not in ("seed", "streams")}

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, dtype=np.float32, notes: dict | None = None) -> None:
        """Writes weights, configuration and tokenizer as one safetensors file; float16 halves its size."""
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"dtype must be a floating dtype, such as float16, not {np.dtype(dtype)}")
        weights = {name: w.astype(dtype) for name, w in self.state_dict().items()}
        checkpoint.save(path, weights, self.describe() | {"notes": notes or {}})

    def describe(self) -> dict:
        """The system without its weights, as plain JSON values."""
        told = {"system": self.name, "config": dataclasses.asdict(self.config)}
        return told if self.tokenizer is None else told | {"tokenizer": self.tokenizer.state()}

    @classmethod
    def shipped(cls) -> Path:
        """Where the weights are that come with minidiff, if they do."""
        return WEIGHTS / f"{cls.name}.safetensors"

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """The system in a file, or without a path the weights that come with minidiff.

        UserError names the file and what is wrong with it.
        """
        saved = checkpoint.load(cls.shipped() if path is None else path)
        model = cls.from_checkpoint(saved)
        weights = cls.weights_in(saved)
        checkpoint.check_shapes({name: p.shape for name, p in model.parameters().items()}, weights, saved.path)
        model.load_state_dict(weights)
        notes = saved.meta.get("notes")
        model.notes = notes if isinstance(notes, dict) else {}
        return model

    @classmethod
    def weights_in(cls, saved: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
        """The weights of this system in a file of it."""
        return saved.tensors

    @classmethod
    def from_checkpoint(cls, saved: checkpoint.Checkpoint) -> Self:
        """The system that a file describes, its weights still to be set; UserError, naming the file, if it is none."""
        system, path = saved.meta.get("system"), saved.path
        if system != cls.name:
            raise UserError(f"{path} holds {str(system)[:40]!r}, and {cls.name!r} was asked for.")
        if "stage" in saved.meta:
            raise UserError(f"{path} is the state of one stage: name the run's model.safetensors, which is there when "
                            "its last stage is done (go on with --resume).")
        try:
            config = config_from(cls.Config, saved.meta.get("config"))
            told = saved.meta.get("tokenizer")
            room = sum(w.size for w in saved.tensors.values())
            return cls(config, None if told is None else Tokenizer.from_state(told), _Blank(room))
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path} holds a configuration that makes no model ({error}).") from error


def as_read(caption: str) -> str:
    """A caption as tokenizers see it: in lower case, and every word with a space before it, the first one too, so
    that "Seven" and "a seven" name the digit by the same token."""
    words = caption.strip().lower()
    return f" {words}" if words else ""


def caption_tokenizer(data: CaptionedDigits, vocab: int, rng: np.random.Generator) -> Tokenizer:
    """Learned from 20,000 captions of the data."""
    return Tokenizer.train([as_read(data.caption(int(i), rng)) for i in rng.integers(0, len(data.digits), 20_000)],
                           vocab)


def check_captions(captions: Sequence[str]) -> None:
    if isinstance(captions, str) or not captions or not all(isinstance(c, str) for c in captions):
        raise TypeError(f"captions must be a list of str, one for each picture, not {str(captions)[:40]!r}")


def check_finite(images: np.ndarray) -> np.ndarray:
    """The images; UserError where damaged weights or too large a scale made them no pictures."""
    if not np.isfinite(images).all():
        raise UserError("the pictures are not finite: the model's weights are damaged, or the scale is too large")
    return images


def streams_for(captions: Sequence[str], seed: int, streams: SampleStreams | None) -> SampleStreams:
    """The streams that were given, or sample i's own (seed, i); ValueError unless there is one for each caption."""
    check_captions(captions)
    return check_streams(captions, streams or SampleStreams(seed, len(captions)))


def check_streams(captions: Sequence[str], streams: SampleStreams) -> SampleStreams:
    if not hasattr(streams, "normal"):
        raise TypeError(f"streams must be SampleStreams, one for each caption, not {type(streams).__name__}")
    if len(streams) != len(captions):
        raise ValueError(f"streams must be one for each of the {len(captions)} captions, not {len(streams)}")
    return streams


# --- a configuration from a stranger's file ---------------------------------------------------------------

class _Blank:
    """Stands for the generator where a file will set the weights: zeros, and no more of them than the file holds."""

    def __init__(self, room: int):
        self.room = room

    def standard_normal(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        self.room -= math.prod(shape)
        if self.room < 0:
            raise ValueError("it asks for more weights than the file holds")
        return np.zeros(shape, dtype)


def config_from(kind: type, values):
    """A configuration dataclass from a stranger's JSON: every field of its type, within reason.

    A field that an older file does not know takes its default; one that this version does not know is refused.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is no dict")
    default, fields = kind(), {}
    unknown = values.keys() - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {str(min(unknown, key=str))[:40]!r}")
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        value, like = values[f.name], getattr(default, f.name)
        if dataclasses.is_dataclass(like):
            value = config_from(type(like), value)
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
