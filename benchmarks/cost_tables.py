"""The costs that benchmarks/cost.py measured, as Markdown tables and as a picture.

The exponent of a column is the slope of its logarithm over that of the size, by least squares over the last three
sizes: a cost of c n^p has the exponent p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from operations import KINDS
from tables import markdown

from minidiff import pictures
from minidiff.pictures import plots

WORKS = EVALUATION, STEP = "evaluation", "training step"
LAST = 3                                                    # sizes that give the exponent


@dataclass(frozen=True)
class Cost:
    """Of one size; each mapping has an entry for each of WORKS."""

    ms: Mapping[str, float]
    mb: Mapping[str, float]                                 # 10^6 bytes
    operations: Mapping[str, Mapping[str, float]]           # kind -> operations

    def columns(self) -> dict[str, float]:
        """Title of a column -> the number in it."""
        return {f"{work}, {unit}": number for work in WORKS for unit, number in (
            ("ms", self.ms[work]), ("GFLOP", sum(self.operations[work].values()) / 1e9), ("MB", self.mb[work]))}


@dataclass(frozen=True)
class Line:
    """The costs along an axis."""

    title: str
    names: Sequence[str]                    # of the sizes
    amounts: Sequence[int]                  # the numbers to which the exponents refer
    costs: Sequence[Cost]


def exponent(sizes: Sequence[float], costs: Sequence[float], last: int = LAST) -> float | None:
    """p of costs that grow like c sizes^p, from the last of them; None for a single size, or where a cost is 0."""
    u, y = np.log(np.array(sizes[-last:], float)), np.array(costs[-last:], float)
    if len(u) < 2 or not (y > 0).all():
        return None
    # the slope of the line through (u, log y) that has the least squares
    u -= u.mean()
    return float(u @ np.log(y) / (u @ u))


# --- tables -----------------------------------------------------------------------------------------------

def cost_table(line: Line) -> str:
    """A row for each size, and last the exponents."""
    columns = [cost.columns() for cost in line.costs]
    rows = [[name, *map(_shown, cells.values())] for name, cells in zip(line.names, columns, strict=True)]
    rows.append(["exponent", *(_power(exponent(line.amounts, [cells[title] for cells in columns]))
                               for title in columns[0])])
    return markdown([line.title, *columns[0]], rows, words=1)


def kind_table(lines: Sequence[Line], base: Mapping[str, float]) -> str:
    """The exponent of each kind of operations in an evaluation.  base: kind -> operations at the size in common."""
    rows = [[kind, f"{base[kind] / sum(base.values()):.1%}",
             *(_power(exponent(line.amounts, [cost.operations[EVALUATION][kind] for cost in line.costs]))
               for line in lines)] for kind in KINDS]
    return markdown(["operations of an evaluation", "share", *(line.title for line in lines)], rows, words=1)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _power(value: float | None) -> str:
    return "-" if value is None else f"**{round(value, 2) + 0.0:.2f}**"  # not -0.00


# --- the picture ------------------------------------------------------------------------------------------

ALT = ("Milliseconds and megabytes of an evaluation and of a training step, on logarithmic axes, over pixels, "
       "channels, batch, tokens and cores; grey lines: the counted operations, drawn through the last point")


def draw(lines: Sequence[Line], path: Path) -> None:
    """Above, milliseconds and the counted operations as lines through the last point; below, megabytes."""
    from PIL import Image
    above, below = [], []
    for line in lines:
        times, sizes, name = [], [], line.title.partition(",")[0]
        for work in WORKS:
            ms, flop, mb = ([cost.columns()[f"{work}, {unit}"] for cost in line.costs]
                            for unit in ("ms", "GFLOP", "MB"))
            times += [("", line.amounts, [ms[-1] * n / flop[-1] for n in flop], "-"), (work, line.amounts, ms, "o")]
            sizes.append((work, line.amounts, mb, "o-"))
        above.append(plots.Panel(f"Time over {name}", name, "ms", times, log_x=True, log_y=True))
        below.append(plots.Panel(f"Memory over {name}", name, "MB", sizes, log_x=True, log_y=True))
    rows = [plots.panels(row, width=3.4, height=3.2) for row in (above, below)]
    paper = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for row, top in zip(rows, (0, rows[0].height), strict=True):
        paper.paste(row, (0, top))
    pictures.save(paper, path)
