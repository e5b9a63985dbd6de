"""minidiff sample: draws pictures for a caption, and if asked the way from noise to picture."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff import systems
from minidiff.cli import sampling_options
from minidiff.cli.arguments import add_command, add_device, add_system, count, distinct, embedding, lora, natural
from minidiff.errors import UserError, refusals
from minidiff.files import check_distinct
from minidiff.input_files import read_file
from minidiff.terminal import progress, say, show

if TYPE_CHECKING:
    import numpy as np

LONGEST_PROMPT = 2_000                                      # characters; a caption keeps far fewer
SHOWN = 64                                                  # samples of an animation, at most
IN_A_STRIP = 8                                              # samples of a strip, at most


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "sample", sample, help="Draw pictures for a caption.",
                    epilog='Example: minidiff sample "a bold seven leaning left" --scale 3 --seed 1 -o seven.png')
    p.add_argument("prompt", help='a caption, such as "a thin, upright three"; "" for no caption')
    p.add_argument("-o", "--out", type=Path, default=Path("sample.png"), metavar="FILE",
                   help="the picture (.png, .jpg)")
    p.add_argument("--count", type=count, help="how many pictures (else 16, and 1 by Stable Diffusion)")
    p.add_argument("--seed", type=natural, default=0, help="another seed gives other pictures")
    add_system(p, default=None)
    sampling_options.add(p)
    p.add_argument("--image", type=Path, metavar="FILE", help="Stable Diffusion: the picture to start from")
    p.add_argument("--mask", type=Path, metavar="FILE", help="with --image: white where it is to be drawn again")
    p.add_argument("--lora", type=lora, action="append", metavar="FILE[:STRENGTH]",
                   help="Stable Diffusion: a LoRA that changes the checkpoint, with a strength (else 1); repeat it for "
                        "each LoRA")
    p.add_argument("--embedding", type=embedding, action="append", metavar="FILE[:TOKEN]",
                   help="Stable Diffusion: an embedding, and the word in prompts that stands for it (else the file's "
                        "name); repeat it for each word")
    p.add_argument("--low-memory", action="store_true",
                   help="Stable Diffusion: keep weights in half precision where the files have it, and widen each at "
                        "every use: half of the memory, and slower")
    p.add_argument("--preview", type=Path, metavar="FILE",
                   help="Stable Diffusion: also write now and then, at half the size, what the picture will be like")
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
    if args.image and options.get("strength") == 0:         # however it was given: --strength, or --set strength=0
        raise UserError("--strength 0 makes no step and gives the image back: take a number above 0, at most 1")
    options |= _images(kind, args)
    args.count = args.count or kind.count
    for file in _files(kind, args):
        pictures.check_writable(file)
    if args.trajectory and not hasattr(kind, "trajectory"):
        raise UserError(f"{kind.name} has no trajectory: {kind.no_trajectory}")
    if args.preview and not kind.previews:
        raise UserError(f"{kind.name} takes no --preview")
    changes = _changes(kind, args)
    with refusals(kind.name):
        kind.check_options(path, options)
    if args.device == "cpu":
        kind.check_memory(path, options | changes)
    model = systems.load_model(kind, path, **changes).to(args.device)
    files = _files(kind, args)
    outputs = {f"--out ({file})" if len(files) > 1 else "--out": file for file in files}
    check_distinct(outputs | {"--trajectory": args.trajectory, "--preview": args.preview},
                   sampling_options.files_of(model) | {"--image": args.image, "--mask": args.mask}
                   | {f"--lora ({file})": file for file, _ in changes.get("loras", [])}
                   | {f"--embedding ({file})": file for file in changes.get("embeddings", {}).values()})
    sampling_options.print_files(model)

    started = time.monotonic()
    drawn, states, done = [], [], 0
    with refusals(model.name):
        for images, way in _batches(model, prompt, args, options):
            states = states or way                          # those of the first batch
            if kind.at_a_time == 1:                         # takes minutes: none is lost if the next one fails
                pictures.save(pictures.plain(images[0]), files[done])
                done += 1
            else:
                drawn.append(images)
    (caption,) = sampling_options.captions_of([prompt])
    if drawn:
        pictures.save(pictures.sheet(np.concatenate(drawn), title=caption), args.out)       # (N, H, W, C)
    show(f"{args.count} x {caption[:60]!r} in {time.monotonic() - started:.1f} s by {model.name} ({path}): "
         f"{', '.join(map(str, files))}")
    if kind.at_a_time == 1 and peak_memory():
        show(f"peak memory: {peak_memory():.1f} GiB")
    if args.trajectory:
        _save_trajectory(states, args.trajectory, caption)
        show(f"trajectory: {args.trajectory}")
    return 0


def _batches(model, prompt: str, args: argparse.Namespace, options: dict):
    """(images, states (t, x_t) where --trajectory asks for them) of each batch, behind a progress bar."""
    from minidiff.cli.preview import Preview
    from minidiff.engine.backend import to_numpy
    from minidiff.engine.random import sample_streams

    preview = Preview(args.preview) if args.preview else None
    streams = sample_streams(args.device, args.seed, args.count)
    size = model.at_a_time
    parts = [streams[i:min(i + size, args.count)] for i in range(0, args.count, size)]
    by_steps = hasattr(model, "trajectory") and (args.trajectory is not None or not model.slow_trajectory)
    steps = model.steps_made(options) if by_steps else 0
    with progress(title="sampling", total=steps * len(parts) if by_steps else args.count,
                  unit="step" if by_steps else "picture", leave=False) as bar:
        for number, part in enumerate(parts):
            captions, way = [prompt] * len(part), []
            if not by_steps:
                yield model.sample(captions, streams=part, **options), way
                bar.update(len(part))
                continue
            for state in model.trajectory(captions, streams=part, **options):
                if args.trajectory and number == 0:         # it shows the first batch
                    way.append((state.t, to_numpy(state.x_t[:SHOWN])))              # (B, H, W, C)
                if preview:
                    preview.show(state)
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


def _files(kind, args: argparse.Namespace) -> list[Path]:
    """The files of the pictures: one sheet, or one for each picture of a system that draws one at a time."""
    if kind.at_a_time > 1 or args.count == 1:
        return [args.out]
    return [args.out.with_stem(f"{args.out.stem}-{i}") for i in range(1, args.count + 1)]


def peak_memory() -> float | None:
    """GiB that this process has had at most; None where the system does not tell (Windows)."""
    try:                                                    # Linux: the next way would count the parent's memory, too
        status = read_file("/proc/self/status", 1 << 16)
        return int(status.split(b"VmHWM:")[1].split()[0]) / 2**20                   # KiB
    except (LookupError, ValueError):                       # a UserError is a ValueError
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**30 if sys.platform == "darwin" else most / 2**20               # bytes there, KiB elsewhere


def _changes(kind, args: argparse.Namespace) -> dict:
    """How the model is loaded: --lora, --embedding, --low-memory; UserError where the system takes none of these."""
    given = {"loras": args.lora, "embeddings": args.embedding and distinct("--embedding", args.embedding),
             "low_memory": args.low_memory}
    for (option, value), name in zip(given.items(), ("--lora", "--embedding", "--low-memory"), strict=True):
        if value and option not in kind.load_options():
            raise UserError(f"{kind.name} takes no {name}")
    return {option: value for option, value in given.items() if value}


def _images(kind, args: argparse.Namespace) -> dict:
    """The pictures of --image and --mask as options; UserError where the system takes none."""
    import numpy as np

    from minidiff.data.fitting import opaque
    from minidiff.data.image_file import open_image
    from minidiff.data.pixels import to_float
    from minidiff.pretrained.request import size_of

    for option in ("image", "mask"):
        if getattr(args, option) and option not in kind.options():
            raise UserError(f"{kind.name} takes no --{option}")
    if args.mask and not args.image:
        raise UserError("--mask says what of a picture to draw again: name the picture with --image")
    if not args.image:
        return {}
    image = opaque(open_image(args.image))
    # to the size that is asked for, or else down to multiples of 8
    size = size_of(args.size) if args.size else tuple(max(8, n // 8 * 8) for n in image.size)
    options = {"image": to_float(np.asarray(image.resize(size)))}                   # (H, W, 3)
    if args.mask:
        options["mask"] = _mask(args.mask, image.size, size)
    return options


def _mask(path: Path, image: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) booleans, True where the mask is white; UserError where it is of another size than the image."""
    import numpy as np

    from minidiff.data.fitting import opaque
    from minidiff.data.image_file import open_image

    mask, shown = open_image(path), ascii(str(path))
    if mask.size not in (image, size):
        raise UserError(f"--mask ({shown}) is {mask.width}x{mask.height}, and the image {image[0]}x{image[1]}: they "
                        "must be of one size")
    if mask.has_transparency_data and mask.convert("RGBA").getextrema()[3][0] < 255:
        raise UserError(f"--mask ({shown}) has transparent pixels: save it in black and white, white where the image "
                        "is to be drawn again")
    mask = opaque(mask).convert("L")
    if np.isin(np.asarray(mask), (0, 255), invert=True).any():
        say(f"--mask ({shown}) has grey pixels: from the middle grey on they count as white")
    return np.asarray(mask.resize(size)) > 127                                      # (H, W)


# ---- checks of the arguments --------------------------------------------------------------------------------

def _prompt(args: argparse.Namespace) -> str:
    """The prompt; a very long one is cut, with a message."""
    if len(args.prompt) > LONGEST_PROMPT:
        say(f"the prompt has {len(args.prompt)} characters: the first {LONGEST_PROMPT} were read")
    return args.prompt[:LONGEST_PROMPT]


def _check_files(args: argparse.Namespace) -> None:
    from minidiff import pictures
    pictures.check_writable(args.out)
    for path in (args.trajectory, args.preview):
        if path:
            pictures.check_writable(path)
