"""Exercise 12: KL between Gaussians, judged by the integral of q log(q/p)."""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian


def solution(mean1, var1, mean2, var2):
    return gaussian.kl_gaussian(mean1, var1, mean2, var2)


# ---- laws --------------------------------------------------------------------------------------------------

def integral(kl_gaussian):
    """it is the integral of q log(q/p), by quadrature over 12 standard deviations on each side"""
    rng = stream(12, 1)
    z = np.linspace(-12, 12, 20_001)
    for _ in range(6):
        m1, m2 = rng.standard_normal(2)
        v1, v2 = np.exp(rng.uniform(-2, 2, 2))
        x = m1 + math.sqrt(v1) * z
        log_q, log_p = (-(x - m) ** 2 / (2 * v) - 0.5 * math.log(2 * math.pi * v) for m, v in ((m1, v1), (m2, v2)))
        expected = np.trapezoid(np.exp(log_q) * (log_q - log_p), x)
        got = kl_gaussian(*(np.full(1, a) for a in (m1, v1, m2, v2)))
        if (said := differs("KL", got, np.full(1, expected), "for q = N(mean1, var1) and p = N(mean2, var2)",
                            tolerance=1e-6, given={"mean1": m1, "var1": v1, "mean2": m2, "var2": v2})):
            return said


def none_from_itself(kl_gaussian):
    """a Gaussian has the divergence 0 from itself, and each element depends on the numbers at its own place alone"""
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
    """in other units, x = c y, where the means have the factor c and the variances c^2, it is the same"""
    one = kl_gaussian(np.array([1.0, 0.0]), np.array([4.0, 1.0]), np.array([-2.0, 0.5]), np.array([2.0, 3.0]))
    for c in (1e-3, 1e3):
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


def _log_without_half(mean1, var1, mean2, var2):
    return 0.5 * (var1 / var2 - 1 + (mean1 - mean2) ** 2 / var2) - np.log(var1 / var2)


def _no_square(mean1, var1, mean2, var2):
    return 0.5 * (var1 / var2 - 1 - np.log(var1 / var2) + (mean1 - mean2) / var2)


def _log2(mean1, var1, mean2, var2):
    return 0.5 * (var1 / var2 - 1 - np.log2(var1 / var2) + (mean1 - mean2) ** 2 / var2)


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
    hint="log q(x) = -((x - mean1)^2 / var1 + log(2 pi var1)) / 2, and log p(x) in the same way. The mean of "
         "(x - mean1)^2 under q is var1, and that of (x - mean2)^2 is var1 + (mean1 - mean2)^2.",
    solution=solution, place="minidiff/diffusion/gaussian.py kl_gaussian",
    laws=(integral, none_from_itself, scale_does_not_matter), probe=probe,
    wrong=(
        Wrong(_reversed, "the two Gaussians have changed places: KL(q || p) is not KL(p || q), and the mean is under "
                         "q"),
        Wrong(_other_variance, "the squared difference of the means is divided by v1 in place of v2"),
        Wrong(_no_half, "the half is missing"),
        Wrong(_no_one, "the -1 is missing: a Gaussian is at the divergence 0 from itself"),
        Wrong(_log_of_the_other_sign, "the logarithm has the wrong sign: it is -log(v1/v2)"),
        Wrong(_log_without_half, "the logarithm of v1/v2 has lost its half: it is -log(v1/v2) / 2"),
        Wrong(_no_square, "the difference of the means is not squared"),
        Wrong(_bits, "it is in bits: nats have natural logarithms"),
        Wrong(_log2, "its logarithm has the base 2: nats have natural logarithms"),
        Wrong(_deviations, "it takes the variances for standard deviations, and squares them"),
        Wrong(_only_means, "it is right for equal variances only: the terms of v1/v2 are missing"),
        Wrong(_sum, "it sums over the elements: one divergence for each is asked for"),
    ))
