"""A config.json of a pretrained part, whose values are checked when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minidiff.errors import UserError
from minidiff.input_files import read_file

MAX_BYTES = 1 << 20                                         # of a config.json; the longest known has 5 kB
LARGEST = 1 << 20                                           # no number in a configuration is larger


class Config:
    """The values of a JSON file; each method returns one, or its default, or raises UserError."""

    def __init__(self, values: dict[str, Any], path: str | Path):
        self.values, self.path = values, path

    @classmethod
    def load(cls, path: Path) -> Config:
        """The configuration in a file; UserError where it is missing or is not a JSON dict."""
        text = read_file(path, MAX_BYTES, ": it is no configuration")
        try:
            values = json_or_infinity(text)
        except ValueError:
            raise UserError(f"{path} is not JSON") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} is a JSON {type(values).__name__}, not a dict.")
        return cls(values, path)

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number within 0..2^20."""
        value = self._given(name, default)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self._error(name, value, f"a whole number within 0..{LARGEST}")
        return value

    def wholes(self, name: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """`count` whole numbers; a single one in the file stands for all."""
        value = self._given(name, default)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or any(type(v) is not int or not 0 <= v <= LARGEST for v in values):
            raise self._error(name, value, f"a whole number, or {count} of them")
        return tuple(values)

    def nested(self, name: str, counts: Sequence[int], default: int) -> list[tuple[int, ...]]:
        """counts[i] whole numbers for each i; a single one in the file stands for all of an i, or for all."""
        value = self._given(name, default)
        values = value if isinstance(value, list) else [value] * len(counts)
        parts = [v if isinstance(v, list) else [v] for v in values]
        numbers = [n for part in parts for n in part]
        if len(values) != len(counts) or any(type(n) is not int or not 0 <= n <= LARGEST for n in numbers):
            raise self._error(name, value, f"a whole number, {len(counts)} of them, or a list for each")
        if any(isinstance(v, list) and len(v) != n for v, n in zip(values, counts, strict=True)):
            raise self._error(name, value, f"lists of {', '.join(map(str, counts))} whole numbers")
        return [tuple(part) * (1 if isinstance(v, list) else n)
                for part, v, n in zip(parts, values, counts, strict=True)]

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._given(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0, which float32 has."""
        value = self.number(name, default)
        if not 1e-30 <= value <= 1e30:
            raise self._error(name, value, "a number above 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._given(name, default)
        if type(value) is not bool:
            raise self._error(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._given(name, default)
        if type(value) is not str:
            raise self._error(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= 16 or any(type(v) is not str for v in value):
            raise self._error(name, value, "1 to 16 strings")
        return tuple(value)

    def require(self, **expected) -> None:
        """UserError where a value is given and is another one than the networks of this package have."""
        for name, value in expected.items():
            given = self.values.get(name)
            if given is not None and given != value:
                has = "does not have" if value is None else f"has as {value!r} only"
                raise UserError(f"{self.path}: {name} is {repr(given)[:60]}, which minidiff {has}.")

    def _given(self, name: str, default):
        value = self.values.get(name)
        return default if value is None else value

    def _error(self, name: str, value, takes: str) -> UserError:
        return UserError(f"{self.path}: {name} takes {takes}, not {str(value)[:60]!r}.")


def json_or_infinity(text: bytes):
    """What the JSON text says; ValueError where it is none.  diffusers writes -Infinity, which JSON does not have."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
