"""How good are a model's pictures, and how many bits does it need for an image?

    metrics         FID, precision and recall; which captions' digits and attributes are right
    judge           the frozen classifier that reads the pictures
    fidelity        pictures and their captions: all of these numbers together
    report          `minidiff evaluate` for models of the digits
    likelihood      bits/dim of test images
    reconstruction  what autoencoders lose
    emoji           `minidiff evaluate` for models of emoji: the true picture is known

`JUDGES` says how models of a data set are evaluated; `evaluate` looks the data set of a model up there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minidiff.errors import UserError
from minidiff.registry import Registry

# data set's name -> evaluate(model, *, count, options, seed, progress), like report.evaluate_digits
JUDGES: Registry[Callable] = Registry("judge", "minidiff.judges",
                                      {"digits": "minidiff.evaluation.report:evaluate_digits",
                                       "emoji": "minidiff.evaluation.emoji:evaluate_emoji"})


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


def evaluate(model, *, data: str | None = None, count: int = 1000, options: Mapping | None = None, seed: int = 0,
             progress: Callable = lambda batches: batches):
    """Evaluates `count` pictures by a system, as the judge of its data set does; for the digits this gives a Report.

    data: the data set's name; None takes the one that the model was trained on, as its file says.  options: of
    sampling; those left out keep the system's defaults.  UserError where the system draws no pictures of captions, or
    where its data set has no judge.
    """
    check_draws(model)
    name = data or data_of(model)
    if name not in JUDGES:
        raise UserError(f"the data set {str(name)[:40]!r} has no judge: enter one in minidiff.evaluation.JUDGES "
                        "(an entry point of the group minidiff.judges) to evaluate models of it")
    return JUDGES[name](model, count=count, options=options, seed=seed, progress=progress)
