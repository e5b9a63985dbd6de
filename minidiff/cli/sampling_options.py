"""The options of sampling: read off each system's own `sample`, with its own defaults.

Systems are sampled in different ways (a scale, a number of steps, a temperature).  --scale, --steps and --sampler are
short for --set scale=..., --set steps=..., --set sampler=..., and so on; an option that the system does not have is
refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minidiff import systems
from minidiff.cli.arguments import number, setting, steps
from minidiff.errors import UserError
from minidiff.systems.system import System
from minidiff.terminal import show

MOST = 1000                                                 # no number of an option is larger
# what an option without a default value takes, by its annotation
KINDS = {"str | None": (str, "a text"), "float | None": (int | float, "a number")}
SHORT = ("scale", "steps", "sampler", "negative", "second", "size", "strength")     # options with their own argument


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `model_file` and `sampling_options` read."""
    from minidiff.diffusion.samplers import SAMPLERS
    from minidiff.pretrained.scheduler_classes import CHOICES
    parser.add_argument("--model", metavar="FILE",
                        help="a model.safetensors of any system; a name of weights that come with minidiff, such as "
                             "emoji; or a checkpoint of Stable Diffusion, as a folder, a file, or its name at "
                             "Hugging Face (org/name), from where it is fetched (else the system's own run in runs/, "
                             "else the weights that come with minidiff)")
    parser.add_argument("--scale", type=number,
                        help="guidance: 0 ignores the caption, 1 follows it, more follows it more closely "
                             "(else the system's default)")
    parser.add_argument("--steps", type=steps,
                        help="sampling steps: more are finer and slower; at most 1000, and no more than the model's "
                             "schedule has times (else the system's default)")
    parser.add_argument("--sampler", metavar="NAME",
                        help=f"the sampler: {', '.join(SAMPLERS)}; of Stable Diffusion: {', '.join(CHOICES)} (else the "
                             "system's default, or the checkpoint's own)")
    parser.add_argument("--negative", metavar="TEXT", help="Stable Diffusion: what the picture should not be like")
    parser.add_argument("--second", metavar="TEXT",
                        help="SDXL: what its second text encoder reads (else the prompt); --set second_negative=TEXT "
                             "is the same for the negative prompt")
    parser.add_argument("--size", metavar="WxH", help="Stable Diffusion: pixels, such as 512x768")
    parser.add_argument("--strength", type=number,
                        help="with --image: the share of the way from noise that is gone again, up to 1")
    parser.add_argument("--set", type=setting, action="append", metavar="KEY=VALUE",
                        help="any option of the system's sampling, such as temperature=0.9; repeat it for each option. "
                             "minidiff info --model FILE lists them")


def model_file(args: argparse.Namespace) -> tuple[type[System], Path | None]:
    """The system that --model or --system names, and the file of its weights; None where there are none yet."""
    if args.model is None:
        name = args.system or systems.DEFAULT
        return systems.system_class(name), systems.weights_of(name)
    path = systems.model_path(args.model)
    kind = systems.class_of_model(path)
    if args.system not in (None, kind.name):
        raise UserError(f"{args.model} holds {kind.name!r}, and --system asks for {args.system!r}: leave out --system, "
                        "or name another --model")
    return kind, path


def sampling_options(kind: type[System], args: argparse.Namespace) -> dict:
    """The options that were given, checked against the system's own; UserError names those that it has."""
    own = kind.options()
    if own is None:
        example = f": python examples/{kind.example} shows what it does" if kind.example else ""
        raise UserError(f"{kind.name} draws no pictures of captions{example}")
    given = {name: getattr(args, name) for name in SHORT if getattr(args, name) is not None}
    for name, value in args.set or []:
        if name in given:
            raise UserError(f"{kind.name}: {name} was given twice")
        given[name] = value
    return {name: checked_option(kind, name, value) for name, value in given.items()}


def checked_option(kind: type[System], name: str, value):
    """The value as the option takes it; UserError where there is no such option or it takes another kind of value."""
    own = kind.options()
    if name not in own:
        raise UserError(f"{kind.name} has no option {name!r}: its options are {described(kind) or 'none'}")
    if isinstance(value, float) and not abs(value) <= MOST or isinstance(value, int) and abs(value) > MOST:
        raise UserError(f"{kind.name}: {name} takes a number from -{MOST} to {MOST}, not {value}")
    default, annotation = own[name], kind.option_kinds()[name]
    if "ndarray" in annotation:
        raise UserError(f"{kind.name}: {name} is a picture: name its file with --{name}")
    takes, what = KINDS.get(annotation, (object, ""))
    if value is not None and (not isinstance(value, takes) or what and isinstance(value, bool)):
        raise UserError(f"{kind.name}: {name} takes {what}, not {value!r}")
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default) and default is not None:
        raise UserError(f"{kind.name}: {name} takes a value like {default!r}, not {value!r}")
    if name == "sampler":
        kind.check_sampler(value)                           # UserError where there is none of this name
    return value


def files_of(model: System) -> dict[str, Path | None]:
    """The files of a model, and of the systems that it draws with and whose weights are in another file."""
    borrowed = model.borrowed() if hasattr(model, "borrowed") else {}
    return {"--model": model.file} | {name: getattr(other, "file", None) for name, other in borrowed.items()}


def print_files(model: System) -> None:
    """A line for each other file that the model draws with."""
    for name, path in files_of(model).items():
        if name != "--model":
            show(f"{model.name} draws with {name} ({path or 'in memory'})")


def described(kind: type[System]) -> str:
    """The options with their defaults, such as "steps 20, size (the checkpoint's)": in words where it depends."""
    return ", ".join(f"{name} ({kind.when_none.get(name, 'none')})" if value is None else f"{name} {value}"
                     for name, value in (kind.options() or {}).items())


def captions_of(prompts: Sequence[str]) -> list[str]:
    """What stands under a picture: the prompt, or that there is none."""
    return [prompt.strip() or "(no caption)" for prompt in prompts]
