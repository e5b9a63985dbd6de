"""Embeddings as short codes: interpolation between two, principal axes, and numbers as bucket indices.

    slerp       slerp(a, b, theta) = (sin((1 - theta) omega) a + sin(theta omega) b) / sin(omega),  cos(omega) = a . b
                                                                                (Shoemake 1985, section 3.3)
    PCA         y = (z - mean) U,   U the K eigenvectors of Cov[z] with the largest eigenvalues, largest first
                z_hat = mean + y U^T,   E ||z - z_hat||^2 = the sum of the eigenvalues left out  (Pearson 1901)
    Buckets     code = floor((y - low) / width),   y_hat = low + (code + 1/2) width,   |y - y_hat| <= width / 2

The numbers that PCA, Buckets and Quantiles learn are saved with the weights, as parameters without gradients.
"""

from __future__ import annotations

import numpy as np

from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.module import Module


def slerp(a: np.ndarray, b: np.ndarray, theta) -> np.ndarray:
    """Spherical interpolation from a (theta 0) to b (theta 1), with constant angular speed: (..., D) -> (..., D).

    theta: a number, or an array that broadcasts to the leading axes.  Between vectors of length 1, all results have
    length 1.  Other vectors, such as noise, are interpolated with the same weights, from the angle between them.
    ValueError if a vector is 0, or if a and b are opposite, since then no path is the shortest.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp takes a and b of one shape, not {a.shape} and {b.shape}")
    theta = np.asarray(theta, np.float64)[..., None]
    lengths = np.linalg.norm(a.astype(np.float64), axis=-1) * np.linalg.norm(b.astype(np.float64), axis=-1)
    if not ((lengths > 0) & np.isfinite(lengths)).all():
        raise ValueError("slerp takes vectors with a direction, and one of a and b is 0, or not finite")
    cosine = (a.astype(np.float64) * b).sum(-1) / lengths
    if (cosine < -1 + 1e-9).any():
        raise ValueError("slerp takes vectors that are not opposite, and one pair is")
    omega = np.arccos(cosine.clip(-1, 1))[..., None]
    # as omega goes to 0 the weights go to 1 - theta and theta; sinc avoids the 0/0 there
    def weight(share):
        return share * np.sinc(share * omega / np.pi) / np.sinc(omega / np.pi)
    return (weight(1 - theta) * a + weight(theta) * b).astype(a.dtype)


class PCA(Module):
    """Principal component analysis: z (N, D) <-> y (N, K), the K <= D components with the largest variance."""

    def __init__(self, D: int, K: int):
        if not 1 <= K <= D:
            raise ValueError(f"PCA: components must be 1 to {D}, the embedding's channels, not {K}")
        self.mean, self.axes = Tensor(np.zeros(D, np.float32)), Tensor(np.zeros((D, K), np.float32))

    def fit(self, z: np.ndarray) -> np.ndarray:
        """Learns mean and axes from z (N, D); returns all D eigenvalues of the covariance, largest first."""
        D, K = self.axes.shape
        if z.ndim != 2 or z.shape[1] != D or len(z) == 0:
            raise ValueError(f"PCA: z must be (N, {D}) and not empty, not {z.shape}")
        _check_finite("PCA", z)
        mean = z.mean(axis=0, dtype=np.float64)
        centred = z - mean
        values, vectors = np.linalg.eigh(centred.T @ centred / len(z))              # in rising order
        values, vectors = values[::-1], vectors[:, ::-1]
        # the sign of an eigenvector is arbitrary: choose it so that its largest entry is positive
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(D)])
        self.mean.data, self.axes.data = mean.astype(np.float32), vectors[:, :K].astype(np.float32)
        return values

    def reduce(self, z: np.ndarray) -> np.ndarray:
        # y = (z - mean) U
        return (z - self.mean.data) @ self.axes.data

    def restore(self, y: np.ndarray) -> np.ndarray:
        # z_hat = mean + y U^T
        return self.mean.data + y @ self.axes.data.T


class Buckets(Module):
    """Writes each of K numbers as one of `count` codes, by buckets of equal width between its extremes."""

    def __init__(self, K: int, count: int):
        if min(K, count) < 1:
            raise ValueError(f"Buckets: K and count must be at least 1, not {K} and {count}")
        self.count = count
        self.low, self.high = Tensor(np.zeros(K, np.float32)), Tensor(np.ones(K, np.float32))

    def fit(self, y: np.ndarray) -> None:
        """Learns the smallest and largest values from y (N, K); ValueError where N is 0."""
        if not len(y):
            raise ValueError(f"Buckets: y must be (N, K) and not empty, not {y.shape}")
        _check_finite("Buckets", y)
        self.low.data, self.high.data = y.min(axis=0).astype(np.float32), y.max(axis=0).astype(np.float32)

    @property
    def width(self) -> np.ndarray:
        """The width of a bucket, for each of the K numbers: (K,)."""
        return (self.high.data - self.low.data) / np.float32(self.count)

    def quantise(self, y: np.ndarray) -> np.ndarray:
        """y (N, K) -> codes (N, K) of 0..count-1.  Values outside the learned range get the nearest bucket."""
        # code = floor((y - low) / width); a number that was constant has width 0, and gets the code 0
        xp = xp_of(self.low.data)
        _check_finite("Buckets", y)
        code = xp.floor((y - self.low.data) / xp.maximum(self.width, np.finfo(np.float32).tiny))
        return code.clip(0, self.count - 1).astype(np.int64)

    def dequantise(self, code: np.ndarray) -> np.ndarray:
        """Codes (N, K) -> the midpoints of their buckets, (N, K) float32."""
        # y_hat = low + (code + 1/2) width
        return (self.low.data + (code + np.float32(0.5)) * self.width).astype(np.float32)


class Quantiles(Module):
    """Writes a number as one of `count` codes: buckets that hold equally many of the numbers of `fit`."""

    def __init__(self, count: int):
        if count < 2:
            raise ValueError(f"Quantiles: count must be at least 2, not {count}")
        self.edges = Tensor(np.zeros(count - 1, np.float32))

    def fit(self, numbers: np.ndarray) -> None:
        if not len(numbers):
            raise ValueError("Quantiles: numbers must hold at least one number")
        _check_finite("Quantiles", numbers)
        count = len(self.edges.data) + 1
        self.edges.data = np.quantile(numbers, np.arange(1, count) / count).astype(np.float32)

    def quantise(self, numbers: np.ndarray) -> np.ndarray:
        """numbers (N,) -> codes (N,), 0 for the lowest and count-1 for the highest."""
        _check_finite("Quantiles", numbers)
        return xp_of(self.edges.data).searchsorted(self.edges.data, numbers, side="right")


def _check_finite(what: str, numbers) -> None:
    if not xp_of(numbers).isfinite(numbers).all():
        raise ValueError(f"{what}: the numbers must be finite, and hold NaN or infinity")
