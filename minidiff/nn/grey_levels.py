"""A network that knows that pixels are whole numbers: its output is a preference for each level, Bayes' rule the rest.

A pixel is x_t = alpha x_0 + sigma eps, and x_0 is one of K levels x_k. If its level were k, its noise would be e_k:

    e_k      = (x_t - alpha x_k) / sigma
    p_k      = p(x_0 = x_k | x_t)  =  softmax_k( logit_k - e_k^2 / 2 )      Bayes: prior exp(logit_k), likelihood of e_k
    eps_hat  = E[eps | x_t]  =  sum_k p_k e_k

logit_k, from the network, is what the other pixels say of this one. So the pixel's own part of the answer is exact: at
fine noise one level is certain, and eps_hat is right to the last digit, without a network that has learned to divide by
a small sigma. With logits of 0 all levels are equally likely, as in the decoder of diffusion/variational.py.

    d eps_hat / d logit_k = p_k (e_k - eps_hat)
    d eps_hat / d x_t     = (1 - Var[eps | x_t]) / sigma                Tweedie's formula, differentiated
"""

from __future__ import annotations

import numpy as np

from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor, record


def eps_of_levels(logits: Tensor, x_t: Tensor, alpha: np.ndarray, sigma: np.ndarray) -> Tensor:
    """eps_hat (B, H, W, C), from logits (B, H, W, C, K) and x_t (B, H, W, C) of one dtype, float32 or wider.

    alpha, sigma (B,) float64, on the host.  Level k is -1 + 2 k / (K - 1).
    """
    _check(logits, x_t)
    xp, dtype = xp_of(logits.data), logits.dtype
    alpha, sigma = (xp.asarray(a.reshape(-1, *[1] * x_t.ndim), dtype=dtype) for a in (alpha, sigma))  # (B, 1, 1, 1, 1)
    levels = xp.asarray(np.linspace(-1, 1, logits.shape[-1]), dtype=dtype)
    # e_k = (x_t - alpha x_k) / sigma
    e = (x_t.data[..., None] - alpha * levels) / sigma                                # (B, H, W, C, K)
    # p = softmax(logit_k - e_k^2 / 2)
    p = logits.data - 0.5 * e * e
    p -= p.max(-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)
    # eps_hat = sum_k p_k e_k
    y = (p * e).sum(-1)

    def pullback(dy):
        # d logit_k = p_k (e_k - eps_hat) dy;   d x_t = (1 - sum_k p_k e_k (e_k - eps_hat)) dy / sigma
        d = p * (e - y[..., None])
        return (d * dy[..., None] if logits.requires_grad else None,
                (1 - (d * e).sum(-1)) * dy / sigma[..., 0] if x_t.requires_grad else None)
    return record(y, (logits, x_t), pullback)


def _check(logits: Tensor, x_t: Tensor) -> None:
    if logits.shape[:-1] != x_t.shape or logits.dtype != x_t.dtype or logits.dtype not in (np.float32, np.float64) \
            or logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError("logits must be those of at least two levels for each number of x_t, of its dtype, float32 or "
                         f"float64: {x_t.shape} {x_t.dtype} takes {(*x_t.shape, 'K')}, not {logits.shape} "
                         f"{logits.dtype}")
