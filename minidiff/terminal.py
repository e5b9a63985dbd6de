"""What is printed for people: one line each, printable whatever a file holds, and never a reason to end the work.

    show(line, ...)                         results, on the standard output
    say(sentence)                           remarks and errors, on the standard error, after "minidiff: "
    shell(words)                            a command as a line that a person can copy into a shell
    with unfailing() as (out, err): ...     sys.stdout and sys.stderr never raise; out.error says whether text was lost
    for x in progress(items, "training"):   a progress bar; where it cannot be drawn the work goes on without it

A terminal may close, `head` may leave, a disk may be full, and a daemon has no streams at all.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from weakref import WeakSet


def one_line(text: str) -> str:
    """The text on one line: a space for each line break or tab, an escape for what a terminal would obey or hide.

    Names and notes in files come from strangers: an escape sequence could hide a line, and a line break forge one.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def show(*lines: object) -> None:
    """Prints lines on the standard output."""
    print("\n".join(one_line(str(line)) for line in lines))


def say(sentence: object) -> None:
    """Prints one line on the standard error, after the program's name; a progress bar makes room and is drawn again."""
    for bar in _bars:
        bar.clear()
    print(f"minidiff: {one_line(str(sentence))}", file=sys.stderr)
    for bar in _bars:
        bar.refresh()


def shell(words: Sequence[str]) -> str:
    """The words as one line for a shell; a caption of plain words stands between double quotes, as people write it."""
    if os.name == "nt":
        from subprocess import list2cmdline
        return list2cmdline(words)

    def quoted(word: str) -> str:
        return f'"{word}"' if re.fullmatch(r"[\w ,.-]*", word) and (" " in word or not word) else shlex.quote(word)
    return " ".join(map(quoted, words))


def progress(items: Iterable | None = None, title: str = "", **options):
    """tqdm's bar on the standard error.  options: tqdm's.  Where the variables TQDM_... hold what tqdm cannot read or
    draw, there is no bar."""
    try:
        bar = _bar()(items, desc=one_line(title), file=Output(sys.stderr), dynamic_ncols=True, **options)
    except Exception as error:
        settings = [name for name in os.environ if name.startswith("TQDM_")]
        if not settings:
            raise
        say(f"there is no progress bar, since tqdm cannot take {', '.join(settings)} ({type(error).__name__}: {error})")
        return NoBar(items)
    _bars.add(bar)
    return bar


@cache
def _bar() -> type:
    from tqdm import tqdm

    class Bar(tqdm):
        def display(self, *args, **kwargs):
            with suppress(Exception):                       # of a format in TQDM_..., which is read when it is drawn
                return super().display(*args, **kwargs)
            return False
    return Bar


class NoBar:
    """In the place of a bar: it gives the items, and shows nothing."""

    total = n = 0

    def __init__(self, items: Iterable | None = None):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, *_, **__) -> None:
        pass

    set_postfix_str = reset = refresh = close = update


_bars: WeakSet = WeakSet()                                  # those that are drawn, and some that are closed


class Output:
    """A stream that never raises: it keeps the first error of writing, and loses what is written after it.

    stream: None where the process was started without it.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            if self.stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            act()
        except (OSError, ValueError) as error:              # ValueError: the stream was closed
            self.error = error

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def unfailing() -> Iterator[tuple[Output, Output]]:
    """Within it sys.stdout and sys.stderr are Outputs."""
    out, err = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err


# --- the streams of a process of our own ------------------------------------------------------------------------

def open_missing() -> None:
    """Opens the null device for each standard stream that is closed; else the next file would get its number, and what
    is printed on it would be written into that file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)        # the lowest free number: this one


def drop_unwritable() -> None:
    """Gives to the null device what a standard stream cannot write, before Python complains of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
                stream.flush()
