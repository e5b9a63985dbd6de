"""Exercise 24: train a diffusion model, of points in the plane.  180 minutes, chapter docs/course/03_denoiser.md.

All of it, once: draw a time and noise for each point, let a network guess the noise, and make the squared error small.

    x_t  = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,      t uniform on 0 ... T-1,   eps ~ N(0, I)
    loss = mean ||eps - eps_hat(x_t, t)||^2                                                      DDPM eq. 14

The network must see t.  Write it with minidiff.nn and minidiff.engine, or with NumPy alone and gradients of your own.
Three layers of 128 numbers, 3000 steps of 256 points, and AdamW with a learning rate that falls from 0.003 are enough;
examples/00_diffusion_in_2d.py is such a program.  The laws compare what it learned with the exact answer, and sample
with it.  You have ten minutes of computing.

    minidiff check ex24
"""

from collections.abc import Callable

import numpy as np


def train(points: np.ndarray, alpha_bar: np.ndarray, rng: np.random.Generator) -> Callable:
    """Trains a network that guesses the noise.

    points: (N, 2) float32, the data, of mean about 0 and size about 1.
    alpha_bar: (T,) float64, from almost 1 to almost 0.  rng: for all random numbers.
    Returns eps_hat: (x_t (B, 2) float32, t (B,) integers) -> (B, 2) float32, for any B.
    """
    raise NotImplementedError("your code here")
