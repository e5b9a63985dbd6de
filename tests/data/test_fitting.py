"""Pictures become pixels of one size: against pixels that can be worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff.data.fitting import colour, eight_bits, fitted, opaque
from minidiff.data.image_file import decode
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


def written_png(depth: int, channels: tuple[int, ...], transparent: tuple[int, ...]) -> bytes:
    """A PNG of 8 x 1 pixels of one grey or colour, as its specification says; transparent: the value in its tRNS."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    bits = "".join(f"{value:0{depth}b}" for value in channels) * 8
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, 0 if len(channels) == 1 else 2, 0, 0, 0)),
              (b"tRNS", struct.pack(f">{len(channels)}H", *transparent)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@given(st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_the_transparent_grey_of_a_png_is_compared_at_its_depth(depth, data):
    level, other = data.draw(st.tuples(*2 * [st.integers(0, 2**depth - 1)]))
    for transparent in (level, other):
        seen = np.asarray(opaque(decode(written_png(depth, (level,), (transparent,)), "a.png"), (255, 0, 255)))
        shown = (255, 0, 255) if transparent == level else 3 * (round(level * 255 / (2**depth - 1)),)
        assert (abs(seen.astype(int) - shown) <= (depth == 16)).all()


@given(st.sampled_from([8, 16]), st.data())
def test_the_transparent_colour_of_a_png_is_compared_at_its_depth(depth, data):
    """Of colours with 16 bits the upper 8 are compared: Pillow reads no others."""
    colours = st.tuples(*3 * [st.integers(0, 2**depth - 1)])
    colour, other = data.draw(colours), data.draw(colours)
    upper = [tuple(value >> depth - 8 for value in c) for c in (colour, other)]
    for transparent, same in ((colour, True), (other, upper[0] == upper[1])):
        seen = np.asarray(opaque(decode(written_png(depth, colour, transparent), "a.png"), (255, 0, 254)))
        assert (seen == ((255, 0, 254) if same else upper[0])).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_every_mode_with_transparency_shows_the_background(mode):
    image = Image.new("LA", (2, 1), (100, 255))
    image.putpixel((1, 0), (100, 0))
    if mode == "PA":
        image = Image.new("PA", (2, 1), (0, 255))
        image.putpalette([100] * 3)
        image.putpixel((1, 0), (0, 0))
    seen = np.asarray(opaque(image.convert(mode), (1, 2, 3)))
    assert seen.tolist() == [[[100, 100, 100], [1, 2, 3]]]


def test_the_transparent_colour_of_a_palette_is_a_number_of_the_palette():
    image, file = Image.new("P", (2, 1), 3), io.BytesIO()
    image.putpalette([value for i in range(16) for value in (16 * i, 0, 0)])
    image.putpixel((1, 0), 5)
    image.save(file, "PNG", bits=4, transparency=3)
    assert file.getvalue()[24] == 4
    assert np.asarray(opaque(decode(file.getvalue(), "a.png"), (1, 2, 3))).tolist() == [[[1, 2, 3], [80, 0, 0]]]


def test_sixteen_bits_keep_black_and_white():
    """257 x is x: 65535 is 255, and values between are rounded."""
    levels = np.array([[0, 128, 129, 257, 257 * 100 + 128, 257 * 100 + 129, 65535]], np.uint16)
    assert eight_bits(levels)[0].tolist() == [0, 0, 1, 1, 100, 101, 255]
    image = Image.fromarray(levels)
    assert eight_bits(np.array([-1, -70_000, 70_000], np.int32)).tolist() == [0, 0, 255]            # of mode I
    assert image.mode.startswith("I") and np.asarray(opaque(image))[0, :, 1].tolist() == [0, 0, 1, 1, 100, 101, 255]


def test_cmyk_and_grey():
    assert np.asarray(opaque(Image.new("CMYK", (1, 1), (0, 0, 0, 0))))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(opaque(Image.new("CMYK", (1, 1), (0, 0, 0, 255))))[0, 0].tolist() == [0, 0, 0]
    assert np.asarray(opaque(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77, 77, 77]
    assert np.asarray(opaque(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]


def test_colours():
    assert colour("white") == (255, 255, 255) and colour("#ff8000") == colour("FF8000") == (255, 128, 0)
    assert colour("Black") == (0, 0, 0) and colour("grey") == colour("gray") == (128, 128, 128)
    for text in ("", "#ff80", "greenish", "#ff80zz", "#ff80XX", "٣٣٣٣٣٣"):
        with pytest.raises(UserError, match="white, black, grey or #rrggbb"):
            colour(text)


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_of_the_shape_are_resized_by_lanczos(fit):
    expected = np.asarray(noisy(40, 20).resize((10, 5), Image.Resampling.LANCZOS))
    assert (fitted(noisy(40, 20), 10, 5, fit) == expected).all()


def test_the_middle_and_white_are_the_defaults():
    wide, clear = noisy(40, 10), Image.new("RGBA", (4, 4))
    assert (fitted(wide, 10, 10) == fitted(wide, 10, 10, "crop")).all() and (fitted(clear, 2, 2) == 255).all()
    assert (fitted(clear, 2, 2, "crop", (1, 2, 3)) == (1, 2, 3)).all()
    assert (fitted(clear, 2, 2, "pad", (1, 2, 3)) == (1, 2, 3)).all()


def test_without_a_transparent_value_nothing_is_transparent():
    image = Image.fromarray(np.array([[-2, -1, 0, 1, 257]], np.int32))
    assert image.mode == "I" and np.asarray(opaque(image, (9, 9, 9)))[0, :, 0].tolist() == [0, 0, 0, 0, 1]
