"""Schedules: laws 3 to 6, against exact arithmetic, quadrature and published numbers."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from diffusion_strategies import any_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from minidiff.diffusion import schedules
from minidiff.diffusion.schedules import SCHEDULES, Schedule

few = settings(deadline=None, max_examples=40)


def product_of_decimals(betas: list[Decimal]) -> np.ndarray:
    product, table = Decimal(1), []
    for beta in betas:
        product *= 1 - beta
        table.append(float(product))
    return np.array(table)


# ---- the tables themselves -------------------------------------------------------------------------------


@few
@given(any_schedule(ends_at_zero=None))
def test_snr_strictly_falls_and_every_table_is_finite(schedule):
    """Law 3, from the clean image to the last step, which may have SNR 0."""
    t = np.arange(-1, schedule.T)
    assert np.all(np.diff(schedule.abar(t)) < 0)
    assert np.all(np.diff(schedule.snr(t)) < 0)
    assert np.all(np.diff(schedule.log_snr(t)) < 0)
    for table in (schedule.alpha(t), schedule.sigma(t), schedule.betas, schedule.snr(t[1:])):
        assert np.all(np.isfinite(table))
    assert np.all((schedule.betas > 0) & (schedule.betas <= 1))
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=0, atol=4e-16)


@few
@given(any_schedule())
def test_log_snr_is_the_log_of_the_ratio(schedule):
    for t in range(schedule.T):
        abar = Fraction(float(schedule.alpha_bar[t]))
        snr = abar / (1 - abar)
        assert math.isclose(schedule.snr(t), snr, rel_tol=1e-14)
        log_snr = math.log(snr.numerator) - math.log(snr.denominator)
        assert math.isclose(schedule.log_snr(t), log_snr, rel_tol=1e-12, abs_tol=1e-12)
        assert schedule.half_log_snr(t) == schedule.log_snr(t) / 2
    assert schedule.log_snr(-1) == np.inf


@few
@given(st.integers(2, 60), st.floats(1e-5, 0.01), st.floats(0.011, 0.5))
def test_linear_and_scaled_linear_match_exact_products(T, beta_min, beta_max):
    """Against 40-digit decimals: a missing square, or a table off by one, fails."""
    with localcontext() as context:
        context.prec = 40
        low, high = Decimal(beta_min), Decimal(beta_max)
        u = [Decimal(i) / (T - 1) for i in range(T)]
        linear = product_of_decimals([low + (high - low) * v for v in u])
        scaled = product_of_decimals([(low.sqrt() + (high.sqrt() - low.sqrt()) * v) ** 2 for v in u])
    made = schedules.linear(T, beta_min, beta_max, allow_signal=True)
    np.testing.assert_allclose(made.alpha_bar, linear, rtol=1e-13)
    made = schedules.scaled_linear(T, beta_min, beta_max, allow_signal=True)
    np.testing.assert_allclose(made.alpha_bar, scaled, rtol=1e-13)


def test_published_numbers():
    """4.0e-5 for DDPM, 0.0047 for Stable Diffusion, 7.3e-4 for its form with DDPM's range.

    Without the square, the last would be 2.8e-35.
    """
    assert schedules.linear().alpha_bar[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert schedules.scaled_linear().alpha_bar[-1] == pytest.approx(4.66e-3, rel=1e-3)
    assert schedules.scaled_linear(1000, 1e-4, 0.02).alpha_bar[-1] == pytest.approx(7.334e-4, rel=1e-3)


@few
@given(st.integers(1, 2000), st.floats(1e-4, 0.1))
def test_cosine_is_a_squared_cosine_until_its_last_beta_is_clipped(T, s):
    """Against 1 + cos 2a = 2 cos^2 a; the clean image is t = -1, so t = 0 has noise already (no 0/0)."""
    schedule = schedules.cosine(T, s, allow_signal=True)
    assert schedule.alpha_bar[0] < 1
    assert schedule.alpha_bar[-1] > 0
    assert schedule.betas.max() <= 0.999 + 1e-12
    assert schedule.betas[-1] == pytest.approx(0.999)

    def power(i):  # of the signal at i/T of the way, up to a constant
        return 1 + math.cos(math.pi * (i / T + s) / (1 + s))

    unclipped = [power(t + 1) / power(0) for t in range(T - 1)]
    kept = np.array([1 - power(t + 1) / power(t) < 0.999 for t in range(T - 1)], dtype=bool)
    assert kept.sum() >= T - 2  # at most the last two steps are so steep
    np.testing.assert_allclose(schedule.alpha_bar[:-1][kept], np.array(unclipped)[kept], rtol=1e-9)


def test_log_snr_linear_is_linear_in_log_snr_and_attains_its_ends():
    schedule = schedules.log_snr_linear(41, 7.0, -13.0)
    np.testing.assert_allclose(schedule.log_snr(np.arange(41)), 7 - 0.5 * np.arange(41), rtol=0, atol=1e-12)


# ---- continuous time -------------------------------------------------------------------------------------


@few
@given(st.integers(1, 30), st.floats(0.05, 1.0), st.floats(2.0, 30.0))
def test_vp_sde_is_the_integral_of_its_rate(T, beta_min, beta_max):
    """Law 6: d log alpha^2 = -beta(u) du with beta(u) linear, integrated numerically."""
    schedule = schedules.vp_sde(T, beta_min, beta_max, allow_signal=True)
    for t in range(T):
        integral, _ = quad(lambda u: beta_min + u * (beta_max - beta_min), 0, (t + 1) / T)
        assert schedule.abar(t) == pytest.approx(math.exp(-integral), rel=1e-10)


def test_vp_sde_is_the_limit_of_linear():
    """Law 6: the chain of T steps with betas beta(u)/T nears the SDE as 1/T."""
    gaps = []
    for T in (1000, 2000, 4000):
        chain = schedules.linear(T, 0.1 / T, 20 / T)
        middle = T // 2 - 1  # u = 1/2 for every T
        gaps.append(abs(np.log(chain.abar(middle) / schedules.vp_sde(T).abar(middle))))
    assert gaps[2] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


@few
@given(st.integers(2, 50), st.floats(-3, 3), st.floats(-3, 3))
def test_flow_matching_is_a_straight_path_at_constant_velocity(T, x_0, eps):
    """Law 6: unscaled, x_u = (1-u) x_0 + u eps, whose velocity is eps - x_0 everywhere; it ends at SNR 0."""
    schedule = schedules.flow_matching(T)
    t = np.arange(-1, T)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    path = (alpha * x_0 + sigma * eps) / (alpha + sigma)
    assert path[0] == x_0 and path[-1] == eps
    np.testing.assert_allclose(np.diff(path) * T, eps - x_0, rtol=0, atol=1e-10)
    assert schedule.snr(T - 1) == 0


def test_from_log_snr_reads_one_number_for_every_time():
    with pytest.raises(ValueError, match=r"log_snr must map an array \(5,\)"):
        schedules.from_log_snr(lambda u: 3.0, 5)


# ---- reaching noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, signal", [(200, 0.132), (300, 0.048)])
def test_a_schedule_that_keeps_signal_is_refused_aloud(T, signal):
    """Law 4: DDPM's range of betas was made for T = 1000."""
    with pytest.raises(ValueError, match=f"linear schedule with T = {T} must end in noise.*ends at {signal}"):
        schedules.linear(T)
    meant = schedules.linear(T, allow_signal=True)
    assert not meant.reaches_noise
    assert meant.alpha_bar[-1] == pytest.approx(signal, abs=5e-4)
    assert schedules.linear(T, 0.1 / T, 20 / T).reaches_noise  # the remedy that the message names


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_named_schedule_reaches_noise(name):
    assert SCHEDULES[name]().reaches_noise
    assert SCHEDULES[name](1000).T == 1000


