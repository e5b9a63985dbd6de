"""What every floor needs to check of numbers: whether they are whole, and that they are Python's."""

import operator

import numpy as np


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """The value as an int; ValueError, which names it, unless it is a whole number from `least` to `most`.

    Integers of NumPy are whole numbers too, and arrays of shape () that hold one.  True, 5.0 and "5" are not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or least is not None and number < least or most is not None and number > most:
        limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{limits}, not {repr(value)[:40]}")
    return number


def with_plain_numbers(config: object) -> None:
    """Writes NumPy's numbers in the fields of a frozen dataclass as Python's, which JSON holds; for __post_init__."""
    for name, value in list(vars(config).items()):
        if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
            object.__setattr__(config, name, value.item())
