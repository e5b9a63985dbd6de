"""A person's own captioned pictures as a data set: any folder or file that layouts.py reads.

    data = load_dataset("my_pictures", options={"size": (64, 64)})

    layouts --> which picture has which captions       fitting --> pixels of one size
    picture_cache --> decoded once, mapped into memory

A folder that holds a folder `train` is trained on that one; its test images are those of `test` (or `validation`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from minidiff.checks import one_of
from minidiff.data import picture_cache
from minidiff.data.dataset import Dataset, DatasetEntry
from minidiff.data.fitting import FITS, WHITE
from minidiff.data.layouts import LONGEST_CAPTION, Listing, listing
from minidiff.data.picture_cache import Decoded, Fit
from minidiff.data.pixels import to_float
from minidiff.errors import UserError
from minidiff.files import user_path
from minidiff.terminal import say

SIDE = 32                                                   # pixels, where no size is asked for
LARGEST_SIDE = 256
MOST_SKIPPED = 0.1                                          # the share of pictures that may be unreadable
NAMED = 3                                                   # files named in a message
TESTS = ("test", "validation", "val")                       # folders beside `train`


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are read.

    size        (width, height) in pixels
    fit         "crop" cuts the middle out of a picture of another shape; "pad" keeps all of it, between borders
    background  (red, green, blue) where a picture is transparent, and of borders
    flip        each picture is also there as its mirror image; wrong where captions say left and right
    captions    a .csv or .jsonl with the captions, where they are not beside the pictures
    """

    size: tuple[int, int] = (SIDE, SIDE)
    fit: str = "crop"
    background: tuple[int, int, int] = WHITE
    flip: bool = False
    captions: Path | None = None

    def __post_init__(self):
        one_of("fit", self.fit, FITS, UserError)
        if len(self.size) != 2 or not all(type(n) is int and 1 <= n <= LARGEST_SIDE for n in self.size):
            raise UserError(f"size must be a width and a height of 1 to {LARGEST_SIDE} pixels, not {self.size}")


class OwnPictures(Dataset):
    """Pictures with their captions, at one size."""

    name = "pictures"                                       # in files; messages name the folder, which the user gave

    def __init__(self, pixels: np.ndarray, captions: list[tuple[str, ...]], source: str, sha256: str = "",
                 flip: bool = False, test: OwnPictures | None = None):
        """pixels (N, H, W, C) uint8; captions: at least one for each; sha256: of the pixels, where it is known."""
        self.pixels, self.captions, self.source, self.flip, self._test = pixels, captions, source, flip, test
        self.shape = pixels.shape[1:]
        self._sha256 = sha256 or hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()

    @property
    def title(self) -> str:
        return f"the data set of {self.source}"

    def __len__(self) -> int:
        return len(self.pixels) * (1 + self.flip)           # the mirror images follow the pictures

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The number of each image, (N,)."""
        return np.arange(len(self))

    def images(self, indices) -> np.ndarray:
        indices = self._numbers[indices]                    # refuses what is out of range, and counts -1 from the end
        number, mirrored = indices % len(self.pixels), indices >= len(self.pixels)
        x = np.asarray(self.pixels[number])                                         # (B, H, W, C)
        x[mirrored] = x[mirrored, :, ::-1]
        return to_float(x)

    def caption(self, i: int, rng: np.random.Generator) -> str:
        captions = self.captions[range(len(self))[i] % len(self.pixels)]
        return captions[int(rng.integers(len(captions)))]

    def test(self) -> OwnPictures | None:
        return self._test

    @cached_property
    def fingerprint(self) -> str:
        about = json.dumps([self._sha256, self.pixels.shape, self.flip, self.captions])
        return hashlib.sha256(about.encode()).hexdigest()

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Captions of eleven pictures, spread over all of them, and none ('')."""
        chosen = sorted({round(i) for i in np.linspace(0, len(self.pixels) - 1, 11)})
        return (*dict.fromkeys(self.captions[i][0] for i in chosen), "")


def load(path: Path, split: str = "train", options: PictureOptions | None = None) -> OwnPictures:
    """The pictures in a folder or file; UserError where there are none, or where too many cannot be read."""
    path, options = user_path(path), options or PictureOptions()
    there = test_folder(path)
    if split != "train":
        if there is None:
            raise UserError(f"{ascii(str(path))} has no test pictures: put them into a folder {TESTS[0]} beside "
                            f"the folder train")
        return read(there, options)
    test = None if there is None else read(there, options)
    return read(path / "train" if there is not None or only_train(path) else path, options, test)


def test_folder(path: Path) -> Path | None:
    """The folder of test pictures beside a folder `train`."""
    if not (path / "train").is_dir():
        return None
    return next((path / name for name in TESTS if (path / name).is_dir()), None)


def only_train(path: Path) -> bool:
    """Whether the folder holds a folder `train`, and nothing else."""
    return path.is_dir() and [p.name for p in path.iterdir() if not p.name.startswith(".")] == ["train"]


def read(path: Path, options: PictureOptions, test: OwnPictures | None = None) -> OwnPictures:
    found = listing(path, options.captions)
    if not found.items:
        raise UserError(f"{ascii(str(path))} holds no picture that has a caption"
                        + named(", such as", found.without_caption)
                        + named("; captions without a picture:", found.without_picture)
                        + named("; skipped in a .tar:", with_reasons(found.skipped)))
    fit = Fit(*options.size, options.fit, options.background)
    decoded = picture_cache.decoded(found.items, fit)
    tell(path, found, decoded, options)
    if stamps(listing(path, options.captions)) != stamps(found):
        raise UserError(f"{ascii(str(path))} changed while it was read: run the command again")
    captions = [found.items[i].captions for i in decoded.kept]
    source = f"{len(captions)} picture{'s' * (len(captions) > 1)} of {path}"
    return OwnPictures(decoded.pixels, captions, source, decoded.sha256, options.flip, test)


def stamps(found: Listing) -> list[tuple[str, tuple[int, ...]]]:
    return [(item.name, item.stamp) for item in found.items]


def tell(path: Path, found: Listing, decoded: Decoded, options: PictureOptions) -> None:
    """Says once what was left out; UserError where too many pictures cannot be read."""
    total = len(found.items)
    if len(decoded.skipped) > max(1, MOST_SKIPPED * total) or not decoded.kept:
        raise UserError(f"{len(decoded.skipped)} of the {total} pictures in {ascii(str(path))} cannot be read: "
                        f"{decoded.skipped[0][1]}")
    remarks = [
        ("pictures that cannot be read", with_reasons(decoded.skipped)),
        ("pictures without a caption", found.without_caption),
        ("captions without a picture", found.without_picture),
        ("in a .tar", with_reasons(found.skipped))]
    for what, names in remarks:
        if names:
            say(f"skipped {what}: {len(names)}" + named(",", names))
    if found.cut:
        say(f"shortened captions to {LONGEST_CAPTION:,} characters: those of {found.cut} of the {total} pictures")
    if decoded.enlarged:
        say(f"enlarged smaller pictures to {options.size[0]}x{options.size[1]}: {decoded.enlarged} of {total}")
    if len(decoded.kept) == 1:
        say("there is one picture: a model can only learn to repeat it")


def with_reasons(skipped: list[tuple[str, str]]) -> list[str]:
    return [f"{name} ({why})" for name, why in skipped]


def named(before: str, names: list[str]) -> str:
    """The first names, after `before`; "" where there are none."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{before} {', '.join(names[:NAMED])}{more}" if names else ""


ENTRY = DatasetEntry(load, reads=lambda path: True, options=PictureOptions)
