"""Paper, ink and text: what sheets of pictures, plots and watched images are all drawn with.

A `Canvas` takes pictures, paths and lines of text, in its final pixels. Text is set in the font that Pillow
carries, so every machine draws the same picture. `ticks` and `log_ticks` choose the round values of an axis.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from minidiff.data.pixels import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

__all__ = ["Canvas", "enlarged", "font_of", "log_ticks", "ticks", "wrapped"]

PAPER, INK, SOFT, RULE = (252, 252, 250), (34, 36, 40), (110, 114, 120), (226, 227, 226)
BLUE, PALE_BLUE = (36, 99, 179), (190, 210, 232)

MARGIN, GAP = 24, 14  # pixels around the sheet; between its pictures
TEXT, TITLE = 12, 18  # font sizes, pixels
LINE = 1.3  # line height, in font sizes


# --- paper and ink -----------------------------------------------------------------------------------------


class Canvas:
    """Paper to draw on, in its final pixels. With finer = k it is drawn k times as large and reduced."""

    def __init__(self, width: int, height: int, finer: int = 1):
        from PIL import Image, ImageDraw

        self._size, self._k = (int(width), int(height)), finer
        self._large = Image.new("RGB", (self._size[0] * finer, self._size[1] * finer), PAPER)
        self._draw = ImageDraw.Draw(self._large)

    @property
    def image(self) -> "Image":
        """What has been drawn, at its final size."""
        return self._large if self._k == 1 else self._large.reduce(self._k)

    def picture(self, pixels: np.ndarray, x: int, y: int) -> None:
        """Pixels (h, w, 3) uint8 with their upper left corner at (x, y), in a thin frame; not for finer > 1."""
        from PIL import Image

        height, width, _ = pixels.shape
        self._draw.rectangle((x - 1, y - 1, x + width, y + height), outline=RULE)
        self._large.paste(Image.fromarray(pixels), (x, y))

    def path(self, points: list[tuple[float, float]], colour: tuple[int, int, int], width: float) -> None:
        """A line through the points (x, y), `width` wide; a single point is a dot of radius 2 width."""
        k = self._k
        self._draw.line([(u * k, v * k) for u, v in points], colour, round(width * k), joint="curve")
        if len(points) == 1:
            ((u, v),) = points
            self._draw.circle((u * k, v * k), 2 * width * k, colour)

    def lines(
        self,
        lines: list[str],
        x: float,
        y: float,
        size: int,
        colour: tuple[int, int, int],
        anchor: str = "la",
    ) -> None:
        """Text, each line below the one before; size: of the font, in pixels; anchor: Pillow's, of (x, y)."""
        k = self._k
        for j, line in enumerate(lines):
            at = (x * k, (y + j * round(size * LINE)) * k)
            self._draw.text(at, line, colour, font_of(size * k), anchor=anchor)


@lru_cache(maxsize=8)
def font_of(size: int) -> "FreeTypeFont":
    """Pillow's own font, `size` pixels high."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """The text in at most so many lines of that width, broken between words if it can be, cut with '...'."""
    font = font_of(size)
    # what has no shape on paper (line breaks, control characters, lone surrogates) becomes a space or a mark
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text[: 80 * lines])
    done: list[str] = []
    words = text.split()
    while words:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.pop(0)
        if font.getlength(line) > width:  # one word wider than the line
            fits = next(n for n in range(len(line), 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            line, rest = line[:fits], line[fits:]
            words[:0] = [rest] if rest else []
        done.append(line)
        if len(done) == lines and words:
            while len(line) > 1 and font.getlength(line + "...") > width:
                line = line[:-1]
            return [*done[:-1], line.rstrip() + "..."]
    return done


# --- pictures and axes -------------------------------------------------------------------------------------


def enlarged(images: np.ndarray, scale: int, name: str) -> np.ndarray:
    """Images (N, H, W, 1 or 3) in [-1, 1] (clipped) or uint8, as (N, H scale, W scale, 3) uint8.

    Raises ValueError, calling the images `name`, for another shape and a scale that is no whole number of at least 1.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {images.shape}; each picture is (H, W, 1 or 3), and at least one is taken."
        )
    if not isinstance(scale, int | np.integer) or scale < 1:
        raise ValueError(f"scale is {scale!r}; it takes a whole number of at least 1.")
    pixels = np.broadcast_to(to_uint8(images), (*images.shape[:3], 3))  # (N, H, W, 3)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)  # square pixels, not blurred


def ticks(low: float, high: float, about: int = 8) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between 10^low and 10^high: the fewest of the usual series that give at least four."""
    for series in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        values = [k * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for k in series]
        values = [v for v in values if low <= math.log10(v) <= high]
        if len(values) >= 4:
            return values[:: math.ceil(len(values) / 9)]
    return [v for v in ticks(10**low, 10**high, about=5) if v > 0]
