"""Plots: the axes' numbers stand where they say, the legend keeps the order of the series, and refusals are sentences.

What the panels look like in pixels is held in test_verify.py; here their canvas is watched as it is drawn on.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.pictures import canvas, plots

WIDTH, HEIGHT = 460, 340                                    # of a panel, by default
RIGHT, BOTTOM = WIDTH - plots.RIGHT, HEIGHT - plots.BOTTOM


@pytest.fixture
def drawn(monkeypatch):
    """A panel's texts, each (text, x, y, anchor, colour), and its paths, each (points, colour), in order of drawing."""
    texts, paths = [], []

    class Watched(canvas.Canvas):
        def lines(self, lines, x, y, size, colour, anchor="la"):
            texts.extend((line, x, y, anchor, colour) for line in lines)
            super().lines(lines, x, y, size, colour, anchor)

        def path(self, points, colour, width):
            paths.append((points, colour))
            super().path(points, colour, width)

    monkeypatch.setattr(plots, "Canvas", Watched)
    return texts, paths


def panel(series, **options):
    return plots.panel(series, **{"title": "t", "x_label": "x", "y_label": "y", **options})


def axes(texts):
    """The numbers of the axes, {text: where its centre is}: x's stand below the axes, y's at their left."""
    across = {text: x for text, x, y, anchor, _ in texts if anchor == "ma" and y == BOTTOM + 9}
    up = {text: y for text, x, y, anchor, _ in texts if anchor == "rm" and x == plots.LEFT - 8}
    return across, up


# ---- axes --------------------------------------------------------------------------------------------------


def place(values, low, high, at_low, at_high):
    """Where the values stand between the two pixels, on an axis with 4 % of its values' span at each end."""
    values = np.asarray(values)
    return at_low + (at_high - at_low) * ((values - low) / (high - low) + 0.04) / 1.08


def test_the_numbers_of_a_linear_axis_stand_at_their_values(drawn):
    panel([("", [0, 10], [-2000, 2000], "line")])
    across, up = axes(drawn[0])
    # steps of 1, 2 or 5 times a power of ten, about 6 of them across and 5 up
    assert list(across) == ["0", "2", "4", "6", "8", "10"]
    assert list(up) == ["-2,000", "-1,000", "0", "1,000", "2,000"]
    # atol: pixels, of float64 arithmetic on numbers below 1e4
    np.testing.assert_allclose(list(across.values()), place(range(0, 11, 2), 0, 10, plots.LEFT, RIGHT), atol=1e-9)
    np.testing.assert_allclose(list(up.values()), place(range(-2000, 2001, 1000), -2000, 2000, BOTTOM, plots.TOP),
                               atol=1e-9)


def test_the_numbers_of_a_logarithmic_axis_stand_at_their_logarithms(drawn):
    panel([("", [1, 1e4], [1e-3, 100], "line")], log_x=True, log_y=True)
    across, up = axes(drawn[0])
    assert list(across) == ["1", "10", "100", "1000", "10000"]
    assert list(up) == ["0.001", "0.01", "0.1", "1", "10", "100"]
    np.testing.assert_allclose(list(across.values()), place(range(5), 0, 4, plots.LEFT, RIGHT), atol=1e-9)
    np.testing.assert_allclose(list(up.values()), place(range(-3, 3), -3, 2, BOTTOM, plots.TOP), atol=1e-9)


@pytest.mark.parametrize(("low", "high", "values"), [
    (0, 3.5, [1, 10, 100, 1000]),                           # powers of ten, where four of them have room
    (0, 2.4, [1, 3, 10, 30, 100]),                          # else threes, too,
    (0, 1.1, [1, 2, 5, 10]),                                # then twos and fives,
    (0, 0.65, [1, 1.5, 2, 3, 4]),                           # then more,
    (0.01, 0.15, [1.1, 1.2, 1.3, 1.4]),                     # and within a small part of a power even steps
    (-11, 11, [10.0**p for p in range(-11, 12, 3)]),        # at most nine of them
])
def test_a_logarithmic_axis_takes_the_fewest_round_values_that_are_four(low, high, values):
    assert canvas.log_ticks(low, high) == pytest.approx(values, rel=1e-12)


