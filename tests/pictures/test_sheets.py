"""Sheets and strips: right pixels in the right places, any caption, and refusals before a file is written."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff import pictures
from minidiff.errors import UserError
from minidiff.pictures import sheets


def images(count, height=4, width=4, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, height, width, channels)).astype(np.float32)


def holds(image, picture):
    """Whether the picture (h, w, 3) is somewhere in the image, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), picture.shape)[:, :, 0]
    return bool((windows == picture).all(axis=(2, 3, 4)).any())


def enlarged(image, scale):
    pixels = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.kron(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), np.ones((scale, scale, 1), np.uint8))


@pytest.mark.parametrize(
    ("count", "columns", "channels", "scale"), [(1, None, 1, 1), (5, 2, 3, 2), (4, 9, 1, 3)]
)
def test_every_image_is_in_the_sheet_pixel_for_pixel(count, columns, channels, scale):
    x = 1.2 * images(count, 4, 6, channels)  # beyond the range, to be clipped
    sheet = pictures.sheet(x, ["seven"] * count, columns=columns, scale=scale)
    assert sheet.mode == "RGB"
    for i in range(count):
        assert holds(sheet, enlarged(x[i], scale))


def test_images_are_in_reading_order():
    grey = np.linspace(-0.9, 0.9, 6)
    sheet = np.asarray(pictures.sheet(np.full((6, 8, 8, 1), grey[:, None, None, None]), columns=3, scale=2))
    corners = [
        np.argwhere((sheet == np.uint8(np.rint((g + 1) * 127.5))).all(axis=2))[0].tolist() for g in grey
    ]
    assert corners == sorted(corners)
    ys, xs = sorted({y for y, _ in corners}), sorted({x for _, x in corners})
    assert np.diff(ys).tolist() == [16 + sheets.GAP] and np.diff(xs).tolist() == [16 + sheets.GAP] * 2


def test_captions_and_title_are_drawn_and_wrapped():
    x = images(2, 28, 28)
    plain = pictures.sheet(x)
    short = pictures.sheet(x, ["7", "7"])
    long = pictures.sheet(x, ["a very bold seven leaning far to the left", "7"])
    longest = pictures.sheet(x, ["seven " * 2000, "7" * 10_000])
    titled = pictures.sheet(x, ["7", "7"], title="Samples")
    assert plain.height < short.height < long.height <= longest.height < short.height + 4 * 16
    assert plain.width == short.width == long.width == longest.width
    assert titled.height > short.height
    assert not np.array_equal(np.asarray(short), np.asarray(pictures.sheet(x, ["8", "7"])))


def test_line_breaks_in_a_caption_are_kept():
    heights = [pictures.sheet(images(1, 28, 28), [caption]).height
               for caption in ("7", "7\n7", "7\n\n7\n", "7\n7\n7", "7\n" * 9)]
    line = heights[1] - heights[0]
    assert line > 0 and [(height - heights[0]) / line for height in heights] == [0, 1, 1, 2, 3]
    tall = pictures.sheet(images(1, 28, 28), ["7\n" * 9], caption_lines=6, caption_width=150)
    assert (tall.height - heights[0]) / line == 5 and tall.width == 150 + 2 * sheets.MARGIN


def test_text_stays_within_its_cell():
    """Only the paper's own colour is left and right of the cells, whatever the captions say."""
    sheet = np.asarray(
        pictures.sheet(images(3, 28, 28), ["w" * 500, "seven " * 99, "日本語" * 99], columns=3)
    )
    paper = np.array(sheets.PAPER)
    cell = 28 * 3
    for start in (0, 24 + cell + 2, 24 + 2 * cell + 14 + 2, 24 + 3 * cell + 2 * 14 + 2):
        assert (sheet[:, start : start + 10] == paper).all()


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_caption_is_drawn_without_a_crash(caption):
    assert pictures.sheet(images(1), [caption], title=caption).width > 0


