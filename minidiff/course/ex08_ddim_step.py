"""Exercise 8: a step of DDIM, judged on data that are one point and on Gaussian data, where the answer is known.

If all data are the point c, then eps_hat = (x_t - alpha_t c) / sigma_t is exact, and x_t ~ N(alpha_t c, sigma_t^2): a
step must end at N(alpha_s c, sigma_s^2), whatever eta is.
"""

import math

import numpy as np

from minidiff.course.compare import differs, negative_root, numbers, random_alpha_bar, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import samplers
from minidiff.diffusion.gaussian import x0_from_eps
from minidiff.diffusion.schedules import Schedule


class _Given:
    """A denoiser whose answer is given, so that minidiff's sampler takes the one step that is asked for."""

    predicts = "eps"

    def __init__(self, alpha_bar, eps_hat):
        self.schedule, self.eps_hat = Schedule(alpha_bar), eps_hat

    def __call__(self, x_t, t, cond=None):
        return x0_from_eps(self.schedule, x_t, t, self.eps_hat)


class _Noise:
    """A stream that gives z."""

    def __init__(self, z):
        self.z = z

    def __len__(self):
        return len(self.z)

    def normal(self, shape, dtype):
        return self.z


def solution(alpha_bar, x_t, t, s, eps_hat, eta, z):
    times = [t] if s < 0 else [t, s]
    return next(samplers.ddim(_Given(alpha_bar, eps_hat), x_t, times, eta=eta, streams=_Noise(z))).x_t


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int, etas=(0.0, 0.4, 1.0)):
    rng = stream(8, law)
    for number in range(12):
        alpha_bar = random_alpha_bar(rng)
        t = int(rng.integers(1, len(alpha_bar)))
        s = int(rng.integers(0, t))
        yield alpha_bar, t, s, etas[number % len(etas)], float(rng.standard_normal()), rng, \
            f"from t = {t} to s = {s} with alpha_bar = {numbers(alpha_bar)}"


def _step(ddim_step, alpha_bar, t, s, eta, c, x_t, z):
    """The step where all data are c."""
    return ddim_step(alpha_bar, np.full(1, x_t), t, s, np.full(1, _eps_hat(alpha_bar, t, c, x_t)), eta, np.full(1, z))


def _eps_hat(alpha_bar, t, c, x_t):
    """The exact one where all data are c."""
    return (x_t - math.sqrt(alpha_bar[t]) * c) / math.sqrt(1 - alpha_bar[t])


def _given(alpha_bar, t, s, x_t, eps_hat, z):
    """What x_s is computed from."""
    return {"x_t": x_t, "eps_hat": eps_hat, "z": z, "alpha_bar_t": alpha_bar[t],
            "alpha_bar_s": alpha_bar[s] if s >= 0 else 1.0}


def one_step_to_a_point(ddim_step):
    """if all training data were one number c, the step with eta = 0 would keep the image c and the noise e:
    sqrt(alpha_bar_t) c + sqrt(1 - alpha_bar_t) e goes to sqrt(alpha_bar_s) c + sqrt(1 - alpha_bar_s) e"""
    for alpha_bar, t, s, eta, c, rng, where in _cases(1, etas=(0.0,)):
        e = float(rng.standard_normal())
        x_t = math.sqrt(alpha_bar[t]) * c + math.sqrt(1 - alpha_bar[t]) * e
        got = _step(ddim_step, alpha_bar, t, s, eta, c, x_t, 9.0)
        expected = np.full(1, math.sqrt(alpha_bar[s]) * c + math.sqrt(1 - alpha_bar[s]) * e)
        if (said := differs("x_s", got, expected, f"for c = {c:.4g}, e = {e:.4g} {where}",
                            given=_given(alpha_bar, t, s, x_t, e, 9.0))):
            return said


