"""Checkpoints: arrays and their configuration in one file, that is whole whenever it is there at all.

The file is safetensors: 8 bytes of header length, a JSON header with each array's type, shape and place, then
the arrays. The configuration is JSON text in that header, under the key "minidiff":

    {"version": 1, "meta": {...}}

Nothing in it is code, and nothing is ever unpickled. What is read may come from a stranger: `load` refuses,
in a sentence, whatever is not exactly such a file. `CheckpointFolder` holds the last few of a run, and finds the newest
whole one after a run was killed.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minidiff.errors import UserError
from minidiff.files import check_writable, is_temporary, write_whole

__all__ = ["Checkpoint", "CheckpointFolder", "check_shapes", "load", "save"]

VERSION = 1
KEY = "minidiff"
MAX_HEADER = 16 << 20  # bytes; a model of 10,000 arrays needs about 1 MB
DTYPES = "F64 F32 F16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split()  # those of safetensors that NumPy has too


@dataclass(frozen=True)
class Checkpoint:
    """tensors: name -> array, writable; meta: the JSON dict given to `save`; path: the file of both."""

    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes arrays and their configuration to `path`, whole or not at all; equal input gives equal bytes.

    meta: what JSON can hold, with str keys (tuples come back as lists). Raises UserError, with the older file
    intact, where the disk refuses (full, read-only) or an array holds NaN or infinity: a checkpoint is what
    one returns to. Raises TypeError for what a checkpoint cannot hold.
    """
    from safetensors.numpy import save as to_bytes

    try:
        header = json.dumps({"version": VERSION, "meta": dict(meta)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta takes what JSON can hold ({error}).") from None
    arrays = {}
    for name, a in tensors.items():
        a = np.asarray(a, order="C")  # not ascontiguousarray, which gives a scalar a dimension
        if a.dtype.kind not in "fiub" or a.dtype.itemsize > 8:
            raise TypeError(f"tensors[{name!r}] is {a.dtype}; it takes floats, whole numbers or bools.")
        arrays[name] = a
    _check_finite(path, arrays, "was not written")
    # one key only: safetensors writes several in a random order
    write_whole(path, to_bytes(arrays, metadata={KEY: header}))


def load(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`. Raises UserError, naming the file and what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a checkpoint in it, such as step-001000.safetensors.")
        if not path.is_file():
            raise UserError(f"{path} is not there.")
        with open(path, "rb") as file:
            start = _read_header(path, file)
            header = _parse(path, start[8:], "header")
            meta = _meta(path, header)
            _check_dtypes(path, header)
            tensors = from_bytes(start + file.read())  # safetensors checks shapes, places and gaps
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}).") from error
    except (SafetensorError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is cut short or damaged ({ascii(str(error))[1:-1][:200]}).") from error
    _check_finite(path, tensors, "is not a usable checkpoint")
    return Checkpoint(tensors, meta, path)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray], path: Any
) -> None:
    """UserError naming the first array that `path` lacks, holds in another shape, or has too many."""
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name!r} of shape {tuple(shape)} that this model has.")
        if tensors[name].shape != tuple(shape):
            found = tensors[name].shape
            raise UserError(
                f"{path} holds the tensor {name!r} in shape {found}; this model takes {tuple(shape)}."
            )
    for name in tensors:
        if name not in expected:
            found = tensors[name].shape
            raise UserError(
                f"{path} holds the tensor {name!r} of shape {found} that this model does not have."
            )


class CheckpointFolder:
    """The last `keep` checkpoints of one run, as folder/step-000123.safetensors. One writer, any readers."""

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep is {keep}; it takes at least 1.")
        self.folder = Path(folder)
        self.keep = keep

    def prepare(self, step: int = 0) -> None:
        """Makes the folder; UserError unless `step` can be saved in it. Call it before the work.

        Removes what killed runs left half-written. A newer whole checkpoint is refused, since it belongs to
        another run and `latest` would return it in place of this one's; a newer broken one is removed aloud.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if is_temporary(path, "step-"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {self.folder} cannot take checkpoints ({error.strerror})."
            ) from error
        for newer, path in self._files():
            if newer > step:
                try:
                    load(path)
                except UserError as error:
                    warnings.warn(f"Removed a broken checkpoint: {error}", stacklevel=2)
                    path.unlink(missing_ok=True)
                else:
                    raise UserError(
                        f"The folder {self.folder} holds {path.name} of an earlier run, beyond step {step}: "
                        "resume that run or choose another folder."
                    )
        check_writable(self._path(step))

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Writes step's checkpoint, with meta["step"] = step, then removes the older ones beyond `keep`."""
        self.prepare(step)
        path = self._path(step)
        save(path, tensors, {**meta, "step": step})
        for _, old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. A broken one is passed over aloud; no file is changed."""
        for _, path in self._files():
            try:
                return load(path)
            except UserError as error:
                if not path.exists():  # the writer saved a newer one and removed this one meanwhile
                    return self.latest()
                warnings.warn(f"Passed over a broken checkpoint: {error}", stacklevel=2)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def _files(self) -> list[tuple[int, Path]]:
        """(step, path) of each file named as a checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        named = ((re.fullmatch(r"step-([0-9]{6,})\.safetensors", p.name), p) for p in self.folder.iterdir())
        return sorted(((int(match[1]), p) for match, p in named if match), reverse=True)


def _read_header(path: Path, file: BinaryIO) -> bytes:
    """The length and the header, after checking that a file of this size can hold them."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise UserError(
            f"{path} is cut short or not a safetensors file "
            f"(its start announces a header of {length} bytes in a file of {size})."
        )
    if length > MAX_HEADER:
        raise UserError(f"{path} has a header of {length} bytes; at most {MAX_HEADER} are read.")
    return start + file.read(length)


def _parse(path: Path, text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint: its {what} is not JSON.") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} is not a checkpoint: its {what} is a JSON {type(value).__name__}, not a dict."
        )
    return value


def _meta(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{path} is not a checkpoint of minidiff: its header has no {KEY!r} configuration.")
    outer = _parse(path, text, "configuration")
    version = outer.get("version")
    if type(version) is not int or version < 1:
        raise UserError(f"{path} is not a checkpoint of minidiff: its configuration has no version number.")
    if version > VERSION:
        raise UserError(
            f"{path} has format version {version}; this minidiff reads up to {VERSION}: install a newer one."
        )
    if not isinstance(outer.get("meta"), dict):
        raise UserError(f"{path} is not a checkpoint of minidiff: its configuration has no 'meta' dict.")
    return outer["meta"]


def _check_dtypes(path: Path, header: dict[str, Any]) -> None:
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if name != "__metadata__" and dtype not in (*DTYPES, None):  # None: safetensors says what is wrong
            raise UserError(
                f"{path} holds the tensor {name[:80]!r} as {str(dtype)[:20]!r}, a type not read here."
            )


def _check_finite(path: Any, tensors: Mapping[str, np.ndarray], verdict: str) -> None:
    for name, a in tensors.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise UserError(f"{path} {verdict}: the tensor {name!r} holds NaN or infinity.")
