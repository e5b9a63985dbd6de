"""Checks of what users pass: whole and finite numbers, one of several names, and NumPy's numbers made Python's."""

import math
import operator
from collections.abc import Collection

import numpy as np


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """The value as an int; ValueError, with the name, unless it is a whole number from `least` to `most`.

    Integers of NumPy are whole numbers too, and arrays of shape () that hold one.  True, 5.0 and "5" are not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or least is not None and number < least or most is not None and number > most:
        limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{limits}, not {_shown(value)}")
    return number


def finite(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """The value as a float; ValueError, with the name, unless it is a finite number from `least` to `most`.

    NumPy's numbers are numbers too, and arrays of shape () that hold one.  True and "5" are not.
    """
    single = isinstance(value, int | float | np.generic | np.ndarray) and np.ndim(value) == 0
    try:
        number = float(value) if single and np.asarray(value).dtype.kind in "iufO" else math.nan
    except (OverflowError, TypeError, ValueError):          # a whole number of 309 digits or more, or an object
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        low = "" if least == -math.inf else f" of at least {least:g}"
        limits = low if most == math.inf else f" from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a finite number{limits}, not {_shown(value)}")
    return number


def one_of(name: str, value: object, choices: Collection[str], error: type[ValueError] = ValueError) -> None:
    """An error, which lists the choices, unless the value is one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}, not {_shown(value)}")


def _shown(value: object) -> str:
    try:
        return repr(value)[:40]
    except ValueError:                                      # Python writes no number of more than 4,300 digits
        return f"a number of {type(value).__name__} with more than 4,300 digits"


def with_plain_numbers(config: object) -> None:
    """Writes NumPy's numbers in the fields of a frozen dataclass as Python's, which JSON holds; for __post_init__."""
    for name, value in list(vars(config).items()):
        if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
            object.__setattr__(config, name, value.item())
