"""Exercise 10: a step of DPM-Solver++(2M), judged by the exact path of the ODE for a known x0_hat.

    x_s / sigma_s = x_t / sigma_t + int_{lambda_t}^{lambda_s} e^lambda x0_hat(lambda) dlambda

The integral is done by quadrature, or by hand where x0_hat is a line.
"""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import samplers
from minidiff.diffusion.schedules import Schedule


class _Given:
    """A denoiser that gives the two estimates, one after the other."""

    predicts = "x0"

    def __init__(self, alpha_bar, estimates):
        self.schedule, self.estimates = Schedule(alpha_bar), iter(estimates)

    def __call__(self, x_t, t, cond=None):
        return next(self.estimates)


def solution(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    schedule = Schedule(alpha_bar)
    (alpha_u, sigma_u), (alpha_t, sigma_t) = samplers.alpha_sigma(schedule, u), samplers.alpha_sigma(schedule, t)
    # the x_u from which the sampler's first step comes to x_t = sigma_t/sigma_u x_u - alpha_t (e^-h - 1) x0_before
    e_h = sigma_t * alpha_u / (alpha_t * sigma_u)
    x_u = (x_t + alpha_t * (e_h - 1) * x0_before) * (sigma_u / sigma_t)
    states = samplers.dpm_solver_pp_2m(_Given(alpha_bar, [x0_before, x0_hat]), x_u, [u, t] if s < 0 else [u, t, s])
    next(states)
    return next(states).x_t


# ---- laws --------------------------------------------------------------------------------------------------

def _table(lambdas):
    """alpha_bar whose log(alpha / sigma) are these."""
    return 1 / (1 + np.exp(-2 * np.asarray(lambdas)))


def _alpha_sigma(lam):
    return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))


def _cases(law: int):
    rng = stream(10, law)
    for _ in range(8):
        lambdas = np.sort(rng.uniform(-3, 3, int(rng.integers(4, 9))))[::-1]
        s, t, u = (int(i) for i in np.sort(rng.choice(len(lambdas), 3, replace=False)))
        yield lambdas, u, t, s, rng, f"for u, t, s = {u}, {t}, {s} at lambda = {numbers(lambdas[[u, t, s]])}"


def _given(lambdas, u, t, s, x_t, x0_before, x0_hat):
    """What x_s is computed from."""
    alpha_bar = _table(lambdas)
    return {"x_t": x_t, "x0_before": x0_before, "x0_hat": x0_hat, "alpha_bar_u": alpha_bar[u],
            "alpha_bar_t": alpha_bar[t], "alpha_bar_s": alpha_bar[s] if s >= 0 else 1.0}


def constant_estimate(dpm_solver_step):
    """where both estimates are D, the step is exact: it keeps the image D and the noise (x_t - alpha_t D) / sigma_t"""
    for lambdas, u, t, s, rng, where in _cases(1):
        D, e = rng.standard_normal((2, 2, 3))
        (a, b), (p, q) = _alpha_sigma(lambdas[t]), _alpha_sigma(lambdas[s])
        got = dpm_solver_step(_table(lambdas), a * D + b * e, u, t, s, D.copy(), D.copy())
        if (said := differs("x_s", got, p * D + q * e, where,
                            given=_given(lambdas, u, t, s, a * D + b * e, D, D))):
            return said


def middle_of_the_line(dpm_solver_step):
    """the step is that of a constant D, the value in the middle of the step of the line through both estimates, over
    lambda"""
    for lambdas, u, t, s, rng, where in _cases(2):
        before, now, x_t = rng.standard_normal((3, 4))
        (a, b), (p, q) = _alpha_sigma(lambdas[t]), _alpha_sigma(lambdas[s])
        line = np.polyfit([lambdas[u], lambdas[t]], [before, now], 1)                 # (2, 4)
        D = line[0] * (lambdas[t] + lambdas[s]) / 2 + line[1]
        got = dpm_solver_step(_table(lambdas), x_t, u, t, s, before, now)
        if (said := differs("x_s", got, p * D + q * (x_t - a * D) / b, where, tolerance=1e-7,
                            given=_given(lambdas, u, t, s, x_t, before, now))):
            return said


def second_order(dpm_solver_step):
    """half the strides make the error of a step about 8 times smaller, for x0_hat = sin(lambda), by quadrature"""
    for start in (-1.0, 0.4):
        errors = []
        for h in (0.04, 0.02):
            lambdas = [start + h, start, start - 1.5 * h]
            path = np.linspace(start, start + h, 2001)
            area = np.trapezoid(np.exp(path) * np.sin(path), path)
            (_, b), (_, q) = _alpha_sigma(start), _alpha_sigma(start + h)
            got = dpm_solver_step(_table(lambdas), np.full(1, 0.7), 2, 1, 0, np.sin(lambdas[2:]), np.sin(lambdas[1:2]))
            errors.append(abs(np.asarray(got).item() - q * (0.7 / b + area)))
        ratio = errors[0] / max(errors[1], 1e-300)
        if not 6 < ratio < 10.5:
            return f"the strides 0.04 and 0.02 from lambda = {start} have the errors {errors[0]:.3g} and " \
                   f"{errors[1]:.3g}, in the ratio {ratio:.3g}: it should be about 8"


def last_step(dpm_solver_step):
    """the step to s = -1 ends at x0_hat"""
    for lambdas, u, t, _, rng, _ in _cases(4):
        before, now, x_t = rng.standard_normal((3, 2, 2))
        got = dpm_solver_step(_table(lambdas), x_t, u, t, -1, before, now)
        if (said := differs("x_{-1}", got, now, f"for u, t, s = {u}, {t}, -1 at lambda = {numbers(lambdas[[u, t]])}, "
                                                "infinity",
                            given=_given(lambdas, u, t, -1, x_t, before, now))):
            return said


