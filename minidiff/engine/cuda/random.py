"""One stream of random numbers per sample, as `random.SampleStreams`, made on the device.

    z[i] = f(seed, place of sample i, call, element)        kernels/normal_*.cu

There is no state to advance, only the number of the call: a whole batch is one launch, and what a sample is given
depends on nothing around it.  The numbers are others than the CPU's of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.engine.cuda import launch as cuda

SEED, PLACE, CALL = range(3)                                # the columns of a table of streams


class DeviceSampleStreams:
    """SampleStreams whose numbers are made on the device.

    Row i of `normal(shape)` depends on sample i's seed and place and on how often it was called.  Places count from
    `first`: streams whose places differ have nothing in common.  A slice shares its streams' calls.
    """

    def __init__(self, seed: int, count: int, first: int = 0):
        if not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"count must be a whole number of at least 1, not {count!r}")
        self._table = _table([seed] * count, range(first, first + count))

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> DeviceSampleStreams:
        """One stream for each of the seeds; sample (seed, 0) of `DeviceSampleStreams(seed, n)` is its equal."""
        return cls._of_table(_table(seeds, [0] * len(seeds)))

    @classmethod
    def _of_table(cls, table: np.ndarray) -> DeviceSampleStreams:
        streams = cls.__new__(cls)
        streams._table = table
        return streams

    def at(self, call: int) -> DeviceSampleStreams:
        """Takes these streams, themselves, to their call number `call`, counted from 0: the whole of their state."""
        if not isinstance(call, (int, np.integer)) or not 0 <= call < 2**32:
            raise ValueError(f"call must be a whole number of 0..{2**32 - 1}, not {call!r}")
        self._table[:, CALL] = call
        return self

    def normal(self, shape: tuple[int, ...], dtype=np.float32, *, version: int | None = None):
        """Standard normal numbers, (len(self), *shape), on the device."""
        import cupy
        if self._table[:, CALL].max(initial=0) >= 2**32:
            raise ValueError("these streams have no call left: each has 2^32")
        dtype = np.dtype(dtype)
        z = cupy.empty((len(self), *shape), dtype)
        source = cuda.pick("normal", dtype.name, version)
        n, threads = math.prod(shape), source.constants["THREADS"]
        cuda.kernel(source, "normal", dtype.name)(
            -(-len(self) * -(-n // 4) // threads), threads, cupy.asarray(self._table), z, len(self), n)
        self._table[:, CALL] += np.uint64(1)
        return z

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, part: slice) -> DeviceSampleStreams:
        return self._of_table(self._table[part])


def _table(seeds: Sequence[int], places: Sequence[int]) -> np.ndarray:
    for seed in seeds:
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be a whole number of 0..{2**64 - 1} on the GPU, not {seed!r}")
    return np.stack([np.array([int(seed) for seed in seeds], np.uint64), np.array(list(places), np.uint64),
                     np.zeros(len(seeds), np.uint64)], axis=1)                      # (B, 3)
