"""Exercise 5: x_0 of eps, x0 and v, judged by noising an image that is known."""

import math

import numpy as np

from minidiff.course.compare import differs, random_alpha_bar, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian
from minidiff.diffusion.schedules import Schedule


def solution(alpha_bar, predicts, x_t, t, out):
    return gaussian.to_x0(Schedule(alpha_bar), predicts, x_t, t, out)


# ---- laws --------------------------------------------------------------------------------------------------

def _known(law: int, zero: bool = False):
    """An image, its noise, x_t, and v by the angle phi: (x_t, v) is (x_0, eps), rotated."""
    rng = stream(5, law)
    for _ in range(6):
        alpha_bar = random_alpha_bar(rng)
        t = int(rng.integers(0, len(alpha_bar)))
        if zero:
            t = len(alpha_bar) - 1
            alpha_bar[t] = 0.0
        x_0, eps = rng.standard_normal((2, 3, 3, 1)), rng.standard_normal((2, 3, 3, 1))
        phi = math.acos(math.sqrt(alpha_bar[t]))
        x_t, v = math.cos(phi) * x_0 + math.sin(phi) * eps, math.cos(phi) * eps - math.sin(phi) * x_0
        yield alpha_bar, t, x_0, eps, x_t, v, f"at t = {t}, where alpha_bar = {alpha_bar[t]:.4g}"


def of_eps(to_x0):
    """from the noise that was added it finds the image"""
    for alpha_bar, t, x_0, eps, x_t, _, where in _known(1):
        if (said := differs("x0_hat", to_x0(alpha_bar, "eps", x_t, t, eps), x_0, f"for the true eps {where}")):
            return said


def of_x0(to_x0):
    """a network that predicts x_0 has done the work"""
    for alpha_bar, t, x_0, _, x_t, _, where in _known(2):
        if (said := differs("x0_hat", to_x0(alpha_bar, "x0", x_t, t, x_0), x_0, f"for the true x_0 {where}")):
            return said


def of_v(to_x0):
    """from the velocity it finds the image"""
    for alpha_bar, t, x_0, _, x_t, v, where in _known(3):
        if (said := differs("x0_hat", to_x0(alpha_bar, "v", x_t, t, v), x_0, f"for the true v {where}")):
            return said


def of_v_in_pure_noise(to_x0):
    """where alpha_bar = 0, v determines the image, with no division by 0"""
    for alpha_bar, t, x_0, _, x_t, v, where in _known(4, zero=True):
        if (said := differs("x0_hat", to_x0(alpha_bar, "v", x_t, t, v), x_0, f"for the true v {where}")):
            return said


def keeps_the_dtype(to_x0):
    """x0_hat has the shape and dtype of x_t"""
    for alpha_bar, t, x_0, eps, x_t, v, where in _known(5):
        for predicts, out in (("eps", eps), ("x0", x_0), ("v", v)):
            got = to_x0(alpha_bar, predicts, x_t.astype(np.float32), t, out.astype(np.float32))
            if (said := differs("x0_hat", got, x_0, f"for {predicts} {where}", dtype=np.float32, tolerance=1e-3)):
                return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _to_x0(alpha_bar, predicts, x_t, t, out, eps=None, x0=None, v=None):
    """The right answer, or one in which a prediction is converted in another way."""
    alpha, sigma = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
    rules = {"eps": eps or (lambda x, out, a, s: (x - s * out) / a), "x0": x0 or (lambda x, out, a, s: out),
             "v": v or (lambda x, out, a, s: a * x - s * out)}
    return rules[predicts](x_t, out, alpha, sigma)


def _eps_with_variance(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, eps=lambda x, out, a, s: (x - s**2 * out) / a)


def _eps_not_divided(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, eps=lambda x, out, a, s: x - s * out)


def _eps_divided_by_alpha_bar(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, eps=lambda x, out, a, s: (x - s * out) / a**2)


def _eps_added(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, eps=lambda x, out, a, s: (x + s * out) / a)


def _v_of_the_other_sign(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, v=lambda x, out, a, s: a * x + s * out)


def _v_gives_eps(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, v=lambda x, out, a, s: s * x + a * out)


def _v_of_flow_matching(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, v=lambda x, out, a, s: x - s * out)


def _v_as_eps(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, v=lambda x, out, a, s: (x - s * out) / a if a else 0 * x)


def _v_by_way_of_eps(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out,
                  v=lambda x, out, a, s: (x - s * (s * x + a * out)) / a if a else np.nan * x)


def _x0_as_eps(alpha_bar, predicts, x_t, t, out):
    return _to_x0(alpha_bar, predicts, x_t, t, out, x0=lambda x, out, a, s: (x - s * out) / a if a else 0 * x)


def probe(to_x0):
    rng = stream(5)
    alpha_bar = random_alpha_bar(rng, 5)
    alpha_bar[-1] = 0.0
    cases = [("eps", 0), ("eps", 2), ("x0", 1), ("v", 0), ("v", 3), ("v", 4)]
    return [to_x0(alpha_bar, predicts, rng.standard_normal(4), t, rng.standard_normal(4)) for predicts, t in cases]


EXERCISE = Exercise(
    title="The image that a network's output stands for", answer="to_x0", minutes=10, chapter="03_denoiser",
    hint="Compute alpha and sigma as Python floats, by math.sqrt, and write one line for each of the three. To see "
         "the third, put x_t and v into alpha x_t - sigma v and use alpha^2 + sigma^2 = 1.",
    solution=solution, place="minidiff/diffusion/gaussian.py to_x0",
    laws=(of_eps, of_x0, of_v, of_v_in_pure_noise, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_eps_with_variance, "of eps, it subtracts (1 - alpha_bar) eps in place of sqrt(1 - alpha_bar) eps"),
        Wrong(_eps_not_divided, "of eps, it does not divide by alpha: x_t - sigma eps is alpha x_0"),
        Wrong(_eps_divided_by_alpha_bar, "of eps, it divides by alpha_bar in place of alpha = sqrt(alpha_bar)"),
        Wrong(_eps_added, "of eps, it adds the noise where it should be subtracted"),
        Wrong(_v_of_the_other_sign, "of v, the sign of sigma v is wrong: v = alpha eps - sigma x_0 holds -x_0"),
        Wrong(_v_gives_eps, "of v, it returns eps = sigma x_t + alpha v: alpha and sigma have changed places"),
        Wrong(_v_of_flow_matching, "of v, it takes v for eps - x_0, the velocity of flow matching: here v is alpha "
                                   "eps - sigma x_0"),
        Wrong(_v_as_eps, "of v, it takes v for eps"),
        Wrong(_v_by_way_of_eps, "of v, it goes by way of eps and divides by alpha, which is 0/0 in pure noise: alpha "
                                "x_t - sigma v needs no division"),
        Wrong(_x0_as_eps, "of x0, it takes the output for eps: a network that predicts x_0 has x_0 as its output"),
    ))
