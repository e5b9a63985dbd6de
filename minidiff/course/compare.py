"""What laws are written with: random numbers and schedules, and a sentence where a result is not what a law says.

    if (said := differs("x_t", got, expected, f"at t = {t}")):
        return said
"""

from __future__ import annotations

import numpy as np

from minidiff.engine.random import generator

# of the largest number that a result should hold: a learner may add in another order
TOLERANCE = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4}


def negative_root(arguments: dict) -> str:
    """Why a step from t to s, else to t-1, often has the root of a negative number: for `if_nan`."""
    if arguments.get("s", arguments["t"] - 1) == -1:
        return "in the step to the clean image alpha_bar[-1] is Python's last entry, and alpha_bar_{-1} means 1"
    return "is a ratio of alpha_bars upside down? alpha_bar falls with t, so that the one of the later time is smaller"


def stream(exercise: int, law: int = 0) -> np.random.Generator:
    """The random numbers of a law of an exercise (1, 2, ...), or of its probe (0): the same in every run."""
    return generator(0, "an exercise of the course", exercise, law)


def random_betas(rng: np.random.Generator, T: int | None = None) -> np.ndarray:
    """betas (T,) float64 from 0.003 to 0.3, T from 2 to 12 if it is not given: any such table is a schedule."""
    return np.exp(rng.uniform(np.log(0.003), np.log(0.3), T or int(rng.integers(2, 13))))


def random_alpha_bar(rng: np.random.Generator, T: int | None = None) -> np.ndarray:
    """alpha_bar (T,) float64 of such betas, strictly falling within (0, 1)."""
    table, left = [], 1.0
    for beta in random_betas(rng, T):
        left *= 1 - beta
        table.append(left)
    return np.array(table)


# ---- results that are one ------------------------------------------------------------------------------------

def alike(a, b) -> bool:
    """Whether two results of a probe are the same, to rounding."""
    if isinstance(a, (tuple, list)) or isinstance(b, (tuple, list)):
        return isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b) \
            and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if callable(a) or callable(b):                          # what they do is for the probe to see
        return callable(a) and callable(b)
    try:
        a, b = np.asarray(a), np.asarray(b)
    except ValueError:
        return False
    if a.shape != b.shape or a.dtype.kind not in "fiub" or b.dtype.kind not in "fiub":
        return a.shape == b.shape and a.dtype.kind == b.dtype.kind and bool(np.all(a == b))
    return bool(np.allclose(a, b, rtol=1e-7, atol=1e-7 * _largest(b), equal_nan=True))


def _largest(a: np.ndarray) -> float:
    a = np.abs(a.astype(np.float64))
    return float(a[np.isfinite(a)].max(initial=0))


# ---- sentences ---------------------------------------------------------------------------------------------

class Form(str):
    """A sentence about a result of the wrong form, such as None or another shape: a plain fact, before any law."""


def differs(what: str, got, expected, where: str, *, dtype=None, like: str = "", tolerance: float | None = None,
            given: dict | None = None) -> str | None:
    """None if `got` is `expected`; else one sentence with the place and the numbers.

    expected: an array or a number; `got` must have its shape.  dtype: the one that `got` must have, too; None for any
    number.  like: the argument that has this dtype.  tolerance: relative to the largest number in `expected`; None for
    that of `dtype`, or of float64.  given: name -> what the number was computed from, arrays of the shape of `expected`
    or numbers; the sentence has their values at the same place, so that the learner can do that number again.
    """
    expected = np.asarray(expected)
    if (said := misshapen(what, got, expected.shape, where, dtype=dtype, like=like)):
        return said
    got = np.asarray(got)
    if tolerance is None:
        tolerance = TOLERANCE.get(np.dtype(dtype or np.float64), TOLERANCE[np.dtype(np.float64)])
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0) if expected.size else 0
    with np.errstate(invalid="ignore"):
        wrong = ~((got == expected) | (np.abs(got - expected) <= tolerance * max(largest, 1e-30)))
    if not wrong.any():
        return None
    worst = np.where(wrong, np.nan_to_num(np.abs(got - expected), nan=np.inf), -1)
    rounded = tolerance < ROUNDED and worst.max() <= ROUNDED * largest
    index = tuple(int(i) for i in np.unravel_index(np.argmax(worst), worst.shape))
    inputs = [f"{name} = {np.broadcast_to(value, expected.shape)[index] + 0.0:.7g}"      # + 0.0: -0 is 0
              for name, value in (given or {}).items()]
    return f"{what}{list(index) if index else ''} is {_number(got[index], expected[index])} and should be " \
           f"{_number(expected[index], got[index])}{NAN if np.isnan(got[index]) else ''}" \
           + (SINGLE if rounded else "") \
           + (f", from {', '.join(inputs)}" if inputs else "") + f", {where}"


