"""Exercise 1: q(x_t | x_0), judged by taking all the single steps that it replaces."""

import numpy as np

from minidiff.course.compare import differs, numbers, random_betas, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian
from minidiff.diffusion.schedules import Schedule

SHAPES = [(3, 4, 4, 3), (5, 5), (1, 2), (4, 3, 1), (2,)]


def solution(alpha_bar, x_0, t, eps):
    return gaussian.q_sample(Schedule(alpha_bar), x_0, t, eps)


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int):
    """alpha_bar of random betas, the betas, x_0, t, eps, and words for them."""
    rng = stream(1, law)
    for shape in SHAPES:
        betas = random_betas(rng)
        t = rng.integers(0, len(betas), shape[0])
        yield (np.cumprod(1 - betas), betas, rng.standard_normal(shape), t, rng.standard_normal(shape),
               f"for x_0 of shape {shape} at t = {numbers(t)} with betas = {numbers(betas)}")


def _given(alpha_bar, x_0, t, eps):
    """What each number of x_t is computed from."""
    return {"x_0": x_0, "eps": eps, "alpha_bar_t": alpha_bar[t].reshape(-1, *[1] * (x_0.ndim - 1))}


def mean_of_single_steps(q_sample):
    """with eps = 0 it is the mean of t + 1 single steps, each of which multiplies by sqrt(1 - beta) (DDPM eq. 2)"""
    for alpha_bar, betas, x_0, t, eps, where in _cases(1):
        expected = np.array(x_0)
        for i, time in enumerate(t):
            for beta in betas[:time + 1]:
                expected[i] *= np.sqrt(1 - beta)
        if (said := differs("x_t", q_sample(alpha_bar, x_0, t, 0 * eps), expected, f"{where} and eps = 0",
                            given=_given(alpha_bar, x_0, t, 0 * eps))):
            return said


def spread_of_single_steps(q_sample):
    """with x_0 = 0 it has the variance of t + 1 single steps: v becomes (1 - beta) v + beta (DDPM eq. 2)"""
    for alpha_bar, betas, x_0, t, eps, where in _cases(2):
        expected = np.array(eps)
        for i, time in enumerate(t):
            variance = 0.0
            for beta in betas[:time + 1]:
                variance = (1 - beta) * variance + beta
            expected[i] *= np.sqrt(variance)
        if (said := differs("x_t", q_sample(alpha_bar, 0 * x_0, t, eps), expected, f"{where} and x_0 = 0",
                            given=_given(alpha_bar, 0 * x_0, t, eps))):
            return said


def sum_of_both(q_sample):
    """x_t is the sum of the part of x_0 and the part of eps"""
    for alpha_bar, _, x_0, t, eps, where in _cases(3):
        expected = q_sample(alpha_bar, x_0, t, 0 * eps) + q_sample(alpha_bar, 0 * x_0, t, eps)
        if (said := differs("x_t", q_sample(alpha_bar, x_0, t, eps), expected, where,
                            given=_given(alpha_bar, x_0, t, eps))):
            return said


def keeps_the_dtype(q_sample):
    """x_t has the shape and dtype of x_0"""
    for dtype in (np.float32, np.float64):
        for alpha_bar, _, x_0, t, eps, where in _cases(4):
            expected = q_sample(alpha_bar, x_0, t, eps)
            got = q_sample(alpha_bar, x_0.astype(dtype), t, eps.astype(dtype))
            if (said := differs("x_t", got, expected, where, dtype=dtype, like="x_0",
                                given=_given(alpha_bar, x_0, t, eps))):
                return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _coefficients(alpha_bar, x_0, t):
    a = np.asarray(alpha_bar)[t].reshape(-1, *[1] * (x_0.ndim - 1))
    return np.sqrt(a), np.sqrt(1 - a)


def _right(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return alpha * x_0 + sigma * eps


def _variance_for_deviation(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return alpha * x_0 + sigma**2 * eps


def _no_root_of_the_signal(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return alpha**2 * x_0 + sigma * eps


def _no_roots(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return alpha**2 * x_0 + sigma**2 * eps


def _swapped(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return sigma * x_0 + alpha * eps


def _noise_subtracted(alpha_bar, x_0, t, eps):
    alpha, sigma = _coefficients(alpha_bar, x_0, t)
    return alpha * x_0 - sigma * eps


def _one_step(alpha_bar, x_0, t, eps):
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return _right(alpha_bar / before, x_0, t, eps)


def _counts_from_one(alpha_bar, x_0, t, eps):
    return _right(alpha_bar, x_0, np.asarray(t) - 1, eps)


def _first_time_for_all(alpha_bar, x_0, t, eps):
    return _right(alpha_bar, x_0, np.full_like(t, t[0]), eps)


def _along_the_last_axis(alpha_bar, x_0, t, eps):
    a = alpha_bar[t]
    return np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps


def _always_four_axes(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps


def probe(q_sample):
    rng = stream(1)
    alpha_bar = np.cumprod(1 - random_betas(rng, 6))
    return [q_sample(alpha_bar, rng.standard_normal((3, 2, 3)), np.array(t), rng.standard_normal((3, 2, 3)))
            for t in ([1, 4, 5], [0, 2, 3])]


EXERCISE = Exercise(
    title="Noise an image in one step", answer="q_sample", minutes=5, chapter="01_noise",
    hint="alpha_bar[t] has shape (B,), and x_0 (B, ...): reshape the first to (B, 1, ..., 1), so that it multiplies "
         "whole images. Both coefficients are square roots, since alpha_bar is a power (a variance). alpha_bar is "
         "float64, so cast the result back: .astype(x_0.dtype).",
    solution=solution, place="minidiff/diffusion/gaussian.py q_sample",
    laws=(mean_of_single_steps, spread_of_single_steps, sum_of_both, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_variance_for_deviation, "the noise is multiplied by its variance, 1 - alpha_bar_t, in place of its "
                                       "standard deviation, sqrt(1 - alpha_bar_t)"),
        Wrong(_no_root_of_the_signal, "x_0 is multiplied by alpha_bar_t in place of sqrt(alpha_bar_t)"),
        Wrong(_no_roots, "both square roots are missing: alpha_bar_t and 1 - alpha_bar_t are powers, and x_0 and eps "
                         "are multiplied by the roots of them"),
        Wrong(_swapped, "the two coefficients have changed places: x_0 takes sqrt(alpha_bar_t), and eps sqrt(1 - "
                        "alpha_bar_t)"),
        Wrong(_noise_subtracted, "the noise is subtracted: that has the same distribution, but a network would then "
                                 "learn -eps"),
        Wrong(_one_step, "it adds the noise of one step, beta_t, in place of that of all the steps up to t, 1 - "
                         "alpha_bar_t"),
        Wrong(_counts_from_one, "it reads alpha_bar[t - 1]: times count from 0 here, so that the power left at time "
                                "t is alpha_bar[t]"),
        Wrong(_first_time_for_all, "every image gets the time of the first one: t holds one time for each image"),
        Wrong(_along_the_last_axis, "the coefficients multiply along the last axis in place of the first: reshape "
                                    "alpha_bar[t] to (B, 1, ..., 1)"),
        Wrong(_always_four_axes, "it takes x_0 to have four axes, and x_0 may have any number of them: reshape "
                                 "alpha_bar[t] to as many axes as x_0 has"),
    ))
