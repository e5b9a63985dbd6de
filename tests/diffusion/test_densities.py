"""The density of training times over log-SNR: its laws, what a text names, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import quickly

from minidiff.diffusion import schedules
from minidiff.diffusion.densities import (
    DENSITIES,
    TimeDensity,
    density_from,
    log_snr_edges,
    parse_density,
)
from minidiff.diffusion.times import training_times
from minidiff.errors import UserError

tables = st.lists(st.floats(0.01, 1), min_size=1, max_size=30).map(np.array)


# ---- a table, drawn ------------------------------------------------------------------------------------------------

@pytest.mark.law(
    "20b", "stratified times of any density P: of B times, B P(t' <= t) are at most t, rounded up or down",
    source="B points spaced by 1/B have floor or ceil of B x in [0, x)",
    tolerance="less than 1 time of the B; 1e-9 more for rounding: exact counts, no false alarm")
@quickly
@given(seeds, tables, st.integers(1, 200))
def test_times_cover_the_density_evenly(seed, P, B):
    """Bugs: the density of the next time; independent u; the last time left out."""
    t = TimeDensity(P).draw(np.random.default_rng(seed), B)
    assert t.shape == (B,) and t.dtype == np.int64 and t.min() >= 0 and t.max() < len(P)
    for k in range(len(P)):
        assert abs((t <= k).sum() - B * sum(P[:k + 1]) / sum(P)) < 1 + 1e-9


def test_probabilities_are_kept_in_float64():
    assert np.array_equal(TimeDensity(np.array([1, 2, 3], np.float32)).P, [1 / 6, 1 / 3, 1 / 2])


def test_a_time_of_probability_0_is_never_drawn():
    density = TimeDensity(np.array([0, 0, 1, 0, 2, 0.0]))
    t = np.concatenate([density.draw(np.random.default_rng(i), 3) for i in range(200)])
    assert np.bincount(t, minlength=6).tolist() == [0, 0, 200, 0, 400, 0]           # exact, since they are stratified


class Given:
    """A generator that draws one number."""

    def __init__(self, u: float):
        self.u = u

    def random(self) -> float:
        return self.u


def test_the_largest_u_below_1_is_the_last_time():
    """The sum of many probabilities is not exactly 1: of some of these it is less."""
    for T in range(1, 200):
        assert TimeDensity(np.full(T, 0.1)).draw(Given(np.nextafter(1, 0)), 1).tolist() == [T - 1]


def test_a_u_at_a_bound_is_the_next_time():
    """u = 0 is not the first time if that has probability 0; P(t <= 1) > u = 1/2 = P(t <= 0) is t = 1."""
    assert TimeDensity(np.array([0, 1, 1])).draw(Given(0.0), 1).tolist() == [1]
    assert TimeDensity(np.array([1, 1])).draw(Given(0.5), 1).tolist() == [1]


@pytest.mark.parametrize("seed", [3])
def test_independent_times_of_any_shape_have_the_density(seed):
    """Chi-squared at 1e-8; a row of them is spread as independent times are, and not evenly."""
    P, n = np.arange(1, 7), 40_000
    t = TimeDensity(P).draw(np.random.default_rng(seed), (n // 4, 4), stratified=False)
    assert t.shape == (n // 4, 4) and t.dtype == np.int64
    assert stats.chisquare(np.bincount(t.ravel(), minlength=6), n * P / P.sum()).pvalue > 1e-8
    together = (t[:, 0] == t[:, 1]).sum()                   # by chance: sum_k P(t = k)^2
    assert abs(together - n / 4 * ((P / P.sum()) ** 2).sum()) < 6 * math.sqrt(n / 4)


@quickly
@given(seeds, st.integers(0, 100), st.sampled_from([1, 1 / 2, 1 / 3]), st.booleans())
def test_power_times_are_those_of_training_times(seed, B, power, stratified):
    """The table and the formula t = floor(T u^power) give the same times of the same numbers.  They may differ where a
    u is within 1e-15 of one of 1000 bounds, in one batch of 1e9 or so."""
    table = density_from(f"power:power={power!r}", schedules.cosine(1000))
    drawn, formula = (f(np.random.default_rng(seed)) for f in (
        lambda rng: table.draw(rng, B, stratified), lambda rng: training_times(rng, B, 1000, power, stratified)))
    np.testing.assert_array_equal(drawn, formula)


# ---- a density is a weight -----------------------------------------------------------------------------------------

@pytest.mark.law(
    "20c", "E_{t ~ P} [Q(t)/P(t) L_t] = E_{t ~ Q} [L_t]: the objective is the same for any density once it is weighted",
    source="both sums over all times, written out, with Python's fractions of the table's entries",
    tolerance="1e-12 of the sum: rounding of 30 terms")
@quickly
@given(st.data())
def test_the_objective_is_the_same_for_every_density_once_weighted(data):
    """Bugs: P/Q for Q/P; a weight that is not of normalised densities."""
    P = data.draw(tables)
    Q, L = (np.array(data.draw(st.lists(st.floats(0, 10), min_size=len(P), max_size=len(P)))) for _ in range(2))
    if Q.sum() < 1e-3:
        Q[0] = 1.0
    weight = TimeDensity(P).weight_for(TimeDensity(Q))
    over_P = math.fsum(p / math.fsum(P) * w * loss for p, w, loss in zip(P, weight, L, strict=True))
    over_Q = math.fsum(q / math.fsum(Q) * loss for q, loss in zip(Q, L, strict=True))
    assert over_P == pytest.approx(over_Q, rel=1e-12, abs=1e-14)


def test_the_mean_over_drawn_times_is_the_objective():
    """The weight belongs to the times that are drawn: over 100,000 stratified times the weighted mean of t^2 is that
    over Q to 1e-3: each time's count is right to 1 of 100,000, its t^2 at most 81 and its weight at most 6."""
    P, Q = TimeDensity(np.arange(1, 11)), TimeDensity(np.arange(10, 0, -1) ** 2)
    t = P.draw(np.random.default_rng(0), 100_000)
    found, expected = np.mean(P.weight_for(Q)[t] * t**2), sum(Q.P[k] * k**2 for k in range(10))
    assert abs(found - expected) < 10 * 81 * 6 / 100_000


