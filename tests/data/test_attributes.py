"""The measurements of shapes with known answers, and the words of real digits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from minidiff.data import attributes, mnist
from minidiff.data.attributes import (
    HELD_OUT,
    VOCABULARY,
    Attributes,
    Words,
    agreement,
    held_out,
    measure,
    name,
)
from minidiff.data.pixels import to_float, to_uint8

FINE = 16  # sub-pixels along each side in the drawings


def draw_bars(breadth: float, length: float, lean: float) -> np.ndarray:
    """(16, 28, 28) uint8: a rectangle sheared so that its top moves right by tan(lean).

    It is drawn at 16 places near the centre that differ by parts of a pixel: their mean has less of the pixels' grain.
    """
    at = (np.arange(28 * FINE) + 0.5) / FINE - 14
    images = []
    for place in range(16):
        u, v = at[None, :] - place / 16, at[:, None] - place * 5 % 16 / 16
        across = np.abs(u + v * math.tan(math.radians(lean)))
        inside = (across <= breadth / 2) & (np.abs(v) <= length / 2)
        images.append(np.rint(255 * inside.reshape(28, FINE, 28, FINE).mean((1, 3))).astype(np.uint8))
    return np.stack(images)


@pytest.fixture(scope="module")
def digits() -> mnist.Images:
    return mnist.packed()


@pytest.fixture(scope="module")
def words(digits) -> list[Words]:
    return name(measure(digits.images))


@settings(deadline=None, max_examples=25)
@given(st.floats(1.5, 6), st.floats(14, 20), st.booleans())
def test_thickness_of_a_rectangle(breadth, length, turned):
    # The distance to the edge is a hip roof over the rectangle, of volume b^2 (3 L - b) / 12.
    images = draw_bars(breadth, length, 0)
    roof = breadth * (1 - breadth / (3 * length))
    measured = measure(images.swapaxes(1, 2) if turned else images)
    # the grain of the pixels costs up to 0.165, at a breadth of 1.5625 (a scan of both sizes in steps of 1/64)
    assert measured.thickness.mean() == pytest.approx(roof, abs=0.18)


@settings(deadline=None, max_examples=25)
@given(st.floats(2, 6), st.floats(14, 20), st.floats(-35, 35))
def test_slant_and_width_of_a_leaning_bar(breadth, length, lean):
    # A sheared rectangle has mu_11 = -tan(lean) mu_02, and without its shear it has its own breadth.  The box reaches
    # to the outermost points of a ragged edge, which adds up to a pixel.  The pixels' grain costs up to 0.79 degrees
    # where tan(lean) is near 1/3, at breadth 2.5 (the worst of 3,800 random bars, most near simple ratios).
    measured = measure(draw_bars(breadth, length, lean))
    assert measured.slant.mean() == pytest.approx(lean, abs=0.9)
    assert -0.1 < measured.width.mean() - breadth < 1


def test_leaning_right_means_that_the_top_goes_right():
    stroke = np.zeros((1, 28, 28), np.uint8)
    for row in range(6, 22):
        stroke[0, row, 20 - row // 2 : 23 - row // 2] = 255  # further left as the rows go down
    assert measure(stroke).slant[0] > 20
    assert name(measure(stroke))[0].slant == "right"
    assert name(measure(stroke[:, :, ::-1]))[0].slant == "left"


def test_measurements_agree_with_plain_loops(digits):
    """The same definitions, for one image and one point at a time, with all distances computed."""
    for image in digits.images[[3, 7, 50]]:
        at = np.clip((np.arange(56) - 0.5) / 2, 0, 27)
        rows = np.stack([np.interp(at, np.arange(28), image[:, j]) for j in range(28)], 1)
        big = np.stack([np.interp(at, np.arange(28), row) for row in rows])
        ink, blank = np.argwhere(big >= 127.5) / 2, np.argwhere(big < 127.5) / 2
        distances = [np.sqrt(((blank - point) ** 2).sum(1)).min() - 0.25 for point in ink]
        v, u = (ink - ink.mean(0)).T
        shear = -(u * v).mean() / ((v * v).mean() + 1 / 48)            # of points that are half a pixel high
        stood = u + shear * v
        measured = measure(image[None])
        assert measured.thickness[0] == pytest.approx(4 * np.mean(distances), abs=1e-6)
        assert measured.slant[0] == pytest.approx(math.degrees(math.atan(shear)), abs=1e-6)
        assert measured.width[0] == pytest.approx(stood.max() - stood.min() + 0.5, abs=1e-6)


def test_a_mirror_reverses_the_slant_and_nothing_else(digits):
    images = digits.images[:200]
    seen, mirrored = measure(images), measure(images[:, :, ::-1])
    np.testing.assert_allclose(mirrored.slant, -seen.slant, atol=1e-9)
    np.testing.assert_allclose(mirrored.thickness, seen.thickness, atol=1e-9)
    np.testing.assert_allclose(mirrored.width, seen.width, atol=1e-9)


def test_position_does_not_matter(digits):
    images = np.pad(digits.images[:200], ((0, 0), (6, 6), (6, 6)))
    here, there = measure(images), measure(np.roll(images, (5, -4), (1, 2)))
    for field in ("thickness", "slant", "width"):
        np.testing.assert_allclose(getattr(there, field), getattr(here, field), atol=1e-9)


def test_an_image_does_not_depend_on_its_batch(digits):
    count = attributes.CHUNK + 3
    images = digits.images[:count].copy()
    images[1] = 255                                         # ink at the border must not reach the neighbours
    together = measure(images)
    for i in (0, 1, 2, count - 4, count - 3, count - 1):
        alone = measure(images[i : i + 1])
        for field in ("thickness", "slant", "width"):
            assert getattr(alone, field)[0] == pytest.approx(getattr(together, field)[i], abs=1e-9)


def test_floats_and_a_channel_are_accepted_too(digits):
    images = digits.images[:20]
    plain, floats = measure(images), measure(to_float(images)[..., None])
    for field in ("thickness", "slant", "width"):
        np.testing.assert_array_equal(getattr(floats, field), getattr(plain, field))
    assert measure(images[:0]).slant.shape == (0,)


@pytest.mark.filterwarnings("error")
def test_a_blank_image_has_no_words():
    measured = measure(np.zeros((2, 28, 28), np.uint8))
    assert np.isnan([measured.thickness, measured.slant, measured.width]).all()
    assert name(measured) == [Words("", "", "")] * 2


def test_ink_begins_at_the_middle_grey():
    """A bar of level 170 between black: at the quarter points it is 3/4 170 = 127.5, which is ink; 169 is none."""
    images = np.zeros((2, 8, 8), np.uint8)
    images[0, :, 3], images[1, :, 3] = 170, 169
    found = attributes.measure(images)
    assert found.width[0] == pytest.approx(1) and np.isnan(found.width[1])


@pytest.mark.filterwarnings("error")
def test_the_smallest_ink_is_measured():
    """A pixel, a row, and a row so faint that its ink is a single line of points, of no height."""
    images = np.zeros((3, 28, 28), np.uint8)
    images[0, 5, 5] = images[1, 5] = 255
    images[2, 5:7] = np.array([40, 160])[:, None]
    measured = measure(images)
    assert np.isfinite([measured.thickness, measured.slant, measured.width]).all()
    assert measured.slant[2] == pytest.approx(0)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((28, 28), np.uint8), ValueError, r"images has shape \(28, 28\).*\(N, H, W\)"),
        (np.zeros((2, 28, 28, 3), np.uint8), ValueError, r"shape \(2, 28, 28, 3\)"),
        (np.zeros((2, 28, 28), np.int64), TypeError, "dtype int64.*uint8"),
        (np.full((2, 28, 28), np.nan), ValueError, "NaN"),
    ],
)
def test_other_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        measure(images)


def test_names_follow_the_thresholds():
    measured = Attributes(
        np.array([2.09, 2.1, 3.0, 3.01]),
        np.array([-7.1, -7.0, 15.0, 15.1]),
        np.array([10.9, 11.0, 17.0, 17.1]),
    )
    assert name(measured) == [
        Words("thin", "left", "narrow"),
        Words("", "upright", ""),
        Words("", "upright", ""),
        Words("bold", "right", "wide"),
    ]


def test_words_have_the_shares_in_the_docstring(words):
    """The packed images are a sixth of those that the docstring counts."""
    shares = {"thin": 0.235, "bold": 0.242, "left": 0.194, "upright": 0.527, "right": 0.279}
    shares |= {"narrow": 0.217, "wide": 0.213}
    for word, share in shares.items():
        assert f"{share:.1%}" in attributes.__doc__
        assert sum(word in w for w in words) / len(words) == pytest.approx(share, abs=0.035), word
    assert {word for w in words for word in w} == set(sum(VOCABULARY, ("",)))


def test_words_name_what_is_seen(digits, words):
    """By other measures: the ink for the strokes, columns for the width, the top and bottom halves for the slant."""
    images = digits.images.astype(float)
    ink = images.sum((1, 2))
    columns = (digits.images > 127).any(1).sum(1)
    across = (images * np.arange(28)).sum(2)
    half = [across[:, rows].sum(1) / images[:, rows].sum((1, 2)) for rows in (slice(0, 14), slice(14, 28))]
    lean = half[0] - half[1]

    def mean(values: np.ndarray, word: str, digit: int) -> float:
        chosen = [word in w and label == digit for w, label in zip(words, digits.labels, strict=True)]
        return values[chosen].mean()

    for digit in range(10):
        assert mean(ink, "bold", digit) > 1.5 * mean(ink, "thin", digit)
        assert mean(lean, "right", digit) > mean(lean, "upright", digit) + 1 > mean(lean, "left", digit) + 2
        if digit != 1:  # hardly any 1 is wide
            assert mean(columns, "wide", digit) > mean(columns, "narrow", digit) + 4


def test_words_survive_noise_and_blur(digits, words):
    """Noise and blur such as a sampler makes: at least 19 of 20 words stay (98% do)."""
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(digits.images[:2000].astype(float), (0, 0.4, 0.4))
    images = np.clip(np.rint(images + rng.normal(0, 12, images.shape)), 0, 255).astype(np.uint8)
    counts = np.sum([agreement(*pair) for pair in zip(words, name(measure(images)), strict=False)], axis=0)
    assert counts[0] / counts[1] > 0.95


def test_agreement_counts_only_what_is_asked():
    found = Words("bold", "left", "")
    assert agreement(Words(), found) == (0, 0)
    assert agreement(Words("bold", "", ""), found) == (1, 1)
    assert agreement(Words("thin", "left", "wide"), found) == (1, 3)


def test_held_out_combinations(digits, words):
    """Their numbers are those in the source, and each digit, word and pair of words keeps many images."""
    mask = held_out(digits.labels, words)
    assert mask.shape == (10_000,) and mask.sum() == 493
    combos = [(int(d), w.thickness, w.slant) for d, w in zip(digits.labels, words, strict=True)]
    assert {c for c, out in zip(combos, mask, strict=True) if out} == set(HELD_OUT)
    assert min(combos.count(c) for c in HELD_OUT) >= 30
    assert (7, "bold", "left") not in HELD_OUT  # the README's example
    kept = [(d, w) for d, w, out in zip(digits.labels, words, mask, strict=True) if not out]
    for word in ("thin", "bold", "left", "upright", "right"):
        for digit in range(10):
            assert sum(d == digit and word in w for d, w in kept) >= 30, (digit, word)
    for thickness in ("thin", "bold"):
        for slant in ("left", "upright", "right"):
            assert sum(w.thickness == thickness and w.slant == slant for _, w in kept) >= 200


@given(st.lists(st.integers(0, 255), min_size=1))
def test_pixels_round_trip(values):
    pixels = np.array(values, np.uint8)
    floats = to_float(pixels)
    assert floats.dtype == np.float32 and floats.min() >= -1 and floats.max() <= 1
    np.testing.assert_array_equal(to_uint8(floats), pixels)
    assert to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_other_types_of_pixels_are_refused():
    with pytest.raises(TypeError, match="float64.*uint8"):
        to_float(np.zeros(2))
    with pytest.raises(TypeError, match="bool"):
        to_uint8(np.zeros(2, bool))
