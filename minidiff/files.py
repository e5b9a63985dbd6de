"""Files that are written completely or not at all, checks of an output path before the work starts, and cache folders.

A file is first written under a temporary name in the same folder, forced to the disk, and then renamed to its final
name.  The file system renames in one step, so a reader finds the old file or the new one, but never a part of either,
even after a power failure.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from minidiff import locks
from minidiff.errors import UserError

__all__ = ["cache_folder", "check_distinct", "check_writable", "remove_abandoned", "user_path", "write_json",
           "write_whole"]

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, replacing an older file, whose permissions stay; if that fails, or the older file is
    read-only, raises UserError and keeps the older file."""
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))               # follows a symbolic link, which then stays a link
        mode = _mode(target)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); nothing was changed there.") from error
    temporary = _temporary(target)
    try:
        # not readable by more people than the older file, not even for a moment
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode)
                  ) as file:
            locks.take(file)                                # until it is closed, no one takes it for abandoned
            file.write(data)
            file.flush()
            _sync(file.fileno())
            if mode is not None:                            # with what the umask has taken from it
                os.chmod(temporary, mode)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); nothing was changed there.") from error
    finally:
        with contextlib.suppress(OSError):                  # after the rename it no longer exists
            temporary.unlink()


def write_json(path: str | os.PathLike, values: dict) -> None:
    """Writes `values` to `path` as JSON, with `write_whole`.  NaN and infinity, which JSON lacks, become null."""
    write_whole(path, (json.dumps(_finite(values), indent=2, allow_nan=False) + "\n").encode())


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: str | os.PathLike, suffixes: Collection[str] = ()) -> Path:
    """The path, if write_whole can write it; otherwise UserError.  Call it before the work, not after.

    suffixes: the endings that are allowed, such as (".png", ".gif"); () allows all.  It creates and removes a temporary
    file in the same folder, and does not change a file that exists at `path`.
    """
    shown, path = ascii(os.fspath(path)), Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"The output path {shown} takes one of the endings {', '.join(suffixes)}.")
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise UserError(f"The output path {shown} is a folder: name a file in it.")
        if not target.parent.is_dir():
            raise UserError(f"The output path {shown} is in a folder that does not exist: create the folder first.")
        if target.exists() and not target.is_file():
            raise UserError(f"The output path {shown} is a device or pipe; it takes an ordinary file.")
        _mode(target)
        remove_abandoned(target.parent, target.name)
        temporary = _temporary(target)
        with open(temporary, "xb"):
            pass
        temporary.unlink()
    except UserError:
        raise
    except (OSError, ValueError) as error:                  # ValueError: a NUL or a lone surrogate in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"The output path {shown} cannot be written ({reason}): choose another.") from error
    return path


def user_path(path: str | os.PathLike) -> Path:
    """The path with a leading ~ or ~user replaced by that user's home folder; UserError where it is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"the home folder in {ascii(os.fspath(path))} is unknown: write out the path") from error


def cache_folder(*names: str) -> Path:
    """The folder $XDG_CACHE_HOME/names or ~/.cache/names, which may not exist yet; UserError where neither is known."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return user_path(base).joinpath(*names)
    except UserError as error:
        raise UserError(f"there is no cache folder, since the home folder in {ascii(base)} is unknown: set "
                        "XDG_CACHE_HOME to a folder's path") from error


def check_distinct(writes: Mapping[str, Path | None], reads: Mapping[str, Path | None]) -> None:
    """UserError if a file to be written is also read, or is written twice, whatever names and links lead to it.

    The keys are the options that name the files; None is no file, and a folder that is read stands for the files in it.
    Names that differ in case only are one file on some systems, so two new files cannot have them.
    """
    outputs, inputs = ([(option, path) for option, path in paths.items() if path] for paths in (writes, reads))
    for i, (option, path) in enumerate(outputs):
        for other, there in [*outputs[:i], *inputs]:
            if _same(path, there):
                raise UserError(f"{other} and {option} are both {ascii(str(path))}: name two files")


def _same(a: Path, b: Path) -> bool:
    if os.path.exists(a) and os.path.isdir(b) and not os.path.isdir(a):
        # a link to a file in or below the folder; an older output that lies there may be replaced
        mine = os.stat(a)
        return any(os.path.samestat(mine, os.stat(os.path.join(folder, name)))
                   for folder, _, names in os.walk(b) for name in names
                   if name != Path(a).name and os.path.exists(os.path.join(folder, name)))
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    if os.path.exists(a) or os.path.exists(b):
        return False
    a, b = (unicodedata.normalize("NFC", os.path.realpath(path)).casefold() for path in (a, b))
    return a == b


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Removes the temporary files that a killed write_whole left in the folder: of the file `name`, or of all files."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name) and (not name or path.name.startswith(_start(name))):
                with contextlib.suppress(OSError):
                    with open(path, "r+b") as file:
                        abandoned = locks.take(file)        # a writer that lives holds the lock
                    if abandoned:
                        path.unlink()


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_start(target.name)}{secrets.token_hex(4)}.tmp")


def _start(name: str) -> str:
    """How the names of a file's temporary files begin; a long name is cut, since a name has at most 255 bytes."""
    return f".{name[:60]}."


def _mode(target: Path) -> int | None:
    """The permissions of the file that is to be replaced; None if there is none.  OSError if it is read-only."""
    if not target.exists():
        return None
    mode = stat.S_IMODE(target.stat().st_mode)
    if not mode & 0o222 or not os.access(target, os.W_OK):  # the administrator may write what is marked read-only, too
        raise PermissionError(errno.EACCES, "it is read-only")
    return mode


def _sync(handle: int) -> None:
    """Forces a file to the disk; some file systems (of networks, or in user space) cannot, and the file is written."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _sync_folder(folder: Path) -> None:
    """Forces the rename itself to the disk, on systems where a folder can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
