"""What the commands' parsers share: the parser, its help, and functions that convert an argument's text to a value."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minidiff.data.dataset import DATASETS
from minidiff.errors import UserError
from minidiff.files import user_path
from minidiff.systems import DEFAULT, SYSTEMS
from minidiff.terminal import one_line, show


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one sentence, with exit status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)     # 1e3 as well

    def parse_args(self, args=None, namespace=None):
        """What is unknown is an error of the command, whose options --help lists; before the command it is ours."""
        words = sys.argv[1:] if args is None else args
        found, unknown = self.parse_known_args(words, namespace)
        parser = vars(found).pop("parser", self)
        if unknown:
            ours = words[0] == unknown[0] and words[0].startswith("-")
            (self if ours else parser).error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def error(self, message: str):
        self.exit(2, f"minidiff: {one_line(message)} (see {self.prog} --help)\n")


def add_command(commands, name: str, function: Callable[[argparse.Namespace], int], *, help: str,
                epilog: str) -> argparse.ArgumentParser:
    """The parser of `minidiff NAME`, which runs function(args). commands: what `add_subparsers` returned."""
    parser = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=Help)
    parser.set_defaults(command=function, parser=parser)
    return parser


# ---- converters, for add_argument(type=...) ----------------------------------------------------------------

def number(text: str) -> float:
    """A finite number from -1000 to 1000."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 1000:
        raise argparse.ArgumentTypeError(f"takes a number from -1000 to 1000, not {text!r}")
    return value


def effort(text: str) -> float:
    if not 0 < (value := number(text)) <= 100:
        raise argparse.ArgumentTypeError(f"takes a number above 0 and at most 100, not {text!r}")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """The converter of whole numbers from low to high."""
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"takes a whole number from {low} to {high}, not {text!r}")
        return value
    return convert


MOST_PROMPTS = 100                                          # of previews
natural, count = whole(0, 2**31), whole(1, 10**6)
steps = whole(1, 1000)


def setting(text: str) -> tuple[str, object]:
    """KEY=VALUE. The value is read as JSON if it is valid JSON (0.1, true, null), otherwise it is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, such as timestep_spacing=trailing, not {text!r}")
    try:
        return key, json.loads(value.lower() if value in ("True", "False") else value)
    except (ValueError, RecursionError):
        return key, value


def distinct(option: str, pairs: Sequence[tuple[str, object]] | None, taken: Sequence[str] = ()) -> dict[str, object]:
    """The (key, value) of an option that is repeated, as a dict; UserError where a key is given twice.

    taken: keys that other options gave.
    """
    found: dict[str, object] = {}
    for key, value in pairs or []:
        if key in found or key in taken:
            raise UserError(f"{option}: {key} was given twice")
        found[key] = value
    return found


def named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"takes NAME=FILE, such as clip=runs/clip/model.safetensors, not {text!r}")
    return name, Path(path)


def lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; the strength is else 1."""
    path, strength = _file_and_word(text)
    try:
        return path, 1.0 if strength is None else number(strength)
    except argparse.ArgumentTypeError as error:
        takes = f"takes FILE or FILE:STRENGTH, such as style.safetensors:0.8; a strength {error}"
        raise argparse.ArgumentTypeError(takes) from None


def embedding(text: str) -> tuple[str, Path]:
    """FILE or FILE:TOKEN, as (token, file); the token is else the file's name."""
    path, token = _file_and_word(text)
    return path.stem if token is None else token, path


def _file_and_word(text: str) -> tuple[Path, str | None]:
    """FILE.ENDING or FILE.ENDING:WORD; the file's own name may have a colon, too."""
    match = None if user_path(text).exists() else re.fullmatch(r"(.+\.\w+):([^/\\]+)", text)
    return (user_path(match[1]), match[2]) if match else (user_path(text), None)


# ---- arguments of several commands --------------------------------------------------------------------------

def add_system(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument("--system", default=default, metavar="NAME",
                        help=f"the system: {', '.join(SYSTEMS)}" + ("" if default else f" (else {DEFAULT})"))


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for an NVIDIA GPU")


def add_data(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--data", metavar="NAME-OR-PATH",
                        help=f"{help}: a registered data set ({', '.join(DATASETS)}), a folder with MNIST's four "
                             "files, or your own captioned pictures: a folder, .csv, .jsonl, .tar or .npz "
                             "(docs/own_pictures.md)")


def size(text: str) -> tuple[int, int]:
    """N or WIDTHxHEIGHT, in pixels."""
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"takes pixels, such as 32 or 48x32 (width x height), not {text!r}")
    return int(parts[0]), int(parts[-1])


def background(text: str) -> tuple[int, int, int]:
    """A colour."""
    from minidiff.data.fitting import colour
    try:
        return colour(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_picture_options(parser: argparse.ArgumentParser, sized: bool = True) -> None:
    """How a person's own pictures are read: fields of own_pictures.PictureOptions, None where they are not given.

    sized: whether their size is asked for; it is not where a model decides it.
    """
    group = parser.add_argument_group("your own pictures")
    if sized:
        group.add_argument("--size", type=size, metavar="N or WxH", help="pixels that each picture becomes (else 32)")
    group.add_argument("--fit", choices=("crop", "pad"),
                       help="of pictures of another shape keep the middle, or all between two borders (else crop)")
    group.add_argument("--background", type=background, metavar="COLOUR",
                       help="where pictures are transparent, and of borders: white, black, grey, #rrggbb (else white)")
    group.add_argument("--flip", action="store_const", const=True,
                       help="learn from mirror images, too; wrong where captions say left and right")
    group.add_argument("--captions", type=user_path, metavar="FILE",
                       help="a .csv or .jsonl of pictures and captions that is not in the folder")


def picture_options(args: argparse.Namespace) -> dict[str, object]:
    """Those of add_picture_options that were given."""
    return ({} if args.size is None else {"size": args.size}) | picture_reading(args)


def picture_reading(args: argparse.Namespace) -> dict[str, object]:
    """The same without the size, which a model decides."""
    given = {name: getattr(args, name) for name in ("fit", "background", "flip", "captions")}
    return {name: value for name, value in given.items() if value is not None}


def prompts_in(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one in each line; UserError where there are none, or too many."""
    from minidiff.data.layouts import lines_of, text_in
    lines = tuple(" ".join(line.split()) for line in lines_of(text_in(path, 1 << 20)) if line.strip())
    if not 1 <= len(lines) <= MOST_PROMPTS:
        raise UserError(f"--prompts: {ascii(str(path))} must hold 1 to {MOST_PROMPTS} prompts, one in each line, not "
                        f"{len(lines)}")
    return lines


# ---- output --------------------------------------------------------------------------------------------------

def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Rows of a name and a value, the values in one column."""
    width = max(len(name) for name, _ in rows)
    show(*(f"{name:<{width}}  {value}" for name, value in rows))


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
