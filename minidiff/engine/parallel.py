"""Independent pieces of work on all cores, in threads: NumPy and BLAS release Python's global lock while they compute.

A batch is divided into shards, and each thread takes whole shards through the network, forward and backward.  So all
cores are busy in every op, also in the elementwise ones, and a shard's activations stay in the cache.  Meanwhile BLAS
is limited to one thread, since its threads and ours would compete for the same cores.

The caller's thread works too, and the others live only as long as one map, so that nothing is left for a fork or an
exception to find in a wrong state.  A thread starts in 50 microseconds; a shard takes milliseconds.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import cache
from pathlib import Path

import numpy as np

from minidiff.engine.backend import device_of, is_floating, keep_freed_memory, narrow
from minidiff.engine.tensor import Tensor, gradients, no_grad, recording

# in samples; a training step of the text-to-image model at batch 128 takes 510 ms with shards of 64, and 550 ms with 32
# (2 cores of an AMD EPYC)
SHARD = 64
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")                    # of a container: "microseconds of each  microseconds"


def allowed_cores() -> set[int]:
    """The numbers of the cores that the operating system allows this process to use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cores() -> int:
    """The number of cores that this process uses: all that it may, or its part of those that ranks share.

    The environment variable OMP_NUM_THREADS, a number of at least 1, and a container's limit make it fewer.
    OPENBLAS_NUM_THREADS and MKL_NUM_THREADS limit only the threads of that library, which works alone where there is
    a single piece of work.
    """
    available = _part or len(allowed_cores())
    return min(n for n in (available, _omp_num_threads(), _container_limit()) if n)


