"""Convolution on a GPU: the three sums of engine/conv.py, by kernels/conv_*.cu, on CuPy arrays.

Each sum is a product of two matrices.  One of them is gathered from an image and never stored (a tap is a place (m, n)
of the kernel):

                    (rows               ,  k)              (k, columns)
    correlate       pixels of y            taps, c             d            + bias, SiLU
    correlate_dx    pixels of x            taps, d             c
    correlate_dw    taps, c                pixels of y         d

A block of threads computes one tile of the result, whose size is in the version's .cu file.  If there are fewer tiles
than the card can run at once, several blocks share the sum over k, and the last of them adds the partial sums in a
fixed order (those of dw wait, see weight_gradients.py), so the result is the same, bit for bit, each time on one card.
The grid is (tiles, 1, layers); the tiles of a row are neighbours.  Layers are the shares of k, and for dx with stride s
also the s^2 classes of pixels that the same taps reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from minidiff.engine.backend import xp_of
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.reduce import accumulator_dtype, counters
from minidiff.engine.cuda.weight_gradients import sum_of_partials

MOST = 2**31 - 2**12                                        # elements: kernels count in int, one tile beyond the end
MOST_PARTIALS = 2**28                                       # numbers in all shares together: 1 GiB


def correlate(x, w, stride: int, padding: int, bias=None, silu: bool = False, *, version: int | None = None,
              splits: int | None = None):
    """y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d], plus bias[d], through SiLU if asked.

    x (B, H, W, C), w (kh, kw, C, D), bias (D,), and y of the same dtype; sums are in float32, for float64 in float64.
    Arrays that are not contiguous are copied.  version and splits are for tests and benchmarks, and chosen otherwise.
    silu is not used in minidiff, whose networks have no SiLU right after a convolution.
    ValueError if the shapes do not fit, or if images are empty or too large; TypeError for other dtypes.
    """
    plan = _plan("conv_forward", _sources(str(x.dtype), version), x.shape, w.shape, stride, padding, splits, _card())
    if bias is not None and bias.shape != w.shape[3:]:
        raise ValueError(f"conv: bias must have shape {w.shape[3:]}, not {bias.shape}")
    xp, x, w, bias = _ready(x, w, bias)
    y = xp.empty(plan.y_shape, dtype=x.dtype)
    if not y.size:
        return y
    if plan.splits == 1:
        plan.launch(x.dtype, x, w, bias, y, *plan.sizes, silu)
    else:
        plan.launch(x.dtype, x, w, bias, plan.partials(x), plan.counters(), y, *plan.sizes, silu, plan.splits)
    return y


def correlate_dx(dy, w, x_shape: tuple[int, ...], stride: int, padding: int, *, version: int | None = None,
                 splits: int | None = None):
    """dx[b,i,j,c]: a sum over (m,n,d) and the pixels of y that depend on x[b,i,j]; arguments as of `correlate`."""
    plan = _plan("conv_dx", _sources(str(dy.dtype), version), tuple(x_shape), w.shape, stride, padding, splits, _card())
    _check_dy(dy, plan)
    xp, dy, w = _ready(dy, w)
    dx = xp.empty(plan.x_shape, dtype=dy.dtype)
    if not dx.size:
        return dx
    if plan.splits == 1:
        plan.launch(dy.dtype, dy, w, dx, *plan.sizes)
    else:
        plan.launch(dy.dtype, dy, w, plan.partials(dy), plan.counters(), dx, *plan.sizes, plan.splits)
    return dx


def correlate_dw(x, dy, w_shape: tuple[int, ...], stride: int, padding: int, *, version: int | None = None,
                 splits: int | None = None):
    """dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d]; arguments as of `correlate`."""
    plan = _plan("conv_dw", _sources(str(x.dtype), version), x.shape, tuple(w_shape), stride, padding, splits, _card())
    _check_dy(dy, plan)
    xp, x, dy = _ready(x, dy)
    if not x.size:
        return xp.zeros(plan.w_shape, dtype=x.dtype)
    dw = xp.empty(plan.w_shape, dtype=x.dtype)
    whole = plan.splits == 1 and dw.dtype == accumulator_dtype(dw.dtype)            # the only part is the sum
    partial = dw if whole else plan.partials(x)
    plan.launch(x.dtype, x, dy, partial, *plan.sizes, plan.splits)
    if not whole:
        sum_of_partials(partial, dw)
    return dw


# --- the launch ---------------------------------------------------------------------------------------------------

def _sources(dtype: str, version: int | None) -> tuple[cuda.Source, ...]:
    """The version asked for, or the latest, and version 6 beside 7: smaller tiles fill the card with fewer images."""
    source = cuda.pick("conv", dtype, version)
    return (source, cuda.versions("conv")[6]) if version is None and source.number == 7 else (source,)


def _card() -> tuple[int, int]:
    """The device's multiprocessors, and the bytes of shared memory of each."""
    return cuda.multiprocessors(), cuda.shared_of_multiprocessor()


