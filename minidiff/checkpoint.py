"""Checkpoints: arrays and their configuration in one file, which is written completely or not at all.

The file is in the format safetensors: 8 bytes with the length of the header, a JSON header with each array's type,
shape and position, then the arrays.  The configuration is JSON text in that header, under the key "minidiff":

    {"version": 1, "meta": {...}}

The file holds no code, and nothing is unpickled.  A file may come from a stranger: `load` checks it and raises a
UserError for every file that is not exactly in this form.  `read_header` reads what stands before the arrays, so that a
file can be refused before memory is taken for them.  `CheckpointFolder` keeps the last few checkpoints of a run,
and finds the newest complete one after the run was interrupted.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minidiff.checks import whole
from minidiff.errors import UserError
from minidiff.files import check_writable, remove_abandoned, write_whole
from minidiff.input_files import open_file, parse_json

__all__ = ["Checkpoint", "CheckpointFolder", "Header", "check_shapes", "load", "read_header", "save"]

VERSION = 1
KEY = "minidiff"
MAX_HEADER = 2 << 20                                        # bytes; a model of 10,000 arrays needs about 1 MB
MOST_AXES = 32                                              # of an array
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}    # the types that NumPy has too


@dataclass(frozen=True)
class Checkpoint:
    """tensors: name -> array, writable; meta: the JSON dict given to `save`; path: the file that holds both."""

    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path


class Entry(NamedTuple):
    """An array in a header."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Header:
    """A file without its arrays: their shapes and dtypes, in the order of their bytes, which fill the file exactly."""

    arrays: dict[str, Entry]
    meta: dict[str, Any]
    path: Path


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes arrays and their configuration to `path`, completely or not at all; equal input gives equal bytes.

    meta: a dict with str keys that JSON can represent (tuples are read back as lists).  Raises UserError, and keeps an
    older file, if the disk is full or read-only, or an array holds NaN or infinity, since a run could not continue from
    such a checkpoint.  Raises TypeError or ValueError for what a checkpoint cannot hold, or `load` not give back.
    """
    from safetensors.numpy import save as to_bytes

    header = _as_json(meta)
    # not ascontiguousarray, which gives a scalar a dimension
    _check_names(tensors)
    arrays = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    _check_savable(path, arrays)
    # one key only: safetensors writes several in a random order
    data = to_bytes(arrays, metadata={KEY: header})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise TypeError(f"meta and the arrays' names take more than {MAX_HEADER} bytes, the most that `load` reads.")
    write_whole(path, data)


def load(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`.  Raises UserError, which names the file and what is wrong with it."""
    path = Path(path)
    with _errors_name(path), open_file(path) as file:
        header = _header(path, file)
        tensors = {name: np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
                   for name, (shape, dtype) in header.arrays.items()}
        _check_finite(path, tensors, "is not a usable checkpoint")
    return Checkpoint(tensors, header.meta, path)


def read_header(path: str | os.PathLike) -> Header:
    """The header of the checkpoint at `path`, whose arrays are not read.  Raises UserError as `load` does."""
    path = Path(path)
    with _errors_name(path), open_file(path) as file:
        return _header(path, file)


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray | Entry], path: Any) -> None:
    """UserError unless tensors and expected have the same names and shapes.

    The error names `path` and the first array that is missing, has another shape, or is not expected.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name!r} of shape {tuple(shape)} that this model has.")
        if tensors[name].shape != tuple(shape):
            found = tensors[name].shape
            raise UserError(f"{path} holds the tensor {name!r} in shape {found}; this model takes {tuple(shape)}.")
    for name in tensors:
        if name not in expected:
            found = tensors[name].shape
            raise UserError(f"{path} holds the tensor {name!r} of shape {found} that this model does not have.")


# --- the checkpoints of one run -------------------------------------------------------------------------------

class CheckpointFolder:
    """The last `keep` checkpoints of one run, in files folder/step-000123.safetensors.

    One process may write while any number of processes read.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        self.folder = Path(folder)
        self.keep = whole("keep", keep, 1)

    def prepare(self, step: int = 0) -> None:
        """Creates the folder and checks that step's checkpoint can be saved in it.  Call it before the work.

        It removes temporary files of interrupted runs, and, with a warning, damaged checkpoints beyond `step`.  It
        raises UserError if the folder is not writable or holds a complete checkpoint beyond `step`: that one belongs to
        another run, and `latest` would return it in place of this run's.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder {self.folder} cannot take checkpoints ({error.strerror}).") from error
        remove_abandoned(self.folder)
        for newer, path in self._files():
            if newer > step:
                try:
                    read_header(path)
                except UserError as error:
                    self._remove(path)
                    warnings.warn(f"Removed a broken checkpoint: {error}", stacklevel=2)
                else:
                    raise UserError(f"The folder {self.folder} holds {path.name} of an earlier run, beyond step "
                                    f"{step}: resume that run or choose another folder.")
        check_writable(self._path(step))

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Writes step's checkpoint, with meta["step"] = step, then removes the oldest ones beyond `keep`."""
        step = whole("step", step, 0)
        self.prepare(step)
        path = self._path(step)
        save(path, tensors, {**meta, "step": step})
        for _, old in self._files()[self.keep:]:
            with suppress(OSError):                         # one too many does no harm
                old.unlink(missing_ok=True)
        return path

    def keep_newest(self) -> None:
        """Removes all checkpoints but the newest complete one, to make room."""
        newest = self.latest()
        for _, path in self._files():
            if newest and path != newest.path:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def holds_any(self) -> bool:
        """Whether there is a file named as a checkpoint, damaged or not."""
        return bool(self._files())

    def latest(self, check: Callable[[Header], None] | None = None) -> Checkpoint | None:
        """The newest complete checkpoint, or None.  It skips damaged ones with a warning, and changes no file.

        check: is called with its header, before its arrays are read; what it raises ends the search.
        """
        while True:
            for _, path in self._files():
                if header := self._tried(read_header, path):
                    if check:
                        check(header)
                    if saved := self._tried(load, path):
                        return saved
                if not os.path.lexists(path):               # the writer has saved a newer one and removed this one
                    break
            else:
                return None

    def _tried(self, read: Callable[[Path], Any], path: Path) -> Any:
        """What `read` makes of a file; None, with a warning, where it is damaged."""
        try:
            return read(path)
        except UserError as error:
            if os.path.lexists(path):
                warnings.warn(f"Skipped a broken checkpoint: {error}", stacklevel=3)
            return None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:                            # a folder of this name
            raise UserError(f"The folder {self.folder} cannot take checkpoints: {path.name} in it is no file, and "
                            "cannot be removed.") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def _files(self) -> list[tuple[int, Path]]:
        """(step, path) of each file that is named as a checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        named = ((re.fullmatch(r"step-([0-9]{6,})\.safetensors", p.name), p) for p in self.folder.iterdir())
        return sorted(((int(match[1]), p) for match, p in named if match), reverse=True)


# --- checks of what is to be saved, and of files from unknown sources -------------------------------------------

def _as_json(meta: Mapping[str, Any]) -> str:
    try:
        _check_keys(dict(meta))
        return json.dumps({"version": VERSION, "meta": dict(meta)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"meta takes what JSON can hold ({error}).") from None


def _check_keys(value: Any) -> None:
    """TypeError for a key that would be read back as another."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key must be a str, not {str(key)[:40]}")
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else ():
        _check_keys(part)


