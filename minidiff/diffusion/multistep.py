"""More samplers, most with a memory of earlier steps, by which Stable Diffusion is usually drawn.

samplers.py has the contract, and the first four.

    x / alpha = x_0 + rho eps,   rho = sigma / alpha,   d(x / alpha) / d rho = eps_hat       (DDIM eq. 14)

The first three follow this equation as ddim does, whose path is straight in rho, with another estimate of the noise in
place of eps_hat at t.  The last two change dpm_solver_pp_2m.

    edm_heun                averages eps_hat at both ends of a step         Karras et al. 2022   arXiv 2206.00364
    lms                     extrapolates eps_hat by a polynomial in rho     in the program k-diffusion
    plms                    extrapolates eps_hat in equal strides of t      PNDM                 arXiv 2202.09778
    unipc                   corrects x_s after it has been denoised         UniPC                arXiv 2302.04867
    dpm_solver_pp_2m_sde    draws fresh noise in each step                  DPM-Solver++         arXiv 2211.01095

Euler's method in rho is ddim, and with noise ("Euler ancestral") it is ddpm with the variance beta_tilde.  edm_heun is
the method of `heun` in another variable, of the same order and the same calls.  So it has no name of its own in
SAMPLERS; other people's checkpoints are drawn with it (pretrained/scheduler_classes.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.gaussian import eps_from_x0, q_posterior_mean_variance
from minidiff.diffusion.samplers import (
    LEAP,
    Sampler,
    State,
    alpha_sigma,
    beta_tilde,
    denoise,
    standard_normal,
    steps_along,
)
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams


def edm_heun(denoiser: Denoiser, x_T, times: Sequence[int], cond=None) -> Iterator[State]:
    """Heun's method in rho, as Karras et al. 2022 recommend it: algorithm 1 with s(t) = 1, sigma(t) = t.

    Two denoiser calls a step, one in the last. `heun` does the same in the angle. From alpha_T = 0, where rho is
    infinite, the first step is ddim's.
    Where rho begins in the thousands, as on the cosine schedule, 2e4, even strides of t are far off: the first step
    goes most of the way with the mean of two slopes.  From x_T = 1, N(0, 0.7^2) ends at 1062 in 2 steps, 13.9 in 10 and
    0.80 in 50, where 0.7 is right. Other programs do the same.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    """
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        eps_hat = eps_from_x0(schedule, x_t, t, x0_hat)
        x_s = _along(schedule, t, s, x0_hat, eps_hat, eps_hat)
        if s >= 0 and schedule.alpha(t) > 0:
            # eps = (eps_hat(x_t, t) + eps_hat(x_s, s)) / 2
            eps_s = eps_from_x0(schedule, x_s, s, denoise(denoiser, x_s, s, cond))
            x_s = _along(schedule, t, s, x0_hat, eps_hat, (eps_hat + eps_s) / 2)
        x_t = x_s
        yield State(step, s, x_t, x0_hat)


def lms(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *, ends_at_x0_hat: bool = True,
        before: Sequence[float] = ()) -> Iterator[State]:
    """Linear multistep of order 4 (Adams-Bashforth) in rho, for any strides: as in Crowson's program k-diffusion.

    One denoiser call a step; the first steps are of a lower order, since fewer slopes are known.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    ends_at_x0_hat: the last step goes along eps_hat to x0_hat, which may have been kept within the range of images;
    else it extrapolates as all steps do, as other programs' last steps.
    before: rho of earlier times, falling, where the slope is taken for 0, as in other programs' runs from an image.
    """
    schedule, x_t, slopes = denoiser.schedule, x_T, deque(((rho, 0.0) for rho in reversed(before)), maxlen=4)
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        eps = eps_hat = eps_from_x0(schedule, x_t, t, x0_hat)
        rho_t, rho_s = _rho(schedule, t), _rho(schedule, s)
        if math.isfinite(rho_t):
            while slopes and slopes[0][0] - rho_t < LEAP * (rho_t - rho_s):
                slopes.popleft()                            # so near that its difference from the new one is rounding
            slopes.appendleft((rho_t, eps_hat))
        if slopes and not (s < 0 and ends_at_x0_hat):
            # eps = 1/(rho_s - rho_t) int_{rho_t}^{rho_s} P(rho) d rho,   P the polynomial through the last slopes
            shares = mean_of_polynomial([rho for rho, _ in slopes], rho_t, rho_s)
            eps = sum(share * slope for share, (_, slope) in zip(shares, slopes, strict=True))
        x_t = _along(schedule, t, s, x0_hat, eps_hat, eps)
        yield State(step, s, x_t, x0_hat)


def plms(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *, ends_at_x0_hat: bool = True) -> Iterator[State]:
    """Pseudo linear multistep: Adams-Bashforth of order 4 for equal strides of t (PNDM).

    One denoiser call a step, and one more in the first: it averages eps_hat at both ends, as Heun's method does. Steps
    from nearly pure noise are ddim's.
    x_T: (B, ...) noise, the sample at times[0]. times: integers within 0..T-1, falling in about equal strides.
    ends_at_x0_hat: as for `lms`.
    """
    schedule, x_t, slopes = denoiser.schedule, x_T, deque(maxlen=4)
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        eps_hat = eps_from_x0(schedule, x_t, t, x0_hat)
        slopes.appendleft(eps_hat)
        if schedule.alpha(t) < NEARLY_NOISE or s < 0 and ends_at_x0_hat:
            eps = eps_hat
        elif len(slopes) == 1 and s >= 0:
            x_s = _along(schedule, t, s, x0_hat, eps_hat, eps_hat)
            eps = (eps_hat + eps_from_x0(schedule, x_s, s, denoise(denoiser, x_s, s, cond))) / 2
        else:
            eps = adams_bashforth(slopes)
        x_t = _along(schedule, t, s, x0_hat, eps_hat, eps)
        yield State(step, s, x_t, x0_hat)


# Near pure noise rho falls from 1 / alpha to about 10 in a step, and not in proportion to t.  Below this alpha an
# average over t would be off by hundreds, which later steps could not repair.
NEARLY_NOISE = 0.005
ADAMS_BASHFORTH = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
                   4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def adams_bashforth(slopes: Sequence):
    """The mean slope over the next of equal strides, of the last one to four slopes, the newest first."""
    # eps = (55 eps_t - 59 eps_{t+1} + 37 eps_{t+2} - 9 eps_{t+3}) / 24                      (PNDM eq. 12)
    return sum(share * slope for share, slope in zip(ADAMS_BASHFORTH[len(slopes)], slopes, strict=True))


def unipc(denoiser: Denoiser, x_T, times: Sequence[int], cond=None) -> Iterator[State]:
    """UniPC of order 2 with B(h) = e^h - 1 (UniPC).

    The predictor is dpm_solver_pp_2m. Where x_s has been denoised, the corrector goes from t to s once more, now with
    x0_hat at s too, at no further call. After a stride that is much shorter (LEAP) both are of first order.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    """
    schedule, x_t = denoiser.schedule, x_T
    last = None                                             # (x, x0_hat, x0 before it, t, h before it) of the last step
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        if last is not None:
            x_t = _corrected(schedule, last, t, x0_hat)
        x0_before, h_before = (None, None) if last is None else (last[1], _stride(schedule, last[3], t))
        h = _stride(schedule, t, s)
        D = x0_hat
        if x0_before is not None and math.isfinite(h_before) and h_before > LEAP * h:
            # D = x0_hat + (x0_hat - x0_before) / (2r),   r = h_before / h
            D = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
        else:
            x0_before = None                                # the corrector then is of first order as well
        last = x_t, x0_hat, x0_before, t, h_before
        x_t = _exponential_step(schedule, x_t, t, s, D)
        yield State(step, s, x_t, x0_hat)


def dpm_solver_pp_2m_sde(denoiser: Denoiser, x_T, times: Sequence[int], cond=None, *,
                         streams: SampleStreams) -> Iterator[State]:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095): dpm_solver_pp_2m for the reverse SDE, which draws fresh noise.

    The SDE's exact step, where x0_hat is always D, is a draw from q(x_s | x_t, x_0 = D). So the first step is ddpm's
    with beta_tilde, and the others are ddpm's with x0_hat extrapolated to the middle of the stride.
    x_T: (B, ...) noise, the sample at times[0]. times: integers, strictly falling, within 0..T-1.
    streams: one for each sample.
    """
    schedule, x_t = denoiser.schedule, x_T
    x0_before, h_before = None, math.inf
    for step, t, s in steps_along(schedule, times):
        x0_hat = denoise(denoiser, x_t, t, cond)
        D, h = x0_hat, _stride(schedule, t, s)
        if math.isfinite(h_before) and h_before > LEAP * h:
            # D = x0_hat + (x0_hat - x0_before) / (2r),   r = h_before / h
            D = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
        # x_s = sigma_s / sigma_t e^{-h} x_t + alpha_s (1 - e^{-2h}) D + sigma_s sqrt(1 - e^{-2h}) z
        #     = mu~(x_t, D)                                            + sqrt(beta_tilde) z        DDPM eq. 7
        x_t, _ = q_posterior_mean_variance(schedule, D, x_t, t, s)
        if s >= 0:                                          # the last step adds no noise
            x_t = x_t + math.sqrt(beta_tilde(schedule, t, s)) * standard_normal(streams, x_t)
        x0_before, h_before = x0_hat, h
        yield State(step, s, x_t, x0_hat)


