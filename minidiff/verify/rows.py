"""A row shows one equation: expected and measured value, their difference, and the allowed difference."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from minidiff.diffusion.schedules import Schedule
from minidiff.errors import brief

EPS = float(np.finfo(np.float64).eps)                       # 2.2e-16
ATOMS = 16 * EPS                                            # rounding of a few operations on numbers of size 1

KEPT, BROKEN, SKIPPED = "kept", "BROKEN", "skipped"


@dataclass(frozen=True)
class Row:
    """expected, measured, error and tolerance belong to the worst case; `where` names it.

    law: number and name. computed: the quantity on both sides. formula: the equation; the table shows it if the law
    is broken. error: |measured - expected|; NaN or inf if it cannot be computed, which never passes.
    reason: why the law does not apply. Such a row has no numbers, and neither passes nor fails.
    """

    law: str
    computed: str
    expected: float
    measured: float
    error: float
    tolerance: float
    formula: str = ""
    where: str = ""
    reason: str = ""
    random: bool = False                                    # whether random numbers enter: then `where` has the seed
    side: str = ""                                          # "<=" or ">=" if `expected` is a bound, not a value

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)           # False for NaN

    @property
    def verdict(self) -> str:
        return SKIPPED if self.reason else KEPT if self.passed else BROKEN

    def drawn_from(self, seed: int) -> "Row":
        """The row with its seed in `where`, if random numbers entered."""
        return replace(self, where=f"{self.where}, seed {seed}".lstrip(", ")) if self.random else self


@dataclass(frozen=True)
class Law:
    """A law of a schedule, rows(schedule, rng), or of a scheduler, rows(scheduler, steps).

    name: number and name, as in its first row. rows: a function that yields the rows one by one.
    computed: the text of `computed` in the row that reports an exception.
    """

    name: str
    rows: Callable[..., Iterable[Row]]
    computed: str = "the law could not be computed"


def computed(law: Law, *arguments) -> list[Row]:
    """The rows of law.rows(*arguments). If it raises: the rows yielded before, and a broken row with the error.

    One failing law therefore does not hide another. A division by zero gives NaN, which fails its row. Whatever the
    user's code raises is caught, SystemExit(0) too, which would end the command with status 0; only Ctrl-C is not.
    """
    done: list[Row] = []
    with np.errstate(all="ignore"):
        try:
            for row in law.rows(*arguments):
                done.append(row)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            done.append(Row(law.name, law.computed, math.nan, math.nan, math.inf, 0.0, where=brief(error)))
    return done


def skipped(law: str, computed: str, reason: str) -> Row:
    """The row of a law that does not apply, and the reason."""
    return Row(law, computed, math.nan, math.nan, math.nan, math.nan, reason=reason)


def compare(
    law: str,
    computed: str,
    expected,
    measured,
    tolerance,
    formula: str,
    where: Callable[[int], str] | str = "",
    random: bool = False,
) -> Row:
    """The row of the worst of n cases: the one with the largest ratio of error to tolerance.

    expected, measured, tolerance: numbers or arrays, broadcast together; n is their size.
    where: the worst case's name, or a function of its index that returns the name.
    """
    expected, measured, tolerance = (
        a.ravel() for a in np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (expected, measured, tolerance)))
    )
    tolerance = np.clip(tolerance, 0, 1e300)                # an infinite error is never allowed
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(measured == expected, 0.0, np.abs(measured - expected))      # so that -inf equals -inf
        # an error of 0 has ratio 0 even if the tolerance is 0; argmax treats NaN as the largest
        excess = np.where(error == 0, 0.0, error / np.maximum(tolerance, np.finfo(np.float64).tiny))
    i = int(np.argmax(excess))
    return Row(law, computed, float(expected[i]), float(measured[i]), float(error[i]), float(tolerance[i]), formula,
               where(i) if callable(where) else where, random=random)


def count(law: str, computed: str, wrong, formula: str, where: Callable[[int], str] | str = "") -> Row:
    """The row of a law of yes or no: it counts the booleans `wrong` (n,) that are True; none may be."""
    wrong = np.asarray(wrong).ravel()
    i = int(np.argmax(wrong)) if wrong.any() else 0         # the first
    return Row(law, computed, 0.0, float(wrong.sum()), float(wrong.sum()), 0.0, formula,
               where(i) if callable(where) and wrong.size else "" if callable(where) else where)


# ---- the table -------------------------------------------------------------------------------------------

HEADS = ("law", "what is computed", "expected", "measured", "error", "allowed", "verdict")
WIDTH = 118                                                 # columns of a terminal, at most


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; below them the formula and numbers of each broken law, and the skipped laws."""
    cells = [
        (r.law, r.computed, *(["-"] * 4 if r.reason else
                              [_expected(r, _number), _number(r.measured), f"{r.error:.1e}", f"{r.tolerance:.1e}"]),
         r.verdict)
        for r in rows
    ]
    widths = [max(len(c[k]) for c in [HEADS, *cells]) for k in range(len(HEADS))]
    # columns of numbers keep their width; the two columns of words share the rest and are wrapped
    words = WIDTH - sum(widths[2:]) - 2 * (len(HEADS) - 1)
    widths[0] = min(widths[0], words // 2)
    widths[1] = min(widths[1], words - widths[0])
    lines = _lines(HEADS, widths) + ["  ".join("-" * w for w in widths)]
    for c in cells:
        lines += _lines(c, widths)
    for r in rows:
        if r.verdict == BROKEN:
            lines += ["", *_wrap(f"BROKEN  {r.law}: {r.computed}", "")]
            lines += _wrap(f"formula   {r.formula}", "  ") if r.formula else []
            lines += _wrap(f"numbers   expected {_expected(r, '{:.17g}'.format)}, measured {r.measured:.17g}, "
                           f"error {r.error:.3g}, allowed {r.tolerance:.3g}", "  ")
            lines += _wrap(f"where     {r.where}", "  ") if r.where else []
    verdicts = [r.verdict for r in rows]
    aside = [line for r in rows if r.reason for line in _wrap(f"skipped   {r.law}: {r.reason}", "")]
    lines += ["", *aside, f"{verdicts.count(KEPT)} kept, {verdicts.count(BROKEN)} broken, "
                          f"{verdicts.count(SKIPPED)} skipped"]
    return "\n".join(lines)


def as_dict(schedule: Schedule, rows: Sequence[Row], *, source: str | None = None, seed: int | None = None) -> dict:
    """The report as a dictionary for JSON. source: a description of the schedule's origin; seed: of `report`."""
    return {"schedule": schedule.name, "T": schedule.T, "source": source, "seed": seed, "rows": as_dicts(rows)}


def as_dicts(rows: Sequence[Row]) -> list[dict]:
    """The rows as dictionaries for JSON, with None (null) for NaN and infinity."""
    def plain(a):
        return None if isinstance(a, float) and not math.isfinite(a) else a

    return [{k: plain(v) for k, v in asdict(row).items()} | {"verdict": row.verdict} for row in rows]


def _expected(row: Row, shown: Callable[[float], str]) -> str:
    return f"{row.side} {shown(row.expected)}".lstrip()


def _number(a: float) -> str:
    return f"{a:.6g}"


def _lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row of the table, in several lines if its words are wrapped; numbers are right-aligned."""
    parts = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for k in range(max(map(len, parts))):
        texts = [part[k] if k < len(part) else "" for part in parts]
        lines.append("  ".join(
            f"{text:>{width}}" if 2 <= j <= 5 else f"{text:<{width}}"
            for j, (text, width) in enumerate(zip(texts, widths, strict=True))).rstrip())
    return lines


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 10)
