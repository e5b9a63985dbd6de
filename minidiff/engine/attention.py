"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    S = q k^T / sqrt(d)             (B, h, N, M)        scores
    P = softmax(S)                  (B, h, N, M)        weights: each row sums to 1
    y = P v                         (B, h, N, e)

The backward pass, with the softmax's pullback  dS = P (dP - sum(dP P)):

    dv = P^T dy      dP = dy v^T      dq = dS k / sqrt(d)      dk = dS^T q / sqrt(d)

S and P have N M numbers for each head.  Where they would be large and no gradient is asked for, `_by_blocks` computes a
block of queries at a time, and never stores them whole.

Where a weight is 0 because of the mask, its product is 0, even if the key or the value there is NaN or infinite
(`_masked_product`).  On a GPU, kernels compute the same and store neither S nor P (cuda/attention.py); k and v must be
finite there.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.engine.backend import plain, to_numpy, wide, xp_of
from minidiff.engine.cuda import attention as attention_cuda
from minidiff.engine.ops import check_same_dtype, in_float32_on_cpu
from minidiff.engine.parallel import parallel_map
from minidiff.engine.tensor import Tensor, needs_gradient, record


@in_float32_on_cpu
def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, *, causal: bool = False) -> Tensor:
    """q (B, h, N, d), k (B, h, M, d), v (B, h, M, e) -> (B, h, N, e).

    mask    boolean array that broadcasts to (B, h, N, M): True where a query attends to a key.  A query without any
            key (M may be 0) gets zeros and passes no gradient.
    causal  query n attends to keys 0..n only, as if the mask included `causal_mask`; the GPU stores no such mask
    """
    mask = plain(mask) if hasattr(mask, "dtype") else mask
    attention_cuda.check(q, k, v, mask)
    check_same_dtype(q, k, v)
    xp = xp_of(q.data, k.data, v.data)
    scale = 1 / math.sqrt(q.shape[3])
    if xp is not np:
        return _by_kernels(q, k, v, mask, causal, scale)
    B, h, N, _ = q.shape
    if mask is None and not causal and B * h * N * k.shape[2] >= LARGE \
            and not needs_gradient(q, k, v):
        return Tensor(_by_blocks(q.data, k.data, v.data, scale))
    if causal:
        mask = causal_mask(max(q.shape[2], k.shape[2]), xp)[:q.shape[2], :k.shape[2]] & (True if mask is None else mask)
    S = (q.data * q.dtype.type(scale)) @ k.data.swapaxes(2, 3)                      # (B, h, N, M)
    P = _softmax_in_place(S, mask, xp)

    def pullback(dy):
        dS = dy @ v.data.swapaxes(2, 3)                                             # dP
        delta = xp.einsum("bhnm,bhnm->bhn", dS, P)
        if mask is not None and not np.isfinite(delta).all():
            dS = np.where(mask, dS, 0)
            delta = xp.einsum("bhnm,bhnm->bhn", dS, P)
        dS -= delta[..., None]
        dS *= P
        dS *= scale
        back = None if mask is None else np.broadcast_to(mask, dS.shape).swapaxes(2, 3)
        return (_masked_product(dS, k.data, mask), _masked_product(dS.swapaxes(2, 3), q.data, back),
                _masked_product(P.swapaxes(2, 3), dy, back))
    return record(_masked_product(P, v.data, mask), (q, k, v), pullback)


def attention_of_pairs(q: Tensor, kv: Tensor, mask=None, *, causal: bool = False) -> Tensor:
    """The same of keys kv[0] and values kv[1]: q (B, h, N, d), kv (2, B, h, M, d) -> (B, h, N, d)."""
    if kv.ndim != 5 or kv.shape[0] != 2:
        raise ValueError(f"attention_of_pairs takes kv (2, B, h, M, d), not {kv.shape}")
    if xp_of(q.data, kv.data) is np:
        return scaled_dot_product_attention(q, kv[0], kv[1], mask, causal=causal)
    # the same without slices, whose way back writes zeros: dk and dv are written into one array
    mask = plain(mask) if hasattr(mask, "dtype") else mask
    check_same_dtype(q, kv)
    (k, v), scale = kv.data, 1 / math.sqrt(q.shape[3])
    y, lse = attention_cuda.forward(q.data, k, v, mask, causal, scale)

    def pullback(dy):
        return attention_cuda.backward_of_pairs(q.data, k, v, mask, causal, scale, y, lse, dy)
    return record(y, (q, kv), pullback)


