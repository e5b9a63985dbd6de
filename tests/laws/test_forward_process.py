"""The forward process (laws 1 to 4, 6, 7): how noise replaces x_0, and how fast.

Against exact fractions and decimals, quadrature, a simulated chain, and the heat equation.
"""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.stats import norm
from support.diffusion_strategies import any_schedule, schedule_and_times, seeds, shapes
from support.law_tools import alphas_sigmas, few, random_mixture

from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.schedules import SCHEDULES, Schedule, schedule_from

pixels = st.floats(-3, 3)


# ---- law 1: many steps are one -------------------------------------------------------------------------------

@pytest.mark.law(
    1, "q(x_t|x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) is t steps x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z",
    source="DDPM eq. 2, 4; the composition in exact fractions",
    tolerance="1e-8: beta, rounded at 1e-16, is subtracted from 1 and divided by powers of 6e-6 or more, 20 times over")
@few
@given(any_schedule(max_T=20, ends_at_zero=None), shapes, seeds)
def test_marginal_is_the_composition_of_single_steps(schedule, shape, seed):
    signal, noise = Fraction(1), Fraction(0)                       # powers
    powers = []
    for beta in schedule.betas:
        beta = Fraction(float(beta))
        signal, noise = (1 - beta) * signal, (1 - beta) * noise + beta
        powers.append((math.sqrt(signal), math.sqrt(noise)))
    rng = np.random.default_rng(seed)
    t = np.array([*range(schedule.T), schedule.T - 1])             # every time, one sample each
    x_0, eps = rng.normal(size=(2, len(t), *shape))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    mean, variance = gaussian.q_mean_variance(schedule, x_0, t)
    for b, (alpha, sigma) in enumerate(powers[i] for i in t):
        np.testing.assert_allclose(mean[b], alpha * x_0[b], rtol=1e-8, atol=1e-15)
        np.testing.assert_allclose(variance[b], sigma**2, rtol=1e-8)
        np.testing.assert_allclose(x_t[b], alpha * x_0[b] + sigma * eps[b], rtol=1e-8, atol=1e-8)


@pytest.mark.law(
    1, "the same of 200,000 simulated chains: mean, variance, and no covariance between pixels",
    source="DDPM eq. 2, 4; simulation",
    tolerance="5.4 standard errors, 15 checks: false alarm 1e-6 (P(|z| > 5.4) = 6.7e-8)")
@pytest.mark.parametrize("seed", [0])
def test_a_simulated_chain_has_the_moments_of_the_marginal(seed):
    """The mean of normal numbers is normal; their variance and correlation are nearly normal."""
    rng, count = np.random.default_rng(seed), 200_000
    schedule, x_0 = schedules.cosine(6), np.array([[0.7, -0.2]])
    x = np.broadcast_to(x_0, (count, 2))
    for t, beta in enumerate(schedule.betas):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * rng.standard_normal((count, 2))
        if t in (0, 3, 5):
            mean, variance = gaussian.q_mean_variance(schedule, x_0, t)
            variance = float(variance)
            assert (abs(x.mean(0) - mean[0]) < 5.4 * math.sqrt(variance / count)).all()
            assert (abs(x.var(0) - variance) < 5.4 * variance * math.sqrt(2 / count)).all()
            assert abs(np.corrcoef(x.T)[0, 1]) < 5.4 / math.sqrt(count)


def product_of_decimals(betas: list[Decimal]) -> np.ndarray:
    product, table = Decimal(1), []
    for beta in betas:
        product *= 1 - beta
        table.append(float(product))
    return np.array(table)


@pytest.mark.law(
    1, "abar_t = prod_{i<=t} (1 - beta_i), beta linear in t (DDPM), sqrt(beta) linear in t (LDM's program)",
    source="DDPM eq. 4 and section 4, LDM's program; 40-digit decimals",
    tolerance="1e-13: up to 60 factors, each rounded at 1e-16, and the table's own rounding")
@few
@given(st.integers(2, 60), st.floats(1e-5, 0.01), st.floats(0.011, 0.5))
def test_linear_and_scaled_linear_match_exact_products(T, beta_min, beta_max):
    """Bugs: scaled_linear without its square; a table off by one."""
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


# ---- law 2: any two jumps compose ----------------------------------------------------------------------------

