"""Sohl-Dickstein's entropies and his bound K, on data whose entropies and reverse steps are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from support.diffusion_strategies import any_schedule
from support.law_tools import Noise, quickly

from minidiff.diffusion.entropy import (
    bits,
    entropy_of_step,
    gaussian_entropy,
    k_bound,
    log_likelihood_of_noise,
    reverse_entropy_bounds,
)
from minidiff.diffusion.schedules import even_loss, from_betas


def variances(schedule, t, s2):
    """Of x_{t-1} and x_t, and of x_{t-1} given x_t, for data N(0, s2): from their joint covariance."""
    a_s, a_t = schedule.alpha_bar[t - 1], schedule.alpha_bar[t]
    V_s, V_t = a_s * s2 + 1 - a_s, a_t * s2 + 1 - a_t
    return V_s, V_t, V_s - (a_t / a_s) * V_s**2 / V_t       # Cov(x_s, x_t) = sqrt(a_t / a_s) V_s


@given(any_schedule(min_T=2), st.data(), st.floats(0, 3), st.integers(1, 7))
def test_the_bounds_hold_the_entropy_of_a_gaussian_reverse_step(schedule, data, s, D):
    t = data.draw(st.integers(1, schedule.T - 1))
    lower, upper = reverse_entropy_bounds(schedule, t, D)
    true = D * stats.norm.entropy(scale=math.sqrt(variances(schedule, t, s * s)[2]))
    slack = 1e-6 * D                                        # a difference of variances, in logarithms
    assert lower <= true + slack
    assert true <= upper + slack if s <= 1 else true >= upper - slack


@given(any_schedule(min_T=2), st.data())
def test_they_are_tight_for_a_point_and_for_unit_variance_and_the_upper_fails_beyond(schedule, data):
    t = data.draw(st.integers(1, schedule.T - 1))
    lower, upper = reverse_entropy_bounds(schedule, t, 1)
    point, unit, wide = (stats.norm.entropy(scale=math.sqrt(variances(schedule, t, s2)[2])) for s2 in (0, 1, 4))
    assert lower == pytest.approx(point, abs=1e-6) and upper == pytest.approx(unit, abs=1e-6)
    V_s, V_t, _ = variances(schedule, t, 4)
    assert wide - upper == pytest.approx(0.5 * math.log(V_s / V_t), abs=1e-6)           # above 0: x_{t-1} is wider


@pytest.mark.parametrize("t", [1, 4, 8])
def test_they_hold_the_entropy_of_a_reverse_step_that_is_no_gaussian(t):
    """Data: -1 and 1.  H(X_s | X_t) = H(X_t | X_s) + H(X_s) - H(X_t), each by quadrature."""
    schedule = even_loss(10)

    def entropy(i):
        a = schedule.alpha_bar[i]
        def p(x):
            return (stats.norm.pdf(x, math.sqrt(a), math.sqrt(1 - a)) + stats.norm.pdf(x, -math.sqrt(a),
                                                                                   math.sqrt(1 - a))) / 2
        return integrate.quad(lambda x: -p(x) * math.log(max(p(x), 1e-300)), -9, 9, points=[-1, 0, 1], limit=400)[0]
    forward = stats.norm.entropy(scale=math.sqrt(schedule.betas[t]))
    lower, upper = reverse_entropy_bounds(schedule, t, 1)
    assert lower < forward + entropy(t - 1) - entropy(t) < upper


def test_entropies_against_scipy():
    assert gaussian_entropy(0.3, 4) == pytest.approx(stats.multivariate_normal(np.zeros(4), 0.3).entropy())
    schedule = from_betas([0.1, 0.3, 0.9], allow_signal=True)
    assert entropy_of_step(schedule, 2, 0, 1) == pytest.approx(stats.norm.entropy(scale=math.sqrt(1 - 0.7 * 0.1)))
    # Sohl-Dickstein et al. 2015, table 1: on the Swiss roll K is 2.35 bits, and K - L_null 6.45
    assert bits(log_likelihood_of_noise(2)) == pytest.approx(2.35 - 6.45, abs=0.01)


@quickly
@given(any_schedule(min_T=2), st.lists(st.floats(0.2, 2), min_size=1, max_size=3))
def test_K_on_gaussian_data_with_the_exact_reverse_steps(schedule, s):
    """E log p(x_0) - K is the price of the two steps that are not exact: p(x_T) = N(0, I), and p(x_0 | x_1).

    K of a point is quadratic in it and in the noises, each term in one noise: signs for Gaussians give its mean.
    """
    s2 = np.array(s) ** 2

    def reverse(x_t, t):
        t = int(t[0])
        V_s, V_t, V = variances(schedule, t, s2)
        # E[x_s | x_t] = Cov(x_s, x_t) / V_t x_t
        return math.sqrt(schedule.alpha_bar[t] / schedule.alpha_bar[t - 1]) * V_s / V_t * x_t, V + np.zeros_like(x_t)
    sign, noise = np.array([[1.], [1], [-1], [-1]]), np.array([[1.], [-1], [1], [-1]])
    got = k_bound(schedule, reverse, sign * np.array(s), streams=Noise(4, given=noise)).total.mean()

    entropy = sum(stats.norm.entropy(scale=a) for a in s)
    a_T, a_1 = schedule.alpha_bar[-1], schedule.alpha_bar[0]
    V_T, V_1 = a_T * s2 + 1 - a_T, a_1 * s2 + 1 - a_1
    start = 0.5 * (V_T - 1 - np.log(V_T)).sum()             # KL(q(x_T) || N(0, I))
    # E KL(q(x_0 | x_1) || N(sqrt(1 - beta_1) x_1, beta_1)), two Gaussians whose means are multiples of x_1
    gain, v, b = math.sqrt(a_1) * s2 / V_1, s2 * (1 - a_1) / V_1, 1 - a_1
    end = 0.5 * (v / b - 1 - np.log(v / b) + (gain - math.sqrt(a_1)) ** 2 * V_1 / b).sum()
    assert got == pytest.approx(-entropy - start - end, abs=1e-7 + 1e-14 / schedule.betas.min())


def test_each_step_of_even_loss_takes_as_much_signal():
    for T in (1, 2, 40, 1000):
        schedule = even_loss(T)
        kept = np.concatenate([[1.0], schedule.alpha_bar])
        np.testing.assert_allclose(-np.diff(kept), 1 / T, rtol=1e-9)
        assert schedule.alpha_bar[-1] == 0
        np.testing.assert_allclose(schedule.betas, [1 / (T - t + 1) for t in range(1, T + 1)], rtol=1e-9)


def test_refusals():
    schedule = even_loss(4)
    with pytest.raises(ValueError, match="t must be at least 1, not 0"):
        reverse_entropy_bounds(schedule, 0, 2)
    with pytest.raises(ValueError, match="variance positive"):
        gaussian_entropy(0.0, 2)
    with pytest.raises(ValueError, match=r"x_0 must be points \(B, D\)"):
        k_bound(schedule, None, np.zeros(3), streams=Noise(3, given=0))
