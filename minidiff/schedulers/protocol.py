"""The protocol: what a scheduler must offer, to be put under the laws.

A scheduler goes down a list of times t_1 > ... > t_N, and ends at the clean image. What the network is shown at t_i
is alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, the level (alpha_i, sigma_i). A scheduler that keeps its samples
in another scale, such as x_0 + (sigma / alpha) eps, brings them to this one by `scale_input`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from minidiff.diffusion.gaussian import PREDICTIONS
from minidiff.errors import UserError


class Scheduler(Protocol):
    """Plain NumPy in and out, float64, samples along the first axis.

    It may also have
        scale_input(x_t, t)   what the network is shown                                  by default x_t itself
        levels                (n, 2), alpha and sigma of what is shown at `timesteps`    those of alpha_bar
        order                 of convergence, that it claims                             1
        extrapolates          whether each step takes x0_hat in the middle of its stride of log(alpha / sigma),
                              extrapolated from this and the last answer, as DPM-Solver++(2M) does          False
        evaluations           of the network a step: as often stands a time in the list, but the first      1
        rounding              of its arithmetic                                          float64's
    """

    predicts: str               # "eps", "x0" or "v": what `step` is given
    alpha_bar: np.ndarray       # (T,) signal power at the times 0 .. T-1 of training
    timesteps: np.ndarray       # the times at which the network is asked, in order; they need not be integers

    def set_steps(self, n: int) -> None:
        """Starts a fresh run of n steps, and sets `timesteps`."""

    def add_noise(self, x_0, eps, t):
        """x_t ~ q(x_t | x_0), (B, ...), at times t (B,): any of training before a run, those of its list in one."""

    def step(self, prediction, t, x_t, z):
        """The sample at the list's next time, from the network's answer at t; z is the noise, if it draws any.

        A run may begin at any time of its list. To refuse eps at SNR 0 is to raise ValueError.
        """


NEEDED = {
    "predicts": "is 'eps', 'x0' or 'v', what step is given",
    "alpha_bar": "is the array (T,) of the signal power at the times of training",
    "set_steps": "takes n, starts a fresh run of n steps and sets timesteps",
    "add_noise": "takes x_0 and eps (B, ...) and times t (B,), and returns the noisy x_t",
    "step": "takes the prediction, t, x_t and the noise z to draw, and returns the sample at the next time",
}


def check(scheduler: Any) -> None:
    """UserError where a scheduler lacks what the laws need."""
    for name, does in NEEDED.items():
        if not hasattr(scheduler, name):
            raise UserError(f"the scheduler {type(scheduler).__name__} has no {name}, which {does}")
    if scheduler.predicts not in PREDICTIONS:
        raise UserError(f"the scheduler's predicts must be one of {', '.join(PREDICTIONS)}, "
                        f"not {scheduler.predicts!r}")
    alpha_bar = np.asarray(scheduler.alpha_bar)
    if alpha_bar.ndim != 1 or alpha_bar.size < 2 or alpha_bar.dtype.kind != "f":
        raise UserError(f"the scheduler's alpha_bar must be an array (T,) of at least two floating-point numbers, "
                        f"not {alpha_bar.dtype} {alpha_bar.shape}")


# ---- what a scheduler may leave out ------------------------------------------------------------------------

def shown(scheduler: Scheduler, x_t, t):
    """What the network is shown of x_t at time t."""
    scale_input = getattr(scheduler, "scale_input", None)
    return x_t if scale_input is None else scale_input(x_t, t)


def levels(scheduler: Scheduler) -> np.ndarray:
    """alpha and sigma of what is shown at each of the run's times, (n, 2)."""
    given = getattr(scheduler, "levels", None)
    if given is not None:
        return np.asarray(given, np.float64)
    abar = np.asarray(scheduler.alpha_bar, np.float64)[np.asarray(scheduler.timesteps).astype(int)]
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=-1)


def rounding(scheduler: Scheduler) -> float:
    return getattr(scheduler, "rounding", 2.0**-53)
