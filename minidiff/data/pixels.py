"""Pixels in a file are 0..255; images in the computation are -1..1.

    x = u / 127.5 - 1          u = round(127.5 (x + 1))          DDPM section 3.3

Black is 0 and -1, white 255 and 1.
"""

import numpy as np


def to_float(images: np.ndarray) -> np.ndarray:
    """Images as float32 in [-1, 1], from uint8 of any shape.  Raises TypeError for another type."""
    if images.dtype != np.uint8:
        raise TypeError(f"images has dtype {images.dtype}, but to_float takes uint8")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images as uint8, from floats in [-1, 1] of any shape; values out of range are clipped.  uint8 stays as it is.

    Raises TypeError for another type and ValueError for NaN or infinity.
    """
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images has dtype {images.dtype}, but to_uint8 takes uint8, or floats in [-1, 1]")
    if not np.isfinite(images).all():
        raise ValueError("images holds NaN or infinity, but to_uint8 takes finite floats in [-1, 1]")
    return np.rint(127.5 * (np.clip(images, -1, 1) + 1)).astype(np.uint8)
