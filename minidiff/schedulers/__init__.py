"""Other people's schedulers, under the laws that apply to them. Read in this order:

    protocol.py    what a scheduler must offer: timesteps, add_noise, step, and what it predicts
    laws.py        the laws, on data whose answers are known
    adapters.py    diffusers' schedulers, our own samplers, and anybody's object, by name
"""

from minidiff.schedulers.adapters import load
from minidiff.schedulers.laws import as_dicts, report
from minidiff.schedulers.protocol import Scheduler

__all__ = ["Scheduler", "as_dicts", "load", "report"]
