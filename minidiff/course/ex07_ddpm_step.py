"""Exercise 7: a step of DDPM, judged on data that are one point, where each step must end in the right Gaussian.

If all data are the point c, then eps_hat = (x_t - alpha_t c) / sigma_t is exact, and x_t ~ N(alpha_t c, sigma_t^2).
"""

import math

import numpy as np

from minidiff.course.compare import differs, negative_root, numbers, random_alpha_bar, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import gaussian
from minidiff.diffusion.samplers import beta_tilde
from minidiff.diffusion.schedules import Schedule


def solution(alpha_bar, x_t, t, eps_hat, z):
    schedule = Schedule(alpha_bar)
    x0_hat = gaussian.x0_from_eps(schedule, x_t, t, eps_hat)
    mean, _ = gaussian.q_posterior_mean_variance(schedule, x0_hat, x_t, t)
    return mean + math.sqrt(beta_tilde(schedule, t, t - 1)) * z


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int, first: int):
    rng = stream(7, law)
    for _ in range(8):
        alpha_bar = random_alpha_bar(rng)
        for t in sorted({first, int(rng.integers(first, len(alpha_bar))), len(alpha_bar) - 1}):
            yield alpha_bar, t, float(rng.standard_normal()), rng, f"at t = {t} with alpha_bar = {numbers(alpha_bar)}"


def _step(ddpm_step, alpha_bar, t, c, x_t, z):
    """The step where all data are c."""
    eps_hat = (x_t - math.sqrt(alpha_bar[t]) * c) / math.sqrt(1 - alpha_bar[t])
    return ddpm_step(alpha_bar, np.full(1, x_t), t, np.full(1, eps_hat), np.full(1, z))


def _given(alpha_bar, t, c, x_t, z):
    """What x_{t-1} is computed from where all data are c."""
    eps_hat = (x_t - math.sqrt(alpha_bar[t]) * c) / math.sqrt(1 - alpha_bar[t])
    return {"x_t": x_t, "eps_hat": eps_hat, "z": z, "alpha_bar_t": alpha_bar[t],
            "alpha_bar_{t-1}": alpha_bar[t - 1] if t else 1.0}


def mean_of_a_point(ddpm_step):
    """if all training data were one number c, the exact eps_hat would lead from the mean sqrt(alpha_bar_t) c of x_t,
    with z = 0, to the mean sqrt(alpha_bar_{t-1}) c of x_{t-1}"""
    for alpha_bar, t, c, _, where in _cases(1, 1):
        x_t = math.sqrt(alpha_bar[t]) * c
        got = _step(ddpm_step, alpha_bar, t, c, x_t, 0.0)
        expected = np.full(1, math.sqrt(alpha_bar[t - 1]) * c)
        if (said := differs("x_{t-1}", got, expected, f"for c = {c:.4g} {where}",
                            given=_given(alpha_bar, t, c, x_t, 0.0))):
            return said


def slope_of_a_point(ddpm_step):
    """if all training data were one number c, x_{t-1} and x_t would have the covariance of the forward process,
    sqrt(alpha_bar_t / alpha_bar_{t-1}) (1 - alpha_bar_{t-1})"""
    for alpha_bar, t, c, _, where in _cases(2, 1):
        slope = _step(ddpm_step, alpha_bar, t, c, 1.0, 0.0) - _step(ddpm_step, alpha_bar, t, c, 0.0, 0.0)
        expected = np.full(1, math.sqrt(alpha_bar[t] / alpha_bar[t - 1]) * (1 - alpha_bar[t - 1]))
        if (said := differs("the covariance", slope * (1 - alpha_bar[t]), expected,
                            f"{where}: it is 1 - alpha_bar_t times the difference of the steps from x_t = 1 and from "
                            f"x_t = 0, with z = 0, for c = {c:.4g}")):
            return said


def variance_of_a_point(ddpm_step):
    """if all training data were one number c, x_{t-1} would have the variance 1 - alpha_bar_{t-1}: what the step keeps
    of x_t's variance, plus the variance of the fresh noise"""
    for alpha_bar, t, c, _, where in _cases(3, 1):
        slope = _step(ddpm_step, alpha_bar, t, c, 1.0, 0.0) - _step(ddpm_step, alpha_bar, t, c, 0.0, 0.0)
        fresh = _step(ddpm_step, alpha_bar, t, c, 0.0, 1.0) - _step(ddpm_step, alpha_bar, t, c, 0.0, 0.0)
        got = slope**2 * (1 - alpha_bar[t]) + fresh**2
        if (said := differs("the variance", got, np.full(1, 1 - alpha_bar[t - 1]),
                            f"{where}: it is A^2 (1 - alpha_bar_t) + B^2, where A is the difference of the steps from "
                            f"x_t = 1 and from x_t = 0, and B that of z = 1 and z = 0; for c = {c:.4g}")):
            return said


