"""Exercise 4: q(x_{t-1} | x_t, x_0), judged by integrating the two densities that Bayes' rule multiplies."""

import numpy as np

from minidiff.course.compare import differs, negative_root, not_tuple, numbers, random_alpha_bar, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian
from minidiff.diffusion.schedules import Schedule


def solution(alpha_bar, x_0, x_t, t):
    mean, variance = gaussian.q_posterior_mean_variance(Schedule(alpha_bar), x_0, x_t, t)
    return mean, float(gaussian.q_posterior_mean_variance(Schedule(alpha_bar), np.zeros(1), np.zeros(1), t)[1])


# ---- laws --------------------------------------------------------------------------------------------------

def _log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def _cases(law: int):
    rng = stream(4, law)
    for _ in range(8):
        alpha_bar = random_alpha_bar(rng)
        t = int(rng.integers(1, len(alpha_bar)))
        yield alpha_bar, rng.standard_normal((2, 3)), rng.standard_normal((2, 3)), t, rng, \
            f"at t = {t} with alpha_bar = {numbers(alpha_bar)}"


def _given(alpha_bar, x_0, x_t, t, which=("x_0", "x_t", "alpha_bar_t", "alpha_bar_{t-1}")):
    """What mean and variance are computed from."""
    all_of_it = {"x_0": x_0, "x_t": x_t, "alpha_bar_t": alpha_bar[t], "alpha_bar_{t-1}": alpha_bar[t - 1] if t else 1.0}
    return {name: all_of_it[name] for name in which}


def integrals(posterior):
    """mean and variance are the integrals of x and (x - mean)^2 over q(x_t | x) q(x | x_0), scaled to the area 1, by
    quadrature"""
    for alpha_bar, x_0, x_t, t, _, where in _cases(1):
        step, before = alpha_bar[t] / alpha_bar[t - 1], alpha_bar[t - 1]
        x = np.linspace(-12, 12, 20_001)
        weight = np.exp(_log_normal(x_t[..., None], np.sqrt(step) * x, 1 - step)
                        + _log_normal(x, np.sqrt(before) * x_0[..., None], 1 - before))
        weight /= weight.sum(-1, keepdims=True)
        mean = (weight * x).sum(-1)
        variance = float((weight * (x - mean[..., None]) ** 2).sum(-1)[0, 0])
        got = posterior(alpha_bar, x_0, x_t, t)
        if (said := not_tuple("mean, variance", got, 2, where)
                or differs("the mean", got[0], mean, where, tolerance=1e-6,
                           given=_given(alpha_bar, x_0, x_t, t))
                or differs("the variance", got[1], variance, where, tolerance=1e-6,
                           given=_given(alpha_bar, 0, 0, t, which=("alpha_bar_t", "alpha_bar_{t-1}")))):
            return said


def bayes(posterior):
    """q(x_{t-1} | x_t, x_0) q(x_t | x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) at any x_{t-1}"""
    for alpha_bar, x_0, x_t, t, rng, where in _cases(2):
        x = rng.standard_normal(x_0.shape)
        got = posterior(alpha_bar, x_0, x_t, t)
        if (said := not_tuple("mean, variance", got, 2, where)):
            return said
        step, before = alpha_bar[t] / alpha_bar[t - 1], alpha_bar[t - 1]
        left = _log_normal(x, got[0], got[1]) + _log_normal(x_t, np.sqrt(alpha_bar[t]) * x_0, 1 - alpha_bar[t])
        right = _log_normal(x_t, np.sqrt(step) * x, 1 - step) + _log_normal(x, np.sqrt(before) * x_0, 1 - before)
        if (said := differs("the logarithm of the left side", left, right, where, tolerance=1e-8,
                            given={**_given(alpha_bar, x_0, x_t, t), "x_{t-1}": x})):
            return said


def first_step(posterior):
    """at t = 0 the step ends at the clean image: the mean is x_0 and the variance is 0"""
    rng = stream(4, 3)
    for T in (1, 2, 6):
        alpha_bar, x_0, x_t = random_alpha_bar(rng, T), rng.standard_normal((2, 2)), rng.standard_normal((2, 2))
        where = f"at t = 0 with alpha_bar = {numbers(alpha_bar)}"
        got = posterior(alpha_bar, x_0, x_t, 0)
        if (said := not_tuple("mean, variance", got, 2, where)
                or differs("the mean", got[0], x_0, where, given=_given(alpha_bar, x_0, x_t, 0))
                or differs("the variance + 1", got[1] + 1.0, 1.0, where)):
            return said


def keeps_the_dtype(posterior):
    """the mean has the shape and dtype of x_0"""
    for alpha_bar, x_0, x_t, t, _, where in _cases(4):
        expected = posterior(alpha_bar, x_0, x_t, t)
        if (said := not_tuple("mean, variance", expected, 2, where)):
            return said
        got = posterior(alpha_bar, x_0.astype(np.float32), x_t.astype(np.float32), t)
        if (said := differs("the mean", got[0], expected[0], where, dtype=np.float32, like="x_0")):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _posterior(alpha_bar, x_0, x_t, t, *, before=None, beta=None, c_0=None, c_t=None, variance=None):
    """The right answer, or one with a part replaced by a function of (alpha_bar_t, alpha_bar_{t-1}, beta_t)."""
    now = float(alpha_bar[t])
    before = (float(alpha_bar[t - 1]) if t > 0 else 1.0) if before is None else before
    beta = 1 - now / before
    parts = {"c_0": lambda a, b, beta: np.sqrt(b) * beta / (1 - a),
             "c_t": lambda a, b, beta: np.sqrt(1 - beta) * (1 - b) / (1 - a),
             "variance": lambda a, b, beta: (1 - b) / (1 - a) * beta}
    given = {"c_0": c_0, "c_t": c_t, "variance": variance}
    c_0, c_t, variance = (float((given[name] or part)(now, before, beta)) for name, part in parts.items())
    return c_0 * x_0 + c_t * x_t, variance


