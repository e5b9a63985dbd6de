"""Fitting: parameters follow the gradient of a loss, in a run on disk that loses nothing.

    repeat  a batch of step n,  the gradient of its mean loss, clipped
            AdamW step;  EMA of the weights

Everything random in step n is drawn from a generator seeded with (seed, 2, n).  So a run's state is its weights, the
optimiser's and the average's numbers, and n: N steps, saved and loaded, and M more give the same bits as N + M steps,
on the same machine.

On a GPU nothing in a step waits for the device: the update decides by itself what to do, and the losses are fetched
every FETCH_EVERY steps, and before saving.

Started by mpiexec, each rank takes its part of the batch and the gradients are summed (engine/ranks.py); the first
rank alone writes files and draws, while the others wait for it in the next step's sum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minidiff import checkpoint
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.nn.optim import EMA, AdamW, UpdateOnDevice, WarmupCosine, clip_by_norm
from minidiff.nn.precision import LossScale, dtype_of
from minidiff.training.ranks import ranks


@dataclass(frozen=True)
class FitConfig:
    """How to fit; with the data and the model's configuration it determines the result."""

    steps: int = 2200
    batch: int = 32
    lr: float = 2e-3                        # peak of the learning rate
    warmup: int = 50                        # steps to the peak
    ema: float = 0.998                      # decay of the average of the weights
    clip: float = 1.0                       # largest norm of the gradient
    seed: int = 0
    precision: str = "float32"              # what the network computes in; the weights are float32 always

    def __post_init__(self):
        dtype_of(self.precision)                            # refuses what is not to be had, before any work
        for name, low, high in (("steps", 1, 10**9), ("batch", 1, 10**6), ("warmup", 0, 10**9), ("seed", 0, 2**63)):
            if type(getattr(self, name)) is not int or not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be a whole number of at least {low}, not {getattr(self, name)!r}")
        for name, low, high in (("lr", 1e-12, 10.0), ("ema", 0.0, 1 - 1e-9), ("clip", 1e-12, 1e12)):
            self._check_real(name, low, high)

    def _check_real(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            raise UserError(f"{name} must be within {low:g} and {high:g}, not {getattr(self, name)!r}")


FETCH_EVERY = 20                                            # steps on a GPU, after which their losses are fetched


class Fit:
    """A module in training: `step()` makes one step, `state()` and `restore()` save and load all there is.

    A subclass says what a step learns from, in `batch` and `loss`.  `losses` are the losses so far; on a GPU, those
    that were fetched.
    """

    def __init__(self, model: Module, config: FitConfig, device: str = "cpu"):
        self.model, self.config, self.ranks = model, config, ranks(device)
        self.part = self.ranks.part(config.batch)           # of each batch, that this rank learns from
        self.parameters = model.parameters()
        self.optimiser = AdamW(self.parameters)
        self.ema = EMA(self.parameters, config.ema)
        self.lr = WarmupCosine(config.lr, config.steps, config.warmup)
        self.scaling = LossScale.of(config.precision)
        self.dtype = dtype_of(config.precision)
        # on a GPU the update is the device's business
        self.on_device = (UpdateOnDevice(self.optimiser, self.ema, self.scaling, config.clip) if device == "cuda"
                          else None)
        self.asked_to_stop: Callable[[], bool] = lambda: False      # here
        self.stopping = False                               # whether any rank was, before the last step's sum
        self.pending: list = []                             # losses that were not fetched yet
        self.n = 0                                          # steps made
        self.losses: list[float] = []
        self.seconds = 0.0                                  # spent training, over all sittings

    def batch(self) -> tuple[Any, ...]:
        """The data and the noise of step n: arrays with the batch along axis 0."""
        raise NotImplementedError(f"{type(self).__name__} has no batch")

    def loss(self, *arrays) -> Tensor:
        """The mean loss of some samples of the batch, a Tensor of shape ()."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def describe(self) -> dict:
        """What the files of the run say beside the numbers, as plain JSON values."""
        return {}

    def step(self):
        """One step; returns its loss.  FloatingPointError, with the weights as they were, if it is not finite.

        A step of float16 that overflows changes no weight, and is a step all the same: the learning rate's course and
        the random numbers follow the run's steps, the moments' corrections and the average those that were made.
        On a GPU the loss is an array of shape (), and the error of a step, with the weights as they were before it,
        comes with a later one, when the losses are fetched.
        """
        c, count = self.config, self.part.stop - self.part.start
        batch = tuple(a[self.part] for a in self.batch())

        def loss_of(part: slice):
            return self.loss(*(a[part] for a in batch))
        scale = self.on_device.scale if self.on_device else self.scaling.scale
        loss, grads = parallel_gradients(loss_of, list(self.parameters.values()), count, scale)
        loss, grads, self.stopping = self.ranks.mean(loss, grads, count / c.batch, self.asked_to_stop())
        if self.on_device:
            self.on_device.step(grads, loss, self.lr(self.n), self.n + 1)
            self.n += 1
            self.pending.append(loss)
            if len(self.pending) == FETCH_EVERY:
                self.fetch()
            return loss

        norm = clip_by_norm(grads, c.clip, scale)
        finite = math.isfinite(norm)
        if not (math.isfinite(loss) and self.scaling.bears(finite)):
            raise _not_finite(self.n + 1, loss, norm)
        self.scaling.update(finite)
        if finite:                                          # else S was too large, and is half of it now
            self.optimiser.step(grads, self.lr(self.n))
            self.ema.step()
        self.n += 1
        self.losses.append(loss)
        return loss

    def fetch(self) -> None:
        """Waits for the device and takes its losses; FloatingPointError, back before that step, if one failed."""
        if not self.pending:
            return
        losses = [float(loss) for loss in to_numpy(xp_of(*self.pending).stack(self.pending))]
        failed = self.on_device.fetch(self.n)
        made = len(self.losses)
        self.pending = []
        if failed:
            number, norm = failed
            self.n = number - 1
            self.losses += losses[:self.n - made]
            raise _not_finite(number, losses[self.n - made], norm)
        self.losses += losses

    @contextmanager
    def with_averaged_weights(self) -> Iterator[None]:
        """Within it the module has the averaged weights: what is sampled from."""
        own = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.ema.average[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """(tensors, meta): everything that the next step depends on."""
        self.fetch()
        tensors = {f"model.{name}": w for name, w in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": a for name, a in self.ema.state_dict().items()}
        tensors |= {f"optimiser.{name}": a for name, a in self.optimiser.state_dict().items()}
        tensors |= {f"scaling.{name}": a for name, a in self.scaling.state_dict().items()}
        tensors["losses"] = np.array(self.losses, dtype=np.float64)
        return tensors, self.describe() | {"train": asdict(self.config), "seconds": self.seconds}

    def fingerprint(self) -> str:
        """Of all that the next step depends on."""
        tensors, meta = self.state()
        told = hashlib.sha256(json.dumps(meta | {"seconds": 0, "n": self.n}, sort_keys=True).encode())
        for name in sorted(tensors):
            told.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
        return told.hexdigest()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes back to a saved state; UserError if it is of another model."""
        expected = {name: (a.shape, a.dtype) for name, a in self.state()[0].items()}

        def count(name: str) -> int:
            return int(saved.tensors[name]) if saved.tensors.get(name, np.empty(0)).shape == () else -1
        made, skipped = count("optimiser.n"), 0 if self.scaling.fixed else count("scaling.skipped")
        n = made + skipped
        expected["losses"] = ((n,), np.dtype(np.float64))
        checkpoint.check_shapes({name: shape for name, (shape, _) in expected.items()}, saved.tensors, saved.path)
        if any(saved.tensors[name].dtype != dtype for name, (_, dtype) in expected.items()) \
                or min(made, skipped) < 0 or int(saved.tensors["ema.n"]) != made \
                or not 1 <= saved.tensors.get("scaling.scale", 1) <= 2.0**60 \
                or saved.tensors.get("scaling.good", 0) < 0:
            raise UserError(f"{saved.path} is no training state of this version: start a new run with another --out.")

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix):]: a for name, a in saved.tensors.items() if name.startswith(prefix)}
        self.model.load_state_dict(part("model."))
        self.ema.load_state_dict(part("ema."))
        self.optimiser.load_state_dict(part("optimiser."))
        self.scaling.load_state_dict(part("scaling."))
        if self.on_device:
            self.on_device.push()
        self.losses, self.n = saved.tensors["losses"].tolist(), n
        seconds = saved.meta.get("seconds")
        self.seconds = seconds if isinstance(seconds, float) else 0.0


