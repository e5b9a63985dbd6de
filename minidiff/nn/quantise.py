"""Vector quantisation: each vector is replaced by the nearest entry of a codebook, which is learned.

    k(z) = argmin_j || z - e_j ||                                                                     eq. 1, 2
    z_q  = e_k(z),   d z_q / d z = 1: the gradient passes unchanged      straight-through, Bengio et al. 2013
    L    = || sg[z] - e_k ||^2  +  beta || z - sg[e_k] ||^2                                              eq. 3

sg[.] stops gradients. The first term moves only the codes, toward the vectors that chose them. The second, the
commitment loss, moves only the encoder, toward its codes. van den Oord et al. 2017, arXiv 1711.00937.

A code that no vector chooses gets no gradient and stays unused. `revive` moves it to a vector of a batch, drawn with a
probability in proportion to its squared error, as k-means++ chooses its centres (Arthur & Vassilvitskii 2007). The
optimiser's moments and the average of that code are not reset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.tensor import Tensor, record
from minidiff.nn.layers import parameter
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32


@dataclass(frozen=True, eq=False)
class Quantised:
    """The result of quantising vectors."""

    z_q: Tensor                             # (..., D) the codes; its gradient passes to z
    ids: np.ndarray                         # (...,) their numbers, of 0..K-1
    codebook: Tensor                        # ()  mean || sg[z] - e_k ||^2 / D, float32 at least
    commitment: Tensor                      # ()  mean || z - sg[e_k] ||^2 / D, float32 at least


class Codebook(Module):
    """K codes of D numbers: (..., D) -> Quantised."""

    def __init__(self, K: int, D: int, rng: np.random.Generator):
        if min(K, D) < 1:
            raise ValueError(f"Codebook: K and D must be at least 1, not {K} and {D}")
        self.codes = parameter((K, D), 1, rng)

    def nearest(self, z: np.ndarray) -> np.ndarray:
        """k(z): (..., D) -> (...,) int, of 0..K-1.  ValueError if a vector is not finite, since no code is nearest."""
        ids, error = self._nearest(z)
        if not xp_of(error).isfinite(error).all():
            raise ValueError("Codebook: z must be finite, and holds NaN or infinity")
        return ids

    def look_up(self, ids: np.ndarray) -> np.ndarray:
        """The codes of ids: (...,) int -> (..., D)."""
        return ops.embedding(self.codes.detach(), ids).data

    def forward(self, z: Tensor) -> Quantised:
        ids, _ = self._nearest(z.data)                      # if z is not finite, neither are the losses
        e = ops.embedding(self.codes, ids)                                          # (..., D)
        codes, vectors = as_float32(e), as_float32(z)       # for the losses
        return Quantised(straight_through(z, e.data), ids, _mean_square(vectors.detach() - codes),
                         _mean_square(vectors - codes.detach()))

    def revive(self, z: np.ndarray, rng: np.random.Generator, fewest: int = 1) -> int:
        """Moves each code that fewer than `fewest` of the vectors z (N, D) choose to one of these; returns how many."""
        ids, error = map(to_numpy, self._nearest(z))
        dead = np.flatnonzero(np.bincount(ids, minlength=len(self.codes)) < fewest)
        there = np.flatnonzero(error > 0)                   # a vector that equals its code needs no other
        dead = dead[:len(there)]
        if len(dead):
            chosen = rng.choice(there, len(dead), replace=False, p=error[there] / error[there].sum())
            self.codes.data[dead] = z[chosen]
            self.codes.data = self.codes.data               # set, so that a graph of the old codes is refused
        return len(dead)

    def _nearest(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k(z), and the error || z - e_k ||^2, of shape (...,) both."""
        # in float64 and about the codes' median: far from 0 the squares would lose the digits that tell codes apart
        e, z = self.codes.data.astype(np.float64), z.astype(np.float64)
        if z.shape[-1:] != e.shape[1:]:
            raise ValueError(f"Codebook: z must be (..., {e.shape[1]}), not {z.shape}")
        centre = xp_of(e).sort(e, axis=0)[len(e) // 2]      # (D,); for float32 the differences are exact
        e, rows = e - centre, z.reshape(-1, e.shape[1]) - centre
        # || z - e_j ||^2 = ||z||^2 - 2 z e_j + ||e_j||^2,  where ||z||^2 is the same for all j
        ids = ((e * e).sum(axis=1) / 2 - rows @ e.T).argmin(axis=1)                 # (N,)
        error = ((rows - e[ids]) ** 2).sum(axis=1)
        return ids.reshape(z.shape[:-1]), error.reshape(z.shape[:-1])


def straight_through(z: Tensor, z_q: np.ndarray) -> Tensor:
    """A Tensor with exactly the value z_q, whose gradient passes to z: z + sg[z_q - z] without its rounding."""
    if z.shape != z_q.shape:
        raise ValueError(f"straight_through: z_q must have z's shape {z.shape}, not {z_q.shape}")
    return record(z_q, (z,), lambda dy: (dy,))


def usage(ids: np.ndarray, K: int) -> tuple[float, float]:
    """(perplexity, share of the K codes that are used) of the codes ids.

    The perplexity is exp(-sum_k p_k log p_k): K if all codes are used equally often, 1 if only one is used.
    """
    counts = np.bincount(to_numpy(ids).reshape(-1), minlength=K)
    if len(counts) > K or not counts.sum():
        raise ValueError(f"usage: ids must be some of 0..{K - 1}, not {counts.sum()} up to {len(counts) - 1}")
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum())), float((counts > 0).mean())


def _mean_square(d: Tensor) -> Tensor:
    return ops.mean(d * d)
