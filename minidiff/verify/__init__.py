"""Does a noise schedule keep the laws of q(x_t | x_0)?  A check for any table of betas.

    from minidiff import verify
    rows = verify.report(schedules.cosine())
    print(verify.table(rows))

A law is an equation. On one side, `measured`, is what minidiff's functions compute from the schedule's table. On the
other, `expected`, is what follows from the definition of the chain by an independent calculation:

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z,   z ~ N(0, I)                                   DDPM eq. 2

Each row states the tolerance: the rounding of float64, or chance where random numbers are drawn. Read in this order:

    rows.py             a row, how the two sides are compared, a law, and the table
    forward.py          single steps compose to q(x_t | x_0); the SNR falls until only noise is left
    reverse.py          Bayes, the posterior, the four forms of a prediction, the best denoiser, the bound
    loading.py          imports MODULE:NAME
    scheduler/          the laws of any scheduler: minidiff's, another library's, or yours
    sampling.py         the same laws for each registered sampler, and the exact steps of minidiff's samplers
    user_schedule.py    the user's own schedule, from a file or a function
    watch.py            pictures: the marginals over t, and one image while noise is added to it
"""

from collections.abc import Iterator

import numpy as np

from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import generator
from minidiff.verify.forward import FORWARD, given_betas
from minidiff.verify.reverse import REVERSE
from minidiff.verify.rows import BROKEN, KEPT, SKIPPED, Law, Row, as_dict, as_dicts, computed, skipped, table
from minidiff.verify.sampling import SAMPLING

__all__ = ["BROKEN", "KEPT", "LAWS", "SKIPPED", "Row", "as_dict", "as_dicts", "law_by_law", "report", "skipped",
           "table"]

LAWS = (*FORWARD, *REVERSE, *SAMPLING)                      # the rows of each: (schedule, rng) -> rows


def report(schedule: Schedule, *, betas=None, seed: int = 0) -> list[Row]:
    """One row for each equation that a schedule must satisfy; `table` prints them.

    betas: (T,), if the schedule was made from betas; its table is then compared with them.
    A row passes, fails, or says why it does not apply. The random numbers come from `seed`. For a random seed, a
    correct schedule fails by chance in at most one of a million reports.
    TypeError if schedule is not a Schedule, ValueError if betas are not T numbers.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError("schedule must be a Schedule, such as schedules.from_betas([...]), "
                        f"got {type(schedule).__name__}")
    rows: list[Row] = []
    if betas is not None:
        if np.shape(betas) != (schedule.T,):
            raise ValueError(f"betas must be ({schedule.T},) numbers, as many as the schedule has times, "
                             f"got shape {np.shape(betas)}")
        rows += computed(Law("1 given betas", given_betas), schedule, betas)         # draws no random numbers
    rows += [row for of_one in law_by_law(schedule, seed=seed) for row in of_one]
    return rows


def law_by_law(schedule: Schedule, *, seed: int = 0) -> Iterator[list[Row]]:
    """The same rows, those of one law at a time, as soon as they are computed."""
    for i, law in enumerate(LAWS):
        # its numbers do not depend on the other laws
        yield [row.drawn_from(seed) for row in computed(law, schedule, generator(seed, "law", i))]
