"""An answer against its exercise: which law is broken and at which numbers, which known bug it has, or that it is kept.

    verdict = judge(exercise("ex01_q_sample"), answer)
    verdict.kept, verdict.sentence
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff.course.compare import described
from minidiff.course.exercise import Exercise, claim

KEPT, OPEN, BROKEN, BUG, FAULT = "kept", "open", "broken", "bug", "fault"


@dataclass(frozen=True)
class Verdict:
    """kind: kept; open (the hole is there); broken (a law); bug (a known one); fault (the answer could not be judged).

    sentence: what the learner reads, without the exercise's name.
    """

    kind: str
    sentence: str

    @property
    def kept(self) -> bool:
        return self.kind == KEPT


class Fault(Exception):
    """An answer cannot be judged, for a reason that stands in one sentence; kind: of the verdict."""

    def __init__(self, sentence: str, kind: str = FAULT):
        super().__init__(sentence)
        self.kind = kind


Explain = Callable[[BaseException, str], Fault]  # an exception that an answer raised, and the words for its call


def judge(exercise: Exercise, answer: Callable, explain: Explain | None = None) -> Verdict:
    """The verdict on an answer.  explain: None lets an exception of the answer go on to the caller."""
    answer = guarded(answer, exercise.answer, explain)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            for law in exercise.laws:
                if (said := law(answer)) is not None:
                    return _broken(exercise, answer, f"it breaks the law \"{claim(law)}\": {said}")
        except Fault as fault:
            return Verdict(fault.kind, str(fault))
        except Exception as error:                          # of what the answer returned, in the law or in a method
            if explain is None:
                raise
            return Verdict(FAULT, str(explain(error, "")))
    laws = "the one law holds" if len(exercise.laws) == 1 else f"all {len(exercise.laws)} laws hold"
    return Verdict(KEPT, f"kept: {laws}")


def _broken(exercise: Exercise, answer: Callable, said: str) -> Verdict:
    """The verdict of an answer that breaks a law: the name of its bug, if it is known."""
    try:
        results = exercise.probe(answer)
        if not exercise.same(results, exercise.probe(answer)):
            return Verdict(BROKEN, "it gives other results when it is called again with the same arguments: it draws "
                                   "random numbers of its own, or keeps something between calls")
    except Exception:                                       # at other arguments than the law's; the law says more
        return Verdict(BROKEN, said)
    for wrong, wrong_results in zip(exercise.wrong, _of_the_wrong(exercise), strict=True):
        if exercise.same(results, wrong_results):
            return Verdict(BUG, f"{wrong.bug} ({said})")
    return Verdict(BROKEN, said)


@functools.cache
def _of_the_wrong(exercise: Exercise) -> list:
    """The results of the known wrong answers."""
    return [exercise.probe(wrong.answer) for wrong in exercise.wrong]


# ---- the answer's calls ------------------------------------------------------------------------------------

def guarded(answer: Callable, name: str, explain: Explain | None) -> Callable:
    """The answer, whose exceptions become Faults, and which must leave its arguments as they are.  Functions that it
    returns, alone or in a tuple, are guarded, too."""
    @functools.wraps(answer, updated=())
    def call(*args, **named):
        before = copy.deepcopy((args, named))
        try:
            result = answer(*args, **named)
        except (Fault, KeyboardInterrupt):
            raise
        except BaseException as error:                      # SystemExit, too
            if explain is None:
                raise
            raise explain(error, _call(name, before)) from error
        where = _changed((args, named), before)
        if where:
            raise Fault(f"{_call(name, before)} changed {where}: compute with a copy, since the caller goes on to use "
                        "its own array")
        if isinstance(result, tuple):
            return tuple(guarded(item, f"what {name} returned", explain) if _is_function(item) else item
                         for item in result)
        return guarded(result, f"what {name} returned", explain) if _is_function(result) else result
    return call


def _is_function(value) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def _call(name: str, arguments: tuple) -> str:
    args, named = arguments
    inside = ", ".join([described(a) for a in args] + [f"{key}={described(a)}" for key, a in named.items()])
    return f"{name}({inside})"


def _changed(after, before) -> str:
    """Which argument changed, in words; "" where none did."""
    args, named = after
    for number, (a, b) in enumerate(zip(args, before[0], strict=True), 1):
        if not _same(a, b):
            return f"its argument {number}"
    for key, a in named.items():
        if not _same(a, before[1][key]):
            return f"its argument {key}"
    return ""


def _same(a, b) -> bool:
    """Whether an argument is as it was; only arrays, lists, tuples and dicts are looked at."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return not isinstance(a, (int, float, str)) or a == b or a != a
