"""A system's configuration, a frozen dataclass, from the JSON of a file that may come from a stranger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

LARGEST = 4096                                              # no whole number in a configuration is larger
LONGEST = 16                                                # no tuple is longer
LONGEST_TEXT = 200                                          # characters


def config_from(kind: type, values):
    """A configuration of the dataclass `kind`: every field of its type, within reason.

    A field that the values lack takes its default.  TypeError or ValueError where a field is unknown or its value is
    of another type.
    """
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
        if dataclasses.is_dataclass(like):
            value = config_from(type(like), value)
        elif isinstance(like, tuple):
            if not isinstance(value, list | tuple) or not 1 <= len(value) <= LONGEST:
                raise ValueError(f"{f.name} takes a list of 1 to {LONGEST} values, not {str(value)[:40]!r}")
            value = tuple(_checked(f.name, v, like[0]) for v in value)
        else:
            value = _checked(f.name, value, like)
        fields[f.name] = value
    return kind(**fields)


def check_config(config) -> None:
    """ValueError where a file with this configuration would be refused: the same limits for writing and reading."""
    config_from(type(config), dataclasses.asdict(config))


def with_changes(config, changes: Mapping[str, object]):
    """The configuration with some of its fields changed; ValueError where one is unknown, of another type or refused.

    Fields that are configurations themselves, and the images' shape, cannot be changed.  What is returned can be read
    again from a file: each value is within the limits of `config_from`.
    """
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
           if not dataclasses.is_dataclass(getattr(config, f.name)) and f.name != "shape"}
    changed = {}
    for name, value in changes.items():
        if name not in own:
            fields = ", ".join(f"{field} ({default})" for field, default in own.items()) or "none"
            raise ValueError(f"its configuration has no {name}: it has {fields}")
        like = own[name]
        if isinstance(like, tuple):
            value = tuple(value) if isinstance(value, list | tuple) else value
        elif isinstance(like, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(like):
            raise ValueError(f"{name} takes a value like {like!r}, not {str(value)[:40]!r}")
        if isinstance(value, tuple):
            if not 1 <= len(value) <= LONGEST:
                raise ValueError(f"{name} takes 1 to {LONGEST} values, not {len(value)}")
            value = tuple(_checked(name, v, like[0]) for v in value)
        else:
            value = _checked(name, value, like)
        changed[name] = value
    return dataclasses.replace(config, **changed)


def _checked(name: str, value, like):
    """The value, if it is of the type of `like` and within reason."""
    if type(value) is not type(like):
        raise ValueError(f"{name} takes a value like {like!r}, not {str(value)[:40]!r}")
    if isinstance(value, int) and not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a whole number from 0 to {LARGEST}, not {str(value)[:40]}")
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