def _corrected(schedule: Schedule, last: tuple, s: int, x0_s):
    """x_s from the last step's x_t, its x0_hat and the one before it, and the new x0_s = x0_hat at s."""
    x_t, x0_hat, x0_before, t, h_before = last
    h = _stride(schedule, t, s)
    if not math.isfinite(h):
        return _exponential_step(schedule, x_t, t, s, x0_hat)
    if x0_before is None:
        # D = x0_hat + (x0_s - x0_hat) / 2
        return _exponential_step(schedule, x_t, t, s, x0_hat + (x0_s - x0_hat) / 2)
    # D = x0_hat + c_1 (x0_before - x0_hat) / r + c_2 (x0_s - x0_hat),   r = (lambda_before - lambda_t) / h < 0,
    # exact for every x0_hat that is a parabola in lambda                                         (UniPC theorem 3.1)
    r, phi_1 = -h_before / h, phi(1, -h)
    c_1, c_2 = np.linalg.solve([[1, 1], [r, 1]], [phi(2, -h) / phi_1, 2 * phi(3, -h) / phi_1])
    D = x0_hat + float(c_1 / r) * (x0_before - x0_hat) + float(c_2) * (x0_s - x0_hat)
    return _exponential_step(schedule, x_t, t, s, D)


# ---- what they share ---------------------------------------------------------------------------------------

