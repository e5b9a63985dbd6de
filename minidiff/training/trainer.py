"""The trainer: parameters follow the gradient of a loss.

    repeat  arrays = the stage's batch of step n
            g = gradient of the mean loss, clipped
            AdamW step with g;  moving average (EMA) of the weights

One class trains every stage of every system.  Everything random in step n comes from a generator of (seed, stage, n).
So a run's state is its weights, the numbers of the optimiser and of the average, and n: N steps, saved and loaded, and
M more give the same bits as N + M steps, on the same machine.

On a GPU no step waits for the device: the update is decided there, and the losses are fetched every FETCH_EVERY steps
and before saving.

Started by mpiexec, each rank takes its share of the batch, and the gradients are summed (ranks.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from minidiff import checkpoint
from minidiff.checks import with_plain_numbers
from minidiff.engine.backend import SMALL, is_floating, moved_together, to_numpy, xp_of
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError, user_code
from minidiff.nn.optim import EMA, AdamW, UpdateOnDevice, WarmupCosine, clip_by_norm
from minidiff.nn.precision import LossScale, dtype_of, in_precision
from minidiff.systems.stage import Stage, Step
from minidiff.training.ranks import ranks

FETCH_EVERY = 20                                            # steps on a GPU after which their losses are fetched


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained; with the data and the system's configuration it determines the result."""

    steps: int = 2200
    batch: int = 32                         # samples in a step
    lr: float = 2e-3                        # peak of the learning rate
    warmup: int = 50                        # steps to the peak
    ema: float = 0.998                      # decay of the average of the weights
    clip: float = 1.0                       # largest norm of the gradient
    seed: int = 0
    precision: str = "float32"              # what the network computes in; the weights are float32 always

    def __post_init__(self):
        with_plain_numbers(self)
        dtype_of(self.precision)                            # UserError where this precision is unavailable
        for name, low, high in (("steps", 1, 10**9), ("batch", 1, 10**6), ("warmup", 0, 10**9), ("seed", 0, 2**63)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UserError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        for name, low, high in (("lr", 1e-12, 10.0), ("ema", 0.0, 1 - 1e-9), ("clip", 1e-12, 1e12)):
            if isinstance(getattr(self, name), bool) or not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be within {low:g} and {high:g}, not {getattr(self, name)!r}")


class Trainer:
    """A stage in training: `step()` makes one step, `state()` and `restore()` save and load all that it depends on.

    `losses` are the losses so far; on a GPU, those that were fetched.
    """

    def __init__(self, stage: Stage, config: TrainConfig, *, number: int = 1, device: str = "cpu",
                 description: Mapping | None = None):
        """number: which stage of its system, 1 for the first.  device: where the stage's module is.

        description: what the run's files say beside the numbers, as plain JSON values; a state of another description
        is refused by `restore`.
        """
        self.stage, self.config, self.number, self.device = stage, config, number, device
        self.description = dict(description or {})
        self.ranks = ranks(device)
        self.shard = self.ranks.shard(config.batch)         # of each batch, that this rank learns from
        self.parameters = stage.module.parameters()
        self.optimiser = AdamW(self.parameters)
        self.ema = EMA(self.parameters, config.ema)
        self.lr = WarmupCosine(config.lr, config.steps, config.warmup)
        self.scaling = LossScale.of(config.precision)
        self.dtype = dtype_of(config.precision)
        self.on_device = (UpdateOnDevice(self.optimiser, self.ema, self.scaling, config.clip) if device == "cuda"
                          else None)
        self.asked_to_stop: Callable[[], bool] = lambda: False      # on this rank
        self.stopping = False                               # whether any rank was, before the last step's sum
        self.pending: list = []                             # losses that were not fetched yet
        self.n = 0                                          # steps made
        self.losses: list[float] = []
        self.seconds = 0.0                                  # spent training, over all sittings

    def batch(self) -> tuple:
        """The arrays of step n, with this rank's samples along axis 0; floating ones lie on the device.  Each rank
        reads and moves its own samples only."""
        c = self.config
        with user_code(f"the batch of step {self.n + 1} cannot be made"):           # of a data set of the user's own
            arrays = self.stage.batch(Step(c.seed, self.number, self.n, c.steps, c.batch, self.device, self.shard))
        mine = [a[self.shard] for a in arrays]
        there = moved_together([*mine, *self._ahead(mine)], self.device)
        return tuple(b if is_floating(b.dtype) else a for a, b in zip(mine, there, strict=False))

    def _ahead(self, arrays: list) -> list:
        """What the loss will move to a GPU, beside the arrays: moved with them, it takes no copy of its own.

        Only small arrays are found there again.
        """
        if self.device == "cpu" or self.stage.ahead is None:
            return []
        computed = self.stage.ahead(self.stage.module, self.dtype, *arrays)
        return [a for a in computed if a.nbytes <= SMALL]

    def loss(self, *arrays) -> Tensor:
        """The mean loss of some samples of the batch, a Tensor of shape ()."""
        return self.stage.loss(in_precision(self.stage.module, self.dtype), *arrays)

    def step(self):
        """One step; returns its loss.  FloatingPointError, with the weights as they were, if it is not finite.

        A float16 step that overflows changes no weight but counts as a step: the learning rate and the random numbers
        follow the run's steps, and the corrections of the moments and the average follow the steps that changed
        weights.  On a GPU the loss is an array of shape (), and the error of a step, with the weights as they were
        before it, comes with a later one, when the losses are fetched.
        """
        c, count = self.config, self.shard.stop - self.shard.start
        batch = self.batch()

        def loss_of(shard: slice):
            return self.loss(*(a[shard] for a in batch))
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
        if not (math.isfinite(loss) and self.scaling.can_continue(finite)):
            raise _not_finite(self.n + 1, loss, norm)
        self.scaling.update(finite)
        if finite:                                          # else the loss scale was too large, and is half of it now
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
        """Within it the module has the averaged weights, which pictures are drawn with."""
        own = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.ema.average[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def use_averaged_weights(self) -> None:
        """Puts the averaged weights in place, for good: the stage is done."""
        self.stage.module.load_state_dict({name: to_numpy(a) for name, a in self.ema.average.items()})

    # --- its state ----------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """(tensors, meta): everything that the next step depends on."""
        self.fetch()
        tensors = {f"model.{name}": w for name, w in self.stage.module.state_dict().items()}
        tensors |= {f"ema.{name}": a for name, a in self.ema.state_dict().items()}
        tensors |= {f"optimiser.{name}": a for name, a in self.optimiser.state_dict().items()}
        tensors |= {f"scaling.{name}": a for name, a in self.scaling.state_dict().items()}
        tensors["losses"] = np.array(self.losses, dtype=np.float64)
        return tensors, self.description | {"train": asdict(self.config), "seconds": self.seconds}

    def fingerprint(self) -> str:
        """A hash of everything that the next step depends on."""
        tensors, meta = self.state()
        digest = hashlib.sha256(json.dumps(meta | {"seconds": 0, "n": self.n}, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
        return digest.hexdigest()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes back to a saved state; UserError if it is of another system, stage, data set or configuration."""
        self._check_form(saved.meta, saved.tensors, saved.path)
        made, skipped = self._check_values(saved)

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix):]: a for name, a in saved.tensors.items() if name.startswith(prefix)}
        self.stage.module.load_state_dict(part("model."))
        self.ema.load_state_dict(part("ema."))
        self.optimiser.load_state_dict(part("optimiser."))
        self.scaling.load_state_dict(part("scaling."))
        if self.on_device:
            self.on_device.push()
        self.losses, self.n = saved.tensors["losses"].tolist(), made + skipped
        self.seconds = float(saved.meta["seconds"])

    def check_header(self, header: checkpoint.Header) -> None:
        """UserError where `restore` would refuse the file for what its header says."""
        self._check_form(header.meta, header.arrays, header.path)

    def _check_form(self, meta: Mapping, arrays: Mapping, path) -> None:
        """UserError unless a file's description is this trainer's, and its arrays have the shapes of a state."""
        for what, mine in (self.description | {"train": asdict(self.config)}).items():
            if meta.get(what) != json.loads(json.dumps(mine)):                      # as a file has it: tuples are lists
                raise UserError(f"{path} is of a run with another {OPTIONS.get(what, what)}: resume with the "
                                "options that it was started with, or choose another --out.")
        expected = self.state()[0]
        losses = arrays["losses"].shape if "losses" in arrays else ()
        made = min(losses[0], self.config.steps) if losses else 0                   # the arrays say later how many
        shapes = {name: a.shape for name, a in expected.items()} | {"losses": (made,)}
        checkpoint.check_shapes(shapes, arrays, path)
        if any(arrays[name].dtype != a.dtype for name, a in expected.items()):
            raise _no_state(path)

    def _check_values(self, saved: checkpoint.Checkpoint) -> tuple[int, int]:
        """(steps that changed weights, steps left out); UserError unless every number of a state is in its range."""
        meta, arrays = saved.meta, saved.tensors
        seconds = meta.get("seconds")
        in_range = type(seconds) in (int, float) and 0 <= seconds <= MOST_SECONDS and all(
            low <= arrays[name].min() and arrays[name].max() <= high
            for which, (low, high) in RANGES.items() for name in arrays
            if (name.startswith(which) if which.endswith(".") else name == which) and arrays[name].size)
        if not in_range:
            raise _no_state(saved.path)
        made, skipped = int(arrays["optimiser.n"]), int(arrays.get("scaling.skipped", 0))
        if int(arrays["ema.n"]) != made or arrays["losses"].shape != (made + skipped,) \
                or meta.get("step", made + skipped) != made + skipped:
            raise _no_state(saved.path)
        return made, skipped


OPTIONS = {"data": "--data", "train": "--seed, --steps, --effort, --batch, --lr or --precision",
           "config": "configuration"}                       # how a user names what a state's description says


MOST_SECONDS = 1e10
COUNT = (0, 10**9)
RANGES = {"optimiser.n": COUNT, "optimiser.v.": (0, math.inf), "ema.n": COUNT, "scaling.scale": (1, LossScale.MOST),
          "scaling.good": COUNT, "scaling.skipped": COUNT}  # of a state's numbers, by their names, or how these begin


def _no_state(path) -> UserError:
    return UserError(f"{path} is no training state of this version: start a new run with another --out.")


def _not_finite(number: int, loss: float, norm: float) -> FloatingPointError:
    return FloatingPointError(f"the loss of step {number} is {loss} and its gradient's norm {norm}")
