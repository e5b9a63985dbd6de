"""The exact denoisers against quadrature, finite differences and linear algebra; thresholds."""

import math

import numpy as np
import pytest
from diffusion_strategies import any_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import (
    DatasetDenoiser,
    GaussianDenoiser,
    MixtureDenoiser,
    NetworkDenoiser,
    dynamic_threshold,
    static_threshold,
)
from minidiff.diffusion.gaussian import PREDICTIONS, q_sample, target
from minidiff.diffusion.schedules import Schedule

seeds = st.integers(0, 2**32 - 1)
quickly = settings(deadline=None, max_examples=30)


def random_mixture(schedule, rng, K=3, shape=(2,), diagonal=True):
    weights = rng.dirichlet(np.full(K, 3.0))
    variances = rng.uniform(0.05, 1.5, size=(K, *shape) if diagonal else K)
    return MixtureDenoiser(schedule, weights, rng.normal(size=(K, *shape)), variances)


def gradient(f, x, h=1e-4):
    """Central differences of fourth order: f maps (B, D) to (B, ...); the result is (B, ..., D)."""
    def shifted(i, k):
        step = np.zeros(x.shape[1])
        step[i] = k * h
        return f(x + step)
    return np.stack([(8 * (shifted(i, 1) - shifted(i, -1)) - (shifted(i, 2) - shifted(i, -2))) / (12 * h)
                     for i in range(x.shape[1])], axis=-1)


# ---- laws 11 to 14: what the exact denoisers say -----------------------------------------------------------

@quickly
@given(any_schedule(), seeds)
def test_gaussian_denoiser_is_the_conditional_mean_of_a_joint_gaussian(schedule, seed):
    """Law 12. The reference conditions the joint covariance of (x_0, x_t) with a dense solve."""
    rng = np.random.default_rng(seed)
    D, B = 3, 4
    A = rng.normal(size=(D, D))
    mean, cov, x = rng.normal(size=D), A @ A.T, rng.normal(size=(B, D)) * 2
    t = rng.integers(0, schedule.T, size=B)
    x0_hat = GaussianDenoiser(schedule, mean, cov)(x, t)
    diagonal = GaussianDenoiser(schedule, mean, np.diag(cov))(x, t)
    for b in range(B):
        a = math.sqrt(schedule.alpha_bar[t[b]])
        noise = (1 - schedule.alpha_bar[t[b]]) * np.eye(D)
        for S, got in [(cov, x0_hat[b]), (np.diag(np.diag(cov)), diagonal[b])]:
            expected = mean + a * S @ np.linalg.solve(a * a * S + noise, x[b] - a * mean)
            np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=10)
