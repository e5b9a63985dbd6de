"""IDX, the format of MNIST's files [LeCun, Cortes, Burges, "The MNIST database"]: an array with its shape.

    00 00 08 n | size of axis 1 .. size of axis n, 4 bytes each, big-endian | the bytes, last axis fastest

08 is the code for unsigned bytes, the only type read here.  Files may be compressed with gzip.
"""

import math
import struct
import zlib
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.input_files import read_file

LARGEST = 1 << 26                                           # bytes, uncompressed; MNIST's largest file has 47 million
MOST_AXES = 4


def parse(data: bytes, source: str) -> np.ndarray:
    """The array in the bytes of an IDX file, uint8, read-only.  source: what errors call the file.  UserError."""
    _check(data, source)
    axes = data[3]
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", data[4:start])
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def encode(array: np.ndarray) -> bytes:
    """The bytes of an IDX file that holds a uint8 array."""
    if array.dtype != np.uint8:
        raise TypeError(f"array has dtype {array.dtype}, but IDX files here hold uint8")
    if not 1 <= array.ndim <= MOST_AXES or 0 in array.shape:                        # what `parse` refuses
        raise ValueError(f"array has shape {array.shape}, but IDX files here hold 1 to {MOST_AXES} axes, none empty")
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes, uncompressed.  Raises UserError, which names the file."""
    return unpack(read_file(path, LARGEST), str(path))


def unpack(data: bytes, source: str) -> bytes:
    """Decompresses data that begins like gzip, and returns other data unchanged.  source: what errors call the file.

    At most LARGEST bytes are decompressed, because a small file may hold more than the memory does.  zlib also reads
    the header, whose name may be as long as the file: the module gzip takes it byte by byte.
    """
    if data[:2] == b"\x1f\x8b":
        unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            data = unpacker.decompress(data, LARGEST + 1)
        except zlib.error as error:
            raise UserError(f"{source} is damaged or incomplete ({error})") from error
        if len(data) <= LARGEST and not unpacker.eof:
            raise UserError(f"{source} is damaged or incomplete (it ends before its data do)")
        if unpacker.unused_data.strip(b"\0"):
            raise UserError(f"{source} holds more than one compressed file: only one is read")
    if len(data) > LARGEST:
        raise UserError(f"{source} holds more than {LARGEST >> 20} MiB, the most that is read")
    return data


# --- checks -----------------------------------------------------------------------------------------------

def _check(data: bytes, source: str) -> None:
    """UserError unless the data is an IDX file of unsigned bytes with 1 to MOST_AXES axes and the promised size."""
    if len(data) < 4 or data[:2] != b"\0\0":
        begins = data[:4].hex(" ") or "nothing"
        raise UserError(f"{source} is not an IDX file: it begins with {begins}, not with 00 00 08")
    kind, axes = data[2], data[3]
    if kind != 8:
        raise UserError(f"{source} is IDX of type {kind:#04x}, but only 0x08, unsigned bytes, is read")
    if not 1 <= axes <= MOST_AXES:
        raise UserError(f"{source} has {axes} axes, but 1 to {MOST_AXES} are read")
    start = 4 + 4 * axes
    if len(data) < start:
        raise UserError(f"{source} is incomplete: it ends within its header, after {len(data)} bytes")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if 0 in shape:
        raise UserError(f"{source} is empty: its header promises an array of shape {shape}")
    if len(data) - start != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise UserError(f"{source} has the wrong size: its header promises {sizes} bytes, and {len(data) - start} "
                        "follow")
