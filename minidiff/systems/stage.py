"""A stage: a part of a system that is trained in one go, and how its batches and its loss are computed.

    for each stage of the system
        repeat  arrays = stage.batch(step);  minimise stage.loss(stage.module, *arrays)

`stage.batch` takes a `Step`, which provides all randomness: a generator on the host, and noise made on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
    """

    def __init__(self, seed: int, stage: int, number: int, steps: int, size: int, device: str = "cpu"):
        """stage: 1 for the first.  number: 0 .. steps - 1."""
        self.size, self.progress, self.device = size, number / steps, device
        self.rng = generator(seed, "batch", stage, number)
        self._place, self._number, self._draws = (seed, FIRST_PLACE + stage), number, 0

    def normal(self, shape: tuple[int, ...]):
        """Standard normal numbers, float32, on the device: the noise eps."""
        if self.device == "cpu":
            return self.rng.standard_normal(shape, dtype=np.float32)
        if self._draws == DRAWS:
            raise RuntimeError(f"a step on {self.device} may ask for noise {DRAWS} times")
        seed, place = self._place
        streams = DeviceSampleStreams(seed, 1, first=place).at(self._number * DRAWS + self._draws)
        self._draws += 1
        return streams.normal(shape)[0]


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a system, trained in one go while the rest of the system is frozen.

    The loss is given the module, since in half precision a twin of it computes (nn/precision.py).
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
