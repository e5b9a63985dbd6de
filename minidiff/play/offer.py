"""What the page offers: the systems that draw pictures of captions, their options, and the checks of a request.

Everything is read off the systems: their options with their defaults (`System.options`), whether they read captions,
whether they draw step by step.  A system or sampler that is registered elsewhere appears on the page by itself.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minidiff import systems
from minidiff.checks import whole
from minidiff.cli.sampling_options import KINDS, checked_option
from minidiff.data.dataset import DATASETS
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.errors import UserError
from minidiff.pretrained.scheduler_classes import CHOICES
from minidiff.systems.system import System
from minidiff.systems.text_to_image import TextToImage

LONGEST_PROMPT = 500                                        # characters
MOST_SEED = 2**31
MOST_PICTURES = 16
MOST_IN_ONE_PIECE = 4                                       # of systems that cannot be stopped between two steps
MOST_STEPS = 4000                                           # pictures times steps
MOST_WORK = 1000                                            # pictures times the other whole-number options
LARGEST_SIZE = 1024 * 1024                                  # pixels of a picture whose size can be asked for
OF_A_PICTURE = ("strength",)                                # options that mean nothing without a picture to start from
EXAMPLES = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "a heavy four leaning right")


@dataclass(frozen=True)
class Offered:
    """A system with weights."""

    key: str                                                # its name on the page
    kind: type[System]
    path: Path
    words: tuple[str, ...]                                  # of the command line that name it

    @property
    def most(self) -> int:
        """Pictures at a time."""
        if self.kind.at_a_time == 1:
            return 1
        return MOST_PICTURES if hasattr(self.kind, "trajectory") else MOST_IN_ONE_PIECE

    def about(self) -> dict:
        kind = self.kind
        return {"key": self.key, "reads_captions": kind.reads_captions, "most": self.most,
                "usual": min(4, self.most), "options": options_of(kind),
                "steps_shown": hasattr(kind, "trajectory"),
                "no_steps": "" if hasattr(kind, "trajectory") else kind.no_trajectory,
                "attention": issubclass(kind, TextToImage)}


@dataclass(frozen=True)
class Run:
    """One request to draw, checked."""

    offered: Offered
    prompt: str
    count: int
    seed: int
    options: Mapping[str, object]                           # those that differ from the system's defaults


class Offer:
    """The systems that are offered, each loaded when it is first asked for."""

    def __init__(self, models: Sequence[str] = (), device: str = "cpu"):
        """models: further files, folders or names of checkpoints, as of `minidiff sample --model`."""
        self.device, self._loaded = device, {}
        self.systems = {offered.key: offered for offered in [*self._own(), *map(_of_file, models)]}
        if not self.systems:
            raise UserError("no system that draws pictures has weights yet: minidiff train makes some")

    @staticmethod
    def _own():
        for name in systems.SYSTEMS:
            kind = systems.SYSTEMS[name]
            if kind.options() is not None and (path := systems.weights_of(name)) is not None:
                yield Offered(name, kind, path, ("--system", name))

    def about(self) -> dict:
        """What the page must know to draw its forms."""
        own = [offered.about() for offered in self.systems.values()]
        default = systems.DEFAULT if systems.DEFAULT in self.systems else own[0]["key"]
        return {"systems": own, "system": default, "examples": EXAMPLES, "schedules": list(SCHEDULES),
                "datasets": list(DATASETS), "longest_prompt": LONGEST_PROMPT, "most_seed": MOST_SEED}

    def load(self, offered: Offered) -> System:
        """The system itself; called by the worker's thread alone."""
        if offered.key not in self._loaded:
            self._loaded[offered.key] = systems.load_model(offered.kind, offered.path).to(self.device)
        return self._loaded[offered.key]

    # --- requests -----------------------------------------------------------------------------------------

    def run(self, asked: object) -> Run:
        """What a request asks to draw; UserError, one sentence, where it is wrong or too large."""
        asked = fields(asked, "a run", system=str, prompt=str, count=int, seed=int, options=dict)
        if asked["system"] not in self.systems:
            raise UserError(f"there is no system {asked['system'][:40]!r} here: it is one of {', '.join(self.systems)}")
        offered = self.systems[asked["system"]]
        kind, own = offered.kind, offered.kind.options()
        prompt = checked_text("the prompt", asked["prompt"])
        if prompt and not kind.reads_captions:
            raise UserError(f"{kind.name} reads no captions: leave the prompt empty")
        if len(asked["options"]) > len(own):
            raise UserError(f"{kind.name} has {len(own)} options, and {len(asked['options'])} were given")
        options = {}
        for name, value in asked["options"].items():
            value = checked_text(name, value) if isinstance(value, str) else value
            value = checked_option(kind, name, value)
            if name == "steps" or name.endswith("_steps"):
                within(name, value, 1, MOST_STEPS)
            if value != own[name]:
                options[name] = value
        count = within("the number of pictures", asked["count"], 1, offered.most)
        seed = within("the seed", asked["seed"], 0, MOST_SEED)
        check_work(offered, count, own | options)
        return Run(offered, prompt, count, seed, options)


