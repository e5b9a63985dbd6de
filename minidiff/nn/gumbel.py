"""Samples of a categorical distribution by Gumbel noise, and their relaxation, which has gradients.

    g_k = -log(-log u_k),   u_k ~ uniform(0, 1)                     Gumbel(0, 1) noise
    argmax_k (l_k + g_k)    is k with probability softmax(l)_k      the Gumbel-max trick (Gumbel 1954)
    y = softmax((l + g) / tau)                                      Gumbel-softmax: Jang et al. 2017, eq. 2
                                                                    (the Concrete distribution: Maddison et al. 2017)

The relaxed sample y is a probability vector, and for every tau its largest element is the one that Gumbel-max draws.
As tau falls to 0, y becomes one-hot: a true sample, but with a useless gradient.  As tau grows, y becomes uniform,
whatever the logits are.  Training starts at a high temperature tau and lowers it.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.decoding import check_logits
from minidiff.nn.precision import as_float32


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Independent Gumbel(0, 1) noise, float32 and finite."""
    # -log(u) has a standard exponential distribution; float32's smallest normal number replaces a draw of 0
    exponential = np.maximum(rng.standard_exponential(shape, dtype=np.float32), np.finfo(np.float32).tiny)
    return -np.log(exponential)


def gumbel_max(logits, g):
    """A sample of each row: logits (..., K) and noise g of their shape -> (...) int.  -inf is never drawn."""
    _check(logits, g)
    check_logits(logits)
    return (logits + g).argmax(axis=-1)


def gumbel_softmax(logits: Tensor, g, tau) -> Tensor:
    """The relaxed sample of each row, (..., K): numbers above 0 with the sum 1.

    g: noise of the logits' shape.  tau: a temperature above 0, or an array of them that broadcasts to the logits; an
    array on a GPU is not checked, since that would wait for the GPU.  Half precision is computed in float32, and so is
    the result.
    """
    _check(logits, g)
    logits, xp = as_float32(logits), xp_of(logits.data)
    if xp_of(tau) is np and not ((np.asarray(tau) >= np.finfo(np.float32).tiny) & np.isfinite(tau)).all():
        raise ValueError(f"tau must be above 0, not {np.min(tau):g}")
    # y = softmax((l + g) / tau)
    return ops.softmax((logits + g) * Tensor(xp.asarray(1 / tau, dtype=logits.dtype)))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) of each row q = softmax(logits), in nats (docs/glossary.md): (..., K) -> (...), 0 to log K."""
    # KL = sum_k q_k log(q_k / (1/K)) = log K - H(q)
    # 0 log 0 = 0: a probability of 0 has a finite logarithm here
    log_q = ops.log_softmax(as_float32(logits))
    log_q = ops.clip(log_q, np.finfo(log_q.dtype).min, math.inf)
    return math.log(logits.shape[-1]) + ops.sum(ops.exp(log_q) * log_q, axis=-1)


def _check(logits, g) -> None:
    if not logits.shape or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., K) with K at least 1, not {logits.shape}")
    if g.shape != logits.shape:
        raise ValueError(f"g must be of the logits' shape {logits.shape}, not {g.shape}")
