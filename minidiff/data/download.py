"""Downloads a file from the first of several mirrors that has it.  The whole file is written, or nothing.

pooch transfers it by HTTP (https://www.fatiando.org/pooch), the caller verifies the bytes, and `write_whole` writes
them.  An interrupted download starts again from the beginning: HTTP ranges are not used.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import urlsplit

from minidiff.errors import UserError
from minidiff.files import write_whole
from minidiff.terminal import progress

TIMEOUT = 4.0                                               # seconds without a byte, then the next mirror is tried
DELAY = 0.1                                                 # seconds, before the progress bar is shown
BLOCK = 1 << 16                                             # bytes


def fetch(
    urls: Sequence[str],
    path: Path,
    verify: Callable[[bytes], None],
    *,
    largest: int,
    timeout: float = TIMEOUT,
    quiet: bool = False,
) -> None:
    """Writes to `path` the bytes of the first URL that serves the right ones.

    urls: the same file on several mirrors.  verify: raises UserError for wrong bytes.  largest: the most bytes to
    accept; they are held in memory until they are verified.  quiet: shows no progress bar.
    Raises UserError, which says what went wrong at each mirror, or that `path` cannot be written.
    """
    if _offline.get():
        raise UserError(f"{path.name} is not on this machine, and nothing is downloaded now")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the folder {path.parent} cannot be made for {path.name}: {reason}") from error
    failures = {}
    for url in urls:
        try:
            data = _receive(url, path.name, largest, timeout, quiet)
            verify(data)
        except (OSError, UserError) as error:               # every error of requests is an OSError
            failures[urlsplit(url).netloc] = _reason(error)
            continue
        return write_whole(path, data)
    reasons = set(failures.values())
    said = "; ".join(f"{host}: {reason}" for host, reason in failures.items()) if len(reasons) > 1 else reasons.pop()
    raise UserError(f"{path.name} could not be downloaded ({said})")


_offline: ContextVar[bool] = ContextVar("offline", default=False)


@contextmanager
def offline() -> Iterator[None]:
    """Within it nothing is downloaded: `fetch` refuses at once."""
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)


def _receive(url: str, name: str, largest: int, timeout: float, quiet: bool) -> bytes:
    """The bytes that the URL serves.  UserError if they are more than `largest`, OSError for what else goes wrong."""
    from pooch import HTTPDownloader

    class Received(io.BytesIO):
        def write(self, block) -> int:
            if self.tell() + len(block) > largest:
                raise UserError(f"the server sent more than the {largest:,} bytes that {name} may have")
            return super().write(block)

    received = Received()
    # pooch sets the bar's total when the server has sent it
    with progress(title=name, total=largest, unit="B", unit_scale=True, delay=DELAY, disable=quiet) as bar:
        download = HTTPDownloader(bar, BLOCK, timeout=timeout, headers={"User-Agent": "minidiff"})
        download(url, received, None)
    return received.getvalue()


def _reason(error: BaseException) -> str:
    """What went wrong, in words: the status of an answer, or the first of the chain of exceptions behind the error."""
    if isinstance(error, UserError):
        return str(error)
    if getattr(error, "response", None) is not None:
        return f"status {error.response.status_code} {error.response.reason}"
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
