"""Pictures for people: sample sheets, trajectories as strips and animations, and the loss curve.

Arrays come in as the model has them, channels last in [-1, 1], and leave as Pillow images; `save` writes one,
whole or not at all. The paper, its colours and its text are canvas.py's.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minidiff.errors import UserError
from minidiff.files import check_writable as _check_writable
from minidiff.files import write_whole
from minidiff.pictures.canvas import (
    BLUE,
    GAP,
    INK,
    LINE,
    MARGIN,
    PALE_BLUE,
    RULE,
    SOFT,
    TEXT,
    TITLE,
    Canvas,
    enlarged,
    log_ticks,
    ticks,
    wrapped,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_writable", "gif", "loss_curve", "save", "sheet", "strip"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF"}

MIN_CELL = 84  # narrower pictures are centred in a cell that still holds a word


def sheet(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int = 3,
    title: str | None = None,
) -> "Image":
    """A grid of pictures with a caption under each.

    images: (N, H, W, 1 or 3), floats in [-1, 1] (clipped) or uint8. captions: N of them, or None; each is
    wrapped under its picture in at most 4 lines. columns: pictures in a row; None is about as many as rows.
    scale: screen pixels per pixel, a whole number. Raises ValueError for shapes and numbers out of range.
    """
    pictures = enlarged(images, scale, "images")  # (N, h, w, 3) uint8
    count, height, width, _ = pictures.shape
    captions = [""] * count if captions is None else list(captions)
    if len(captions) != count:
        raise ValueError(f"captions has {len(captions)} entries for {count} images; it takes one for each.")
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; it takes at least 1.")
    columns = min(columns, count)

    cell = max(width, MIN_CELL) if any(captions) else width
    below = [wrapped(caption, TEXT, cell, lines=4) for caption in captions]
    rows = [range(a, min(a + columns, count)) for a in range(0, count, columns)]
    heights = [height + _text_height(max(len(below[i]) for i in row), TEXT) for row in rows]
    inner = columns * cell + (columns - 1) * GAP
    head = wrapped(title or "", TITLE, max(inner, 240), lines=3)
    top = MARGIN + (len(head) * round(TITLE * LINE) + GAP if head else 0)

    canvas = Canvas(
        2 * MARGIN + max(inner, 240 if head else 0), top + sum(heights) + GAP * (len(rows) - 1) + MARGIN
    )
    canvas.lines(head, MARGIN, MARGIN, TITLE, INK)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = MARGIN + column * (cell + GAP)
            canvas.picture(pictures[i], x + (cell - width) // 2, y)
            canvas.lines(below[i], x + cell // 2, y + height + TEXT // 2, TEXT, SOFT, anchor="ma")
        y += row_height + GAP
    return canvas.image


def strip(
    states: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    columns: int = 10,
    scale: int = 3,
) -> "Image":
    """Trajectories: one sample a row, from noise at the left to the picture at the right.

    states: (S, N, H, W, 1 or 3) in [-1, 1] (clipped), in the order of sampling. captions: N, at the left;
    labels: S, above the columns. At most `columns` states are shown, evenly apart, both ends included.
    """
    states = _states(states)
    shown = _evenly(len(states), columns)
    if labels is not None and len(labels) != len(states):
        raise ValueError(f"labels has {len(labels)} entries for {len(states)} states; it takes one for each.")
    if captions is not None and len(captions) != states.shape[1]:
        raise ValueError(
            f"captions has {len(captions)} entries for {states.shape[1]} samples; it takes one for each."
        )
    pictures = [enlarged(states[s], scale, "states") for s in shown]  # S of (N, h, w, 3)
    count, height, width, _ = pictures[0].shape

    gap = GAP // 2
    left = [
        wrapped(caption, TEXT, 110, lines=max(1, int(height / (TEXT * LINE)))) for caption in captions or ()
    ]
    beside = 110 + GAP if any(left) else 0
    top = MARGIN + (round(TEXT * LINE) + 4 if labels is not None else 0)
    canvas = Canvas(
        2 * MARGIN + beside + len(shown) * width + (len(shown) - 1) * gap,
        top + count * height + (count - 1) * gap + MARGIN,
    )
    for column, s in enumerate(shown):
        x = MARGIN + beside + column * (width + gap)
        if labels is not None:
            canvas.lines(
                wrapped(labels[s], TEXT, width, lines=1), x + width // 2, MARGIN, TEXT, SOFT, anchor="ma"
            )
        for i in range(count):
            canvas.picture(pictures[column][i], x, top + i * (height + gap))
    for i, lines in enumerate(left):
        y = top + i * (height + gap) + (height - len(lines) * round(TEXT * LINE)) // 2
        canvas.lines(lines, MARGIN, y, TEXT, SOFT)
    return canvas.image


def gif(
    states: np.ndarray,
    path: str | os.PathLike,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int = 3,
    title: str | None = None,
    frames: int = 60,
    seconds: float = 4.0,
) -> None:
    """Writes the trajectories as an animation that loops: each frame a `sheet`, the last held for 2 s.

    states: (S, N, H, W, 1 or 3) in [-1, 1] (clipped). At most `frames` of them are shown, evenly apart, in
    `seconds`. Raises UserError where `path` does not end in .gif or cannot be written.
    """
    if Path(path).suffix.lower() != ".gif":
        raise UserError(f"An animation's path ends in .gif, got {ascii(os.fspath(path))}.")
    states = _states(states)
    shown = _evenly(len(states), frames)
    sheets = [sheet(states[s], captions, columns=columns, scale=scale, title=title) for s in shown]
    # one palette for all frames, of the last one's colours, keeps the paper from flickering
    palette = sheets[-1].quantize(256)
    coded = [image.quantize(palette=palette, dither=0) for image in sheets]
    step = max(20, round(1000 * seconds / len(shown)))  # milliseconds; viewers slow down what is shorter
    buffer = io.BytesIO()
    coded[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=coded[1:],
        loop=0,
        duration=[step] * (len(coded) - 1) + [2000],
    )
    write_whole(path, buffer.getvalue())


def loss_curve(steps: Sequence[float], losses: Sequence[float], title: str = "Training loss") -> "Image":
    """The loss over the steps on a logarithmic axis: each value faint, their running mean drawn over it.

    steps: (n,) increasing; losses: (n,). Values without a logarithm (zero, negative, NaN, infinite) are left
    out; ValueError if none remains, or if the lengths differ.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"steps and losses have shapes {x.shape} and {y.shape}; they take one length (n,).")
    drawn = np.isfinite(x) & np.isfinite(y) & (y > 0)
    if not drawn.any():
        raise ValueError(
            f"losses has no positive finite value among its {len(y)}; the curve takes at least one."
        )
    x, y = x[drawn], np.clip(y[drawn], 1e-99, 1e99)
    smooth = _running_mean(y)

    # Frame the values, but not the first few steps' peaks if they are far above the rest.
    low, high = np.log10(y.min()), np.log10(max(np.quantile(y, 0.995), smooth.max()))
    pad = max(0.06 * (high - low), 0.02)
    low, high = low - pad, high + pad
    first, last = x.min(), max(x.max(), x.min() + 1)

    width, height = 900, 520
    left, right, top, bottom = 76, width - 28, 68, height - 58
    canvas = Canvas(
        width, height, finer=3
    )  # drawn three times as large and reduced, which smooths the lines

    def at(step: np.ndarray, log_loss: np.ndarray) -> list[tuple[float, float]]:
        u = left + (step - first) / (last - first) * (right - left)
        v = bottom - (np.clip(log_loss, low, high) - low) / (high - low) * (bottom - top)
        return list(zip(u.tolist(), v.tolist(), strict=True))

    for value in log_ticks(low, high):
        ((_, v),) = at(np.array([first]), np.array([math.log10(value)]))
        canvas.path([(left, v), (right, v)], RULE, 1)
        canvas.lines([f"{value:.4g}"], left - 10, v, TEXT, SOFT, anchor="rm")
    for value in ticks(first, last):
        ((u, _),) = at(np.array([value]), np.array([low]))
        canvas.path([(u, bottom), (u, bottom + 5)], SOFT, 1)
        canvas.lines([f"{value:,.10g}"], u, bottom + 10, TEXT, SOFT, anchor="ma")
    canvas.path(at(x, np.log10(y)), PALE_BLUE, 1)
    canvas.path(at(x, np.log10(smooth)), BLUE, 2.2)
    canvas.path([(left, bottom), (right, bottom)], SOFT, 1)
    canvas.lines(wrapped(title, TITLE, right - left, lines=1), left, 24, TITLE, INK)
    canvas.lines(["step"], right, bottom + 32, TEXT, SOFT, anchor="ra")
    canvas.lines(["loss, logarithmic"], left, 50, TEXT, SOFT)
    canvas.lines([f"{smooth[-1]:.4g} at the end"], right, 50, TEXT, BLUE, anchor="ra")
    return canvas.image


