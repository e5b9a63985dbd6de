"""Group norm (with or without SiLU) and layer norm on CuPy arrays, by kernels/group_norm_*.cu and layer_norm_*.cu.

    y, mean, rstd     = group_norm(x, groups, gamma, beta, eps, silu)         y = [silu](gamma x_hat + beta)
    dx, dgamma, dbeta = group_norm_backward(x, dy, groups, gamma, beta, mean, rstd, silu, plus)

    y, mean, rstd     = layer_norm(x, gamma, beta, eps)
    dx, dgamma, dbeta = layer_norm_backward(x, dy, gamma, mean, rstd, plus)

x is (B, ..., C); gamma and beta are (C,), or (B, C) in a group norm; all have one dtype.  Those of (B, C) may be the
two halves of one array (B, 2 C), which is how a network makes them.  They are not copied, and dgamma and dbeta are
halves of one array, too.  mean and rstd are (B, groups), or one for each token, in float64 for float64 and in float32
otherwise.  The backward pass uses x, mean and rstd, and computes a group norm's z = gamma x_hat + beta again.  plus,
None or an array of x's shape, is added to dx: another path's cotangent of x, which would take another launch.

`plan` decides which part of the work each block of threads gets.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.reduce import accumulator_dtype, counters
from minidiff.engine.cuda.weight_gradients import sum_of_partials

SECTOR = 32                                                 # bytes: the smallest transfer from memory
LINE = 128                                                  # bytes: the smallest request of a warp's load
PART = 32 << 10                                             # bytes of a part in version 4: several blocks fit at once
BUSY = 4                                                    # blocks that keep a multiprocessor busy


def group_norm(x, groups: int, gamma, beta, eps: float, silu: bool = False, *, version: int | None = None):
    """-> y of x's shape and dtype, mean and rstd (B, groups)."""
    import cupy
    x, = _contiguous(x)
    B, N, C = _sizes(x, groups, gamma, beta)
    gamma, beta, row = _rows(gamma, beta)
    y = cupy.empty_like(x)
    if not x.size:
        return y, *cupy.zeros((2, B, groups), dtype=accumulator_dtype(x.dtype))
    mean, rstd = cupy.empty((2, B, groups), dtype=accumulator_dtype(x.dtype))
    dtype = str(x.dtype)
    source, plan = _choose(dtype, version, B, N, C, groups, x.itemsize, 1)
    kernel = cuda.kernel(source, "group_norm_forward", dtype)
    sizes = (B, N, C, groups, row, silu, eps)
    gamma, beta = cuda.strided(gamma), cuda.strided(beta)
    if source.number <= 2:
        kernel(plan.grid, plan.threads, x, gamma, beta, y, mean, rstd, *sizes)
    elif source.number == 3:
        kernel(plan.grid, plan.threads, x, gamma, beta, y, mean, rstd, *sizes, plan.slab, plan.kept, shared=plan.shared)
    else:
        found = cupy.empty((plan.splits, 2, B, groups), dtype=mean.dtype)
        sums = cuda.kernel(source, "group_norm_forward_sums", dtype)
        sums(plan.grid, plan.threads, x, found, B, N, C, groups, plan.slab, plan.kept, plan.part, shared=plan.shared)
        kernel(plan.grid, plan.threads, x, gamma, beta, found, y, mean, rstd, *sizes, plan.slab, plan.part,
               shared=2 * plan.slab * mean.itemsize)
    return y, mean, rstd


def group_norm_backward(x, dy, groups: int, gamma, beta, mean, rstd, silu: bool = False, plus=None, *,
                        version: int | None = None):
    """-> dx of x's shape, dgamma and dbeta of gamma's; all of x's dtype."""
    dx, both = group_norm_backward_of_pairs(x, dy, groups, gamma, beta, mean, rstd, silu, plus,
                                             version=version)
    return dx, both[..., 0, :], both[..., 1, :]


