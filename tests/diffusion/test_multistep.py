"""The multistep samplers against the exact flow of Gaussian data, whose length alone changes.

If x_0 ~ N(0, R^2), the flow from t to s multiplies x by the square root of
(alpha_s^2 R^2 + sigma_s^2) / (alpha_t^2 R^2 + sigma_t^2).
"""

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.diffusion_strategies import any_schedule

from minidiff.diffusion import multistep
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.samplers import SAMPLERS as EVERY_SAMPLER
from minidiff.diffusion.samplers import ddim, dpm_solver_pp_2m, heun, sample, times
from minidiff.diffusion.schedules import Schedule, cosine, linear, scaled_linear, vp_sde
from minidiff.engine.random import SampleStreams

R = 0.7
# at least; lms and plms are held back by their first steps, which have fewer slopes
SAMPLERS = {"edm_heun": (multistep.edm_heun, 2), "lms": (multistep.lms, 2), "plms": (multistep.plms, 2),
            "unipc": (multistep.unipc, 3)}


class Gaussian:
    """x_0 ~ N(0, R^2): E[x_0 | x_t] = alpha R^2 x_t / (alpha^2 R^2 + sigma^2)."""

    predicts = "x0"

    def __init__(self, schedule):
        self.schedule, self.calls = schedule, 0

    def __call__(self, x_t, t, cond=None):
        self.calls += 1
        alpha, sigma = self.schedule.alpha(int(t[0])), self.schedule.sigma(int(t[0]))
        return (alpha * R**2 / (alpha**2 * R**2 + sigma**2) * x_t).astype(x_t.dtype)


def length(schedule, t: int) -> float:
    return float(np.sqrt(schedule.abar(t) * R**2 + 1 - schedule.abar(t)))


