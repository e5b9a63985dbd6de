"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    S = q k^T / sqrt(d)             (B, h, N, M)
    P = softmax(S)                  rows sum to 1
    y = P v                         (B, h, N, d)

and back, with the softmax's pullback  dS = P (dP - sum(dP P)):

    dv = P^T dy      dP = dy v^T      dq = dS k / sqrt(d)      dk = dS^T q / sqrt(d)
"""

from __future__ import annotations

import math

from minidiff.engine.backend import xp_of
from minidiff.engine.ops import _same_dtype
from minidiff.engine.tensor import Tensor, record


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
    """q (B, h, N, d), k (B, h, M, d), v (B, h, M, e) -> (B, h, N, e).

    mask    boolean array that broadcasts to (B, h, N, M): True where a query may look at a key (for a causal
            mask see `causal_mask`).  A query that may look nowhere gets zeros, and gives no gradient.
    """
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits or v.shape[:3] != k.shape[:3]:
        raise ValueError("attention takes q (B, h, N, d), k (B, h, M, d) and v (B, h, M, e), "
                         f"not {q.shape}, {k.shape} and {v.shape}")
    _same_dtype(q, k, v)
    xp = xp_of(q.data, k.data, v.data)
    scale = 1 / math.sqrt(q.shape[3])
    P = q.data @ k.data.swapaxes(2, 3)                                              # (B, h, N, M)
    P *= scale
    if mask is not None:
        if mask.dtype != bool:
            raise TypeError(f"attention: mask must be boolean, True where a query may look, not {mask.dtype}")
        P = xp.where(mask, P, -xp.inf)
        top = P.max(axis=3, keepdims=True)
        P -= xp.where(xp.isfinite(top), top, 0)
        xp.exp(P, out=P)
        P /= xp.maximum(P.sum(axis=3, keepdims=True), xp.finfo(P.dtype).tiny)       # 0/tiny where all is masked
    else:
        P -= P.max(axis=3, keepdims=True)
        xp.exp(P, out=P)
        P /= P.sum(axis=3, keepdims=True)

    def pullback(dy):
        dS = dy @ v.data.swapaxes(2, 3)                                             # dP
        dv = P.swapaxes(2, 3) @ dy
        dS -= xp.einsum("bhnm,bhnm->bhn", dS, P)[..., None]
        dS *= P
        dS *= scale
        return dS @ k.data, dS.swapaxes(2, 3) @ q.data, dv
    return record(P @ v.data, (q, k, v), pullback)


def causal_mask(n: int, xp):
    """(n, n) boolean: token i may look at tokens 0..i."""
    return xp.tril(xp.ones((n, n), dtype=bool))