def last_step(ddpm_step):
    """if all training data were one number c, the step from t = 0 would end at c, whatever z is"""
    for alpha_bar, t, c, rng, where in _cases(4, 0):
        if t == 0:
            x_t, z = rng.standard_normal(2)
            if (said := differs("x_{-1}", _step(ddpm_step, alpha_bar, 0, c, x_t, z), np.full(1, c),
                                f"for c = {c:.4g} {where}", given=_given(alpha_bar, 0, c, x_t, z))):
                return said


def keeps_the_dtype(ddpm_step):
    """x_{t-1} has the shape and dtype of x_t, and each of its numbers depends on x_t, eps_hat and z at its own place
    alone"""
    for alpha_bar, t, c, rng, where in _cases(5, 0):
        x_t, z = rng.standard_normal((2, 2, 3, 1))
        eps_hat = (x_t - math.sqrt(alpha_bar[t]) * c) / math.sqrt(1 - alpha_bar[t])
        one = [_step(ddpm_step, alpha_bar, t, c, *pair) for pair in zip(x_t.ravel(), z.ravel(), strict=True)]
        got = ddpm_step(alpha_bar, *(a if isinstance(a, int) else a.astype(np.float32) for a in (x_t, t, eps_hat, z)))
        if (said := differs("x_{t-1}", got, np.reshape(one, x_t.shape), where, dtype=np.float32, like="x_t",
                            tolerance=1e-3)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _parts(alpha_bar, t):
    """alpha_bar_t, alpha_bar_{t-1}, beta_t, beta~_t."""
    now, before = float(alpha_bar[t]), float(alpha_bar[t - 1]) if t > 0 else 1.0
    beta = 1 - now / before
    return now, before, beta, (1 - before) / (1 - now) * beta


def _ddpm_step(alpha_bar, x_t, t, eps_hat, z, *, share=None, keep=None, noise=None):
    """The right answer, or one with another coefficient of eps_hat, of the whole mean, or of z."""
    now, before, beta, beta_tilde = _parts(alpha_bar, t)
    share = beta / math.sqrt(1 - now) if share is None else share
    keep = math.sqrt(1 - beta) if keep is None else keep
    noise = (math.sqrt(beta_tilde) if t > 0 else 0.0) if noise is None else noise
    return (x_t - share * eps_hat) / keep + noise * z


def _noise_at_the_end(alpha_bar, x_t, t, eps_hat, z):
    _, _, beta, beta_tilde = _parts(alpha_bar, t)
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=math.sqrt(beta_tilde if t > 0 else beta))


def _no_noise_before_the_end(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=None if t > 1 else 0.0)


def _counts_down(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=0.0 if t == len(alpha_bar) - 1 else None)


def _no_noise(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=0.0)


def _variance_for_deviation(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=_parts(alpha_bar, t)[3])


def _larger_variance(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=math.sqrt(_parts(alpha_bar, t)[2]) if t > 0 else 0.0)


def _no_root_below_eps(alpha_bar, x_t, t, eps_hat, z):
    now, _, beta, _ = _parts(alpha_bar, t)
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, share=beta / (1 - now))


def _all_of_eps(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, share=math.sqrt(1 - _parts(alpha_bar, t)[0]))


def _eps_added(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, -eps_hat, z)


def _not_stretched(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, keep=1.0)


def _stretched_by_alpha_bar(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, keep=math.sqrt(_parts(alpha_bar, t)[0]))


def _last_entry(alpha_bar, x_t, t, eps_hat, z):
    before = np.concatenate([[alpha_bar[-1]], alpha_bar])
    beta = 1 - alpha_bar[t] / before[t]
    noise = 0.0 if t == 0 else None
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, share=beta / math.sqrt(1 - alpha_bar[t]), keep=math.sqrt(1 - beta),
                      noise=noise)


