"""How good are a model's digits?  A frozen classifier and the measurements that make the captions judge them.

    prompt accuracy     the share of pictures in which the judge reads the digit that was asked for
    agreement           the share of the asked-for attributes (thin, leaning left, ...) that measure as asked
    FID                 the distance of the judge's features from those of MNIST's 10,000 test images
    dark pixels         the shares of black pixels, and of nearly black ones, which show as a veil or as grain
    precision, recall   how many pictures look real; how many real images could have been generated

FID depends on the number of images and on the classifier.  So two more FIDs are given for comparison: the floor, of as
many real training images, and the ceiling, of as many draws from one Gaussian fitted to the pixels.  Which real images
are drawn matters, so the floor is a mean over several random draws, with its spread.  metrics.py has the formulas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff.data import attributes, digit_captions, mnist
from minidiff.data.attributes import Words
from minidiff.data.pixels import to_float
from minidiff.engine.random import SampleStreams, generator
from minidiff.errors import UserError
from minidiff.evaluation import check_count
from minidiff.evaluation.judge import fid, load_judge
from minidiff.evaluation.metrics import attribute_matches, dark_shares, digits_right, mean_cov, precision_recall, share
from minidiff.systems.digit_classifier import DigitClassifier

BATCH = 256                                                 # pictures sampled at a time
DRAWS = 10                                                  # of real images, for FID's floor


@dataclass(frozen=True)
class Report:
    """The result of `evaluate_digits`; rates are shares of 1."""

    images: int                             # over which all but the held_out rates are taken
    digit_accuracy: float
    agreement: float                        # over all attributes asked for
    agreement_thickness: float
    agreement_slant: float
    agreement_width: float
    held_out_images: int
    held_out_digit_accuracy: float
    held_out_agreement: float
    held_out_all_right: float               # the digit and every attribute asked for
    fid: float
    fid_floor: float                        # of as many real training images: the mean over DRAWS random draws
    fid_floor_spread: float                 # the standard deviation over these draws
    fid_ceiling: float                      # of as many draws from a Gaussian fitted to the pixels
    judge_accuracy: float                   # on MNIST's test images; NaN where it is unknown
    dark_pixels: dict                       # the shares of pixels at 0, 1-4 and 5-20 of 255, and of real images
    dark_pixels_real: dict
    precision: float                        # improved precision and recall, against the first of these draws
    recall: float
    seconds_per_image: float
    options: dict                           # of sampling: scale, steps, ...
    seed: int

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value); rates have their standard errors."""
        return [
            ("prompt accuracy (digit)", rate(self.digit_accuracy, self.images)),
            ("attribute agreement", f"{100 * self.agreement:.1f} %  (thickness {100 * self.agreement_thickness:.1f}, "
                                    f"slant {100 * self.agreement_slant:.1f}, width {100 * self.agreement_width:.1f})"),
            ("held-out: digit", rate(self.held_out_digit_accuracy, self.held_out_images)),
            ("held-out: attributes", f"{100 * self.held_out_agreement:.1f} %"),
            ("held-out: all right", rate(self.held_out_all_right, self.held_out_images)),
            ("FID", f"{self.fid:.2f}  (floor {self.fid_floor:.2f} +- {self.fid_floor_spread:.2f}, "
                    f"ceiling {self.fid_ceiling:.1f})"),
            ("precision, recall", f"{self.precision:.3f}, {self.recall:.3f}"),
            (f"pixels at {', '.join(self.dark_pixels)}", f"{percent(self.dark_pixels)} %  "
                                                         f"(real images {percent(self.dark_pixels_real)})"),
            ("images", f"{self.images} + {self.held_out_images} held-out, {options_text(self.options)}"
                       f"seed {self.seed}"),
            ("seconds per image", f"{self.seconds_per_image:.3f}"),
            ("judge's own accuracy", f"{100 * self.judge_accuracy:.2f} % of MNIST's test set"),
        ]

    def as_dict(self) -> dict:
        return asdict(self)


def rate(p: float, n: int) -> str:
    """A share of n pictures with its standard error, in percent."""
    return f"{100 * p:.1f} % +- {100 * (max(p * (1 - p), 0) / max(n, 1)) ** 0.5:.1f}"


def percent(shares: Mapping[str, float]) -> str:
    """{"0": 0.818, "1-4": 0.003} as "81.8, 0.3"."""
    return ", ".join(f"{100 * p:.1f}" for p in shares.values())


def options_text(options: Mapping) -> str:
    """{"scale": 2.0, "steps": 15, "size": None} as "scale 2, steps 15, "."""
    return "".join(f"{name} {value:g}, " if isinstance(value, (int, float)) else f"{name} {value}, "
                   for name, value in options.items() if value is not None)


