"""A stage's training as a run on disk: progress, previews, saved states, and a clean end on Ctrl-C.

    while steps remain:  trainer.step();  now and then save a state and draw a preview
    Ctrl-C:              finish the step, save, raise Interrupted

Of several ranks the first alone shows, draws and saves; the others wait for it in the next step's sum.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minidiff import pictures
from minidiff.checkpoint import CheckpointFolder
from minidiff.errors import UserError
from minidiff.training.trainer import FETCH_EVERY, Trainer

SAVE_EVERY, DRAW_EVERY = 120.0, 60.0                        # seconds


class Interrupted(Exception):
    """Ctrl-C came, and the run is saved."""


def train_stage(trainer: Trainer, folder: CheckpointFolder, *, quiet: bool = False, last_good: Path | None = None,
                title: str = "training") -> None:
    """Trains to the last step: a progress bar, now and then a preview, now and then a saved state.

    last_good: the state that it resumes from.  Ctrl-C ends the step, saves, and raises Interrupted; a loss that is not
    finite raises UserError, which names the last good state.
    """
    from tqdm import tqdm

    config, first = trainer.config, trainer.ranks.rank == 0
    trainer.ranks.check_alike(trainer.fingerprint)
    drawn_at = saved_at = time.monotonic()
    ended = deque([drawn_at], maxlen=FETCH_EVERY + 1)       # when the last steps did

    def save() -> Path | None:
        return folder.save(trainer.n, *trainer.state()) if first else None

    bar = tqdm(total=config.steps, initial=trainer.n, unit="step", disable=quiet or not first, dynamic_ncols=True,
               desc=title, mininterval=0.5, smoothing=0.05)
    with bar, _ctrl_c(message=first) as trainer.asked_to_stop:
        while trainer.n < config.steps:
            started = time.monotonic()
            try:
                trainer.step()
                now, stop = time.monotonic(), trainer.stopping
                save_now, draw_now = first and now - saved_at > SAVE_EVERY, first and now - drawn_at > DRAW_EVERY
                if stop or save_now or draw_now or trainer.n == config.steps:
                    trainer.fetch()
            except FloatingPointError as error:
                back = f"the last good state is {last_good}" if last_good else "no state was saved before it"
                raise UserError(f"training stopped: {error}; {back}; start a new run in another --out with a lower "
                                f"--lr than {config.lr:g}.") from error
            ended.append(time.monotonic())
            trainer.seconds += ended[-1] - started
            recent = trainer.losses[-50:]
            if recent:                                      # on a GPU the first come after FETCH_EVERY steps
                speed = config.batch * (len(ended) - 1) / (ended[-1] - ended[0])
                bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {speed:.0f} samples/s", refresh=False)
            bar.update()
            if stop:
                path = save()
                trainer.ranks.wait()                        # until it is saved
                raise Interrupted(f"stopped after step {trainer.n} of {config.steps}, saved as {path}")
            try:                                            # a disk that is full now may have room at the end
                if save_now:
                    saved_at, last_good = now, save()
                if draw_now:
                    drawn_at = now
                    draw_preview(trainer, folder.folder)
            except UserError as error:
                warnings.warn(f"{error} Training continues, and tries again later.", stacklevel=2)
        save()


def draw_preview(trainer: Trainer, folder: Path) -> None:
    """Rewrites loss.png and, where the stage has a picture, samples.png with the averaged weights.

    What cannot be drawn is a warning: a picture is not worth a run.
    """
    try:
        pictures.save(pictures.loss_curve(range(1, trainer.n + 1), trainer.losses,
                                          f"{trainer.stage.name}: training loss"), folder / "loss.png")
        if trainer.stage.picture:
            with trainer.with_averaged_weights():
                pictures.save(trainer.stage.picture(), folder / "samples.png")
    except Exception as error:                              # whatever a stage's picture raises
        warnings.warn(f"No preview was drawn ({error}). Training continues.", stacklevel=2)


@contextmanager
def _ctrl_c(message: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only sets a flag, which the returned function reads; a second one interrupts at once."""
    hits = []

    def on_signal(number, frame):
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt
        if message:
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
