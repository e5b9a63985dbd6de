"""A system small enough to train in a test, with two stages; its images are not digits."""

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import to_numpy
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Linear
from minidiff.nn.precision import as_float32, as_input
from minidiff.systems import SYSTEMS
from minidiff.systems.stage import Stage
from minidiff.systems.system import System


@dataclass(frozen=True)
class ToyConfig:
    width: int = 3


class Toy(System):
    """Two stages: z = x a, and then y = z b on the z of the first; both are compared with four pixels of the image."""

    name, Config, example = "toy", ToyConfig, "01_swiss_roll.py"
    steps = (4, 5)

    def __init__(self, config, tokenizer, rng):
        super().__init__(config, tokenizer, rng)
        self.a, self.b = Linear(4, config.width, rng), Linear(config.width, 4, rng)
        self.seen = []

    def stages(self, data):
        x = data.images(np.arange(len(data)))[:, 6:10, 14, 0]                       # (N, 4)

        def batch(step):
            noise = to_numpy(step.normal((step.size, 4)))
            return (x[step.rng.integers(0, len(x), step.size)] + np.float32(0.1) * noise,)

        def first(a, x):
            return error(as_float32(a(as_input(a, x))), x[:, :self.config.width])

        def second(b, x):
            return error(as_float32(b(as_input(b, self.a(Tensor(x)).data))), x)

        def error(y, x):
            return ops.mean((y - x) * (y - x))
        yield Stage("first", self.a, batch, first, self.steps[0], batch_size=6)
        self.seen.append(self.a.state_dict())
        yield Stage("second", self.b, batch, second, self.steps[1], batch_size=6)

    def sample(self, captions, *, scale=2.0, best=1, seed=0, streams=None):
        """Grey images; the brightness of each is its stream's first number."""
        if best < 1:
            raise ValueError(f"best must be at least 1, not {best}")
        noise = to_numpy(self.streams_for(captions, seed, streams).normal((1, 1, 1)))
        return np.tanh(scale * noise) + np.zeros((1, 28, 28, 1), np.float32)


def enter() -> None:
    """Registers the toy as a system, for the whole process; tests use the fixture `toy` of conftest.py."""
    if "toy" not in SYSTEMS:
        SYSTEMS.register("toy", Toy)
