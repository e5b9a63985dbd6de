"""Pictures: the marginals of a schedule over t, and one image while noise is added to it.

    E[x_t | x_0]     = alpha_t x_0                  the simulated chain's mean lies on this line
    Var[x_t | x_0]   = sigma_t^2 = 1 - alpha_t^2    and its variance on this one

Over the n pixels of one image of mean m_0 and variance v_0,

    mean(x_t)        is alpha_t m_0 on average, with standard deviation sigma_t / sqrt(n)
    var(x_t)         is alpha_t^2 v_0 + sigma_t^2 on average, with standard deviation
                     sqrt((2 sigma_t^4 + 4 sigma_t^2 alpha_t^2 v_0) / (n - 1))       of a noncentral chi squared
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minidiff import pictures
from minidiff.data.image_file import open_image
from minidiff.data.pixels import to_float
from minidiff.diffusion import gaussian
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import generator
from minidiff.errors import UserError
from minidiff.pictures import plots
from minidiff.verify.forward import MEAN_SIGMAS, chains, simulate, variance_bound
from minidiff.verify.rows import Row, compare

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 128                                                  # pixels, the longest side of the watched image
CELL = 156                                                  # pixels, the width of each state and its numbers


def plot(schedule: Schedule, *, seed: int = 0) -> "Image":
    """Mean and variance of x_t over t, simulated and in closed form, and the SNR on a logarithmic axis."""
    x_0, t = 1.0, np.arange(schedule.T)
    n = chains(schedule.T)
    some = np.unique(np.linspace(0, schedule.T - 1, 25).round().astype(int))
    measured = simulate(schedule, x_0, n, some, generator(seed, "chains of a plot"))
    closed = gaussian.q_mean_variance(schedule, np.full(schedule.T, x_0), t)
    few = t[:: max(1, schedule.T // 2000)]                  # more points than pixels add nothing
    panels = [
        plots.Panel(title, "t", label, [("closed form", few, line[few], "-"), (f"{n:,} chains", some, dots, "o")])
        for line, dots, title, label in zip(closed, measured, ("Mean of x_t, from x_0 = 1", "Variance of x_t"),
                                            (r"$\sqrt{\bar\alpha_t}$", r"$1 - \bar\alpha_t$"), strict=True)
    ]
    snr = np.exp(schedule.log_snr(few))
    if ((snr > 0) & np.isfinite(snr)).any():                # not for T = 1 at SNR 0
        below = " (0 at the end)" if schedule.alpha_bar[-1] == 0 else ""
        panels.append(plots.Panel("Signal to noise" + below, "t", r"$\alpha_t^2 / \sigma_t^2$",
                                  [("SNR", few, snr, "-"), ("", few[[0, -1]], [1, 1], "--")], log_y=True))
    return plots.panels(panels)


# ---- one image ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Watched:
    """One image at one time: the measured mean and variance of its pixels, and those of the closed form."""

    t: int                                                  # -1 is the image itself
    x_t: np.ndarray                                         # (H, W, C)
    mean: float
    variance: float                                         # over n - 1, like v_0
    expected_mean: float
    expected_variance: float
    mean_error: float                                       # standard errors
    variance_error: float
    variance_bound: float                                   # exceeded by chance in 5.6e-8 of all runs


def load_image(path: Path) -> np.ndarray:
    """A picture, as (H, W, 1 or 3) in [-1, 1], with H and W at most SIDE.

    UserError if it cannot be read, is too large, or has only one pixel.
    """
    from PIL import Image

    shown, image = ascii(str(path)), open_image(path)
    if image.mode.startswith("I;16") and "transparency" in image.info:
        raise UserError(f"{shown} has 16 bits and a transparent colour: save it without transparency")
    if image.mode.startswith("I;16"):                       # 16-bit grey: Pillow would keep the lower 8 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"{shown} has 32-bit pixels (mode {image.mode}): --watch takes 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:                         # on white, as viewers show it; what it hid stays hidden
        above, image = image.convert("RGBA"), Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    image = image.convert("L" if grey else "RGB")
    image.thumbnail((SIDE, SIDE))
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)                                    # (H, W, C)
    if pixels.size < 2:
        raise UserError(f"{shown} has a single grey pixel: --watch needs at least two to measure a variance")
    return to_float(pixels)


def watch(schedule: Schedule, x_0: np.ndarray, count: int = 10, *, seed: int = 0) -> list[Watched]:
    """The image x_0 (H, W, C) at `count` times from -1 to T-1; each state is computed from the previous one.

    ValueError for fewer than two numbers, whose variance cannot be measured, or fewer than two times.
    """
    if x_0.size < 2 or count < 2:
        raise ValueError(f"x_0 and count must be at least two numbers and 2, not {x_0.size} and {count}")
    rng, x, s = generator(seed, "noise on a picture"), x_0.astype(np.float64), -1
    n, m_0, v_0 = x.size, float(x.mean()), float(x.var(ddof=1))
    states = []
    for t in np.unique(np.linspace(-1, schedule.T - 1, count).round().astype(int)).tolist():
        if t > s:
            # x_t = alpha_ts x_s + sqrt(sigma2_ts) z
            alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
            x, s = alpha_ts * x + math.sqrt(sigma2_ts) * rng.standard_normal(x.shape), t
        abar = float(schedule.abar(t))
        signal, noise = abar * v_0, 1 - abar
        states.append(Watched(
            t, x, float(x.mean()), float(x.var(ddof=1)),
            expected_mean=math.sqrt(abar) * m_0,
            expected_variance=signal + noise,
            mean_error=math.sqrt(noise / n),
            variance_error=math.sqrt((2 * noise**2 + 4 * noise * signal) / (n - 1)),
            variance_bound=variance_bound(signal, noise, n) if noise else 0.0))
    return states


def rows(states: list[Watched], seed: int) -> list[Row]:
    """Two rows: the worst mean and the worst variance. With ten states, one of 1e6 runs fails by chance."""
    noisy = [w for w in states if w.t >= 0]
    mean, variance = (
        compare("watch", f"{what} over the pixels at {len(noisy)} times", expected, measured, allowed, formula,
                lambda i: f"t = {noisy[i].t}", random=True).drawn_from(seed)
        for what, expected, measured, allowed, formula in (
            ("mean", [w.expected_mean for w in noisy], [w.mean for w in noisy],
             [MEAN_SIGMAS * w.mean_error for w in noisy], "mean(x_t) = alpha_t mean(x_0)"),
            ("variance", [w.expected_variance for w in noisy], [w.variance for w in noisy],
             [w.variance_bound for w in noisy], "var(x_t) = alpha_t^2 var(x_0) + sigma_t^2")))
    return [mean, variance]


def picture(schedule: Schedule, states: list[Watched]) -> "Image":
    """The states in rows of five; below each its measured and expected mean and variance."""
    captions = []
    for w in states:
        lines = [f"t = {w.t}" if w.t >= 0 else "x_0, clean"]
        for name, measured, expected, error in (("mean", w.mean, w.expected_mean, w.mean_error),
                                                ("variance", w.variance, w.expected_variance, w.variance_error)):
            said = f"{_fixed(expected, 4)} \u00b1 {error:.4f}" if w.t >= 0 else "of the image itself"
            lines += [f"{name} {_fixed(measured, 4)}", said]
        captions.append("\n".join(lines))
    title = (f"q(x_t | x_0) on the {schedule.name} schedule, T = {schedule.T}: measured, and below it the closed form "
             "with one standard error")
    return pictures.sheet(np.stack([w.x_t for w in states]), captions, columns=5, title=title,
                          scale=max(1, SIDE // max(states[0].x_t.shape)), caption_width=CELL, caption_lines=5)


def table(states: list[Watched]) -> str:
    """The same numbers as aligned text, one line for each state."""
    lines = [f"{'t':>6}  {'mean':>9}  {'closed form':>20}  {'variance':>9}  {'closed form':>20}"]
    for w in states:
        lines.append(f"{w.t:>6}  {_fixed(w.mean, 5):>9}  {f'{_fixed(w.expected_mean, 5)} +- {w.mean_error:.5f}':>20}  "
                     f"{w.variance:>9.5f}  {f'{w.expected_variance:.5f} +- {w.variance_error:.5f}':>20}")
    return "\n".join(lines)


def _fixed(a: float, digits: int) -> str:
    """The number with this many digits after the point; a rounded 0 has no minus sign."""
    return f"{round(a, digits) + 0.0:.{digits}f}"


def save(schedule: Schedule, states: list[Watched], path: Path) -> None:
    """Writes the picture, or an animation if the path ends in .gif. The file is written whole or not at all.

    UserError if it cannot be written.
    """
    if path.suffix.lower() == ".gif":
        side = max(states[0].x_t.shape[:2])
        pictures.gif(np.stack([w.x_t for w in states])[:, None], path, scale=max(1, 2 * SIDE // side),
                     title=f"{schedule.name}, T = {schedule.T}")
    else:
        pictures.save(picture(schedule, states), path)
