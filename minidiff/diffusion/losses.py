"""Loss weights: how much the squared error of a network's output counts at time t.

    loss_t = weight_t ||target - out||^2          the norm over all pixels, target from gaussian.target

An error in eps or v is an error in x_0, by x_0 = (x_t - sigma_t eps)/alpha_t = alpha_t x_t - sigma_t v:

    ||x_0 - x0_hat||^2 = unit_t ||target - out||^2
        unit_t = 1                        x0
                 sigma_t^2 / alpha_t^2    eps
                 sigma_t^2                v

so a weight is defined once, for x_0, and converted by unit_t:

    simple     weight_t = 1                              in each prediction's own units    DDPM eq. 14
    bound      weight_t = (SNR_{t-1} - SNR_t)/2 unit_t   the variational bound, in nats    VDM eq. 13
    min-SNR    weight_t = min(SNR_t, gamma) unit_t       for eps min(1, gamma/SNR_t)       Hang et al. 2023

So if an eps-, an x0- and a v-network stand for the same x0_hat, their bounds are equal, and so are their min-SNR
losses; only L_simple differs.
"""

from collections.abc import Callable

import numpy as np

from minidiff.checks import one_of
from minidiff.diffusion.gaussian import Times, check_predicts
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import to_numpy


def simple_weight(schedule: Schedule, t: Times, predicts: str) -> np.ndarray:
    """1 at every time: L_simple. All weights here are float64, of t's shape."""
    check_predicts(predicts)
    return np.ones_like(_abar(schedule, t, first=0))


def bound_weight(schedule: Schedule, t: Times, predicts: str) -> np.ndarray:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, both of variance beta~_t, for t >= 1.

    Raises ValueError at t = 0: that term of the bound is -log p(x_0 | x_{t=0}), the decoder's, which is not a squared
    error (SNR_{-1} is infinite). Raises ValueError for "eps" at SNR 0.
    """
    abar = _abar(schedule, t, first=1)
    unit = _unit(abar, predicts)
    # L_{t-1} = (SNR_{t-1} - SNR_t) ||x_0 - x0_hat||^2 / 2                                       VDM eq. 13
    return 0.5 * (schedule.snr(t - 1) - schedule.snr(t)) * unit


def min_snr_weight(schedule: Schedule, t: Times, predicts: str, gamma: float = 5.0) -> np.ndarray:
    """SNR_t for x_0, but at most gamma, so that nearly clean images do not dominate. ValueError for "eps" at SNR 0."""
    _check_gamma(gamma)
    abar = _abar(schedule, t, first=0)
    # weight = min(SNR_t, gamma)                                                Hang et al. 2023, section 3.4
    return np.minimum(schedule.snr(t), gamma) * _unit(abar, predicts)


LOSS_WEIGHTS: dict[str, Callable[[Schedule, Times, str], np.ndarray]] = {
    "simple": simple_weight,
    "bound": bound_weight,
    "min_snr": min_snr_weight,
}


def weight(schedule: Schedule, t: Times, predicts: str, kind: str) -> np.ndarray:
    """The weight of the name `kind` in LOSS_WEIGHTS, for t an integer or (B,)."""
    one_of("kind", kind, LOSS_WEIGHTS)
    return LOSS_WEIGHTS[kind](schedule, t, predicts)


def _unit(abar: np.ndarray, predicts: str) -> np.ndarray:
    """||x_0 - x0_hat||^2 / ||target - out||^2."""
    check_predicts(predicts)
    if predicts == "x0":
        return np.ones_like(abar)
    if predicts == "v":
        return 1.0 - abar
    with np.errstate(divide="ignore", over="ignore"):
        unit = (1.0 - abar) / abar
    if not np.isfinite(unit).all():
        raise ValueError("eps does not determine x_0 at SNR 0: predict v or x0 there")
    return unit


def _abar(schedule: Schedule, t: Times, first: int) -> np.ndarray:
    abar = schedule.abar(t)
    if np.any(np.less(to_numpy(t), first)):
        raise ValueError(f"t must be at least {first} for a loss of this kind, got {t}")
    return abar


def _check_gamma(gamma: float) -> None:
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
