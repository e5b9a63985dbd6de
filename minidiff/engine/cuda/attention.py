"""Attention on a GPU, by kernels/attention_*.cu, on CuPy arrays; the equations are in engine/attention.py.

The matrix of scores is never in memory.  The forward pass computes y and one number for each query,

    lse = log sum_m exp(s_m)            (B, h, N), float32 or float64; +inf for a query without any key

from which the backward pass computes the weights again, P = exp(S - lse).

A block of threads computes TILE_N queries of one head of one image, and the grid is one row of such tiles.  Arrays are
passed with their strides, so a transposed view of heads (B, N, h, d) is not copied.
"""

from __future__ import annotations

from minidiff.engine.backend import xp_of
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.reduce import accumulator_dtype

MOST = 160                                                  # columns of a head: a row of y must fit in registers


def forward(q, k, v, mask, causal: bool, scale: float, version: int | None = None):
    """q (B, h, N, d), k (B, h, M, d), v (B, h, M, e) -> y (B, h, N, e), lse (B, h, N).

    mask    boolean, broadcasts to (B, h, N, M): True where a query attends to a key; or None
    causal  query n attends to keys 0..n only, and of these to those that the mask allows; takes no memory for a mask
            and half the time
    scale   of the scores, positive
    y       is stored as (B, N, h, e), so y.transpose(0, 2, 1, 3).reshape(B, N, h * e) copies nothing
    """
    check(q, k, v, mask)
    (B, h, N, d), (M, e) = q.shape, v.shape[2:]
    xp = xp_of(q, k, v) if mask is None else xp_of(q, k, v, mask)
    head_dim = _head_dim(d, e)
    source = cuda.pick("attention_forward", str(q.dtype), version)
    while version is None and _shared(source, head_dim, q.itemsize) > cuda.shared_limit():
        source = cuda.pick("attention_forward", str(q.dtype), source.number - 1)        # the first two use none
    q, k, v = _ready(q), _ready(k), _ready(v)
    y = xp.empty((B, N, h, e), dtype=q.dtype).transpose(0, 2, 1, 3)
    lse = xp.empty((B, h, N), dtype=accumulator_dtype(q.dtype))
    kernel = cuda.kernel(source, "attention_forward", str(q.dtype), HEAD_DIM=head_dim)
    kernel(B * h * -(-N // source.constants["TILE_N"]), source.constants["THREADS"],
           *map(cuda.strided, (q, k, v)), _strided(mask), cuda.strided(y), lse, B, h, N, M, d, e,
           *_strides(q), *_strides(k), *_strides(v), *_strides(y), *_mask_strides(mask, (B, h, N, M)),
           causal, scale, shared=_shared(source, head_dim, q.itemsize))
    return y, lse


def _shared(source: cuda.Source, head_dim: int, itemsize: int) -> int:
    """Bytes of the tiles that a version of attention_forward keeps in dynamic shared memory."""
    n, m = source.constants["TILE_N"], source.constants.get("TILE_M", 0)
    acc = max(4, itemsize)
    if source.number == 3:                                  # q; k or v; the weights; 16 bytes of padding a row
        return (n + m) * (head_dim * acc + 16) + n * (m * acc + 16)
    if source.number >= 4:                                  # k; v, each in one stage or more
        return 2 * source.constants.get("STAGES", 1) * m * (head_dim * itemsize + 16)
    return 0


def backward(q, k, v, mask, causal: bool, scale: float, y, lse, dy, version: int | None = None):
    """dq, dk, dv, of the shapes of q, k and v, from the arguments and results of `forward` and dy (B, h, N, e).

    Each is stored as (B, N, h, d), like y.  The results are the same, bit for bit, each time: the order of every sum is
    fixed.
    """
    check(q, k, v, mask)
    (B, h, M, d), e, xp = k.shape, v.shape[3], xp_of(q, k, v)
    dk, dv = (xp.empty((B, M, h, columns), dtype=q.dtype).transpose(0, 2, 1, 3) for columns in (d, e))
    return _backward(q, k, v, mask, causal, scale, y, lse, dy, dk, dv, version), dk, dv


def backward_of_pairs(q, k, v, mask, causal: bool, scale: float, y, lse, dy):
    """dq, and dk and dv in one array (2, B, h, M, d), which is stored as (B, M, 2, h, d)."""
    B, h, M, d = k.shape
    dkv = xp_of(q, k, v).empty((B, M, 2, h, d), dtype=q.dtype).transpose(2, 0, 3, 1, 4)
    return _backward(q, k, v, mask, causal, scale, y, lse, dy, dkv[0], dkv[1], None), dkv


def _backward(q, k, v, mask, causal: bool, scale: float, y, lse, dy, dk, dv, version: int | None):
    """Writes into dk and dv, and returns dq."""
    (B, h, N, d), (M, e), dtype = q.shape, v.shape[2:], str(q.dtype)
    xp = xp_of(dy, q, k, v, y, lse) if mask is None else xp_of(dy, q, k, v, y, lse, mask)
    if not dy.shape == y.shape == (B, h, N, e) or lse.shape != (B, h, N):
        raise ValueError(f"attention's backward pass takes dy and y of {(B, h, N, e)} and lse of {(B, h, N)}, "
                         f"not {dy.shape}, {y.shape} and {lse.shape}")
    head_dim = _head_dim(d, e)
    source = cuda.pick("attention_backward", dtype, version)
    while version is None and _backward_tiles(source, head_dim, dtype)[2] > cuda.shared_limit():
        source = cuda.pick("attention_backward", dtype, source.number - 1)      # the first uses none
    rows, threads, shared = _backward_tiles(source, head_dim, dtype)
    dq_kernel, dkv_kernel = (cuda.kernel(source, f"attention_{name}", dtype, HEAD_DIM=head_dim)
                             for name in ("dq", "dkv"))
    dy, q, k, v, y = map(_ready, (dy, q, k, v, y))
    delta = xp.empty((B, h, N), dtype=accumulator_dtype(q.dtype))
    dq = xp.empty((B, N, h, d), dtype=q.dtype).transpose(0, 2, 1, 3)
    read = tuple(map(cuda.strided, (q, k, v, dy)))
    sizes = (B, h, N, M, d, e, *_strides(q), *_strides(k), *_strides(v), *_strides(dy))
    last = (*_mask_strides(mask, (B, h, N, M)), causal, scale)
    dq_kernel((B * h, -(-N // rows)), threads, *read, cuda.strided(y), _strided(mask), lse, delta, cuda.strided(dq),
              *sizes, *_strides(y), *_strides(dq), *last, shared=shared)            # it also writes delta
    dkv_kernel((B * h, -(-M // rows)), threads, *read, _strided(mask), lse, delta, cuda.strided(dk), cuda.strided(dv),
               *sizes, *_strides(dk), *_strides(dv), *last, shared=shared)
    return dq


def _backward_tiles(source: cuda.Source, head_dim: int, dtype: str) -> tuple[int, int, int]:
    """Of a block: its rows of a gradient, its threads, and its bytes of dynamic shared memory."""
    kind = "WIDE" if head_dim > 64 or (source.number == 3 and dtype == "float64") else "NARROW"
    of = source.constants
    rows, columns, threads = (of.get(name) or of.get(f"{name}_{kind}") for name in ("ROWS", "COLUMNS", "THREADS"))
    if source.number == 1:
        return rows, threads, 0
    pad, acc = of["PAD_BYTES"], 8 if dtype == "float64" else 4
    if source.number < 4:                                   # two tiles of rows, two of columns, and the scores
        return rows, threads, 2 * (rows + columns) * (head_dim * acc + pad) + rows * (columns * acc + pad)
    itemsize = 4 if dtype == "float32" else 2               # the tiles in their own dtype; lse and delta
    return rows, threads, 2 * (rows + columns) * (head_dim * itemsize + pad) + 2 * columns * acc


# --- both passes ----------------------------------------------------------------------------------------------

def check(q, k, v, mask) -> None:
    """Raises if the shapes or the mask do not fit, on any device: the kernels would read beyond such arrays."""
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits or v.shape[:3] != k.shape[:3]:
        raise ValueError("attention takes q (B, h, N, d), k (B, h, M, d) and v (B, h, M, e), "
                         f"not {q.shape}, {k.shape} and {v.shape}")
    if q.shape[3] == 0:
        raise ValueError(f"attention takes q and k of at least one column, not q {q.shape}")
    if mask is None:
        return
    dtype = getattr(mask, "dtype", None)
    if dtype is None or dtype.kind != "b":
        raise TypeError("attention: mask must be boolean, True where a query attends to a key, "
                        f"not {dtype or type(mask).__name__}")
    shape = (*q.shape[:3], k.shape[2])
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attention: mask must broadcast to (B, h, N, M), here {shape}, and has shape {mask.shape}")


def _head_dim(d: int, e: int) -> int:
    """The number of columns for which a kernel is compiled; columns beyond d or e are zeros."""
    if max(d, e) > MOST:
        raise ValueError(f"attention on the GPU takes heads of up to {MOST} columns, not {max(d, e)}: "
                         "use more heads, or the CPU")
    return -(-max(d, e, 1) // 16) * 16


def _ready(a):
    """The array, or a copy if its last axis is not contiguous or an offset within it exceeds an int."""
    xp = xp_of(a)
    contiguous = a.shape[3] == 1 or a.strides[3] == a.itemsize
    reach = sum(stride * (n - 1) for n, stride in zip(a.shape, a.strides, strict=True)) // a.itemsize
    return a if contiguous and min(a.strides) >= 0 and reach < 2**31 else xp.ascontiguousarray(a)


def _strides(a) -> tuple[int, ...]:
    """The strides of all axes but the last, in elements."""
    return tuple(stride // a.itemsize for stride in a.strides[:3])


def _strided(mask):
    return None if mask is None else cuda.strided(mask)


def _mask_strides(mask, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The mask's strides: 0 along the axes on which it is repeated."""
    return (0, 0, 0, 0) if mask is None else xp_of(mask).broadcast_to(mask, shape).strides
