"""Runs a learner's file against its exercise.  Whatever the file does becomes a verdict of one sentence.

process.py starts it as a program of its own:  python -m minidiff.course.learner NAME FILE SECONDS VERDICT
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import types
import warnings
from contextlib import suppress
from pathlib import Path
from traceback import extract_tb

from minidiff.course.compare import described
from minidiff.course.exercise import Exercise, exercise
from minidiff.course.judge import OPEN, Fault, Verdict, guarded, judge
from minidiff.errors import UserError, brief
from minidiff.input_files import read_file

MOST_BYTES = 1 << 20                                        # of a learner's file
MOST_MEMORY = 4 << 30                                       # bytes of address space, NumPy's included


def verdict_on(path: Path, of: Exercise) -> Verdict:
    """The verdict on a file.  Its code is run, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return judge(of, _answer(path, of), lambda *what: _explained(path, of, *what))
        except Fault as fault:
            return Verdict(fault.kind, str(fault))


def _answer(path: Path, of: Exercise):
    """What the file defines under the exercise's name."""
    try:
        text = read_file(path, MOST_BYTES)
        if not text.strip():
            raise Fault(f"{path.name} is empty: was it saved?")
        code = compile(text, str(path), "exec")
    except UserError as error:
        raise Fault(str(error)) from error
    except SyntaxError as error:
        text = f" (`{error.text.strip()[:60]}`)" if error.text and error.text.strip() else ""
        raise Fault(f"{path.name}, line {error.lineno or 1}, is not Python: {error.msg}{text}") from error
    except (ValueError, RecursionError, MemoryError) as error:                         # a NUL, or nested too deeply
        raise Fault(f"{path.name} is not Python: {brief(error)}") from error
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module                         # dataclasses and pickle look it up
    run = guarded(lambda: exec(code, module.__dict__), path.name,
                  lambda error, *_: _explained(path, of, error, "", {}))
    run()
    answer = module.__dict__.get(of.answer)
    if answer is None:
        raise Fault(f"{path.name} has no {of.answer}: keep the name that the exercise gave it")
    if not callable(answer):
        raise Fault(f"{of.answer} in {path.name} should be a function or a class, and is {described(answer)}")
    return answer


def _explained(path: Path, of: Exercise, error: BaseException, call: str, arguments: dict) -> Fault:
    """An exception in one sentence, with its line of the learner's file."""
    frames = [frame for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, NotImplementedError) and frames:
        return Fault(f"not written yet: the hole is at line {frames[-1].lineno} of {path.name}", OPEN)
    if not frames:                                          # a law could not compute with what the answer returned
        return Fault(f"a law cannot compute with it: {brief(error)}")
    where = f"{path.name}, line {frames[-1].lineno}"
    text = f" (`{frames[-1].line[:60]}`)" if frames[-1].line else ""
    during = f", in {call}" if call else ""
    if isinstance(error, SystemExit):
        return Fault(f"{where}{text} ends the program{during}: return a result instead")
    if isinstance(error, MemoryError):
        return Fault(f"{where}{text} asks for more memory than there is{during}: {brief(error)}")
    root = ""
    if type(error) is ValueError and str(error).startswith(("math domain", "expected a nonneg", "expected a positive")):
        root = ": it is the square root or the logarithm of a negative number" + (
            f"; {of.if_nan(arguments)}" if of.if_nan and arguments else "")
    return Fault(f"{where}{text} raises {brief(error)}{during}{root}")


# ---- as a program ------------------------------------------------------------------------------------------

def main(name: str, file: str, seconds: str, verdict: str) -> None:
    """Writes the verdict on `file` into the file `verdict`, and where the code was, if time is up, beside it."""
    path = Path(file)
    of = exercise(name)
    _limit_memory()
    sys.path.append(str(path.parent))                       # for files beside it; behind all others, which it may name
    with open(verdict + ".late", "w", encoding="utf-8") as late:
        faulthandler.dump_traceback_later(float(seconds), file=late, exit=True)
        found = verdict_on(path, of)
        faulthandler.cancel_dump_traceback_later()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    Path(verdict).write_text(json.dumps([found.kind, found.sentence]), encoding="utf-8")
    os._exit(0)                                             # whatever the file has started or registered


def _limit_memory() -> None:
    """So that a huge array is refused, and does not take the memory of the whole machine."""
    with suppress(ImportError, ValueError, OSError):        # Windows has no such limit, and macOS ignores it
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY if hard < 0 else min(MOST_MEMORY, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def late_at(text: str, path: Path) -> str:
    """Where the code was when its time was up, in words, from what faulthandler wrote; "" where it does not say."""
    for line in text.splitlines():
        if line.strip().startswith(f'File "{path}", line '):
            return f"line {line.split(', line ')[1].split(' ')[0]}"
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