def keeps_the_marginals(ddim_step):
    """if all training data were one number c, x_s would have the variance 1 - alpha_bar_s for every eta: what the step
    keeps of x_t's variance, plus the variance of the fresh noise"""
    for alpha_bar, t, s, eta, c, _, where in _cases(2):
        base = _step(ddim_step, alpha_bar, t, s, eta, c, 0.0, 0.0)
        slope = _step(ddim_step, alpha_bar, t, s, eta, c, 1.0, 0.0) - base
        fresh = _step(ddim_step, alpha_bar, t, s, eta, c, 0.0, 1.0) - base
        got = slope**2 * (1 - alpha_bar[t]) + fresh**2
        if (said := differs("the variance", got, np.full(1, 1 - alpha_bar[s]),
                            f"for eta = {eta} {where}: it is a^2 (1 - alpha_bar_t) + b^2, where the step gives a more "
                            f"for x_t = 1 than for x_t = 0, and b more for z = 1 than for z = 0; for c = {c:.4g}")):
            return said


def ancestral(ddim_step):
    """if all training data were one number c, x_s and x_t would have, with eta = 1, the covariance of the forward
    process, sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s); and z has eta times the coefficient that it has with eta
    = 1"""
    for alpha_bar, t, s, eta, c, _, where in _cases(3):
        def change(h, x_t, z, alpha_bar=alpha_bar, t=t, s=s, c=c):
            return _step(ddim_step, alpha_bar, t, s, h, c, x_t, z) - _step(ddim_step, alpha_bar, t, s, h, c, 0.0, 0.0)
        slope, fresh, all_fresh = change(1.0, 1.0, 0.0), change(eta, 0.0, 1.0), change(1.0, 0.0, 1.0)
        expected = math.sqrt(alpha_bar[t] / alpha_bar[s]) * (1 - alpha_bar[s])
        if (said := differs("the covariance", slope * (1 - alpha_bar[t]), np.full(1, expected),
                            f"for eta = 1 {where}: it is 1 - alpha_bar_t times the difference of the steps from "
                            f"x_t = 1 and from x_t = 0, with z = 0, for c = {c:.4g}")
                or differs("the coefficient of z", fresh, eta * all_fresh, f"for eta = {eta} {where}")):
            return said


def gaussian_data(ddim_step):
    """if the training data were N(0, S), the step with the exact eps_hat and eta = 0 would multiply x_t by (a b S + c
    d) / V, where a, b = sqrt(alpha_bar) and c, d = sqrt(1 - alpha_bar) at the times s and t, and V = b^2 S + d^2"""
    for alpha_bar, t, s, _, c, rng, where in _cases(4):
        S, x_t = c * c, rng.standard_normal((2, 3))
        (a, b), (p, q) = ((math.sqrt(alpha_bar[i]), math.sqrt(1 - alpha_bar[i])) for i in (t, s))
        V = a * a * S + b * b
        got = ddim_step(alpha_bar, x_t, t, s, b / V * x_t, 0.0, np.ones_like(x_t))
        if (said := differs("x_s", got, (p * a * S + q * b) / V * x_t, f"for S = {S:.4g} {where}",
                            given=_given(alpha_bar, t, s, x_t, b / V * x_t, 1.0))):
            return said


def ends_clean(ddim_step):
    """if all training data were one number c, the step to s = -1 would end at c, whatever eta and z are"""
    for alpha_bar, t, _, eta, c, rng, _ in _cases(5):
        x_t, z = rng.standard_normal(2)
        if (said := differs("x_{-1}", _step(ddim_step, alpha_bar, t, -1, eta, c, x_t, z), np.full(1, c),
                            f"for c = {c:.4g}, eta = {eta}, from t = {t} with alpha_bar = {numbers(alpha_bar)}",
                            given=_given(alpha_bar, t, -1, x_t, _eps_hat(alpha_bar, t, c, x_t), z))):
            return said


