"""Exercise 9: a step of Heun's method, judged on Gaussian data, where the flow is known.

For data N(0, S) the exact denoiser is x0_hat = alpha S x / V with V = alpha^2 S + sigma^2, and the flow multiplies x by
sqrt(V_s / V_t).  Then v = k x with k = (1 - S) alpha sigma / V, which is half the derivative of log V.
"""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import samplers
from minidiff.diffusion.schedules import Schedule


class _Denoiser:
    """minidiff's form of a denoiser."""

    predicts = "x0"

    def __init__(self, x0_hat, alpha_bar):
        self.x0_hat, self.schedule = x0_hat, Schedule(alpha_bar)

    def __call__(self, x_t, t, cond=None):
        return self.x0_hat(x_t, int(t[0]))


def solution(x0_hat, alpha_bar, x_t, t, s):
    return next(samplers.heun(_Denoiser(x0_hat, alpha_bar), x_t, [t] if s < 0 else [t, s])).x_t


# ---- laws --------------------------------------------------------------------------------------------------

def _table(phis):
    return np.cos(np.asarray(phis)) ** 2


def _of_gaussian(S, phis, calls=None):
    """x0_hat(x, t) of data N(0, S); calls: a list that gets each (x, t)."""
    def x0_hat(x, t):
        if calls is not None:
            calls.append((np.array(x), t))
        a, b = math.cos(phis[t]), math.sin(phis[t])
        return a * S / (a * a * S + b * b) * x
    return x0_hat


def _cases(law: int):
    rng = stream(9, law)
    for _ in range(8):
        phis = np.sort(rng.uniform(0.1, 1.5, int(rng.integers(3, 8))))
        t = int(rng.integers(1, len(phis)))
        s = int(rng.integers(0, t))
        S = float(rng.uniform(0.05, 4))
        where = f"from phi = {phis[t]:.4g} to {phis[s]:.4g}, for data N(0, {S:.4g})"
        yield phis, t, s, S, rng.standard_normal((2, 3)), where


def linear_slope(heun_step):
    """where the slope is k(phi) x, the step multiplies by 1 + h (k_t + k_s (1 + h k_t)) / 2"""
    for phis, t, s, S, x, where in _cases(1):
        def k(phi, S=S):
            return (1 - S) * math.sin(2 * phi) / 2 / (1 + (S - 1) * math.cos(phi) ** 2)
        h = phis[s] - phis[t]
        factor = 1 + h * (k(phis[t]) + k(phis[s]) * (1 + h * k(phis[t]))) / 2
        if (said := differs("x_s", heun_step(_of_gaussian(S, phis), _table(phis), x, t, s), factor * x, where)):
            return said


def second_order(heun_step):
    """half the stride makes the error of a step about 8 times smaller: the distance to the exact sqrt(V_s / V_t) x_t"""
    for S in (0.1, 3.0):
        for phi in (0.5, 0.9, 1.2):
            errors = []
            for h in (0.02, 0.01):
                phis = [phi - h, phi]
                V = [math.cos(p) ** 2 * S + math.sin(p) ** 2 for p in phis]
                got = heun_step(_of_gaussian(S, phis), _table(phis), np.ones((1, 1)), 1, 0)
                errors.append(abs(np.asarray(got).item() - math.sqrt(V[0] / V[1])))
            ratio = errors[0] / max(errors[1], 1e-300)
            if not 6 < ratio < 10.5:
                return f"the strides 0.02 and 0.01 from phi = {phi}, for data N(0, {S}), have the errors " \
                       f"{errors[0]:.3g} and {errors[1]:.3g}, in the ratio {ratio:.3g}: it should be about 8"


def two_calls(heun_step):
    """the denoiser is called at (x_t, t) and at (x_t + h v, s), and nowhere else"""
    for phis, t, s, S, x, where in _cases(3):
        calls = []
        heun_step(_of_gaussian(S, phis, calls), _table(phis), x, t, s)
        if [time for _, time in calls] != [t, s]:
            return f"the denoiser was called at the times {[int(time) for _, time in calls]} and should be called at " \
                   f"{[t, s]}, {where}"
        V = math.cos(phis[t]) ** 2 * S + math.sin(phis[t]) ** 2
        euler = x * (1 + (phis[s] - phis[t]) * (1 - S) * math.sin(2 * phis[t]) / (2 * V))
        for what, (got, _), expected in zip(("the first", "the second"), calls, (x, euler), strict=True):
            if (said := differs(f"the x of {what} call", got, expected, where)):
                return said


