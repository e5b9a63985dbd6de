"""The posterior (laws 8, 9, 16): the way back from x_t to x_s, where x_0 is known and where it is Gaussian.

Against Bayes' rule at points, quadrature on a grid, exact fractions, and the conditioning of joint covariances.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from support.diffusion_strategies import any_schedule, schedule_and_times, seeds, shapes
from support.law_tools import alpha_sigma, coefficient, covariance, few, matrix_of, one, quickly, rotation

from minidiff.diffusion import gaussian
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.samplers import beta, beta_tilde

pixels = st.floats(-3, 3)


# ---- laws 8 and 9: x_0 is known ------------------------------------------------------------------------------

@pytest.mark.law(
    8, "q(x_s|x_t,x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0), at any three points",
    source="Bayes' rule; densities by scipy",
    tolerance="1e-10 of the terms, which are as large as (x - mean)^2/variance and cancel: 1e-16 over powers of 6e-6")
@few
@given(schedule_and_times(first=0, ends_at_zero=None), shapes, seeds)
def test_bayes_holds_pointwise(drawn, shape, seed):
    schedule, s, t = drawn
    x_0, x_s, x_t = np.random.default_rng(seed).uniform(-3, 3, size=(3, 2, *shape))
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)

    def log_density(x, mean, variance):
        return norm.logpdf(x, mean, np.sqrt(variance))

    left = [log_density(x_s, *gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, s)),
            log_density(x_t, *gaussian.q_mean_variance(schedule, x_0, t))]
    right = [log_density(x_t, alpha_ts * x_s, sigma2_ts),
             log_density(x_s, *gaussian.q_mean_variance(schedule, x_0, s))]
    error = abs(sum(left) - sum(right))
    assert (error <= 1e-10 * (1 + sum(abs(a) for a in left + right))).all()


@pytest.mark.law(
    9, "mean and variance of q(x_s|x_t,x_0), as those of q(x_t|x_s) q(x_s|x_0) over a grid of x_s",
    source="DDPM eq. 6, 7; quadrature on a grid", tolerance="1e-6 of a deviation: 4001 points over 24 deviations")
@few
@given(schedule_and_times(first=0, ends_at_zero=None), pixels, pixels)
def test_posterior_is_the_normalised_product_on_a_grid(drawn, x_0, x_t):
    """The grid is centred on minidiff's posterior mean: if that is wrong, the product's mass lies elsewhere."""
    schedule, s, t = drawn
    abar_s, abar_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
    mean, variance = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), t, s)
    x_s = mean[0] + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    log_p = -((x_t - math.sqrt(abar_t / abar_s) * x_s) ** 2) / (2 * (1 - abar_t / abar_s))
    log_p -= (x_s - math.sqrt(abar_s) * x_0) ** 2 / (2 * (1 - abar_s))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    scale = math.sqrt(variance)
    assert (p @ x_s - mean[0]) / scale == pytest.approx(0, abs=1e-6)
    assert p @ ((x_s - mean[0]) / scale) ** 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.law(
    9, "mu~ = sqrt(abar') beta/(1 - abar) x_0 + sqrt(1 - beta)(1 - abar')/(1 - abar) x_t, "
       "beta~ = (1 - abar')/(1 - abar) beta, abar' that of t-1",
    source="DDPM eq. 6, 7; exact fractions", tolerance="1e-10: 1e-16 over noise powers of 6e-6 or more")
@few
@given(any_schedule(min_T=2, max_T=20, ends_at_zero=None))
def test_posterior_of_one_step_is_ddpm_eq_6_and_7(schedule):
    """The default of s is t-1."""
    t = np.arange(1, schedule.T)
    zero, unit = np.zeros(len(t)), np.ones(len(t))
    of_x0, variance = gaussian.q_posterior_mean_variance(schedule, unit, zero, t)
    of_xt, _ = gaussian.q_posterior_mean_variance(schedule, zero, unit, t)
    for i in range(len(t)):
        previous, abar = (Fraction(float(a)) for a in schedule.alpha_bar[i : i + 2])
        step = 1 - abar / previous
        assert float(variance[i]) == pytest.approx(float((1 - previous) / (1 - abar) * step), rel=1e-10)
        assert of_x0[i] ** 2 == pytest.approx(float(previous * (step / (1 - abar)) ** 2), rel=1e-10)
        expected = (abar / previous) * ((1 - previous) / (1 - abar)) ** 2
        assert of_xt[i] ** 2 == pytest.approx(float(expected), rel=1e-10)
        assert of_x0[i] > 0 and (of_xt[i] > 0 or abar == 0)


@pytest.mark.law(
    9, "the jump to the clean image ends at x_0 with variance 0",
    source="DDPM eq. 7 at alpha_bar_{-1} = 1", tolerance="exact, to the last bit, in every dtype")
@few
@given(any_schedule(ends_at_zero=None), st.data(), pixels, pixels)
def test_the_last_jump_ends_at_x_0_with_no_noise(schedule, data, x_0, x_t):
    t = data.draw(st.integers(0, schedule.T - 1))
    for dtype in (np.float16, np.float32, np.float64):
        x = np.array([x_0], dtype)
        mean, variance = gaussian.q_posterior_mean_variance(schedule, x, np.array([x_t], dtype), t, s=-1)
        assert mean[0] == x[0]
        assert variance == 0
    at_first_step = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), 0)
    assert at_first_step[0][0] == x_0 and at_first_step[1] == 0
    unsigned = gaussian.q_posterior_mean_variance(schedule, one(x_0), one(x_t), np.zeros(1, np.uint8))
    assert unsigned[0][0] == x_0


@st.composite
def schedule_and_three_times(draw):
    """-1 <= r < s < t."""
    schedule, s, t = draw(schedule_and_times(first=0, ends_at_zero=None))
    return schedule, draw(st.integers(-1, s - 1)), s, t


@pytest.mark.law(
    "9a", "given x_0 the way back is a chain: q(x_r|x_t,x_0) = integral q(x_r|x_s,x_0) q(x_s|x_t,x_0) dx_s, r < s < t",
    source="derived: given x_0 the forward process is Markov, and so is its reversal; means and variances "
           "compose, of the code's own jumps",
    tolerance="1e-9: 1e-16 over noise powers of 6e-6 or more, thrice")
@few
@given(schedule_and_three_times(), shapes, seeds)
def test_the_posterior_of_a_long_jump_is_that_of_its_parts(drawn, shape, seed):
    """So a respaced chain is the full chain at fewer times. Bug: the full chain's beta on a respaced one."""
    schedule, r, s, t = drawn
    x_0, x_t = np.random.default_rng(seed).normal(size=(2, 2, *shape))
    mean_s, variance_s = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, s)
    mean_r, variance_r = gaussian.q_posterior_mean_variance(schedule, x_0, mean_s, s, r)
    slope = coefficient(lambda x: gaussian.q_posterior_mean_variance(schedule, one(0.0), x, s, r)[0])
    mean, variance = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, r)
    np.testing.assert_allclose(mean, mean_r, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variance, variance_r + slope**2 * variance_s, rtol=1e-9, atol=1e-15)


