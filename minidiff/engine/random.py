"""Random numbers: one stream for each use of randomness, and one for each sample.

    generator(seed, use, ...)               one use of randomness: first weights, the batch of step n, captions
    SampleStreams(seed, B)                  one stream for each sample of a batch
    sample_streams(device, seed, B)         one stream for each sample, on that device

A sample's noise depends on its own seed only, not on the batch around it.  A generator's seed is a hash of the user's
seed and of the words and numbers that name the use.  So no two uses share a stream, whatever the seed.  (NumPy pads a
short seed with zeros: `default_rng([s, 2])` and `default_rng([s, 2, 0])` are the same stream.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from minidiff.checks import whole
from minidiff.engine.backend import to_device


def generator(seed: int, use: str, *numbers: int) -> np.random.Generator:
    """The generator of one use of randomness, such as generator(seed, "batch", stage, step).

    seed     the user's, a whole number of at least 0, of any size
    use      what the numbers are for
    numbers  which use of that name, where there are several
    """
    name = ":".join([use, str(whole("seed", seed, 0)), *(str(whole(use, number)) for number in numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


class SampleStreams:
    """One random stream per sample, so that an image does not depend on the batch in which it is made.

    Row i of `normal(shape)` depends on sample i's seed and on the numbers drawn before, and on nothing else.  A slice
    shares the streams of the whole: what it draws, the whole does not draw again.
    """

    def __init__(self, seed: int, count: int):
        whole("seed", seed, 0)
        whole("count", count, 1)
        self._rngs = [np.random.default_rng([int(seed), i]) for i in range(count)]

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> SampleStreams:
        """One stream for each of the seeds; each equals sample 0 of `SampleStreams(seed, n)`."""
        seeds = [whole("seed", seed, 0) for seed in seeds]
        return cls._of([np.random.default_rng([int(seed), 0]) for seed in seeds])

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
