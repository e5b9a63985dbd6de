"""The laws that apply to a scheduler, whoever wrote it. Nothing here is random, and no law needs a network.

Where the data are a point or a Gaussian, every answer of the network is known, and so is what must come of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidiff.errors import UserError
from minidiff.verify.rows import Row, computed
from minidiff.verify.scheduler.law import Law
from minidiff.verify.scheduler.laws_of_runs import RUNS
from minidiff.verify.scheduler.laws_of_tables import TABLE
from minidiff.verify.scheduler.protocol import Scheduler, check, check_run
from minidiff.verify.scheduler.runs import refusal

STEPS = (3, 7, 10, 20, 50)                                  # lengths of runs; 3 and 7 do not divide T = 1000
LAWS = (*TABLE, *RUNS)


def report(scheduler: Scheduler, steps: Sequence[int] = STEPS) -> list[Row]:
    """A row for each law. steps: the lengths of the runs that are tried, 2 or more; a row tells the worst of them.

    UserError where the scheduler breaks the protocol, or no such run fits in its table. A law whose computation fails
    is broken, and says how.
    """
    check(scheduler)
    T = len(scheduler.alpha_bar)
    asked, steps = steps, [n for n in steps if 2 <= n <= T]
    if not steps:
        raise UserError(f"no run of {', '.join(map(str, asked))} steps fits in the scheduler's table of T = {T} times, "
                        f"which has runs of {f'2 to {T}' if T > 2 else 2} steps")

    def rows(laws: Sequence[Law], refused: str) -> list[Row]:
        return [row for law in laws
                for row in computed(law.name, law.computed, law.rows(scheduler, steps, refused))]

    of_table = rows(TABLE, "")                              # first of all, before any run
    check_run(scheduler)
    with np.errstate(all="ignore"):
        refused = refusal(scheduler, steps[-1])
    return of_table + rows(RUNS, refused)
