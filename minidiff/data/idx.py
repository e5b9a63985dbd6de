"""IDX, the format of MNIST's files [LeCun, Cortes, Burges, "The MNIST database"]: an array with its shape.

    00 00 08 n | size of axis 1 .. size of axis n, 4 bytes each, big-endian | the bytes, last axis fastest

08 is the code of unsigned bytes, the only type read here. Files may be packed with gzip.
"""

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from minidiff.errors import UserError

LARGEST = 1 << 26  # bytes, unpacked: MNIST takes 47 million, and no small packed file may fill the memory
MOST_AXES = 4


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes, unpacked. Raises UserError in a sentence that names the file."""
    try:
        with open(path, "rb") as file:
            packed = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return unpack(packed, str(path))


def unpack(data: bytes, source: str) -> bytes:
    """Undo gzip where data begins like gzip; source is what errors call it."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(LARGEST + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{source} is damaged or cut short ({error})") from error
    if len(data) > LARGEST:
        raise UserError(f"{source} holds more than {LARGEST >> 20} MiB, the most that is read")
    return data


def parse(data: bytes, source: str) -> np.ndarray:
    """The array in the bytes of an IDX file."""
    if len(data) < 4 or data[:2] != b"\0\0":
        begins = data[:4].hex(" ") or "nothing"
        raise UserError(f"{source} is not an IDX file: it begins with {begins}, not with 00 00 08")
    kind, axes = data[2], data[3]
    if kind != 8:
        raise UserError(f"{source} is IDX of type {kind:#04x}, but only 0x08, unsigned bytes, is read")
    start = 4 + 4 * axes
    if not 1 <= axes <= MOST_AXES:
        raise UserError(f"{source} has {axes} axes, but 1 to {MOST_AXES} are read")
    if len(data) < start:
        raise UserError(f"{source} is cut short: it ends within its header, after {len(data)} bytes")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if 0 in shape:
        raise UserError(f"{source} is empty: its header tells of an array of shape {shape}")
    if len(data) - start != math.prod(shape):
        says = " x ".join(map(str, shape))
        raise UserError(
            f"{source} has the wrong size: its header tells of {says} bytes, and {len(data) - start} follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def encode(array: np.ndarray) -> bytes:
    """The bytes of an IDX file that holds a uint8 array."""
    if array.dtype != np.uint8:
        raise TypeError(f"array has dtype {array.dtype}, but IDX files here hold uint8")
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
