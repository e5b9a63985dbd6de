"""Training of the main job, text-to-image diffusion in pixel space.

    repeat  x_0, caption ~ data,  t = T u^(1/3) with u ~ uniform(0, 1),  eps ~ N(0, I)
            loss = || v - v_theta(alpha_t x_0 + sigma_t eps, t, caption) ||^2
            AdamW step on its gradient, clipped; EMA of the weights                         (fit.py)

The first weights are drawn from a generator seeded with (seed, 1).  On a GPU the data lies there and the noise is made
there (its stream (seed, n)).

Why the root: which digit it will be is decided at the noisy times, and the clean ones are easy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff import checkpoint, pictures
from minidiff.data import mnist
from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion.losses import stratified_uniform
from minidiff.engine.backend import to_device, to_numpy
from minidiff.errors import UserError
from minidiff.nn.precision import in_precision
from minidiff.systems.system import caption_tokenizer
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.training.ranks import ranks
from minidiff.training.trainer import Fit, FitConfig, fit, open_run

PROMPTS = ("a bold seven leaning left", "the digit seven", "a thin, upright three", "3", "a wide zero", "0",
           "a narrow, right-leaning 5", "a heavy four", "one", "a fine 8 leaning right", "nine, bold", "")


@dataclass(frozen=True)
class TrainConfig(FitConfig):
    """How to train; with the data and the model's configuration it determines the result."""

    drop_caption: float = 0.1               # share of captions replaced by '' (for classifier-free guidance)

    def __post_init__(self):
        super().__post_init__()
        self._check_real("drop_caption", 0.0, 1.0)


def new_model(data: CaptionedDigits, config: TextToImageConfig, seed: int) -> TextToImage:
    """An untrained model, its tokenizer learned from captions of the data."""
    rng = np.random.default_rng([seed, 1])
    return TextToImage(config, caption_tokenizer(data, config.text.vocab, rng), rng)


TRAINING = 2**32                                            # the first place of training's streams; a sampler's is 0


class Trainer(Fit):
    """A text-to-image model in training."""

    def __init__(self, model: TextToImage, data: CaptionedDigits, config: TrainConfig):
        super().__init__(model, config, model.device)
        self.data = data
        self.x_0 = to_device(data.x_0, model.device)
        if self.on_device:
            from minidiff.engine.cuda.random import DeviceSampleStreams
            self.noise = DeviceSampleStreams(config.seed, config.batch, first=TRAINING)

    def loss(self, *arrays):
        return in_precision(self.model, self.dtype).loss(*arrays)

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
        T, u = self.model.schedule.T, stratified_uniform(rng, c.batch)
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

    def describe(self) -> dict:
        return self.model.describe() | {"data": self.data.fingerprint}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes back to a saved state; UserError if it is of another model or of other data."""
        if saved.meta.get("data") != self.data.fingerprint:
            raise UserError(f"{saved.path} was trained on other images: resume with the same --data.")
        super().restore(saved)


# --- a run on disk ----------------------------------------------------------------------------------------

def run(folder: str | Path, data: mnist.Images, config: TrainConfig, *, resume: bool = False, quiet: bool = False,
        model_config: TextToImageConfig | None = None, keep: int = 3, device: str = "cpu") -> Trainer:
    """Trains in `folder` to the last step of `config`, and returns the trainer.

    While it runs the folder holds step-*.safetensors (the last `keep` states), samples.png and loss.png, and at the
    end model.safetensors, the averaged weights.  Ctrl-C ends the step, saves, and raises Interrupted; with
    resume=True it goes on from the newest whole state.  A loss that is not finite raises UserError.
    """
    folder, first = Path(folder), ranks(device).rank == 0   # a rank's GPU is chosen before there is an array on it
    keeper, saved = open_run(folder, resume, keep)
    digits = CaptionedDigits.of(data)
    if saved:
        model = TextToImage.from_checkpoint(saved).to(device)
        trainer = Trainer(model, digits, _config_of(saved, config))
        trainer.restore(saved)
    else:
        model = new_model(digits, model_config or TextToImageConfig(), config.seed).to(device)
        trainer = Trainer(model, digits, config)
    fit(trainer, keeper, draw, quiet=quiet, last_good=saved.path if saved else None)
    if first:
        notes = {"train": asdict(trainer.config), "data": data.source}
        trainer.averaged().save(folder / "model.safetensors", notes=notes)
        draw(trainer, folder)
    return trainer


def draw(trainer: Trainer, folder: Path) -> None:
    """Rewrites samples.png, the same prompts and noise each time, and loss.png."""
    images = trainer.averaged().sample(PROMPTS, scale=2.0, steps=15, seed=0)
    title = f"step {trainer.n} of {trainer.config.steps}"
    pictures.save(pictures.sheet(images, [p or "(no caption)" for p in PROMPTS], columns=6, title=title),
                  folder / "samples.png")
    pictures.save(pictures.loss_curve(range(1, trainer.n + 1), trainer.losses, "training loss"), folder / "loss.png")


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
