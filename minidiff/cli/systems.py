"""The command line's part for the systems of the literature: train, sample and evaluate any of them by its name.

Their ways of sampling differ (a scale, a number of steps, a temperature), so that the options are read off the system's
own `sample`: one that it does not take is refused by name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minidiff import checkpoint, systems
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.systems.system import System
from minidiff.training.ranks import ranks

MAIN = "text-to-image"
MOST = 1000                                                 # no number of an option is larger


def train(args: argparse.Namespace) -> int:
    """Trains the system of --system, stage by stage; returns the exit status."""
    import shlex

    from minidiff.data import mnist
    from minidiff.training import run as stages
    from minidiff.training.trainer import Interrupted

    kind = systems.system_class(args.system)
    stages.check_run(args.out, kind, args.resume)
    data = ranks().in_turn(lambda: mnist.load(args.data))
    print(f"training {args.system} on {data.source} ({len(data)} images); the run is in {args.out}")
    try:
        trained = stages.run(args.out, kind, data, seed=args.seed, effort=args.effort, resume=args.resume)
    except Interrupted as stop:
        words = [*ranks().command(), "minidiff", "train", "--system", args.system, "--resume", "--out", str(args.out),
                 "--seed", str(args.seed), "--effort", f"{args.effort:g}"]
        words += ["--data", str(args.data)] if args.data else []
        print(f"minidiff: {stop}; go on with: {shlex.join(words)}", file=sys.stderr)
        return 1
    for stage, seconds in trained.seconds.items():
        print(f"{stage:<16}{seconds / 60:6.1f} min")
    print(f"weights         {args.out / 'model.safetensors'}")
    if kind.options() is not None:
        print(f'try             minidiff sample --system {args.system} --model {args.out / "model.safetensors"} "7"')
    else:
        print(f"try             python examples/{EXAMPLES[args.system]}")
    return 0


def options(kind: type[System], args: argparse.Namespace) -> dict:
    """The options of sampling that were given, checked to be the system's own; UserError names those it takes."""
    own = kind.options()
    given = {name: value for name, value in (("scale", args.scale), ("steps", getattr(args, "steps", None) or
                                                                       getattr(args, "sample_steps", None)),
                                         ("sampler", getattr(args, "sampler", None)))
             if value is not None}
    for name, value in args.set or []:
        if name in given:
            raise UserError(f"{kind.name}: {name} was given twice")
        if isinstance(value, float) and not abs(value) <= MOST or isinstance(value, int) and abs(value) > MOST:
            raise UserError(f"{kind.name}: {name} takes a number from -{MOST} to {MOST}, not {value}")
        given[name] = value
    takes = ", ".join(f"{name} ({default})" for name, default in own.items()) or "none"
    for name, value in given.items():
        if name not in own:
            raise UserError(f"{kind.name} has no option {name!r}: its options are {takes}")
        default = own[name]
        if isinstance(default, float) and type(value) is int:
            given[name] = float(value)
        elif type(value) is not type(default) and default is not None:
            raise UserError(f"{kind.name}: {name} takes a value like {default!r}, not {value!r}")
    return given


def captioned(args: argparse.Namespace) -> tuple[System, dict]:
    """The trained system of --system, and its options; UserError unless it draws pictures of captions on a CPU."""
    kind = systems.system_class(args.system)
    if kind.options() is None:
        raise UserError(f"{args.system} draws no pictures of captions: python examples/{EXAMPLES[args.system]} shows "
                        "what it does")
    if args.device != "cpu":
        raise UserError(f"--device {args.device} is read by {MAIN} only: {args.system} runs on the cpu")
    chosen = options(kind, args)
    return systems.load_system(args.system, args.model), chosen


# of those that draw no pictures of captions
EXAMPLES = {"dpm": "01_swiss_roll.py", "clip": "03_clip.py", "autoencoder-kl": "10_autoencoders.py",
            "autoencoder-vq": "10_autoencoders.py"}
BATCH = 16                                                  # pictures drawn at a time


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """A value that the system refuses is the user's to put right."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error


def sample(args: argparse.Namespace, prompt: str) -> int:
    """Draws pictures by the system of --system; returns the exit status."""
    from minidiff import pictures

    if args.trajectory:
        raise UserError(f"--trajectory is drawn by {MAIN} only: leave it out with --system {args.system}")
    pictures.check_writable(args.out)
    from tqdm import tqdm
    (model, chosen), started = captioned(args), time.monotonic()
    streams, drawn = SampleStreams(args.seed, args.count), []
    with refusals(args.system), tqdm(total=args.count, desc="sampling", unit="picture", leave=False) as bar:
        for i in range(0, args.count, BATCH):
            part = streams[i:i + BATCH]
            drawn.append(model.sample([prompt] * len(part), streams=part, **chosen))
            bar.update(len(part))
    images = np.concatenate(drawn)
    title = prompt.strip() or "(no caption)"
    pictures.save(pictures.sheet(images, title=title), args.out)
    print(f"{args.count} x {title[:60]!r} by {args.system} in {time.monotonic() - started:.1f} s: {args.out}")
    return 0


def trained() -> str:
    """Which systems there are, and for which there are no weights."""
    missing = [name for name in systems.SYSTEMS if not systems.weights_of(name)]
    return ", ".join(name if name not in missing else f"{name} (not trained)" for name in systems.SYSTEMS) + (
        "; minidiff train --system NAME trains one" if missing else "")


def described(path: Path | None) -> list[tuple[str, str]]:
    """What a model file holds, or the shipped one of the main job: rows (what, value)."""
    name = MAIN if path is None else checkpoint.load(path).meta.get("system")
    if name not in systems.SYSTEMS:
        raise UserError(f"{path} holds {str(name)[:40]!r}, which is none of the systems {', '.join(systems.SYSTEMS)}")
    model = systems.load_system(name, path)
    parts = {part: value.parameter_count() for part, value in vars(model).items() if isinstance(value, Module)}
    rows = [("model", f"{name}, {path or model.shipped()}"),
            ("parameters", ", ".join(f"{count:,} {part}" for part, count in parts.items()))]
    rows += [(field, _plain(value)) for field, value in asdict(model.config).items()]
    if model.options():
        rows.append(("sampling", ", ".join(f"{option} {default}" for option, default in model.options().items())))
    if model.tokenizer:
        rows.append(("tokenizer", f"{model.tokenizer.vocab_size} tokens"))
    return rows + [("trained", _plain(model.notes) if model.notes else "not recorded")]


def _plain(value) -> str:
    """A value on one line that a terminal can print: a stranger's file may say anything."""
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return ascii(text)[1:-1][:300]


def out_of(args: argparse.Namespace) -> Path:
    """Where a run goes that was not told: runs/mnist for the main job, else runs/NAME."""
    return args.out or Path("runs") / ("mnist" if args.system == MAIN else args.system)
