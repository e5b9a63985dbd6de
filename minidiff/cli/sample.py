"""minidiff sample: draws pictures for a caption, and if asked the way from noise to picture."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff import systems
from minidiff.cli import sampling_options
from minidiff.cli.arguments import add_command, add_device, add_system, count, natural
from minidiff.errors import UserError, refusals
from minidiff.files import check_distinct
from minidiff.terminal import progress, say, show

if TYPE_CHECKING:
    import numpy as np

LONGEST_PROMPT = 2_000                                      # characters; a caption keeps far fewer
AT_A_TIME = 64                                              # pictures drawn in one batch
SHOWN = 64                                                  # samples of an animation, at most
IN_A_STRIP = 8                                              # samples of a strip, at most


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "sample", sample, help="Draw pictures for a caption.",
                    epilog='Example: minidiff sample "a bold seven leaning left" --scale 3 --seed 1 -o seven.png')
    p.add_argument("prompt", help='a caption, such as "a thin, upright three"; "" for no caption')
    p.add_argument("-o", "--out", type=Path, default=Path("sample.png"), metavar="FILE",
                   help="the picture (.png, .jpg)")
    p.add_argument("--count", type=count, default=16, help="how many pictures")
    p.add_argument("--seed", type=natural, default=0, help="another seed gives other pictures")
    add_system(p, default=None)
    sampling_options.add(p)
    p.add_argument("--trajectory", type=Path, metavar="FILE",
                   help="also write the way from noise to picture: an animation (.gif) or a strip (.png)")
    add_device(p)


def sample(args: argparse.Namespace) -> int:
    import numpy as np

    from minidiff import pictures

    prompt = _prompt(args)
    _check_files(args)
    kind, path = sampling_options.model_file(args)
    options = sampling_options.sampling_options(kind, args)
    if args.trajectory and not hasattr(kind, "trajectory"):
        raise UserError(f"{kind.name} has no trajectory: {kind.no_trajectory}")
    model = systems.load_system(kind.name, path).to(args.device)
    check_distinct({"--out": args.out, "--trajectory": args.trajectory}, sampling_options.files_of(model))
    sampling_options.print_files(model)

    started = time.monotonic()
    drawn, states = [], []
    with refusals(model.name):
        for images, way in _batches(model, prompt, args, options):
            drawn.append(images)
            states = states or way                          # those of the first batch
    (caption,) = sampling_options.captions_of([prompt])
    pictures.save(pictures.sheet(np.concatenate(drawn), title=caption), args.out)
    show(f"{args.count} x {caption[:60]!r} in {time.monotonic() - started:.1f} s by {model.name} ({path}): {args.out}")
    if args.trajectory:
        _save_trajectory(states, args.trajectory, caption)
        show(f"trajectory: {args.trajectory}")
    return 0


def _batches(model, prompt: str, args: argparse.Namespace, options: dict):
    """(images, states (t, x_t) where --trajectory asks for them) of each batch, behind a progress bar."""
    from minidiff.engine.backend import to_numpy
    from minidiff.engine.random import sample_streams

    streams = sample_streams(args.device, args.seed, args.count)
    parts = [streams[i:min(i + AT_A_TIME, args.count)] for i in range(0, args.count, AT_A_TIME)]
    by_steps = hasattr(model, "trajectory") and (args.trajectory is not None or not model.slow_trajectory)
    steps = options.get("steps", model.options().get("steps", 1)) if by_steps else 0
    with progress(title="sampling", total=steps * len(parts) if by_steps else args.count,
                  unit="step" if by_steps else "picture", leave=False) as bar:
        for part in parts:
            captions, way = [prompt] * len(part), []
            if not by_steps:
                yield model.sample(captions, streams=part, **options), way
                bar.update(len(part))
                continue
            for state in model.trajectory(captions, streams=part, **options):
                if args.trajectory:
                    way.append((state.t, to_numpy(state.x_t[:SHOWN])))              # (B, H, W, C)
                bar.update(bool(state.step))
            yield to_numpy(state.x_t), way


def _save_trajectory(states: list[tuple[int, np.ndarray]], path: Path, title: str) -> None:
    """An animation or a strip of the states (t, x_t)."""
    import numpy as np

    from minidiff import pictures
    x = np.stack([x_t for _, x_t in states])                                        # (S, B, H, W, C)
    if path.suffix.lower() == ".gif":
        pictures.gif(x, path, title=title)
    else:
        labels = [f"t = {t}" if t >= 0 else "clean" for t, _ in states]
        pictures.save(pictures.strip(x[:, :IN_A_STRIP], labels=labels), path)


# ---- checks of the arguments --------------------------------------------------------------------------------

def _prompt(args: argparse.Namespace) -> str:
    """The prompt; a very long one is cut, with a message."""
    if len(args.prompt) > LONGEST_PROMPT:
        say(f"the prompt has {len(args.prompt)} characters: the first {LONGEST_PROMPT} were read")
    return args.prompt[:LONGEST_PROMPT]


def _check_files(args: argparse.Namespace) -> None:
    from minidiff import pictures
    pictures.check_writable(args.out)
    if args.trajectory:
        pictures.check_writable(args.trajectory)
