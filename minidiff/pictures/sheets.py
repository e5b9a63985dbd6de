"""Pictures for people: sheets of images with captions, trajectories as strips and as animations.

Images come in as the model has them, channels last in [-1, 1], and leave as Pillow images.  `save` writes one: the
whole file, or nothing.  Text is set in the font that Pillow carries, so that every machine draws the same picture.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minidiff.checks import whole
from minidiff.data.pixels import to_uint8
from minidiff.errors import UserError
from minidiff.files import check_writable as _check_writable
from minidiff.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

__all__ = ["check_writable", "gif", "save", "sheet", "strip"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF"}

PAPER, INK, SOFT, FRAME = (252, 252, 250), (34, 36, 40), (110, 114, 120), (226, 227, 226)
MARGIN, GAP = 24, 14                                        # pixels around the sheet; between its pictures
TEXT, TITLE = 12, 18                                        # font sizes, pixels
LINE = 1.3                                                  # line height, in font sizes
CELL = 84                                                   # pixels: narrower pictures are centred above their captions
BESIDE = 110                                                # pixels for the captions at the left of a strip


def sheet(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int = 3,
    title: str | None = None,
    caption_width: int = CELL,
    caption_lines: int = 4,
) -> Image:
    """A grid of images with a caption under each.

    images: (N, H, W, 1 or 3), floats in [-1, 1] (clipped) or uint8.  captions: N of them, or None; each is wrapped
    under its image, at least caption_width pixels wide, in at most caption_lines lines.  columns: images in a row; by
    default there are about as many columns as rows.  scale: screen pixels for each pixel, a whole number.
    Raises ValueError for shapes and numbers out of range.
    """
    pixels = _enlarged(images, scale, "images")                                     # (N, h, w, 3) uint8
    count, height, width, _ = pixels.shape
    captions = [""] * count if captions is None else list(captions)
    if len(captions) != count:
        raise ValueError(f"captions has {len(captions)} entries for {count} images; it takes one for each.")
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; it takes at least 1.")
    columns = min(columns, count)

    # the layout: cells of one width, rows as high as their longest caption
    cell = max(width, caption_width) if any(captions) else width
    below = [_wrapped(caption, TEXT, cell, caption_lines) for caption in captions]
    rows = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    heights = [height + _text_height(max(len(below[i]) for i in row)) for row in rows]
    inner = columns * cell + (columns - 1) * GAP
    heading = _wrapped(title or "", TITLE, max(inner, 240), lines=3)
    top = MARGIN + (len(heading) * round(TITLE * LINE) + GAP if heading else 0)

    paper, draw = _paper(2 * MARGIN + max(inner, 240 if heading else 0),
                         top + sum(heights) + GAP * (len(rows) - 1) + MARGIN)
    _write(draw, heading, MARGIN, MARGIN, TITLE, INK)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = MARGIN + column * (cell + GAP)
            _paste(paper, draw, pixels[i], x + (cell - width) // 2, y)
            _write(draw, below[i], x + cell // 2, y + height + TEXT // 2, TEXT, SOFT, anchor="ma")
        y += row_height + GAP
    return paper


def strip(
    states: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    columns: int = 10,
    scale: int = 3,
) -> Image:
    """Trajectories: one sample in each row, from noise at the left to the image at the right.

    states: (S, N, H, W, 1 or 3) in [-1, 1] (clipped), in the order of sampling.  captions: N, at the left; labels: S,
    above the columns.  At most `columns` states are shown, evenly spaced, with the first and the last.
    """
    states = _states(states)
    shown = _evenly(len(states), columns)
    if labels is not None and len(labels) != len(states):
        raise ValueError(f"labels has {len(labels)} entries for {len(states)} states; it takes one for each.")
    if captions is not None and len(captions) != states.shape[1]:
        raise ValueError(f"captions has {len(captions)} entries for {states.shape[1]} samples; it takes one for each.")
    pixels = [_enlarged(states[s], scale, "states") for s in shown]                 # S times (N, h, w, 3)
    count, height, width, _ = pixels[0].shape

    gap = GAP // 2
    left = [_wrapped(caption, TEXT, BESIDE, lines=max(1, int(height / (TEXT * LINE)))) for caption in captions or ()]
    indent = MARGIN + (BESIDE + GAP if any(left) else 0)
    top = MARGIN + (round(TEXT * LINE) + 4 if labels is not None else 0)
    paper, draw = _paper(indent + len(shown) * width + (len(shown) - 1) * gap + MARGIN,
                         top + count * height + (count - 1) * gap + MARGIN)
    for column, s in enumerate(shown):
        x = indent + column * (width + gap)
        if labels is not None:
            _write(draw, _wrapped(labels[s], TEXT, width, lines=1), x + width // 2, MARGIN, TEXT, SOFT, anchor="ma")
        for i in range(count):
            _paste(paper, draw, pixels[column][i], x, top + i * (height + gap))
    for i, lines in enumerate(left):
        y = top + i * (height + gap) + (height - len(lines) * round(TEXT * LINE)) // 2
        _write(draw, lines, MARGIN, y, TEXT, SOFT)
    return paper


def gif(
    states: np.ndarray,
    path: str | os.PathLike,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int = 3,
    title: str | None = None,
    frames: int = 60,
    seconds: float = 4.0,
) -> None:
    """Writes the trajectories as an animation that loops: each frame is a `sheet`, and the last is held for 2 s.

    states: (S, N, H, W, 1 or 3) in [-1, 1] (clipped).  At most `frames` of them are shown, evenly spaced, in `seconds`.
    Raises UserError if `path` does not end in .gif or cannot be written.
    """
    if Path(path).suffix.lower() != ".gif":
        raise UserError(f"An animation's path ends in .gif, got {ascii(os.fspath(path))}.")
    states = _states(states)
    shown = _evenly(len(states), frames)
    sheets = [sheet(states[s], captions, columns=columns, scale=scale, title=title) for s in shown]
    # all frames share the palette of the last one, or else the paper would flicker
    palette = sheets[-1].quantize(256)
    coded = [image.quantize(palette=palette, dither=0) for image in sheets]
    step = max(20, round(1000 * seconds / len(shown)))      # milliseconds; viewers slow down shorter ones
    buffer = io.BytesIO()
    coded[0].save(buffer, "GIF", save_all=True, append_images=coded[1:], loop=0,
                  duration=[step] * (len(coded) - 1) + [2000])
    write_whole(path, buffer.getvalue())


def plain(image: np.ndarray) -> Image:
    """One image (H, W, 1 or 3), uint8 or floats in [-1, 1], pixel for pixel."""
    from PIL import Image
    pixels = to_uint8(image)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save(image: Image, path: str | os.PathLike) -> None:
    """Writes the whole picture, or nothing, in the format that the path's ending names.  Raises UserError."""
    path = check_writable(path)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[path.suffix.lower()])
    write_whole(path, buffer.getvalue())


