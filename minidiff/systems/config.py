"""A system's configuration, a frozen dataclass, from the JSON of a file that may come from a stranger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from minidiff.checks import whole

LARGEST = 4096                                              # no size in a configuration is larger,
MOST_STEPS = 10**9                                          # and no number of training steps
LONGEST = 16                                                # no tuple is longer
LONGEST_TEXT = 200                                          # characters


def config_from(kind: type, values):
    """A configuration of the dataclass `kind`: every field of its type, within reason.

    values: a dict, or a configuration that may hold NumPy's numbers, or others that a file could not give back.  A
    field that the values lack takes its default.  TypeError or ValueError where a field is unknown or its value is of
    another type.
    """
    values = vars(values) if isinstance(values, kind) else values
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} must be a dict, not {type(values).__name__}")
    default, fields = kind(), {}
    unknown = values.keys() - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no {str(min(unknown, key=str))[:40]!r}")
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        value, like = values[f.name], getattr(default, f.name)
        fields[f.name] = config_from(type(like), value) if dataclasses.is_dataclass(like) else _checked(
            f.name, value, like)
    return kind(**fields)


def with_changes(config, changes: Mapping[str, object], of: str = ""):
    """The configuration with some of its fields changed; ValueError where one is unknown, of another type or refused.

    A field of a part has a dot in its name, such as `unet.widths`.  The images' shape cannot be changed.  What is
    returned can be read again from a file: each value is within the limits of `config_from`.  of: what stands before
    the names in errors.
    """
    fields = changeable(config)
    changed, of_parts = {}, {}
    for name, value in changes.items():
        if name not in fields:
            known = ", ".join(f"{field} ({default})" for field, default in fields.items()) or "none"
            raise ValueError(f"its configuration has no {of}{name}: it has {known}")
        part, dot, rest = name.partition(".")
        if dot:
            of_parts.setdefault(part, {})[rest] = value
        else:
            changed[name] = _checked(of + name, value, fields[name])
    for part, inner in of_parts.items():
        changed[part] = with_changes(getattr(config, part), inner, f"{of}{part}.")
    return dataclasses.replace(config, **changed)


def changeable(config) -> dict[str, object]:
    """The fields that `with_changes` takes, with their values; those of parts, "part.field", come after its own."""
    own, of_parts = {}, {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            of_parts |= {f"{f.name}.{name}": v for name, v in changeable(value).items()}
        elif f.name != "shape":
            own[f.name] = value
    return own | of_parts


def _checked(name: str, value, like):
    """The value in the type of `like`, if it is of this kind and within reason."""
    if isinstance(like, tuple) and isinstance(value, list | tuple):
        if not 1 <= len(value) <= LONGEST:
            raise ValueError(f"{name} takes 1 to {LONGEST} values, not {len(value)}")
        return tuple(_checked(name, v, like[0]) for v in value)
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(like):
        shown = list(like) if isinstance(like, tuple) else like             # as it is typed
        raise ValueError(f"{name} takes a value like {shown!r}, not {str(value)[:40]!r}")
    if type(value) is int:
        whole(name, value, 0, MOST_STEPS if name.endswith("steps") else LARGEST)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} takes at most {LONGEST_TEXT} characters, not {len(value)}")
    return value


def check_shape(shape: tuple[int, ...], multiple: int = 1) -> None:
    """ValueError unless `shape` is (H, W, C) of images: sides of 1..256, multiples of `multiple`, 1 channel (grey) or 3
    (RGB)."""
    if len(shape) != 3 or not all(1 <= side <= 256 and side % multiple == 0 for side in shape[:2]) \
            or shape[2] not in (1, 3):
        raise ValueError(f"shape must be (H, W, C), with sides that are multiples of {multiple} of at most 256 and "
                         f"1 channel or 3, not {shape}")
