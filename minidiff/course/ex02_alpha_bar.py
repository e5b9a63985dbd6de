"""Exercise 2: alpha_bar of betas, judged by the variance of a pixel that takes the steps one by one."""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, random_betas, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import schedules


def solution(betas):
    return schedules.from_betas(betas, allow_signal=True).alpha_bar


# ---- laws --------------------------------------------------------------------------------------------------

def signal_and_noise(alpha_bar):
    """1 - alpha_bar_t is the variance of a pixel that starts at 0 and takes the steps 0 ... t, each of which turns a
    variance v into (1 - beta) v + beta"""
    rng = stream(2, 1)
    for T in (1, 2, 5, 9):
        betas, variance, expected = random_betas(rng, T), 0.0, []
        for beta in betas:
            variance = (1 - beta) * variance + beta
            expected.append(1 - variance)
        if (said := differs("alpha_bar", alpha_bar(betas), np.array(expected), f"for betas = {numbers(betas)}",
                            dtype=np.float64, tolerance=1e-12)):
            return said


def equal_steps(alpha_bar):
    """T equal steps leave (1 - beta)^T"""
    rng = stream(2, 2)
    for T in (1, 7, 1000):
        beta = float(rng.uniform(0.001, 0.01))
        expected = (1 - beta) ** np.arange(1.0, T + 1)
        if (said := differs("alpha_bar", alpha_bar(np.full(T, beta)), expected, f"for {T} betas of {beta:.4g}",
                            dtype=np.float64, tolerance=1e-11)):
            return said


def end_of_ddpm(alpha_bar):
    """DDPM's 1000 betas, from 0.0001 to 0.02 in equal strides, leave 4.04e-5 of the power"""
    betas = np.linspace(1e-4, 0.02, 1000)
    left = math.exp(math.fsum(math.log1p(-beta) for beta in betas))
    got = alpha_bar(betas)
    return differs("alpha_bar[-1]", got[-1] if isinstance(got, np.ndarray) and got.shape == (1000,) else got, left,
                   "for betas = linspace(1e-4, 0.02, 1000)", dtype=np.float64, tolerance=1e-9)


# ---- known wrong answers -----------------------------------------------------------------------------------

def _product_of_betas(betas):
    return np.cumprod(betas)


def _power_of_the_noise(betas):
    return 1 - np.cumprod(1 - betas)


def _sum(betas):
    return 1 - np.cumsum(betas)


def _sum_of_shares(betas):
    return np.cumsum(1 - betas)


def _exponential(betas):
    return np.exp(-np.cumsum(betas))


def _single_steps(betas):
    return 1 - betas


def _root(betas):
    return np.sqrt(np.cumprod(1 - betas))


def _shifted(betas):
    return np.cumprod(np.concatenate([[1.0], 1 - betas[:-1]]))


def _with_the_clean_image(betas):
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def _only_the_end(betas):
    return np.prod(1 - betas)


def _first_alone(betas):
    return 1 - betas[:1]


def probe(alpha_bar):
    return [alpha_bar(random_betas(stream(2), T)) for T in (3, 8)]


EXERCISE = Exercise(
    title="From betas to alpha_bar", answer="alpha_bar", minutes=5, chapter="01_noise",
    hint="The product of the first t + 1 factors, for every t at once: NumPy has a function for running products.",
    solution=solution, place="minidiff/diffusion/schedules.py from_betas",
    laws=(signal_and_noise, equal_steps, end_of_ddpm), probe=probe,
    wrong=(
        Wrong(_product_of_betas, "it multiplies the betas, which are the shares of the noise: the signal keeps the "
                                 "share 1 - beta"),
        Wrong(_power_of_the_noise, "it returns the power of the noise, 1 - alpha_bar"),
        Wrong(_sum, "it subtracts the sum of the betas: each step takes its share of what is left, so shares "
                    "multiply"),
        Wrong(_sum_of_shares, "it adds the shares 1 - beta: what is left after two steps is the product of their "
                              "shares"),
        Wrong(_exponential, "it returns exp(-sum of betas), which is right only in the limit of small betas"),
        Wrong(_single_steps, "it returns 1 - beta_t of each single step: alpha_bar_t is the product of all up to t"),
        Wrong(_root, "it returns alpha_t = sqrt(alpha_bar_t), the amplitude in place of the power"),
        Wrong(_shifted, "it is one step late: entry t must have the step t, too, so that alpha_bar[0] = 1 - betas[0]"),
        Wrong(_with_the_clean_image, "it has one entry too many: the 1 of the clean image stands at t = -1, and is "
                                     "not in the table"),
        Wrong(_first_alone, "it returns the first entry alone: is the `return` inside the loop?"),
        Wrong(_only_the_end, "it returns the last entry alone: alpha_bar has one for every time"),
    ))
