"""How the noise levels of a run are spread between the highest and the lowest one.

    karras          equal strides of rho^(1/7), rho = sigma / alpha (Karras et al. 2022, eq. 5)
    exponential     equal strides of log rho
    beta            quantiles of rho in a beta distribution
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def karras_spread(high: float, low: float, steps: int, power: float = 7.0) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of rho^(1/power) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / power) + ramp * (low ** (1 / power) - high ** (1 / power))) ** power


def exponential_spread(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of log rho."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_spread(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low: quantiles of the beta distribution with alpha = beta = 0.6."""
    from scipy.special import betaincinv
    return low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


SPREADS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras_spread, "exponential": exponential_spread, "beta": beta_spread}
