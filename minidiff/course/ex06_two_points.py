"""Exercise 6: the exact denoiser of two points, judged by Tweedie's formula, by quadrature and by extreme numbers."""

import math

import numpy as np

from minidiff.course.compare import differs, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion.exact import MixtureDenoiser
from minidiff.diffusion.schedules import Schedule


def solution(p, alpha, sigma, x_t):
    # alpha_bar/(1 - alpha_bar) = (alpha/sigma)^2; x_t is scaled to alpha^2 + sigma^2 = 1, which changes no x0_hat
    length = math.hypot(alpha, sigma)
    denoiser = MixtureDenoiser(Schedule([(alpha / length) ** 2]), [1 - p, p], [[-1.0], [1.0]], [0.0, 0.0])
    rows = np.reshape(x_t / length, (-1, 1))
    return denoiser(rows, np.zeros(len(rows), int)).reshape(np.shape(x_t))


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int):
    rng = stream(6, law)
    for shape in ((7,), (2, 3), ()):
        p, alpha, sigma = float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.2, 1)), float(rng.uniform(0.3, 1))
        where = f"p = {p:.4g}, alpha = {alpha:.4g}, sigma = {sigma:.4g}"
        yield p, alpha, sigma, 1.5 * rng.standard_normal(shape), where


def _log_density(p, alpha, sigma, x):
    """log p_t(x), but for a constant."""
    return np.logaddexp(math.log(p) - (x - alpha) ** 2 / (2 * sigma**2),
                        math.log(1 - p) - (x + alpha) ** 2 / (2 * sigma**2))


def tweedie(x0_hat):
    """it is (x_t + sigma^2 d/dx log p_t(x_t)) / alpha, with the derivative from central differences"""
    h = 1e-5
    for p, alpha, sigma, x, where in _cases(1):
        slope = (_log_density(p, alpha, sigma, x + h) - _log_density(p, alpha, sigma, x - h)) / (2 * h)
        expected = (x + sigma**2 * slope) / alpha
        got = x0_hat(p, alpha, sigma, np.asarray(x))
        if (said := differs("x0_hat", got, expected, f"for x_t = {_few(x)}, {where}", tolerance=1e-7)):
            return said


def keeps_the_mean(x0_hat):
    """its mean over all x_t is that of x_0, 2p - 1, and its product with x_t has the mean alpha, as x_0 x_t has"""
    x = np.linspace(-9, 9, 40_001)
    for p, alpha, sigma, _, where in _cases(2):
        density = np.exp(_log_density(p, alpha, sigma, x))
        density /= density.sum()
        got = x0_hat(p, alpha, sigma, x)
        if (said := differs("the mean of x0_hat", (density * got).sum(), 2 * p - 1, f"for {where}", tolerance=1e-6)
                or differs("the mean of x_t x0_hat", (density * x * got).sum(), alpha, f"for {where}", tolerance=1e-6)):
            return said


def finite_far_away(x0_hat):
    """far from 0, or with little noise, x0_hat is the nearer point, -1 or +1, and no NaN"""
    for sigma in (1.0, 0.01):
        for x in (-1e5, -50.0, 50.0, 1e5):
            got = x0_hat(0.4, 0.9, sigma, np.array([x]))
            if (said := differs("x0_hat", got, np.array([math.copysign(1, x)]),
                                f"for x_t = {x:g}, p = 0.4, alpha = 0.9, sigma = {sigma}")):
                return said


def _few(x) -> str:
    return f"{float(x):.4g}" if np.ndim(x) == 0 else f"{float(x.flat[0]):.4g}, ..."


# ---- known wrong answers -----------------------------------------------------------------------------------

def _tanh(x_t, scale, p):
    return np.tanh(np.asarray(x_t) * scale + 0.5 * math.log(p / (1 - p)))


def _sigma_not_squared(p, alpha, sigma, x_t):
    return _tanh(x_t, alpha / sigma, p)


def _no_alpha(p, alpha, sigma, x_t):
    return _tanh(x_t, 1 / sigma**2, p)


def _twice(p, alpha, sigma, x_t):
    return np.tanh(2 * alpha * x_t / sigma**2 + math.log(p / (1 - p)))


def _same_weights(p, alpha, sigma, x_t):
    return _tanh(x_t, alpha / sigma**2, 0.5)


def _weights_swapped(p, alpha, sigma, x_t):
    return _tanh(x_t, alpha / sigma**2, 1 - p)


def _nearest(p, alpha, sigma, x_t):
    return np.where(np.asarray(x_t) < 0, -1.0, 1.0)


def _probability(p, alpha, sigma, x_t):
    return (1 + _tanh(x_t, alpha / sigma**2, p)) / 2


def _divided_by_alpha(p, alpha, sigma, x_t):
    return np.asarray(x_t) / alpha


def _ratio(p, alpha, sigma, x_t):
    x_t = np.asarray(x_t)
    plus = p * np.exp(-(x_t - alpha) ** 2 / (2 * sigma**2))
    minus = (1 - p) * np.exp(-(x_t + alpha) ** 2 / (2 * sigma**2))
    return (plus - minus) / (plus + minus)


def probe(x0_hat):
    return [x0_hat(0.3, 0.6, 0.8, np.array([-1.3, -0.2, 0.0, 0.5, 2.0])),
            x0_hat(0.7, 0.9, 0.1, np.array([-60.0, 0.01]))]


EXERCISE = Exercise(
    title="A perfect denoiser, of two points", answer="x0_hat", minutes=20, chapter="03_denoiser",
    hint="Divide the two terms: P(+1) / P(-1) = e^(2a), where 2a = 2 alpha x_t / sigma^2 + log(p / (1 - p)). And "
         "(e^(2a) - 1) / (e^(2a) + 1) has a name.",
    solution=solution, place="minidiff/diffusion/exact.py MixtureDenoiser",
    laws=(tweedie, keeps_the_mean, finite_far_away), probe=probe,
    wrong=(
        Wrong(_sigma_not_squared, "it divides by sigma in place of sigma^2: the exponent of N(x; m, sigma^2) is -(x "
                                  "- m)^2 / (2 sigma^2)"),
        Wrong(_no_alpha, "alpha is missing: the two points of x_t are +alpha and -alpha, and not +1 and -1"),
        Wrong(_twice, "the exponent is twice too large: tanh(a) is (e^(2a) - 1) / (e^(2a) + 1)"),
        Wrong(_same_weights, "p is not used: the likelier point draws the estimate, by log(p / (1 - p)) / 2"),
        Wrong(_weights_swapped, "p and 1 - p have changed places: p belongs to +1"),
        Wrong(_nearest, "it returns the nearer point: the mean of x_0 lies between the two points, according to how "
                        "probable each is"),
        Wrong(_probability, "it returns the probability of +1: the mean of x_0 is P(+1) - P(-1)"),
        Wrong(_divided_by_alpha, "it returns x_t / alpha, which ignores what is known of the data"),
        Wrong(_ratio, "it divides two numbers that both round to 0 far from the points, which is NaN: divide the two "
                      "exponentials by hand first"),
    ))