def group_norm_backward_of_pairs(x, dy, groups: int, gamma, beta, mean, rstd, silu: bool = False, plus=None, *,
                                 version: int | None = None):
    """The same with dgamma and dbeta in one array, (2, C) or (B, 2, C)."""
    import cupy
    x, dy = _contiguous(x, dy)
    B, N, C = _sizes(x, groups, gamma, beta)
    if dy.shape != x.shape:
        raise ValueError(f"group_norm: dy must have x's shape {x.shape}, not {dy.shape}")
    if not mean.shape == rstd.shape == (B, groups):
        raise ValueError(f"group_norm: mean and rstd must be {(B, groups)}, not {mean.shape} and {rstd.shape}")
    plus = _to_add("group_norm", x, plus)
    gamma, beta, row = _rows(gamma, beta)
    dx, shared = cupy.empty_like(x), gamma.ndim == 1
    of_samples = (cupy.empty if x.size else cupy.zeros)((B, 2, C), dtype=accumulator_dtype(x.dtype))
    if x.size:
        dtype = str(x.dtype)
        source, plan = _choose(dtype, version, B, N, C, groups, x.itemsize, 2)
        kernel = cuda.kernel(source, "group_norm_backward", dtype)
        sizes = (B, N, C, groups, row, silu)
        given = x, dy, cuda.strided(gamma), cuda.strided(beta), mean, rstd
        wanted = plus, dx, cuda.strided(of_samples[:, 0]), cuda.strided(of_samples[:, 1])
        if source.number <= 2:
            kernel(plan.grid, plan.threads, *given, *wanted, *sizes)
        elif source.number == 3:
            kernel(plan.grid, plan.threads, *given, *wanted, *sizes, plan.slab, plan.kept, shared=plan.shared)
        else:
            found = cupy.empty((plan.splits, 2, B, C), dtype=mean.dtype)
            sums = cuda.kernel(source, "group_norm_backward_sums", dtype)
            sums(plan.grid, plan.threads, *given, found, *sizes, plan.slab, plan.part,
                 shared=8 * plan.threads * mean.itemsize)
            kernel(plan.grid, plan.threads, *given, found, *wanted, *sizes, plan.slab, plan.part,
                   shared=2 * (plan.slab * C // groups + plan.slab) * mean.itemsize)
    if not shared:
        return dx, of_samples.astype(x.dtype, copy=False)
    both = (cupy.empty if x.size else cupy.zeros)((2, C), x.dtype)
    if x.size:
        sum_of_partials(of_samples.reshape(B, 2 * C), both)
    return dx, both


def layer_norm(x, gamma, beta, eps: float, *, version: int | None = None):
    """x (..., C), gamma and beta (C,) -> y of x's shape and dtype, mean and rstd (M,) for its M rows."""
    import cupy
    x, gamma, beta = _contiguous(x, gamma, beta)
    C = x.shape[-1]
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"layer_norm: gamma and beta must be {(C,)}, not {gamma.shape} and {beta.shape}")
    M = math.prod(x.shape[:-1])
    y = cupy.empty_like(x)
    mean, rstd = cupy.empty((2, M), dtype=accumulator_dtype(x.dtype))
    if x.size:
        source = cuda.pick("layer_norm", str(x.dtype), version)
        kernel = cuda.kernel(source, "layer_norm_forward", str(x.dtype))
        kernel(math.ceil(M / source.constants["WARPS"]), source.constants["THREADS"],
               x, gamma, beta, y, mean, rstd, M, C, eps)
    return y, mean, rstd


def layer_norm_backward(x, dy, gamma, mean, rstd, plus=None, *, version: int | None = None):
    """-> dx of x's shape, dgamma and dbeta of gamma's; all of x's dtype."""
    import cupy
    x, dy, gamma = _contiguous(x, dy, gamma)
    if dy.shape != x.shape:
        raise ValueError(f"layer_norm: dy must have x's shape {x.shape}, not {dy.shape}")
    C, M = x.shape[-1], math.prod(x.shape[:-1])
    if not (gamma.shape == (C,) and mean.shape == rstd.shape == (M,)):
        raise ValueError(f"layer_norm: gamma must be {(C,)} and mean and rstd {(M,)}, "
                         f"not {gamma.shape}, {mean.shape} and {rstd.shape}")
    plus = _to_add("layer_norm", x, plus)
    dx = cupy.empty_like(x)
    if not x.size:
        return dx, cupy.zeros(C, dtype=x.dtype), cupy.zeros(C, dtype=x.dtype)
    source = cuda.pick("layer_norm", str(x.dtype), version)
    warps, threads = source.constants["WARPS"], source.constants["THREADS"]
    # enough blocks to fill the card, but at least a few rows for each warp
    columns = math.ceil(C / source.constants["CHANNELS"])
    part = max(4 * warps, math.ceil(M * columns / (BUSY * cuda.multiprocessors())))
    splits = math.ceil(M / part)
    found = cupy.empty((splits, 2, C), dtype=mean.dtype)
    summed = cupy.empty((2, C), dtype=x.dtype)
    cuda.kernel(source, "layer_norm_backward", str(x.dtype))(
        math.ceil(M / warps) + columns * splits, threads, x, dy, gamma, mean, rstd, plus, dx, found, counters(columns),
        summed, M, C, part)
    return dx, summed[0], summed[1]


# --- the work of a block ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class NormPlan:
    """How a version is launched."""

    grid: tuple[int, ...]
    threads: int
    slab: int = 0                                           # groups that a block normalises
    kept: int = 0                                           # of its pixels, those kept in shared memory
    part: int = 0                                           # pixels of a block, if the slab is split
    splits: int = 1                                         # parts into which a slab is split
    shared: int = 0                                         # bytes of shared memory


def _choose(dtype: str, version: int | None, B: int, N: int, C: int, groups: int, itemsize: int, arrays: int):
    """The version and how to launch it.  arrays: the number of arrays that a block keeps (1: x; 2: x and dy)."""
    source = cuda.pick("group_norm", dtype, version)
    card = cuda.shared_limit(), cuda.multiprocessors()
    if version is None:
        found = cuda.versions("group_norm")
        whole, split = (plan(number, B, N, C, groups, itemsize, arrays, *card) for number in (3, 4))
        # version 3 reads memory once if a slab fits in a block, but too few blocks would leave most of the card idle
        if source.number == 4 and whole.kept == N and math.prod(whole.grid) >= min(card[1], math.prod(split.grid)):
            source = found[3]
        if source.number >= 3 and plan(source.number, B, N, C, groups, itemsize, arrays, *card).shared > card[0]:
            source = found[2]                               # the sums of thousands of channels, on a small card
    chosen = plan(source.number, B, N, C, groups, itemsize, arrays, *card)
    if chosen.shared > card[0]:
        raise ValueError(f"{source.path.name}: the sums of a slab's {chosen.slab * C // groups} channels take "
                         f"{chosen.shared} bytes of shared memory, and a block has {card[0]}: version 2 takes any")
    return source, chosen


@functools.cache
def plan(version: int, B: int, N: int, C: int, groups: int, itemsize: int, arrays: int, limit: int,
         multiprocessors: int) -> NormPlan:
    """How `version` is launched.  limit: the most bytes of shared memory of a block."""
    if version <= 2:
        constants = cuda.versions("group_norm")[version].constants
        threads = constants["THREADS"]
        return NormPlan((B * groups if version == 2 else math.ceil(B * groups / threads),), threads)
    size = C // groups
    slab = _slab(groups, size * itemsize, most=B * groups // (BUSY * multiprocessors) if version == 3 else groups)
    W = slab * size
    pixels, splits = N, 1
    if version == 4:
        pixels = max(1, min(N, PART // (W * itemsize)))
        splits = math.ceil(N / pixels)
        pixels = math.ceil(N / splits)                      # parts as equal as whole pixels allow
        splits = math.ceil(N / pixels)
    pieces = pixels * W // (4 if C % 4 == W % 4 == 0 else 1)
    threads = min(512, max(64, 2 ** math.ceil(math.log2(max(1, pieces / 8)))))
    acc = max(4, itemsize)
    while 4 * arrays * threads * acc > limit // 2 and threads > 64:                 # the other half is for x
        threads //= 2
    sums = (4 * arrays * threads + 2 * W + 4 * slab) * acc
    if version == 4 and arrays == 2:                        # its backward pass keeps no pixels
        return NormPlan((B * groups // slab, splits), threads, slab, 0, pixels, splits, sums)
    kept = max(0, min(pixels, (limit - sums) // (arrays * W * itemsize)))
    grid = (B * groups // slab,) if version == 3 else (B * groups // slab, splits)
    return NormPlan(grid, threads, slab, kept, pixels, splits, sums + arrays * kept * W * itemsize)


def _slab(groups: int, group_bytes: int, most: int) -> int:
    """How many groups form a slab: the fewest that fill whole sectors, or more (at most `most`) to fill a line."""
    divisors = [k for k in range(1, groups + 1) if groups % k == 0]
    # beyond 8 sectors, two that are only partly used no longer matter
    fewest = next((k for k in divisors if k * group_bytes % SECTOR == 0 or k * group_bytes > 8 * SECTOR), groups)
    return max((k for k in divisors if k % fewest == 0 and k * group_bytes <= LINE and k <= most), default=fewest)


def _sizes(x, groups: int, gamma, beta) -> tuple[int, int, int]:
    """(B, N, C).  ValueError if the shapes do not fit."""
    if x.ndim < 2 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"group_norm: x must be (B, ..., C) with C a multiple of {groups} groups, not {x.shape}")
    B, C = x.shape[0], x.shape[-1]
    if gamma.shape not in ((C,), (B, C)) or beta.shape != gamma.shape:
        raise ValueError(f"group_norm: gamma and beta must both be {(C,)} or {(B, C)}, not {gamma.shape}, {beta.shape}")
    return B, math.prod(x.shape[1:-1]), C


def _rows(gamma, beta):
    """gamma, beta, and the distance from one sample's numbers to the next: 0 where all samples share them."""
    if gamma.ndim == 1:
        return *_contiguous(gamma, beta), 0
    if gamma.strides != beta.strides or gamma.strides[1] != gamma.itemsize or gamma.strides[0] < 0:
        gamma, beta = _contiguous(gamma, beta)
    return gamma, beta, gamma.strides[0] // gamma.itemsize


def _to_add(op: str, x, plus):
    if plus is None:
        return None
    if plus.shape != x.shape:
        raise ValueError(f"{op}: plus must have x's shape {x.shape}, not {plus.shape}")
    return _contiguous(plus)[0]


def _contiguous(*arrays):
    import cupy
    return tuple(map(cupy.ascontiguousarray, arrays))
