"""The protocol: what a scheduler must offer, to be put under the laws.

A scheduler goes down a list of times t_1 > ... > t_N, and ends at the clean image. What the network is shown at t_i
is alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, the level (alpha_i, sigma_i). A scheduler that keeps its samples
in another scale, such as x_0 + (sigma / alpha) eps, brings them to this one by `scale_input`.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import numpy as np

from minidiff.diffusion.gaussian import PREDICTIONS
from minidiff.errors import UserError
from minidiff.verify.loading import brief


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
METHODS = {"set_steps": 1, "add_noise": 3, "step": 4, "scale_input": 2}     # how many arguments each is given


def check(scheduler: Any) -> None:
    """UserError where a scheduler lacks what the laws need. Nothing of it is run."""
    kind, nothing = type(scheduler).__name__, object()
    for name, does in NEEDED.items():
        if _read(scheduler, name, nothing) is nothing:
            raise UserError(f"the scheduler {kind} has no {name}, which {does}")
    for name, count in METHODS.items():
        method = _read(scheduler, name, None)
        if method is None and name not in NEEDED:
            continue
        if not callable(method):
            raise UserError(f"the scheduler's {name} must be a method, not {type(method).__name__}")
        try:
            signature = inspect.signature(method)
        except (ValueError, TypeError):                     # of what is not written in Python there may be none
            continue
        try:
            signature.bind(*[None] * count)
        except TypeError as error:
            raise UserError(f"the scheduler's {name} does not take the {count} arguments that it is given: "
                            f"{error}") from error
    predicts = _read(scheduler, "predicts")
    if not isinstance(predicts, str) or predicts not in PREDICTIONS:
        raise UserError(f"the scheduler's predicts must be one of {', '.join(PREDICTIONS)}, not {predicts!r}")
    alpha_bar = _array(_read(scheduler, "alpha_bar"))
    if alpha_bar is None or alpha_bar.ndim != 1 or alpha_bar.size < 2 or alpha_bar.dtype.kind != "f":
        raise UserError(f"the scheduler's alpha_bar must be an array (T,) of at least two floating-point numbers, "
                        f"not {_kind(alpha_bar)}")
    for name, least in {"order": 1, "evaluations": 1, "rounding": 0}.items():
        number = _read(scheduler, name, 1)
        if not isinstance(number, (int, float, np.number)) or not least <= number < math.inf:
            raise UserError(f"the scheduler's {name} must be a number of at least {least}, not {number!r}")


def check_run(scheduler: Any) -> None:
    """UserError where a run of 3 steps breaks the protocol: what `set_steps` leaves, and what a step returns.

    To be called after what is asked of a scheduler before any run. Where a step raises, the laws say so.
    """
    n = min(3, len(scheduler.alpha_bar))
    try:
        scheduler.set_steps(n)
    except (Exception, SystemExit) as error:
        raise UserError(f"the scheduler's set_steps({n}) raises {brief(error)}") from error
    times = _array(_read(scheduler, "timesteps", None))
    if times is None or times.ndim != 1 or not times.size or times.dtype.kind not in "iuf" \
            or not np.isfinite(times).all():
        raise UserError(f"the scheduler's set_steps({n}) must set timesteps to an array (n,) of finite times, "
                        f"not {_kind(times)}")
    given = _read(scheduler, "levels", None)
    level = _array(given)
    if given is not None and (level is None or level.shape != (len(times), 2) or level.dtype.kind != "f"):
        raise UserError(f"the scheduler's levels must be an array ({len(times)}, 2), alpha and sigma at each of its "
                        f"timesteps, not {_kind(level)}")
    t, x = scheduler.timesteps[0], np.full((2, 1, 1, 1), 0.5)
    for name, call in {"add_noise": lambda: scheduler.add_noise(x, x, np.full(2, t)),
                       "scale_input": lambda: shown(scheduler, x, t),
                       "step": lambda: scheduler.step(x, t, x, np.zeros_like(x))}.items():
        try:
            with np.errstate(all="ignore"):
                result = call()
        except (Exception, SystemExit):                     # a refusal, or a failure that the laws run into
            continue
        if getattr(result, "shape", ()) != x.shape:
            raise UserError(f"the scheduler's {name} must return an array of its sample's shape {x.shape}, "
                            f"not {_kind(result)}")


def _read(scheduler: Any, name: str, *default: Any) -> Any:
    """The attribute, which may be a property that raises anything at all."""
    try:
        return getattr(scheduler, name, *default)
    except (Exception, SystemExit) as error:
        raise UserError(f"the scheduler's {name} cannot be read: {brief(error)}") from error


def _array(a: Any) -> np.ndarray | None:
    """None where it is none: lists whose rows differ in length, say."""
    try:
        return np.asarray(a)
    except (Exception, SystemExit):
        return None


def _kind(a: Any) -> str:
    """In a sentence, what it is: array and shape, or type."""
    if a is None:
        return "None or lists of several lengths"
    if not isinstance(a, np.ndarray):
        return type(a).__name__
    if a.dtype == object:
        return repr(a.item()) if not a.ndim else "objects"
    return f"{a.dtype} {a.shape}" + ("" if a.dtype.kind not in "fc" or np.isfinite(a).all() else " with NaN or inf")


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
