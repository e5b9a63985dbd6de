"""Reading files that a stranger may have made.

A path may name anything: a pipe, which would never end, a device, or a file larger than the memory.  `open_file` opens
ordinary files only, and `read_file` reads at most as much as it is asked to.  All of minidiff reads the user's files
with these two.
"""

import json
import os
import stat
from typing import Any, BinaryIO

from minidiff.errors import UserError

__all__ = ["open_file", "parse_json", "read_file"]


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens an ordinary file to read; UserError for a folder, a device, a pipe, a socket, or what cannot be read."""
    shown = _shown(path)
    try:
        _check_ordinary(shown, os.stat(path).st_mode)       # opening some devices has effects
        # O_NONBLOCK: if a pipe has taken the file's place meanwhile, opening it does not wait for its other end
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{shown} does not exist") from error
    except (OSError, ValueError) as error:                  # ValueError: a NUL or a lone surrogate in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{shown} cannot be read ({reason})") from error
    try:
        _check_ordinary(shown, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def read_file(path: str | os.PathLike, largest: int, remedy: str = "") -> bytes:
    """The bytes of an ordinary file of at most `largest` bytes; UserError, which ends with the remedy if it is larger.
    """
    shown = _shown(path)
    try:
        with open_file(path) as file:
            data = file.read(largest + 1) or b""            # None: a file of /proc that has nothing to say yet
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror})") from error
    if len(data) > largest:
        raise UserError(f"{shown} is larger than {largest >> 20} MiB, the most that is read{remedy}")
    return data


def parse_json(text: str | bytes) -> Any:
    """What the JSON text says; ValueError also for NaN and Infinity, which JSON does not have, and for deep nesting."""
    def refuse(word: str):
        raise ValueError(f"{word} is no JSON")
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _shown(path: str | os.PathLike) -> str:
    """The path as a terminal can print it."""
    return ascii(os.fspath(path))[1:-1]


def _check_ordinary(shown: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"{shown} is a folder: name a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown} is a device, pipe or socket: name an ordinary file")