def evaluate_digits(model, *, count: int = 1000, options: Mapping | None = None, seed: int = 0,
                    judge: DigitClassifier | str | Path | None = None,
                    progress: Callable = lambda batches: batches) -> Report:
    """Samples `count` captions of real images, and a fifth as many of held-out combinations, and judges the pictures.

    model: a system that draws pictures of captions.  options: of its `sample`; those left out keep their defaults.
    judge: a digit classifier, or its file; by default the one that `load_judge` finds.  progress: is given the batches,
    and yields them.  The captions come from the first 10,000 training images.
    """
    check_count(count)
    judge = load_judge(judge) if judge is None or isinstance(judge, (str, Path)) else judge
    options = {**(model.options() or {}), **(options or {})}
    real = mnist.packed()
    prompts = prompts_like(real, count, generator(seed, "captions of an evaluation"))

    started = time.perf_counter()
    images = draw(model, prompts, options, seed, progress)
    seconds = (time.perf_counter() - started) / len(prompts)

    features, digits = judge.read(images)
    right = digits_right(prompts, digits)                   # (N,): every one of these prompts names a digit
    matches, wanted = attribute_matches(prompts, images)                            # (N, 3)
    usual, held_out = slice(0, count), slice(count, None)
    thickness, slant, width = (share(m[w]) for m, w in zip(matches[usual].T, wanted[usual].T, strict=True))
    return Report(
        images=count, digit_accuracy=share(right[usual]), agreement=share(matches[usual][wanted[usual]]),
        agreement_thickness=thickness, agreement_slant=slant, agreement_width=width,
        held_out_images=len(prompts) - count, held_out_digit_accuracy=share(right[held_out]),
        held_out_agreement=share(matches[held_out][wanted[held_out]]),
        held_out_all_right=share((right & (matches == wanted).all(axis=1))[held_out]),
        dark_pixels=dark_shares(images[usual]), dark_pixels_real=dark_shares(real.images),
        **compare_with_real(judge, features[usual], real, generator(seed, "what an evaluation compares with")),
        judge_accuracy=judge.notes.get("accuracy", float("nan")), seconds_per_image=seconds, options=options, seed=seed)


def prompts_like(real: mnist.Images, count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions of real images, and then a fifth as many of held-out combinations.

    The captions are of random images among `real`, so that the digits and words asked for are as frequent as in the
    data; so 4.9 % of them are of held-out combinations, too.  UserError unless count is from 1 to the number of `real`.
    """
    if not 1 <= count <= len(real):
        raise UserError(f"the number of images must be from 1 to {len(real)}, as many as the real ones that they are "
                        f"compared with, not {count}")
    chosen = rng.permutation(len(real))[:count]
    words = attributes.name(attributes.measure(real.images[chosen]))
    prompts = [digit_captions.caption(rng, int(real.labels[i]), seen) for i, seen in zip(chosen, words, strict=True)]
    combinations = sorted(attributes.HELD_OUT)
    unseen = [combinations[i % len(combinations)] for i in range(max(count // 5, len(combinations)))]
    return prompts + [digit_captions.caption(rng, digit, Words(thickness, slant), keep=1.0)
                      for digit, thickness, slant in unseen]


def draw(model, prompts: list[str], options: Mapping, seed: int,
         progress: Callable = lambda batches: batches) -> np.ndarray:
    """One picture of each prompt, (N, H, W, C), picture i from stream (seed, i), BATCH at a time."""
    streams = SampleStreams(seed, len(prompts))
    batches = [slice(i, min(i + BATCH, len(prompts))) for i in range(0, len(prompts), BATCH)]
    return np.concatenate([model.sample(prompts[batch], streams=streams[batch], **options)
                           for batch in progress(batches)])


def compare_with_real(judge: DigitClassifier, features: np.ndarray, real: mnist.Images,
                      rng: np.random.Generator) -> dict[str, float]:
    """FID, its floor and ceiling, precision and recall of pictures' features (N, D), as fields of a Report.

    The floor is the mean over DRAWS sets of N real images, each drawn at random without replacement; precision and
    recall compare with the first of the sets.  Where N is the number of real images, all sets are the same.
    """
    drawn = real_features(judge, real, len(features), rng)                          # (DRAWS, N, D)
    floors = [fid(judge, compared) for compared in drawn]
    ceiling, _ = judge.read(gaussian_pixels(real.images, len(features), rng))
    precision, recall = precision_recall(drawn[0], features)
    return {"fid": fid(judge, features), "fid_floor": float(np.mean(floors)),
            "fid_floor_spread": float(np.std(floors, ddof=1)), "fid_ceiling": fid(judge, ceiling),
            "precision": precision, "recall": recall}


def real_features(judge: DigitClassifier, real: mnist.Images, count: int, rng: np.random.Generator) -> np.ndarray:
    """The judge's features of DRAWS random sets of `count` real images each, (DRAWS, count, D)."""
    chosen = np.stack([rng.permutation(len(real))[:count] for _ in range(DRAWS)])   # (DRAWS, count)
    used, place = np.unique(chosen, return_inverse=True)    # an image in several sets is read once
    features, _ = judge.read(to_float(real.images[used])[..., None])
    return features[place.reshape(chosen.shape)]


def gaussian_pixels(images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A naive generator: draws from the Gaussian with the mean and covariance of the pixels, clipped to [-1, 1].

    images (N, H, W) uint8 -> (count, H, W, 1) float32.
    """
    mean, cov = mean_cov(to_float(images).reshape(len(images), math.prod(images.shape[1:])))
    values, vectors = np.linalg.eigh(cov)
    draws = mean + rng.standard_normal((count, len(mean))) * np.sqrt(values.clip(0)) @ vectors.T
    return draws.clip(-1, 1).reshape(count, *images.shape[1:], 1).astype(np.float32)