def keeps_the_dtype(ddim_step):
    """x_s has the shape and dtype of x_t"""
    for alpha_bar, t, s, eta, _, rng, where in _cases(6):
        arrays = rng.standard_normal((3, 2, 2, 1)).astype(np.float32)
        got, expected = (ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z)
                         for x_t, eps_hat, z in (arrays, arrays.astype(np.float64)))
        if (said := differs("x_s", got, expected, where, dtype=np.float32, like="x_t", tolerance=1e-3)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, *, before=None, sigma=None, direction=None, sign=1):
    """The right answer, or one with a part in another way; direction: a function of (1 - alpha_bar_s, sigma)."""
    a, b = float(alpha_bar[t]), (float(alpha_bar[s]) if s >= 0 else 1.0) if before is None else before
    x0_hat = (x_t - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(max(1 - a / b, 0)) if sigma is None else sigma(a, b)
    along = math.sqrt(max(1 - b - sigma**2, 0)) if direction is None else direction(1 - b, sigma)
    return math.sqrt(b) * x0_hat + sign * along * eps_hat + sigma * z


def _direction_reversed(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, sign=-1)


def _direction_of_sigma(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, direction=lambda power, sigma: sigma)


def _direction_without_sigma(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, direction=lambda power, sigma: math.sqrt(power))


def _direction_without_a_root(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, direction=lambda power, sigma: power - sigma**2)


def _sigma_not_squared(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z,
                      direction=lambda power, sigma: math.sqrt(max(power - sigma, 0)))


def _always_the_time_before(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, t - 1, eps_hat, eta, z)


def _last_entry(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, before=float(alpha_bar[s]))


def _clean_at_zero(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z, before=float(alpha_bar[s]) if s else 1.0)


def _clean_at_zero_literal(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _last_entry_literal(alpha_bar, x_t, t, s, eps_hat, eta, z) if s else \
        _clean_at_zero(alpha_bar, x_t, t, s, eps_hat, eta, z)


def _eta_not_used(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, 0.0, z)


def _noise_of_one_step(alpha_bar, x_t, t, s, eps_hat, eta, z):
    beta = 1 - float(alpha_bar[t] / (alpha_bar[t - 1] if t else 1.0))
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z,
                      sigma=lambda a, b: eta * math.sqrt((1 - b) / (1 - a) * beta))


def _noise_of_the_forward_step(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z,
                      sigma=lambda a, b: eta * math.sqrt(1 - a / b) if s >= 0 else 0.0)


def _last_entry_literal(alpha_bar, x_t, t, s, eps_hat, eta, z):
    a, b = alpha_bar[t], alpha_bar[s]
    sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    return np.sqrt(b) * (x_t - np.sqrt(1 - a) * eps_hat) / np.sqrt(a) + np.sqrt(1 - b - sigma**2) * eps_hat + sigma * z


def _of_x0_hat(alpha_bar, x_t, t, s, eps_hat, eta, z, x0_hat):
    """The answer with another x0_hat(a, sigma_t), and the right rest."""
    a, b = float(alpha_bar[t]), float(alpha_bar[s]) if s >= 0 else 1.0
    right = (x_t - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z) + math.sqrt(b) * (x0_hat(a, math.sqrt(1 - a)) - right)


def _brackets_of_x0_hat(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _of_x0_hat(alpha_bar, x_t, t, s, eps_hat, eta, z, lambda a, c: x_t - c * eps_hat / math.sqrt(a))


def _no_root_below_x0_hat(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _of_x0_hat(alpha_bar, x_t, t, s, eps_hat, eta, z, lambda a, c: (x_t - c * eps_hat) / a)


def _times_swapped(alpha_bar, x_t, t, s, eps_hat, eta, z):
    a, b = float(alpha_bar[s]) if s >= 0 else 1.0, float(alpha_bar[t])
    sigma = eta * np.sqrt(np.divide(1 - b, 1 - a)) * np.sqrt(np.float64(1 - a / b))
    x0_hat = (x_t - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
    return math.sqrt(b) * x0_hat + np.sqrt(1 - b - sigma**2) * eps_hat + sigma * z


def _z_for_eps(alpha_bar, x_t, t, s, eps_hat, eta, z):
    return _ddim_step(alpha_bar, x_t, t, s, z, eta, eps_hat)


def _variance_for_deviation(alpha_bar, x_t, t, s, eps_hat, eta, z):
    a, b = float(alpha_bar[t]), float(alpha_bar[s]) if s >= 0 else 1.0
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    return _ddim_step(alpha_bar, x_t, t, s, eps_hat, eta, z) + (sigma**2 - sigma) * z


def probe(ddim_step):
    rng = stream(8)
    alpha_bar = random_alpha_bar(rng, 8)
    return [ddim_step(alpha_bar, rng.standard_normal((2, 2)), t, s, rng.standard_normal((2, 2)), eta,
                      rng.standard_normal((2, 2)))
            for t, s, eta in ((7, 3, 0.0), (6, 2, 0.5), (3, 1, 1.0), (4, -1, 0.0), (5, -1, 1.0), (4, 0, 0.5))]


EXERCISE = Exercise(
    title="A step of DDIM", answer="ddim_step", minutes=20, chapter="05_samplers",
    hint="Read alpha_bar_s into a variable first: 1 if s is -1. Rounding can make 1 - alpha_bar_s - sigma^2 a little "
         "less than 0 when it should be 0: take the larger of it and 0 before the root.",
    solution=solution, place="minidiff/diffusion/samplers.py ddim",
    if_nan=negative_root,
    laws=(one_step_to_a_point, keeps_the_marginals, ancestral, gaussian_data, ends_clean, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_direction_reversed, "the noise is put back with the wrong sign: x_s has + sqrt(1 - alpha_bar_s - "
                                   "sigma^2) eps_hat"),
        Wrong(_direction_of_sigma, "eps_hat is multiplied by sigma in place of sqrt(1 - alpha_bar_s - sigma^2)"),
        Wrong(_direction_without_sigma, "eps_hat is multiplied by sqrt(1 - alpha_bar_s): the power sigma^2 of the "
                                        "fresh noise must be taken from it, or x_s has too much noise"),
        Wrong(_direction_without_a_root, "the square root around 1 - alpha_bar_s - sigma^2 is missing"),
        Wrong(_sigma_not_squared, "under the root, sigma is subtracted in place of sigma^2"),
        Wrong(_always_the_time_before, "it goes to t - 1 and not to s: the next time is the next one of the list"),
        Wrong(_last_entry_literal, "nan at s = -1, the square root of a negative number: alpha_bar[-1] is Python's "
                                   "last entry there, and alpha_bar_{-1} means 1"),
        Wrong(_last_entry, "at s = -1 it reads alpha_bar[-1], the last entry in Python: alpha_bar_{-1} is 1, the "
                           "clean image"),
        Wrong(_clean_at_zero, "your case for the clean image is taken at s = 0, and not at s = -1"),
        Wrong(_clean_at_zero_literal, "your case for the clean image is taken at s = 0, and not at s = -1, where "
                                      "alpha_bar[-1] is Python's last entry"),
        Wrong(_brackets_of_x0_hat, "brackets: in x0_hat only eps_hat is divided by sqrt(alpha_bar_t), and x_t should "
                                   "be, too"),
        Wrong(_no_root_below_x0_hat, "x0_hat is divided by alpha_bar_t in place of its square root"),
        Wrong(_times_swapped, "t and s have changed places: x0_hat is computed from x_t with alpha_bar_t"),
        Wrong(_z_for_eps, "z and eps_hat have changed places"),
        Wrong(_variance_for_deviation, "z is multiplied by sigma^2 in place of sigma"),
        Wrong(_eta_not_used, "eta is not used: no fresh noise is added"),
        Wrong(_noise_of_one_step, "sigma has beta_t of the full chain: over the leap from t to s it is 1 - "
                                  "alpha_bar_t / alpha_bar_s"),
        Wrong(_noise_of_the_forward_step, "sigma lacks the factor sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))"),
    ))
