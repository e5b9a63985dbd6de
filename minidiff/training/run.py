"""Training any system of minidiff/systems, stage by stage, in a run on disk that loses nothing.

    for each stage of the system:   fit its part (fit.py);  put the averaged weights in place;  go on to the next

The run's folder holds one folder a stage, 1-autoencoder, 2-diffusion, with its states, loss.png and samples.png, and
at the end model.safetensors.  Everything random in step n of stage k is drawn from a generator seeded with
(seed, 2, k, n): a run that was interrupted, or killed, goes on to the same bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff import checkpoint, pictures
from minidiff.data import mnist
from minidiff.data.digits import CaptionedDigits
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.files import write_json
from minidiff.systems.system import Stage, System, config_from
from minidiff.training.ranks import ranks
from minidiff.training.trainer import Fit, FitConfig, fit


class StageFit(Fit):
    """One stage of a system in training."""

    def __init__(self, stage: Stage, number: int, seed: int, effort: float, meta: dict):
        """number: 1 for the first.  effort: the share of the stage's steps to make.  meta: what its files say."""
        steps = max(1, round(stage.steps * effort))
        super().__init__(stage.module, FitConfig(steps=steps, batch=stage.size, lr=stage.lr, ema=stage.ema,
                                                 warmup=min(50, steps), seed=seed))
        self.stage, self.number, self.meta = stage, number, meta

    def batch(self) -> tuple:
        rng = np.random.default_rng([self.config.seed, 2, self.number, self.n])
        paced = [self.n / self.config.steps] if self.stage.paced else []
        return self.stage.batch(rng, self.config.batch, *paced)

    def loss(self, *arrays) -> Tensor:
        return self.stage.loss(*arrays)

    def describe(self) -> dict:
        return self.meta

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes back to a saved state; UserError if it is of another system, stage, data, or number of steps."""
        for what, mine in (self.meta | {"train": asdict(self.config)}).items():
            if saved.meta.get(what) != mine:
                raise UserError(f"{saved.path} is of a run with another {WHAT.get(what, what)}: resume with the "
                                "options that it was begun with, or choose another --out.")
        super().restore(saved)


WHAT = {"data": "--data", "train": "--seed or --effort", "config": "configuration"}


@dataclass(frozen=True)
class Trained:
    """A system after its last stage, and the seconds that each stage took, over all sittings."""

    system: System
    seconds: dict[str, float]


def run(folder: str | Path, kind: type[System], data: mnist.Images, *, seed: int = 0, effort: float = 1.0, config=None,
        resume: bool = False, quiet: bool = False, keep: int = 2) -> Trained:
    """Trains a system of this kind in `folder`, and returns it with its averaged weights.

    effort: the share of each stage's steps to make; less for a quick look.  config: the system's own, if not the
    default; a run goes on with the one that it was begun with.  Ctrl-C ends the step, saves, and raises
    fit.Interrupted; with resume=True it goes on.  UserError where the folder holds another run, or none to resume.
    """
    folder = Path(folder)
    if not 0 < effort <= 100:
        raise UserError(f"effort must be above 0 and at most 100, such as 0.1 for a tenth of the steps, not {effort:g}")
    begun = check_run(folder, kind, resume)
    if begun and (begun["seed"], begun["effort"]) != (seed, effort):
        raise UserError(f"{folder} was begun with --seed {begun['seed']} --effort {begun['effort']}: resume with "
                        "these, or choose another --out.")
    digits = CaptionedDigits.of(data)
    system = kind.new(digits, seed, begun["config"] if begun else config)
    first = ranks().rank == 0
    ranks().wait()                                          # until all have looked at the folder
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BEGUN, system.describe() | {"seed": seed, "effort": effort})
    told = json.loads(json.dumps(asdict(system.config)))    # as a file will tell it: a tuple is a list there
    seconds = {}
    for number, stage in enumerate(system.stages(digits), start=1):
        meta = {"system": kind.name, "stage": stage.name, "config": told, "data": digits.fingerprint}
        trainer = StageFit(stage, number, seed, effort, meta)
        keeper = checkpoint.CheckpointFolder(folder / f"{number}-{stage.name}", keep)
        saved = keeper.latest()
        if saved:
            trainer.restore(saved)
        if first:
            keeper.prepare(trainer.n)
        if trainer.n < trainer.config.steps:
            fit(trainer, keeper, draw, quiet=quiet, last_good=saved.path if saved else None,
                what=f"{kind.name}, {stage.name}")
            if first:
                draw(trainer, keeper.folder)
        stage.module.load_state_dict(dict(trainer.ema.average))
        seconds[stage.name] = trainer.seconds
    if first:
        system.save(folder / "model.safetensors", notes={"seconds": seconds, "seed": seed, "effort": effort,
                                                         "data": data.source})
    return Trained(system, seconds)


BEGUN = "run.json"                                          # what the run was begun as


def check_run(folder: Path, kind: type[System], resume: bool) -> dict | None:
    """What the folder's run was begun with: its config, seed and effort; None where it holds no run.

    UserError, before any work, where it holds another run, or with `resume` none.
    """
    begun = _begun(folder, kind)
    if not begun and (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds a run of another kind: choose another --out.")
    if begun and not resume:
        raise UserError(f"{folder} holds a run of {kind.name}: add --resume to go on with it, or choose another --out.")
    if resume and not begun:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or name the run's folder with --out.")
    ranks().by_first(checkpoint.CheckpointFolder(folder).prepare)
    return begun


def _begun(folder: Path, kind: type[System]) -> dict | None:
    path = folder / BEGUN
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["system"] != kind.name:
            raise UserError(f"{folder} holds a run of {str(told['system'])[:40]!r}, not of {kind.name!r}: choose "
                            "another --out.")
        return {"config": config_from(kind.Config, told["config"]), "seed": told["seed"], "effort": told["effort"]}
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not say what run this is ({error}): choose another --out.") from error


def draw(trainer: StageFit, folder: Path) -> None:
    """Rewrites loss.png and, where the stage has a picture, samples.png with the averaged weights."""
    pictures.save(pictures.loss_curve(range(1, trainer.n + 1), trainer.losses, f"{trainer.stage.name}: loss"),
                  folder / "loss.png")
    if trainer.stage.draw:
        with trainer.with_averaged_weights():
            pictures.save(trainer.stage.draw(), folder / "samples.png")
