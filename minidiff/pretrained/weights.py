"""Tensors in safetensors files, read one at a time: a checkpoint may be larger than what memory can hold twice.

    8 bytes     the length of the header, little endian
    header      JSON: name -> {"dtype": "F16", "shape": [320, 4, 3, 3], "data_offsets": [begin, end]}
    the arrays  each in its place, row by row

The file is memory-mapped, so that only the tensors that are asked for are read.  A file may come from a stranger: the
header is checked against the file's size before any memory is taken.  bfloat16, which NumPy lacks, is the upper half of
a float32.

`Weights` is a part of a checkpoint.  A network asks it for each of its tensors by name, in the layout of this package,
and afterwards `check_all_used` tells whether the file holds something that the network does not have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.input_files import open_file, parse_json
from minidiff.pretrained.half import Stored, finite, widened

MAX_HEADER = 32 << 20                                       # bytes; SDXL in one file needs less than 1 MB
BFLOAT16 = "BF16"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, BFLOAT16: np.uint16,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}

SMALL, PARTS = 2 ** 16, 16                                  # numbers that one core copies; parts of a larger array
HALF = ("F16", BFLOAT16)
FLOATS = ("F64", "F32", *HALF)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STARTS = {b"version ": "a pointer of Git LFS, whose file was not fetched (git lfs pull does)", b"<": "a web page",
          b"GGUF": "a GGUF file of another program", b"{": "JSON text"}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: its file, the position of its first byte there, its dtype in the file, and its shape."""

    path: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]                  # in the file
    transposed: bool = False                # whether its two axes are to be exchanged

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """The array in its own dtype (bfloat16 as float32), memory-mapped where possible."""
        if self.size == 0:
            return np.zeros(self.shape, DTYPES[self.dtype])
        a = self._mapped(DTYPES[self.dtype])
        return widened(np.ascontiguousarray(a), True) if self.dtype == BFLOAT16 else a

    def bits(self) -> np.ndarray:
        """The 16 bits of each number of an array in half precision, memory-mapped."""
        return self._mapped(np.uint16)

    def _mapped(self, dtype) -> np.ndarray:
        a = np.memmap(self.path, dtype, "r", self.begin, (self.size,)).reshape(self.shape)
        return a.T if self.transposed else a


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by its name; UserError names the file where it is not one."""
    begin, size, header = _header(path)
    found, taken = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            found[name], end = _entry(path, name, entry, begin, size)
            taken.append((found[name].begin, end, name))
    for (_, end, name), (start, _, other) in zip(sorted(taken), sorted(taken)[1:], strict=False):
        if start < end:
            raise UserError(f"{path} is damaged: its tensors {name[:80]!r} and {other[:80]!r} overlap.")
    return found


def names(path: Path) -> list[str]:
    """The names of a file's tensors, also where the file is cut short."""
    return [name for name in _header(path)[2] if name != "__metadata__"]


def metadata(path: Path) -> dict[str, str]:
    """The texts that the header holds beside the tensors."""
    found = _header(path)[2].get("__metadata__", {})
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


