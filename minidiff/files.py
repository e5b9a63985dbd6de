"""Files that are written completely or not at all, checks of an output path before the work starts, and cache folders.

A file is first written under a temporary name in the same folder, forced to the disk, and then renamed to its final
name.  The file system renames in one step, so a reader finds the old file or the new one, but never a part of either,
even after a power failure.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from minidiff.errors import UserError

__all__ = ["cache_folder", "check_writable", "is_temporary", "user_path", "write_json", "write_whole"]


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, replacing an older file; if that fails, raises UserError and keeps the older file."""
    path = Path(path)
    target = Path(os.path.realpath(path))                   # follows a symbolic link, which then stays a link
    temporary = _temporary(target)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
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


def is_temporary(path: Path, name_starts: str) -> bool:
    """Whether `path` is the temporary file of an interrupted write_whole to a file whose name starts so."""
    return path.name.startswith("." + name_starts) and path.suffix == ".tmp"


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Forces the rename itself to the disk, on systems where a folder can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
