"""Fetching a file from the first mirror that has it, whole or not at all.

    name.part  --bytes arrive-->  name.part  --verified, synced-->  name

What has arrived is kept in name.part, and the next attempt, from any mirror, asks for the rest of it with an
HTTP Range. Only when the whole has been verified does the file take its name, in one step.
"""

import contextlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from minidiff.errors import UserError

TIMEOUT = 4.0  # seconds without an answer or a byte, after which the next mirror is tried
_BLOCK = 1 << 16


def fetch(
    urls: Sequence[str],
    path: Path,
    verify: Callable[[bytes], None],
    *,
    largest: int,
    timeout: float = TIMEOUT,
    quiet: bool = False,
) -> None:
    """Write to `path` what the first good one of `urls` (the same bytes, on several mirrors) serves.

    verify raises UserError for bytes that are not the wanted ones; largest is the most bytes to accept.
    Raises UserError that tells for each mirror what went wrong.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made for {path.name}: {error.strerror or error}") from error
    failures = {}
    for url in urls:
        try:
            resumed = part.exists() and part.stat().st_size > 0
            _receive(url, part, largest, timeout, quiet)
            try:
                _finish(part, path, verify)
            except UserError:
                if not resumed:
                    raise
                # The kept beginning may be what was wrong, so this mirror gets another chance without it.
                _receive(url, part, largest, timeout, quiet)
                _finish(part, path, verify)
            return
        except (OSError, http.client.HTTPException, UserError) as error:
            failures[urlsplit(url).netloc] = _reason(error)
    told = "; ".join(f"{host}: {reason}" for host, reason in failures.items())
    if len(set(failures.values())) == 1:
        told = next(iter(failures.values()))
    raise UserError(f"{path.name} could not be downloaded ({told})")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error  # urllib wraps what went wrong
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _receive(url: str, part: Path, largest: int, timeout: float, quiet: bool) -> None:
    """Append to `part` what it lacks."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "minidiff"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:  # nothing beyond what is here: it may be the whole
                return
            raise UserError(f"status {error.code} {error.reason}") from error
    with response:
        if response.status != 206:  # the whole file, whether or not a part was asked for
            have = 0
        elif not (sent := response.headers.get("Content-Range", "none")).startswith(f"bytes {have}-"):
            raise UserError(f"sent the range {sent} where bytes {have}- was asked for")
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=quiet)
        with bar, open(part, "ab" if have else "wb") as file:
            while block := response.read1(_BLOCK):
                have += len(block)
                if have > largest:
                    part.unlink()
                    raise UserError(f"sent more than the {largest:,} bytes that {part.stem} may have")
                file.write(block)
                bar.update(len(block))
    if total is not None and have != total:
        raise UserError(f"the connection ended after {have:,} of {total:,} bytes")


def _finish(part: Path, path: Path, verify: Callable[[bytes], None]) -> None:
    """Give the verified part its name; throw it away where it is not what it should be."""
    try:
        verify(part.read_bytes())
    except UserError:
        part.unlink()
        raise
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    with contextlib.suppress(OSError):  # not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