@few
@given(any_schedule(min_T=2))
def test_zero_terminal_snr_keeps_the_first_and_ends_at_zero(schedule):
    """Law 5, by its definition: an affine map of alpha that keeps the first and sends the last to 0."""
    zeroed = schedules.zero_terminal_snr(schedule)
    assert zeroed.alpha_bar[0] == schedule.alpha_bar[0]
    assert zeroed.alpha_bar[-1] == 0
    before, after = schedule.alpha(np.arange(schedule.T)), zeroed.alpha(np.arange(schedule.T))
    slope, offset = np.polyfit(before, after, 1)
    np.testing.assert_allclose(after, slope * before + offset, rtol=0, atol=1e-12)
    np.testing.assert_allclose(schedules.zero_terminal_snr(zeroed).alpha_bar, zeroed.alpha_bar, atol=1e-15)


def test_zero_terminal_snr_needs_two_times():
    with pytest.raises(ValueError, match="schedule.T must be at least 2, got 1"):
        schedules.zero_terminal_snr(Schedule([0.01]))


# ---- respacing -------------------------------------------------------------------------------------------


@few
@given(any_schedule(ends_at_zero=None), st.data())
def test_respaced_jumps_are_products_of_the_steps_between(schedule, data):
    """1 - beta of a jump = the product of 1 - beta over its steps, whatever the order of the list."""
    times = data.draw(st.sets(st.integers(0, schedule.T - 1), min_size=1).map(sorted))
    short = schedules.respaced(schedule, data.draw(st.permutations(times)))
    assert short.T == len(times)
    start = 0
    for i, t in enumerate(times):
        jump = math.prod(1 - Fraction(float(beta)) for beta in schedule.betas[start : t + 1])
        assert 1 - short.betas[i] == pytest.approx(float(jump), rel=1e-9, abs=1e-15)
        start = t + 1