@given(any_schedule(min_T=2), seeds)
def test_mixture_denoiser_is_the_posterior_mean_by_quadrature(schedule, seed):
    """Law 13: E[x_0 | x_t] is integral x_0 p(x_0) p(x_t | x_0) / integral p(x_0) p(x_t | x_0), by Simpson."""
    rng = np.random.default_rng(seed)
    denoiser = random_mixture(schedule, rng, shape=(1,))
    t, x = int(rng.integers(0, schedule.T)), rng.normal()
    alpha, sigma = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])

    grid = np.linspace(-12, 12, 200_001)
    prior = sum(math.exp(w) * stats.norm.pdf(grid, m[0], math.sqrt(v[0]))
                for w, m, v in zip(denoiser.log_weights, denoiser.means, denoiser.variances, strict=True))
    joint = prior * stats.norm.pdf(x, alpha * grid, sigma)
    evidence = integrate.simpson(joint, x=grid)
    x_t, ts = np.array([[x]]), np.array([t])
    np.testing.assert_allclose(denoiser(x_t, ts)[0, 0], integrate.simpson(grid * joint, x=grid) / evidence,
                               rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(denoiser.log_prob(x_t, ts)[0], math.log(evidence), rtol=1e-6, atol=1e-8)


@quickly
@given(any_schedule(), seeds, st.booleans())
def test_tweedie_first_and_second_order(schedule, seed, conditional):
    """Law 11, with scores and Jacobians by finite differences of log_prob and of the denoiser.

    Second order: Cov[x_0 | x_t] = sigma^2/alpha dE[x_0|x_t]/dx_t, from the law of total covariance.
    """
    rng = np.random.default_rng(seed)
    d = random_mixture(schedule, rng)
    B = 3
    x, t = rng.normal(size=(B, 2)), rng.integers(0, schedule.T, size=B)
    cond = (np.array([[True, False, True]] * B),) if conditional else None
    alpha, sigma = np.sqrt(schedule.alpha_bar[t])[:, None], np.sqrt(1 - schedule.alpha_bar[t])[:, None]
    h = 1e-3 * sigma.min()

    score = gradient(lambda y: d.log_prob(y, t, cond), x, h)
    np.testing.assert_allclose(d.score(x, t, cond), score, rtol=1e-5, atol=1e-5 / sigma.min())
    np.testing.assert_allclose(alpha * d(x, t, cond), x + sigma**2 * score, rtol=1e-5, atol=1e-6)

    r = d.posterior(x, t, cond)                                                       # (B, K)
    V = alpha[:, None] ** 2 * d.variances + sigma[:, None] ** 2                       # (B, K, D)
    means = d.means + alpha[:, None] * d.variances / V * (x[:, None] - alpha[:, None] * d.means)
    within = np.einsum("bk,bkd->bd", r, d.variances * sigma[:, None] ** 2 / V)[:, :, None] * np.eye(2)
    between = np.einsum("bk,bkd,bke->bde", r, means, means)
    centre = np.einsum("bk,bkd->bd", r, means)
    cov = within + between - centre[:, :, None] * centre[:, None, :]
    jacobian = gradient(lambda y: d(y, t, cond), x, h)
    sigma2, alpha = (sigma**2)[:, :, None], alpha[:, :, None]
    np.testing.assert_allclose(sigma2 * jacobian, alpha * cov, rtol=1e-5, atol=1e-6)


@quickly
@given(any_schedule(), seeds)
def test_responsibilities_sum_to_one_and_their_gradients_to_zero(schedule, seed):
    """Law 13: sum_k r_k = 1, hence sum_k r_k grad log r_k = 0."""
    rng = np.random.default_rng(seed)
    d = random_mixture(schedule, rng)
    x, t = rng.normal(size=(3, 2)), rng.integers(0, schedule.T, size=3)
    h = 1e-3 * math.sqrt(1 - schedule.alpha_bar[0])
    r = d.posterior(x, t)
    np.testing.assert_allclose(r.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(gradient(lambda y: d.posterior(y, t), x, h).sum(1), 0, atol=1e-7)
    # Bayes: r_k = w_k p(x | k) / p(x), each density by scipy
    for b in range(3):
        a, s2 = math.sqrt(schedule.alpha_bar[t[b]]), 1 - schedule.alpha_bar[t[b]]
        log_p = d.log_weights + [stats.norm.logpdf(x[b], a * m, np.sqrt(a * a * v + s2)).sum()
                                 for m, v in zip(d.means, d.variances, strict=True)]
        np.testing.assert_allclose(np.log(r[b]), log_p - np.logaddexp.reduce(log_p), rtol=1e-8, atol=1e-8)
        # a condition that allows one component leaves that component's own density, of integral 1
        only_1 = (np.array([[False, True, False]]),)
        np.testing.assert_allclose(d.log_prob(x[b:b + 1], t[b:b + 1], only_1), log_p[1] - d.log_weights[1],
                                   rtol=1e-8, atol=1e-8)


@quickly
@given(any_schedule(ends_at_zero=None), seeds)
def test_dataset_denoiser_is_attention_over_the_data(schedule, seed):
    """Law 14: against the plain softmax of distances, one sample and one datum at a time."""
    rng = np.random.default_rng(seed)
    data, B = rng.uniform(-1, 1, size=(7, 3, 2)), 4
    t = rng.integers(0, schedule.T, size=B)
    x = q_sample(schedule, data[:B], t, rng.normal(size=(B, 3, 2)))
    x0_hat = DatasetDenoiser(schedule, data)(x, t)
    for b in range(B):
        a, s2 = math.sqrt(schedule.alpha_bar[t[b]]), 1 - schedule.alpha_bar[t[b]]
        logits = np.array([-((x[b] - a * datum) ** 2).sum() / (2 * s2) for datum in data])
        weights = np.exp(logits - logits.max())
        expected = np.tensordot(weights / weights.sum(), data, 1)
        np.testing.assert_allclose(x0_hat[b], expected, rtol=1e-7, atol=1e-9)


def test_dataset_denoiser_is_finite_at_image_size_and_finds_the_image():
    schedule = schedules.linear()
    rng = np.random.default_rng(0)
    data = np.sign(rng.normal(size=(50, 28, 28, 1))).astype(np.float32)
    t = np.array([0, 10, 300])
    x_t = q_sample(schedule, data[:3], t, rng.normal(size=(3, 28, 28, 1)).astype(np.float32))
    x0_hat = DatasetDenoiser(schedule, data)(x_t, t)
    assert x0_hat.dtype == np.float32
    np.testing.assert_allclose(x0_hat, data[:3], atol=1e-6)


@quickly
@given(any_schedule(ends_at_zero=True), seeds)
def test_at_zero_snr_the_answer_is_the_mean_of_the_data(schedule, seed):
    rng = np.random.default_rng(seed)
    mean, data = rng.normal(size=2), rng.normal(size=(5, 2))
    x, t = rng.normal(size=(1, 2)) * 3, np.array([schedule.T - 1])
    mixture = random_mixture(schedule, rng)
    for denoiser, expected in [(GaussianDenoiser(schedule, mean, np.array([0.3, 2])), mean),
                               (DatasetDenoiser(schedule, data), data.mean(0)),
                               (mixture, np.exp(mixture.log_weights) @ mixture.means)]:
        np.testing.assert_allclose(denoiser(x, t)[0], expected, rtol=1e-12, atol=1e-12)


# ---- law 7: the marginals obey the heat equation -----------------------------------------------------------

def around(tau: float, h: float) -> Schedule:
    """Three times with sigma^2 / alpha^2 = tau - h, tau, tau + h."""
    return Schedule(1 / (1 + np.array([tau - h, tau, tau + h])))


@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 5.0), seeds)
def test_marginals_obey_the_heat_equation(tau, seed):
    """Law 7: y = x_t / alpha has a density p, dp/dtau = p''/2, tau = sigma^2 / alpha^2; by differences."""
    h = 1e-3
    schedule, rng = around(tau, h), np.random.default_rng(seed)
    denoiser = random_mixture(schedule, rng, shape=(1,))
    y = rng.normal(size=(5, 1))

    def p(y, t):
        alpha = math.sqrt(schedule.alpha_bar[t])
        return alpha * np.exp(denoiser.log_prob(alpha * y, np.full(5, t)))

    by_time = (p(y, 2) - p(y, 0)) / (2 * h)
    by_space = (p(y + h, 1) - 2 * p(y, 1) + p(y - h, 1)) / h**2
    np.testing.assert_allclose(by_time, by_space / 2, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.floats(0.3, 5.0), seeds)