def test_the_values_stand_on_the_same_axes_as_the_numbers(drawn):
    """A series through the axes' own numbers passes through the places where those are written."""
    x, y = [1, 10, 100, 1000], [0, 20, 40, 60]
    panel([("a", x, y, "line")], log_x=True)
    across, up = axes(drawn[0])
    line = next(points for points, colour in drawn[1] if colour == plots.COLOURS[0])
    np.testing.assert_allclose(line, [(across[str(a)], up[str(b)]) for a, b in zip(x, y, strict=True)], atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-300, 1e300])
def test_an_axis_of_one_value_has_room_and_numbers(drawn, value):
    panel([("a", [1, 2], [value, value], "line")])
    _, up = axes(drawn[0])
    assert len(up) >= 2 and all(plots.TOP - 1e-9 <= v <= BOTTOM + 1e-9 for v in up.values())
    (height,) = {v for points, colour in drawn[1] if colour == plots.COLOURS[0] for _, v in points if v > plots.TOP}
    assert height == pytest.approx((plots.TOP + BOTTOM) / 2)


# ---- legend ------------------------------------------------------------------------------------------------


def test_the_legend_names_each_label_once_in_the_order_of_the_series(drawn):
    x = [1, 2]
    panel([("b", x, x, "line"), ("", x, x, "line"), ("a", x, x, "line"), ("b", x, x, "dots"), ("c", x, x, "line")])
    legend = [(text, colour) for text, _, _, _, colour in drawn[0] if colour in plots.COLOURS]
    assert legend == list(zip("bac", plots.COLOURS, strict=False))
    grey = [points for points, colour in drawn[1] if colour == canvas.SOFT and points[0][1] < plots.TOP]
    assert grey == []                                       # a series without a label has no entry


@pytest.mark.parametrize("styles", list(itertools.permutations(plots.STYLES)), ids="-".join)
def test_the_styles_of_one_label_lie_in_the_legend_in_their_order_whatever_the_hash_seed(monkeypatch, styles):
    """Six orders: an order that strings' hashes make is right for one of them at most, under any seed."""
    calls, draw = [], plots._draw
    monkeypatch.setattr(plots, "_draw", lambda on, points, style, colour: calls.append(style)
                        or draw(on, points, style, colour))
    panel([("a", [1, 2], [k, k + 1], style) for k, style in enumerate(styles)])
    assert calls == [*styles, *styles]                      # the series, then the legend


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abc ", min_size=1, max_size=20), max_size=8), st.floats(1, 600))
def test_the_legend_breaks_into_rows_that_fit(labels, width):
    rows = plots._rows(labels, width)
    assert [label for row in rows for label in row] == labels and all(rows)
    entries = [[24 + canvas.font_of(canvas.TEXT).getlength(label) for label in row] for row in rows]
    wide = [sum(row) + canvas.GAP * (len(row) - 1) for row in entries]
    assert all(w <= width + 1e-9 or len(row) == 1 for w, row in zip(wide, entries, strict=True))
    for w, (first, *_) in zip(wide, entries[1:], strict=False):
        assert w + canvas.GAP + first > width - 1e-9        # the next row's first label had no room here


# ---- refusals ----------------------------------------------------------------------------------------------


NOTHING = "series has no value that the axes of 't' can show; a panel takes at least one."


@pytest.mark.parametrize(("series", "sentence"), [
    ([], NOTHING),
    ([("a", [], [], "line")], NOTHING),
    ([("a", [1, 2], [0, -1], "dots")], NOTHING),            # on a logarithmic axis
    ([("a", [1], [1], "line"), ("b", [1, 2], [1], "line")],
     "x and y of 'b' have shapes (2,) and (1,); they take one length (n,)."),
    ([("a", 1, 1, "dots")], "x and y of 'a' have shapes () and (); they take one length (n,)."),
    ([("a", [1], [1], "bars")], "the style of 'a' must be one of line, dots, dashes, got 'bars'"),
])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(series, sentence):
    with pytest.raises(ValueError) as caught:
        panel(series, log_y=True)
    assert str(caught.value) == sentence


def test_no_panels_are_refused_in_a_sentence():
    with pytest.raises(ValueError) as caught:
        plots.side_by_side([])
    assert str(caught.value) == "panels is empty; it takes at least one."


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_no_axis_can_show_changes_nothing(bad):
    clean = panel([("a", [1, 2, 3], [1, 4, 2], "line")])
    assert np.array_equal(clean, panel([("a", [1, 2, 9, 3], [1, 4, bad, 2], "line")]))
    assert np.array_equal(clean, panel([("a", [1, 2, bad, 3], [1, 4, 9, 2], "line")]))
