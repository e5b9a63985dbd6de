"""Files written whole or not at all, and an output path that is checked before the work starts.

A file is written beside its place under a temporary name, forced to the disk, and renamed over the old one.
A rename is one step for the file system: whoever looks, and whenever the power fails, finds the old file or
the new one, never half of either.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from minidiff.errors import UserError

__all__ = ["check_writable", "write_json", "write_whole"]


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Puts `data` at `path`, replacing what was there, or raises UserError and leaves what was there."""
    path = Path(path)
    place = Path(os.path.realpath(path))  # through a symbolic link, so that the link stays
    temporary = _temporary(place)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
        _sync_folder(place.parent)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); nothing was changed there."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename it is gone already
            temporary.unlink()


def write_json(path: str | os.PathLike, values: dict) -> None:
    """Puts `values` at `path` as JSON, as `write_whole` does."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def check_writable(path: str | os.PathLike, suffixes: Collection[str] = ()) -> Path:
    """The path, if write_whole can write it; otherwise UserError. Call it before the work, not after.

    suffixes: the ones taken, such as (".png", ".gif"); () takes any. The proof is a file made and removed in
    the same folder; a file that is there already stays as it is.
    """
    shown, path = ascii(os.fspath(path)), Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"The output path {shown} takes one of the endings {', '.join(suffixes)}.")
    try:
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise UserError(f"The output path {shown} is a folder: name a file in it.")
        if not place.parent.is_dir():
            raise UserError(f"The output path {shown} lies in a folder that is not there: make it first.")
        if place.exists() and not place.is_file():
            raise UserError(f"The output path {shown} is a device or pipe; it takes an ordinary file.")
        temporary = _temporary(place)
        with open(temporary, "xb"):
            pass
        temporary.unlink()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"The output path {shown} cannot be written ({reason}): choose another.") from error
    return path


def is_temporary(path: Path, name_starts: str) -> bool:
    """Whether `path` is what a killed write_whole left of a file whose name starts so."""
    return path.name.startswith("." + name_starts) and path.suffix == ".tmp"


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Forces the rename itself to the disk, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
