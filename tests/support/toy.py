"""A system so small that a test can train it: two stages, and pictures that are no digits."""

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Linear
from minidiff.systems.system import Stage, System, streams_for


@dataclass(frozen=True)
class ToyConfig:
    width: int = 3


class Toy(System):
    """Two stages: z = x a, and then y = z b on the z of the first, both asked for the image's four corners."""

    name, Config = "toy", ToyConfig
    steps = (4, 5)

    def __init__(self, config, tokenizer, rng):
        super().__init__(config, tokenizer, rng)
        self.a, self.b = Linear(4, config.width, rng), Linear(config.width, 4, rng)
        self.seen = []

    def stages(self, data):
        x = data.x_0[:, 6:10, 14, 0]                                                # (N, 4)

        def batch(rng, size):
            return (x[rng.integers(0, len(x), size)] + 0.1 * rng.standard_normal((size, 4), dtype=np.float32),)

        def error(y, x):
            return ops.mean((y - x) * (y - x))
        yield Stage("first", self.a, batch, lambda x: error(self.a(Tensor(x)), x[:, :self.config.width]), self.steps[0],
                    size=6)
        self.seen.append(self.a.state_dict())
        yield Stage("second", self.b, batch, lambda x: error(self.b(Tensor(self.a(Tensor(x)).data)), x), self.steps[1],
                    size=6)

    def sample(self, captions, *, scale=2.0, best=1, seed=0, streams=None):
        """Grey pictures, as bright as the stream says."""
        if best < 1:
            raise ValueError(f"best must be at least 1, not {best}")
        noise = streams_for(captions, seed, streams).normal((1, 1, 1))
        return np.tanh(scale * noise) + np.zeros((1, 28, 28, 1), np.float32)
