"""Improved precision and recall: how many pictures look real, and how many real ones could have been drawn.

    f(phi, Phi)   = 1 if ||phi - phi'|| <= ||phi' - NN_k(phi', Phi)|| for some phi' in Phi, else 0          (eq. 1)
    precision     = the mean of f(phi_g, Phi_r) over the fake features phi_g
    recall        = the mean of f(phi_r, Phi_g) over the real features phi_r                                (eq. 2)

NN_k(phi', Phi) is the k-th nearest neighbour of phi' in Phi, itself not counted: the manifold of a set is guessed to
be the balls around its points that reach so far.  FID is one number for both; guidance trades the one for the other.

Both depend on the features, and rise with the number of points: compare sets of equal sizes, and put beside them what
as many other real images get.  `measure` puts them beside accuracy and FID, for pictures and their captions.

    Kynkaanniemi et al. 2019, arXiv 1904.06991
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minidiff.data import attributes
from minidiff.data import digit_captions as captions

if TYPE_CHECKING:
    from minidiff.evaluation.judge import Judge

ROWS = 512                                                  # of distances at a time: 40 MB beside 10,000 features


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of fake features (M, D) beside real ones (N, D), each a share of 1.

    k: how far the ball around a point reaches, to its k-th nearest neighbour.  Distances are in float64, each from its
    own differences, so that equal points are at a distance of exactly 0.  ValueError for sets of other shapes, of k
    points or fewer, and for values that are not finite.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, not {k!r}")
    real, fake = _features("real", real, k), _features("fake", fake, k)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake must have as many features each, not {real.shape[1]} and {fake.shape[1]}")
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


@dataclass(frozen=True)
class Fidelity:
    """What `measure` finds; all but FID are shares of 1."""

    digit: float                            # pictures whose digit, as the judge reads it, was asked for
    agreement: float                        # of all the attributes asked for, those that measure as asked
    fid: float                              # of the judge's features, against MNIST's test images
    precision: float
    recall: float

    def row(self) -> str:
        """The five as cells of a table."""
        share = [f"{100 * value:.1f} %" for value in (self.digit, self.agreement, self.precision, self.recall)]
        return " | ".join([*share[:2], f"{self.fid:.1f}", *share[2:]])


def measure(images: np.ndarray, asked: Sequence[str], real: np.ndarray, judge: Judge) -> Fidelity:
    """How faithful pictures (M, 28, 28, 1) in [-1, 1] are to their M captions, and to real ones.

    real: the judge's features (N, 64) of real images that precision and recall compare with; N like M.
    """
    if len(images) != len(asked):
        raise ValueError(f"asked must be one caption for each of the {len(images)} images, not {len(asked)}")
    features, digits = judge.classifier.read(images)
    wanted = [captions.parse(caption) for caption in asked]
    found = attributes.name(attributes.measure(images))
    hits = np.sum([attributes.agreement(words, seen) for (_, words), seen in zip(wanted, found, strict=True)], axis=0)
    right = [digit == d for (digit, _), d in zip(wanted, digits, strict=True) if digit is not None]
    precision, recall = precision_recall(real, features)
    return Fidelity(float(np.mean(right)) if right else 1.0, float(hits[0] / hits[1]) if hits[1] else 1.0,
                    judge.fid(features), precision, recall)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """||phi' - NN_k(phi')||^2 of each of the points (N, D): (N,)."""
    # a row holds the point itself, at 0: whichever 0 is dropped, the k-th of the others is at place k
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(points, points)])


def _covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of the points (M, D) that lie within the ball of one of the centres (N, D) at least."""
    return float(np.concatenate([(d <= radii).any(axis=1) for d in _distances(points, centres)]).mean())


def _distances(a: np.ndarray, b: np.ndarray):
    """||a_i - b_j||^2 of a (M, D) and b (N, D), some rows at a time: (ROWS, N)."""
    from scipy.spatial.distance import cdist

    return (cdist(a[i:i + ROWS], b, "sqeuclidean") for i in range(0, len(a), ROWS))


def _features(name: str, features, k: int) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or len(features) <= k or features.shape[1] < 1:
        raise ValueError(f"{name} must be features (N, D) with N of more than k = {k}, not {features.shape}")
    if features.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be numbers, not {features.dtype}")
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        raise ValueError(f"{name} must be finite, and holds NaN or infinity")
    return features
