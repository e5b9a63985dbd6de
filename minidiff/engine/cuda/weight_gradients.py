"""Gradients of weights and biases, many layers in one launch, by kernels/weight_gradients_*.cu.

    dw = x^T dy         db = 1^T dy             [dw; db] = [x, 1]^T dy

A layer's gradients are small, and nothing reads them before the backward pass ends.  So inside `waiting`, which
surrounds a walk through the graph (tensor.py), `weight_gradients` and `sum_of_rows` return arrays that are not filled
yet.  Their layers wait until the walk ends, until there are many, or until `ready` asks for one of the arrays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.reduce import sum_partials, sum_rows

LONG = 4096                                                 # rows that one block may go through: some 50 us (estimated)
SMALL = 2**28                                               # multiplications of a layer: more fill the card
HELD = 2**26                                                # bytes of dy that may wait: 64 MiB
LAYER = np.dtype([("x", "u8"), ("dy", "u8"), ("dw", "u8"), ("db", "u8"),
                  ("M", "i4"), ("C", "i4"), ("D", "i4"), ("sums", "i4")])           # as in the kernel


@dataclass
class Waiting:
    """The layers of one walk that wait, and what belongs to them."""

    layers: list[tuple] = field(default_factory=list)       # (x or None, dy, dw or None, db or None): kept in memory
    pending: set[int] = field(default_factory=set)          # the addresses of the memory that they will fill
    held: int = 0                                           # bytes of their x and dy


_of_thread = threading.local()


@contextmanager
def waiting() -> Iterator[None]:
    """Within it, in this thread, layers wait; they are computed at its end."""
    outer, _of_thread.waiting = _waiting(), Waiting()
    try:
        yield
        fill()
    finally:
        _of_thread.waiting = outer


def weight_gradients(x, dy, dw: bool = True, db: bool = True) -> tuple:
    """x (M, C), dy (M, D) -> dw (C, D) and db (D,) of their dtype, or None for what is not asked for."""
    M, C, D = *x.shape, dy.shape[1]
    if not dw:
        return None, sum_of_rows(dy) if db else None
    if not _may_wait(M) or 0 in (C, D) or M * C * D > SMALL:
        return x.T @ dy, sum_rows(dy) if db else None
    import cupy
    dw, db = cupy.empty((C, D), dy.dtype), cupy.empty(D, dy.dtype) if db else None
    _wait(cupy.ascontiguousarray(x), cupy.ascontiguousarray(dy), dw, db)
    return dw, db


def sum_of_rows(dy):
    """dy (M, D) -> (D,), of dy's dtype."""
    if not _may_wait(len(dy)) or not dy.shape[1]:
        return sum_rows(dy)
    import cupy
    db = cupy.empty(dy.shape[1], dy.dtype)
    _wait(None, cupy.ascontiguousarray(dy), None, db)
    return db


def sum_of_partials(partial, result) -> None:
    """result[...] = the sum of partial's rows: partial (M, n) in the dtype of sums, result of n numbers."""
    if not _may_wait(len(partial)):
        sum_partials(partial, result)
    elif result.size:
        _wait(None, partial, None, result.reshape(-1))


def ready(*arrays) -> None:
    """Computes what waits if one of the arrays is not filled yet, or lies in the memory of one that is not."""
    waiting = _waiting()
    if waiting and waiting.pending and any(a.data.mem.ptr in waiting.pending for a in arrays):
        fill()


def fill() -> None:
    """Computes all layers that wait, in one launch for each dtype and each MOST of them."""
    if _waiting() is None:                                  # outside a walk nothing waits
        return
    layers, _of_thread.waiting = _of_thread.waiting.layers, Waiting()
    for dtype in dict.fromkeys(_result(layer).dtype for layer in layers):
        source = cuda.pick("weight_gradients", str(dtype))
        kernel, most = cuda.kernel(source, "weight_gradients", str(dtype)), source.constants["MOST"]
        rows = [_row(*layer) for layer in layers if _result(layer).dtype == dtype]
        for some in (rows[i:i + most] for i in range(0, len(rows), most)):
            table = cuda.table(some, most, LAYER)
            kernel(_blocks(table["at"], source.constants["TILE"]), source.constants["THREADS"], table)


def _may_wait(M: int) -> bool:
    return 0 < M <= LONG and _waiting() is not None


def _waiting() -> Waiting | None:
    return getattr(_of_thread, "waiting", None)


def _wait(x, dy, dw, db) -> None:
    waiting = _of_thread.waiting
    if x is not None and (x.dtype != dy.dtype or x.device != dy.device):
        raise TypeError(f"x must be of dy's dtype and on its device, {dy.dtype} and {dy.device}, not {x.dtype} and "
                        f"{x.device}")
    waiting.layers.append((x, dy, dw, db))
    waiting.pending.update(a.data.mem.ptr for a in (dw, db) if a is not None)
    waiting.held += dy.nbytes + (0 if x is None else x.nbytes)
    if waiting.held > HELD:
        fill()


def _result(layer: tuple):
    *_, dw, db = layer
    return db if dw is None else dw


def _row(x, dy, dw, db) -> tuple:
    """A layer as the kernel's table has it."""
    pointers = (0 if a is None else a.data.ptr for a in (x, dy, dw, db))
    return *pointers, len(dy), 0 if x is None else x.shape[1], dy.shape[1], dy.dtype != _result((dw, db)).dtype


def _blocks(table: np.ndarray, tile: int) -> int:
    """Of all layers: tiles of [dw; db], whose rows are C, and one more with a bias; an unused row has D = 0."""
    return int((-(-(table["C"] + (table["db"] > 0)) // tile) * -(-table["D"] // tile)).sum())
