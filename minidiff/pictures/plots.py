"""Plots of numbers, drawn by matplotlib: curves and points, and the training loss.

    image = plots.panels([plots.Panel("Mean of x_t", "t", "mean", [("closed form", t, mean, "-"),
                                                                   ("measured", t, x, "o")])])
    pictures.save(image, "mean.png")

Every function returns a Pillow image.  Equal numbers give equal images: neither a user's matplotlib settings nor the
state of pyplot is used.  matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import contextlib
import logging
import os
import textwrap
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from minidiff.pictures.sheets import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["Panel", "Series", "loss_curve", "panels", "scatter"]

Series = tuple[str, Sequence[float], Sequence[float], str]  # label, x (n,), y (n,), matplotlib's format: "-", "o", "--"

BLUE, RED, GREY = "#0072b2", "#d55e00", "#6e7278"
# the palette of Okabe and Ito, which colour-blind readers can tell apart too
COLOURS = (BLUE, RED, "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
STYLE = {
    "figure.facecolor": "#fcfcfa", "axes.facecolor": "#fcfcfa", "axes.edgecolor": GREY,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.labelcolor": "#44484e",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e2e3e2", "axes.axisbelow": True,
    "xtick.color": GREY, "ytick.color": GREY,
    "lines.linewidth": 1.8, "lines.markersize": 4, "legend.fontsize": 9, "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,             # inches
}
DPI = 110


@dataclass(frozen=True)
class Panel:
    """One pair of axes and the series on it.  A series without a label, "", is grey and not in the legend."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


def panels(row: Sequence[Panel], *, width: float = 4.6, height: float = 3.6) -> Image:
    """The panels side by side, each of this width and height in inches.

    Values that an axis cannot show (NaN, infinity, and what is not positive on a logarithmic axis) are left out.
    Raises ValueError if there is no panel, if x and y of a series differ in length, or if a panel has nothing to show.
    """
    shown = [_shown(panel) for panel in row]
    if not shown:
        raise ValueError("row has no panels; it takes at least one.")
    with _figure(width * len(shown), height) as figure:
        for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], row, strict=True):
            _draw(axes, panel, shown.pop(0))
        return _image(figure)


def scatter(rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str], *, reach: float = 3.0) -> Image:
    """Points in the plane: a row of squares for each (label, arrays), a column for each title.

    Each array is (n, 2).  A square shows [-reach, reach] on both axes.  ValueError where there is no row or no title.
    """
    if not rows or not titles:
        raise ValueError(f"rows and titles have {len(rows)} and {len(titles)} entries; each takes at least one.")
    for label, arrays in rows:
        if len(arrays) != len(titles):
            raise ValueError(f"the row {label!r} has {len(arrays)} arrays for {len(titles)} titles; it takes one each.")
    with _figure(2 * len(titles) + 0.3, 2 * len(rows) + 0.3) as figure:
        grid = figure.subplots(len(rows), len(titles), squeeze=False, sharex=True, sharey=True)
        for line, (label, arrays), colour in zip(grid, rows, cycle(COLOURS), strict=False):
            for axes, points in zip(line, arrays, strict=True):
                axes.plot(points[:, 0], points[:, 1], ".", color=colour, markersize=2, markeredgewidth=0)
                axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
            line[0].set_ylabel(label, color=colour)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, loc="center")
        return _image(figure)


