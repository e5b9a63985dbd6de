"""Floor V: the systems of the literature, each one page.  `SYSTEMS` names them, `find` loads one's weights."""

from __future__ import annotations

import importlib
from pathlib import Path

from minidiff.errors import UserError

# name -> (module, class); a module is imported when its system is asked for
SYSTEMS: dict[str, tuple[str, str]] = {
    "text-to-image": ("text_to_image", "TextToImage"),
}


def kind_of(name: str):
    """The class of the system called `name`; UserError where there is none."""
    if name not in SYSTEMS:
        raise UserError(f"there is no system {name!r}: it is one of {', '.join(SYSTEMS)}")
    module, kind = SYSTEMS[name]
    return getattr(importlib.import_module(f"minidiff.systems.{module}"), kind)


def find(name: str, path: str | Path | None = None):
    """The trained system called `name`: the one in `path`, or the one that comes with minidiff, or the one that was
    trained here, in runs/NAME.  UserError says how to train it where there is none."""
    kind, trained = kind_of(name), Path("runs") / name / "model.safetensors"
    if path is None:
        path = next((p for p in (kind.shipped(), trained) if p.exists()), None)
    if path is None:
        raise UserError(f"there are no weights of {name} yet: train it with minidiff train --system {name}")
    return kind.load(path)
