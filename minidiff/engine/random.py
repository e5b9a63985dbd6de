"""Random numbers: one stream for each use of randomness, and one for each sample.

    generator(seed, use, ...)               one use of randomness: first weights, the batch of step n, captions
    SampleStreams(seed, B)                  one stream for each picture of a batch
    SampleStreams(seed, B, use)             one stream for each sample, for another use than drawing it
    sample_streams(device, seed, B)         one stream for each picture, on that device

A sample's noise depends on its own seed only, not on the batch around it.  A generator's seed is a hash of the user's
seed and of the words and numbers that name the use.  So no two uses share a stream, whatever the seed.

NumPy's own seeds would not do: it pads them with zeros and cuts large numbers into words of 32 bits, so that
`default_rng(s)`, `default_rng([s, 0])` and `default_rng([s, 0, 0])` are one stream, and so are
`default_rng([2**32, 5])` and `default_rng([0, 1, 5])`.  All generators are made here, and tests/test_random_streams.py
compares the streams of all uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from minidiff.checks import whole
from minidiff.engine.backend import to_device

PICTURES = "pictures"


def generator(seed: int, use: str, *numbers: int) -> np.random.Generator:
    """The generator of one use of randomness, such as generator(seed, "batch", stage, step).

    seed     the user's, a whole number of at least 0, of any size
    use      what the numbers are for, any text without a colon
    numbers  which use of that name, where there are several
    """
    if ":" in use:
        raise ValueError(f"use must be a text without a colon, not {use!r}")
    name = ":".join([use, str(whole("seed", seed, 0)), *(str(whole(use, number)) for number in numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


class SampleStreams:
    """One random stream per sample, so that an image does not depend on the batch in which it is made.

    Row i of `normal(shape)` depends on sample i's seed and on the numbers drawn before, and on nothing else.  A slice
    shares the streams of the whole: what it draws, the whole does not draw again.
    """

    def __init__(self, seed: int, count: int, use: str = PICTURES):
        """use: what the numbers are for, as for `generator`."""
        whole("seed", seed, 0)
        whole("count", count, 1)
        self._rngs = [_of_sample(seed, i, use) for i in range(count)]

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], use: str = PICTURES) -> SampleStreams:
        """One stream for each of the seeds; each equals sample 0 of `SampleStreams(seed, n, use)`."""
        return cls._of([_of_sample(whole("seed", seed, 0), 0, use) for seed in seeds])

    @classmethod
    def _of(cls, rngs: Sequence[np.random.Generator]) -> SampleStreams:
        streams = cls.__new__(cls)
        streams._rngs = list(rngs)
        return streams

    def normal(self, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
        """Standard normal numbers, (len(self), *shape)."""
        dtype = np.dtype(dtype)
        drawn = dtype if dtype in (np.float32, np.float64) else np.dtype(np.float32)
        z = np.empty((len(self), *shape), drawn)
        for i, rng in enumerate(self._rngs):
            z[i] = rng.standard_normal(shape, dtype=drawn)
        return z.astype(dtype, copy=False)

    def uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Numbers uniform on [0, 1), (len(self), *shape) float64."""
        return np.array([rng.random(shape) for rng in self._rngs]).reshape(len(self), *shape)

    def __len__(self) -> int:
        return len(self._rngs)

    def __getitem__(self, part: slice) -> SampleStreams:
        return self._of(self._rngs[part])


def _of_sample(seed: int, i: int, use: str) -> np.random.Generator:
    """Sample i's generator.  A picture's has NumPy's own seed [seed, i]: two words, which no other use has.

    So its numbers can be made without minidiff.  Those of picture 0 are `default_rng(seed)`'s.
    """
    if use == PICTURES and seed < 2**32:
        return np.random.default_rng([int(seed), i])
    return generator(seed, use, i)


def sample_streams(device: str, seed: int, count: int):
    """One stream for each of `count` samples: SampleStreams on the CPU, DeviceSampleStreams on a GPU.

    Both have normal, whose numbers are on the device, and uniform, whose numbers are on the host.  The same seed gives
    different numbers on the two devices.
    """
    if device == "cpu":
        return SampleStreams(seed, count)
    from minidiff.engine.cuda.random import DeviceSampleStreams
    return DeviceSampleStreams(seed, count)


class MovedStreams:
    """Streams of the host, whose normal numbers are moved to a device: a GPU then draws the pictures of a CPU."""

    def __init__(self, streams: SampleStreams, device: str):
        self._streams, self._device = streams, device

    def normal(self, shape: tuple[int, ...], dtype=np.float32):
        return to_device(self._streams.normal(shape, dtype), self._device)

    def uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        return self._streams.uniform(shape)

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, part: slice) -> MovedStreams:
        return MovedStreams(self._streams[part], self._device)
