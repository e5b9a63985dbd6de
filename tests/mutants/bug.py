"""What a planted bug is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bug:
    """A wrong text for a right one: `before` occurs in `file` exactly once, and `after` replaces it.

    file is a path in minidiff/; a path that begins with kernels/ is in the project.
    """

    name: str
    file: str
    before: str
    after: str
    source: str = ""                        # where it was shipped; "" for a mistake of our own

    def path(self, root: Path) -> Path:
        return root / self.file if self.file.startswith("kernels/") else root / "minidiff" / self.file

    def planted(self, root: Path) -> str:
        """The file's text with the bug in it; ValueError unless `before` occurs in it exactly once."""
        text = self.path(root).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"the bug {self.name!r} must find its text once in {self.file}, "
                             f"and found it {text.count(self.before)} times: {self.before!r}")
        return text.replace(self.before, self.after)