@dataclass(frozen=True)
class ConvPlan:
    """How one sum of one shape is launched."""

    source: cuda.Source
    kernel: str
    sizes: tuple[int, ...]                                  # B, H, W, C, Ho, Wo, D, kh, kw, stride, padding
    grid: tuple[int, int, int]
    splits: int                                             # blocks that share k
    results: int                                            # numbers in the sum
    stages: int                                             # tiles that a block has in shared memory at once, or 0
    cost: float                                             # estimated, in steps of versions up to 6

    x_shape = property(lambda self: self.sizes[:4])
    y_shape = property(lambda self: (self.sizes[0], *self.sizes[4:7]))
    w_shape = property(lambda self: (*self.sizes[7:9], self.sizes[3], self.sizes[6]))

    def launch(self, dtype, *args) -> None:
        source, defines, shared = self.source, {}, self.source.shared
        most = source.constants.get("MOST_STAGES", 0)
        if self.stages < most:
            defines, shared = {"STAGES": self.stages}, shared // most * self.stages
        kernel = cuda.kernel(source, self.kernel, str(dtype), **defines)
        kernel(self.grid, source.constants["THREADS"], *args, shared=shared)

    def counters(self):
        """Zeros, in which the blocks of each tile count those that are done."""
        return counters(self.grid[0] * self.grid[2] // self.splits)

    def partials(self, like):
        return xp_of(like).empty((self.splits, self.results), dtype=accumulator_dtype(like.dtype))


@lru_cache(maxsize=4096)
def _plan(kernel: str, sources: tuple[cuda.Source, ...], x_shape: tuple[int, ...], w_shape: tuple[int, ...],
          stride: int, padding: int, splits: int | None, card: tuple[int, int]) -> ConvPlan:
    """The cheapest plan of these versions.  ValueError if the shapes do not fit each other or the kernels."""
    sizes = _sizes(x_shape, w_shape, stride, padding)
    return min((_plan_of(source, kernel, sizes, splits, *card) for source in sources), key=lambda plan: plan.cost)


def _plan_of(source: cuda.Source, kernel: str, sizes: tuple[int, ...], splits: int | None, multiprocessors: int,
             shared: int) -> ConvPlan:
    B, H, W, C, Ho, Wo, D, kh, kw, s, _ = sizes
    constants = source.constants
    classes = s * s if kernel == "conv_dx" else 1
    if classes >= 2**16:
        raise ValueError(f"conv: stride must be at most 255 for the gradient to x, not {s}")
    rows, k, columns, results = {
        "conv_forward": (B * Ho * Wo, kh * kw * C, D, B * Ho * Wo * D),
        "conv_dx": (B * _up(H, s) * _up(W, s), _up(kh, s) * _up(kw, s) * D, C, B * H * W * C),
        "conv_dw": (kh * kw * C, B * Ho * Wo, D, kh * kw * C * D)}[kernel]
    tiles = _up(rows, constants["TILE_M"]) * _up(columns, constants["TILE_N"])
    steps = _up(k, max(16, constants.get("TILE_K", 16)))
    work = Work(tiles * classes, steps, results, multiprocessors, constants.get("FILL", 2),
                constants.get("STEP_COST", 1))
    if kernel != "conv_dw" and f"{kernel}_part" not in source.signatures:
        splits = 1
    elif splits is None:
        splits = work.best_splits(min(65535 // classes, MOST_PARTIALS // max(1, results)))
    if kernel != "conv_dw" and splits > 1:
        kernel += "_part"
    return ConvPlan(source, kernel, sizes, (tiles, 1, classes * splits), splits, results,
                    source.stages(shared) if "MOST_STAGES" in constants else 0, work.cost(splits))


@dataclass(frozen=True)
class Work:
    """A rough cost model of the card for the sums of one convolution.

    The unit is one step along k of a block of versions 3 to 6 that has a multiprocessor to itself: about 0.4 us on an
    H100 (from the operations of a tile; not measured).  The busiest multiprocessor has n blocks, which take turns;
    `fill` of them use all of it.  Start and end of a block cost ENDS steps, and the reads of the block that adds a
    tile's parts LAST: 16 reads of each thread, two at a time (estimated).  Adding ADDED partial sums costs one unit.
    Each part costs PART besides, however few its sums, since a thread waits for all its parts.
    """

    tiles: int
    steps: int                                              # along k
    results: int                                            # numbers
    multiprocessors: int
    fill: int = 2                                           # blocks
    step: float = 1                                         # units that a step of this version's block takes

    def cost(self, splits: int) -> float:
        """Of `splits` blocks for each tile's sum over k."""
        ENDS, LAST, ADDED, PART = 6, 14, 250_000, 0.05
        n = _up(self.tiles * splits, self.multiprocessors)
        adding = 0 if splits == 1 else LAST + splits * PART + self.results * splits / ADDED
        return self.step * max(n, self.fill) * (_up(self.steps, splits) + ENDS) + adding

    def best_splits(self, most: int) -> int:
        """How many blocks should share one tile's sum over k, at most `most`."""
        best = min(range(1, max(1, min(self.steps, most, 512)) + 1), key=self.cost)
        return best if self.cost(best) < 0.9 * self.cost(1) else 1      # a smaller gain is within the model's error


def _ready(*arrays):
    """CuPy, and the arrays, copied if they are not contiguous or not aligned to 16 bytes, as vector loads require."""
    xp = xp_of(*arrays)
    if xp is np:
        raise TypeError("cuda.conv takes arrays on the GPU: move them there with backend.to_device")

    def ready(a):
        a = xp.ascontiguousarray(a)
        return a if a.data.ptr % 16 == 0 else a.copy()
    return xp, *(a if a is None else ready(a) for a in arrays)


def _up(n: int, by: int) -> int:
    return -(-n // by)


# --- checks ---------------------------------------------------------------------------------------------------------

def _sizes(x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: int, padding: int) -> tuple[int, ...]:
    """B, H, W, C, Ho, Wo, D, kh, kw, stride, padding.  ValueError if they do not fit each other or the kernels."""
    if len(x_shape) != 4 or len(w_shape) != 4 or x_shape[3] != w_shape[2]:
        raise ValueError(f"conv takes x (B, H, W, C) and w (kh, kw, C, D), not {x_shape} and {w_shape}")
    if stride < 1 or padding < 0:
        raise ValueError(f"conv takes stride >= 1 and padding >= 0, not {stride} and {padding}")
    (B, H, W, C), (kh, kw, _, D) = x_shape, w_shape
    Ho, Wo = (H + 2 * padding - kh) // stride + 1, (W + 2 * padding - kw) // stride + 1
    if min(H, W, C, kh, kw, D) < 1:
        raise ValueError(f"conv: images of x {x_shape} and w {w_shape} must not be empty")
    if min(Ho, Wo) < 1:
        raise ValueError(f"conv: the kernel {(kh, kw)} is larger than the padded image of x {x_shape}")
    for name, shape in ("x", x_shape), ("w", w_shape), ("y", (B, Ho, Wo, D)):
        if math.prod(shape) > MOST:
            raise ValueError(f"conv: {name} {shape} has {math.prod(shape)} elements, and the kernels count to {MOST}: "
                             "work on parts of the batch")
    if max(H, W) + 2 * padding + stride > 2**30:
        raise ValueError(f"conv: padding {padding} and stride {stride} must be less than 2^29 together")
    return B, H, W, C, Ho, Wo, D, kh, kw, int(stride), int(padding)


def _check_dy(dy, plan: ConvPlan) -> None:
    if dy.shape != plan.y_shape:
        raise ValueError(f"conv: dy must have y's shape {plan.y_shape}, not {dy.shape}")
