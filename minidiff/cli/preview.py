"""minidiff sample --preview: a picture on disk of what a long run is about to draw.

It shows the present estimate of the clean picture, decoded at half its size, which costs a quarter of a decoding.  Now
and then: at most every EVERY seconds, and so that previews take at most a tenth of the time.
"""

from __future__ import annotations

import time
from pathlib import Path

from minidiff import pictures
from minidiff.engine.backend import to_numpy
from minidiff.errors import UserError
from minidiff.terminal import say

EVERY = 10.0                                                # seconds
SHARE = 0.1                                                 # of the time, at most


class Preview:
    """A file that is replaced, whole, when the time for a new preview has come."""

    def __init__(self, path: Path):
        self.path, self.next = path, time.monotonic() + EVERY

    def show(self, state) -> None:
        """Writes the state's preview; a file that cannot be written is no reason to end the run."""
        started = time.monotonic()
        if started < self.next:
            return
        try:
            pictures.save(pictures.plain(to_numpy(state.preview())[0]), self.path)
        except UserError as error:
            say(f"no preview was drawn ({error}); sampling continues")
        now = time.monotonic()
        self.next = now + max(EVERY, (now - started) / SHARE)
