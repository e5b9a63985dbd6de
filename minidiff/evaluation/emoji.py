"""How good are a model's emoji?  The true picture of every name is known, also of names that were never trained on.

    R@1, R@5    the share of pictures whose nearest real emoji of their style, or one of the nearest five, is the
                one that was asked for: by the distance of pixels, || x - y ||_2
    error       the mean squared error to the true picture, of pixels in [-1, 1]
    ceiling     R@1 of the true pictures themselves: less than 1 where two emoji are the same picture
    CLIP's R@k  the same by the distance of the image features of a CLIP, where one of emoji is named

Seen names were trained on; held-out ones are pairs of a thing and a skin tone of which training saw only the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff.data import emoji
from minidiff.data.emoji import Emoji
from minidiff.engine.backend import to_numpy
from minidiff.engine.random import generator
from minidiff.evaluation.pictures import clip_of
from minidiff.evaluation.report import draw, options_text, rate
from minidiff.systems.clip import CLIP

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
    clip: dict | None = None                # CLIP's R@1 and R@5: {"r1", "r5", "held_out_r1", "held_out_r5"}; its file

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value); rates have their standard errors."""
        features = [] if self.clip is None else [
            (f"{names}: R@1, R@5 by CLIP's features",
             f"{rate(self.clip[which + 'r1'], n)}, {rate(self.clip[which + 'r5'], n)}")
            for names, which, n in (("seen names", "", self.images), ("held-out", "held_out_", self.held_out_images))]
        return [
            ("seen names: R@1", rate(self.r1, self.images)), ("seen names: R@5", rate(self.r5, self.images)),
            ("seen names: error", f"{self.error:.3f}"),
            ("held-out: R@1", rate(self.held_out_r1, self.held_out_images)),
            ("held-out: R@5", rate(self.held_out_r5, self.held_out_images)),
            ("held-out: error", f"{self.held_out_error:.3f}"),
            ("ceiling: R@1 of the true pictures", f"{100 * self.ceiling:.1f} %"),
            *features,
            ("images", f"{self.images} + {self.held_out_images} held-out, among {self.among} real; "
                       f"{options_text(self.options)}seed {self.seed}"),
            ("seconds per image", f"{self.seconds_per_image:.3f}")]

    def as_dict(self) -> dict:
        return asdict(self)


def evaluate_emoji(model, *, count: int = 1000, options: Mapping | None = None, seed: int = 0,
                   data: Emoji | None = None, judge: CLIP | str | Path | None = None,
                   progress: Callable = lambda batches: batches) -> EmojiReport:
    """Samples `count` names that were trained on and all held-out ones (at most `count`), and looks for the true ones.

    model: a system that draws pictures of captions.  options: of its `sample`; those left out keep their defaults.
    data: by default the emoji that come with minidiff; those of several styles are compared with their own style.
    judge: a CLIP that was trained on these emoji, or its file.
    """
    seen = data or emoji.load(None)
    judge = None if judge is None else clip_of(judge, seen)
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

    usual, held_out = slice(0, len(chosen)), slice(len(chosen), None)

    def within(ranks: np.ndarray, k: int, part: slice) -> float:
        return float((ranks[part] < k).mean())
    every = np.array([*seen.styles, *unseen.styles])
    ranks, errors = rank_of(images, real, place, every), squared_errors(images, true)
    features = None
    if judge is not None:
        by_clip = rank_of(to_numpy(judge.embed_images(images)), to_numpy(judge.embed_images(real)), place, every)
        features = {f"{which}r{k}": within(by_clip, k, part) for which, part in (("", usual), ("held_out_", held_out))
                    for k in (1, NEAREST)} | {"file": str(getattr(judge, "file", ""))}
    return EmojiReport(
        images=len(chosen), r1=within(ranks, 1, usual), r5=within(ranks, NEAREST, usual),
        error=float(errors[usual].mean()), held_out_images=len(left_out), held_out_r1=within(ranks, 1, held_out),
        held_out_r5=within(ranks, NEAREST, held_out), held_out_error=float(errors[held_out].mean()),
        ceiling=float((rank_of(true, real, place, every) < 1).mean()), among=len(real), seconds_per_image=seconds,
        options=options, seed=seed, clip=features)


def rank_of(images: np.ndarray, real: np.ndarray, place: np.ndarray, styles: np.ndarray | None = None) -> np.ndarray:
    """How many real pictures are at least as near to each image as its true one, which is real[place]: (N,), 0 is best.

    images (N, ...), real (M, ...): pixels or features; place (N,); styles (M,): only those of the true one's style
    count.  A tie counts against the image.
    """
    flat, others = (a.reshape(len(a), -1).astype(np.float64) for a in (images, real))
    # || x - y ||^2 = || x ||^2 - 2 x . y + || y ||^2, whose first term is the same for all y
    distances = (others**2).sum(axis=1) - 2 * flat @ others.T                       # (N, M)
    own = distances[np.arange(len(flat)), place]
    nearer = distances <= own[:, None] + 1e-9
    if styles is not None:
        nearer &= styles == styles[place][:, None]
    return nearer.sum(axis=1) - 1


def squared_errors(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The mean squared error of each image, (N,)."""
    return ((images.astype(np.float64) - true) ** 2).mean(axis=(1, 2, 3))