def last_step(heun_step):
    """the step to s = -1 is one call, and ends at x0_hat"""
    for phis, t, _, S, x, _ in _cases(4):
        calls, where = [], f"from t = {t} to s = -1 with alpha_bar = {numbers(_table(phis))}"
        got = heun_step(_of_gaussian(S, phis, calls), _table(phis), x, t, -1)
        if (said := differs("x_{-1}", got, _of_gaussian(S, phis)(x, t), where)):
            return said
        if len(calls) != 1:
            return f"the last step called the denoiser {len(calls)} times and should do so once, {where}"


# ---- known wrong answers -----------------------------------------------------------------------------------

def _heun_step(x0_hat, alpha_bar, x_t, t, s, *, average=None, end=None, h=None, second=True):
    """The right answer, or one with a part in another way."""
    angle = [math.acos(math.sqrt(a)) for a in alpha_bar]

    def v(x, time):
        return (math.cos(angle[time]) * x - x0_hat(x, time)) / math.sin(angle[time])
    first = v(x_t, t)
    if s < 0 and end is None:
        return math.cos(angle[t]) * x_t - math.sin(angle[t]) * first
    h = (angle[s] - angle[t]) if h is None else h(angle)
    if not second:
        return x_t + h * first
    return x_t + h * average(first, v, x_t + h * first) if average else x_t + h * (first + v(x_t + h * first, s)) / 2


def _euler(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, second=False)


def _second_slope_at_x_t(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, average=lambda first, v, x: (first + v(x_t, s)) / 2)


def _second_slope_at_t(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, average=lambda first, v, x: (first + v(x, t)) / 2)


def _sum_of_slopes(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, average=lambda first, v, x: first + v(x, s))


def _second_slope_alone(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, average=lambda first, v, x: v(x, s))


def _backwards(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, h=lambda angle: angle[t] - angle[s])


def _from_euler_s_point(x0_hat, alpha_bar, x_t, t, s):
    right = _heun_step(x0_hat, alpha_bar, x_t, t, s)
    return right if s < 0 else _euler(x0_hat, alpha_bar, x_t, t, s) + (right - x_t)


def _last_entry(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, end=True)


def _euler_at_the_end(x0_hat, alpha_bar, x_t, t, s):
    return _heun_step(x0_hat, alpha_bar, x_t, t, s, end=True, second=s >= 0,
                      h=lambda angle: (angle[s] if s >= 0 else 0.0) - angle[t])


def probe(heun_step):
    phis, x = [0.3, 0.8, 1.2, 1.4], stream(9).standard_normal((2, 2))

    def x0_hat(x, t):
        return np.tanh(x * math.cos(phis[t]) / math.sin(phis[t]) ** 2)
    return [heun_step(x0_hat, _table(phis), x, t, s) for t, s in ((3, 1), (2, 0), (1, -1))]


EXERCISE = Exercise(
    title="Heun's method", answer="heun_step", minutes=30, chapter="05_samplers",
    hint="Write a small function v(x, t) inside, and phi(t) = arctan2(sigma, alpha). Treat s = -1 first, and return "
         "there.",
    solution=solution, place="minidiff/diffusion/samplers.py heun",
    laws=(linear_slope, second_order, two_calls, last_step), probe=probe,
    wrong=(
        Wrong(_euler, "it is Euler's method: the second slope is not used"),
        Wrong(_second_slope_at_x_t, "the second slope is taken at (x_t, s): it belongs to the point where Euler's "
                                    "step ends, (x', s)"),
        Wrong(_second_slope_at_t, "the second slope is taken at (x', t): at x' the time is s"),
        Wrong(_sum_of_slopes, "it adds the two slopes: the average needs half of their sum"),
        Wrong(_second_slope_alone, "it follows the slope at the end alone, which is of first order like Euler's "
                                   "method"),
        Wrong(_backwards, "the sign of h is wrong: phi falls from t to s, so h = phi_s - phi_t is negative"),
        Wrong(_from_euler_s_point, "it adds the averaged step to Euler's point x': both steps start at x_t"),
        Wrong(_last_entry, "at s = -1 it reads alpha_bar[-1], the last entry in Python: the step to s = -1 ends at "
                           "x0_hat"),
        Wrong(_euler_at_the_end, "the last step is Euler's in phi, which misses the clean image: it ends at x0_hat"),
    ))
