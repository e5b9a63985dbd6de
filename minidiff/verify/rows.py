"""One row says one equation: what was expected, what was measured, how far apart they are and may be."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from minidiff.diffusion.schedules import Schedule

EPS = float(np.finfo(np.float64).eps)                       # 2.2e-16
ATOMS = 16 * EPS                                            # what a few operations on numbers of size 1 may round

KEPT, BROKEN, SKIPPED = "kept", "BROKEN", "skipped"


@dataclass(frozen=True)
class Row:
    """expected, measured, error and tolerance are those of the worst case that was tried; `where` names it.

    law: number and name. computed: what stands on both sides. formula: the equation, told where it fails.
    error: |measured - expected|, NaN or inf where there is none to be had, which never passes.
    reason: why the law does not apply; such a row has no numbers, and neither passes nor fails.
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
    random: bool = False                                    # whether drawn numbers enter: `where` then has the seed
    side: str = ""                                          # "<=" or ">=" where `expected` is a bound, not a value

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

    name: number and name, as in its first row. rows: yields the rows, one by one.
    computed: what stands in the row if the law raises.
    """

    name: str
    rows: Callable[..., Iterable[Row]]
    computed: str = "the law could not be computed"


def computed(law: Law, *arguments) -> list[Row]:
    """The rows of law.rows(*arguments). If it raises: the rows until then, and a broken one that says how.

    A wrong formula therefore hides no other. A division by zero gives NaN, which fails its row. SystemExit is caught
    as well: `raise SystemExit(0)` would otherwise end the command with success.
    """
    done: list[Row] = []
    with np.errstate(all="ignore"):
        try:
            for row in law.rows(*arguments):
                done.append(row)
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__}: {error}"
            done.append(Row(law.name, law.computed, math.nan, math.nan, math.inf, 0.0, where=why))
    return done


def skipped(law: str, computed: str, reason: str) -> Row:
    """A law that does not apply to this schedule."""
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
    """The row of the worst among many cases: the largest error in units of what is allowed there.

    expected, measured, tolerance: numbers or arrays that broadcast to (n,). where: names case i.
    """
    expected, measured, tolerance = (
        a.ravel() for a in np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (expected, measured, tolerance)))
    )
    tolerance = np.clip(tolerance, 0, 1e300)                # an infinite error is never allowed
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(measured == expected, 0.0, np.abs(measured - expected))      # so that -inf equals -inf
        # an error of 0 is worth 0 where nothing is allowed, too; argmax finds a NaN before any number
        excess = np.where(error == 0, 0.0, error / np.maximum(tolerance, np.finfo(np.float64).tiny))
    i = int(np.argmax(excess))
    return Row(law, computed, float(expected[i]), float(measured[i]), float(error[i]), float(tolerance[i]), formula,
               where(i) if callable(where) else where, random=random)


def count(law: str, computed: str, wrong, formula: str, where: Callable[[int], str] | str = "") -> Row:
    """The row of a law that holds or not: how many of the booleans `wrong` (n,) are True, where none may be."""
    wrong = np.asarray(wrong).ravel()
    i = int(np.argmax(wrong)) if wrong.any() else 0         # the first
    return Row(law, computed, 0.0, float(wrong.sum()), float(wrong.sum()), 0.0, formula,
               where(i) if callable(where) and wrong.size else "" if callable(where) else where)


# ---- the table -------------------------------------------------------------------------------------------

HEADS = ("law", "what is computed", "expected", "measured", "error", "allowed", "verdict")
WIDTH = 118                                                 # columns of a terminal, at most


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; below it each broken law's formula and numbers, and what does not apply."""
    cells = [
        (r.law, r.computed, *(["-"] * 4 if r.reason else
                              [_expected(r, _number), _number(r.measured), f"{r.error:.1e}", f"{r.tolerance:.1e}"]),
         r.verdict)
        for r in rows
    ]
    widths = [max(len(c[k]) for c in [HEADS, *cells]) for k in range(len(HEADS))]
    # numbers keep their columns; the two of words share what is left, and wrap
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
    """The report as JSON has it. source: where the schedule came from, in words; seed: of the drawn numbers."""
    return {"schedule": schedule.name, "T": schedule.T, "source": source, "seed": seed, "rows": as_dicts(rows)}


def as_dicts(rows: Sequence[Row]) -> list[dict]:
    """The rows as JSON has them: what is no finite number is null."""
    def plain(a):
        return None if isinstance(a, float) and not math.isfinite(a) else a

    return [{k: plain(v) for k, v in asdict(row).items()} | {"verdict": row.verdict} for row in rows]


def _expected(row: Row, shown: Callable[[float], str]) -> str:
    return f"{row.side} {shown(row.expected)}".lstrip()


def _number(a: float) -> str:
    return f"{a:.6g}"


def _lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row of the table, in as many lines as its words need; numbers to the right, words to the left."""
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
