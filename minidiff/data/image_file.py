"""Pictures in files that may come from a stranger: five formats, and bounds of size, pixels and time.

Pillow knows some forty formats.  It starts Ghostscript for one of them, and it looks at a file's contents, not at its
name.  So the formats are named here.  A small file may also hold very many pixels, or a JPEG with thousands of scans
over them, which take minutes.  The file is therefore given to Pillow in small blocks, and no further ones when the time
is over.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from typing import TYPE_CHECKING

from minidiff.errors import UserError
from minidiff.input_files import read_file

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
LARGEST_FILE = 32 << 20                                     # bytes
MOST_PIXELS = 25_000_000
BLOCK = 256                                                 # bytes that Pillow decodes at a time
SECONDS = 0.9                                               # of a core; 25 million pixels take .1 to .8 of them


def open_image(path: str | os.PathLike) -> Image:
    """The decoded picture in a file, upright; of an animation the first frame.

    UserError where the file is no ordinary file or no picture in one of the FORMATS, where it is damaged, or where it
    has too many bytes or pixels or takes too long.
    """
    return decode(read_file(path, LARGEST_FILE, ": save the picture in a smaller size"), ascii(os.fspath(path)))


def decode(data: bytes, shown: str) -> Image:
    """As `open_image`, of a file's bytes; shown: its name, for messages."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = _InTime(data, shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # about metadata
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise _too_many(shown)
                image.decodermaxblock = BLOCK
                image.load()
                if image.format == "PNG" and "transparency" in image.info:
                    image.info["transparency"] = _as_decoded(image, depth=data[24])
                return ImageOps.exif_transpose(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{shown} is not a readable picture: {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read"
                        ) from error
    except Image.DecompressionBombError as error:           # raised before any pixel is decoded
        raise _too_many(shown) from error
    except Exception as error:                              # a damaged file may raise anything in its decoder
        raise UserError(f"{shown} cannot be read as a picture ({type(error).__name__})") from error


def _as_decoded(image: Image, depth: int):
    """The transparent value of a PNG, which its file gives with `depth` bits, as its pixels are after decoding.

    Of colours with 16 bits Pillow keeps the upper 8.
    """
    value = image.info["transparency"]
    if image.mode == "L" and isinstance(value, int) and depth in (2, 4):
        return value * 255 // (2**depth - 1)                # 0..3 and 0..15 are decoded as 0..255
    if image.mode == "RGB" and depth == 16:
        return tuple(channel >> 8 for channel in value)
    return value


class _InTime(io.BytesIO):
    """A file in memory that can be read for SECONDS."""

    def __init__(self, data: bytes, shown: str):
        super().__init__(data)
        self.shown, self.end = shown, time.thread_time() + SECONDS

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self.end:
            raise UserError(f"{self.shown} takes longer than {SECONDS:g} s to decode: save the picture again, in a "
                            "smaller size")
        return super().read(size)


def _too_many(shown: str) -> UserError:
    return UserError(f"{shown} has too many pixels: at most {MOST_PIXELS // 10**6} million are read")