def _check_names(tensors: Mapping[str, np.ndarray]) -> None:
    for name, a in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError("a tensor's name must be a str other than '__metadata__', which names the header's own "
                            f"part, not {ascii(name)[:40]}")
        name.encode()                                       # UnicodeEncodeError: a surrogate, which UTF-8 cannot hold
        if isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"tensors[{name[:80]!r}] is a masked array, whose mask would be lost: fill it first")


def _check_savable(path: Any, arrays: Mapping[str, np.ndarray]) -> None:
    for name, a in arrays.items():
        if a.dtype.kind not in "fiub" or a.dtype.itemsize > 8:
            raise TypeError(f"tensors[{name!r}] is {a.dtype}; it takes floats, whole numbers or bools.")
    _check_finite(path, arrays, "was not written")


def _check_finite(path: Any, tensors: Mapping[str, np.ndarray], verdict: str) -> None:
    for name, a in tensors.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise UserError(f"{path} {verdict}: the tensor {name!r} holds NaN or infinity.")


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turns every error of reading the file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}).") from error
    except MemoryError as error:
        raise UserError(f"{path} holds more than the memory can.") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is cut short or damaged ({ascii(str(error))[1:-1][:200]}).") from error


def _header(path: Path, file: BinaryIO) -> Header:
    """The header of an open file, which is left at the first array."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise UserError(f"{path} is cut short or not a safetensors file (its start announces a header of {length} "
                        f"bytes in a file of {size}).")
    if length > MAX_HEADER:
        raise UserError(f"{path} has a header of {length} bytes; at most {MAX_HEADER} are read.")
    header = _parse(path, file.read(length), "header")
    meta = _checked_meta(path, header.pop("__metadata__", None))
    return Header(_checked_arrays(path, header, size - 8 - length), meta, path)


def _checked_meta(path: Path, metadata: Any) -> dict[str, Any]:
    """The configuration in a header."""
    inner = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(inner, str):
        raise UserError(f"{path} is not a checkpoint of minidiff: its header has no {KEY!r} configuration.")
    outer = _parse(path, inner, "configuration")
    version = outer.get("version")
    if type(version) is not int or version < 1:
        raise UserError(f"{path} is not a checkpoint of minidiff: its configuration has no version number.")
    if version > VERSION:
        raise UserError(f"{path} has format version {str(version)[:20]}; this minidiff reads up to {VERSION}: install "
                        "a newer one.")
    if not isinstance(outer.get("meta"), dict):
        raise UserError(f"{path} is not a checkpoint of minidiff: its configuration has no 'meta' dict.")
    return outer["meta"]


def _checked_arrays(path: Path, header: Mapping[str, Any], room: int) -> dict[str, Entry]:
    """The arrays of a header, which must fill the `room` bytes after it, one after another and without a gap."""
    found, position = [], 0
    for name, entry in header.items():
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise UserError(f"{path} holds the tensor {name[:80]!r} as {str(kind)[:20]!r}, a type that minidiff does "
                            "not read.")
        if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, start, end)):
            raise ValueError(f"the tensor {name[:80]!r} has an impossible shape or position")
        found.append((start, end, name, Entry(tuple(shape), np.dtype(DTYPES[kind]))))
    found.sort(key=lambda a: a[:3])
    for start, end, name, (shape, dtype) in found:
        if start != position or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name[:80]!r} does not fill its place")
        position = end
    if position != room:
        raise ValueError(f"its tensors have {position} bytes, and {room} follow its header")
    return {name: entry for _, _, name, entry in found}


def _parse(path: Path, text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not a checkpoint: its {what} is not JSON.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a checkpoint: its {what} is a JSON {type(value).__name__}, not a dict.")
    return value