def test_no_weight_makes_up_for_times_that_are_never_drawn():
    with pytest.raises(ValueError, match="Q must be 0 where this density is 0"):
        TimeDensity([1, 0, 1]).weight_for(TimeDensity([1, 1, 1]))
    assert TimeDensity([1, 0, 1]).weight_for(TimeDensity([1, 0, 0])).tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="Q must have 2 times, as this density, got 3"):
        TimeDensity([1, 1]).weight_for(TimeDensity([1, 1, 1]))


# ---- over log-SNR --------------------------------------------------------------------------------------------------

DISTRIBUTIONS = {                                           # of log-SNR, by SciPy
    "uniform": stats.uniform(-30, 60),
    "normal": stats.norm(0, 2),
    "normal:mean=2.4,std=2.4": stats.norm(2.4, 2.4),
    "sech": stats.hypsecant(0, 2),
    "sech:shift=-3": stats.hypsecant(-3, 2),
}


@pytest.mark.law(
    "20d", "P(t) is the share of the log-SNRs nearest to lambda_t, of those between the schedule's ends",
    source="SciPy's distribution functions of the normal and of the hyperbolic secant",
    tolerance="1e-6 of P(t), and 1e-9: the difference of two neighbouring values of F")
@pytest.mark.parametrize("text", DISTRIBUTIONS)
@quickly
@given(any_schedule(min_T=2))
def test_a_time_stands_for_the_noise_levels_nearest_to_it(text, schedule):
    """Bugs: std for its square; log alpha for log-SNR; bounds that are not half-way; a tail given to the first time."""
    lam = [float(np.log(a / (1 - a))) for a in schedule.alpha_bar]
    bounds = [(x + y) / 2 for x, y in zip(lam, lam[1:], strict=False)]
    bounds = [lam[0] + (lam[0] - bounds[0]), *bounds, lam[-1] - (bounds[-1] - lam[-1])]
    np.testing.assert_allclose(log_snr_edges(schedule), bounds, rtol=1e-9, atol=1e-9)
    F = DISTRIBUTIONS[text]
    mass = np.array([F.cdf(x) - F.cdf(y) if x < 0 else F.sf(y) - F.sf(x) for x, y in zip(bounds, bounds[1:],
                                                                                        strict=False)])
    if mass.sum() > 1e-6:                                   # else the density is far from the schedule's ends
        np.testing.assert_allclose(density_from(text, schedule).P, mass / mass.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.law(
    "20e", "a density over log-SNR means the same in every schedule: sum_t P(t) f(lambda_t) = int p(lambda) f(lambda)",
    source="SciPy's quadrature between the same ends; Kingma & Gao 2023, invariance to the noise schedule",
    tolerance="2e-3: 20,000 times; the first and the last reach 0.01 in log-SNR beyond the ends")
@pytest.mark.parametrize("text", DISTRIBUTIONS)
def test_the_objective_does_not_depend_on_the_schedule(text):
    """Between log-SNR 6 and -6; f is a loss that is large at one noise level."""
    def f(x):
        return 1 / (1 + np.exp(-x)) / (1 + (x - 1) ** 2)
    p = DISTRIBUTIONS[text].pdf
    exact = integrate.quad(lambda x: p(x) * f(x), -6, 6)[0] / integrate.quad(p, -6, 6)[0]
    end = 1 / (1 + math.exp(6))                             # of log-SNR -6; 1 - end has log-SNR 6
    u = np.linspace(0, 1, 20_000)
    for alpha_bar in (1 / (1 + np.exp(-np.linspace(6, -6, 20_000))),                  # even in log-SNR
                      1 - end + u * (2 * end - 1),                                  # even in alpha_bar
                      np.cos(np.arccos(math.sqrt(1 - end)) + u * (math.acos(math.sqrt(end))
                                                                  - math.acos(math.sqrt(1 - end)))) ** 2):
        schedule = schedules.Schedule(alpha_bar)
        found = sum(density_from(text, schedule).P * f(schedule.log_snr(np.arange(20_000))))
        assert found == pytest.approx(exact, rel=2e-3)


def test_both_tails_are_exact():
    """Where F is near 1 its differences are lost: the normal density at 7 standard deviations, on either side."""
    P = density_from("normal:std=1.7", schedules.log_snr_linear(50, 12, -12)).P
    np.testing.assert_allclose(P, P[::-1], rtol=1e-7)
    assert P[0] < 1e-11


def test_uniform_times_of_the_cosine_schedule_are_the_hyperbolic_secant():
    """So `sech` in the schedule that is even in log-SNR draws noise levels as often as uniform times do in cosine."""
    T = 2000
    cosine, even = schedules.cosine(T, offset=0.0), schedules.log_snr_linear(T, 9, -9)
    P, lam = density_from("sech", even).P, even.log_snr(np.arange(T))
    for level in (-6, -2, 0, 1, 5):
        uniform_share = (cosine.log_snr(np.arange(T - 1)) > level).mean()
        assert P[lam > level].sum() == pytest.approx(uniform_share, abs=0.01)       # 0.7 % are beyond each of 9, -9


def test_edm_and_stable_diffusion_3_are_the_same_family():
    """Log-normal sigma/alpha, and logit-normal u of x = (1-u) x_0 + u eps: both are normal in log-SNR."""
    rng = np.random.default_rng(0)
    sigma = np.exp(-1.2 + 1.2 * rng.standard_normal(100_000))                       # Karras et al. 2022, table 1
    u = 1 / (1 + np.exp(-rng.standard_normal(100_000)))                             # SD3: lognorm(0, 1)
    for log_snr, text in ((-2 * np.log(sigma), "normal:mean=2.4,std=2.4"), (2 * np.log((1 - u) / u), "normal")):
        F, even = DISTRIBUTIONS[text].cdf, schedules.log_snr_linear(4000, 20, -20)
        assert stats.kstest(log_snr, F).pvalue > 1e-8                               # false alarm 2e-8
        below = density_from(text, even).P[::-1].cumsum()[::-1]                     # P(lambda <= lambda_t)
        np.testing.assert_allclose(below, F(log_snr_edges(even)[:-1]), atol=1e-6)


def test_a_mixture_has_its_shares():
    schedule = schedules.cosine(50)
    parts = [density_from(text, schedule).P for text in ("power", "uniform", "normal:mean=1")]
    mixed = density_from("0.5*power + 0.3*uniform + 0.2*normal:mean=1", schedule)
    np.testing.assert_allclose(mixed.P, 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2], rtol=1e-12)
    assert parse_density("1*power:power=0.5") == [(1.0, "power", {"power": 0.5})]


