"""Systems that write down what the command line asks them for, and what stands for a report."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from support import tiny
from support.toy import Toy

from minidiff.diffusion.samplers import State
from minidiff.systems import SYSTEMS

ASKED = []                                                  # what the spies were asked, in order


class Spy(Toy):
    """Its images are grey, each as bright as its stream's first number; it writes down what it is asked for."""

    name, reads_captions = "spy", True

    def sample(self, captions, *, scale=2.0, steps=3, sampler="ddim", best=1, hot=0.5, seed=0, streams=None):
        ASKED.append((list(captions), dict(scale=scale, steps=steps, sampler=sampler, best=best, hot=hot), seed))
        noise = self.streams_for(captions, seed, streams).normal((1, 1, 1))
        return np.tanh(noise) + np.zeros((1, 28, 28, 1), np.float32)

    def likelihood_denoiser(self):
        return None, ()


class Stepping(Spy):
    """It shows its states on the way: the last less k in the k-th step before it."""

    name = "stepping"

    def trajectory(self, captions, *, seed=0, streams=None, **options):
        x = self.sample(captions, seed=seed, streams=streams, **options)
        for step, t in enumerate((9, 4, -1)):
            yield State(step, t, x - (2 - step), None)


@contextmanager
def entered(folder: Path) -> Iterator[None]:
    """Both systems are registered, and trained in the runs of a folder."""
    ASKED.clear()
    try:
        for kind in (Spy, Stepping):
            SYSTEMS.register(kind.name, kind)
            file = folder / "runs" / kind.name / "model.safetensors"
            file.parent.mkdir(parents=True)
            kind.new(tiny.digits(50)).save(file, notes={"dataset": "digits"})
        yield
    finally:
        for kind in (Spy, Stepping):
            if kind.name in SYSTEMS:
                SYSTEMS.unregister(kind.name)


class Numbers:
    """In a report's place."""

    def rows(self):
        return [("a", "1")]

    def as_dict(self):
        return {"a": 1}
