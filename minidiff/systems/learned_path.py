"""A path gamma(t) that is learned: its ends by the bound, the pieces between them by the variance of the loss.

The path is that of diffusion/variational.py: K straight pieces, and shares[k] of all times in piece k. Its parameters:

    gamma_0 = first + UNIT a,   gamma_1 = last + UNIT b                       learned a, b
    shares  = (1 - FLOOR) softmax(w) + FLOOR / K                              learned w (K,): positive, of sum 1

Pieces. In piece k, gamma has the density p = shares[k] K / (gamma_1 - gamma_0), and E[(gamma' m)^2] is the integral of
m^2 / p. At each gamma, d (m^2 / p) = -(m^2 / p) d log p. So for draws of this density, with the loss L = gamma' m = m/p
held fixed, the gradient of

    -E[ L^2 log shares[k] ]

is that of E[L^2], and so that of the variance, since E[L] does not depend on the pieces. No gradient passes through the
network; the paper's does (VDM appendix I.2).

Ends. The bound's derivative by gamma_1 is that of the prior's term plus m(gamma_1); by gamma_0 it is that of the
decoder's term less m(gamma_0). To know m at the ends, a few times are drawn there:

    t = (1 + 2 MARGIN) u - MARGIN      t < 0 counts as the start, t > 1 as the end, and the rest, uniform, as itself
"""

from __future__ import annotations

import numpy as np

from minidiff.diffusion.variational import LevelDecoder, PiecewiseLinear, noised
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.tensor import Tensor, record
from minidiff.nn.layers import parameter
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32

MARGIN = 1 / 32                                             # of the range of times, beyond each end
UNIT = 0.1                                                  # a step of the optimiser moves an end by this much less
SMALL = 0.01                                                # AdamW's steps do not depend on it, clipping by norm does
FLOOR = 0.1                                                 # of all times are shared equally: no piece is forgotten
INSIDE, AT_END = 1 + 2 * MARGIN, (1 + 2 * MARGIN) / MARGIN  # 1 / probability: of t within [0, 1], and of one end


def with_ends(u: np.ndarray) -> np.ndarray:
    """Times from u on [0, 1): below 0 for the start of the path, from 1 on for its end."""
    return INSIDE * u - MARGIN


class LearnedPath(Module):
    """gamma_0, gamma_1 and the shares of `pieces` pieces.  first, last: where the ends begin."""

    def __init__(self, first: float, last: float, pieces: int, rng: np.random.Generator):
        self.first, self.last = first, last
        self.ends, self.w = parameter((2,), 0, rng), parameter((pieces,), 0, rng)

    def gammas(self) -> tuple[Tensor, Tensor]:
        """gamma_0 and gamma_1, each ()."""
        ends = as_float32(self.ends)
        return self.first + UNIT * ends[0], self.last + UNIT * ends[1]

    def log_shares(self) -> Tensor:
        """log shares, (K,)."""
        w = as_float32(self.w)
        return ops.log((1 - FLOOR) * ops.softmax(w) + FLOOR / len(w))

    def path(self) -> PiecewiseLinear:
        """The path as learned so far, as plain numbers."""
        a, b = to_numpy(self.ends.data).astype(np.float64)
        w = to_numpy(self.w.data).astype(np.float64)
        e = np.exp(w - w.max())
        shares = (1 - FLOOR) * e / e.sum() + FLOOR / len(w)
        return PiecewiseLinear(self.first + UNIT * a, self.last + UNIT * b, tuple(shares))

    # --- losses for the parameters, each a mean over the batch, so that shards of a batch may be averaged ---------

    def prior(self, x_0) -> Tensor:
        """The bound's first term, nats a number, ()."""
        _, gamma_1 = self.gammas()
        # (alpha^2 x_0^2 - alpha^2 - log sigma^2) / 2
        alpha2, mean_square = ops.sigmoid(-gamma_1), float((x_0.astype(np.float64) ** 2).mean())
        return 0.5 * (alpha2 * (mean_square - 1) - ops.log_sigmoid(gamma_1))

    def decoder(self, x_0, t: np.ndarray, eps) -> Tensor:
        """The bound's third term, nats a number, (): from the samples at the start of the path, t < 0."""
        gamma_0, _ = self.gammas()
        drawn = np.flatnonzero(t < 0)
        if not len(drawn):                                  # its mean over batches is right
            return 0 * gamma_0
        decode, x_0, eps = LevelDecoder(float(gamma_0.data)), *(a[xp_of(a).asarray(drawn)] for a in (x_0, eps))
        share, xp = AT_END * len(drawn) / len(t), xp_of(gamma_0.data)
        nats = -share * decode(x_0, noised(x_0, np.full(len(drawn), decode.gamma), eps)).mean()
        slope = gamma_0.dtype.type(-share * decode.slope(x_0, eps).mean())
        return record(xp.asarray(nats, gamma_0.dtype), (gamma_0,), lambda dy: (dy * slope,))

    def at_the_ends(self, t: np.ndarray, m: np.ndarray) -> Tensor:
        """Of value 0, with the second term's derivatives by gamma_0 and gamma_1.  m (B,): 1/2 (eps - eps_hat)^2."""
        gamma_0, gamma_1 = self.gammas()
        m_0, m_1 = (float(AT_END * np.where(drawn, m, 0).mean()) for drawn in (t < 0, t >= 1))
        # d diffusion / d gamma_1 = m(gamma_1),   d diffusion / d gamma_0 = -m(gamma_0)
        return m_1 * (gamma_1 - gamma_1.detach()) - m_0 * (gamma_0 - gamma_0.detach())

    def pieces(self, t: np.ndarray, L: np.ndarray) -> Tensor:
        """Of value 0, with SMALL times the gradient of E[L^2] by the shares.  L (B,): gamma' m of each sample."""
        log_shares, inside = self.log_shares(), (t >= 0) & (t < 1)
        weight = np.bincount(self.path().piece(t)[inside], (INSIDE * L**2)[inside], minlength=len(log_shares)) / len(t)
        weight = Tensor(xp_of(log_shares.data).asarray(weight, dtype=log_shares.dtype))
        # -E[L^2 log shares[k]]
        return SMALL * ops.sum(weight * (log_shares.detach() - log_shares))
