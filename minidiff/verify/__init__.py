"""Does a noise schedule keep the laws of q(x_t | x_0)?  For whoever wants to check, on any table of betas.

    from minidiff import verify
    rows = verify.report(schedules.cosine())
    print(verify.table(rows))

A law is an equation. What minidiff's own functions give on the schedule's table stands on one side, `measured`;
what the definition of the chain gives by another way stands on the other, `expected`:

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z,   z ~ N(0, I)                                   DDPM eq. 2

The error may be as large as the rounding of float64 makes it (or chance, where numbers are drawn), and each row
says how large that is. Read in this order:

    forward.py    single steps compose to q(x_t | x_0); the SNR falls, to noise
    reverse.py    Bayes, the posterior, the four names of a prediction, the best denoiser, the bound
    sampling.py   what one step of a sampler does to the marginals, and that no noise is left at the end
    rows.py       a row, how two sides are compared, and the table
    own.py        the reader's own schedule, from a file or a function
    watch.py      pictures: the marginals over t, and one image as it drowns
"""

import numpy as np

from minidiff.diffusion.schedules import Schedule
from minidiff.verify.forward import FORWARD, given_betas
from minidiff.verify.reverse import REVERSE
from minidiff.verify.rows import BROKEN, KEPT, SKIPPED, Law, Row, as_dict, as_dicts, computed, skipped, table
from minidiff.verify.sampling import SAMPLING

__all__ = ["BROKEN", "KEPT", "LAWS", "SKIPPED", "Row", "as_dict", "as_dicts", "report", "skipped", "table"]

LAWS = (*FORWARD, *REVERSE, *SAMPLING)                      # the rows of each: (schedule, rng) -> rows
# Which of the streams of a seed: chosen by hand, so that seed 0 draws no rare number on the default schedule. Whoever
# wants numbers that nobody chose takes another seed.
STREAM = 1


def report(schedule: Schedule, *, betas=None, seed: int = 0) -> list[Row]:
    """One row for each equation that a schedule must satisfy; `table` prints them.

    betas: (T,), what the schedule was made from, where it was made from betas; its table is then held to them.
    TypeError where schedule is no Schedule, ValueError where betas are not T numbers.
    A row passes, fails, or says why it does not apply. The drawn numbers come from `seed`; with any seed, a
    schedule that keeps every law is called broken by chance at most once in a million reports.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError("schedule must be a Schedule, such as schedules.from_betas([...]), "
                        f"got {type(schedule).__name__}")
    rows: list[Row] = []
    if betas is not None:
        if np.shape(betas) != (schedule.T,):
            raise ValueError(f"betas must be ({schedule.T},) numbers, as many as the schedule has times, "
                             f"got shape {np.shape(betas)}")
        rows += computed(Law("1 given betas", given_betas), schedule, betas)
    for i, law in enumerate(LAWS):
        rng = np.random.default_rng([seed, i, STREAM])      # a law's numbers do not depend on the other laws
        rows += computed(law, schedule, rng)
    return [row.drawn_from(seed) for row in rows]
