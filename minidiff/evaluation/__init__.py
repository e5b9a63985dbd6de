"""How good are a model's pictures, and how many bits does it need for an image?

    metrics         FID, precision and recall; which captions' digits and attributes are right
    judge           the frozen classifier that reads the pictures
    fidelity        pictures and their captions: all of these numbers together
    report          `minidiff evaluate` for models of the digits
    likelihood      bits/dim of test images
    reconstruction  what autoencoders lose
    pictures        `minidiff evaluate` for models of any pictures: a CLIP of the same pictures judges
    emoji           `minidiff evaluate` for models of emoji: the true picture is known

`JUDGES` says how models of a data set are evaluated; `evaluate` looks the data set of a model up there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from minidiff.data.dataset import DATASETS, Dataset, load_dataset
from minidiff.errors import UserError
from minidiff.registry import Registry

# data set's name -> evaluate(model, *, count, options, seed, progress), like report.evaluate_digits; one that takes
# `data` or `judge` too is given the data set and the judge's file, where a user names them
JUDGES: Registry[Callable] = Registry("judge", "minidiff.judges",
                                      {"digits": "minidiff.evaluation.report:evaluate_digits",
                                       "emoji": "minidiff.evaluation.emoji:evaluate_emoji",
                                       "pictures": "minidiff.evaluation.pictures:evaluate_pictures"})
PICTURES = "pictures"                                       # the judge of any other data set, too


LEAST = 4                                                   # pictures: precision and recall need more than k = 3
MOST = 10_000                                               # as many as the real images that come with minidiff


def check_count(count: int) -> None:
    """UserError unless so many pictures can be compared with as many real ones."""
    if not LEAST <= count <= MOST:
        raise UserError(f"--images must be from {LEAST}, for precision and recall, to {MOST}, not {count}")


def check_draws(model) -> None:
    """UserError unless a system, or its class, draws pictures of captions, which a judge can read."""
    if model.options() is None:
        shown = f": examples/{model.example} shows what it does" if model.example else ""
        raise UserError(f"{model.name} draws no pictures of captions{shown}")
    if not getattr(model, "reads_captions", True):
        raise UserError(f"{model.name} draws without captions, so no judge can read whether they are followed")
    if getattr(model, "no_judge", ""):
        raise UserError(f"{model.name} has no judge: {model.no_judge}")


def data_of(model) -> str:
    """The name of the data set that a model was trained on, as its file says."""
    return model.notes.get("dataset", "digits")


def evaluate(model, *, data: str | Dataset | None = None, judge: str | Path | None = None, count: int = 1000,
             options: Mapping | None = None, seed: int = 0, progress: Callable = lambda batches: batches):
    """Evaluates `count` pictures by a system, as the judge of its data set does; for the digits this gives a Report.

    data: the data set, or its name; None takes the one that the model was trained on, as its file says.  judge: the
    file of the network that judges; None takes the judge's own choice.  options: of sampling; those left out keep the
    system's defaults.  A data set without an entry in JUDGES is judged by a CLIP (pictures.py).  UserError where the
    system draws no pictures of captions, or where there is nothing to compare with.
    """
    check_draws(model)
    name = data.name if isinstance(data, Dataset) else data or data_of(model)
    function = judge_of(name)
    if not isinstance(data, Dataset):
        data = load_dataset(name) if name in DATASETS and name not in JUDGES else None
    shape = tuple(getattr(getattr(model, "config", None), "shape", ()))     # not every system says it
    if data is not None and shape and shape != tuple(data.shape):
        raise UserError(f"{model.name} draws pictures of shape {shape}, and those of the data are {tuple(data.shape)}")
    chosen = {key: value for key, value in (("data", data), ("judge", judge)) if value is not None}
    for key in chosen:
        if key not in inspect.signature(function).parameters:
            raise UserError(f"the judge of {ascii(name)[1:-1][:40]} brings all that it needs: leave out --{key}")
    return function(model, count=count, options=options, seed=seed, progress=progress, **chosen)


def judge_of(name: str) -> Callable:
    """How models of a data set are evaluated."""
    return JUDGES[name if name in JUDGES else PICTURES]


def takes_data(name: str) -> bool:
    """Whether the judge of a data set compares with a data set that it is given."""
    return "data" in inspect.signature(judge_of(name)).parameters