# ---- law 16: x_0 is Gaussian ---------------------------------------------------------------------------------

def joint_covariance(schedule, times, S):
    """Of (x_0, x_{times[0]}, x_{times[1]}, ...), times rising, each by a jump from the one before: (n D, n D).

    Every x is a row of matrices: its coefficients of a root of S and of the standard normals of each jump.
    """
    D, n = len(S), len(times) + 1
    values, vectors = np.linalg.eigh(S)
    x = np.zeros((D, n * D))
    x[:, :D] = vectors * np.sqrt(values.clip(0))
    rows = [x]
    for k, (s, t) in enumerate(zip([-1, *times], times, strict=False), start=1):
        kept = (alpha_sigma(schedule, t)[0] / alpha_sigma(schedule, s)[0]) ** 2
        x = math.sqrt(kept) * x
        x[:, k * D : (k + 1) * D] += math.sqrt(1 - kept) * np.eye(D)
        rows.append(x)
    rows = np.concatenate(rows)
    return rows @ rows.T


def conditioned(cov, D):
    """The covariance of all but the last D, these being known."""
    A, B, C = cov[:-D, :-D], cov[:-D, -D:], cov[-D:, -D:]
    return A - B @ np.linalg.solve(C, B.T)


def reverse_step(schedule, mean, S, t, s):
    """x_s|x_t of Gaussian data, from the code: the mean as an affine map (matrix and offset), and the covariance.

    q(x_s|x_t) = integral q(x_s|x_t,x_0) p(x_0|x_t) dx_0, so its covariance is beta~ I + c_0^2 Cov(x_0|x_t); and
    Cov(x_0|x_t) = sigma^2/alpha dx0_hat/dx_t, or S where alpha = 0.
    """
    D, (alpha, sigma) = len(mean), alpha_sigma(schedule, t)
    denoiser = GaussianDenoiser(schedule, mean, S)

    def step(x):
        return gaussian.q_posterior_mean_variance(schedule, denoiser(x, np.full(len(x), t)), x, t, s)[0]

    c_0 = coefficient(lambda x: gaussian.q_posterior_mean_variance(schedule, x, one(0.0), t, s)[0])
    variance = float(gaussian.q_posterior_mean_variance(schedule, one(0.0), one(0.0), t, s)[1])
    jacobian = matrix_of(lambda x: denoiser(x, np.full(len(x), t)), D)
    posterior = S if alpha == 0 else sigma**2 / alpha * jacobian
    return matrix_of(step, D), step(np.zeros((1, D)))[0], variance * np.eye(D) + c_0**2 * posterior