@quickly
@given(st.integers(1, 60), st.sampled_from([1, 1 / 2, 1 / 3, 0.7]))
def test_the_power_density_is_that_of_its_formula(T, power):
    """P(t < k) = (k/T)^(1/power)."""
    P = density_from(f"power:power={power!r}", schedules.linear(T, allow_signal=True)).P
    np.testing.assert_allclose(P.cumsum(), [(k / T) ** (1 / power) for k in range(1, T + 1)], rtol=1e-9, atol=1e-12)


def test_a_last_time_without_signal_counts_like_the_one_before():
    schedule = schedules.flow_matching(10)
    edges = log_snr_edges(schedule)
    assert schedule.log_snr(9) == -np.inf and edges.shape == (11,) and (np.diff(edges) < 0).all()
    assert np.isfinite(edges).all() and edges[9] - edges[10] == pytest.approx(edges[8] - edges[9], rel=0.5)


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_draws_every_noise_level_of_the_default_schedule(name):
    P = density_from(name, schedules.cosine(1000)).P
    assert P.shape == (1000,) and (P > 0).all() and P.sum() == pytest.approx(1)


# ---- what is refused -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("P", [[], [[1.0]], [0, 0], [1, -1, 1], [1, math.nan], [1, math.inf], 3])
def test_no_probabilities(P):
    with pytest.raises(ValueError, match=r"P must be probabilities \(T,\)"):
        TimeDensity(P)


