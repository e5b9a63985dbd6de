"""Any picture as pixels of one size: transparency over a colour, 16 bits to 8, cut or bordered to the shape, resized.

    crop    the largest middle part of the wanted shape; nothing is distorted, the edges are lost
    pad     the whole picture between two borders of the background's colour
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from minidiff.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "pad")
WHITE = (255, 255, 255)
COLOURS = {"white": WHITE, "black": (0, 0, 0), "grey": (128, 128, 128), "gray": (128, 128, 128)}


def fitted(image: Image, width: int, height: int, fit: str = "crop", background: tuple[int, int, int] = WHITE
           ) -> np.ndarray:
    """The picture as (height, width, 3) uint8; the three channels of a grey picture are equal."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    image = opaque(image, background)
    method = Pillow.Resampling.LANCZOS
    if fit == "pad":
        image = ImageOps.pad(image, (width, height), method, color=background)
    else:
        image = ImageOps.fit(image, (width, height), method)
    return np.asarray(image)                                                        # (height, width, 3)


def opaque(image: Image, background: tuple[int, int, int] = WHITE) -> Image:
    """The picture in RGB; what is transparent in it shows the background."""
    from PIL import Image as Pillow

    if image.mode.startswith("I"):                          # 16 bits, whatever the order of the bytes
        values = np.asarray(image)
        pixels = np.repeat(eight_bits(values)[..., None], 3, axis=2)                # (height, width, 3)
        if "transparency" in image.info:
            pixels[values == image.info["transparency"]] = background
        return Pillow.fromarray(pixels)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        below = Pillow.new("RGBA", image.size, (*background, 255))
        return Pillow.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")                             # grey, palette, CMYK, YCbCr, ...


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """0..65535 as uint8: 257 x is the 16-bit value of x, so white stays white."""
    return ((pixels.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def colour(text: str) -> tuple[int, int, int]:
    """(red, green, blue) of "white", "black", "grey" or "#rrggbb"; UserError for other texts."""
    digits = text.removeprefix("#")
    if text.lower() in COLOURS:
        return COLOURS[text.lower()]
    if len(digits) != 6 or any(c not in "0123456789abcdefABCDEF" for c in digits):
        raise UserError(f"a colour is white, black, grey or #rrggbb, such as #ff8000, not {text[:40]!r}")
    return tuple(int(digits[i:i + 2], 16) for i in (0, 2, 4))
