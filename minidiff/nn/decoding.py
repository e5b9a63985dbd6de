"""Draws the next token from an autoregressive model's logits, with a temperature, top-k, and one uniform number.

    p = softmax(l / temperature) over the top_k largest logits,  0 elsewhere        (top-k: Fan et al. 2018)
    z = the first k with  p_0 + ... + p_k > u,   u ~ uniform[0, 1)                  the inverse of p's CDF

With temperature 1 and all K logits, the token is a sample of the model; with temperature 0, or top_k = 1, it is the
likeliest token.  Each token uses one u from the sample's own stream, so that an image does not depend on its batch.
"""

from __future__ import annotations

import numpy as np

from minidiff.checks import finite, whole
from minidiff.engine.backend import xp_of
from minidiff.errors import UserError


def next_tokens(logits: np.ndarray, u: np.ndarray, temperature: float = 1.0, top_k: int = 0) -> np.ndarray:
    """One token for each row: logits (B, K), u (B,) in [0, 1) -> (B,) int.

    temperature: at least 0.  top_k: the number of largest logits that may be chosen, 0 for all; among equal logits the
    first ones count as larger.  A logit of -inf is never chosen; UserError where logits say nothing (`check_logits`).
    """
    check_choices(temperature, top_k)
    if logits.ndim != 2 or logits.shape[1] < 1 or u.shape != logits.shape[:1]:
        raise ValueError(f"next_tokens takes logits (B, K), K at least 1, and u (B,), not {logits.shape} and {u.shape}")
    if not ((u >= 0) & (u < 1)).all():
        raise ValueError(f"u must be within [0, 1), not {u.min():g} to {u.max():g}")
    check_logits(logits)
    if temperature == 0 or top_k == 1:
        return logits.argmax(axis=1)
    # the largest logit is subtracted first, so that no exponential overflows at a small temperature
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):                        # a difference beyond float64's range has probability 0
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)      # up to a factor
    if 0 < top_k < logits.shape[1]:
        left_out = np.argsort(-logits, axis=1, kind="stable")[:, top_k:]
        np.put_along_axis(p, left_out, 0, axis=1)
    cdf = p.cumsum(axis=1)                                                          # (B, K)
    # u is at most 1 - 2^-53, so that u * total is less than total even after rounding
    return (cdf <= u[:, None] * cdf[:, -1:]).sum(axis=1)


def check_logits(logits) -> None:
    """UserError where a row (..., K) of logits holds NaN or +inf, or is -inf everywhere: no choice follows from it."""
    top = logits.max(axis=-1)                               # NaN if one of the row is
    if not xp_of(top).isfinite(top).all():
        raise UserError("the logits to choose from are not finite: the model's weights are damaged, or the scale is "
                        "too large")


def check_choices(temperature: float, top_k: int) -> None:
    finite("temperature", temperature, 0)
    whole("top_k", top_k, 0)