deviations = st.sampled_from(["a point", "unit", "narrow", "wide", "any"])


def gaussian_data(kind, rng, D=3):
    """A full covariance whose deviations are all 0, all 1, below 1, above 1, or anything; and a mean."""
    low, high = {"a point": (0, 0), "unit": (1, 1), "narrow": (0.05, 0.95), "wide": (1.05, 3), "any": (0, 3)}[kind]
    Q = rotation(rng, D)
    return rng.normal(size=D), Q * rng.uniform(low, high, D) ** 2 @ Q.T


@pytest.mark.law(
    16, "Cov(x_s|x_t) = beta~ I + c_0^2 Cov(x_0|x_t); beta~ I for a point of data, beta I at unit covariance",
    source="DDPM section 3.2; law of total covariance, against a joint covariance conditioned by a dense solve",
    tolerance="1e-8 of the largest: a Schur complement cancels; 1e-16 over noise powers of 6e-6, times variances of 9")
@few
@given(schedule_and_times(first=0, ends_at_zero=None), deviations, seeds)
def test_true_reverse_covariance_on_gaussian_data(drawn, kind, seed):
    schedule, s, t = drawn
    mean, S = gaussian_data(kind, np.random.default_rng(seed))
    true = conditioned(joint_covariance(schedule, [s, t], S), 3)[3:, 3:]
    _, _, cov = reverse_step(schedule, mean, S, t, s)
    np.testing.assert_allclose(cov, true, rtol=1e-8, atol=1e-9)
    if kind == "a point":
        np.testing.assert_allclose(true, beta_tilde(schedule, t, s) * np.eye(3), rtol=1e-8, atol=1e-9)
    if kind == "unit":
        np.testing.assert_allclose(true, beta(schedule, t, s) * np.eye(3), rtol=1e-8, atol=1e-9)


@pytest.mark.law(
    16, "H(x_t|x_s) + H(x_s|x_0) - H(x_t|x_0) <= H(x_s|x_t) <= H(x_t|x_s): the lower is tight for a point, "
        "the upper at unit variance, and the upper fails for data wider than the noise",
    source="Sohl-Dickstein et al. 2015, section 2.6; log-determinants of conditioned covariances",
    tolerance="1e-6 nats: a log of variances of 6e-6, known to 1e-9 / 6e-6 at worst, times 3 dimensions")
