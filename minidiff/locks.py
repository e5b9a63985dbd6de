"""Locks of files, which the operating system releases when their process ends, however it ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minidiff.errors import UserError

try:
    import fcntl
except ImportError:                                         # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"                                              # the file whose lock is that of its folder


def take(file: BinaryIO) -> bool | None:
    """Whether this process has the lock of an open file from now on, until it closes the file or ends.

    False: another process has it.  None: the file system has no locks.
    """
    try:
        if fcntl:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Within it no other process is within `locked` of the same folder; UserError where one is already.

    The folder is made if there is none, and removed at the end if nothing was put into it.  A file system without locks
    gives a warning.
    """
    folder = Path(folder)
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file, got = _open_and_take(folder / LOCK)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written ({error.strerror}): choose another --out") from error
    if got is False:
        file.close()
        raise UserError(f"another process is training in {folder}: wait until it has ended, or choose another --out")
    if got is None:
        warnings.warn(f"{folder} is on a file system without locks: start no second run in it before this one has "
                      "ended.", stacklevel=3)
    try:
        yield
    finally:
        with file, suppress(OSError):                       # still locked, so that it is this process's file
            (folder / LOCK).unlink()
        if os.name == "nt":                                 # where an open file cannot be removed
            with suppress(OSError):
                (folder / LOCK).unlink()
        if new:
            with suppress(OSError):                         # it holds something
                folder.rmdir()


def _open_and_take(path: Path) -> tuple[BinaryIO, bool | None]:
    """The file of that name, and whether its lock was taken."""
    while True:
        # O_NONBLOCK: a pipe of that name is an OSError, and not waited for; open as long as it is locked
        file = open(path, "ab", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666))
        got = take(file)
        with suppress(OSError):
            if not got or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, got
        file.close()                                        # its last owner had just removed it
