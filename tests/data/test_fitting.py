"""Pictures become pixels of one size: against pixels that can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff.data.fitting import colour, eight_bits, fitted, opaque
from minidiff.errors import UserError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    x = np.zeros((height, width, 3), np.uint8)
    x[:, :width // 2], x[:, width // 2:] = RED, BLUE
    return Image.fromarray(x)


def test_crop_keeps_the_middle():
    """Of 40 x 10 pixels the middle 10 x 10 stays, half red and half blue; nothing is squeezed."""
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 15:25] = 200
    assert (fitted(Image.fromarray(image), 10, 10) == 200).all()
    assert (fitted(Image.fromarray(image.transpose(1, 0, 2)), 10, 10) == 200).all()


def test_pad_keeps_all_between_two_borders():
    x = fitted(halves(40, 20), 40, 40, "pad", (7, 8, 9))
    assert (x[:10] == (7, 8, 9)).all() and (x[30:] == (7, 8, 9)).all()
    assert (x[10:30, :20] == RED).all() and (x[10:30, 20:] == BLUE).all()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.sampled_from(["crop", "pad"]),
       st.tuples(*[st.integers(0, 255)] * 3))
def test_one_colour_stays_it_at_every_size(width, height, w, h, fit, c):
    x = fitted(Image.new("RGB", (width, height), c), w, h, fit, c)
    assert x.shape == (h, w, 3) and x.dtype == np.uint8 and (x == c).all()


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_transparency_is_a_mixture_with_the_background(value, alpha, behind):
    """y = a x + (1 - a) background, to one level."""
    for mode, pixel in (("RGBA", (value, value, value, alpha)), ("LA", (value, alpha))):
        y = np.asarray(opaque(Image.new(mode, (1, 1), pixel), (behind,) * 3))[0, 0]
        assert np.abs(y - (alpha * value + (255 - alpha) * behind) / 255).max() <= 1


def test_a_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    assert np.asarray(opaque(image, (0, 255, 0)))[0].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_sixteen_bits_keep_black_and_white():
    """257 x is x: 65535 is 255, and values between are rounded."""
    levels = np.array([[0, 128, 129, 257, 257 * 100 + 128, 257 * 100 + 129, 65535]], np.uint16)
    assert eight_bits(levels)[0].tolist() == [0, 0, 1, 1, 100, 101, 255]
    image = Image.fromarray(levels)
    assert image.mode.startswith("I") and np.asarray(opaque(image))[0, :, 1].tolist() == [0, 0, 1, 1, 100, 101, 255]


def test_cmyk_and_grey():
    assert np.asarray(opaque(Image.new("CMYK", (1, 1), (0, 0, 0, 0))))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(opaque(Image.new("CMYK", (1, 1), (0, 0, 0, 255))))[0, 0].tolist() == [0, 0, 0]
    assert np.asarray(opaque(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77, 77, 77]
    assert np.asarray(opaque(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]


def test_colours():
    assert colour("white") == (255, 255, 255) and colour("#ff8000") == colour("FF8000") == (255, 128, 0)
    assert colour("Black") == (0, 0, 0) and colour("grey") == colour("gray") == (128, 128, 128)
    for text in ("", "#ff80", "greenish", "#ff80zz", "٣٣٣٣٣٣"):
        with pytest.raises(UserError, match="white, black, grey or #rrggbb"):
            colour(text)