@few
@given(schedule_and_times(first=0, ends_at_zero=None), deviations, seeds)
def test_sohl_dickstein_entropy_bounds(drawn, kind, seed):
    """An entropy is half the log-determinant, up to a constant that all share. The upper bound needs s^2 <= 1."""
    schedule, s, t = drawn
    _, S = gaussian_data(kind, np.random.default_rng(seed))
    true = np.linalg.slogdet(conditioned(joint_covariance(schedule, [s, t], S), 3)[3:, 3:])[1]
    upper = 3 * math.log(1 - schedule.alpha_bar[t] / schedule.alpha_bar[s])
    lower = upper + 3 * (math.log(1 - schedule.alpha_bar[s]) - math.log(1 - schedule.alpha_bar[t]))
    assert 3 * math.log(beta_tilde(schedule, t, s)) == pytest.approx(lower, abs=1e-9)      # its variance is beta~
    slack = 1e-6
    assert lower <= true + slack
    if kind == "a point":
        assert true == pytest.approx(lower, abs=slack)
    if kind == "unit":
        assert true == pytest.approx(upper, abs=slack)
    if kind == "narrow":
        assert true <= upper + slack
    if kind == "wide":
        assert true >= upper - slack
        # it fails by c_0^2 Cov(x_0|x_t) less what beta has over beta~, per eigendirection of s^2
        s2 = np.linalg.eigvalsh(S)
        abar_s, abar_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
        excess = np.log((abar_s * s2 + 1 - abar_s) / (abar_t * s2 + 1 - abar_t)).sum()      # V_s/V_t > 1
        assert excess > 0
        assert true - upper == pytest.approx(excess, abs=slack)


@pytest.mark.law(
    "16a", "Chapman-Kolmogorov backwards: p(x_r|x_t) = integral p(x_r|x_s) p(x_s|x_t) dx_s on Gaussian data, r < s < t",
    source="derived: the marginal process is Markov in both directions; means and covariances compose, of the "
           "code's own steps",
    tolerance="1e-8: as law 16")
@quickly
@given(schedule_and_three_times(), seeds)
def test_true_reverse_steps_compose(drawn, seed):
    schedule, r, s, t = drawn
    rng = np.random.default_rng(seed)
    mean, S = rng.normal(size=3), covariance(rng, 3)
    M_s, b_s, C_s = reverse_step(schedule, mean, S, t, s)
    M_r, b_r, C_r = reverse_step(schedule, mean, S, s, r)
    M, b, C = reverse_step(schedule, mean, S, t, r)
    np.testing.assert_allclose(M, M_r @ M_s, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(b, M_r @ b_s + b_r, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(C, M_r @ C_s @ M_r.T + C_r, rtol=1e-8, atol=1e-8)


@pytest.mark.law(
    "16b", "the true reverse step carries the marginal of t to that of s: N(alpha_t mu, V_t) to N(alpha_s mu, V_s)",
    source="derived: total mean and covariance", tolerance="1e-8: as law 16")
@quickly
@given(schedule_and_times(ends_at_zero=None), seeds)
def test_true_reverse_steps_map_marginals_to_marginals(drawn, seed):
    schedule, s, t = drawn
    rng = np.random.default_rng(seed)
    mean, S = rng.normal(size=3), covariance(rng, 3)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    M, b, C = reverse_step(schedule, mean, S, t, s)
    np.testing.assert_allclose(M @ (alpha_t * mean) + b, alpha_s * mean, rtol=1e-8, atol=1e-8)
    V_t, V_s = alpha_t**2 * S + sigma_t**2 * np.eye(3), alpha_s**2 * S + sigma_s**2 * np.eye(3)
    np.testing.assert_allclose(M @ V_t @ M.T + C, V_s, rtol=1e-8, atol=1e-8)