def attention_weights(q, k, mask=None) -> np.ndarray:
    """P itself, which the op above does not return: arrays q (B, h, N, d), k (B, h, M, d) -> (B, h, N, M), on the CPU.

    mask: as above.  A query without any key has weights 0.
    """
    q, k, mask = to_numpy(wide(q)), to_numpy(wide(k)), None if mask is None else to_numpy(mask)
    S = q @ k.swapaxes(2, 3) / q.dtype.type(math.sqrt(q.shape[3]))                  # (B, h, N, M)
    return _softmax_in_place(S, mask, np)


# --- without S and P --------------------------------------------------------------------------------------

LARGE, BLOCK = 2 ** 22, 2 ** 20                             # scores of all heads, and of one block: 16 MB, and 4 MB


def _by_blocks(q, k, v, scale: float):
    """The same for queries n0 <= n < n1 of one head at a time, on all cores, without a gradient.

        E = exp(q k^T / sqrt(d))        (n1 - n0, M), which stays in the cache
        y = E v / sum(E)                division of y instead of E: e columns instead of M
    """
    (B, h, N, _), (M, e) = q.shape, v.shape[2:]
    # no score is larger than |q| |k|, so where these are small no exponential overflows, and no maximum is needed
    longest_k = np.sqrt(np.einsum("bhmd,bhmd->bhm", k, k).max(axis=2, initial=0))                   # (B, h)
    ones = np.ones((M, 1), dtype=v.dtype)
    y = np.empty((B, N, h, e), dtype=q.dtype).swapaxes(1, 2)        # in the order in which the heads are joined

    def compute(part) -> None:
        b, head, n = part
        q_n = q[b, head, n] * q.dtype.type(scale)                                   # (n, d)
        E = q_n @ k[b, head].T                                                      # (n, M)
        longest_q = math.sqrt(np.einsum("nd,nd->n", q_n, q_n).max(initial=0))
        if not longest_q * longest_k[b, head] <= BOUND:     # also where one of them is NaN
            E -= E.max(axis=1, keepdims=True)
        np.exp(E, out=E)
        np.divide(E @ v[b, head], E @ ones, out=y[b, head, n])

    rows = max(1, min(N, BLOCK // max(M, 1)))
    parallel_map(compute, [(b, head, slice(n, n + rows)) for b in range(B) for head in range(h)
                           for n in range(0, N, rows)])
    return y


def _masked_product(P, v, mask):
    """P @ v, where P is 0 outside the mask: there the product is 0 too, whatever v is."""
    y = P @ v
    if mask is None or np.isfinite(y).all():
        return y
    # 0 times NaN or infinity is NaN, so y counts only where a number that is not finite is inside the mask
    finite = np.isfinite(v)
    reached = np.broadcast_to(mask, P.shape).astype(P.dtype) @ (~finite).astype(P.dtype) > 0
    return np.where(reached, y, P @ np.where(finite, v, 0))


BOUND = 60                                                  # float32 can hold e^60, and the sum of 10^12 of these


def _softmax_in_place(S, mask, xp):
    """softmax(S) over the last axis, over the places where mask is True; a row without such places is 0."""
    if mask is not None:
        xp.copyto(S, 0, where=~mask)                        # masked scores must not affect the test below
    # the softmax stays the same if a constant is subtracted from a row, so the maximum is subtracted only where an
    # exponential could overflow (forward and backward of 49 tokens of 128 images: 8.2 ms instead of 9.0)
    if not max(S.max(initial=0), -S.min(initial=0)) <= BOUND:
        S = S if mask is None else xp.where(mask, S, -xp.inf)
        top = S.max(axis=3, keepdims=True, initial=-xp.inf)
        # a row without keys has the maximum -inf, and subtracts 0; a row of keys whose scores are all -inf is NaN
        S, mask = S - (top if mask is None else xp.where(mask.any(axis=-1, keepdims=True), top, 0)), None
    P = xp.exp(S, out=S)
    if mask is not None:
        P *= mask
    total = P @ xp.ones((P.shape[3], 1), dtype=P.dtype)                             # (B, h, N, 1)
    P /= xp.maximum(total, xp.finfo(P.dtype).tiny)          # 0/tiny in a row that is masked entirely
    return P


def _by_kernels(q: Tensor, k: Tensor, v: Tensor, mask, causal: bool, scale: float) -> Tensor:
    qkv = q.data, k.data, v.data
    y, lse = attention_cuda.forward(*qkv, mask, causal, scale)

    def pullback(dy):
        return attention_cuda.backward(*qkv, mask, causal, scale, y, lse, dy)
    return record(y, (q, k, v), pullback)


def causal_mask(n: int, xp):
    """(n, n) boolean: token i attends to tokens 0..i."""
    return xp.tril(xp.ones((n, n), dtype=bool))
