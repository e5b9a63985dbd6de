"""The laws of any scheduler: another library's, a registered sampler, or your own. Read in this order:

    protocol.py          what a scheduler must offer: timesteps, add_noise, step, and what it predicts
    runs.py              runs on data for which every answer of the network is known
    law.py               how a law is written: its name, what it compares, and the function that makes its row
    table_laws.py        laws of the table, of add_noise and of the lists of times
    run_laws.py          laws of the results of a run
    laws.py              the report of all laws
    replay.py            a whole sampler as a scheduler
    from_diffusers.py    diffusers' schedulers
    by_name.py           LIBRARY:NAME on the command line
"""

from minidiff.verify.rows import as_dicts
from minidiff.verify.scheduler.by_name import load
from minidiff.verify.scheduler.laws import report
from minidiff.verify.scheduler.protocol import Scheduler

__all__ = ["Scheduler", "as_dicts", "load", "report"]
