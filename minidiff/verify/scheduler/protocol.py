"""The protocol: the attributes and methods that the laws need of a scheduler.

A scheduler follows a list of falling times t_1 > ... > t_N, and ends at the clean image. At t_i the network is shown
alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1; the pair (alpha_i, sigma_i) is called the level. If a scheduler keeps
its samples in another scale, such as x_0 + (sigma / alpha) eps, its `scale_input` converts them to this one.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import numpy as np

from minidiff.diffusion.gaussian import PREDICTIONS
from minidiff.errors import UserError, user_code


class Scheduler(Protocol):
    """All arrays are NumPy's, float64, with samples along the first axis.

    Optional attributes and their defaults:
        scale_input(x_t, t)   the network's input                                        x_t
        levels                (n, 2), alpha and sigma of that input at `timesteps`       those of alpha_bar
        order                 the order of convergence that it claims                    1
        extrapolates          whether each step uses x0_hat at the middle of its stride of log(alpha / sigma),
                              extrapolated from the last two answers, as DPM-Solver++(2M) does              False
        consistency           whether it takes the answer for the end of the flow, and so is exact on a point alone,
                              as samplers of consistency models are                                         False
        evaluations           calls of the network per step; the list repeats each time but the first as often      1
        first_evaluations     further calls in the first step, which repeat the second time as often              0
        rounding              the relative rounding error of its arithmetic              float64's, 2^-53
    """

    predicts: str               # "eps", "x0" or "v": the kind of prediction that `step` takes
    alpha_bar: np.ndarray       # (T,) signal power at the training times 0 .. T-1
    timesteps: np.ndarray       # times of the network's calls, in order; they need not be integers

    def set_steps(self, n: int) -> None:
        """Starts a fresh run of n steps, and sets `timesteps`."""

    def add_noise(self, x_0, eps, t):
        """x_t ~ q(x_t | x_0), (B, ...), at times t (B,): all training times before a run, then times of the run."""

    def step(self, prediction, t, x_t, z):
        """The sample at the next time of the list, from the network's prediction at t. z: the noise, if it draws any.

        A run may begin at any time of its list. A scheduler that refuses eps at SNR 0 raises ValueError.
        """


NEEDED = {
    "predicts": "is 'eps', 'x0' or 'v', the kind of prediction that step takes",
    "alpha_bar": "is the array (T,) of the signal power at the times of training",
    "set_steps": "takes n, starts a fresh run of n steps and sets timesteps",
    "add_noise": "takes x_0 and eps (B, ...) and times t (B,), and returns the noisy x_t",
    "step": "takes the prediction, t, x_t and the noise z to draw, and returns the sample at the next time",
}
METHODS = {"set_steps": 1, "add_noise": 3, "step": 4, "scale_input": 2}     # number of arguments


@user_code("the scheduler breaks the protocol")
def check(scheduler: Any) -> None:
    """UserError if a scheduler lacks an attribute or a method of the protocol. Its methods are not called."""
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
        except (ValueError, TypeError):                     # code that is not Python may have no signature
            continue
        try:
            signature.bind(*[None] * count)
        except TypeError as error:
            raise UserError(f"the scheduler's {name} does not take the {count} arguments of the protocol: "
                            f"{error}") from error
    predicts = _read(scheduler, "predicts")
    if not isinstance(predicts, str) or predicts not in PREDICTIONS:
        raise UserError(f"the scheduler's predicts must be one of {', '.join(PREDICTIONS)}, not {predicts!r}")
    alpha_bar = _array(_read(scheduler, "alpha_bar"))
    if alpha_bar is None or alpha_bar.ndim != 1 or alpha_bar.size < 2 or alpha_bar.dtype.kind != "f":
        raise UserError(f"the scheduler's alpha_bar must be an array (T,) of at least two floating-point numbers, "
                        f"not {_kind(alpha_bar)}")
    for name, least in {"order": 1, "evaluations": 1, "first_evaluations": 0, "rounding": 0}.items():
        number = _read(scheduler, name, 1)
        if not isinstance(number, (int, float, np.number)) or not least <= number < math.inf:
            raise UserError(f"the scheduler's {name} must be a number of at least {least}, not {number!r}")


@user_code("the scheduler breaks the protocol")
def check_run(scheduler: Any) -> None:
    """UserError if a run of 3 steps breaks the protocol: by the attributes that `set_steps` sets, or a returned shape.

    It starts a run, so the laws of a scheduler before any run come first. If a step raises, the laws report it.
    """
    n = min(3, len(scheduler.alpha_bar))
    with user_code(f"the scheduler's set_steps({n}) raises"):
        scheduler.set_steps(n)
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
        except KeyboardInterrupt:
            raise
        except BaseException:                               # a refusal, or a failure that the laws report
            continue
        if getattr(result, "shape", ()) != x.shape:
            raise UserError(f"the scheduler's {name} must return an array of its sample's shape {x.shape}, "
                            f"not {_kind(result)}")


def _read(scheduler: Any, name: str, *default: Any) -> Any:
    """The scheduler's attribute. UserError if it is a property that raises."""
    with user_code(f"the scheduler's {name} cannot be read"):
        return getattr(scheduler, name, *default)


def _array(a: Any) -> np.ndarray | None:
    """The array of a; None if there is none, as for lists of several lengths."""
    try:
        return np.asarray(a)
    except KeyboardInterrupt:
        raise
    except BaseException:                                   # of the object's own conversion
        return None


def _kind(a: Any) -> str:
    """A description for an error message: an array's type and shape, or another object's type."""
    if a is None:
        return "None or lists of several lengths"
    if not isinstance(a, np.ndarray):
        return type(a).__name__
    if a.dtype == object:
        return repr(a.item()) if not a.ndim else "objects"
    return f"{a.dtype} {a.shape}" + ("" if a.dtype.kind not in "fc" or np.isfinite(a).all() else " with NaN or inf")


# ---- defaults of the optional attributes -------------------------------------------------------------------

def shown(scheduler: Scheduler, x_t, t):
    """The network's input for x_t at time t."""
    scale_input = getattr(scheduler, "scale_input", None)
    return x_t if scale_input is None else scale_input(x_t, t)


def levels(scheduler: Scheduler) -> np.ndarray:
    """alpha and sigma of the network's input at each time of the run, (n, 2)."""
    given = getattr(scheduler, "levels", None)
    if given is not None:
        return np.asarray(given, np.float64)
    abar = np.asarray(scheduler.alpha_bar, np.float64)[np.asarray(scheduler.timesteps).astype(int)]
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=-1)


def rounding(scheduler: Scheduler) -> float:
    return getattr(scheduler, "rounding", 2.0**-53)
