"""How noise levels are spread between a highest and a lowest one, and how other programs place betas.

    karras          equal strides of rho^(1/7), rho = sigma / alpha (Karras et al. 2022, eq. 5)
    exponential     equal strides of log rho
    beta            quantiles of rho in a beta distribution
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def float32_line(low: float, high: float, count: int) -> np.ndarray:
    """np.linspace as PyTorch computes it in float32, from both ends.

    These roundings move a time that Karras's spacing places between two training times by up to 4e-4, which a network
    sees.  So other programs' pictures come out the same only with the same roundings.
    """
    low, high = np.float32(low), np.float32(high)
    step, i = (high - low) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    return np.where(i < count // 2, low + step * i, high - step * (count - 1 - i))


def karras_spacing(high: float, low: float, steps: int, power: float = 7.0) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of rho^(1/power) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / power) + ramp * (low ** (1 / power) - high ** (1 / power))) ** power


def exponential_spacing(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of log rho."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_spacing(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low: quantiles of the beta distribution with alpha = beta = 0.6."""
    from scipy.special import betaincinv
    return low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


SPREADS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras_spacing, "exponential": exponential_spacing, "beta": beta_spacing}