@pytest.mark.parametrize(
    "times, error, message",
    [
        ([3, 5, 3], ValueError, "distinct"),
        ([], ValueError, "non-empty"),
        ([10], IndexError, r"t must lie in 0\.\.9, got 10"),
        ([-1, 4], IndexError, r"t must lie in 0\.\.9, got -1"),
        ([0.5], TypeError, "dtype float64"),
    ],
)
def test_respaced_refuses(times, error, message):
    with pytest.raises(error, match=message):
        schedules.respaced(schedules.cosine(10), times)


# ---- the contract ----------------------------------------------------------------------------------------


def test_t_minus_one_is_the_clean_image():
    schedule = schedules.cosine(10)
    assert schedule.abar(-1) == schedule.alpha(-1) == 1
    assert schedule.sigma(-1) == 0
    assert schedule.snr(-1) == np.inf
    assert schedule.abar(0) == schedule.alpha_bar[0]
    assert schedule.abar(9) == schedule.alpha_bar[9]


def test_times_of_any_shape_and_any_integer_dtype():
    schedule = schedules.linear()
    t = np.array([[0, 5], [127, 99]])
    expected = schedule.alpha_bar[t]
    for dtype in (np.int8, np.uint8, np.int32, np.uint64):  # 127 + 1 overflows an int8
        np.testing.assert_array_equal(schedule.abar(t.astype(dtype)), expected)
    assert schedule.abar(np.arange(0)).shape == (0,)


@pytest.mark.parametrize("t", [10, -2, [3, 10], [-2, 0]])
def test_a_time_outside_the_table_is_an_index_error(t):
    with pytest.raises(IndexError, match=r"t must lie in -1\.\.9, got (10|-2)"):
        schedules.cosine(10).alpha(np.array(t))


def test_a_time_that_is_no_integer_is_a_type_error():
    with pytest.raises(TypeError, match="t must be an integer or an integer array, got dtype float64"):
        schedules.cosine(10).alpha(0.5)


def test_a_schedule_neither_changes_nor_keeps_what_it_was_given():
    """Law 3: neither side can reach the other's numbers."""
    betas = np.linspace(0.1, 0.6, 10)
    table = np.cumprod(1 - betas)
    given_betas, given_table = betas.copy(), table.copy()
    of_betas, of_table = schedules.from_betas(betas), Schedule(table)
    for schedule in (of_betas, of_table):
        schedules.zero_terminal_snr(schedule)
        schedules.respaced(schedule, [1, 9])
        schedule.betas[:] = 7  # results are the caller's own
        schedule.abar(np.arange(10))[:] = 7
        with pytest.raises(ValueError, match="read-only"):
            schedule.alpha_bar[0] = 0.5
        with pytest.raises(AttributeError):
            schedule.alpha_bar = table
    np.testing.assert_array_equal(betas, given_betas)
    np.testing.assert_array_equal(table, given_table)
    betas[:], table[:] = 0.9, 0.9
    np.testing.assert_array_equal(of_table.alpha_bar, given_table)
    np.testing.assert_allclose(of_betas.betas, given_betas, rtol=1e-13)
    times = np.array([5, 2, 9])
    schedules.respaced(of_table, times)
    np.testing.assert_array_equal(times, [5, 2, 9])


@pytest.mark.parametrize(
    "table, message",
    [
        ([], r"non-empty \(T,\) array, got shape \(0,\)"),
        ([[0.5]], r"got shape \(1, 1\)"),
        ([1.0, 0.5], r"in \[0, 1\), got alpha_bar\[0\] = 1.0"),
        ([0.5, -0.1], r"got alpha_bar\[1\] = -0.1"),
        ([0.5, np.nan], r"got alpha_bar\[1\] = nan"),
        ([0.9, 0.5, 0.5], r"strictly decrease, got alpha_bar\[1\] = 0.5 and alpha_bar\[2\] = 0.5"),
        ([0.5, 0.0, 0.0], r"alpha_bar\[1\] = 0.0 and alpha_bar\[2\] = 0.0"),
    ],
)
def test_a_broken_table_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Schedule(table)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.1], [np.nan], [[0.1]]])
def test_broken_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be a non-empty"):
        schedules.from_betas(betas)


@pytest.mark.parametrize("factory", SCHEDULES.values())
@pytest.mark.parametrize("T, error", [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_broken_T_is_refused(factory, T, error):
    with pytest.raises(error, match="T must be"):
        factory(T)
