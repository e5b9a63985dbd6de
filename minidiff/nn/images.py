"""Images as a caller gives them: one check for every function of every system that takes clean images."""

from __future__ import annotations

import warnings

from minidiff.engine.backend import plain, wide
from minidiff.nn.image_tower import check_images

ROUNDING = 1e-3                                             # how far beyond -1 and 1 a float16 may be rounded


def clean_images(images, shape: tuple[int, int, int] | None = None):
    """The images (B, H, W, C) in [-1, 1] as a plain array of float32 or float64.

    shape: (H, W, C), where only one is right.  TypeError for 8-bit values and other whole numbers, ValueError for
    another shape, NaN, or numbers out of range.  A warning where nothing is darker than the middle grey, 0, as in
    images in [0, 1].
    """
    images = plain(images)
    if images.dtype.kind != "f":
        raise TypeError(f"images must be floats in [-1, 1], not {images.dtype}: minidiff.data.pixels.to_float converts "
                        "8-bit values")
    if shape is not None:
        check_images(images, shape)
    if images.size:
        low, high = float(images.min()), float(images.max())
        if not -1 - ROUNDING <= low <= high <= 1 + ROUNDING:
            raise ValueError(f"images must be in [-1, 1], where black is -1, not {low:g} to {high:g}")
        if 0 <= low < high:
            warnings.warn(f"the images are within {low:g} and {high:g}: black is -1 here, so 2 x - 1 converts images "
                          "in [0, 1]", stacklevel=3)
    return wide(images)
