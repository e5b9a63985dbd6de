"""A stage: a part of a system that is trained in one go, and how its batches and its loss are computed.

    for each stage of the system
        repeat  arrays = stage.batch(step);  minimise stage.loss(stage.module, *arrays)

`stage.batch` takes a `Step`, which provides all randomness: a generator on the host, noise made on the device, and the
order of the images.  Every epoch shows each image once, in a new order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from minidiff.data.dataset import Dataset
from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.engine.random import generator
from minidiff.engine.tensor import Tensor
from minidiff.nn.module import Module

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST_PLACE = 2**32                                         # of training's noise on a device; samplers' are below
DRAWS = 16                                                  # of noise on a device in one step, at most


class Step:
    """One training step of a stage, as its batch sees it.

    size        B, the number of samples in the batch
    progress    the share of the stage's steps that are made, within [0, 1)
    rng         the step's own generator, on the host
    device      "cpu" or "cuda", where `normal` puts its numbers
    shard       the samples of the batch that this process learns from; it reads no images of the others
    """

    def __init__(self, seed: int, stage: int, number: int, steps: int, size: int, device: str = "cpu",
                 shard: slice | None = None):
        """stage: 1 for the first.  number: 0 .. steps - 1.  shard: without it, all samples."""
        self.size, self.progress, self.device, self.shard = size, number / steps, device, shard or slice(0, size)
        self.rng = generator(seed, "batch", stage, number)
        self._seed, self._stage, self._number, self._draws = seed, stage, number, 0

    def choose(self, data: Dataset, each: int | None = None) -> np.ndarray:
        """Indices of this step's images, (B,), or (B, each): the next ones in the order of the epochs.

        Each epoch is a random order of all images, and the next epoch begins where it ends.  ValueError where there
        are no images.
        """
        if not len(data):
            raise ValueError(f"the data set {data.name!r} has no images")
        count = self.size * (each or 1)
        place = np.arange(self._number * count, (self._number + 1) * count)
        epoch, place = np.divmod(place, len(data))
        chosen = np.concatenate([epoch_order(self._seed, self._stage, int(e), len(data))[place[epoch == e]]
                                 for e in np.unique(epoch)])
        return chosen if each is None else chosen.reshape(self.size, each)

    def images(self, data: Dataset, chosen: np.ndarray) -> np.ndarray:
        """The images of `choose`'s indices, (B, H, W, C), or (B, each, H, W, C); those of other processes are 0."""
        mine = chosen[self.shard]
        x = data.images(mine.ravel()).reshape(*mine.shape, *data.shape)
        if len(mine) == len(chosen):
            return x
        whole = np.zeros((*chosen.shape, *data.shape), x.dtype)
        whole[self.shard] = x
        return whole

    def normal(self, shape: tuple[int, ...]):
        """Standard normal numbers, float32, on the device: the noise eps."""
        if self.device == "cpu":
            return self.rng.standard_normal(shape, dtype=np.float32)
        if self._draws == DRAWS:
            raise RuntimeError(f"a step on {self.device} may ask for noise {DRAWS} times")
        streams = DeviceSampleStreams(self._seed, 1, first=FIRST_PLACE + self._stage)
        streams = streams.at(self._number * DRAWS + self._draws)
        self._draws += 1
        return streams.normal(shape)[0]


@lru_cache(maxsize=4)                                       # a step may lie in two epochs
def epoch_order(seed: int, stage: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` images in an epoch, (count,): the same on every process."""
    order = generator(seed, "order of an epoch", stage, epoch).permutation(count)
    order.flags.writeable = False                           # all steps share it
    return order


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a system, trained in one go while the rest of the system is frozen.

    The loss is given the module, since in half precision a twin of it computes (nn/precision.py).

    On a GPU, the trainer moves what `ahead` returns together with the batch, in one copy, and the loss finds it there
    (`backend.moved`).  Without it the loss computes the same, with more copies.  An array that differs from the one
    that the loss moves is moved in vain, and does no harm.
    """

    name: str                                               # one word, also of the stage's folder
    module: Module                                          # its parameters are trained
    batch: Callable[[Step], tuple]                          # -> arrays with the batch along axis 0
    loss: Callable[..., Tensor]                             # (module, *arrays) -> the mean loss of these samples, ()
    steps: int
    batch_size: int = 32
    lr: float = 2e-3                                        # peak of the learning rate
    ema: float = 0.998                                      # decay of the average of the weights
    picture: Callable[[], Image | Any] | None = None        # a preview, drawn with the averaged weights
    # (module, dtype of its computation, *arrays) -> what the loss computes of a batch on the host and moves to a GPU
    ahead: Callable[..., list] | None = None
