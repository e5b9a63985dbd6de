"""Consistency models: from x_t to the clean image in one call of the network, or better in a few.

The probability-flow ODE carries every x_t to one x_0.  A consistency model is trained to give this end of the flow:

    f(x_t, t) = x_0 where the flow through x_t at time t ends,   f(x_0, 0) = x_0      Consistency models, section 3

and not, as other denoisers, the mean E[x_0 | x_t].  Of x_0 ~ N(mu, S^2), for one, it is

    f(x_t, t) = mu + S / sqrt(V_t) (x_t - alpha_t mu),   V = alpha^2 S^2 + sigma^2

f(x_t, t) has the distribution of the data, for any t.  So it may be noised to a lower time s and denoised once more,
without changing that distribution; with a network that is not exact, each time corrects errors of the one before:

    lcm                 x_s  = alpha_s f(x_t, t) + sigma_s z        Consistency models, algorithm 1  arXiv 2303.01469

A network F is made to keep f(x_0, 0) = x_0 by two scalings, f = c_skip x_t + c_out F(x_t, t), which are 1 and 0 at the
clean image.  A network that predicts the velocity already has this form; latent consistency models choose scalings
in t:

    x0_from_v           f    = alpha_t x_t - sigma_t v(x_t, t)      Lu & Song 2025, section 3        arXiv 2410.11081
    BoundaryCondition   f    = c_skip(t) x_t + c_out(t) F(x_t, t)   Luo et al. 2023, section 4.1     arXiv 2310.04378
        c_skip          = sigma_d^2 / ((k t)^2 + sigma_d^2)         1 at t = 0
        c_out           = k t / sqrt((k t)^2 + sigma_d^2)           0 at t = 0

Distillation needs pairs of points of one path of the flow, for f is constant along it.  A denoiser, the teacher, makes
them: from x_t it takes one step of a solver to s, the next lower of N times.

    ddim_step           x_s  = alpha_s x0_hat + sigma_s eps_hat     Consistency models, algorithm 2, with DDIM eq. 12

The student then learns f(x_t, t) = f(x_s, s) (systems/consistency.py).  The exact solution is known: f(x_t, t) is where
DDIM ends that starts from x_t and follows the list of N times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.gaussian import eps_from_x0, per_sample, q_sample
from minidiff.diffusion.samplers import Sampler, State, alpha_sigma, denoise, standard_normal, steps_along, times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams

SIGMA_DATA = 0.5                                            # of images in [-1, 1], as in Karras et al. 2022


def lcm(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *, streams: SampleStreams) -> Iterator[State]:
    """Multistep consistency sampling; the denoiser is a consistency function f.

    With another denoiser, which gives E[x_0 | x_t], its pictures are too smooth.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    streams: one for each sample.
    """
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in steps_along(schedule, times):
        alpha_s, sigma_s = alpha_sigma(schedule, s)
        x0_hat = denoise(denoiser, x_t, t, cond)
        # x_s = alpha_s f(x_t, t) + sigma_s z;  the last step adds no noise
        x_t = alpha_s * x0_hat + sigma_s * standard_normal(streams, x_t) if s >= 0 else x0_hat
        yield State(step, s, x_t, x0_hat)


@dataclass(frozen=True, eq=False)
class BoundaryCondition:
    """The consistency function of a denoiser F.

    F: may be guided. t: (T,) the times that the scalings see, for each time of the schedule. scaling: k.
    """

    F: Denoiser
    t: np.ndarray
    scaling: float = 10.0

    @property
    def schedule(self) -> Schedule:
        return self.F.schedule

    @property
    def predicts(self) -> str:
        return self.F.predicts

    def __call__(self, x_t, t, cond: Any = None):
        kt = self.scaling * self.t[t]                                                 # (B,)
        c_skip = SIGMA_DATA**2 / (kt**2 + SIGMA_DATA**2)
        c_out = kt / np.sqrt(kt**2 + SIGMA_DATA**2)
        # f = c_skip x_t + c_out F(x_t, t)
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * self.F(x_t, t, cond)


# ---- pairs of points, for distillation ---------------------------------------------------------------------

def ddim_step(denoiser: Denoiser, x_t, t: np.ndarray, s: np.ndarray, cond=None):
    """x_s (B, ...): from x_t one DDIM step along the flow, each sample between times of its own.

    t, s: (B,) integers, -1 <= s < t and t >= 0.  At s = -1 the result is x0_hat.
    """
    _check_pairs(t, s)
    x0_hat = denoiser(x_t, t, cond)
    eps_hat = eps_from_x0(denoiser.schedule, x_t, t, x0_hat)
    # x_s = alpha_s x0_hat + sigma_s eps_hat                                            DDIM eq. 12, with its sigma 0
    return q_sample(denoiser.schedule, x0_hat, s, eps_hat)


def neighbours(schedule: Schedule, N: int, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t, s), (B,) each: the two ends of interval n, where N intervals of equal length divide the schedule.

    n: (B,) of 0..N-1; 0 is the noisiest, from t = T-1, and N-1 the last, which ends at s = -1, the clean image.
    """
    if not ((np.asarray(n) >= 0) & (np.asarray(n) < N)).all():
        raise ValueError(f"n must be of 0..{N - 1}, got {n}")
    ends = np.append(times(schedule, N), -1)                                          # (N + 1,), falling
    return ends[:-1][n], ends[1:][n]


# ---- checks ------------------------------------------------------------------------------------------------

def _check_pairs(t, s) -> None:
    if np.shape(t) != np.shape(s) or not (np.asarray(s) < np.asarray(t)).all():
        raise ValueError(f"s must be earlier than t, one time for each sample, got s = {s} and t = {t}")


LCM = Sampler(lcm, order=1, noise=True, consistency=True)   # on a consistency function, exact in any number of steps
