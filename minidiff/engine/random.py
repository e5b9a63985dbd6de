"""Random numbers: every use has a stream of its own, and every sample has one.

    generator(seed, use, ...)       one use of randomness: first weights, the batch of step n, captions
    SampleStreams(seed, B)          one stream for each sample of a batch

A sample's noise depends on its own seed only, not on the batch around it.  A generator's seed is a hash of the user's
seed and of the words and numbers that name the use, so that no two uses share a stream, for any seed of any size.
(NumPy pads a short seed with zeros: `default_rng([s, 2])` and `default_rng([s, 2, 0])` are one stream.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def generator(seed: int, use: str, *numbers: int) -> np.random.Generator:
    """The generator of one use of randomness, such as generator(seed, "batch", stage, step).

    seed: a whole number of at least 0, of any size.  use: what it is for.  numbers: which one of its kind.
    """
    name = ":".join([use, *(str(int(number)) for number in (seed, *numbers))])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


class SampleStreams:
    """One random stream per sample, so that an image does not depend on the batch it was made in.

    Row i of `normal(shape)` depends on sample i's seed and on how often it was called, on nothing else.
    """

    def __init__(self, seed: int, count: int):
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}")
        if not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"count must be a whole number of at least 1, not {count!r}")
        self._rngs = [np.random.default_rng([int(seed), i]) for i in range(count)]

    @classmethod
    def of(cls, generators: Sequence[np.random.Generator]) -> SampleStreams:
        """The streams of given generators, which are shared and not copied."""
        streams = cls.__new__(cls)
        streams._rngs = list(generators)
        return streams

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> SampleStreams:
        """One stream for each of the seeds; it equals sample 0 of `SampleStreams(seed, n)`."""
        return cls.of([np.random.default_rng([int(seed), 0]) for seed in seeds])

    def normal(self, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
        """Standard normal numbers, (len(self), *shape)."""
        dtype = np.dtype(dtype)
        drawn = dtype if dtype in (np.float32, np.float64) else np.dtype(np.float32)
        return np.stack([rng.standard_normal(shape, dtype=drawn) for rng in self._rngs]).astype(dtype, copy=False)

    def uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Numbers uniform on [0, 1), (len(self), *shape) float64."""
        return np.stack([np.asarray(rng.random(shape)) for rng in self._rngs])

    def __len__(self) -> int:
        return len(self._rngs)

    def __getitem__(self, part: slice) -> SampleStreams:
        return SampleStreams.of(self._rngs[part])


def sample_streams(device: str, seed: int, count: int):
    """A stream for each of `count` samples, whose normal numbers are made on the device.

    The same seed gives other numbers on another device.
    """
    if device == "cpu":
        return SampleStreams(seed, count)
    from minidiff.engine.cuda.random import DeviceSampleStreams
    return DeviceSampleStreams(seed, count)
