"""Plots for people: panels with two axes, lines, dots and a legend, side by side on one sheet of paper.

    panel([("closed form", t, mean, "line"), ("measured", t, x, "dots")],
          title="mean of x_t", x_label="t", y_label="mean")

A `Series` is (label, x, y, style), x and y of one length (n,), style "line", "dots" or "dashes". Two series of
one label share its colour and its place in the legend, which is how a line runs through its dots; a series
without a label, "", is grey and stands in no legend. Values that an axis cannot show (NaN, infinite, and
on a logarithmic axis what is not positive) are left out. `pictures.save` writes the result.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minidiff.pictures.canvas import (
    BLUE,
    GAP,
    INK,
    LINE,
    PAPER,
    RULE,
    SOFT,
    TEXT,
    Canvas,
    font_of,
    log_ticks,
    ticks,
    wrapped,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Series", "panel", "side_by_side"]

Series = tuple[str, Sequence[float], Sequence[float], str]

STYLES = ("line", "dots", "dashes")
# told apart by people who do not see red from green, too (Okabe and Ito's palette, its blue as in canvas.py)
COLOURS = (BLUE, (213, 94, 0), (0, 143, 105), (178, 90, 148), (190, 140, 0), (70, 160, 210))
TITLE = 15                                                  # font size, pixels
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 72, 48                   # pixels around the axes


def panel(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    width: int = 460,
    height: int = 340,
) -> "Image":
    """One pair of axes, framed to hold every value that can be shown; what comes later lies on top.

    log_x, log_y: that axis is logarithmic. width, height: of the whole panel, in pixels.
    Raises ValueError for an unknown style, for lengths that differ, and where nothing is left to show.
    """
    shown = [(label, *_showable(x, y, label, style, log_x, log_y), style) for label, x, y, style in series]
    drawn = [s for s in shown if len(s[1])]
    if not drawn:
        raise ValueError(f"series has no value that the axes of {title!r} can show; a panel takes at least one.")
    x_low, x_high = _frame(np.concatenate([x for _, x, _, _ in drawn]))
    y_low, y_high = _frame(np.concatenate([y for _, _, y, _ in drawn]))
    labels = list(dict.fromkeys(label for label, *_ in drawn if label))
    colours = {"": SOFT} | {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}

    right, bottom = width - RIGHT, height - BOTTOM
    # the legend stands above the axes, where no value can be: beside the y label if it fits, else in rows below it
    beside = right - LEFT - font_of(TEXT).getlength(y_label) - GAP
    rows = _rows(labels, beside)
    below = 0 if len(rows) <= 1 else len(rows := _rows(labels, right - LEFT))         # rows below the y label
    top = TOP + below * round(TEXT * LINE)
    canvas = Canvas(width, height, finer=3)                 # drawn three times as large: the lines come out smooth

    def across(x):
        return LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)

    def up(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    # the axes: a rule at each value of y, a tick at each of x
    for y, text in _marks(y_low, y_high, log_y, about=5):
        canvas.path([(LEFT, up(y)), (right, up(y))], RULE, 1)
        canvas.lines([text], LEFT - 8, up(y), TEXT, SOFT, anchor="rm")
    for x, text in _marks(x_low, x_high, log_x, about=6):
        canvas.path([(across(x), bottom), (across(x), bottom + 5)], SOFT, 1)
        canvas.lines([text], across(x), bottom + 9, TEXT, SOFT, anchor="ma")
    canvas.path([(LEFT, bottom), (right, bottom)], SOFT, 1)
    canvas.lines(wrapped(title, TITLE, right - LEFT, lines=1), LEFT, 14, TITLE, INK)
    canvas.lines([y_label], LEFT, 14 + TITLE * LINE + 2, TEXT, SOFT)
    canvas.lines([x_label], right, bottom + 26, TEXT, SOFT, anchor="ra")

    for label, x, y, style in drawn:
        _draw(canvas, list(zip(across(x).tolist(), up(y).tolist(), strict=True)), style, colours[label])

    for i, row in enumerate(rows):
        u = LEFT if below else right - sum(map(_entry, row)) + GAP
        v = 14 + TITLE * LINE + 2 + (i + bool(below)) * round(TEXT * LINE)
        for label in row:
            for style in dict.fromkeys(s[3] for s in drawn if s[0] == label):
                middle = v + TEXT * 0.6
                points = [(u + 9, middle)] if style == "dots" else [(u, middle), (u + 18, middle)]
                _draw(canvas, points, style, colours[label])
            canvas.lines([label], u + 24, v, TEXT, colours[label])
            u += _entry(label)
    return canvas.image


def side_by_side(panels: Sequence["Image"]) -> "Image":
    """The panels in one row on one sheet of paper, their tops in line."""
    from PIL import Image

    if not panels:
        raise ValueError("panels is empty; it takes at least one.")
    paper = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), PAPER)
    x = 0
    for p in panels:
        paper.paste(p, (x, 0))
        x += p.width
    return paper


def _entry(label: str) -> float:
    """The width of one entry of the legend, and of the gap that follows."""
    return 24 + font_of(TEXT).getlength(label) + GAP


def _rows(labels: Sequence[str], width: float) -> list[list[str]]:
    """The labels in rows no wider than that, one label at least in each."""
    rows: list[list[str]] = []
    for label in labels:
        if rows and sum(map(_entry, [*rows[-1], label])) - GAP <= width:
            rows[-1].append(label)
        else:
            rows.append([label])
    return rows


# ---- values and axes ---------------------------------------------------------------------------------------


def _showable(x, y, label: str, style: str, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y (n,) of the values that the axes can show, as the axes measure them: log10 where logarithmic."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if style not in STYLES:
        raise ValueError(f"the style of {label!r} must be one of {', '.join(STYLES)}, got {style!r}")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y of {label!r} have shapes {x.shape} and {y.shape}; they take one length (n,).")
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (np.log10(x) if log_x else x), (np.log10(y) if log_y else y)
    seen = np.isfinite(x) & np.isfinite(y)
    return x[seen], y[seen]


def _frame(a: np.ndarray) -> tuple[float, float]:
    """The ends of an axis that holds the values, with a margin; never of no length."""
    low, high = float(a.min()), float(a.max())
    pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _marks(low: float, high: float, logarithmic: bool, about: int) -> list[tuple[float, str]]:
    """Round values on an axis, each with its text; on a logarithmic one they stand at their log10."""
    if not logarithmic:
        return [(value, f"{value:,.6g}") for value in ticks(low, high, about)]
    return [(math.log10(value), f"{value:.6g}") for value in log_ticks(low, high)]


def _draw(canvas: Canvas, points: list[tuple[float, float]], style: str, colour: tuple[int, int, int]) -> None:
    if style == "dots" or len(points) == 1:
        for point in points:
            canvas.path([point], colour, 1.4)               # a path of one point is a dot
    elif style == "line":
        canvas.path(points, colour, 2)
    else:
        for dash in _dashes(points, 7, 5):
            canvas.path(dash, colour, 1.4)


def _dashes(points: list[tuple[float, float]], on: float, off: float) -> list[list[tuple[float, float]]]:
    """The path cut into pieces of length `on` with gaps of `off` between them, pixels."""
    p = np.asarray(points)                                                            # (n, 2)
    along = np.concatenate(([0.0], np.cumsum(np.hypot(*np.diff(p, axis=0).T))))       # (n,) length so far
    pieces = []
    for start in np.arange(0, along[-1], on + off):
        end = min(start + on, along[-1])
        at = np.concatenate(([start], along[(along > start) & (along < end)], [end]))
        pieces.append([(float(np.interp(d, along, p[:, 0])), float(np.interp(d, along, p[:, 1]))) for d in at])
    return pieces
