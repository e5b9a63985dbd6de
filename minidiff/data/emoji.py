"""Emoji: 3,786 small colour pictures with their Unicode names, and compositions that are never trained on.

    data = load_dataset("emoji")                            Noto's style, which comes with minidiff
    data = load_dataset("FOLDER")                           both styles: "noto, grinning face", "twemoji, grinning face"

A folder of emoji holds names.csv (code, base, name, category), held_out.txt (codes) and noto-32.npz, twemoji-32.npz: an
array rgba (N, 32, 32, 4) uint8, whose rows are those of names.csv.

held_out.txt lists 188 pairs of a thing and a skin tone, such as "snowboarder: medium skin tone".  Training sees the
thing in other tones, and the tone on other things.  Their true pictures exist, so that evaluation can tell how near a
model comes to what it has never seen (evaluation/emoji.py).

Noto Emoji: Google, Apache License 2.0.  Twemoji: Twitter and contributors, CC BY 4.0.  Names: Unicode CLDR.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.data.dataset import Dataset, DatasetEntry
from minidiff.data.layouts import npz_arrays, text_in
from minidiff.data.pixels import to_float
from minidiff.errors import UserError

PACKED = Path(__file__).parent / "packed"
NAMES, HELD_OUT = "names.csv", "held_out.txt"
STYLES = {"noto": "noto-32.npz", "twemoji": "twemoji-32.npz"}
LARGEST = 1 << 24                                           # bytes of names.csv
WHITE = 255                                                 # behind what is transparent
PROMPTS = ("grinning face", "robot", "red apple", "flag: Italy", "cat face", "snowman",
           "man firefighter: dark skin tone", "woman astronaut: medium-dark skin tone",
           "snowboarder: medium skin tone", "blue heart", "pizza", "")


@dataclass(frozen=True)
class Name:
    """A row of names.csv."""

    code: str                               # of Unicode, such as 1F3C2-1F3FD
    base: str                               # the code without its skin tone
    name: str                               # "snowboarder: medium skin tone"
    category: str                           # "People & Body"


class Emoji(Dataset):
    """Emoji of one style or of several, one after another; the captions name the style where there are several."""

    name = "emoji"

    def __init__(self, pixels: np.ndarray, names: list[Name], styles: list[str], source: str,
                 held_out: Emoji | None = None):
        """pixels (N, H, W, 3) uint8; names, styles: N of each.  held_out: those that are left out of training."""
        self.pixels, self.names, self.styles, self.source, self.held_out = pixels, names, styles, source, held_out
        self.shape, self.several = pixels.shape[1:], len(set(styles)) > 1
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes())
        digest.update(repr([(n.name, s) for n, s in zip(names, styles, strict=True)]).encode())
        self.fingerprint = digest.hexdigest()
        first = styles[0] if styles else ""
        self.prompts = tuple(f"{first}, {p}" if p and self.several else p for p in PROMPTS)

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices) -> np.ndarray:
        return to_float(self.pixels[np.asarray(indices)])                           # (B, H, W, 3)

    def caption(self, i: int, rng: np.random.Generator | None = None) -> str:
        """Its name, which is always the same."""
        name = self.names[int(i)].name
        return f"{self.styles[int(i)]}, {name}" if self.several else name

    def test(self) -> Emoji | None:
        """The compositions that are never trained on."""
        return self.held_out


def load(folder: Path | None, split: str = "train") -> Emoji:
    """The emoji in a folder, or without one those that come with minidiff; "test" gives the held-out compositions."""
    data = read(PACKED if folder is None else folder)
    return data if split == "train" else data.held_out


def read(folder: Path) -> Emoji:
    """The emoji in a folder less the held-out ones, which are its test images.  UserError where a file is damaged."""
    names = read_names(folder / NAMES)
    held_out = set(text_in(folder / HELD_OUT, LARGEST).split())
    parts = {style: read_pixels(folder / file, len(names)) for style, file in STYLES.items()
             if (folder / file).exists()}
    if not parts:
        raise UserError(f"{ascii(str(folder))} has {NAMES}, and none of {', '.join(STYLES.values())}")
    pixels = np.concatenate(list(parts.values()))                                   # (S N, 32, 32, 3)
    every, styles = names * len(parts), [style for style in parts for _ in names]
    source = f"{len(every)} emoji of " + ("minidiff (Noto, Apache 2.0)" if folder == PACKED else str(folder))

    def those(kept: list[int], held_out: Emoji | None = None) -> Emoji:
        return Emoji(pixels[kept], [every[i] for i in kept], [styles[i] for i in kept], source, held_out)
    unseen = [i for i, n in enumerate(every) if n.code in held_out]
    seen = [i for i, n in enumerate(every) if n.code not in held_out]
    return those(seen, those(unseen))


def read_names(path: Path) -> list[Name]:
    try:
        rows = list(csv.DictReader(io.StringIO(text_in(path, LARGEST), newline="")))
        return [Name(row["code"], row["base"], row["name"].strip(), row["category"]) for row in rows]
    except (KeyError, AttributeError, csv.Error) as error:
        raise UserError(f"{ascii(str(path))} must have the columns code, base, name and category ({error})") from error


def read_pixels(path: Path, count: int) -> np.ndarray:
    """The pictures over white, (count, H, W, 3) uint8."""
    (rgba,) = npz_arrays(path, rgba="uint8")
    if rgba.dtype != np.uint8 or rgba.ndim != 4 or rgba.shape[0] != count or rgba.shape[3] != 4 or 0 in rgba.shape:
        raise UserError(f"{ascii(str(path))}: rgba must be ({count}, H, W, 4) uint8, a row for each of {NAMES}, not "
                        f"{rgba.shape} {rgba.dtype}")
    return over(rgba)


def over(rgba: np.ndarray, background: int = WHITE) -> np.ndarray:
    """Pictures with transparency over a grey level: (..., 4) uint8 -> (..., 3) uint8."""
    # y = round((a x + (255 - a) background) / 255)
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((alpha * rgba[..., :3] + (255 - alpha) * background + 127) // 255).astype(np.uint8)


def holds(folder: Path) -> bool:
    """Whether a folder is one of emoji."""
    return (folder / NAMES).is_file() and (folder / HELD_OUT).is_file()


ENTRY = DatasetEntry(load, reads=holds)
