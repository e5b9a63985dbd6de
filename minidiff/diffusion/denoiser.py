"""The contract between networks and samplers: a denoiser, which estimates x_0 from x_t.

A denoiser answers one question: given x_t = alpha x_0 + sigma eps, what is x_0 on average?

    x0_hat(x_t, t) = E[x_0 | x_t]                              the minimiser of E ||x_0 - x0_hat||^2
    score(x_t, t)  = grad log p_t(x_t) = (alpha x0_hat - x_t) / sigma^2         Tweedie's formula (Efron 2011)

A network learns the answer (`NetworkDenoiser`); exact.py computes it for three kinds of data. Samplers and guidance
use nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from minidiff.diffusion.gaussian import check_predicts, to_x0
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import wide, xp_of


class Denoiser(Protocol):
    """A callable `denoiser(x_t, t, cond=None) -> x0_hat`.

    x_t: (B, ...). t: integers (B,) in 0..T-1, one time for each sample, on the CPU. cond: whatever the denoiser
    takes as a condition; None for no condition. x0_hat has the shape and dtype of x_t.
    `schedule` gives alpha and sigma at t; `predicts` is what the denoiser natively predicts ("eps", "x0" or "v").
    """

    @property
    def schedule(self) -> Schedule: ...
    @property
    def predicts(self) -> str: ...
    def __call__(self, x_t, t, cond: Any = None): ...


class Wrapper:
    """The part that all denoisers made of another one share: the schedule and `predicts` are those of `denoiser`."""

    denoiser: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def predicts(self) -> str:
        return self.denoiser.predicts


class Differentiable(Denoiser, Protocol):
    """A denoiser with a derivative, J = d x0_hat / d x_t, which likelihood.py and posterior.py need.

    vjp (vector-Jacobian product) returns (x0_hat, dx_t) with dx_t = dy^T J for each sample; dy and dx_t have the shape
    and dtype of x_t.
    """

    def vjp(self, x_t, t, dy, cond: Any = None): ...


# ---- thresholding: x0_hat is kept within the range of images -----------------------------------------------

def static_threshold(x0_hat):
    """x0_hat clipped to [-1, 1] (Imagen section 2.3). For pixels; latents have no such range. Infinity becomes NaN."""
    return _clipped(x0_hat, 1)


def dynamic_threshold(x0_hat, percentile: float = 0.995):
    """Samples with pixels out of range are clipped and rescaled, each by itself (Imagen section 2.3).

    x0_hat: (B, ...). The result lies in [-1, 1]; samples that already do are unchanged. For pixels only.
    """
    _check_percentile(percentile)
    if not x0_hat.size:
        return x0_hat
    xp = xp_of(x0_hat)
    # limit = max(1, the percentile of |x0_hat|): below 1 it would stretch a flat image to full contrast
    limit = xp.quantile(xp.abs(wide(x0_hat).reshape(len(x0_hat), -1)), percentile, axis=1)            # (B,)
    limit = xp.maximum(limit, 1).astype(x0_hat.dtype).reshape(-1, *[1] * (x0_hat.ndim - 1))         # (B, 1, ...)
    # x0_hat = clip(x0_hat, -limit, limit) / limit                                              the paper's limit is s
    return _clipped(x0_hat, limit) / limit


def _clipped(x, limit):
    # an infinite x is a fault of the network, and would not show in the picture
    xp = xp_of(x)
    return xp.where(xp.isfinite(x), xp.clip(x, -limit, limit), xp.nan)


# ---- a trained network -------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network `(x_t, t, cond) -> array (B, ...)` that was trained to predict "eps", "x0" or "v".

    clip: applied to x0_hat, such as `static_threshold`; None for latents, and under guidance, which clips its own
    result. ValueError for an eps-network on a schedule that ends at SNR 0, where x_t = eps does not determine x_0.
    network_vjp: `(x_t, t, dy, cond) -> (network(x_t, t, cond), dx_t)`; only `vjp` needs it.
    """

    schedule: Schedule
    predicts: str
    network: Callable[[Any, Any, Any], Any]
    clip: Callable[[Any], Any] | None = None
    network_vjp: Callable[[Any, Any, Any, Any], tuple[Any, Any]] | None = None

    def __post_init__(self):
        _check_prediction(self.schedule, self.predicts)

    def __call__(self, x_t, t, cond=None):
        x0_hat = to_x0(self.schedule, self.predicts, x_t, t, self.network(x_t, t, cond))
        return x0_hat if self.clip is None else self.clip(x0_hat)

    def vjp(self, x_t, t, dy, cond=None):
        """(x0_hat, dy^T J), as `Differentiable` says. Raises TypeError without network_vjp, or with clip."""
        check_differentiable(self)
        zero = xp_of(x_t).zeros_like(x_t)
        # x0_hat = a x_t + b out(x_t) is linear in both, so `to_x0` is also its own derivative:
        # dy^T J = a dy + (b dy)^T d out / d x_t
        out, dx_t = self.network_vjp(x_t, t, to_x0(self.schedule, self.predicts, zero, t, dy), cond)
        dx_t = dx_t + to_x0(self.schedule, self.predicts, dy, t, zero)
        return to_x0(self.schedule, self.predicts, x_t, t, out), dx_t


class Remembering:
    """f, which keeps its last result and returns it again for the same arguments: the very same objects, or equal ints.

    A sampler gives the same condition to every step.  What depends on the condition alone is then computed once.
    Nothing may write into the arguments or the result meanwhile.

    The last arguments and their result stay in memory until a call with others, or as long as this object.  For the
    keys and values of captions (systems/text_to_image.py) the result has, beside the condition itself,

        8 B N sum C bytes           B rows, two for each picture with guidance; N tokens of a caption; C the channels of
                                    each cross-attention, whose keys and values are float32 (in half precision, 4 for 8)

    so it grows with the batch.
    """

    def __init__(self, f: Callable):
        self.f, self._last = f, None

    def __call__(self, *args):
        last = self._last                                   # read once: another thread may replace it
        if last is None or not all(map(_same, last[0], args)):
            last = self._last = args, self.f(*args)
        return last[1]


def _same(a, b) -> bool:
    return a is b or type(a) is type(b) is int and a == b


# ---- checks ------------------------------------------------------------------------------------------------

def _check_percentile(percentile: float) -> None:
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must be a fraction in (0, 1], such as 0.995, got {percentile!r}")


def _check_prediction(schedule: Schedule, predicts: str) -> None:
    check_predicts(predicts)
    if predicts == "eps" and schedule.alpha_bar[-1] == 0:
        raise ValueError("predicts='eps' does not determine x_0 at the zero SNR where this schedule ends: "
                         "use 'v' or 'x0', or a schedule with alpha_bar[-1] > 0")


def check_differentiable(denoiser) -> None:
    """TypeError unless the denoiser has a network_vjp, and no clip."""
    if denoiser.network_vjp is None or denoiser.clip is not None:
        raise TypeError("denoiser must have a network_vjp, and no clip, to be differentiated")
