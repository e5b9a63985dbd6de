"""Exercise 12: KL between Gaussians, judged by the integral of p log(p/q)."""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian


def solution(mean1, var1, mean2, var2):
    return gaussian.kl_gaussian(mean1, var1, mean2, var2)


# ---- laws --------------------------------------------------------------------------------------------------

def integral(kl_gaussian):
    """it is the integral of p log(p/q), by quadrature over 12 standard deviations on each side"""
    rng = stream(12, 1)
    z = np.linspace(-12, 12, 20_001)
    for _ in range(6):
        m1, m2 = rng.standard_normal(2)
        v1, v2 = np.exp(rng.uniform(-2, 2, 2))
        x = m1 + math.sqrt(v1) * z
        log_p, log_q = (-(x - m) ** 2 / (2 * v) - 0.5 * math.log(2 * math.pi * v) for m, v in ((m1, v1), (m2, v2)))
        expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), x)
        got = kl_gaussian(*(np.full(1, a) for a in (m1, v1, m2, v2)))
        if (said := differs("KL", got, np.full(1, expected), f"for N({m1:.4g}, {v1:.4g}) and N({m2:.4g}, {v2:.4g})",
                            tolerance=1e-6)):
            return said


def none_from_itself(kl_gaussian):
    """a Gaussian is at the divergence 0 from itself, and elements do not disturb each other"""
    rng = stream(12, 2)
    mean, var = rng.standard_normal((2, 3)), np.exp(rng.standard_normal((2, 3)))
    got = kl_gaussian(mean, var, mean.copy(), var.copy())
    if (said := differs("KL + 1", 1 + got, np.ones((2, 3)), "for equal Gaussians")):
        return said
    other = mean + np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    expected = (other - mean) ** 2 / (2 * var)
    return differs("KL", kl_gaussian(mean, var, other, var.copy()), expected, "for equal variances, where it is "
                                                                              "(m1 - m2)^2 / (2 v)")


def scale_does_not_matter(kl_gaussian):
    """in other units, x = c y, it is the same: also where c^2 makes the variances 1e-300"""
    one = kl_gaussian(np.array([1.0, 0.0]), np.array([4.0, 1.0]), np.array([-2.0, 0.5]), np.array([2.0, 3.0]))
    for c in (1e-3, 1e3, 1e-150):
        got = kl_gaussian(np.array([c, 0.0]), np.array([4.0, 1.0]) * c**2, np.array([-2 * c, 0.5 * c]),
                          np.array([2.0, 3.0]) * c**2)
        if (said := differs("KL", got, one, f"for variances {numbers(np.array([4.0, 2.0]) * c**2)}")):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _reversed(mean1, var1, mean2, var2):
    return solution(mean2, var2, mean1, var1)


def _other_variance(mean1, var1, mean2, var2):
    return 0.5 * (var1 / var2 - 1 - np.log(var1 / var2) + (mean1 - mean2) ** 2 / var1)


def _no_half(mean1, var1, mean2, var2):
    return 2 * solution(mean1, var1, mean2, var2)


def _no_one(mean1, var1, mean2, var2):
    return solution(mean1, var1, mean2, var2) + 0.5


def _log_of_the_other_sign(mean1, var1, mean2, var2):
    return solution(mean1, var1, mean2, var2) + np.log(var1 / var2)


def _no_square(mean1, var1, mean2, var2):
    return 0.5 * (var1 / var2 - 1 - np.log(var1 / var2) + np.abs(mean1 - mean2) / var2)


def _bits(mean1, var1, mean2, var2):
    return solution(mean1, var1, mean2, var2) / math.log(2)


def _deviations(mean1, var1, mean2, var2):
    return solution(mean1, var1**2, mean2, var2**2)


def _only_means(mean1, var1, mean2, var2):
    return 0.5 * (mean1 - mean2) ** 2 / var2


def _sum(mean1, var1, mean2, var2):
    return np.sum(solution(mean1, var1, mean2, var2))


def probe(kl_gaussian):
    rng = stream(12)
    return [kl_gaussian(rng.standard_normal(4), np.exp(rng.standard_normal(4)), rng.standard_normal(4),
                        np.exp(rng.standard_normal(4))) for _ in range(2)]


EXERCISE = Exercise(
    title="The divergence of two Gaussians", answer="kl_gaussian", minutes=10, chapter="04_bound",
    hint="Four terms in a row, then half of their sum. The arguments are variances, and no square root is needed.",
    solution=solution, place="minidiff/diffusion/gaussian.py kl_gaussian",
    laws=(integral, none_from_itself, scale_does_not_matter), probe=probe,
    wrong=(
        Wrong(_reversed, "the two Gaussians have changed places: the divergence of p from q is not that of q from p"),
        Wrong(_other_variance, "the squared difference of the means is divided by v1 in place of v2"),
        Wrong(_no_half, "the half is missing"),
        Wrong(_no_one, "the -1 is missing: a Gaussian is at the divergence 0 from itself"),
        Wrong(_log_of_the_other_sign, "the logarithm has the wrong sign: it is -log(v1/v2)"),
        Wrong(_no_square, "the difference of the means is not squared"),
        Wrong(_bits, "it is in bits: nats have natural logarithms"),
        Wrong(_deviations, "it takes the variances for standard deviations, and squares them"),
        Wrong(_only_means, "it is right for equal variances only: the terms of v1/v2 are missing"),
        Wrong(_sum, "it sums over the elements: one divergence for each is asked for"),
    ))
