"""Pictures decoded once: pixels of one size in a file that is mapped into memory, so that many do not fill it.

    ~/.cache/minidiff/pictures/KEY/pixels           (N, H, W, C) uint8, without a header
                                   cache.json       what they are, which were skipped, and the SHA-256 of the pixels

The key is made of the pictures' names, sizes and times of change, and of how they are fitted; so a folder that changes
gets a new one.  A cache that is damaged is made again.  It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.data.fitting import fitted
from minidiff.data.image_file import decode
from minidiff.data.layouts import Captioned
from minidiff.engine.parallel import parallel_map
from minidiff.errors import UserError, brief
from minidiff.files import cache_folder, write_json
from minidiff.input_files import parse_json, read_file
from minidiff.terminal import progress

VERSION = 1                                                 # of how pictures are decoded and fitted
BLOCK = 256                                                 # pictures decoded between two writes
LARGEST = 1 << 28                                           # bytes of cache.json
MIB = 1 << 20


@dataclass(frozen=True)
class Fit:
    """How a picture becomes pixels: see fitting.py."""

    width: int
    height: int
    fit: str = "crop"
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Decoded:
    """pixels (N, H, W, C) uint8, of the pictures `kept`; the others were skipped."""

    pixels: np.ndarray
    kept: list[int]
    skipped: list[tuple[str, str]]          # (a picture, why it cannot be read)
    enlarged: int                           # pictures with fewer pixels than asked for, each way
    sha256: str                             # of the pixels


def decoded(items: Sequence[Captioned], fit: Fit, title: str = "reading the pictures") -> Decoded:
    """The pictures' pixels, from the cache where it has them; grey (C = 1) where no picture has colour.

    A picture that cannot be read is skipped.  UserError where the cache cannot be written.
    """
    folder = cache_folder("minidiff", "pictures") / key(items, fit)
    found = opened(folder, len(items), fit)
    if found is None:
        temporary = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(suffix=".tmp", prefix=folder.name, dir=folder.parent))
            write(items, fit, temporary, title)
            if opened(folder, len(items), fit) is None:     # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(temporary, folder)
        except OSError as error:
            raise UserError(f"the cache {folder} could not be written ({error.strerror}): set XDG_CACHE_HOME to "
                            "another folder") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        found = opened(folder, len(items), fit)
    if found is None:
        raise UserError(f"the cache {folder} could not be read again: another process changed it")
    return found


def key(items: Sequence[Captioned], fit: Fit) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, fit.width, fit.height, fit.fit, fit.background]).encode())
    for item in items:
        digest.update(json.dumps([item.name, item.stamp]).encode())
    return digest.hexdigest()[:32]


def write(items: Sequence[Captioned], fit: Fit, folder: Path, title: str) -> None:
    """Decodes all pictures on all cores, block by block, and writes the two files."""
    kept, skipped, enlarged, grey = [], [], 0, True
    with open(folder / "colour", "wb") as file, progress(title=title, total=len(items), unit="picture",
                                                         leave=False) as bar:
        for first in range(0, len(items), BLOCK):
            block = items[first:first + BLOCK]
            for i, result in enumerate(parallel_map(lambda item: pixels_of(item, fit), block), start=first):
                if isinstance(result, str):
                    skipped.append((items[i].name, result))
                    continue
                pixels, small = result
                grey = grey and bool((pixels == pixels[..., :1]).all())
                enlarged += small
                kept.append(i)
                file.write(pixels.tobytes())
            bar.update(len(block))
    digest = hashlib.sha256()
    if grey:
        with open(folder / "colour", "rb") as file, open(folder / "pixels", "wb") as single:
            while data := file.read(3 * MIB):
                data = data[::3]
                digest.update(data)
                single.write(data)
        (folder / "colour").unlink()
    else:
        os.rename(folder / "colour", folder / "pixels")
        digest = file_digest(folder / "pixels")
    write_json(folder / "cache.json", {
        "shape": [len(kept), fit.height, fit.width, 1 if grey else 3], "kept": kept, "skipped": skipped,
        "enlarged": enlarged, "sha256": digest.hexdigest()})


def pixels_of(item: Captioned, fit: Fit) -> tuple[np.ndarray, bool] | str:
    """(pixels (H, W, 3), whether the picture was enlarged), or why it cannot be read."""
    from PIL import Image
    try:
        data = item.read()
        image = Image.fromarray(data) if isinstance(data, np.ndarray) else decode(data, ascii(item.name))
        small = image.width < fit.width and image.height < fit.height
        return fitted(image, fit.width, fit.height, fit.fit, fit.background), small
    except UserError as error:
        return str(error)
    except Exception as error:                              # a damaged picture may raise anything where it is converted
        return f"{ascii(item.name)} cannot be read as a picture ({brief(error)})"


def opened(folder: Path, count: int, fit: Fit) -> Decoded | None:
    """The pixels in the folder; None where there are none, or where they are damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):     # a UserError is a ValueError
        about = parse_json(read_file(folder / "cache.json", LARGEST))
        shape, kept = tuple(about["shape"]), [int(i) for i in about["kept"]]
        right = shape in {(len(kept), fit.height, fit.width, C) for C in (1, 3)} \
            and all(0 <= i < count for i in kept) and kept == sorted(set(kept))
        path = folder / "pixels"
        if not right or path.stat().st_size != math.prod(shape) \
                or file_digest(path).hexdigest() != about["sha256"]:
            return None
        pixels = np.memmap(path, np.uint8, mode="r", shape=shape) if kept else np.zeros(shape, np.uint8)
        skipped = [(str(name), str(why)) for name, why in about["skipped"]]
        return Decoded(pixels, kept, skipped, int(about["enlarged"]), about["sha256"])
    return None


def file_digest(path: Path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")