def test_de_bruijn(tau, seed):
    """Law 7: dh/dtau = J/2, the entropy by quadrature of log_prob, the Fisher information of the score."""
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


# ---- the network wrapper -----------------------------------------------------------------------------------

@quickly
@given(any_schedule(), st.sampled_from(PREDICTIONS), seeds)
def test_a_network_that_predicts_its_target_returns_x_0(schedule, predicts, seed):
    rng = np.random.default_rng(seed)
    x_0, eps = rng.uniform(-1, 1, size=(2, 3, 4, 2, 1))
    t = rng.integers(0, schedule.T, size=3)
    denoiser = NetworkDenoiser(schedule, predicts, lambda _, t, cond: target(schedule, predicts, x_0, eps, t))
    worst = 1 / math.sqrt(schedule.alpha_bar[-1])                  # eps is divided by alpha
    np.testing.assert_allclose(denoiser(q_sample(schedule, x_0, t, eps), t), x_0, atol=1e-13 * worst)


@quickly
@given(any_schedule(ends_at_zero=None), seeds)
def test_v_prediction_is_the_preconditioning_of_unit_gaussian_data(schedule, seed):
    """Law 17 in VP form: on N(0, 1) data inputs and targets have unit variance and no correlation, so that a
    network that says nothing, v = 0, is already the optimal denoiser alpha x_t."""
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(4, 2)), rng.integers(0, schedule.T, size=4)
    silent = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: np.zeros_like(x_t))
    exact = GaussianDenoiser(schedule, np.zeros(2), np.eye(2))
    np.testing.assert_allclose(silent(x, t), exact(x, t), rtol=1e-12, atol=1e-12)
    # the maps are linear: their matrix [d x_t, d v] / [d x_0, d eps] must be orthogonal, whatever the noise
    one, zero, last = np.ones((1, 1)), np.zeros((1, 1)), t[:1]
    M = np.array([[f(one, zero), f(zero, one)] for f in (
        lambda x_0, eps: q_sample(schedule, x_0, last, eps)[0, 0],
        lambda x_0, eps: target(schedule, "v", x_0, eps, last)[0, 0])])
    np.testing.assert_allclose(M @ M.T, np.eye(2), atol=1e-14)


