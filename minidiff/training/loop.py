"""A stage's training as a run on disk: progress, previews, saved states, and a clean end when it is asked to stop.

    while steps remain:  trainer.step();  now and then save a state and draw a preview
    Ctrl-C, SIGTERM...:  finish the step, save, raise Interrupted

Of several ranks the first alone shows, draws and saves; the others wait for it in the next step's sum.
"""

from __future__ import annotations

import errno
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minidiff import pictures
from minidiff.checkpoint import CheckpointFolder
from minidiff.errors import UserError, brief
from minidiff.signals import Stopped, on_stop
from minidiff.terminal import progress
from minidiff.training.trainer import FETCH_EVERY, Trainer

SAVE_EVERY, DRAW_EVERY = 120.0, 60.0                        # seconds


class Interrupted(Exception):
    """Ctrl-C or another signal asked the run to stop, and it is saved."""


class NotSaved(UserError):
    """The last state could not be saved; the one before it, if any, is complete, and the run resumes from it."""


def train_stage(trainer: Trainer, folder: CheckpointFolder, *, quiet: bool = False, last_good: Path | None = None,
                title: str = "training") -> None:
    """Trains to the last step: a progress bar, now and then a preview, now and then a saved state.

    last_good: the state that it resumes from.  Each signal of signals.STOPS, such as Ctrl-C, ends the step, saves, and
    raises Interrupted; a loss that is not finite raises UserError, which names the last good state.
    """
    config, first = trainer.config, trainer.ranks.rank == 0
    trainer.ranks.check_alike(trainer.fingerprint)
    drawn_at = saved_at = time.monotonic()
    ended = deque([drawn_at], maxlen=FETCH_EVERY + 1)       # when the last steps did

    bar = progress(title=title, total=config.steps, initial=trainer.n, unit="step", disable=quiet or not first,
                   mininterval=0.5, smoothing=0.05)
    with bar, _asked_to_stop(message=first) as trainer.asked_to_stop:
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
                break
            try:                                            # a disk that is full now may have room at the end
                if save_now:
                    saved_at = now
                    last_good = folder.save(trainer.n, *trainer.state())
                if draw_now:
                    drawn_at = now
                    draw_preview(trainer, folder.folder)
            except UserError as error:
                warnings.warn(f"{error} Training continues, and tries again later.", stacklevel=2)
        path = _save_last(trainer, folder) if first else None
        # a signal may have come during the last step, or while it was saved; the others wait here until it is
        stop = trainer.ranks.agree(trainer.stopping or trainer.asked_to_stop())
    if stop:
        raise Interrupted(f"stopped after step {trainer.n} of {config.steps}, saved as {path}")


def _save_last(trainer: Trainer, folder: CheckpointFolder) -> Path:
    """Saves the state after which nothing is trained any more.  On a full disk the states before it make room, but the
    newest, which stays until this one is safe; NotSaved where that does not do."""
    try:
        return folder.save(trainer.n, *trainer.state())
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise _not_saved(trainer, folder, error) from error
    folder.keep_newest()
    try:
        return folder.save(trainer.n, *trainer.state())
    except UserError as error:
        raise _not_saved(trainer, folder, error) from error


def _not_saved(trainer: Trainer, folder: CheckpointFolder, error: UserError) -> NotSaved:
    kept = folder.latest()
    back = f"resuming continues from {kept.path}" if kept else "no state was saved before it"
    return NotSaved(f"step {trainer.n} of {trainer.config.steps} could not be saved: {str(error).rstrip('.')}; {back}")


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
        warnings.warn(f"No preview was drawn ({brief(error)}). Training continues.", stacklevel=2)


@contextmanager
def _asked_to_stop(message: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it a signal only sets a flag, which the returned function reads; a further Ctrl-C interrupts at once."""
    hits = []

    def on_signal(number, frame):
        hits.append(number)
        if len(hits) > 1 and number == signal.SIGINT:
            raise Stopped(number)
        if message and len(hits) == 1:
            with suppress(OSError):                         # not print: the signal may have come amid another print
                os.write(2, b"\nminidiff: finishing this step, then saving (Ctrl-C again to stop at once)\n")
    with on_stop(on_signal):
        yield lambda: bool(hits)
