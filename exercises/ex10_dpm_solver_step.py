"""Exercise 10: a step of DPM-Solver++(2M).  30 minutes, chapter docs/course/05_samplers.md.

This solver is of second order at one call of the denoiser, because it remembers the estimate of the step before.  Its
clock is lambda = log(alpha / sigma).  If x0_hat were always D, the exact step of the ODE would be

    x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D,      h = lambda_s - lambda_t      from DPM-Solver++ eq. 8

x0_hat changes, so D is the value, in the middle of the step, of the line over lambda through the last two estimates:

    D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_before,      r = (lambda_t - lambda_u) / h,         DPM-Solver++ algorithm 2

where u > t is the time of the estimate x0_before.  The step to s = -1, where sigma is 0 and lambda infinite, takes
D = x0_hat, and ends there.

    minidiff check ex10
"""

import numpy as np


def dpm_solver_step(alpha_bar: np.ndarray, x_t: np.ndarray, u: int, t: int, s: int, x0_before: np.ndarray,
                    x0_hat: np.ndarray) -> np.ndarray:
    """x_s, from x_t.

    alpha_bar: (T,) float64, within (0, 1).  u, t, s: integers, T > u > t > s >= -1.
    x0_before, x0_hat: the denoiser's estimates at the times u and t; they and x_t have one shape and dtype.
    Returns x_s, of x_t's shape and dtype.
    """
    raise NotImplementedError("your code here")
