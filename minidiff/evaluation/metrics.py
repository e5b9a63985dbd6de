"""Numbers that compare generated pictures with real ones, and with what their captions ask for.

FID, the Frechet distance between Gaussians fitted to the features of both sets    Heusel et al. 2017, eq. 6:

    FID           = ||mu_1 - mu_2||^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

Improved precision and recall (Kynkaanniemi et al. 2019): how many pictures look real, and how many real ones could
have been generated:

    f(phi, Phi)   = 1 if ||phi - phi'|| <= ||phi' - NN_k(phi', Phi)|| for some phi' in Phi, else 0          eq. 1
    precision     = the mean of f(phi_g, Phi_r) over the fake features phi_g
    recall        = the mean of f(phi_r, Phi_g) over the real features phi_r                                eq. 2

NN_k(phi', Phi) is the k-th nearest neighbour of phi' in Phi, itself not counted: a set's manifold is approximated by
balls around its points, each with the radius to the k-th neighbour.  FID mixes the two; guidance trades one for the
other.  All three depend on the features and on the number of points: compare sets of equal sizes.

Captions: rates are over what was asked.  A caption that names no digit counts in no rate of digits, and one that
mentions no width in no rate of widths.

    Heusel et al. 2017, arXiv 1706.08500;  Kynkaanniemi et al. 2019, arXiv 1904.06991
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minidiff.checks import whole
from minidiff.data import attributes, digit_captions
from minidiff.data.pixels import to_uint8
from minidiff.nn.images import clean_images

DARK = {"0": (0, 0), "1-4": (1, 4), "5-20": (5, 20)}         # levels of 255, both ends included
ROWS = 512                                                  # of distances at a time: 40 MB for 10,000 features


# --- features ---------------------------------------------------------------------------------------------

def mean_cov(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) and the covariance (D, D) of features (N, D), in float64; ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(f"features must be (N, D) with N of at least 2, for a covariance, not {features.shape}")
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1, S1, mu2, S2) -> float:
    """||mu1 - mu2||^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), between Gaussians; means (D,), covariances (D, D)."""
    _check_gaussians(mu1, S1, mu2, S2)
    # Tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2): without the squares, whose rounding
    # a root would magnify where S1 or S2 is singular
    trace = np.linalg.svd(_root(S1) @ _root(S2), compute_uv=False).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace), 0.0)


def _root(S: np.ndarray) -> np.ndarray:
    """S^(1/2) of a covariance."""
    values, vectors = np.linalg.eigh(S)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of fake features (M, D) compared with real ones (N, D), each a share of 1.

    k: the radius of the ball around a point is the distance to its k-th nearest neighbour.  Distances are computed
    from differences in float64, so that equal points are exactly 0 apart.  ValueError unless both sets are finite
    numbers of as many features, with more than k points each.
    """
    real, fake = _check_features(real, fake, k)
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """||phi' - NN_k(phi')||^2 of each of the points (N, D): (N,)."""
    # a row holds the point itself, at distance 0; sorted, the k-th of the others is at place k
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(points, points)])


def _covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of the points (M, D) that lie in the ball of at least one of the centres (N, D)."""
    return float(np.concatenate([(d <= radii).any(axis=1) for d in _distances(points, centres)]).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """||a_i - b_j||^2 of a (M, D) and b (N, D), a few rows at a time: (ROWS, N)."""
    from scipy.spatial.distance import cdist

    return (cdist(a[i:i + ROWS], b, "sqeuclidean") for i in range(0, len(a), ROWS))


# --- captions ---------------------------------------------------------------------------------------------

def digits_right(captions: Sequence[str], digits: np.ndarray) -> np.ndarray:
    """For each caption that names a digit, whether its picture shows it; digits (N,) are those of the pictures.

    The result, (M,) bool, is shorter than the captions where some name no digit.
    """
    asked = [digit_captions.parse(caption)[0] for caption in captions]
    return np.array([digit == shown for digit, shown in zip(asked, digits, strict=True) if digit is not None], bool)


def attribute_matches(captions: Sequence[str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(matches, wanted), each (N, 3) bool: which of thickness, slant and width a caption asks for, and which of these
    its image (H, W, 1) in [-1, 1], or uint8, has."""
    asked = np.array([digit_captions.parse(caption)[1] for caption in captions]).reshape(-1, 3)
    images = images if images.dtype == np.uint8 else clean_images(images)
    found = np.array(attributes.name(attributes.measure(images))).reshape(-1, 3)
    wanted = asked != ""
    matches = wanted & (asked == found)
    return matches, wanted


def dark_shares(images: np.ndarray) -> dict[str, float]:
    """The shares of pixels at the levels 0, 1 to 4 and 5 to 20 of 255: black, a faint veil on black, and grain.

    images: (B, H, W, C), in [-1, 1] or uint8.
    """
    levels = images if images.dtype == np.uint8 else to_uint8(clean_images(images))
    return {name: share((low <= levels) & (levels <= high)) for name, (low, high) in DARK.items()}


def share(right: np.ndarray) -> float:
    """The share of True in an array of bool; 1 for an empty one, because nothing that was asked is wrong."""
    return float(right.mean()) if right.size else 1.0


# --- checks -----------------------------------------------------------------------------------------------

def _check_gaussians(mu1, S1, mu2, S2) -> None:
    if not all(np.isfinite(a).all() for a in (mu1, S1, mu2, S2)):
        raise ValueError("the features must be finite, and at least two: their mean or covariance holds NaN or "
                         "infinity")


def _check_features(real, fake, k: int) -> list[np.ndarray]:
    """Both sets in float64, divided by one number so that the largest is about 1; ValueError as `precision_recall`
    says."""
    whole("k", k, 1)
    checked = []
    for name, features in (("real", np.asarray(real)), ("fake", np.asarray(fake))):
        if features.ndim != 2 or len(features) <= k or features.shape[1] < 1:
            raise ValueError(f"{name} must be features (N, D) with N of more than k = {k}, not {features.shape}")
        if features.dtype.kind not in "fiu":
            raise ValueError(f"{name} must be numbers, not {features.dtype}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} must be finite, and holds NaN or infinity")
        checked.append(features.astype(np.float64))
    if checked[0].shape[1] != checked[1].shape[1]:
        raise ValueError("real and fake must have as many features each, "
                         f"not {checked[0].shape[1]} and {checked[1].shape[1]}")
    # divided by a power of 2, which rounds nothing, so that the squares of distances are in range
    exponent = np.frexp(max(np.abs(features).max() for features in checked))[1]
    return [np.ldexp(features, -exponent) for features in checked]
