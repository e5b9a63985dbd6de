"""Training any system of minidiff/systems, stage by stage, in a run on disk that loses nothing.

    for each stage of the system:   train its module (trainer.py, loop.py);  put the averaged weights in place

The run's folder holds run.json (how the run was started), one folder a stage, such as 1-autoencoder and 2-diffusion,
with its states, loss.png and samples.png, and at the end model.safetensors.  A run that was interrupted, or killed,
resumes to the same bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

from minidiff import checkpoint
from minidiff.checks import with_plain_numbers
from minidiff.data.dataset import Dataset, check_dataset
from minidiff.errors import UserError, refusals
from minidiff.files import check_writable, remove_abandoned, write_json
from minidiff.input_files import parse_json, read_file
from minidiff.locks import locked
from minidiff.registry import NoEntry
from minidiff.systems import load_needed
from minidiff.systems.config import config_from, with_changes
from minidiff.systems.stage import Stage
from minidiff.systems.system import System
from minidiff.training.loop import NotSaved, draw_preview, train_stage
from minidiff.training.ranks import ranks
from minidiff.training.trainer import TrainConfig, Trainer

START = "run.json"                                          # how the run was started
LARGEST_START = 1 << 20                                     # bytes
MODEL = "model.safetensors"
WARMUP = 50                                                 # steps to the peak of the learning rate, at most


@dataclass(frozen=True)
class TrainOptions:
    """What a user may choose for all stages of a run; None leaves it to the system, or on resuming to the run.

    effort: the share of each stage's own steps to make.  steps, batch, lr: take the place of each stage's own.
    """

    seed: int | None = None
    effort: float | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    precision: str | None = None

    def __post_init__(self):
        with_plain_numbers(self)

    def resolved(self) -> TrainOptions:
        """The same options, with the defaults of those that do not depend on the stage."""
        defaults = {"seed": 0, "effort": 1.0, "precision": "float32"}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def for_stage(self, stage: Stage) -> TrainConfig:
        """How a stage is trained with these options; UserError where one is out of range."""
        o = self.resolved()
        steps = max(1, round(stage.steps * o.effort)) if o.steps is None else o.steps
        return TrainConfig(steps=steps, batch=stage.batch_size if o.batch is None else o.batch,
                           lr=stage.lr if o.lr is None else o.lr, ema=stage.ema, warmup=min(WARMUP, steps),
                           seed=o.seed, precision=o.precision)


@dataclass(frozen=True)
class Trained:
    """A system after its last stage, the seconds that each stage took over all sittings, and its last losses."""

    system: System
    seconds: dict[str, float]
    losses: dict[str, float]                # the mean of each stage's last 100


def run(folder: str | Path, kind: type[System], data: Dataset, options: TrainOptions | None = None, *, config=None,
        changes: Mapping[str, object] | None = None,
        needed: Mapping[str, str | Path] | None = None, resume: bool = False, quiet: bool = False, keep: int = 3,
        device: str = "cpu") -> Trained:
    """Trains a system of this kind in `folder`, and returns it with its averaged weights.

    config: the system's own, if not the default for this data; a run resumes with the one that it was started with.
    changes: fields of the default configuration that are to have other values.
    needed: files of the systems that it is built on, by name, where they are not to be searched for.  keep: how many
    states of each stage are kept.  Ctrl-C or SIGTERM ends the step, saves, and raises loop.Interrupted.  UserError
    where the folder holds another run or none to resume, or where another process trains in it.
    """
    folder, options = Path(folder), options or TrainOptions()
    _check_options(options)
    check_dataset(data)
    with _alone_in(folder, device):
        return _run(folder, kind, data, options, config, changes, needed, resume, quiet, keep, device)


@contextmanager
def _alone_in(folder: Path, device: str = "cpu") -> Iterator[None]:
    """Makes the folder if there is none; within it no other process trains there.  UserError, on all ranks, where one
    does."""
    with ExitStack() as lock:
        ranks(device).by_first(lambda: lock.enter_context(locked(folder)))
        yield


def _run(folder: Path, kind: type[System], data: Dataset, options: TrainOptions, config, changes, needed,
         resume: bool, quiet: bool, keep: int, device: str) -> Trained:
    """The run, in a folder in which no other process trains."""
    first = ranks(device).rank == 0                         # a rank's GPU is chosen before there is an array on it
    start = _check_run(folder, kind, resume, options)
    options, config = (start.options, start.config) if start else (options.resolved(), config)
    systems = load_needed(kind, needed)
    hashes = {name: _hash(system) for name, system in systems.items()}
    if start and start.needed != hashes:
        changed = next(name for name in kind.needs if start.needed.get(name) != hashes[name])
        raise UserError(f"{folder} was started with another {changed}, on which {kind.name} is built: name its file "
                        f"with --needs {changed}=FILE, or choose another --out.")
    if start and start.data != data.fingerprint:
        raise UserError(f"{folder} was started with other data: name them with --data, or choose another --out.")
    with refusals(f"{kind.name} cannot be trained so"):     # what is refused is refused before a file is written
        if changes and not start:
            config = with_changes(config or kind.default_config(data, systems), changes)
        system = kind.new(data, options.seed, config, systems).to(device)
        stages = system.stages(data)
        first_stage = next(stages)
    ranks(device).wait()                                    # until all have looked at the folder
    values = {"system": kind.name, "config": asdict(system.config), "data": data.fingerprint,
              "options": asdict(options), "needed": hashes}
    if first:
        write_json(folder / START, values)
    description = system.describe() | {"data": data.fingerprint, "needed": hashes}
    seconds, losses = {}, {}
    for number, stage in enumerate(chain([first_stage], stages), start=1):
        trainer = Trainer(stage, options.for_stage(stage), number=number, device=device,
                          description=description | {"stage": stage.name})
        _train(trainer, StageFolder(folder / f"{number}-{stage.name}", keep, values), quiet,
               f"{kind.name}, {stage.name}")
        trainer.use_averaged_weights()
        seconds[stage.name] = trainer.seconds
        recent = trainer.losses[-100:]
        losses[stage.name] = sum(recent) / len(recent)
    if first:
        notes = system.notes | {"seconds": seconds, "options": asdict(options), "data": data.source,
                                "dataset": data.name}
        try:
            system.save(folder / MODEL, notes=notes)
        except UserError as error:
            raise NotSaved(f"{str(error).rstrip('.')}; the last stage's state is saved, and resuming writes it"
                           ) from error
    return Trained(system, seconds, losses)


class StageFolder(checkpoint.CheckpointFolder):
    """The states of one stage.  If the run's folder was removed while it trained, a state comes with run.json again,
    without which it could not be resumed."""

    def __init__(self, folder: Path, keep: int, start: dict):
        """start: the values of run.json."""
        super().__init__(folder, keep)
        self.start = start

    def save(self, step: int, tensors: Mapping, meta: Mapping) -> Path:
        path = super().save(step, tensors, meta)
        if not (self.folder.parent / START).exists():
            write_json(self.folder.parent / START, self.start)
        return path


def _train(trainer: Trainer, folder: checkpoint.CheckpointFolder, quiet: bool, title: str) -> None:
    """Trains a stage from its newest state, if it has one, to its last step."""
    saved = folder.latest(trainer.check_header)
    if saved:
        trainer.restore(saved)
    first = trainer.ranks.rank == 0
    if first:
        folder.prepare(trainer.n)
    if trainer.n < trainer.config.steps:
        train_stage(trainer, folder, quiet=quiet, last_good=saved.path if saved else None, title=title)
        if first:
            draw_preview(trainer, folder.folder)


def _hash(system: System) -> str:
    """Of all weights of a system."""
    digest = hashlib.sha256()
    for name, w in sorted(system.state_dict().items()):
        digest.update(name.encode() + w.tobytes())
    return digest.hexdigest()


# --- the folder of a run: is it this one? -------------------------------------------------------------------

@dataclass(frozen=True)
class Start:
    """How a run was started: its configuration, options, data, and the hashes of the systems that it is built on."""

    config: object
    options: TrainOptions
    data: str                               # Dataset.fingerprint
    needed: dict[str, str]


def check_run(folder: Path, kind: type[System], resume: bool, options: TrainOptions | None = None) -> Start | None:
    """How the folder's run was started; None where it holds no run.

    UserError, before any work, where it holds another run, where it has none to resume, where an option asks for what
    resuming cannot change, where the folder cannot be written, or where another process trains in it.
    """
    with _alone_in(folder):
        return _check_run(folder, kind, resume, options)


def _check_run(folder: Path, kind: type[System], resume: bool, options: TrainOptions | None) -> Start | None:
    start = _started(folder, kind)
    if start is None and ((folder / MODEL).exists() or checkpoint.CheckpointFolder(folder).holds_any()):
        raise UserError(f"{folder} holds a model or a run of another kind: choose another --out.")
    if start and not resume:
        raise UserError(f"{folder} holds a run of {kind.name}: add --resume to continue it, or choose another --out.")
    if resume and start is None:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or name the run's folder with --out.")
    for f in fields(TrainOptions) if start and options else ():
        asked, saved = getattr(options, f.name), getattr(start.options, f.name)
        if asked is not None and asked != saved:
            was = "without" if saved is None else f"with --{f.name} {saved}, not"
            raise UserError(f"{folder} was started {was} --{f.name} {asked}, which resuming cannot change: leave the "
                            "option out, or choose another --out.")
    ranks().by_first(lambda: _check_folder(folder))
    return start


def _check_folder(folder: Path) -> None:
    """UserError unless a run can be written to the folder."""
    checkpoint.CheckpointFolder(folder).prepare()
    for path in (folder / START, folder / MODEL):           # one may be read-only
        check_writable(path)
    for stage in folder.glob("[0-9]*-*"):
        remove_abandoned(stage)


def _started(folder: Path, kind: type[System]) -> Start | None:
    path = folder / START
    if not os.path.lexists(path):
        return None
    text = read_file(path, LARGEST_START)
    try:
        saved = parse_json(text)
        if saved["system"] == kind.name:
            options = TrainOptions(**saved["options"])
            _check_options(options)
            needed = {str(name): str(digest) for name, digest in saved["needed"].items()}
            return Start(config_from(kind.Config, saved["config"]), options, str(saved["data"]), needed)
    except NoEntry as error:
        raise UserError(f"{path} needs an entry that this program does not have ({error}): resume the run in the "
                        "program that registers it.") from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} does not say how this run was started ({error}): choose another --out.") from error
    raise UserError(f"{folder} holds a run of {str(saved['system'])[:40]!r}, not of {kind.name!r}: choose another "
                    "--out.")


def _check_options(options: TrainOptions) -> None:
    """UserError where an option is out of range, before any work."""
    if options.effort is not None and not 0 < options.effort <= 100:
        raise UserError(f"effort must be above 0 and at most 100, such as 0.1 for a tenth of the steps, "
                        f"not {options.effort:g}")
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "effort"}
    replace(TrainConfig(), **{name: value for name, value in given.items() if value is not None})