def _last_entry_literal(alpha_bar, x_t, t, eps_hat, z):
    now, before = alpha_bar[t], alpha_bar[t - 1]
    beta = 1 - now / before
    return (x_t - beta / np.sqrt(1 - now) * eps_hat) / np.sqrt(1 - beta) + np.sqrt((1 - before) / (1 - now) * beta) * z


def _noise_divided_too(alpha_bar, x_t, t, eps_hat, z):
    _, _, beta, beta_tilde = _parts(alpha_bar, t)
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, noise=math.sqrt(beta_tilde / (1 - beta)))


def _only_eps_divided(alpha_bar, x_t, t, eps_hat, z):
    now, _, beta, _ = _parts(alpha_bar, t)
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, keep=1.0, share=beta / math.sqrt((1 - now) * (1 - beta)))


def _shrunk(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, eps_hat, z, keep=1 / math.sqrt(1 - _parts(alpha_bar, t)[2]))


def _z_for_eps(alpha_bar, x_t, t, eps_hat, z):
    return _ddpm_step(alpha_bar, x_t, t, z, eps_hat)


def probe(ddpm_step):
    rng = stream(7)
    alpha_bar = random_alpha_bar(rng, 6)
    return [ddpm_step(alpha_bar, rng.standard_normal(3), t, rng.standard_normal(3), rng.standard_normal(3))
            for t in (0, 1, 3, 5)]


EXERCISE = Exercise(
    title="A step of DDPM's sampler", answer="ddpm_step", minutes=20, chapter="05_samplers",
    hint="Write alpha_bar_t, alpha_bar_{t-1} (1 at t = 0), beta_t and beta~_t as Python floats first. At t = 0, "
         "beta~ is 0 by itself, if alpha_bar_{-1} is 1.",
    solution=solution, place="minidiff/diffusion/samplers.py ddpm",
    if_nan=negative_root, note="minidiff/systems/ddpm.py DDPM.reverse has it with eps_theta, as the paper does",
    laws=(mean_of_a_point, slope_of_a_point, variance_of_a_point, last_step, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_noise_at_the_end, "it adds noise in the last step, from t = 0, which stays in the picture"),
        Wrong(_no_noise_before_the_end, "it adds no noise in the step from t = 1 either: only the step from t = 0 "
                                        "has none"),
        Wrong(_counts_down, "it adds no noise in the first step, from t = T-1: t counts down, and the last step is "
                            "the one from t = 0"),
        Wrong(_no_noise, "it adds no noise in any step"),
        Wrong(_variance_for_deviation, "it multiplies z by the variance beta~_t in place of its square root"),
        Wrong(_larger_variance, "it adds noise of variance beta_t: that is DDPM's other choice, right for data that "
                                "are N(0, I), and the exercise asks for beta~_t, right for data that are one point"),
        Wrong(_no_root_below_eps, "eps_hat is divided by 1 - alpha_bar_t in place of its square root"),
        Wrong(_all_of_eps, "it removes all of the noise in one step: of sqrt(1 - alpha_bar_t) eps_hat only the share "
                           "beta_t / (1 - alpha_bar_t) belongs to step t"),
        Wrong(_eps_added, "it adds eps_hat where it should be subtracted"),
        Wrong(_not_stretched, "the division by sqrt(1 - beta_t) is missing"),
        Wrong(_shrunk, "it multiplies by sqrt(1 - beta_t), and should divide by it"),
        Wrong(_z_for_eps, "z and eps_hat have changed places"),
        Wrong(_stretched_by_alpha_bar, "it divides by sqrt(alpha_bar_t) in place of sqrt(1 - beta_t), which the "
                                       "paper writes as sqrt(alpha_t)"),
        Wrong(_noise_divided_too, "brackets: the noise sqrt(beta~_t) z is divided by sqrt(1 - beta_t), too, and only "
                                  "the mean should be"),
        Wrong(_only_eps_divided, "brackets: only eps_hat is divided by sqrt(1 - beta_t), and x_t should be, too"),
        Wrong(_last_entry_literal, "nan at t = 0, the square root of a negative number: alpha_bar[t - 1] is "
                                   "alpha_bar[-1], Python's last entry, there, and alpha_bar_{-1} means 1"),
        Wrong(_last_entry, "at t = 0 it reads alpha_bar[-1], the last entry in Python: alpha_bar_{-1} is 1, the "
                           "clean image"),
    ))