def _of_file(model: str) -> Offered:
    path = systems.model_path(model)
    kind = systems.class_of_model(path)
    if kind.options() is None:
        raise UserError(f"--model {model}: {kind.name} draws no pictures of captions")
    return Offered(f"{kind.name} ({Path(model).name})", kind, path, ("--model", model))


def options_of(kind: type[System]) -> list[dict]:
    """The options of a system as a form needs them: name, kind of control, default, choices."""
    found = []
    for name, default in kind.options().items():
        annotation = kind.option_kinds()[name]
        if "ndarray" in annotation or name in OF_A_PICTURE:
            continue
        about = {"name": name, "default": default, "control": _control(default, annotation)}
        if name == "sampler":
            about |= {"control": "choice", "choices": samplers_of(kind)}
        found.append(about)
    return found


def _control(default: object, annotation: str) -> str:
    if default is None:
        return "number" if KINDS.get(annotation, (str,))[0] is not str else "text"
    return {bool: "flag", int: "whole", float: "number"}.get(type(default), "text")


def samplers_of(kind: type[System]) -> list[str]:
    """The names of the samplers with which a system draws."""
    def takes(name: str) -> bool:
        try:
            kind.check_sampler(name)
        except UserError:
            return False
        return True
    return [name for name in dict.fromkeys([*SAMPLERS, *CHOICES]) if takes(name)]


def check_work(offered: Offered, count: int, options: Mapping[str, object]) -> None:
    """UserError where a run would take so long that the other visitors would wait too long."""
    numbers = {name: value for name, value in options.items() if type(value) is int}
    steps = numbers.pop("steps", 1) if hasattr(offered.kind, "trajectory") else 1
    if count * steps > MOST_STEPS:
        raise UserError(f"{count} pictures of {steps} steps are too many here: pictures times steps may be "
                        f"{MOST_STEPS:,}; minidiff sample has no such limit")
    work = count * math.prod(max(1, value) for value in numbers.values())
    if work > MOST_WORK:
        raise UserError(f"{' x '.join(['pictures', *numbers])} is {work:,} here, and may be {MOST_WORK:,}: minidiff "
                        "sample has no such limit")
    if isinstance(size := options.get("size"), str):
        from minidiff.pretrained.request import size_of
        if math.prod(size_of(size)) > LARGEST_SIZE:
            raise UserError(f"size {size} is too large here: at most {LARGEST_SIZE:,} pixels; minidiff sample has no "
                            "such limit")


# ---- checks of requests -----------------------------------------------------------------------------------

def fields(value: object, what: str, **kinds: type) -> dict:
    """The value as a dict with exactly these fields of these types; UserError otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{what} must be an object with {', '.join(kinds)}")
    if set(value) != set(kinds):
        odd = sorted(map(str, set(value) ^ set(kinds)))[0]
        raise UserError(f"{what} must have the fields {', '.join(kinds)} and no others: see {odd[:40]!r}")
    for name, kind in kinds.items():
        good = isinstance(value[name], kind) and not (isinstance(value[name], bool) and kind is not bool)
        if not good:
            shown = repr(value[name][:40]) if isinstance(value[name], str) else str(value[name])[:40]
            raise UserError(f"{what}: {name} is {shown}, which is no {_KINDS[kind]}")
    return dict(value)


_KINDS = {str: "text", int: "whole number", dict: "object", list: "list", bool: "truth value"}


def within(what: str, value: object, least: int, most: int) -> int:
    try:
        return whole(what, value, least, most)
    except ValueError as error:
        raise UserError(str(error)) from None


def checked_text(what: str, text: str) -> str:
    """The text; UserError where it is too long, or holds what neither a picture nor a command line can show."""
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"{what} has {len(text):,} characters, and at most {LONGEST_PROMPT} are read here")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise UserError(f"{what} has a line break or another character that cannot be printed: leave it out")
    return text