def _variance_of_the_forward_step(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, variance=lambda a, b, beta: beta)


def _deviation(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, variance=lambda a, b, beta: np.sqrt((1 - b) / (1 - a) * beta))


def _inverted(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, variance=lambda a, b, beta: (1 - a) / (1 - b) * beta if b < 1 else np.inf)


def _last_entry(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, before=float(alpha_bar[t - 1]))


def _swapped(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_t, x_0, t)


def _no_root_of_alpha_bar(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, c_0=lambda a, b, beta: b * beta / (1 - a))


def _no_root_of_one_minus_beta(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, c_t=lambda a, b, beta: (1 - beta) * (1 - b) / (1 - a))


def _alpha_bar_for_alpha(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, c_t=lambda a, b, beta: np.sqrt(a) * (1 - b) / (1 - a))


def _root_of_the_time_itself(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar, x_0, x_t, t, c_0=lambda a, b, beta: np.sqrt(a) * beta / (1 - a))


def _squared(alpha_bar, x_0, x_t, t):
    return _posterior(alpha_bar**2, x_0, x_t, t)


def _beta_of_all_steps(alpha_bar, x_0, x_t, t):
    return _of_beta(alpha_bar, x_0, x_t, t, lambda a, b: 1 - a)


def _quotient_inverted(alpha_bar, x_0, x_t, t):
    return _of_beta(alpha_bar, x_0, x_t, t, lambda a, b: 1 - b / a)


def _of_beta(alpha_bar, x_0, x_t, t, rule):
    a, b = float(alpha_bar[t]), float(alpha_bar[t - 1]) if t > 0 else 1.0
    beta = rule(a, b)
    return _posterior(alpha_bar, x_0, x_t, t, c_0=lambda a, b, _: np.sqrt(b) * beta / (1 - a),
                      c_t=lambda a, b, _: np.sqrt(1 - beta) * (1 - b) / (1 - a),
                      variance=lambda a, b, _: (1 - b) / (1 - a) * beta)


def probe(posterior):
    rng = stream(4)
    alpha_bar = random_alpha_bar(rng, 6)
    return [posterior(alpha_bar, rng.standard_normal(4), rng.standard_normal(4), t) for t in (0, 2, 5)]


EXERCISE = Exercise(
    title="One step back, if you knew x_0", answer="posterior", minutes=20, chapter="02_reverse",
    hint="1/variance is the factor of x_{t-1}^2 in the two exponents, but for 1/2: (1 - beta_t) / beta_t + 1 / (1 - "
         "alpha_bar_{t-1}). Bring it to one fraction and turn it over: the variance then has no division by 0 at "
         "t = 0. Multiply the mean out in the same way. Write `before = alpha_bar[t - 1] if t > 0 else 1.0` first, "
         "since alpha_bar[-1] is the last entry in Python. alpha_bar is float64, so cast the mean back: "
         ".astype(x_0.dtype).",
    solution=solution, place="minidiff/diffusion/gaussian.py q_posterior_mean_variance",
    if_nan=negative_root,
    laws=(integrals, bayes, first_step, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_variance_of_the_forward_step, "the variance is beta_t, that of the forward step: x_0 is known here, "
                                             "so less is uncertain, by (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)"),
        Wrong(_deviation, "it returns the standard deviation in place of the variance"),
        Wrong(_inverted, "the ratio in the variance is upside down: it is (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), "
                         "which is less than 1"),
        Wrong(_last_entry, "at t = 0 it reads alpha_bar[-1], the last entry in Python: alpha_bar_{-1} is 1, the "
                           "clean image"),
        Wrong(_swapped, "the two coefficients of the mean have changed places"),
        Wrong(_no_root_of_alpha_bar, "the coefficient of x_0 has alpha_bar_{t-1} in place of its square root"),
        Wrong(_no_root_of_one_minus_beta, "the coefficient of x_t has 1 - beta_t in place of its square root"),
        Wrong(_alpha_bar_for_alpha, "the coefficient of x_t has sqrt(alpha_bar_t) in place of sqrt(1 - beta_t), "
                                    "which the paper writes as sqrt(alpha_t)"),
        Wrong(_root_of_the_time_itself, "the coefficient of x_0 has sqrt(alpha_bar_t) in place of "
                                        "sqrt(alpha_bar_{t-1}), which multiplies x_0 in q(x_{t-1} | x_0)"),
        Wrong(_squared, "it takes alpha_bar^2 for alpha_bar: alpha_bar is a power already, and its root multiplies "
                        "x_0"),
        Wrong(_beta_of_all_steps, "it takes beta_t = 1 - alpha_bar_t, the noise of all the steps up to t: that of "
                                  "the step t alone is 1 - alpha_bar_t / alpha_bar_{t-1}"),
        Wrong(_quotient_inverted, "the quotient in beta_t is upside down: alpha_bar falls, so alpha_bar_t / "
                                  "alpha_bar_{t-1} is less than 1"),
    ))