def loss_curve(steps: Sequence[float], losses: Sequence[float], title: str = "Training loss") -> Image:
    """The losses over the steps: each value faint, their running mean over it.

    steps: (n,) increasing; losses: (n,).  The axis is logarithmic where the losses are above 0, and linear where one is
    below, or all are 0.  Values that the axis cannot show (NaN, infinity, 0 on a logarithmic one) are left out; the
    frame is empty where none remains.  Raises ValueError if the lengths differ.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"steps and losses have shapes {x.shape} and {y.shape}; they take one length (n,).")
    shown = np.isfinite(x) & np.isfinite(y)
    logarithmic = bool((y[shown] >= 0).all() and (y[shown] > 0).any())
    shown &= (y > 0) | (not logarithmic)
    x, y = x[shown], y[shown].clip(1e-99 if logarithmic else -1e99, 1e99)
    i, smooth = running_mean(y)
    with _figure(8, 4.5) as figure:
        axes = figure.subplots()
        axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.8)
        axes.plot(x[i], smooth, color=BLUE, linewidth=2.2, marker="o" if len(x) == 1 else "")
        axes.set(xlabel="step", ylabel="loss")
        if logarithmic:
            _logarithmic(axes.set_yscale, axes.yaxis)
        if len(y):
            # the first few steps' peaks may be far above the rest: they do not set the frame
            low, high = y.min(), max(np.quantile(y, 0.995), smooth.max())
            pad = max((high / low) ** 0.06, 1.05) if logarithmic else max(0.06 * (high - low), 0.05 * abs(low), 1e-9)
            axes.set_ylim((low / pad, high * pad) if logarithmic else (low - pad, high + pad))
        _title(axes, title)
        end = f"{smooth[-1]:.4g} at the end" if len(y) else "no finite loss"
        axes.set_title(end, loc="right", color=BLUE, fontsize=9)
        return _image(figure)


def running_mean(y: np.ndarray, places: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """(i, mean): at places i of the values (n,) the mean of the n/25 around it; near the ends, of those that there are.

    places: how many there are at most, evenly spread; more would not be seen, and would take long.
    """
    half, i = len(y) // 50, np.linspace(0, max(len(y) - 1, 0), min(len(y), places)).round().astype(int)
    back = np.minimum(half, i)
    ahead = np.minimum(back, len(y) - 1 - i)                # no farther than back: early on, the loss falls fast
    # each window is added up alone: in differences of one running sum, a huge value would lose all after it
    ends = np.stack([i - back, i + ahead + 1], axis=1)                                      # (places, 2)
    return i, np.add.reduceat(np.append(y, 0.0), ends.ravel())[::2] / (back + ahead + 1)


# --- axes -------------------------------------------------------------------------------------------------

def _draw(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    labels = [label for label, *_ in series if label]
    colours = dict(zip(labels, cycle(COLOURS), strict=False))
    for label, x, y, style in series:
        axes.plot(x, y, style, label=label or None, color=colours.get(label, GREY), **({} if label else {"lw": 1.1}))
    if panel.log_x:
        _logarithmic(axes.set_xscale, axes.xaxis)
    else:
        axes.locator_params(axis="x", nbins=7)              # so that long numbers stand apart
    if panel.log_y:
        _logarithmic(axes.set_yscale, axes.yaxis)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    _title(axes, panel.title)
    if labels:
        axes.legend(loc="best")


def _logarithmic(set_scale, axis) -> None:
    """A logarithmic axis with plain numbers: at powers of ten, and between them where few fit on the axis."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    set_scale("log")
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.6)))


def _title(axes: Axes, title: str) -> None:
    """A title may be any text; it is cut to one line."""
    axes.set_title(textwrap.shorten(printable(title), 60, placeholder="..."), parse_math=False)


# matplotlib's settings and the filters of warnings are those of the whole process: one thread draws at a time, and a
# fork waits for it
_drawing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release)


@contextlib.contextmanager
def _figure(width: float, height: float):
    """A new matplotlib figure (inches), drawn without warnings: of letters that the font lacks, of a cache folder."""
    log = logging.getLogger("matplotlib")
    _drawing.acquire()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*([Gg]lyph|natively).*")
            import matplotlib.style
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            with matplotlib.style.context(["default", STYLE]):
                figure = Figure((width, height), dpi=DPI, layout="constrained")
                FigureCanvasAgg(figure)
                yield figure
    finally:
        log.setLevel(level)
        _drawing.release()


def _image(figure: Figure) -> Image:
    from PIL import Image

    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


# --- checks -----------------------------------------------------------------------------------------------

def _shown(panel: Panel) -> list[Series]:
    """The series with the values only that the axes can show; series without any are left out."""
    series = []
    for label, x, y, style in panel.series:
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"x and y of {label!r} have shapes {x.shape} and {y.shape}; they take one length (n,).")
        seen = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not panel.log_x)) & ((y > 0) | (not panel.log_y))
        if seen.any():
            series.append((label, x[seen], y[seen], style))
    if not series:
        raise ValueError(f"series has no value that the axes of {panel.title!r} can show; a panel takes at least one.")
    return series