@pytest.mark.parametrize(
    "caption",
    ["", " \n\t ", "\ud800", "\0\x1b[2J", "日本語", "שבע", "سبعة", "🙂👍🏽", "e\u0301" * 50, "7\u200d"],
)
def test_odd_captions(caption):
    x = images(2, 28, 28)
    pictures.sheet(x, [caption, "7"], title=caption)
    pictures.strip(np.stack([x, x]), [caption, "7"], labels=[caption, "7"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"images": np.zeros((4, 4, 1))}, r"images has shape \(4, 4, 1\)"),
        ({"images": np.zeros((1, 4, 4, 2))}, r"images has shape \(1, 4, 4, 2\)"),
        ({"images": np.zeros((0, 4, 4, 1))}, "at least one"),
        ({"captions": ["a"]}, "captions has 1 entries for 2 images"),
        ({"columns": 0}, "columns is 0"),
        ({"scale": 0}, "scale must be a whole number of at least 1, not 0"),
        ({"scale": 1.5}, "scale must be a whole number"),
        ({"images": np.full((2, 4, 4, 1), np.nan)}, "NaN"),
    ],
)
def test_wrong_sheets_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pictures.sheet(**{"images": images(2), **arguments})


def test_a_strip_shows_both_ends_and_states_evenly_between():
    states = np.broadcast_to(np.linspace(-1, 1, 21)[:, None, None, None, None], (21, 2, 4, 4, 1))
    strip = pictures.strip(states, labels=[str(s) for s in range(21)], columns=5, scale=2)
    greys = [np.uint8(np.rint((g + 1) * 127.5)) for g in np.linspace(-1, 1, 5)]
    row = np.asarray(strip)[-24 - 4]  # through the last row of pictures
    found = [int(pixel[0]) for a, pixel in zip(row, row[1:], strict=False) if (a == pixel).all()]
    assert [g for g in dict.fromkeys(found) if g in greys] == greys
    assert pictures.strip(states[:1]).width < pictures.strip(states[:2]).width < pictures.strip(states).width
    for wrong in ({"labels": ["a"]}, {"captions": ["a"]}, {"columns": 1}):
        with pytest.raises(ValueError, match="1"):
            pictures.strip(states, **wrong)
    with pytest.raises(ValueError, match="states has shape"):
        pictures.strip(states[0])


def test_an_animation_runs_from_the_first_state_to_the_last(tmp_path):
    x = images(2, 8, 8)
    states = np.stack([-x, 0 * x, x])
    pictures.gif(states, tmp_path / "a.gif", ["7", "8"], scale=2)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for k, state in enumerate(states):
            film.seek(k)
            frame = np.asarray(film.convert("RGB")).astype(int)
            want = np.asarray(pictures.sheet(state, ["7", "8"], scale=2)).astype(int)
            assert np.abs(frame - want).max() <= 12  # 256 colours
        assert film.info["duration"] == 2000
    pictures.gif(np.stack([x * s for s in np.linspace(0, 1, 50)]), tmp_path / "a.gif", frames=7)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 7
    with pytest.raises(UserError, match="ends in .gif, got '.*a.png'"):
        pictures.gif(states, tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.gif"]


def test_saving_takes_the_format_of_the_ending(tmp_path):
    image = pictures.sheet(images(2))
    for name, kind in {"a.png": "PNG", "a.JPG": "JPEG", "a.jpeg": "JPEG", "a.gif": "GIF"}.items():
        pictures.save(image, tmp_path / name)
        with Image.open(tmp_path / name) as back:
            assert back.format == kind and back.size == image.size
    with Image.open(tmp_path / "a.png") as back:
        assert np.array_equal(np.asarray(back), np.asarray(image))


def test_a_path_that_cannot_be_written_is_refused_in_a_sentence(tmp_path):
    image = pictures.sheet(images(1))
    for act in (pictures.check_writable, lambda path: pictures.save(image, path)):
        for name, sentence in {
            "a.bmp": "takes one of the endings .png, .jpg, .jpeg, .gif",
            "a": "takes one of the endings",
            "none/a.png": "in a folder that does not exist",
            ".": "takes one of the endings",
        }.items():
            with pytest.raises(UserError, match=sentence):
                act(tmp_path / name)
    assert os.listdir(tmp_path) == []
    assert pictures.check_writable(str(tmp_path / "a.png")) == tmp_path / "a.png"
