"""How good are a model's emoji?  The true picture of every name is known, also of names that were never trained on.

    R@1, R@5    the share of pictures whose nearest real emoji of their style, or one of the nearest five, is the
                one that was asked for: by the distance of pixels, || x - y ||_2
    error       the mean squared error to the true picture, of pixels in [-1, 1]
    ceiling     R@1 of the true pictures themselves: less than 1 where two emoji are the same picture

Seen names were trained on; held-out ones are pairs of a thing and a skin tone of which training saw only the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from minidiff.data import emoji
from minidiff.data.emoji import Emoji
from minidiff.engine.random import generator
from minidiff.evaluation.report import draw, options_text, rate

NEAREST = 5


@dataclass(frozen=True)
class EmojiReport:
    """The result of `evaluate_emoji`; rates are shares of 1."""

    images: int                             # of seen names
    r1: float
    r5: float
    error: float
    held_out_images: int
    held_out_r1: float
    held_out_r5: float
    held_out_error: float
    ceiling: float                          # R@1 of the true pictures, of all names asked for
    among: int                              # real emoji that are compared with
    seconds_per_image: float
    options: dict
    seed: int

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value); rates have their standard errors."""
        return [
            ("seen names: R@1", rate(self.r1, self.images)), ("seen names: R@5", rate(self.r5, self.images)),
            ("seen names: error", f"{self.error:.3f}"),
            ("held-out: R@1", rate(self.held_out_r1, self.held_out_images)),
            ("held-out: R@5", rate(self.held_out_r5, self.held_out_images)),
            ("held-out: error", f"{self.held_out_error:.3f}"),
            ("ceiling: R@1 of the true pictures", f"{100 * self.ceiling:.1f} %"),
            ("images", f"{self.images} + {self.held_out_images} held-out, among {self.among} real; "
                       f"{options_text(self.options)}seed {self.seed}"),
            ("seconds per image", f"{self.seconds_per_image:.3f}")]

    def as_dict(self) -> dict:
        return asdict(self)


def evaluate_emoji(model, *, count: int = 1000, options: Mapping | None = None, seed: int = 0,
                   data: Emoji | None = None, progress: Callable = lambda batches: batches) -> EmojiReport:
    """Samples `count` names that were trained on and all held-out ones (at most `count`), and looks for the true ones.

    model: a system that draws pictures of captions.  options: of its `sample`; those left out keep their defaults.
    data: emoji of one style; by default those that come with minidiff.
    """
    seen = data or emoji.load(None)
    unseen = seen.test()
    options = {**(model.options() or {}), **(options or {})}
    rng = generator(seed, "names of an evaluation of emoji")
    chosen = rng.permutation(len(seen))[:count]
    left_out = rng.permutation(len(unseen))[:count]
    prompts = [seen.caption(i) for i in chosen] + [unseen.caption(i) for i in left_out]
    true = np.concatenate([seen.images(chosen), unseen.images(left_out)])           # (N, H, W, 3)
    real = np.concatenate([seen.images(np.arange(len(seen))), unseen.images(np.arange(len(unseen)))])
    place = np.concatenate([chosen, len(seen) + left_out])                          # of the true picture among the real

    started = time.perf_counter()
    images = draw(model, prompts, options, seed, progress)
    seconds = (time.perf_counter() - started) / len(prompts)

    ranks, errors = rank_of(images, real, place), squared_errors(images, true)
    usual, held_out = slice(0, len(chosen)), slice(len(chosen), None)

    def within(k: int, part: slice) -> float:
        return float((ranks[part] < k).mean())
    return EmojiReport(
        images=len(chosen), r1=within(1, usual), r5=within(NEAREST, usual), error=float(errors[usual].mean()),
        held_out_images=len(left_out), held_out_r1=within(1, held_out), held_out_r5=within(NEAREST, held_out),
        held_out_error=float(errors[held_out].mean()), ceiling=float((rank_of(true, real, place) < 1).mean()),
        among=len(real), seconds_per_image=seconds, options=options, seed=seed)


def rank_of(images: np.ndarray, real: np.ndarray, place: np.ndarray) -> np.ndarray:
    """How many real pictures are at least as near to each image as its true one, which is real[place]: (N,), 0 is best.

    images (N, H, W, C), real (M, H, W, C), place (N,).  A tie counts against the image.
    """
    flat, others = (a.reshape(len(a), -1).astype(np.float64) for a in (images, real))
    # || x - y ||^2 = || x ||^2 - 2 x . y + || y ||^2, whose first term is the same for all y
    distances = (others**2).sum(axis=1) - 2 * flat @ others.T                       # (N, M)
    own = distances[np.arange(len(flat)), place]
    return (distances <= own[:, None] + 1e-9).sum(axis=1) - 1


def squared_errors(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The mean squared error of each image, (N,)."""
    return ((images.astype(np.float64) - true) ** 2).mean(axis=(1, 2, 3))
