"""An answer against its exercise: it is right, or breaks a law, at which numbers, or has a known bug.

    verdict = judge(exercise("ex01_q_sample"), answer)
    verdict.right, verdict.sentence
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff.course.compare import NAN, Form, described
from minidiff.course.exercise import Exercise, claim

NUMBERS = (int, float, complex, np.number, np.ndarray)
RIGHT, OPEN, BROKEN, BUG, FAULT = "right", "open", "broken", "bug", "fault"


@dataclass(frozen=True)
class Verdict:
    """kind: right; open (the hole is there); broken (a law); bug (a known one); fault (the answer could not be judged).

    sentence: what the learner reads, without the exercise's name.
    """

    kind: str
    sentence: str

    @property
    def right(self) -> bool:
        return self.kind == RIGHT


class Fault(Exception):
    """An answer cannot be judged, for a reason that stands in one sentence; kind: of the verdict."""

    def __init__(self, sentence: str, kind: str = FAULT):
        super().__init__(sentence)
        self.kind = kind


# an exception that an answer raised, the words for its call, and the call's arguments by name
Explain = Callable[[BaseException, str, dict], Fault]


def judge(exercise: Exercise, answer: Callable, explain: Explain | None = None) -> Verdict:
    """The verdict on an answer.  explain: None lets an exception of the answer go on to the caller."""
    answer = guarded(answer, exercise.answer, explain, tuple(inspect.signature(exercise.solution).parameters))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            for law in exercise.laws:
                if (said := law(answer)) is not None:
                    if isinstance(said, Form) or NAN in said and answer.returned is None:
                        return _broken(exercise, answer, _nothing(exercise, answer) or said)
                    return _broken(exercise, answer, f"it breaks the law \"{claim(law)}\": {said}")
        except Fault as fault:
            return Verdict(fault.kind, str(fault))
        except Exception as error:                          # of what the answer returned, in the law or in a method
            if explain is None:
                raise
            return Verdict(BROKEN, said) if (said := _nothing(exercise, answer) or _no_number(exercise, answer)) \
                else Verdict(FAULT, f"{exercise.answer} returned {described(answer.returned)}: "
                                    f"{explain(error, '', {})}")
    laws = "the one law holds" if len(exercise.laws) == 1 else f"all {len(exercise.laws)} laws hold"
    return Verdict(RIGHT, f"right: {laws}")


def _nothing(exercise: Exercise, answer: Callable) -> str:
    """The sentence for an answer whose last result was None; "" for another."""
    return "" if answer.returned is not None else \
        f"{_call(exercise.answer, answer.arguments)} returned None: is a `return` missing, or inside an `if`?"


def _no_number(exercise: Exercise, answer: Callable) -> str:
    """The sentence for a last result, such as a text, where the solution has a number or an array; "" for another."""
    args, named = answer.arguments
    if answer.returned is ... or isinstance(answer.returned, NUMBERS):
        return ""
    try:
        right = exercise.solution(*copy.deepcopy(args), **copy.deepcopy(named))
    except Exception:                                       # the last call was of another function
        return ""
    if not isinstance(right, NUMBERS):
        return ""
    return f"{_call(exercise.answer, answer.arguments)} returned {described(answer.returned)} where " \
           f"{'an array' if np.ndim(right) else 'a number'} is expected"


def _broken(exercise: Exercise, answer: Callable, said: str) -> Verdict:
    """The verdict of an answer that breaks a law: the name of its bug, if it is known."""
    hint = exercise.if_nan(_named(exercise, answer.arguments)) if exercise.if_nan and NAN in said else ""
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
    return Verdict(BROKEN, f"{said}; {hint}" if hint else said)


def _named(exercise: Exercise, arguments: tuple) -> dict:
    """The arguments of a call by name."""
    return dict(zip(inspect.signature(exercise.solution).parameters, arguments[0], strict=False)) | arguments[1]


@functools.cache
def _of_the_wrong(exercise: Exercise) -> list:
    """The results of the known wrong answers."""
    return [exercise.probe(wrong.answer) for wrong in exercise.wrong]


# ---- the answer's calls ------------------------------------------------------------------------------------

def guarded(answer: Callable, name: str, explain: Explain | None, parameters: tuple[str, ...] = ()) -> Callable:
    """The answer, whose exceptions become Faults, and which must leave its arguments as they are.  Functions that it
    returns, alone or in a tuple, are guarded, too.  parameters: the names of its arguments.

    The last result is its attribute `returned`, from a copy of the `arguments`, (args, named)."""
    @functools.wraps(answer, updated=())
    def call(*args, **named):
        if explain is not None and parameters and not _takes(answer, args, named):
            raise Fault(f"{name} is called with ({', '.join(parameters)}): keep these parameters, and give any that "
                        "you add a default")
        before = copy.deepcopy((args, named))
        try:
            result = answer(*args, **named)
        except (Fault, KeyboardInterrupt):
            raise
        except BaseException as error:                      # SystemExit, too
            if explain is None:
                raise
            raise explain(error, _call(name, before), dict(zip(parameters, before[0], strict=False)) | before[1]) \
                from error
        call.returned, call.arguments = result, before
        if inspect.isgenerator(result):
            raise Fault(f"{_call(name, before)} returned a generator: use `return` in place of `yield`")
        where = _changed((args, named), before, parameters)
        if where:
            raise Fault(f"{_call(name, before)} changed {where}: compute with a copy, since the caller goes on to use "
                        "its own array")
        if isinstance(result, tuple):
            return tuple(guarded(item, f"what {name} returned", explain) if _is_function(item) else item
                         for item in result)
        return guarded(result, f"what {name} returned", explain) if _is_function(result) else result
    call.returned, call.arguments = ..., ((), {})           # nothing yet
    return call


def _takes(answer: Callable, args: tuple, named: dict) -> bool:
    """Whether a function can be called so; True where Python cannot tell."""
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*args, **named)
    except TypeError:
        return False
    return True


def _is_function(value) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def _call(name: str, arguments: tuple) -> str:
    args, named = arguments
    inside = ", ".join([described(a) for a in args] + [f"{key}={described(a)}" for key, a in named.items()])
    return f"{name}({inside})"


def _changed(after, before, parameters) -> str:
    """Which argument changed, in words; "" where none did."""
    args, named = after
    for number, (a, b) in enumerate(zip(args, before[0], strict=True), 1):
        if not _same(a, b):
            return f"its argument {parameters[number - 1] if number <= len(parameters) else number}"
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
