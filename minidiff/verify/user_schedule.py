"""The user's own schedule: betas or alpha_bar from a file, or what a Python function returns.

    betas.npy     one array (T,)
    betas.csv     one number a line, or all in one line; a first line without numbers is a header
    betas.json    [0.0001, ...], or {"betas": [0.0001, ...]}

Input that cannot be a schedule is refused in one sentence (UserError) that names the entry. A schedule that keeps
signal to its end is accepted: `report` says so among the laws.
"""

import io
import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidiff.diffusion.schedules import Schedule, from_betas
from minidiff.errors import UserError, user_code
from minidiff.input_files import read_file
from minidiff.verify.loading import load_named

LARGEST_FILE = 4 << 20                                      # bytes
MOST_TIMES = 100_000
NAMES = {type(None): "null", bool: "a truth value", str: "a string", dict: "an object"}       # in JSON


class UserSchedule(NamedTuple):
    """The schedule, in words where it came from, and the betas (T,) that it was made from, if it was."""

    schedule: Schedule
    description: str
    betas: np.ndarray | None = None


def from_file(path: str | os.PathLike, key: str) -> UserSchedule:
    """The schedule of a file. key: what its numbers are, "betas" or "alpha_bar"."""
    shown = ascii(os.fspath(path))
    readers = {".npy": _npy, ".csv": _csv, ".txt": _csv, ".json": _json}
    if (suffix := Path(path).suffix.lower()) not in readers:
        raise UserError(f"{shown} takes one of the endings {', '.join(readers)}")
    data = read_file(path, LARGEST_FILE, f": a table has at most {MOST_TIMES:,} numbers")
    try:
        if not data.strip():
            raise UserError("the file is empty, and at least one number is taken")
        numbers, how = readers[suffix](data, key)
        return _user_schedule(numbers, key, Path(path).name, f"{key} from {shown}: {how}")
    except ValueError as error:                             # UserError as well; add the file's name
        raise UserError(f"{shown}: {error}") from error


def from_function(spec: str) -> UserSchedule:
    """The schedule that `module:function` makes: function() returns betas (T,), or a Schedule of minidiff's.

    The module is also searched in the current folder, as by `python -m`. Its code is run.
    """
    function = load_named(spec, "--python")
    if not callable(function):
        raise UserError(f"{spec} is of the type {type(function).__name__}, and --python takes a function")
    with user_code(f"{spec}() raised"):
        result = function()
    if isinstance(result, Schedule):
        return UserSchedule(_consistent(result, spec), f"the schedule {ascii(str(result.name))} from {spec}()")
    with user_code(f"{spec}() returned what is no array"):
        numbers = _array(result)
    _check_returned(spec, result, numbers)
    try:
        return _user_schedule(numbers, "betas", spec, f"betas from {spec}()")
    except ValueError as error:
        raise UserError(f"{spec}(): {error}") from error


def notes(schedule: Schedule) -> list[str]:
    """Remarks on what is allowed but unusual, one sentence each."""
    # a beta computed from the table has an error of about eps
    falls = np.flatnonzero(np.diff(schedule.betas) < -1e-12) + 1
    if not falls.size:
        return []
    t = falls[0]
    return [f"betas fall at t = {t}, from {schedule.betas[t - 1]:.6g} to {schedule.betas[t]:.6g}"
            + (f", and at {falls.size - 1} more times" if falls.size > 1 else "")
            + ": lawful, since alpha_bar still falls, but unusual"]


# ---- files -------------------------------------------------------------------------------------------------


def _npy(data: bytes, key: str) -> tuple[np.ndarray, str]:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(file)
    except Exception as error:                              # a damaged header may raise anything
        raise UserError("it is no .npy file that numpy.save wrote") from error
    if dtype.kind not in "fiu" or len(shape) != 1:
        what = "pickled objects" if dtype.hasobject else f"an array of {dtype}, shape {shape}"
        raise UserError(f"it holds {what}, and numbers of shape (T,) are taken")
    if shape[0] < 0:
        raise UserError(f"its header promises {shape[0]} numbers")
    if shape[0] > MOST_TIMES:
        raise UserError(_too_many(shape[0]))
    if len(data) - file.tell() < shape[0] * dtype.itemsize:
        raise UserError(f"it ends before the {shape[0]} numbers that its header promises")
    array = np.frombuffer(data, dtype, shape[0], file.tell())
    return array, f"{shape[0]} numbers of dtype {dtype}"


