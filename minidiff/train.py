"""The training loop, and a run on disk that loses nothing.

    repeat  x_0, caption ~ data,  t = T u^(1/3) with u ~ uniform(0, 1),  eps ~ N(0, I)
            loss = || v - v_theta(alpha_t x_0 + sigma_t eps, t, caption) ||^2
            AdamW step on its gradient, clipped; EMA of the weights

Everything random in step n is drawn from a generator seeded with (seed, 2, n), and the first weights from one
seeded with (seed, 1).  So a run's state is its weights, the optimiser's and the average's numbers, and n: N steps,
saved and loaded, and M more give the same bits as N + M steps, on the same machine.

On a GPU nothing in a step waits for the device: the data lies there and the noise is made there (its stream (seed, n)),
the update decides by itself what to do, and the losses are fetched every FETCH_EVERY steps, and before saving.

Why the root: which digit it will be is decided at the noisy times, and the clean ones are easy.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff import checkpoint, pictures
from minidiff.data import attributes, captions, mnist
from minidiff.data.attributes import Words
from minidiff.data.pixels import to_float
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import parallel_gradients
from minidiff.errors import UserError
from minidiff.nn.optim import EMA, AdamW, UpdateOnDevice, WarmupCosine, clip_by_norm
from minidiff.nn.precision import LossScale, dtype_of, in_precision
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.tokenizer import Tokenizer

PROMPTS = ("a bold seven leaning left", "the digit seven", "a thin, upright three", "3", "a wide zero", "0",
           "a narrow, right-leaning 5", "a heavy four", "one", "a fine 8 leaning right", "nine, bold", "")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; with the data and the model's configuration it determines the result."""

    steps: int = 2200
    batch: int = 32
    lr: float = 2e-3                        # peak of the learning rate
    warmup: int = 50                        # steps to the peak
    ema: float = 0.998                      # decay of the average of the weights
    clip: float = 1.0                       # largest norm of the gradient
    drop_caption: float = 0.1               # share of captions replaced by '' (for classifier-free guidance)
    seed: int = 0
    precision: str = "float32"              # what the network computes in; the weights are float32 always

    def __post_init__(self):
        dtype_of(self.precision)                            # refuses what is not to be had, before any work
        for name, low, high in (("steps", 1, 10**9), ("batch", 1, 10**6), ("warmup", 0, 10**9), ("seed", 0, 2**63)):
            if type(getattr(self, name)) is not int or not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be a whole number of at least {low}, not {getattr(self, name)!r}")
        reals = (("lr", 1e-12, 10.0), ("ema", 0.0, 1 - 1e-9), ("clip", 1e-12, 1e12), ("drop_caption", 0.0, 1.0))
        for name, low, high in reals:
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be within {low:g} and {high:g}, not {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class CaptionedDigits:
    """Images with what captions are made from."""

    x_0: np.ndarray                         # (N, 28, 28, 1) float32 in [-1, 1]
    digits: np.ndarray                      # (N,)
    words: list[Words]                      # N
    fingerprint: str                        # SHA-256 of all images and labels, so that a run goes on with the same

    @classmethod
    def of(cls, images: mnist.Images) -> CaptionedDigits:
        """Measures the images' attributes, and leaves out the combinations that training must not see."""
        words = attributes.name(attributes.measure(images.images))
        seen = np.flatnonzero(~attributes.held_out(images.labels, words))
        fingerprint = hashlib.sha256(images.images.tobytes() + images.labels.tobytes()).hexdigest()
        return cls(to_float(images.images[seen])[..., None], images.labels[seen], [words[i] for i in seen], fingerprint)

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return captions.caption(rng, int(self.digits[i]), self.words[i])


def new_model(data: CaptionedDigits, config: TextToImageConfig, seed: int) -> TextToImage:
    """An untrained model, its tokenizer learned from captions of the data."""
    rng = np.random.default_rng([seed, 1])
    corpus = [f" {data.caption(int(i), rng)}" for i in rng.integers(0, len(data.digits), 20_000)]
    return TextToImage(config, Tokenizer.train(corpus, config.text.vocab), rng)


FETCH_EVERY = 20                                            # steps on a GPU, after which their losses are fetched
TRAINING = 2**32                                            # the first place of training's streams; a sampler's is 0


class Trainer:
    """A model in training: `step()` makes one step, `state()` and `restore()` save and load all there is.

    `losses` are the losses so far; on a GPU, those that were fetched.
    """

    def __init__(self, model: TextToImage, data: CaptionedDigits, config: TrainConfig):
        self.model, self.data, self.config = model, data, config
        self.parameters = model.parameters()
        self.optimiser = AdamW(self.parameters)
        self.ema = EMA(self.parameters, config.ema)
        self.lr = WarmupCosine(config.lr, config.steps, config.warmup)
        self.scaling = LossScale.of(config.precision)
        self.dtype = dtype_of(config.precision)
        self.x_0 = to_device(data.x_0, model.device)
        self.on_device = None                               # the update, where it is the device's business
        if model.device == "cuda":
            from minidiff.engine.random_cuda import DeviceStreams
            self.noise = DeviceStreams(config.seed, config.batch, first=TRAINING)
            self.on_device = UpdateOnDevice(self.optimiser, self.ema, self.scaling, config.clip)
        self.pending: list = []                             # losses that were not fetched yet
        self.n = 0                                          # steps made
        self.losses: list[float] = []
        self.seconds = 0.0                                  # spent training, over all sittings

    def step(self):
        """One step; returns its loss.  FloatingPointError, with the weights as they were, if it is not finite.

        A step of float16 that overflows changes no weight, and is a step all the same: the learning rate's course and
        the random numbers follow the run's steps, the moments' corrections and the average those that were made.
        On a GPU the loss is an array of shape (), and the error of a step, with the weights as they were before it,
        comes with a later one, when the losses are fetched.
        """
        c = self.config
        x_0, ids, mask, t, eps = self.batch()

        def loss_of(part: slice):
            model = in_precision(self.model, self.dtype)
            return model.loss(x_0[part], ids[part], mask[part], t[part], eps[part])
        scale = self.on_device.scale if self.on_device else self.scaling.scale
        loss, grads = parallel_gradients(loss_of, list(self.parameters.values()), c.batch, scale)
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

    def batch(self) -> tuple:
        """The data and the noise of step n."""
        c, data = self.config, self.data
        rng = np.random.default_rng([c.seed, 2, self.n])
        chosen = rng.integers(0, len(data.digits), c.batch)
        drop = rng.random(c.batch) < c.drop_caption
        texts = ["" if dropped else data.caption(i, rng) for i, dropped in zip(chosen, drop, strict=True)]
        ids, mask = self.model.tokens(texts)
        longest = int(mask.sum(axis=1).max())               # columns of nothing but padding are left out
        # u_i = u_0 + i/B mod 1: each uniform on [0, 1), together spread evenly (Kingma et al. 2021, I.1)
        T, u = self.model.schedule.T, (rng.random() + np.arange(c.batch) / c.batch) % 1
        # t = T u^(1/3): a density of 3 t^2 / T^3, which grows with t
        t = (T * np.cbrt(u)).astype(np.int64)
        if self.on_device:
            eps = self.noise.at(self.n).normal(data.x_0.shape[1:])
        else:
            eps = rng.standard_normal((c.batch, *data.x_0.shape[1:]), dtype=np.float32)
        return self.x_0[chosen], ids[:, :longest], mask[:, :longest], np.minimum(t, T - 1), eps

    def averaged(self) -> TextToImage:
        """A copy of the model with the averaged weights: what is sampled from."""
        c = self.model
        copy = TextToImage(c.config, c.tokenizer, np.random.default_rng(0))
        copy.load_state_dict({name: to_numpy(a) for name, a in self.ema.average.items()})
        return copy.to(c.device)

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """(tensors, meta): everything that the next step depends on."""
        self.fetch()
        tensors = {f"model.{name}": w for name, w in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": a for name, a in self.ema.state_dict().items()}
        tensors |= {f"optimiser.{name}": a for name, a in self.optimiser.state_dict().items()}
        tensors |= {f"scaling.{name}": a for name, a in self.scaling.state_dict().items()}
        tensors["losses"] = np.array(self.losses, dtype=np.float64)
        return tensors, self.model.describe() | {"train": asdict(self.config), "data": self.data.fingerprint,
                                                 "seconds": self.seconds}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes back to a saved state; UserError if it is of another model or of other data."""
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
        if saved.meta.get("data") != self.data.fingerprint:
            raise UserError(f"{saved.path} was trained on other images: resume with the same --data.")

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


def run(folder: str | Path, data: mnist.Images, config: TrainConfig, *, resume: bool = False, quiet: bool = False,
        model_config: TextToImageConfig | None = None, keep: int = 3, device: str = "cpu") -> Trainer:
    """Trains in `folder` to the last step of `config`, and returns the trainer.

    While it runs the folder holds step-*.safetensors (the last `keep` states), samples.png and loss.png, and at the
    end model.safetensors, the averaged weights.  Ctrl-C ends the step, saves, and raises Interrupted; with
    resume=True it goes on from the newest whole state.  A loss that is not finite raises UserError.
    """
    folder = Path(folder)
    keeper, saved = open_run(folder, resume, keep)
    digits = CaptionedDigits.of(data)
    if saved:
        model = TextToImage.from_checkpoint(saved).to(device)
        trainer = Trainer(model, digits, _config_of(saved, config))
        trainer.restore(saved)
    else:
        model = new_model(digits, model_config or TextToImageConfig(), config.seed).to(device)
        trainer = Trainer(model, digits, config)
    _train(trainer, keeper, quiet, saved.path if saved else None)
    trainer.averaged().save(folder / "model.safetensors", notes={"train": asdict(trainer.config), "data": data.source})
    draw(trainer, folder)
    return trainer


def open_run(folder: Path, resume: bool, keep: int = 3) -> tuple[checkpoint.Keeper, checkpoint.Checkpoint | None]:
    """The folder's keeper and the state to go on from; UserError, before any work, where that cannot be."""
    keeper = checkpoint.Keeper(folder, keep)
    saved = keeper.latest()
    if saved and not resume:
        raise UserError(f"{folder} holds a run of {saved.meta.get('step')} steps: add --resume to go on with it, "
                        "or choose another --out.")
    if resume and not saved:
        raise UserError(f"{folder} holds no run to resume: leave out --resume, or name the run's folder with --out.")
    keeper.prepare(saved.meta["step"] if saved and type(saved.meta.get("step")) is int else 0)
    return keeper, saved


class Interrupted(Exception):
    """Ctrl-C came, and the run is saved."""


def _train(trainer: Trainer, keeper: checkpoint.Keeper, quiet: bool, last_good: Path | None) -> None:
    """The loop: steps, a progress bar, a picture now and then, a saved state now and then."""
    from tqdm import tqdm

    config, folder = trainer.config, keeper.folder
    drawn = saved_at = time.monotonic()
    ended = deque([drawn], maxlen=FETCH_EVERY + 1)          # when the last steps did

    def save() -> Path:
        return keeper.save(trainer.n, *trainer.state())

    bar = tqdm(total=config.steps, initial=trainer.n, unit="step", disable=quiet, dynamic_ncols=True,
               desc="training", mininterval=0.5, smoothing=0.05)
    with bar, _ctrl_c() as interrupted:
        while trainer.n < config.steps:
            started = time.monotonic()
            try:
                trainer.step()
                now, stop = time.monotonic(), interrupted()
                save_now, draw_now = now - saved_at > SAVE_EVERY, now - drawn > DRAW_EVERY
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


def draw(trainer: Trainer, folder: Path) -> None:
    """Rewrites samples.png, the same prompts and noise each time, and loss.png."""
    images = trainer.averaged().sample(PROMPTS, scale=2.0, steps=15, seed=0)
    title = f"step {trainer.n} of {trainer.config.steps}"
    pictures.save(pictures.sheet(images, [p or "(no caption)" for p in PROMPTS], columns=6, title=title),
                  folder / "samples.png")
    pictures.save(pictures.loss_curve(range(1, trainer.n + 1), trainer.losses, "training loss"), folder / "loss.png")


@contextmanager
def _ctrl_c() -> Iterator:
    """Within it Ctrl-C only raises a flag, which the returned function tells; a second one interrupts at once."""
    hits = []

    def on_signal(number, frame):
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt
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


def _config_of(saved: checkpoint.Checkpoint, asked: TrainConfig) -> TrainConfig:
    """The saved run's own configuration; UserError where a setting was asked for that is not the run's."""
    try:
        config = TrainConfig(**saved.meta["train"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{saved.path} does not say how it was trained ({error}).") from error
    for name, default in asdict(TrainConfig()).items():
        if getattr(asked, name) not in (default, getattr(config, name)):
            raise UserError(f"{saved.path} is of a run with {name}={getattr(config, name)}, which resuming cannot "
                            f"change: ask for no other {name}, or start a new run with another --out.")
    return config