@pytest.mark.law(
    2, "alpha_ts = alpha_t/alpha_s, sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2; r to s to t is r to t",
    source="VDM appendix A; exact fractions",
    tolerance="1e-10: 1e-16 over a noise power of 6e-6 or more")
@few
@given(schedule_and_times(ends_at_zero=None), st.data())
def test_any_two_jumps_compose(drawn, data):
    schedule, s, t = drawn
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
    abar_s, abar_t = Fraction(float(schedule.abar(s))), Fraction(float(schedule.abar(t)))
    vdm = (1 - abar_t) - abar_t / abar_s * (1 - abar_s)
    assert sigma2_ts == pytest.approx(float(vdm), rel=1e-10)
    assert alpha_ts**2 == pytest.approx(float(abar_t / abar_s), rel=1e-12)
    if s > -1:
        r = data.draw(st.integers(-1, s - 1))
        alpha_sr, sigma2_sr = gaussian.q_step(schedule, r, s)
        alpha_tr, sigma2_tr = gaussian.q_step(schedule, r, t)
        assert alpha_ts * alpha_sr == pytest.approx(alpha_tr, rel=1e-12)
        assert alpha_ts**2 * sigma2_sr + sigma2_ts == pytest.approx(sigma2_tr, rel=1e-10)
    else:                                                          # from the clean image it is the marginal
        assert alpha_ts == schedule.alpha(t)
        assert sigma2_ts == 1 - schedule.abar(t)


@pytest.mark.law(
    2, "the jump from t-1 to t is beta_t",
    source="DDPM eq. 2", tolerance="1e-10: 1 - abar_t/abar_{t-1} rounded at 1e-16, over the smallest beta, 1e-4")
def test_a_single_jump_is_beta():
    schedule = schedules.linear()
    t = np.arange(schedule.T)
    _, sigma2_ts = gaussian.q_step(schedule, t - 1, t)
    np.testing.assert_allclose(sigma2_ts, np.linspace(1e-4, 0.02, 1000), rtol=1e-10)


@pytest.mark.law(
    "2a", "a schedule respaced to t_1 < t_2 < ... has 1 - beta'_i = the product of 1 - beta over (t_{i-1}, t_i]",
    source="Improved DDPM eq. 19; exact fractions", tolerance="1e-9: up to 40 factors 1 - beta, rounded at 1e-16/6e-6")
@few
@given(any_schedule(ends_at_zero=None), st.data())
def test_respaced_jumps_are_products_of_the_steps_between(schedule, data):
    times = data.draw(st.sets(st.integers(0, schedule.T - 1), min_size=1).map(sorted))
    short = schedules.respaced(schedule, data.draw(st.permutations(times)))
    assert short.T == len(times)
    first = 0
    for i, t in enumerate(times):
        jump = math.prod(1 - Fraction(float(beta)) for beta in schedule.betas[first : t + 1])
        assert 1 - short.betas[i] == pytest.approx(float(jump), rel=1e-9, abs=1e-15)
        first = t + 1


# ---- law 3: the tables themselves ----------------------------------------------------------------------------

@pytest.mark.law(
    3, "SNR strictly falls from the clean image on, and every table is finite at every t",
    source="VDM section 3; by the definition of alpha and sigma",
    tolerance="4e-16 for alpha^2 + sigma^2 = 1 (two roundings); the rest exact")
@few
@given(any_schedule(ends_at_zero=None))
def test_snr_strictly_falls_and_every_table_is_finite(schedule):
    t = np.arange(-1, schedule.T)
    assert np.all(np.diff(schedule.abar(t)) < 0)
    assert np.all(np.diff(schedule.snr(t)) < 0)
    assert np.all(np.diff(schedule.log_snr(t)) < 0)
    for table in (schedule.alpha(t), schedule.sigma(t), schedule.betas, schedule.snr(t[1:])):
        assert np.all(np.isfinite(table))
    assert np.all((schedule.betas > 0) & (schedule.betas <= 1))
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=0, atol=4e-16)


@pytest.mark.law(
    3, "SNR = abar/(1 - abar), and its logarithm, at every t",
    source="VDM eq. 2; exact fractions", tolerance="1e-14 for the quotient, 1e-12 for a difference of logarithms")
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


@pytest.mark.law(
    3, "cosine: abar(u) = cos^2((u + offset)/(1 + offset) pi/2), first and last steps included, until "
       "beta is cut at .999",
    source="Improved DDPM eq. 17; by 1 + cos 2a = 2 cos^2 a",
    tolerance="1e-9: a cosine near its zero loses up to 6 digits, over T up to 2000 factors")