def _container_limit() -> int:
    """How many cores' time a container may use (Docker's --cpus, Kubernetes' limits).  0: no limit, or no container."""
    try:
        time, period = CPU_MAX.read_text(encoding="ascii").split()  # microseconds; the time may be "max"
        return max(0, math.ceil(int(time) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return 0


def _omp_num_threads() -> int:
    """OMP_NUM_THREADS; of a list, such as 4,2, the first number, that of the outermost level.  0: it says nothing."""
    try:
        return max(0, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    except ValueError:
        return 0


_part = 0                                                   # of the cores that ranks share; 0 if there are no ranks


def divide_cores(allowed: Sequence[Iterable[int]]) -> None:
    """Divides the cores of one machine equally among its ranks, at least one each, for our threads and BLAS's.

    allowed: for each rank on this machine, this one included, the cores that it may use.  A core that mpiexec has
    bound to one rank belongs to that rank alone.
    """
    global _part
    ranks = [set(cores_of_rank) for cores_of_rank in allowed]
    # a core that k ranks may use counts as 1/k for each of them
    parts = sum(1 / sum(core in cores_of_rank for cores_of_rank in ranks) for core in allowed_cores())
    _part = max(1, int(parts + 1e-9))
    _blas().limit(limits=cores(), user_api="blas")          # outside of parallel_map


def parallel_map(f: Callable, items: Iterable) -> list:
    """[f(item) for item in items], computed on all cores.

    The results do not depend on the number of cores.  f computes under the caller's settings (no_grad, np.errstate),
    and must not write to anything shared.  Of several exceptions, that of the first item is raised.  A map that begins
    during another, in its f or in another thread, runs in its own thread alone; so does all work if no thread starts.
    """
    global _limited
    items, turn = list(items), _turn
    if len(items) <= 1 or cores() == 1 or not turn.acquire(blocking=False):
        return [f(item) for item in items]
    results, errors, left = [None] * len(items), {}, deque(range(len(items)))

    def work() -> None:
        while left:
            try:
                i = left.popleft()
            except IndexError:                              # another thread took the last one
                return
            try:
                results[i] = f(items[i])
            except BaseException as error:
                errors[i] = error
                left.clear()

    threads: list[threading.Thread] = []
    try:
        with _blas().limit(limits=1, user_api="blas") as _limited:
            try:
                while len(threads) < min(cores(), len(items)) - 1:
                    thread = threading.Thread(target=copy_context().run, args=(work,), name="minidiff")
                    thread.start()
                    threads.append(thread)
            except RuntimeError:                            # a limit on threads, or Python is shutting down
                pass
            try:
                copy_context().run(work)
            finally:
                left.clear()
                for thread in threads:
                    thread.join()
    finally:
        turn.release()
    try:
        if errors:                                          # items are taken in order: none before the first is left
            raise errors[min(errors, key=lambda i: (isinstance(errors[i], Exception), i))]      # Ctrl-C before all
    finally:
        errors.clear()                                      # a traceback refers to this frame: no cycle
    return results


_turn = threading.Lock()                                    # of the map that uses all cores, and limits BLAS
_limited = None                                             # threadpoolctl's limit of the last such map


def _after_fork() -> None:
    """Ends the map of another thread in a forked process, which has only the thread that forked."""
    global _turn
    if _turn.locked():
        _turn = threading.Lock()
        if _limited:
            _limited.restore_original_limits()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def parallel_gradients(loss: Callable[[slice], Tensor], leaves: Sequence[Tensor], count: int,
                       scale=1.0) -> tuple[float | np.ndarray, list]:
    """The mean loss of a batch of `count` samples and the gradients of `scale` times it, shard by shard on all cores.

    loss(shard) is the mean loss of the samples in the slice `shard`, a Tensor of shape ().  The sum goes in the order
    of the shards, so the result is the same, bit for bit, whichever thread finishes first.

    A GPU takes the whole batch at once, since one batch fills it.  The loss is then an array of shape () on the GPU,
    since reading it would wait for the GPU.
    """
    if count < 1 or not leaves:
        raise ValueError(f"there must be at least one sample and one leaf, not {count} and {len(leaves)}")
    if device_of(leaves[0].data) != "cpu":
        with recording():
            value = loss(slice(0, count))
        return value.data, gradients(value, leaves, scale)

    # a scaled gradient may overflow, and the caller who scales tests for that
    warn = {} if scale == 1 else {"over": "ignore", "invalid": "ignore"}

    def one(shard: slice):
        with np.errstate(**warn), recording():
            value = loss(shard)
            share = (shard.stop - shard.start) / count
            return share * value.item(), gradients(value, leaves, value.dtype.type(share * scale))

    total, grads = 0.0, None
    parts, group = shards(count), 4 * cores()               # a large batch's gradients would fill the memory
    for i in range(0, len(parts), group):
        for value, shard_grads in parallel_map(one, parts[i:i + group]):
            total += value
            if grads is None:
                grads = shard_grads
                continue
            with np.errstate(**warn):
                for g, shard_g in zip(grads, shard_grads, strict=True):
                    g += shard_g
    return total, grads


PIECE = 2 ** 18                                             # numbers: 1 MB in float32, which a core's cache holds


def pieces(rows: int, columns: int) -> list[slice]:
    """Slices of rows that have at most PIECE numbers each, or are a single row."""
    return shards(rows, max(1, PIECE // max(columns, 1)))


def map_rows(f: Callable, x: np.ndarray, dtype=None) -> np.ndarray:
    """f(x) of a NumPy array (..., C), for an f that treats every row of C numbers by itself: f(rows (n, C)) -> (n, C).

    It computes a piece at a time, on all cores, so that what f computes between stays in the cache.
    dtype: of the result; x's own if None.
    """
    rows, y = x.reshape(-1, x.shape[-1]), np.empty(x.shape, dtype=dtype or x.dtype)
    out = y.reshape(rows.shape)

    def one(piece: slice) -> None:
        out[piece] = f(rows[piece])
    parallel_map(one, pieces(*rows.shape))
    return y


def map_batch(f: Callable, *arrays, device: str = "cpu", size: int = SHARD):
    """f of the arrays' rows, shard by shard on all cores, without gradients, its results joined along axis 0.

    arrays: each has B rows, (B, ...).  f(*shards) returns an array or a Tensor with one row for each row of its
    shards, or a tuple of these; map_batch returns an array of B rows, or a tuple of these.  f's result for one row
    must not depend on the other rows.  A floating result takes the dtype of the first floating array, whatever dtype f
    computes in; without one it keeps its own.  A GPU takes the whole batch at once, since one batch fills it.
    """
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"map_batch requires arrays with the same number of rows, not {[len(a) for a in arrays]}")
    count, dtype = len(arrays[0]), next((a.dtype for a in arrays if is_floating(a.dtype)), None)

    def array_of(result):
        result = result.data if isinstance(result, Tensor) else result
        return narrow(result, dtype) if dtype and is_floating(result.dtype) else result

    def one(shard: slice):
        with no_grad():
            results = f(*(array[shard] for array in arrays))
        if isinstance(results, tuple):
            return tuple(map(array_of, results))
        return array_of(results)

    if device != "cpu" or count <= 1:
        return one(slice(0, count))
    results = parallel_map(one, shards(count, size))
    if isinstance(results[0], tuple):
        return tuple(map(np.concatenate, zip(*results, strict=True)))
    return np.concatenate(results)


def shards(count: int, size: int = SHARD) -> list[slice]:
    """The slices that divide `count` samples into shards of at most `size`, as equal as possible, and at least two.

    They do not depend on the machine, so neither does a sum over shards.
    """
    n = max(min(2, count), -(-count // size))               # 0 where there are no samples
    ends = [count * i // n for i in range(n + 1)] if n else []
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def in_parts(f: Callable[[slice], object], sizes: Sequence[int]) -> list:
    """f of slices that divide len(sizes) items into parts of about the same total size, one part for each core.

    sizes: the size of each item.  f's results must not depend on where the slices begin and end.
    """
    sums = np.cumsum([0, *sizes])                           # of the first 0, 1, ... items
    ideal = np.linspace(0, sums[-1], cores() + 1)[1:-1]
    ends = sorted({0, *(int(np.abs(sums - at).argmin()) for at in ideal), len(sizes)})
    return parallel_map(f, [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)])


@cache
def _blas():
    keep_freed_memory()                                     # each step frees arrays of sizes that the next one needs
    import scipy.linalg.blas  # noqa: F401  (loads SciPy's own BLAS, so that it is limited too)
    from threadpoolctl import ThreadpoolController
    return ThreadpoolController()