def keeps_the_dtype(dpm_solver_step):
    """x_s has the shape and dtype of x_t"""
    for lambdas, u, t, s, rng, where in _cases(5):
        x_t, before, now = rng.standard_normal((3, 2, 2, 1)).astype(np.float32)
        wide = dpm_solver_step(_table(lambdas), x_t.astype(float), u, t, s, before.astype(float), now.astype(float))
        got = dpm_solver_step(_table(lambdas), x_t, u, t, s, before, now)
        if (said := differs("x_s", got, wide, where, dtype=np.float32, like="x_t", tolerance=1e-3)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, *, D=None, e_h=None, end=1.0, last=None):
    """The right answer, or one with a part in another way; D: the share of (x0_hat - x0_before) of (r, alpha_bar)."""
    def lam(abar):
        return 0.5 * (math.log(abar) - math.log1p(-abar))
    a_s = float(alpha_bar[s]) if s >= 0 else end
    if s < 0 and a_s == 1.0:
        return (x0_hat if last is None else last) + 0 * x_t
    h_before, h = lam(alpha_bar[t]) - lam(alpha_bar[u]), lam(a_s) - lam(alpha_bar[t])
    share = 1 / (2 * (h_before / h)) if D is None else D(h_before / h)
    decay = math.exp(-h) if e_h is None else e_h(h)
    middle = x0_hat + share * (x0_hat - x0_before)
    return math.sqrt((1 - a_s) / (1 - alpha_bar[t])) * x_t - math.sqrt(a_s) * (decay - 1) * middle


def _first_order(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: 0.0)


def _r_upside_down(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: r / 2)


def _to_the_end(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: 1 / r)


def _towards_the_past(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: -1 / (2 * r))


def _mean_of_both(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: -0.5)


def _equal_strides(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: 0.5)


def _strides_of_t(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, D=lambda r: (t - s) / (2 * (u - t)))


def _whole_log_snr(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, e_h=lambda h: math.exp(-2 * h))


def _sign_of_h(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, e_h=lambda h: math.exp(h))


def _last_entry(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, end=float(alpha_bar[-1]))


def _not_finite_at_the_end(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, last=np.nan)


def _estimates_exchanged(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_hat, x0_before)


def _estimates_exchanged_before_the_end(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_hat, x0_before, last=x0_hat)


def _alpha_of_t(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    right = _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat)
    from_x_t = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t])) * x_t
    return right if s < 0 else from_x_t + math.sqrt(alpha_bar[t] / alpha_bar[s]) * (right - from_x_t)


def _line_at_the_end(alpha_bar, x_t, u, t, s, x0_before, x0_hat):
    return _dpm_solver_step(alpha_bar, x_t, u, t, s, x0_before, x0_hat, last=1.5 * x0_hat - 0.5 * x0_before)


def probe(dpm_solver_step):
    rng = stream(10)
    alpha_bar = _table(np.sort(rng.uniform(-2, 2, 9))[::-1])
    return [dpm_solver_step(alpha_bar, rng.standard_normal(3), u, t, s, rng.standard_normal(3), rng.standard_normal(3))
            for u, t, s in ((7, 5, 1), (6, 2, 1), (5, 3, -1))]


EXERCISE = Exercise(
    title="A step of DPM-Solver++(2M)", answer="dpm_solver_step", minutes=30, chapter="05_samplers",
    hint="Treat s = -1 first: return x0_hat. Then lambda = log(alpha / sigma) = log(alpha_bar / (1 - alpha_bar)) / 2 "
         "of the three times, as Python floats.",
    solution=solution, place="minidiff/diffusion/samplers.py dpm_solver_pp_2m",
    laws=(constant_estimate, middle_of_the_line, second_order, last_step, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_first_order, "x0_before is not used, so that the step is DDIM's, of first order"),
        Wrong(_r_upside_down, "r is upside down: it should be the stride before, divided by this one"),
        Wrong(_to_the_end, "it extrapolates to the end of the step: the 2 in 1/(2r) makes it the middle"),
        Wrong(_towards_the_past, "it moves from x0_hat toward x0_before: the line goes on in the other direction"),
        Wrong(_mean_of_both, "it takes the mean of both estimates, which lies before the step: D lies ahead"),
        Wrong(_equal_strides, "it takes r = 1, as if all strides of lambda were equal"),
        Wrong(_strides_of_t, "r has the strides of t: the clock of this solver is lambda"),
        Wrong(_whole_log_snr, "e^{-h} has h from log(alpha^2 / sigma^2): lambda is half of that"),
        Wrong(_sign_of_h, "it has e^h in place of e^{-h}"),
        Wrong(_estimates_exchanged, "x0_before and x0_hat have changed places: x0_hat is the newer estimate, of the "
                                    "time t"),
        Wrong(_estimates_exchanged_before_the_end, "x0_before and x0_hat have changed places in D: x0_hat, the newer "
                                                   "one, has the factor 1 + 1/(2r)"),
        Wrong(_alpha_of_t, "it multiplies D by alpha_t in place of alpha_s"),
        Wrong(_line_at_the_end, "the step to s = -1 goes on along the line, too: its D is x0_hat itself"),
        Wrong(_last_entry, "at s = -1 it reads alpha_bar[-1], the last entry in Python: the step to s = -1 ends at "
                           "x0_hat"),
        Wrong(_not_finite_at_the_end, "the last step is not finite, since lambda is infinite there: return x0_hat"),
    ))
