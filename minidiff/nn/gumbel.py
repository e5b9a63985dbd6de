"""Categorical variables by Gumbel noise, and their relaxation, which gradients pass through.

    g_k = -log(-log u_k),   u_k ~ uniform(0, 1)                     Gumbel(0, 1) noise
    argmax_k (l_k + g_k)    is k with probability softmax(l)_k      the Gumbel-max trick (Gumbel 1954)
    y = softmax((l + g) / tau)                                      Gumbel-softmax: Jang et al. 2016, eq. 2
                                                                    (the Concrete distribution: Maddison et al. 2016)

The relaxed y lies within the simplex, and its largest element is the one that Gumbel-max draws, whatever tau is.  As
tau falls to 0 it becomes that corner itself, a true sample whose gradient is useless; as tau grows it becomes the
simplex's centre, which says nothing.  Training starts warm and cools.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Independent Gumbel(0, 1) noise, float32 and finite."""
    # -log(u) is standard exponential; float32's least number keeps a draw of 0 finite
    exponential = np.maximum(rng.standard_exponential(shape, dtype=np.float32), np.finfo(np.float32).tiny)
    return -np.log(exponential)


def gumbel_max(logits, g):
    """A sample of each row: logits (..., K) and noise g of their shape -> (...) int."""
    _check(logits, g)
    return (logits + g).argmax(axis=-1)


def gumbel_softmax(logits: Tensor, g, tau) -> Tensor:
    """The relaxed sample of each row, (..., K), within the simplex.

    g: noise of the logits' shape.  tau: a temperature above 0, or an array of them that broadcasts to the logits.
    """
    _check(logits, g)
    xp = xp_of(logits.data)
    if not (xp.asarray(tau) > 0).all():
        raise ValueError(f"tau must be above 0, not {float(xp.asarray(tau).min()):g}")
    # y = softmax((l + g) / tau)
    return ops.softmax((logits + g) * xp.asarray(1 / tau, dtype=logits.dtype))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) of each row q = softmax(logits), in nats: (..., K) -> (...), 0 to log K."""
    # KL = sum_k q_k log(q_k / (1/K)) = log K - H(q)
    log_q = ops.log_softmax(logits)
    return math.log(logits.shape[-1]) + ops.sum(ops.exp(log_q) * log_q, axis=-1)


def _check(logits, g) -> None:
    if g.shape != logits.shape:
        raise ValueError(f"g must be of the logits' shape {logits.shape}, not {g.shape}")
