"""The report on a scheduler: one row for each law. It uses no random seed and no trained network.

If the data are a point or a Gaussian, the network's correct answers have a closed form, and so has the correct result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidiff.errors import UserError
from minidiff.verify.rows import Row, computed, skipped
from minidiff.verify.scheduler.protocol import Scheduler, check, check_run
from minidiff.verify.scheduler.run_laws import RUNS
from minidiff.verify.scheduler.runs import refusal
from minidiff.verify.scheduler.table_laws import TABLE

STEPS = (3, 7, 10, 20, 50)                                  # lengths of the runs; 3 and 7 do not divide T = 1000
LAWS = (*TABLE, *RUNS)


def report(scheduler: Scheduler, steps: Sequence[int] = STEPS) -> list[Row]:
    """One row for each law. steps: the lengths of the runs, each at least 2; a row shows the worst run.

    A law whose computation raises is broken, and its row shows the exception. UserError if the scheduler breaks the
    protocol, or if its table is too short for all of these runs.
    """
    check(scheduler)
    T = len(scheduler.alpha_bar)
    asked, steps = steps, [n for n in steps if 2 <= n <= T]
    if not steps:
        raise UserError(f"no run of {', '.join(map(str, asked))} steps fits in the scheduler's table of T = {T} times, "
                        f"which has runs of {f'2 to {T}' if T > 2 else 2} steps")

    of_table = [row for law in TABLE for row in computed(law, scheduler, steps)]   # before any run
    check_run(scheduler)
    with np.errstate(all="ignore"):
        refused = refusal(scheduler, steps[-1])
    if refused:
        return of_table + [skipped(law.name, law.computed, f"it refuses to run: {refused}") for law in RUNS]
    return of_table + [row for law in RUNS for row in computed(law, scheduler, steps)]