@pytest.mark.parametrize("text, sentence", [
    ("even", "there is no density of times 'even': it is one of power, uniform, normal, sech"),
    ("normal:s=1", "'s' is not a parameter; the parameters of normal are: mean=0.0, std=2.0"),
    ("normal:std=0", "density of times 'normal:std=0': std must be positive, got 0"),
    ("normal:std=-1", "std must be positive"), ("normal:mean=1e9", "mean 1e.09 and std 2 leave no chance"),
    ("power:power=2", r"power must be in \(0, 1\], .* got 2"), ("sech:shift=nan", "shift must be a finite number"),
    ("0.5*power", "the shares of a mixture must be numbers that sum to 1"), ("x*power", "the shares"),
    ("1.5*power + -0.5*uniform", "the shares"), ("nan*power + 1*uniform", "the shares"),
    ("0.5*power+0.5*uniform", "the shares of a mixture"),
    ("0.5*power + 0.5*even", "there is no density of times 'even'"), ("0.5*power + uniform", "the shares"),
    (3, "must be a short text, such as 'power', got 3"), ("", "there is no density of times ''"),
    ("power:" + "a" * 300, "must be a short text, .* got 306 characters"),
])
def test_a_wrong_text_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        density_from(text, schedules.cosine(100))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(4, 2), 2.5, -1, True])
def test_stratified_times_are_of_one_axis(shape):
    with pytest.raises(ValueError, match="shape, for stratified times, must be a whole number of at least 0, not"):
        TimeDensity([1, 1]).draw(np.random.default_rng(0), shape)


@pytest.mark.parametrize("schedule", [schedules.linear(1, allow_signal=True),
                                      schedules.zero_terminal_snr(schedules.linear(2, allow_signal=True))])
def test_one_time_has_no_density_over_log_snr(schedule):
    """The sentence says what a user can do, and that helps."""
    with pytest.raises(UserError, match="needs at least two times of an SNR above 0, and the schedule has 1: take a "
                                        "larger T, or times=power"):
        density_from("uniform", schedule)
    assert density_from("power", schedule).P.sum() == pytest.approx(1)
