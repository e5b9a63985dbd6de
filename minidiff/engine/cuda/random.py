"""One stream of random numbers per sample, made on the device; the interface is that of `random.SampleStreams`.

    normal      z[i] = f(seed, place of sample i, call, element)        on the device, kernels/normal_*.cu
    uniform     u[i] = g(seed, place of sample i, call, element)        on the host

f and g are counter-based generators (Philox, Salmon et al. 2011): they encrypt a counter and keep no state.  So a
stream's only state is the number of its next call, one launch draws for up to 160 samples, and a sample's numbers do
not depend on the batch around it.  They differ from the numbers that the CPU draws from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.checks import whole
from minidiff.engine.cuda import launch as cuda

SEED, PLACE, CALL = range(3)                                # the columns of a table of streams


class DeviceSampleStreams:
    """The streams of `count` samples, at the places first, first + 1, ...

    Row i of a draw depends on sample i's seed and place and on the number of draws before it, `normal` and `uniform`
    counted together, and on nothing else.  Streams at different places are independent.  A slice shares the streams
    of the whole, and its draws count for both.
    """

    def __init__(self, seed: int, count: int, first: int = 0):
        count = whole("count", count, 1)
        self._table = _table([seed] * count, range(first, first + count))           # (B, 3)

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> DeviceSampleStreams:
        """One stream for each of the seeds; each equals sample 0 of `DeviceSampleStreams(seed, n)`."""
        return cls._of_table(_table(seeds, [0] * len(seeds)))

    @classmethod
    def _of_table(cls, table: np.ndarray) -> DeviceSampleStreams:
        streams = cls.__new__(cls)
        streams._table = table
        return streams

    def at(self, call: int) -> DeviceSampleStreams:
        """Sets the number of the next call, counted from 0, and returns these same streams."""
        self._table[:, CALL] = whole("call", call, 0, 2**32 - 1)
        return self

    def normal(self, shape: tuple[int, ...], dtype=np.float32, *, version: int | None = None):
        """Standard normal numbers, (len(self), *shape), on the device."""
        import cupy
        self._check_calls()
        dtype = np.dtype(dtype)
        z = cupy.empty((len(self), *shape), dtype)
        source = cuda.pick("normal", dtype.name, version)
        n, threads, at_once = math.prod(shape), source.constants["THREADS"], source.constants["MOST"]
        kernel = cuda.kernel(source, "normal", dtype.name)
        for i in range(0, len(self), at_once):
            some = self._table[i:i + at_once]
            kernel(-(-len(some) * -(-n // 4) // threads), threads, cuda.table(some, at_once, (np.uint64, 3)),
                   z[i:i + at_once], len(some), n)
        self._table[:, CALL] += np.uint64(1)
        return z

    def uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Numbers uniform on [0, 1), (len(self), *shape) float64, on the host.

        They choose categories and time steps, which the host does.  The generator is NumPy's Philox4x64:
            key = (seed, place)     counter = (block of four numbers, 0, 0, call)
        """
        self._check_calls()
        rngs = [np.random.Generator(np.random.Philox(key=stream[[SEED, PLACE]],
                                                     counter=np.array([0, 0, 0, stream[CALL]], np.uint64)))
                for stream in self._table]
        self._table[:, CALL] += np.uint64(1)
        return np.array([rng.random(shape) for rng in rngs]).reshape(len(self), *shape)

    def _check_calls(self) -> None:
        if self._table[:, CALL].max(initial=0) >= 2**32:
            raise ValueError("these streams have no calls left: each has 2^32")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, part: slice) -> DeviceSampleStreams:
        return self._of_table(self._table[part])


def _table(seeds: Sequence[int], places: Sequence[int]) -> np.ndarray:
    seeds = [whole("on a GPU seed", seed, 0, 2**64 - 1) for seed in seeds]
    return np.stack([np.array(seeds, np.uint64), np.array(list(places), np.uint64),
                     np.zeros(len(seeds), np.uint64)], axis=1)                      # (B, 3)
