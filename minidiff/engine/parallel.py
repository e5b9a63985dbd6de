"""Independent pieces of work on all cores: NumPy and BLAS let go of Python's lock while they compute.

A batch is cut into shards and each thread carries whole shards through the network, forward and backward.
That keeps both cores busy in every op, the element-wise ones too, and the shard's activations in cache.
BLAS is held to one thread meanwhile, or its threads and ours would fight for the same cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from minidiff.engine.backend import device_of
from minidiff.engine.tensor import Tensor, gradients, no_grad, recording

_NAME = "minidiff"
_one_at_a_time = threading.Lock()                           # BLAS has one limit for the whole process
# samples; the main job's step at batch 128 takes 510 ms with shards of 64 and 550 with 32 (2 cores of an AMD EPYC)
SHARD = 64


def allowed_cores() -> set[int]:
    """The numbers of the cores that the system lets this process use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cores() -> int:
    """The number of cores that this process may use; of cores that ranks share, its part."""
    return _part or len(allowed_cores())


_part = 0                                                   # of the cores that ranks share; 0 where nobody shares


def divide_cores(allowed: Sequence[Iterable[int]]) -> None:
    """From now on the ranks of one machine use its cores() in equal parts, at least one each, BLAS included.

    allowed: the cores that each of them may use, this process among them.  Cores that mpiexec has bound to one rank
    are its own.
    """
    global _part
    everybodys = [set(of_one) for of_one in allowed]
    # a core that k ranks may use is 1/k of one to each
    parts = sum(1 / sum(core in of_one for of_one in everybodys) for core in allowed_cores())
    _part = max(1, int(parts + 1e-9))
    _pool.cache_clear()
    _blas().limit(limits=_part, user_api="blas")            # where no map of ours holds it to one


def parallel_map(f: Callable, items: Iterable) -> Iterator:
    """f of each item, in order, computed on all cores; it uses as many as there are items, at most.

    The results do not depend on the number of cores.  f must not write to anything shared.  One such map runs at
    a time, and one that is called within another's f runs in that thread.
    """
    items = list(items)
    if len(items) == 1 or cores() == 1 or threading.current_thread().name.startswith(_NAME):
        yield from map(f, items)
        return
    with _one_at_a_time, _blas().limit(limits=1, user_api="blas"):
        yield from _pool().map(f, items)


def parallel_gradients(loss: Callable[[slice], Tensor], leaves: Sequence[Tensor], count: int,
                       scale=1.0) -> tuple[float | np.ndarray, list]:
    """The mean loss of a batch of `count` samples and the gradients of `scale` times it, shard by shard on all cores.

    loss(part) is the mean loss of the samples in the slice `part`, a Tensor of shape ().  It sums in the order
    of the shards, so that the result is the same, bit for bit, whichever thread was first.

    A GPU takes the batch as a whole, since one shard fills it; and the loss is an array of shape () there, for to
    read it would be to wait for it.
    """
    if device_of(leaves[0].data) != "cpu":
        with recording():
            value = loss(slice(0, count))
        return value.data, gradients(value, leaves, scale)

    # a scaled gradient may overflow: whoever scales will look
    warn = {} if scale == 1 else {"over": "ignore", "invalid": "ignore"}

    def one(part: slice):
        with np.errstate(**warn), recording():              # each thread has its own
            value = loss(part)
            share = (part.stop - part.start) / count
            return share * value.item(), gradients(value, leaves, value.dtype.type(share * scale))

    total, grads = 0.0, None
    for value, shard_grads in parallel_map(one, shards(count)):
        total += value
        if grads is None:
            grads = shard_grads
            continue
        with np.errstate(**warn):
            for g, shard_g in zip(grads, shard_grads, strict=True):
                g += shard_g
    return total, grads


def map_batch(f: Callable, *arrays, device: str = "cpu", size: int = SHARD):
    """f of the arrays' rows, shard by shard on all cores, without gradients, its results joined along axis 0.

    arrays: each has B rows, (B, ...).  f(*shards) returns an array or a Tensor with one row for each row of its
    shards, or a tuple of these; map_batch returns an array of B rows, or a tuple of these.  f's result for one row
    must not depend on the other rows.  A GPU takes the whole batch at once, since one batch fills it.
    """
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"map_batch requires arrays with the same number of rows, not {[len(a) for a in arrays]}")
    count = len(arrays[0])

    def one(shard: slice):
        with no_grad():                                     # each thread records, or not, for itself
            results = f(*(array[shard] for array in arrays))
        if isinstance(results, tuple):
            return tuple(map(_array_of, results))
        return _array_of(results)

    if device != "cpu" or count <= 1:
        return one(slice(0, count))
    results = list(parallel_map(one, shards(count, size)))
    if isinstance(results[0], tuple):
        return tuple(map(np.concatenate, zip(*results, strict=True)))
    return np.concatenate(results)


def _array_of(result):
    return result.data if isinstance(result, Tensor) else result


def shards(count: int, size: int = SHARD) -> list[slice]:
    """The slices that cut `count` samples into shards of at most `size`, as equal as can be, and at least two.

    How it cuts does not depend on the machine, and so neither does the sum over shards.
    """
    n = max(min(2, count), -(-count // size))
    ends = [count * i // n for i in range(n + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def in_parts(f: Callable[[slice], object], sizes: Sequence[int]) -> list:
    """f of each of a few slices that cut len(sizes) things, each of its size, into parts of about equal size.

    There are as many parts as cores, so f's results must not depend on where it cuts.
    """
    sums = np.cumsum([0, *sizes])                           # after 0, 1, ... things
    ideal = np.linspace(0, sums[-1], cores() + 1)[1:-1]
    ends = sorted({0, *(int(np.abs(sums - at).argmin()) for at in ideal), len(sizes)})
    return list(parallel_map(f, [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix=_NAME)


@cache
def _blas():
    import scipy.linalg.blas  # noqa: F401  (SciPy's BLAS, too, must be loaded before it can be held back)
    from threadpoolctl import ThreadpoolController
    return ThreadpoolController()