def error(sampler, schedule, steps: int) -> float:
    """At T/5, after equal strides from T-1: sigma / alpha is not smooth in t near 0, where it grows as sqrt(t)."""
    path = np.round(np.linspace(schedule.T - 1, schedule.T // 5, steps)).astype(int)
    *_, state = islice(sampler(Gaussian(schedule), np.ones((1, 1)), path), steps - 1)
    return abs(float(state.x_t[0, 0]) - length(schedule, state.t) / length(schedule, int(path[0])))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_order_on_an_exact_flow(name):
    schedule, (sampler, order) = scaled_linear(20_000, 0.00085 / 20, 0.012 / 20), SAMPLERS[name]
    counts = (40, 80, 160)
    errors = [error(sampler, schedule, n) for n in counts]
    fitted = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert fitted > order - 0.35, (fitted, errors)
    better_than = dpm_solver_pp_2m if name == "unipc" else ddim
    assert errors[-1] < 0.3 * error(better_than, schedule, counts[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", [linear(beta_max=0.5), linear(beta_max=0.9), vp_sde(beta_max=400)],
                         ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_is_reached_where_rho_falls_from_1e60(name, schedule, steps, dtype):
    """alpha_T is so small that sigma_T / alpha_T exceeds float32: the results were NaN."""
    denoiser = DatasetDenoiser(schedule, np.array([[0.7]]))
    x_0 = sample(SAMPLERS[name][0](denoiser, np.ones((2, 1), dtype), times(schedule, steps)))
    np.testing.assert_allclose(x_0, 0.7, rtol=1e-6)


def test_heuns_longest_step_on_the_cosine_schedule():
    """From T-1, where rho is 2e4, to t = 0: Heun's formula, by hand.  Its result, 1e4, is far from the flow's, 0.7: the
    formula is not made for such a step.  Other programs take it, so this is a test of sameness."""
    schedule = cosine(1000)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((schedule.alpha(t), schedule.sigma(t)) for t in (999, 0))
    stride = sigma_s / alpha_s - sigma_t / alpha_t                                  # rho_s - rho_t

    def slope(x, alpha, sigma):
        """E[eps | x_t = x] of x_0 ~ N(0, R^2)."""
        return sigma * x / (alpha**2 * R**2 + sigma**2)
    first = slope(1, alpha_t, sigma_t)
    second = slope(alpha_s * (1 / alpha_t + stride * first), alpha_s, sigma_s)
    expected = alpha_s * (1 / alpha_t + stride * (first + second) / 2)
    state = next(multistep.edm_heun(Gaussian(schedule), np.ones((1, 1)), [999, 0]))
    assert stride < -1e4 and float(state.x_t[0, 0]) == pytest.approx(expected, rel=1e-6)


@given(any_schedule(ends_at_zero=None), st.sampled_from(sorted(SAMPLERS)), st.data())
def test_one_point_is_reached_exactly_from_any_noise(schedule, name, data):
    """x0_hat is the point at every time, so every slope is the same, whatever the strides; alpha_T may be 0."""
    steps = data.draw(st.integers(1, min(8, schedule.T)))
    point = np.array([[0.3, -0.8]])
    denoiser = DatasetDenoiser(schedule, point)
    x_T = np.array(data.draw(st.lists(st.floats(-3, 3), min_size=2, max_size=2)))[None]
    states = list(SAMPLERS[name][0](denoiser, x_T, times(schedule, steps)))
    alpha_T, sigma_T = schedule.alpha(schedule.T - 1), schedule.sigma(schedule.T - 1)
    eps = (x_T - alpha_T * point) / sigma_T
    for state in states:
        expected = schedule.alpha(state.t) * point + schedule.sigma(state.t) * eps
        assert np.allclose(state.x_t, expected, atol=1e-8 * (1 + np.abs(x_T).max()))
    assert [state.step for state in states] == list(range(1, steps + 1)) and states[-1].t == -1


@pytest.mark.parametrize("schedule, name, calls", [
    (linear, "edm_heun", 19), (linear, "lms", 10), (linear, "plms", 11), (cosine, "plms", 10), (linear, "unipc", 10)])
def test_how_often_the_denoiser_is_called(schedule, name, calls):
    denoiser = Gaussian(schedule(1000))
    sample(SAMPLERS[name][0](denoiser, np.ones((2, 1)), times(denoiser.schedule, 10)))
    assert denoiser.calls == calls


class Asked(Gaussian):
    """The same, and the conditions that it is asked with."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.conditions = []

    def __call__(self, x_t, t, cond=None):
        self.conditions.append(cond)
        return super().__call__(x_t, t)


@pytest.mark.parametrize("name", [*EVERY_SAMPLER, "edm_heun"])
def test_each_call_of_the_denoiser_has_the_condition(name):
    """Bug: the second call of a step without it, so that half of each step ignores the caption."""
    denoiser, condition = Asked(linear(1000)), (np.ones((2, 3)), np.ones(2))
    sampler = EVERY_SAMPLER[name] if name in EVERY_SAMPLER else SAMPLERS[name][0]
    more = {"streams": SampleStreams(0, 2)} if name in EVERY_SAMPLER else {}
    states = list(sampler(denoiser, np.ones((2, 1)), times(denoiser.schedule, 5), condition, **more))
    assert len(states) == 5 and len(denoiser.conditions) >= 5
    assert all(asked is condition for asked in denoiser.conditions)


@pytest.mark.parametrize("name", ["edm_heun", "plms"])
def test_the_first_step_averages_the_slopes_at_both_ends(name):
    """x_s / alpha_s = x_t / alpha_t + (rho_s - rho_t) (eps_t + eps_s) / 2, where eps = sigma x / V on Gaussian data."""
    schedule, (t, s) = linear(1000), (600, 400)
    (a_t, s_t), (a_s, s_s) = ((float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (t, s))
    stride = s_s / a_s - s_t / a_t
    eps_t = s_t / length(schedule, t) ** 2                  # of x_t = 1
    eps_s = s_s / length(schedule, s) ** 2 * a_s * (1 / a_t + stride * eps_t)
    state = next(SAMPLERS[name][0](Gaussian(schedule), np.ones((1, 1)), [t, s]))
    assert float(state.x_t[0, 0]) == pytest.approx(a_s * (1 / a_t + stride * (eps_t + eps_s) / 2), rel=1e-12)


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("name", ["lms", "plms", "unipc"])
def test_from_nearly_pure_noise_they_are_better_than_ddim(name, steps):
    """cosine begins at alpha = 5e-5, rho = 20,000. Bug: PLMS's first slope averaged there, off by 30 lengths."""
    schedule = cosine(1000)

    def error_of(sampler):
        x_0 = sample(sampler(Gaussian(schedule), np.ones((1, 1)), times(schedule, steps)))
        return abs(float(x_0[0, 0]) - R / length(schedule, 999))
    assert error_of(SAMPLERS[name][0]) < 0.9 * error_of(ddim)


@pytest.mark.parametrize("name", ["lms", "plms"])
def test_the_last_step_may_extrapolate(name):
    """Then a denoiser that clips its answer does not bound the end; else it does, and the end is the last answer."""
    schedule = cosine(1000)
    clipped = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: np.clip(Gaussian(schedule)(x_t, t), -0.3, 0.3))
    x_T = np.array([[2.0], [-0.1]])
    *_, last = SAMPLERS[name][0](clipped, x_T, times(schedule, 10))
    assert np.array_equal(last.x_t, last.x0_hat) and abs(last.x_t).max() <= 0.3
    *_, last = SAMPLERS[name][0](clipped, x_T, times(schedule, 10), ends_at_x0_hat=False)
    assert not np.array_equal(last.x_t, last.x0_hat)


@given(st.integers(1, 4), st.data())
def test_the_weights_of_lms_integrate_polynomials_exactly(count, data):
    """The mean of rho^k over low..high is (high^(k+1) - low^(k+1)) / ((k+1) (high - low))."""
    nodes = sorted(data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count, unique=True)), reverse=True)
    low, high = float(nodes[-1]), 0.5
    weights = multistep.mean_of_polynomial([float(n) for n in nodes], low, high)
    for k in range(count):
        mean = (high ** (k + 1) - low ** (k + 1)) / ((k + 1) * (high - low))
        assert np.dot(weights, np.power(nodes, float(k))) == pytest.approx(mean, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sampler", [multistep.edm_heun, multistep.lms, multistep.unipc, ddim, heun, dpm_solver_pp_2m],
                         ids=lambda sampler: sampler.__name__)
@given(st.integers(0, 38), st.floats(-12.5, -1), st.sampled_from([np.float32, np.float64]))
def test_a_time_that_nearly_repeats_another_changes_nothing(sampler, t, exponent, dtype):
    """It differs from its neighbour by 10^exponent in log-SNR; in float32, too, which has not these digits."""
    table = cosine(40).alpha_bar
    odds = table[t] / (1 - table[t]) * np.exp(-(10**exponent))
    x_T = np.array([[1.0], [-2.0]], dtype)
    expected = sample(sampler(Gaussian(cosine(40)), x_T, range(39, -1, -1)))
    twice = Schedule(np.insert(table, t + 1, odds / (1 + odds)))
    found = sample(sampler(Gaussian(twice), x_T, range(40, -1, -1)))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=0.02)


@given(st.integers(1, 4), st.floats(-30, 3))
def test_phi_of_exponential_integrators(k, z):
    """phi_k(z) = int_0^1 e^{(1-u) z} u^{k-1} / (k-1)! du, by Gauss's 40 points."""
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = (u + 1) / 2, w / 2
    expected = (w * np.exp((1 - u) * z) * u**(k - 1)).sum() / math.factorial(k - 1)
    assert multistep.phi(k, z) == pytest.approx(expected, rel=1e-12)
