"""What a person sees in a digit besides its value, measured from the pixels: stroke thickness, slant and width.

The image is enlarged twice in each direction by linear interpolation.  Its ink is every point that is at least half
white (127.5).  All measurements use the ink only, so that faint noise or a slight blur hardly changes them.  The ink's
points are (u, v), with u to the right and v down, in pixels of the image, and <.> is the mean over them:

    thickness = 4 <d>                       d: distance of a point to the nearest edge (distance transform)
    slant     = atan(-mu_11 / mu_02)        mu_11 = <(u - <u>) (v - <v>)>,   mu_02 = <(v - <v>)^2>
    width     = max(u') - min(u') + 1/2     u' = u + tan(slant) (v - <v>);   1/2: the breadth of a point

* Thickness, in pixels.  Across a stroke of breadth b the distance to the nearer edge grows from 0 to b/2, and its mean
  is b/4.  The usual alternative, the mean along the stroke's skeleton, is fragile: skeletons have spurs and gaps.
* Slant, in degrees, positive when the top leans right.  It is the shear of the whole mass of ink (which deskewing
  removes), not the direction of one stroke: the bar of a 7 and the foot of a 2 count.
* Width, in pixels.  It is that of the ink's bounding box after the slant is removed, because otherwise every leaning 1
  would be wide.  The box's height is not used: MNIST's digits are scaled to 20 pixels.  The height is 20 for 87% of
  them and at least 17 for 95%, so that nobody would see a "small" or a "large" digit.

Words, with their thresholds (rounded quantiles of the 60,000 training images) and their shares of these images:

    thin     thickness < 2.1   23.5%     (none)    52.2%     bold    thickness > 3.0   24.2%
    left     slant < -7        19.4%     upright   52.7%     right   slant > 15        27.9%
    narrow   width < 11        21.7%     (none)    57.0%     wide    width > 17        21.3%

The middle of thickness and of width has no word ('').  The measurements of a blank image are NaN, and it has no words.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minidiff.data.pixels import to_uint8

INK = 127.5
THIN_BELOW, BOLD_ABOVE = 2.1, 3.0                           # pixels
LEFT_BELOW, RIGHT_ABOVE = -7.0, 15.0                        # degrees; handwriting leans right, so upright is not at 0
NARROW_BELOW, WIDE_ABOVE = 11.0, 17.0                       # pixels

CHUNK = 500                                                 # images measured at a time: about 20 MB of memory


class Words(NamedTuple):
    """The attributes of an image, or those that a caption asks for; '' where there is no word."""

    thickness: str = ""                     # 'thin', '' or 'bold'
    slant: str = ""                         # 'left', 'upright' or 'right'
    width: str = ""                         # 'narrow', '' or 'wide'


VOCABULARY = Words(("thin", "bold"), ("left", "upright", "right"), ("narrow", "wide"))


@dataclass(frozen=True, eq=False)
class Attributes:
    """Measurements of N images, float64; NaN where an image has no ink."""

    thickness: np.ndarray                   # (N,) pixels
    slant: np.ndarray                       # (N,) degrees, positive where the top leans right
    width: np.ndarray                       # (N,) pixels


def measure(images: np.ndarray) -> Attributes:
    """Measures white digits on black: (N, H, W) or (N, H, W, 1), uint8, or floats in [-1, 1]."""
    images = to_uint8(_without_channel(images))                                     # (N, H, W)
    chunks = [_measure_chunk(images[i:i + CHUNK]) for i in range(0, len(images), CHUNK)]
    return Attributes(*np.concatenate([np.empty((3, 0)), *chunks], axis=1))


def _measure_chunk(images: np.ndarray) -> np.ndarray:
    """The rows thickness, slant and width, (3, n)."""
    from scipy.ndimage import distance_transform_edt

    n, H, W = images.shape
    big = _twice(H) @ images.astype(np.float32) @ _twice(W).T                       # (n, 2H, 2W)
    ink = np.pad(big >= INK, ((0, 0), (1, 1), (1, 1)))                              # (n, 2H+2, 2W+2)
    k, row, column = np.nonzero(ink)                        # (P,) the points of ink, ordered by image k
    v, u = (row - 0.5) / 2, (column - 0.5) / 2              # in pixels, from any origin

    count = np.bincount(k, minlength=n).astype(float)
    count[count == 0] = np.nan

    def mean(values: np.ndarray) -> np.ndarray:             # (P,) -> (n,)
        return np.bincount(k, values, minlength=n) / count

    # each image has a frame without ink, so that one call measures all images below each other
    near_row, near_column = distance_transform_edt(ink.reshape(-1, ink.shape[2]), return_distances=False,
                                                   return_indices=True)
    at = (k * ink.shape[1] + row, column)
    # d = |point - nearest point without ink| - half a step, because the edge lies between the two
    d = (np.hypot(near_row[at] - at[0], near_column[at] - column) - 0.5) / 2        # (P,)
    # thickness = 4 <d>
    thickness = 4 * mean(d)                                                         # (n,)

    u, v = u - mean(u)[k], v - mean(v)[k]
    # slant = atan(-mu_11 / mu_02); the height of a point adds 1/12 of a step squared, so that one row has mu_02 > 0
    slant = np.arctan(-mean(u * v) / (mean(v * v) + 1 / 48))

    # u' = u + tan(slant) (v - <v>)
    upright = u + np.tan(slant)[k] * v                                              # (P,)
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, k, upright)
    np.maximum.at(high, k, upright)
    return np.stack([thickness, np.degrees(slant), np.where(np.isnan(count), np.nan, high - low + 0.5)])


def _twice(n: int) -> np.ndarray:
    """The matrix (2n, n) of linear interpolation at the quarter points of every pixel."""
    at = np.clip((np.arange(2 * n) - 0.5) / 2, 0, n - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))).astype(np.float32)


def name(attributes: Attributes) -> list[Words]:
    """The words for each image, by the thresholds above."""

    def pick(x: np.ndarray, low: float, high: float, below: str, between: str, above: str) -> list[str]:
        return np.select([x < low, x > high, ~np.isnan(x)], [below, above, between], "").tolist()

    return [
        Words(*words)
        for words in zip(
            pick(attributes.thickness, THIN_BELOW, BOLD_ABOVE, "thin", "", "bold"),
            pick(attributes.slant, LEFT_BELOW, RIGHT_ABOVE, "left", "upright", "right"),
            pick(attributes.width, NARROW_BELOW, WIDE_ABOVE, "narrow", "", "wide"),
            strict=True,
        )
    ]


def agreement(wanted: Words, found: Words) -> tuple[int, int]:
    """How many of the wanted words were found, and how many were wanted."""
    asked = [(w, f) for w, f in zip(wanted, found, strict=True) if w]
    return sum(w == f for w, f in asked), len(asked)


# Combinations that are left out of training.  A model that can draw them composes what it knows: it has seen each digit
# and each word in many other combinations.  In the margin: how many of the first 10,000 and of all 60,000 images
HELD_OUT = frozenset({
    (0, "thin", "right"),                   # 31    243
    (2, "bold", "left"),                    # 66    442
    (3, "thin", "left"),                    # 53    382
    (4, "bold", "right"),                   # 41    246
    (5, "thin", "upright"),                 # 116   734
    (6, "thin", "left"),                    # 44    321
    (8, "bold", "upright"),                 # 90    680
    (9, "bold", "left"),                    # 52    305     together 493 (4.9%) and 3,353 (5.6%)
})


def held_out(digits: Iterable[int], words: Iterable[Words]) -> np.ndarray:
    """(N,) bool: the images whose digit, thickness and slant are in HELD_OUT.  Training leaves them out."""
    return np.array([(int(d), w.thickness, w.slant) in HELD_OUT for d, w in zip(digits, words, strict=True)], bool)


def _without_channel(images: np.ndarray) -> np.ndarray:
    """Images as (N, H, W); ValueError for other shapes and for sides below 2 pixels."""
    pixels = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    if pixels.ndim != 3 or min(pixels.shape[1:]) < 2:
        raise ValueError(f"images has shape {images.shape}, but measure takes (N, H, W) or (N, H, W, 1) with sides of "
                         "2 pixels or more")
    return pixels
