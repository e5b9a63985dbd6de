"""The contract of a data set: captioned images, asked for by their indices.

    data = load_dataset("digits")                           a registered name, or a folder or file of pictures
    x_0 = data.images([3, 1, 4])                            (3, H, W, C) float32 in [-1, 1]
    data.caption(3, rng)                                    "a bold seven leaning left"

Systems and the trainer see this contract only; what is known of digits stays with the digits (digits.py).  A data set
of your own is a subclass of `Dataset`, entered in `DATASETS` by `minidiff.register_dataset(name, load)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minidiff.data.pixels import to_float, to_uint8
from minidiff.errors import UserError, user_code
from minidiff.files import user_path
from minidiff.registry import Registry


class Dataset:
    """Captioned images.  A subclass sets the attributes and defines `__len__`, `images` and `caption`."""

    name: str                               # its name in DATASETS
    shape: tuple[int, int, int]             # (H, W, C) of an image
    source: str                             # where the images come from, for people
    fingerprint: str                        # differs where the images or captions differ: a run resumes with its own
    labels: np.ndarray | None = None        # optional: the class of each image, (N,), for the digit classifier

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the data set {self.name!r}"

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__")

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of these indices, (B, H, W, C) float32, 8-bit values u / 127.5 - 1; a new array."""
        raise NotImplementedError(f"{type(self).__name__} has no images")

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """A caption of image i; where several are possible, rng draws one."""
        raise NotImplementedError(f"{type(self).__name__} has no caption")

    def test(self) -> Dataset | None:
        """The data set's test images, which are not trained on; None where it has none."""
        return None

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Captions for previews while a model trains; by default those of the first images, and none ('')."""
        rng = np.random.default_rng(int.from_bytes(b"captions of previews", "big"))     # the seed of no other use
        return (*(self.caption(i, rng) for i in range(min(11, len(self)))), "")

    def text(self, rng: np.random.Generator) -> str:
        """Text without an image, for a language model; by default five captions of one random image."""
        i = int(rng.integers(0, len(self)))
        return ". ".join(self.caption(i, rng) for _ in range(5))


class Questions(Protocol):
    """What a classifier of a data set's images is asked: several questions, each with its classes."""

    classes: tuple[int, ...]                # the number of classes of each question

    def labels(self, data: Dataset, indices: np.ndarray) -> np.ndarray:
        """The right answers for images of the data set, (B, questions)."""

    def asked(self, captions: Sequence[str]) -> np.ndarray:
        """The answers that captions ask for, (B, questions); -1 where a caption does not say."""


@dataclass(frozen=True)
class DatasetEntry:
    """An entry of DATASETS.

    load        (folder or file, or None; "train" or "test") -> the data set
    questions   for classifier guidance; None where the data set has none
    reads       whether a folder or file is this data set's; the first entry that says so reads it.  None: of none
    options     a dataclass of how it is loaded, the third argument of `load`; None where there is nothing to choose
    """

    load: Callable[..., Dataset]
    questions: Questions | None = None
    reads: Callable[[Path], bool] | None = None
    options: type | None = None

    def option_names(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self.options)] if self.options else []


DATASETS: Registry[DatasetEntry] = Registry("data set", "minidiff.datasets", {
    "digits": "minidiff.data.digits:ENTRY", "emoji": "minidiff.data.emoji:ENTRY"})
DEFAULT = "digits"
PICTURES = "minidiff.data.own_pictures:ENTRY"               # reads what no entry of DATASETS reads


def load_dataset(data: str | Path | None = None, split: str = "train", options: Mapping[str, Any] | None = None, *,
                 shape: tuple[int, int, int] | None = None) -> Dataset:
    """A data set by its name in DATASETS, or by a folder or file of captioned pictures; None gives the digits.

    options: of this data set, such as {"size": (64, 64)} of pictures (own_pictures.PictureOptions).  shape: (H, W, C)
    of a model's images, which sets the size where there is a choice.  UserError where there is neither such a name nor
    such a file, where the data set is empty, or where it has no such option.
    """
    name = str(data) if data is not None else DEFAULT
    entry, path = entry_and_path(data)
    own, options = entry.option_names(), dict(options or {})
    if shape is not None and "size" in own:
        options = {"size": (shape[1], shape[0])} | options
    if unknown := [option for option in options if option not in own]:
        raise UserError(f"{name!r} takes no option {unknown[0]}: its options are {', '.join(own) or 'none'}")
    with user_code(f"the data set {name!r} cannot be loaded"):
        arguments = (entry.options(**options),) if entry.options else ()
        loaded = entry.load(path, split, *arguments)
        check_dataset(loaded)
    return loaded


def entry_and_path(data: str | Path | None) -> tuple[DatasetEntry, Path | None]:
    """The entry that loads this data, and the folder or file that it reads; UserError where there is none."""
    name = str(data) if data is not None else DEFAULT
    if name in DATASETS:
        return entry_of(DATASETS[name]), None
    path = user_path(data)
    if not path.exists():
        raise UserError(f"{name!r} is neither a folder or file, nor a data set: the data sets are "
                        f"{', '.join(DATASETS)}")
    return reader_of(path), path


def reader_of(path: Path) -> DatasetEntry:
    """The entry that reads a folder or file."""
    entries = (entry_of(DATASETS[name]) for name in DATASETS)
    return next((entry for entry in entries if entry.reads is not None and entry.reads(path)),
                entry_of(_pictures()))


def entry_of(entry) -> DatasetEntry:
    """An entry point may name a function."""
    return entry if isinstance(entry, DatasetEntry) else DatasetEntry(entry)


def _pictures() -> DatasetEntry:
    module, attribute = PICTURES.split(":")
    return getattr(import_module(module), attribute)


def check_dataset(data: Dataset) -> None:
    """UserError unless the data set has at least one image, of the shape that it promises."""
    if len(data) < 1:
        raise UserError(f"the data set {data.name!r} has no images")
    shape = tuple(data.shape)
    if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3):
        raise UserError(f"the data set {data.name!r} must have images of shape (H, W, C) with 1 channel (grey) "
                        f"or 3 (RGB), not {shape}")
    x = data.images([0])
    if not isinstance(x, np.ndarray) or x.shape != (1, *shape) or x.dtype != np.float32 or not (abs(x) <= 1).all():
        raise UserError(f"the data set {data.name!r} must give images as float32 arrays {(1, *shape)} in [-1, 1]")
    if (abs(x - to_float(to_uint8(x))) > 1e-5).any():
        raise UserError(f"the data set {data.name!r} must give images of 8-bit values u / 127.5 - 1, as "
                        "to_float(to_uint8(x)) of minidiff.data.pixels does")