def check_writable(path: str | os.PathLike) -> Path:
    """The path, if `save` can write a picture there; otherwise UserError.  Call it before a long computation."""
    return _check_writable(path, tuple(FORMATS))


# --- paper, images and text -------------------------------------------------------------------------------

def _paper(width: int, height: int) -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    paper = Image.new("RGB", (width, height), PAPER)
    return paper, ImageDraw.Draw(paper)


def _paste(paper: Image, draw: ImageDraw, pixels: np.ndarray, x: int, y: int) -> None:
    """Pixels (h, w, 3) uint8 with their upper left corner at (x, y), in a thin frame."""
    from PIL import Image

    height, width, _ = pixels.shape
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
    paper.paste(Image.fromarray(pixels), (x, y))


def _write(draw: ImageDraw, lines: list[str], x: int, y: int, size: int, colour: tuple, anchor: str = "la") -> None:
    """Lines of text below each other.  size: of the font, in pixels; anchor: what (x, y) is, in Pillow's terms."""
    for j, line in enumerate(lines):
        draw.text((x, y + j * round(size * LINE)), line, colour, _font(size), anchor=anchor)


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont:
    """Pillow's own font, `size` pixels high."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_height(lines: int) -> int:
    return TEXT // 2 + lines * round(TEXT * LINE) if lines else 0


def _wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of this width, broken between words if possible, cut with '...'.

    Its own line breaks are kept, but not its empty lines.
    """
    font = _font(size)
    done: list[str] = []
    parts = [part for part in text[:80 * lines].split("\n") if part.strip()]
    words = [word for part in parts for word in (*printable(part).split(), "\n")][:-1]
    while words:
        line = words.pop(0)
        while words and words[0] != "\n" and font.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.pop(0)
        if font.getlength(line) > width:                    # one word that is wider than the line
            fits = next(n for n in range(len(line), 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            line, rest = line[:fits], line[fits:]
            words[:0] = [rest] if rest else []
        elif words and words[0] == "\n":
            words.pop(0)
        done.append(line)
        if len(done) == lines and words:
            while len(line) > 1 and font.getlength(line + "...") > width:
                line = line[:-1]
            return [*done[:-1], line.rstrip() + "..."]
    return done


def printable(text: str) -> str:
    """The text with a space or a mark for each character without a shape (line breaks, control characters, ...)."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


# --- arrays -----------------------------------------------------------------------------------------------

def _enlarged(images: np.ndarray, scale: int, name: str) -> np.ndarray:
    """Images (N, H, W, 1 or 3) in [-1, 1] (clipped) or uint8, as (N, H scale, W scale, 3) uint8.

    Raises ValueError, in which the images are called `name`, for another shape or a scale below 1 or not whole.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} has shape {images.shape}; it takes (N, H, W, 1 or 3) with at least one image.")
    whole("scale", scale, 1)
    pixels = np.broadcast_to(to_uint8(images), (*images.shape[:3], 3))              # (N, H, W, 3)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)                       # square pixels, without blur


def _states(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states)
    if states.ndim != 5 or states.shape[0] == 0:
        raise ValueError(f"states has shape {states.shape}; it takes (S, N, H, W, 1 or 3) with S of at least 1.")
    return states


def _evenly(count: int, at_most: int) -> list[int]:
    """At most so many of 0..count-1, evenly spaced, with the first and the last."""
    if at_most < 2:
        raise ValueError(f"at least 2 states are shown, the first and the last; got {at_most}.")
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()
