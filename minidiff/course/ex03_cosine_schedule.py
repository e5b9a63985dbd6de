"""Exercise 3: the cosine schedule, judged by cos^2 x = (1 + cos 2x)/2, and by what any schedule must keep."""

import math

import numpy as np

from minidiff.course.compare import differs, misshapen, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import schedules


def solution(T, offset, beta_max):
    return schedules.cosine(T, offset, beta_max, allow_signal=True).alpha_bar


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int):
    rng = stream(3, law)
    for T in (2, 3, 10, 57, 1000):
        offset, beta_max = float(rng.uniform(0.002, 0.05)), float(rng.uniform(0.9, 0.999))
        yield T, offset, beta_max, f"for T = {T}, offset = {offset:.4g}, beta_max = {beta_max:.4g}"


def double_angle(cosine):
    """before the last time alpha_bar_t = (1 + cos(pi w_t)) / (1 + cos(pi w_{-1})), where
    w_t = ((t + 1)/T + offset)/(1 + offset)"""
    for T, offset, beta_max, where in _cases(1):
        def height(u, offset=offset):
            return 1 + math.cos(math.pi * (u + offset) / (1 + offset))
        expected = np.array([height((t + 1) / T) / height(0) for t in range(T - 1)])
        got = cosine(T, offset, beta_max)
        if (said := misshapen("alpha_bar", got, (T,), where) or differs("alpha_bar[:-1]", got[:-1], expected, where)):
            return said


def limited_steps(cosine):
    """no step takes more than the share beta_max of what is left, and the last one takes just that"""
    for T, offset, beta_max, where in _cases(2):
        got = cosine(T, offset, beta_max)
        if (said := misshapen("alpha_bar", got, (T,), where)):
            return said
        share = 1 - got[-1] / (got[-2] if T > 1 else 1.0)
        if (said := differs("the last beta", share, beta_max, where, tolerance=1e-7)):
            return said


def many_limited_steps(cosine):
    """with beta_max = 0.3 several steps are limited, and each one takes 0.3 of what the step before it left"""
    for T in (4, 12, 40):
        where = f"for T = {T}, offset = 0.008, beta_max = 0.3"
        left, expected = 1.0, []
        for t in range(T):
            before, after = (math.cos((u / T + 0.008) / 1.008 * math.pi / 2) for u in (t, t + 1))
            left *= max((after / before) ** 2, 0.7)
            expected.append(left)
        if (said := differs("alpha_bar", cosine(T, 0.008, 0.3), np.array(expected), where)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _f(u, offset):
    return np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2


def _limited(f, beta_max):
    """The table of f at t = -1 ... T-1."""
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], beta_max))


def _starts_at_one(T, offset, beta_max):
    f = _f(np.arange(T) / T, offset)
    return f / f[0]


def _linspace(T, offset, beta_max):
    f = _f(np.linspace(0, 1, T), offset)
    return f / f[0]


def _no_limit(T, offset, beta_max):
    f = _f(np.arange(T + 1) / T, offset)
    return f[1:] / f[0]


def _limits_alpha_bar(T, offset, beta_max):
    f = _f(np.arange(T + 1) / T, offset)
    return np.maximum(f[1:] / f[0], 1 - beta_max)


def _no_square(T, offset, beta_max):
    return _limited(np.sqrt(np.abs(_f(np.arange(T + 1) / T, offset))), beta_max)


def _no_offset(T, offset, beta_max):
    return _limited(_f(np.arange(T + 1) / T, 0.0), beta_max)


def _no_division_of_the_offset(T, offset, beta_max):
    return _limited(np.cos((np.arange(T + 1) / T + offset) * np.pi / 2) ** 2, beta_max)


def _not_divided_by_its_start(T, offset, beta_max):
    f = _f(np.arange(T + 1) / T, offset)
    f[0] = 1.0
    return _limited(f, beta_max)


def _betas(T, offset, beta_max):
    f = _f(np.arange(T + 1) / T, offset)
    return np.minimum(1 - f[1:] / f[:-1], beta_max)


def probe(cosine):
    return [cosine(6, 0.03, 0.95), cosine(5, 0.01, 0.4)]


EXERCISE = Exercise(
    title="The cosine schedule", answer="cosine", minutes=10, chapter="01_noise",
    hint="Compute f at T + 1 points, u = 0, 1/T, ..., 1. Each beta is one minus the ratio of two neighbours. Limit "
         "the betas, and multiply all 1 - beta up to t, as in exercise 2.",
    solution=solution, place="minidiff/diffusion/schedules.py cosine",
    laws=(double_angle, limited_steps, many_limited_steps), probe=probe,
    wrong=(
        Wrong(_starts_at_one, "it reads f at u = t/T, so that alpha_bar[0] = 1 has no noise at all, and eps is 0/0 "
                              "there: time t stands at u = (t + 1)/T"),
        Wrong(_linspace, "it reads f at linspace(0, 1, T): T strides lie between the clean image, u = 0, and the "
                         "last time, u = 1, and u = 0 is not in the table"),
        Wrong(_no_limit, "beta_max is not used: the last beta is 1, and nothing is left to divide by"),
        Wrong(_limits_alpha_bar, "it limits alpha_bar from below, so that neighbours can be equal: limit the betas, "
                                 "and multiply"),
        Wrong(_no_square, "the cosine is not squared"),
        Wrong(_no_offset, "the offset is not used: the first betas are then too small to matter"),
        Wrong(_no_division_of_the_offset, "u + offset is not divided by 1 + offset: the cosine must reach 0 at u = "
                                          "1, and not before"),
        Wrong(_not_divided_by_its_start, "f(u) is not divided by f(0): at u = 0 all of the signal must be there"),
        Wrong(_betas, "it returns the betas: the table that is asked for is alpha_bar, the product of all 1 - beta"),
    ))
