"""Exercise 9: Heun's method, a step of second order.  30 minutes, chapter docs/course/05_samplers.md.

Sampling without noise follows an ODE.  Write alpha = cos(phi) and sigma = sin(phi): phi is 0 at the clean image and
pi/2 in pure noise.  The slope of the path is the velocity (Karras et al. 2022, algorithm 1, in this variable):

    dx/dphi = v(x, t) = (alpha_t x - x0_hat(x, t)) / sigma_t

Euler's method goes straight along the slope where it stands.  Heun's method looks at the slope there, too, and takes
the average of both, which makes the error of a step proportional to h^3 in place of h^2:

    h = phi_s - phi_t                  negative, since s is the earlier time
    Euler   x' = x_t + h v(x_t, t)
    Heun    x_s = x_t + h (v(x_t, t) + v(x', s)) / 2

The last step, to s = -1, cannot look at the slope at its end, where sigma is 0: it ends at x0_hat(x_t, t).

    minidiff check ex09
"""

from collections.abc import Callable

import numpy as np


def heun_step(x0_hat: Callable, alpha_bar: np.ndarray, x_t: np.ndarray, t: int, s: int) -> np.ndarray:
    """x_s, from x_t.

    x0_hat: the denoiser, a function (x, t) -> array of x's shape, with t an integer of 0..T-1.  It is the expensive
    part: call it twice, and once in the last step.
    alpha_bar: (T,) float64.  x_t: (B, ...) float64.  t, s: integers, -1 <= s < t < T.
    Returns x_s, of x_t's shape.
    """
    raise NotImplementedError("your code here")