NAN = " (nan comes from the square root or the logarithm of a negative number, or from 0/0)"
ROUNDED = 1e-6                                              # relative, and more than a few float32 roundings
SINGLE = " (it agrees to about 7 digits: is something float32?)"


def misshapen(what: str, got, shape: tuple[int, ...], where: str, *, dtype=None, like: str = "") -> str | None:
    """None if `got` is an array of that shape (a number will do for the shape ()); else one sentence."""
    number = isinstance(got, (int, float, np.number, np.bool_)) and not isinstance(got, bool)
    if not isinstance(got, np.ndarray) and not (number and shape == ()):
        wanted = f"an array of shape {shape}" if shape else "a number"
        remedy = ": is a `return` missing?" if got is None else \
            ": wrap it in np.array(...)" if isinstance(got, list) and shape else ""
        return Form(f"{what} should be {wanted} and is {described(got)}{remedy}, {where}")
    if np.shape(got) != shape:
        return Form(f"{what} has shape {np.shape(got)} and should have shape {shape}, {where}")
    if np.asarray(got).dtype.kind not in "fiu":
        return Form(f"{what} should hold real numbers and has dtype {np.asarray(got).dtype}, {where}")
    if dtype is not None and np.asarray(got).dtype != np.dtype(dtype) and not (number and type(got) in (int, float)):
        return Form(f"{what} has dtype {np.asarray(got).dtype} and should have {np.dtype(dtype)}: end with "
                    f".astype({f'{like}.dtype' if like else f'np.{np.dtype(dtype)}'}), {where}")
    return None


def not_tuple(what: str, got, count: int, where: str) -> str | None:
    """None if `got` is a tuple or list of `count` results; else one sentence.  what: their names."""
    if isinstance(got, (tuple, list)) and len(got) == count:
        return None
    remedy = ": is a `return` missing?" if got is None else ""
    return Form(f"the result should be {count} values, ({what}), and is {described(got)}{remedy}, {where}")


def unequal(what: str, got, expected, where: str) -> str | None:
    """None if `got` equals `expected`, for texts, whole numbers, and lists of them; else one sentence."""
    if isinstance(got, np.ndarray) and isinstance(expected, (list, tuple)):
        got = got.tolist()
    same = type(got) is type(expected) or isinstance(got, (int, np.integer)) and isinstance(expected, int)
    if same and not isinstance(got, bool) and got == expected:
        return None
    return f"{what} is {described(got)} and should be {described(expected)}, {where}"


def described(value) -> str:
    """A value in a few words, for sentences: a short number as it is, of an array its shape and dtype."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        text = f"{value:.6g}" if isinstance(value, float) else repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, (tuple, list)):
        inside = ", ".join(described(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return f"a {type(value).__name__}"


def numbers(values) -> str:
    """A few numbers, for sentences."""
    return "[" + ", ".join(f"{value:.4g}" for value in np.asarray(values).ravel()) + "]"


def _number(a, other) -> str:
    """The number with enough digits to tell it from the other one."""
    a, other = float(a), float(other)
    for digits in (4, 6, 9, 12, 17):
        if f"{a:.{digits}g}" != f"{other:.{digits}g}":
            return f"{a:.{digits}g}"
    return f"{a!r}"
