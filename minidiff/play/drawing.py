"""Pictures step by step, the files of a finished run, and the command that makes the same ones.

The states are those of `System.trajectory`, with the same options and random streams as `minidiff sample` uses, so the
command that is shown makes the same pixels.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minidiff import pictures
from minidiff.cli.sampling_options import SHORT, captions_of
from minidiff.engine.backend import to_numpy
from minidiff.engine.random import sample_streams
from minidiff.errors import UserError
from minidiff.input_files import read_file
from minidiff.play.offer import Offer, Run
from minidiff.terminal import shell

if TYPE_CHECKING:
    from PIL import Image

MOST_SHOWN = 60                                             # states of a run that the page gets as pictures
LARGEST_GIF = 256 << 20                                     # bytes
MOST_KEPT = 256 << 20                                       # bytes of finished runs


@dataclass
class Drawn:
    """A finished run, or one on its way: its states, for the files and for attention maps."""

    run: Run
    t: list[int] = field(default_factory=list)              # the time of each state; -1 at the end
    x_t: list[np.ndarray] = field(default_factory=list)     # (B, H, W, C) each, or previews of x0_hat

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.x_t)


class Results:
    """The last finished jobs, by a key that cannot be guessed; the oldest go when they take too much memory."""

    def __init__(self):
        self._kept: OrderedDict[str, list[Drawn]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, drawn: list[Drawn]) -> str:
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[key] = drawn
            while len(self._kept) > 1 and sum(d.nbytes for runs in self._kept.values() for d in runs) > MOST_KEPT:
                self._kept.popitem(last=False)
        return key

    def get(self, key: str, run: int) -> Drawn:
        """UserError where it is not kept any more."""
        with self._lock:
            runs = self._kept.get(key, [])
        if not 0 <= run < len(runs):
            raise UserError("these pictures are no longer kept: draw them again")
        return runs[run]


# ---- drawing ------------------------------------------------------------------------------------------------

@contextmanager
def refused(name: str) -> Iterator[None]:
    """Around a system's work: what it refuses is a UserError that begins with its name; other exceptions are bugs."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def draw(offer: Offer, results: Results, runs: Sequence[Run]) -> Iterator[dict]:
    """The events of one or more runs, which advance in turn, a step each: so two settings are seen side by side."""
    drawn = [Drawn(run) for run in runs]
    ways = [_states(offer, one, number) for number, one in enumerate(drawn)]
    while ways:
        for way in list(ways):
            if (event := next(way, None)) is None:
                ways.remove(way)
            else:
                yield event
    yield {"event": "done", "result": results.put(drawn), "commands": [command(run) for run in runs]}


def _states(offer: Offer, drawn: Drawn, number: int) -> Iterator[dict]:
    """The events of one run.  A state has its pictures if it is one of those that are shown."""
    run, kind = drawn.run, drawn.run.offered.kind
    with refused(kind.name):
        kind.check_options(run.offered.path, run.options)
        if offer.device == "cpu":
            kind.check_memory(run.offered.path, run.options)
        model = offer.load(run.offered)
        captions, streams = [run.prompt] * run.count, sample_streams(offer.device, run.seed, run.count)
        if not hasattr(kind, "trajectory"):
            x_0 = model.sample(captions, streams=streams, **run.options)
            drawn.t, drawn.x_t = [-1], [x_0]
            yield _event(number, 1, 1, -1, 0, images=x_0)
            return
        steps, shown = model.steps_made(run.options), None
        for state in model.trajectory(captions, streams=streams, **run.options):
            # where decoding is dear, only the end is decoded; on the way there are cheap pictures of x0_hat
            at_end = state.step == steps
            cheap = kind.previews and not at_end
            shown = shown or evenly(steps + 1 - state.step)  # some trajectories leave out x_T, which is step 0
            if cheap:
                x_t, x0_hat = None, to_numpy(state.preview()) if len(drawn.t) in shown else None
                kept = x0_hat
            else:
                x_t = kept = to_numpy(state.x_t)
                # a decoded state has no x0_hat in pixels
                x0_hat = None if getattr(state, "x0_hat", None) is None else to_numpy(state.x0_hat)
            index = len(drawn.t)
            if kept is not None:
                drawn.t.append(state.t)
                drawn.x_t.append(kept)
            if index in shown or at_end:
                yield _event(number, state.step, steps, state.t, index, images=x_t, x0_hat=x0_hat)
            else:
                yield _event(number, state.step, steps, state.t, index)


def _event(run: int, step: int, steps: int, t: int, index: int, images=None, x0_hat=None) -> dict:
    """One state.  index: among the states that are kept."""
    return {"event": "state", "run": run, "step": step, "steps": steps, "t": t, "index": index,
            "x_t": images if images is None else [png(x) for x in images],
            "x0_hat": x0_hat if x0_hat is None else [png(x) for x in x0_hat]}


def evenly(count: int) -> set[int]:
    """At most MOST_SHOWN of 0..count-1, evenly spaced, with the first and the last."""
    return set(np.linspace(0, count - 1, min(count, MOST_SHOWN)).round().astype(int).tolist())


def png(image: np.ndarray) -> str:
    """One image (H, W, 1 or 3) in [-1, 1], or (H, W, 4) uint8, as PNG in base64."""
    from PIL import Image
    picture = Image.fromarray(image) if image.shape[-1] == 4 else pictures.plain(image)
    return base64.b64encode(_as_file(picture)).decode("ascii")


def _as_file(picture: Image.Image) -> bytes:
    """A PNG file of the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# ---- files of a finished run ----------------------------------------------------------------------------------

def as_png(drawn: Drawn) -> bytes:
    """The picture that `minidiff sample` writes."""
    images = drawn.x_t[-1]
    if drawn.run.offered.kind.at_a_time == 1:
        picture = pictures.plain(images[0])
    else:
        picture = pictures.sheet(images, title=captions_of([drawn.run.prompt])[0])
    return _as_file(picture)


def as_gif(drawn: Drawn) -> bytes:
    """The animation that `minidiff sample --trajectory` writes; UserError where there are no steps to show."""
    kind = drawn.run.offered.kind
    states = drawn.x_t[:-1] if kind.previews else drawn.x_t                         # previews are smaller than the end
    if len(states) < 2:
        why = "it has too few steps" if hasattr(kind, "trajectory") else kind.no_trajectory
        raise UserError(f"{kind.name} has no animation: {why}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "way.gif"
        pictures.gif(np.stack(states), path, title=captions_of([drawn.run.prompt])[0])
        return read_file(path, LARGEST_GIF)


def command(run: Run) -> str:
    """The line for a terminal that makes the same pictures."""
    words = ["minidiff", "sample", *run.offered.words, "--count", str(run.count), "--seed", str(run.seed)]
    for name, value in run.options.items():
        # with "=", as a value may begin with a dash
        words.append(f"--{name}={value}" if name in SHORT else f"--set={name}={_as_setting(value)}")
    words += ["-o", "picture.png"]
    if hasattr(run.offered.kind, "trajectory") and not run.offered.kind.previews:
        words += ["--trajectory", "picture.gif"]
    words += ["--", run.prompt] if run.prompt.startswith("-") else [run.prompt]
    return shell(words)


def _as_setting(value: object) -> str:
    """A value as --set reads it: a text that would be read as JSON is quoted as JSON."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value
    return json.dumps(value)