class Weights:
    """The tensors of a checkpoint whose names start with a prefix.

    dtype       of what `tensor` returns: float32, or float64 to compare with other libraries
    low_memory  whether what the file has in half precision stays so, and is widened at each use (half.py)
    changes     name -> function of the array as it is in the file, such as a LoRA's; applied when it is read
    """

    def __init__(self, tensors: Mapping[str, Entry], source: str, *, dtype=np.float32, low_memory: bool = False):
        self.tensors, self.source, self.dtype, self.low_memory = tensors, source, np.dtype(dtype), low_memory
        self.prefix, self.changes, self.used = "", {}, set()
        # every name and every part of one that ends before a dot
        self.known = {name[:i] for name in tensors for i in range(len(name) + 1) if i == len(name) or name[i] == "."}

    def part(self, name: str) -> Weights:
        """The tensors below `name`."""
        part = copy(self)                                   # which shares `used`
        part.prefix = f"{self.prefix}{name}."
        return part

    def changed(self, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> Weights:
        """These tensors, each changed by the function of its name when it is read."""
        changed = copy(self)
        changed.changes = changes
        return changed

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name, or one below it."""
        return self.prefix + name in self.known

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def bytes_in_memory(self) -> int:
        """What all of them take once they are read."""
        return sum(entry.size * (2 if self.low_memory and entry.dtype in HALF else self.dtype.itemsize)
                   for entry in self.tensors.values())

    def transposed(self, name: str) -> bool:
        """Whether the file has the two axes of this tensor in the other order."""
        return self._entry(name).transposed

    def tensor(self, name: str, *axes: int, dropped: tuple[int, ...] = ()) -> Tensor:
        """The tensor in `dtype`, its axes in the given order (PyTorch's to ours; as they are without any).

        dropped: axes of length 1.  UserError where the tensor is missing, has another number of axes, or holds NaN or
        infinity.
        """
        entry, full = self._entry(name), self.prefix + name
        if entry.dtype not in FLOATS:
            raise UserError(f"{self.source} holds the tensor {full!r} as {entry.dtype}, and minidiff reads weights of "
                            f"{', '.join(FLOATS)} only: quantised files need their own program.")
        axes = axes or tuple(range(len(entry.shape)))
        if len(entry.shape) != len(axes) + len(dropped):
            raise UserError(f"{self.source} holds the tensor {full!r} in shape {entry.shape}; it takes {len(axes)} "
                            "axes.")
        half, bfloat = entry.dtype in HALF and full not in self.changes, entry.dtype == BFLOAT16
        a = entry.bits() if half else entry.read()
        if full in self.changes:
            a = self.changes[full](a)
        a = copied(a.transpose(*axes, *dropped), a.dtype if half else self.dtype)
        a = a.reshape(a.shape[:len(axes)])
        if not (finite(a, bfloat) if half else np.isfinite(a).all()):
            raise UserError(f"{self.source} is damaged: its tensor {full!r} holds NaN or infinity.")
        self.used.add(full)
        if half and self.low_memory and self.dtype == np.float32:
            return Stored(a, bfloat)
        return Tensor(widened(a, bfloat).astype(self.dtype, copy=False) if half else a)

    def vector(self, name: str, length: int) -> Tensor:
        """The tensor in `dtype`, which has one axis of this length; UserError otherwise."""
        found = self._entry(name).shape
        if found != (length,):
            raise UserError(f"{self.source} holds the tensor {self.prefix + name!r} in shape {found}; with the weights "
                            f"beside it, it takes {(length,)}.")
        return self.tensor(name, 0)

    def check_all_used(self, ignored: Callable[[str], bool] = lambda name: False) -> None:
        """UserError where the checkpoint holds a tensor that no network has asked for."""
        for name in self.tensors:
            if name.startswith(self.prefix) and name not in self.used and not ignored(name):
                raise UserError(f"{self.source} holds the tensor {name[:80]!r}, which the network of its configuration "
                                "does not have.")

    def _entry(self, name: str) -> Entry:
        full = self.prefix + name
        if full not in self.tensors:
            raise UserError(f"{self.source} lacks the tensor {full!r}, which the network of its configuration has.")
        return self.tensors[full]


def copied(a: np.ndarray, dtype) -> np.ndarray:
    """A copy, row by row in memory, of an array whose axes were exchanged: parts of its longest axis on all cores."""
    new = np.empty(a.shape, dtype)
    axis = int(np.argmax(a.shape)) if a.ndim else 0

    def one(piece: slice) -> None:
        place = (slice(None),) * axis + (piece,)
        new[place] = a[place]
    if a.size < SMALL:
        new[...] = a
    else:
        parallel_map(one, shards(a.shape[axis], -(-a.shape[axis] // PARTS)))
    return new


# --- the header of a file from an unknown source ------------------------------------------------------------

def _header(path: Path) -> tuple[int, int, dict]:
    """(the position of the first array's first byte, the file's size, the header)."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > min(size - 8, MAX_HEADER):
                if path.suffix.lower() in PICKLES or start[:2] == b"PK" or start[:1] == b"\x80":
                    raise UserError(f"{path} is a pickle, which is a program and may do harm: take a .safetensors "
                                    "file, or convert it where you trust it (in PyTorch: load it, take its dict of "
                                    "tensors, and write that with safetensors.torch.save_file).")
                kind = next((kind for begin, kind in STARTS.items() if start.startswith(begin)), None)
                if kind:
                    raise UserError(f"{path} is {kind}, and no safetensors file.")
                raise UserError(f"{path} is cut short or not a safetensors file (its start announces a header of "
                                f"{length} bytes in a file of {size}).")
            header = parse_json(file.read(length))
    except UserError:                                       # which is a ValueError
        raise
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is a JSON {type(header).__name__}, not a dict.")
    return 8 + length, size, header


def _entry(path: Path, name: str, entry, first: int, size: int) -> tuple[Entry, int]:
    """(the entry, the position after its last byte); UserError where it contradicts itself or the file's size."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} is damaged: its header does not say where {name[:80]!r} is.") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path} holds the tensor {name[:80]!r} as {str(dtype)[:20]!r}, a type that minidiff does not "
                        "read.")
    # NumPy multiplies the lengths other than 0 even where one is 0
    whole = whole and len(shape) <= 8 and math.prod(n for n in shape if n) < 1 << 48
    if not whole or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise UserError(f"{path} is damaged: the size of {name[:80]!r} is not that of its shape {shape!r:.60}.")
    if first + end > size:
        raise UserError(f"{path} is cut short: the tensor {name[:80]!r} ends at byte {first + end}, and the file at "
                        f"{size}.")
    return Entry(path, first + begin, dtype, shape), first + end
