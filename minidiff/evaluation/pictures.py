"""How good are a model's pictures of any data set?  A CLIP that was trained on the same pictures and captions judges.

    FID, precision, recall      of CLIP's image features I_e, against real pictures: metrics.py
    retrieval, R@k              the share of pictures whose own caption is among the k nearest, by I_e . T_e, of all
                                captions that were asked for; beside it the same of the real pictures
    floor                       the FID of as many other real pictures

Half of the real pictures, drawn at random, are what FID, precision and recall compare with; the floor is of the other
half.  Where the data set has test images, they are the real pictures.  All numbers depend on the CLIP and on how many
pictures there are, so compare models by one CLIP and one number of pictures.  CLIP's own score (Hessel et al. 2021,
arXiv 2104.08718) is the cosine I_e . T_e itself; a rank is easier to read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff import systems
from minidiff.data.dataset import Dataset
from minidiff.engine.backend import to_numpy
from minidiff.engine.random import generator
from minidiff.errors import UserError
from minidiff.evaluation.metrics import frechet_distance, mean_cov, precision_recall
from minidiff.evaluation.report import draw, options_text, rate
from minidiff.systems.clip import CLIP

NEAREST = 5
MOST = 10_000                                               # real pictures
LEAST = 8                                                   # two halves, each with more than the 3 that recall needs


@dataclass(frozen=True)
class PicturesReport:
    """The result of `evaluate_pictures`; rates are shares of 1."""

    images: int
    r1: float                               # retrieval of the caption, from a generated picture
    r5: float
    real_r1: float                          # the same, from the real pictures of these captions
    real_r5: float
    captions: int                           # different ones, among which is retrieved
    fid: float
    fid_floor: float                        # of other real pictures, as many as are at hand
    precision: float
    recall: float
    compared: int                           # real pictures that FID compares with
    judge: str                              # the file of the CLIP
    seconds_per_image: float
    options: dict
    seed: int

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value); rates have their standard errors."""
        return [
            ("caption found: R@1", f"{rate(self.r1, self.images)}  (real pictures {100 * self.real_r1:.1f} %)"),
            ("caption found: R@5", f"{rate(self.r5, self.images)}  (real pictures {100 * self.real_r5:.1f} %)"),
            ("FID", f"{self.fid:.4f}  (floor {self.fid_floor:.4f})"),
            ("precision, recall", f"{self.precision:.3f}, {self.recall:.3f}"),
            ("images", f"{self.images} of {self.captions} captions, compared with {self.compared} real ones, "
                       f"{options_text(self.options)}seed {self.seed}"),
            ("seconds per image", f"{self.seconds_per_image:.3f}")]

    def as_dict(self) -> dict:
        return asdict(self)


def evaluate_pictures(model, *, count: int = 1000, options: Mapping | None = None, seed: int = 0,
                      data: Dataset | None = None, judge: CLIP | str | Path | None = None,
                      progress: Callable = lambda batches: batches) -> PicturesReport:
    """Samples `count` captions of real pictures, and judges the pictures by a CLIP.

    model: a system that draws pictures of captions.  data: what it was trained on.  judge: a CLIP, or its file; by
    default the one of `minidiff train --system clip`.  options: of sampling; those left out keep their defaults.
    UserError where there are no such data, or where the CLIP is of other pictures.
    """
    if data is None:
        raise UserError("this model was trained on pictures that minidiff does not have: name them with --data")
    real = data.test() or data
    if len(real) < LEAST:
        raise UserError(f"there are {len(real)} real pictures to compare with: at least {LEAST} are needed")
    judge = clip_of(judge, data)
    options = {**(model.options() or {}), **(options or {})}
    asked = generator(seed, "captions of an evaluation of pictures")
    chosen = np.resize(asked.permutation(len(real)), count)         # after the last one again from the first
    prompts = [real.caption(int(i), asked) for i in chosen]

    started = time.perf_counter()
    images = draw(model, prompts, options, seed, progress)
    seconds = (time.perf_counter() - started) / count

    fake = to_numpy(judge.embed_images(images))                                     # (N, D)
    captions = list(dict.fromkeys(prompts))
    texts = to_numpy(judge.embed_captions(captions))                                # (K, D)
    own = np.array([captions.index(p) for p in prompts])
    ranks = caption_ranks(fake, texts, own)
    real_ranks = caption_ranks(to_numpy(judge.embed_images(real.images(chosen))), texts, own)

    order = generator(seed, "real pictures of an evaluation").permutation(len(real))[:MOST]
    half = len(order) // 2
    compared, others = (to_numpy(judge.embed_images(real.images(part))) for part in (order[:half], order[half:]))
    n = min(count, half)                                    # precision and recall compare as many with as many
    precision, recall = precision_recall(compared[:n], fake[:n])
    return PicturesReport(
        images=count, r1=float((ranks < 1).mean()), r5=float((ranks < NEAREST).mean()),
        real_r1=float((real_ranks < 1).mean()), real_r5=float((real_ranks < NEAREST).mean()), captions=len(captions),
        fid=frechet_distance(*mean_cov(fake), *mean_cov(compared)),
        fid_floor=frechet_distance(*mean_cov(others[:count]), *mean_cov(compared)),
        precision=precision, recall=recall, compared=half, judge=str(getattr(judge, "file", "")),
        seconds_per_image=seconds, options=options, seed=seed)


def caption_ranks(pictures: np.ndarray, texts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many captions are at least as near to each picture as its own, which is texts[own]: (N,), 0 is best.

    pictures (N, D), texts (K, D), unit rows; own (N,).  A tie counts against the picture.
    """
    nearness = pictures.astype(np.float64) @ texts.astype(np.float64).T             # (N, K), cosines
    mine = nearness[np.arange(len(pictures)), own]
    return (nearness >= mine[:, None] - 1e-9).sum(axis=1) - 1


def clip_of(judge: CLIP | str | Path | None, data: Dataset) -> CLIP:
    """The CLIP that judges pictures of these data.

    UserError where there is none, where it is of pictures of another shape, or where none is named and the one that is
    found was trained on other data.
    """
    if not (judge is None or isinstance(judge, (str, Path))):
        return judge
    how = f"train one with minidiff train --system clip --data {data.name if judge_knows(data) else 'FOLDER'}"
    path = judge or systems.weights_of("clip")
    if path is None:
        raise UserError(f"a CLIP of the same pictures judges, and there is none: {how}")
    clip = systems.load_system("clip", path)
    if judge is None and (clip.notes.get("dataset"), clip.notes.get("data")) != (data.name, data.source):
        what = f"the data set {data.name}" if judge_knows(data) else ascii(data.source)[1:-1]
        raise UserError(f"the CLIP in {path} was not trained on {what}: {how}, or name one with --judge")
    if tuple(clip.config.image.shape) != tuple(data.shape):
        raise UserError(f"the CLIP in {path} reads pictures of shape {tuple(clip.config.image.shape)}, not "
                        f"{tuple(data.shape)}: {how}")
    return clip


def judge_knows(data: Dataset) -> bool:
    """Whether the data set has a name that --data takes."""
    from minidiff.data.dataset import DATASETS
    return data.name in DATASETS