@few
@given(st.integers(1, 2000), st.floats(1e-4, 0.1))
def test_cosine_is_a_squared_cosine_until_its_last_beta_is_clipped(T, s):
    """Bugs: abar_0 = 1 and its 0/0 (the clean image is t = -1, so t = 0 has noise already)."""
    schedule = schedules.cosine(T, s, allow_signal=True)
    assert schedule.alpha_bar[0] < 1
    assert schedule.alpha_bar[-1] > 0
    assert schedule.betas.max() <= 0.999 + 1e-12
    assert schedule.betas[-1] == pytest.approx(0.999, rel=1e-9)

    def power(i):                                                  # of the signal at i/T of the way, up to a constant
        return 1 + math.cos(math.pi * (i / T + s) / (1 + s))

    unclipped = [power(t + 1) / power(0) for t in range(T - 1)]
    kept = np.array([1 - power(t + 1) / power(t) < 0.999 for t in range(T - 1)], dtype=bool)
    assert kept.sum() >= T - 2                                     # at most the last two steps are so steep
    np.testing.assert_allclose(schedule.alpha_bar[:-1][kept], np.array(unclipped)[kept], rtol=1e-9)


@pytest.mark.law(
    3, "log_snr_linear: log-SNR falls in equal steps and attains its ends",
    source="VDM, a linear gamma", tolerance="1e-10: log-SNR of 12 is read off 1 - abar = 6e-6, rounded at 1e-16")
@few
@given(st.integers(2, 60), st.floats(-2, 12), st.floats(-20, -3))
def test_log_snr_linear_is_linear_in_log_snr_and_attains_its_ends(T, most, least):
    schedule = schedules.log_snr_linear(T, most, least, allow_signal=True)
    expected = [most + (least - most) * i / (T - 1) for i in range(T)]
    np.testing.assert_allclose(schedule.log_snr(np.arange(T)), expected, rtol=0, atol=1e-10)


@pytest.mark.law(
    3, "a schedule copies its argument and does not change it, and its own tables are read-only",
    source="a contract", tolerance="exact, but 1e-13 for betas through their product")
def test_a_schedule_neither_changes_nor_keeps_what_it_was_given():
    betas = np.linspace(0.1, 0.6, 10)
    table = np.cumprod(1 - betas)
    given_betas, given_table = betas.copy(), table.copy()
    of_betas, of_table = schedules.from_betas(betas), Schedule(table)
    for schedule in (of_betas, of_table):
        schedules.zero_terminal_snr(schedule)
        schedules.respaced(schedule, [1, 9])
        schedule.betas[:] = 7                                      # results are the caller's own
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


# ---- law 4: reaching noise -----------------------------------------------------------------------------------