def test_the_network_sees_x_t_t_and_cond_and_is_clipped_last():
    schedule = schedules.linear(10, beta_max=0.9)
    seen = []
    x_t, t, cond = np.full((2, 3), 5.0), np.array([3, 4]), (np.arange(2),)
    denoiser = NetworkDenoiser(schedule, "x0", lambda *a: seen.append(a) or 3 * a[0], clip=static_threshold)
    np.testing.assert_array_equal(denoiser(x_t, t, cond), np.ones((2, 3)))
    assert seen[0][0] is x_t and seen[0][1] is t and seen[0][2] is cond


def test_eps_prediction_at_zero_snr_is_refused_before_it_makes_infinities():
    schedule = schedules.zero_terminal_snr(schedules.linear())
    with pytest.raises(ValueError, match="predicts='eps'.*use 'v' or 'x0'"):
        NetworkDenoiser(schedule, "eps", lambda x_t, t, cond: x_t)
    with pytest.raises(ValueError, match="predicts must be one of"):
        NetworkDenoiser(schedule, "epsilon", lambda x_t, t, cond: x_t)


# ---- law 32: thresholds ------------------------------------------------------------------------------------

@quickly
@given(seeds, st.floats(0.1, 1.0), st.floats(0.01, 20.0))
def test_dynamic_threshold_is_bounded_and_the_identity_inside(seed, percentile, scale):
    """Law 32: identity on [-1, 1] (so that its threshold is at least 1), bounded, one threshold a sample."""
    rng = np.random.default_rng(seed)
    inside = rng.uniform(-1, 1, size=(3, 4, 4, 1)).astype(np.float32) * np.float32(rng.uniform(0.01, 1))
    np.testing.assert_array_equal(dynamic_threshold(inside, percentile), inside)
    wild = (scale * rng.normal(size=(3, 4, 4, 1))).astype(np.float32)
    out = dynamic_threshold(wild, percentile)
    assert out.dtype == np.float32 and abs(out).max() <= 1
    for b in range(3):                                             # each against its own sorted values
        ranked = np.sort(abs(wild[b].ravel()).astype(np.float64))
        s = max(1, np.interp(percentile * 15, np.arange(16), ranked))
        np.testing.assert_allclose(out[b], np.maximum(-s, np.minimum(wild[b], s)) / s, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(dynamic_threshold(wild[b:b + 1], percentile)[0], out[b])


def test_static_threshold_clips_and_latents_are_left_alone():
    x = np.array([[-3.0, -0.5, 0.25, 2.0]])
    np.testing.assert_array_equal(static_threshold(x), [[-1, -0.5, 0.25, 1]])
    latent = NetworkDenoiser(schedules.linear(), "x0", lambda x_t, t, cond: x_t)
    np.testing.assert_array_equal(latent(x, np.array([0])), x)


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, sentence", [
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.zeros(3)), "cov must have mean's shape"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.array([[1.0, 2], [0, 1]])), "symmetric"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.array([1.0, -1])), "no negative variance"),
    (lambda s: MixtureDenoiser(s, [0.5, 0.4], np.zeros((2, 1)), np.ones(2)), "weights must be 2 positive"),
    (lambda s: MixtureDenoiser(s, [0.5, 0.5], np.zeros((2, 1)), np.ones(3)), "variances must be"),
    (lambda s: DatasetDenoiser(s, np.zeros((0, 2))), "data must be"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((1, 3)), np.array([0])), "x_t must be"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((2, 2)), np.array([0])), "t must be 2"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((1, 2)), np.array([-1])), "t must be"),
    (lambda s: MixtureDenoiser(s, [1.0], np.zeros((1, 1)), np.ones(1))(
        np.zeros((1, 1)), np.array([0]), (np.array([[False]]),)), "cond must be"),
    (lambda s: dynamic_threshold(np.zeros((1, 1)), 99.5), "percentile must be a fraction"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(schedules.linear())
