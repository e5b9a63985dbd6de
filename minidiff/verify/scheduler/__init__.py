"""Other people's schedulers, under the laws that apply to them. Read in this order:

    protocol.py          what a scheduler must offer: timesteps, add_noise, step, and what it predicts
    runs.py              runs on data whose answers are known
    law.py               a law: its name, what is computed, and what makes its row
    laws_of_tables.py    the laws of the table, of the noise that is added and of the lists of times
    laws_of_runs.py      the laws of what comes of a run
    laws.py              the report of them all
    adapters.py          diffusers' schedulers, our own samplers, and anybody's object, by name
"""

from minidiff.verify.rows import as_dicts
from minidiff.verify.scheduler.adapters import load
from minidiff.verify.scheduler.laws import report
from minidiff.verify.scheduler.protocol import Scheduler

__all__ = ["Scheduler", "as_dicts", "load", "report"]
