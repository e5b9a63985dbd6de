"""What you call to add a sampler, a schedule, a data set, a judge or a system to minidiff.

    import minidiff
    minidiff.register_sampler("euler", euler, order=1)
    minidiff.register_schedule("sigmoid", sigmoid)

Each call enters it in one registry, and everything else follows: the command line and `minidiff verify`.  A package
enters its parts by entry points instead: registry.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minidiff.data.dataset import DATASETS, Dataset, DatasetEntry, Questions
from minidiff.diffusion.densities import DENSITIES
from minidiff.diffusion.samplers import SAMPLERS, Sampler, State
from minidiff.diffusion.schedules import SCHEDULES, Schedule
from minidiff.evaluation import JUDGES
from minidiff.systems import SYSTEMS
from minidiff.systems.system import System


def register_sampler(name: str, function: Callable[..., Iterator[State]], *, order: float, calls: int = 1,
                     noise: bool = False, extrapolates: bool = False, consistency: bool = False) -> Sampler:
    """Adds a sampler: `function(denoiser, x_T, times, cond=None)` yields a State after each step.

    order: of its convergence to the exact flow (weak order for a stochastic sampler).  calls: of the denoiser a step.
    noise: whether it draws noise; it is then also given `streams=`.  extrapolates, consistency: as `Sampler` says,
    which has fields for rarer kinds, too: SAMPLERS.register(name, Sampler(...)).  ValueError where it draws noise and
    does not take `streams`, or needs `streams` and is said to draw none.
    """
    taken = inspect.signature(function).parameters
    streams = taken.get("streams")
    if noise and streams is None and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(f"the sampler {name!r} draws noise (noise=True), so its function must take streams=")
    if not noise and streams is not None and streams.default is streams.empty:
        raise ValueError(f"the function of the sampler {name!r} needs streams=, so it draws noise: register it with "
                         "noise=True")
    return SAMPLERS.register(name, Sampler(function, order=order, calls=calls, noise=noise, extrapolates=extrapolates,
                                           consistency=consistency))


def register_schedule(name: str, function: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """Adds a schedule: `function(T=1000, ...)` gives a Schedule; its other parameters are numbers with defaults.

    The command line then takes NAME or NAME:key=value,... with these parameters.
    """
    if not callable(function):
        raise TypeError(f"function must be a function (T, ...) -> Schedule, not {type(function).__name__}")
    return SCHEDULES.register(name, function)


def register_density(name: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Adds a density of training times: `function(schedule, ...)` gives P (T,), up to a factor.

    Its other parameters are numbers with defaults.  `minidiff train --set times=NAME:key=value,...` then draws times by
    it, in systems whose configuration has `times`.
    """
    if not callable(function):
        raise TypeError(f"function must be a function (schedule, ...) -> P (T,), not {type(function).__name__}")
    return DENSITIES.register(name, function)


def register_dataset(name: str, load: Callable[[Path | None, str], Dataset], *,
                     questions: Questions | None = None) -> DatasetEntry:
    """Adds a data set: `load(folder or None, "train" or "test")` gives a Dataset (data/dataset.py).

    questions: what a classifier of its images is asked; the system `adm` needs them.
    """
    if not callable(load):
        raise TypeError(f"load must be a function (folder, split) -> Dataset, not {type(load).__name__}")
    return DATASETS.register(name, DatasetEntry(load, questions))


def register_system(name: str, kind: type[System]) -> type[System]:
    """Adds a system: a subclass of System whose `name` is this one."""
    if not (isinstance(kind, type) and issubclass(kind, System)) or getattr(kind, "name", None) != name:
        raise TypeError(f"kind must be a subclass of System whose name is {name!r}, not {kind!r}")
    return SYSTEMS.register(name, kind)


def register_judge(name: str, function: Callable) -> Callable:
    """Adds how models of the data set `name` are evaluated: `function(model, *, count, options, seed, progress)`.

    It gives an object with rows() and as_dict(), like evaluation/report.py's Report.  One that takes `data` or `judge`
    too is given the data set (--data) and the file of a judge (--judge) where a user names them.
    """
    if not callable(function):
        raise TypeError(f"function must be a function of a model, like evaluate_digits, not {type(function).__name__}")
    return JUDGES.register(name, function)