def _csv(data: bytes, key: str) -> tuple[np.ndarray, str]:
    lines = ((i, line.strip().rstrip(",;")) for i, line in enumerate(_text(data).splitlines(), start=1))
    lines = list(islice(((i, line) for i, line in lines if line), MOST_TIMES + 2))      # 2: a header, and one too many
    header = ""
    if lines and not any(map(_is_number, _cells(lines[0][1]))):
        header = f", after the header {ascii(lines[0][1][:40])}"
        lines = lines[1:]
    numbers = []
    for i, line in lines:
        cells = _cells(line)
        if len(lines) > 1 and len(cells) > 1:
            if all(re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", line) for _, line in lines):
                raise UserError(f"line {i} holds {ascii(line[:40])}: is that a decimal comma? A point is taken, as in "
                                f"0.02")
            raise UserError(f"line {i} holds {len(cells)} values: one column of {key} is taken, a number a line, or "
                            f"all in one line")
        for cell in cells:
            if not _is_number(cell):
                raise UserError(f"line {i} holds {ascii(cell[:40])}, which is no number")
            numbers.append(float(cell))
            if len(numbers) > MOST_TIMES:
                raise UserError(f"it holds more than {MOST_TIMES:,} numbers, the most that are taken")
    return np.array(numbers), f"{len(numbers)} numbers, {'in one line' if len(lines) == 1 else 'one a line'}{header}"


def _json(data: bytes, key: str) -> tuple[np.ndarray, str]:
    try:
        value = json.loads(_text(data))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"it is no JSON ({error})") from error
    except ValueError as error:                             # an integer with more digits than Python reads
        raise UserError("it holds an integer too large for a float") from error
    where = "a list"
    if isinstance(value, dict):
        if key not in value:
            raise UserError(f'it is an object without "{key}": [numbers] is taken, or {{"{key}": [numbers]}}')
        value, where = value[key], f'the list "{key}"'
    if not isinstance(value, list):
        raise UserError(f'it holds {NAMES.get(type(value), "a number")}: [numbers] is taken, or {{"{key}": [numbers]}}')
    for i, entry in enumerate(value):
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise UserError(f"{key}[{i}] is {ascii(entry)[:40]}, which is no number")
    try:
        return np.array(value, dtype=np.float64), f"{where} of {len(value)} numbers"
    except OverflowError as error:
        raise UserError("it holds an integer too large for a float") from error


# ---- numbers -----------------------------------------------------------------------------------------------


def _user_schedule(numbers: np.ndarray, key: str, name: str, description: str) -> UserSchedule:
    """Raises ValueError, in a sentence that names the entry."""
    if numbers.size == 0:
        raise UserError("it holds no number, and at least one is taken: T = 0 is no schedule")
    if numbers.size > MOST_TIMES:
        raise UserError(_too_many(numbers.size))
    with np.errstate(invalid="ignore"):                     # a NaN is refused below, in a sentence
        numbers = np.array(numbers, np.float64)             # a copy, with which `report` compares the table
    if key == "alpha_bar":
        return UserSchedule(Schedule(numbers, name), description)
    return UserSchedule(from_betas(numbers, name, allow_signal=True), description, numbers)


def _consistent(schedule: Schedule, spec: str) -> Schedule:
    """The schedule; UserError if its parts contradict each other, as those of a subclass may."""
    with user_code(f"{spec}() returned a Schedule that is inconsistent"):
        table = Schedule(schedule.alpha_bar, str(schedule.name)).alpha_bar
        t = np.arange(-1, len(table))
        if schedule.T != len(table) or not np.array_equal(schedule.abar(t), np.append(1.0, table)):
            raise UserError(f"{spec}() returned a Schedule whose T and abar do not belong to its table alpha_bar")
        if np.shape(schedule.betas) != table.shape:
            raise UserError(f"{spec}() returned a Schedule whose betas are not T numbers")
    return schedule


def _check_returned(spec: str, result, numbers: np.ndarray) -> None:
    if numbers.dtype.kind not in "fiu" or numbers.ndim != 1:
        what = f"an array of {numbers.dtype}, shape {numbers.shape}" if numbers.dtype.kind in "fiucbSU" else \
            f"a {type(result).__name__} that is not all numbers"
        raise UserError(f"{spec}() must return betas, numbers of shape (T,), or a minidiff Schedule, "
                        f"and returned {what}")


def _array(result) -> np.ndarray:
    try:
        return np.asarray(result)
    except ValueError:                                      # a ragged list
        return np.asarray(None)


def _too_many(count: int) -> str:
    return f"it holds {count:,} numbers, and at most {MOST_TIMES:,} are taken"


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("it is no text in UTF-8") from error


def _cells(line: str) -> list[str]:
    return line.replace(";", ",").replace(",", " ").split()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