def _not_finite(number: int, loss: float, norm: float) -> FloatingPointError:
    return FloatingPointError(f"the loss of step {number} is {loss} and its gradient's norm {norm}")


# --- a run on disk ----------------------------------------------------------------------------------------

SAVE_EVERY, DRAW_EVERY = 120.0, 60.0                        # seconds


def open_run(folder: Path, resume: bool, keep: int = 3) -> tuple[checkpoint.CheckpointFolder, checkpoint.Checkpoint | None]:
    """The folder's keeper and the state to go on from; UserError, before any work, where that cannot be."""
    keeper = checkpoint.CheckpointFolder(folder, keep)
    saved = keeper.latest()
    if saved and not resume:
        raise UserError(f"{folder} holds a run of {saved.meta.get('step')} steps: add --resume to go on with it, "
                        "or choose another --out.")
    if resume and not saved:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or name the run's folder with --out.")
    step = saved.meta["step"] if saved and type(saved.meta.get("step")) is int else 0
    ranks().by_first(lambda: keeper.prepare(step))
    return keeper, saved


class Interrupted(Exception):
    """Ctrl-C came, and the run is saved."""


def fit(trainer: Fit, keeper: checkpoint.CheckpointFolder, draw: Callable[[Fit, Path], None], *, quiet: bool = False,
        last_good: Path | None = None, what: str = "training") -> None:
    """The loop to the last step: a progress bar, now and then a picture by `draw`, now and then a saved state.

    last_good: the state that it goes on from.  Ctrl-C ends the step, saves, and raises Interrupted; a loss that is not
    finite raises UserError.  Of several ranks the first alone shows, draws and saves, and all end after the same step.
    """
    from tqdm import tqdm

    config, folder, first = trainer.config, keeper.folder, trainer.ranks.rank == 0
    trainer.ranks.check_alike(trainer.fingerprint)
    drawn = saved_at = time.monotonic()
    ended = deque([drawn], maxlen=FETCH_EVERY + 1)          # when the last steps did

    def save() -> Path | None:
        return keeper.save(trainer.n, *trainer.state()) if first else None

    bar = tqdm(total=config.steps, initial=trainer.n, unit="step", disable=quiet or not first, dynamic_ncols=True,
               desc=what, mininterval=0.5, smoothing=0.05)
    with bar, _ctrl_c(aloud=first) as trainer.asked_to_stop:
        while trainer.n < config.steps:
            started = time.monotonic()
            try:
                trainer.step()
                now, stop = time.monotonic(), trainer.stopping
                save_now, draw_now = first and now - saved_at > SAVE_EVERY, first and now - drawn > DRAW_EVERY
                if stop or save_now or draw_now or trainer.n == config.steps:
                    trainer.fetch()
            except FloatingPointError as error:
                back = f"the last good state is {last_good}" if last_good else "no state was saved before it"
                raise UserError(f"training stopped: {error}; {back}; start anew in another --out with a lower --lr "
                                f"than {config.lr:g}.") from error
            ended.append(time.monotonic())
            trainer.seconds += ended[-1] - started
            recent = trainer.losses[-50:]
            if recent:                                      # on a GPU the first come after FETCH_EVERY steps
                speed = config.batch * (len(ended) - 1) / (ended[-1] - ended[0])
                bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {speed:.0f} images/s", refresh=False)
            bar.update()
            if stop:
                path = save()
                trainer.ranks.wait()                        # until it is saved
                raise Interrupted(f"stopped after step {trainer.n} of {config.steps}, saved as {path}")
            try:                                            # a disk that is full now need not be so at the end
                if save_now:
                    saved_at, last_good = now, save()
                if draw_now:
                    drawn = now
                    draw(trainer, folder)
            except UserError as error:
                warnings.warn(f"{error} Training goes on, and tries again later.", stacklevel=2)
        save()


@contextmanager
def _ctrl_c(aloud: bool = True) -> Iterator:
    """Within it Ctrl-C only raises a flag, which the returned function tells; a second one interrupts at once."""
    hits = []

    def on_signal(number, frame):
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt
        if aloud:
            os.write(2, b"\nminidiff: finishing this step, then saving (Ctrl-C again to stop at once)\n")
    try:
        before = signal.signal(signal.SIGINT, on_signal)
    except ValueError:                                      # not in the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)