FAR = 1e5                                                   # of float32's digits, two are left; cosine(1000) has 2e4


def _rho(schedule: Schedule, t: int) -> float:
    """rho = sigma / alpha: infinite where alpha is 0."""
    alpha, sigma = alpha_sigma(schedule, t)
    return sigma / alpha if alpha > 0 else math.inf


def _along(schedule: Schedule, t: int, s: int, x0_hat, eps_hat, eps):
    """x_s on the straight line in rho from x_t = alpha_t x0_hat + sigma_t eps_hat, with slope eps.

    Where alpha_s rho_t exceeds FAR, or is infinite, eps_hat is the slope: rounding errors of eps would grow by as much.
    """
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    # x_s / alpha_s = x_t / alpha_t + (rho_s - rho_t) eps                                   (DDIM eq. 13)
    # as ddim's step and the rest: x_t / alpha_t, which may be 10^4, would lose four digits
    x_s = alpha_s * x0_hat + sigma_s * eps_hat
    # alpha_s sigma_t / alpha_t = alpha_s rho_t
    return x_s if alpha_s * sigma_t > FAR * alpha_t else x_s + (sigma_s - alpha_s * sigma_t / alpha_t) * (eps - eps_hat)


def mean_of_polynomial(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """The weights w_j with  sum_j w_j f(nodes_j) = the mean over low..high of the polynomial through these values.

    nodes: at most 4, all different.
    """
    # Gauss's two points, whose mean is exact for polynomials of degree 3
    middle, apart = (low + high) / 2, (high - low) / math.sqrt(12)
    points = (middle - apart, middle + apart)
    # Lagrange's polynomial of a node is 1 there, and 0 at the others
    return [sum(math.prod((rho - other) / (node - other) for other in nodes if other != node) for rho in points) / 2
            for node in nodes]


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum_j z^j / (j + k)!  of exponential integrators, for k >= 1: phi_1(z) = (e^z - 1) / z."""
    if abs(z) < 1:                                          # the recurrence would lose digits
        return sum(z**j / math.factorial(j + k) for j in range(18))
    # phi_k(z) = (phi_{k-1}(z) - 1 / (k-1)!) / z
    return math.expm1(z) / z if k == 1 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def _stride(schedule: Schedule, t: int, s: int) -> float:
    """h = lambda_s - lambda_t,  lambda = log(alpha / sigma): infinite at the clean image, and from alpha_t = 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    e_h = sigma_s * alpha_t / (alpha_s * sigma_t)           # e^{-h}
    return -math.log(e_h) if e_h > 0 else math.inf


def _exponential_step(schedule: Schedule, x_t, t: int, s: int, D):
    """x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D: exact where x0_hat is always D (DPM-Solver++ eq. 8)."""
    (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    return sigma_s / sigma_t * x_t - alpha_s * (math.exp(-_stride(schedule, t, s)) - 1) * D


# ---- their entries in samplers.SAMPLERS --------------------------------------------------------------------

# Orders on exact flows (docs/convergence.md), those that they keep on every list.  The first steps of lms and plms hold
# back all that follow.  plms has order 2 where neither the strides of t nor rho change much from step to step, and
# unipc order 3 where lambda does not leap.
LMS = Sampler(lms, order=2, history=3)
PLMS = Sampler(plms, order=1, history=3, first_calls=1)
UNIPC = Sampler(unipc, order=2, history=2)
DPM_SOLVER_PP_2M_SDE = Sampler(dpm_solver_pp_2m_sde, order=2, noise=True, extrapolates=True, history=1)