def save(image: "Image", path: str | os.PathLike) -> None:
    """Writes the picture, whole or not at all, in the format of the path's ending. Raises UserError."""
    path = check_writable(path)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[path.suffix.lower()])
    write_whole(path, buffer.getvalue())


def check_writable(path: str | os.PathLike) -> Path:
    """The path, if `save` can write a picture there; otherwise UserError. Call it before the work."""
    return _check_writable(path, tuple(FORMATS))


# --- arrays ------------------------------------------------------------------------------------------------


def _states(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states)
    if states.ndim != 5 or states.shape[0] == 0:
        raise ValueError(
            f"states has shape {states.shape}; it takes (S, N, H, W, 1 or 3) with S of at least 1."
        )
    return states


def _evenly(count: int, at_most: int) -> list[int]:
    """At most so many of 0..count-1, evenly apart, both ends included."""
    if at_most < 2:
        raise ValueError(f"at least 2 states are shown, the first and the last; got {at_most}.")
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()


def _running_mean(y: np.ndarray) -> np.ndarray:
    """The mean of the 1/25 of all values around each, and of those that there are at the ends."""
    half = len(y) // 50
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    back = np.minimum(half, i)
    ahead = np.minimum(back, len(y) - 1 - i)  # no farther than back: early on, the loss falls fast
    mean = (total[i + ahead + 1] - total[i - back]) / (back + ahead + 1)
    return np.maximum(mean, y.min())  # rounding in the sums may lose a value far below the others


def _text_height(lines: int, size: int) -> int:
    return size // 2 + lines * round(size * LINE) if lines else 0