def kl_by_quadrature(mean1, var1, mean2, var2):
    """E_1[log p_1 - log p_2] at Gauss-Hermite nodes, exact for the quadratic integrand."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    x = mean1 + math.sqrt(var1) * nodes
    gap = norm.logpdf(x, mean1, math.sqrt(var1)) - norm.logpdf(x, mean2, math.sqrt(var2))
    return weights @ gap / weights.sum()


@pytest.mark.law(
    4, "KL(N(m1, v1) || N(m2, v2)) = E_1[log p_1 - log p_2]; 0 between equals",
    source="the definition of KL; Gauss-Hermite quadrature, exact for a quadratic",
    tolerance="1e-9, 1e-11 absolute: terms of up to 2e4 (9/1e-3 and 36/1e-3), rounded at 1e-16, cancel")
@few
@given(pixels, st.floats(1e-3, 9), pixels, st.floats(1e-3, 9))
def test_kl_is_the_expected_log_ratio(mean1, var1, mean2, var2):
    kl = gaussian.kl_gaussian(mean1, var1, mean2, var2)
    assert kl == pytest.approx(kl_by_quadrature(mean1, var1, mean2, var2), rel=1e-9, abs=1e-11)
    assert gaussian.kl_gaussian(mean1, var1, mean1, var1) == 0


@pytest.mark.law(
    4, "L_T = KL(q(x_T|x_0) || N(0, I)) = (abar_T x_0^2 - abar_T - log(1 - abar_T))/2 a pixel; 0 at SNR 0",
    source="DDPM eq. 5; Gauss-Hermite quadrature",
    tolerance="1e-9, 1e-12 absolute: logarithms of order 10, rounded at 1e-16, cancel")
@few
@given(any_schedule(ends_at_zero=None), shapes, seeds)
def test_prior_kl_is_the_expected_log_ratio(schedule, shape, seed):
    x_0 = np.random.default_rng(seed).uniform(-3, 3, size=(2, *shape))
    kl, abar = gaussian.prior_kl(schedule, x_0), schedule.alpha_bar[-1]
    for i in np.ndindex(x_0.shape):
        expected = kl_by_quadrature(math.sqrt(abar) * x_0[i], 1 - abar, 0.0, 1.0)
        assert kl[i] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if abar == 0:
        assert not kl.any()


@pytest.mark.law(
    4, "abar_T <= .02 costs at most .0102 nats a pixel of [-1, 1]",
    source="law 4 at x_0 = +-1; quadrature", tolerance="exact: an inequality")
def test_reaching_noise_means_a_small_prior_kl():
    barely = schedules.Schedule([0.5, schedules.MOST_SIGNAL_AT_THE_END])
    assert barely.reaches_noise
    assert kl_by_quadrature(math.sqrt(0.02), 0.98, 0.0, 1.0) < 0.0102
    assert gaussian.prior_kl(barely, np.array([-1.0, 0.0, 1.0])).max() < 0.0102


@pytest.mark.law(
    4, "DDPM's betas over 200 or 300 steps leave abar_T = .132, .048: refused; scaled to T they reach noise",
    source="DDPM section 4; its betas were made for T = 1000", tolerance="5e-4: the digits quoted")
@pytest.mark.parametrize("T, signal", [(200, 0.132), (300, 0.048)])
def test_a_schedule_that_keeps_signal_is_refused(T, signal):
    with pytest.raises(ValueError, match=f"linear schedule with T = {T} must end in noise.*ends at {signal}"):
        schedules.linear(T)
    meant = schedules.linear(T, allow_signal=True)
    assert not meant.reaches_noise
    assert meant.alpha_bar[-1] == pytest.approx(signal, abs=5e-4)
    assert schedules.linear(T, 0.1 / T, 20 / T).reaches_noise      # the remedy that the message names


@pytest.mark.law(
    4, "abar_T is 4.0e-5 for DDPM, .0047 for Stable Diffusion, 7.3e-4 for its form with DDPM's range",
    source="DDPM, LDM; published numbers", tolerance="1e-3: the digits quoted")
def test_published_numbers():
    """Without the square, the last would be 2.8e-35."""
    assert schedules.linear().alpha_bar[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert schedules.scaled_linear().alpha_bar[-1] == pytest.approx(4.66e-3, rel=1e-3)
    assert schedules.scaled_linear(1000, 1e-4, 0.02).alpha_bar[-1] == pytest.approx(7.334e-4, rel=1e-3)


@pytest.mark.law(4, "every named schedule reaches noise at T = 1000", source="law 4", tolerance="exact: an inequality")
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_named_schedule_reaches_noise(name):
    assert schedule_from(name).reaches_noise
    assert schedule_from(name, 500, allow_signal=True).T == 500


# ---- law 6: continuous time ----------------------------------------------------------------------------------

@pytest.mark.law(
    6, "VP-SDE: alpha_u = exp(-u^2 (beta_max - beta_min)/4 - u beta_min/2), from d log alpha^2 = -beta(u) du",
    source="Score SDE eq. 33; scipy's quadrature of beta(u)", tolerance="1e-10: quadrature of a line, up to 31 in all")
@few
@given(st.integers(1, 30), st.floats(0.05, 1.0), st.floats(2.0, 30.0))
def test_vp_sde_is_the_integral_of_its_rate(T, beta_min, beta_max):
    schedule = schedules.vp_sde(T, beta_min, beta_max, allow_signal=True)
    for t in range(T):
        integral, _ = integrate.quad(lambda u: beta_min + u * (beta_max - beta_min), 0, (t + 1) / T)
        assert schedule.abar(t) == pytest.approx(math.exp(-integral), rel=1e-10)


@pytest.mark.law(
    6, "the chain of T steps with betas beta(u)/T nears the VP-SDE as 1/T",
    source="Score SDE appendix B", tolerance="5 %: the next term of the expansion, at T = 1000 to 4000")
def test_vp_sde_is_the_limit_of_linear():
    gaps = []
    for T in (1000, 2000, 4000):
        chain = schedules.linear(T, 0.1 / T, 20 / T)
        middle = T // 2 - 1                                        # u = 1/2 for every T
        gaps.append(abs(np.log(chain.abar(middle) / schedules.vp_sde(T).abar(middle))))
    assert gaps[2] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


@pytest.mark.law(
    6, "flow matching: x_t/(alpha + sigma) = (1 - u) x_0 + u eps, of velocity eps - x_0; it ends at SNR 0",
    source="Flow matching eq. 20, reversed", tolerance="1e-10: differences over 1/T, rounded at 1e-15 T")
@few
@given(st.integers(2, 50), shapes, seeds)
def test_flow_matching_is_a_straight_path_at_constant_velocity(T, shape, seed):
    schedule, t = schedules.flow_matching(T), np.arange(-1, T)
    x_0, eps = np.broadcast_to(np.random.default_rng(seed).normal(size=(2, 1, *shape)), (2, T + 1, *shape))
    alpha, sigma = alphas_sigmas(schedule, t, x_0)
    path = gaussian.q_sample(schedule, x_0, t, eps) / (alpha + sigma)
    np.testing.assert_array_equal(path[0], x_0[0])
    np.testing.assert_array_equal(path[-1], eps[0])
    np.testing.assert_allclose(np.diff(path, axis=0) * T, (eps - x_0)[1:], rtol=0, atol=1e-10)
    assert schedule.snr(T - 1) == 0


# ---- law 7: the marginals obey the heat equation -------------------------------------------------------------

def around(tau: float, h: float) -> Schedule:
    """Three times with sigma^2 / alpha^2 = tau - h, tau, tau + h."""
    return Schedule(1 / (1 + np.array([tau - h, tau, tau + h])))


@pytest.mark.law(
    7, "y = x_t/alpha has a density with dp/dtau = laplacian(p)/2, tau = sigma^2/alpha^2",
    source="the heat equation; central differences of log_prob, in two dimensions",
    tolerance="1e-5: steps of 1e-3, h^2/12 times a fourth derivative of up to 30, and rounding 1e-16/h^2")
@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 5.0), seeds)
def test_marginals_obey_the_heat_equation(tau, seed):
    h = 1e-3
    schedule, rng = around(tau, h), np.random.default_rng(seed)
    denoiser = random_mixture(schedule, rng)
    y = rng.normal(size=(5, 2))

    def p(y, t):
        alpha = math.sqrt(schedule.alpha_bar[t])
        return alpha**2 * np.exp(denoiser.log_prob(alpha * y, np.full(5, t)))

    by_time = (p(y, 2) - p(y, 0)) / (2 * h)
    laplacian = sum(p(y + e, 1) - 2 * p(y, 1) + p(y - e, 1) for e in h * np.eye(2)) / h**2
    np.testing.assert_allclose(by_time, laplacian / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.law(
    7, "de Bruijn: dh(y)/dtau = J(y)/2, h the entropy and J = E[score^2] the Fisher information",
    source="Stam 1959; Simpson's rule for both, a central difference for dtau",
    tolerance="1e-5: h^2/6 times the third derivative of the entropy, of order tau^-3")
@settings(deadline=None, max_examples=10)
@given(st.floats(0.3, 5.0), seeds)
def test_de_bruijn(tau, seed):
    h = 1e-3
    schedule, rng = around(tau, h), np.random.default_rng(seed)
    denoiser = random_mixture(schedule, rng, shape=(1,))
    grid = np.linspace(-25, 25, 4001)[:, None]
    entropy, fisher = np.zeros(3), np.zeros(3)
    for t in range(3):
        alpha, ts = math.sqrt(schedule.alpha_bar[t]), np.full(len(grid), t)
        log_p = denoiser.log_prob(alpha * grid, ts) + math.log(alpha)
        score = alpha * denoiser.score(alpha * grid, ts)[:, 0]
        entropy[t] = -integrate.simpson(np.exp(log_p) * log_p, x=grid[:, 0])
        fisher[t] = integrate.simpson(np.exp(log_p) * score**2, x=grid[:, 0])
    np.testing.assert_allclose((entropy[2] - entropy[0]) / (2 * h), fisher[1] / 2, rtol=1e-5)
