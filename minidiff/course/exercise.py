"""What an exercise is, and the list of them.

An exercise is two files of one name: exercises/exNN_name.py, where the learner fills a hole, and the file of this
folder that judges it, with an `EXERCISE`.  Nothing else lists them: what stands in this folder is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from minidiff.course.compare import alike
from minidiff.errors import UserError

Law = Callable[[Any], str | None]       # of an answer: None, or one sentence with the numbers at which the law breaks


@dataclass(frozen=True)
class Wrong:
    """A wrong answer that people give: a function like the learner's, and the sentence that names its bug."""

    answer: Callable
    bug: str


@dataclass(frozen=True, eq=False)
class Exercise:
    """What an answer is judged by.

    answer: the name of the function or class that the learner writes.  minutes: about how many it takes.
    chapter: the page of docs/course that explains it, such as "01_noise".
    solution: minidiff's own function, or one that calls it.  place: where that stands, "file name", for the learner.
    laws: functions of the answer.  The first paragraph of a law's docstring says what it demands.  A law compares with
    an independent calculation: a closed form derived in another way, quadrature, a simulation; never with the solution.
    probe: answer -> its results (arrays, numbers, texts, in lists and tuples) for fixed arguments.  An answer whose
    results are those of a wrong answer has its bug.
    seconds: the time that an answer may take for all laws together.
    if_nan: the arguments of a call by name -> why it often has the square root of a negative number, in a sentence.
    note: what else the learner reads beside `place`, after a right answer.
    same: whether two results of the probe are those of one answer.
    ideal: the exact answer, where the solution takes long and comes near it only; else None.
    """

    title: str
    answer: str
    minutes: int
    chapter: str
    hint: str
    solution: Callable
    place: str
    laws: tuple[Law, ...]
    wrong: tuple[Wrong, ...]
    probe: Callable[[Any], Any]
    seconds: float = 10
    if_nan: Callable[[dict], str] | None = None
    note: str = ""
    same: Callable[[Any, Any], bool] = alike
    ideal: Callable | None = None


def claim(law: Law) -> str:
    """What a law demands: the first paragraph of its docstring, on one line."""
    return " ".join((law.__doc__ or "").split("\n\n")[0].split())


# ---- the list ----------------------------------------------------------------------------------------------

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("ex[0-9][0-9]_*.py")))


@cache
def exercise(name: str) -> Exercise:
    """The exercise of a name in NAMES."""
    return import_module(f"minidiff.course.{name}").EXERCISE


def name_of(text: str) -> str:
    """The name in NAMES that a learner means: 7, ex07, ex07_ddpm_step, or a file that begins with ex07; UserError where
    there is none."""
    word = text.replace("\\", "/").rsplit("/", 1)[-1].lower().removesuffix(".py").removeprefix("ex").split("_")[0]
    if word.isascii() and word.isdigit() and len(word) < 4:
        for name in NAMES:
            if name.startswith(f"ex{int(word):02d}_"):
                return name
    raise UserError(f"there is no exercise {text[:80]!r}: it takes a number, such as 7 or ex07, or a file whose name "
                    f"begins so; minidiff check --list shows all {len(NAMES)}")
