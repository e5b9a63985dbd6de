"""Law 22: the density of the probability-flow ODE, and the derivative of a denoiser that it needs (law 11a)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support import tiny
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import few

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.gaussian import PREDICTIONS, q_sample
from minidiff.diffusion.likelihood import GaussianDensity, Hutchinson, exact_trace, flow_bound, log_prob
from minidiff.diffusion.samplers import times
from minidiff.engine.random import SampleStreams

# ---- law 22: the density of the flow ---------------------------------------------------------------------------

def closed_log_prob(schedule, low, mean, cov, x):
    """The density at `low` that the flow of Gaussian data makes of N(0, I): x moves linearly, by sqrt(V_T / V_low)."""
    values, basis = np.linalg.eigh(cov)
    a, b = schedule.alpha_bar[low], schedule.alpha_bar[-1]
    stretch = np.sqrt((b * values + 1 - b) / (a * values + 1 - a))
    x_T = math.sqrt(b) * mean @ basis + stretch * ((x - math.sqrt(a) * mean) @ basis)
    return stats.norm.logpdf(x_T).sum(1) + np.log(stretch).sum()


@pytest.mark.law(22, "log p_t(x) = log N(x_{T-1}; 0, I) + int div v dphi, exact on Gaussian data",
                 source="Score SDE eq. 39; the flow is linear, its determinant prod sqrt(V_T / V_t)",
                 tolerance="3e-4 nats at 400 steps, and an error that falls as 1/N^2, to 3 %")
@pytest.mark.parametrize("schedule, low", [
    (schedules.cosine(8001), 0), (schedules.cosine(8001), 801),
    (schedules.zero_terminal_snr(schedules.log_snr_linear(8001, 6.0, -6.0)), 0),
    (schedules.log_snr_linear(8001, 5.0, -2.0, allow_signal=True), 0)],    # ends with much signal: the model's density
    ids=["cosine", "from a later time", "to SNR 0", "with signal at the end"])
def test_the_flow_s_density_is_exact_on_gaussians_at_second_order(schedule, low):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(3, 3))
    mean, cov, x = rng.normal(size=3), A @ A.T / 3 + 0.2 * np.eye(3), rng.normal(size=(4, 3))
    denoiser, errors = GaussianDenoiser(schedule, mean, cov), []
    for steps in (100, 200, 400):
        path = np.linspace(schedule.T - 1, low, steps + 1).astype(int)
        errors.append(log_prob(denoiser, x, path) - closed_log_prob(schedule, low, mean, cov, x))
    largest = np.abs(errors).max(axis=1)
    assert largest[2] < 3e-4
    assert largest[:2] / largest[1:] == pytest.approx([4, 4], rel=0.03)
    if schedule.alpha_bar[-1] < 1e-6:                       # then it is the density of the noised data
        a = schedule.alpha_bar[low]
        exact = stats.multivariate_normal(math.sqrt(a) * mean, a * cov + (1 - a) * np.eye(3)).logpdf(x)
        np.testing.assert_allclose(closed_log_prob(schedule, low, mean, cov, x), exact, atol=1e-4)


@pytest.mark.law(22, "log p_t(x) of the flow is the mixture's own log-density",
                 source="Score SDE eq. 39, against the sum of the components' densities",
                 tolerance="3e-4 nats at 600 steps, and an error that falls as 1/N^2, to 3 %; 3e-3 with a "
                           "condition, of up to 82 nats: most points lie far from its one component")
def test_the_flow_s_density_is_exact_on_mixtures():
    schedule = schedules.zero_terminal_snr(schedules.log_snr_linear(4801, 5.0, -10.0))
    rng = np.random.default_rng(1)
    denoiser = MixtureDenoiser(schedule, [0.2, 0.5, 0.3], rng.normal(size=(3, 2)), rng.uniform(0.05, 0.5, size=(3, 2)))
    x, t = rng.normal(size=(20, 2)), np.zeros(20, int)
    errors = np.array([abs(log_prob(denoiser, x, np.linspace(4800, 0, steps + 1).astype(int))
                           - denoiser.log_prob(x, t)).max() for steps in (150, 300, 600)])
    assert errors[2] < 3e-4 and errors[:2] / errors[1:] == pytest.approx([4, 4], rel=0.03)
    only = (np.array([[False, True, False]] * 20),)         # the condition is passed on
    got = log_prob(denoiser, x, np.linspace(4800, 0, 601).astype(int), only)
    np.testing.assert_allclose(got, denoiser.log_prob(x, t, only), atol=3e-3)    # of up to 82 nats


@pytest.mark.law("22a", "log q(x_t|x_0) - log p_t(x_t) - log p(x_0|x_t) = -log p(x_0) on Gaussian data, at every eps",
                 source="Bayes' rule, pointwise: exact dequantisation has no gap",
                 tolerance="2e-3 nats: the ODE's error at 1,000 steps")
@pytest.mark.parametrize("low", [0, 700])
def test_the_flow_s_bound_is_tight_on_gaussians(low):
    schedule, mean, s = schedules.log_snr_linear(2001, 5.0, -14.0), np.array([0.4, -0.2]), np.array([0.5, 1.2])
    denoiser, rng = GaussianDenoiser(schedule, mean, s**2), np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 6, 2))
    a = schedule.alpha_bar[low]
    posterior = s**2 * (1 - a) / (a * s**2 + 1 - a)
    path = np.unique(np.linspace(2000, low, 1001).astype(int))[::-1]
    bound = flow_bound(denoiser, x_0, path, eps=eps, decoder=GaussianDensity(posterior))
    np.testing.assert_allclose(bound.total, -stats.norm.logpdf(x_0, mean, s).sum(1), atol=2e-3)
    x_t = q_sample(schedule, x_0, low, eps)
    np.testing.assert_allclose(bound.decoder, -stats.norm.logpdf(x_0, denoiser(x_t, np.full(6, low)),
                                                                 np.sqrt(posterior)).sum(1), rtol=1e-12)


def test_the_flow_s_bound_passes_on_the_condition_and_the_divergence():
    """A mixture conditioned on one component is a Gaussian. One probe of a rotated Gaussian has a known error."""
    schedule, rng = schedules.log_snr_linear(801, 5.0, -14.0), np.random.default_rng(0)
    means, s = np.array([[0.5, 0.0], [-1.0, 1.0]]), 0.6
    denoiser = MixtureDenoiser(schedule, [0.5, 0.5], means, [s**2, s**2])
    x_0, eps = rng.normal(size=(2, 4, 2))
    posterior = s**2 * (1 - schedule.alpha_bar[0]) / (schedule.alpha_bar[0] * s**2 + 1 - schedule.alpha_bar[0])
    path, decoder = times(schedule, 401, "linspace"), GaussianDensity(posterior)
    bound = flow_bound(denoiser, x_0, path, (np.array([[False, True]] * 4),), eps=eps, decoder=decoder)
    np.testing.assert_allclose(bound.total, -stats.norm.logpdf(x_0, means[1], s).sum(1), atol=1e-2)

    A, path = rng.normal(size=(2, 2)), times(schedule, 20)
    denoiser, probe = GaussianDenoiser(schedule, np.zeros(2), A @ A.T), Hutchinson.draw(SampleStreams(0, 4), x_0)
    flows = [flow_bound(denoiser, x_0, path, eps=eps, decoder=decoder, divergence=d).flow for d in (probe, exact_trace)]
    x_t = q_sample(schedule, x_0, int(path[-1]), eps)
    densities = [log_prob(denoiser, x_t, path, divergence=d) for d in (probe, exact_trace)]
    np.testing.assert_allclose(flows[0] - flows[1], densities[1] - densities[0], rtol=1e-9)
    assert (abs(flows[0] - flows[1]) > 1e-3).all()


class Linear:
    """A denoiser with a Jacobian of our choice: x0_hat = M x, for any M, symmetric or not."""

    predicts = "x0"

    def __init__(self, schedule, M):
        self.schedule, self.M = schedule, M

    def __call__(self, x_t, t, cond=None):
        return (x_t.reshape(len(x_t), -1) @ self.M.T).reshape(x_t.shape)

    def vjp(self, x_t, t, dy, cond=None):
        return self(x_t, t), (dy.reshape(len(dy), -1) @ self.M).reshape(dy.shape)


@pytest.mark.law(22, "E z^T J z = tr J over signs z, with variance sum_{i<j} (J_ij + J_ji)^2: none if J is diagonal",
                 source="Hutchinson 1990; Score SDE eq. 40; all 2^D probes, each once",
                 tolerance="1e-10: sums of 16 and 256 products")
@few
@given(seeds)
def test_hutchinson_s_estimate_over_all_signs(seed):
    M = np.random.default_rng(seed).normal(size=(4, 4))
    schedule, x, t = schedules.cosine(10), np.ones((2, 2, 2)), np.zeros(2, int)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=4))).reshape(16, 1, 2, 2).repeat(2, axis=1)
    for J in (M, np.diag(np.diag(M))):
        denoiser = Linear(schedule, J)
        x0_hat, trace = Hutchinson(signs)(denoiser, x, t)
        np.testing.assert_allclose(trace, np.trace(J), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
        x0_hat, trace = exact_trace(denoiser, x, t)
        np.testing.assert_allclose(trace, np.trace(J), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
        each = np.array([Hutchinson(signs[k:k + 1])(denoiser, x, t)[1][0] for k in range(16)])
        variance = sum((J[i, j] + J[j, i]) ** 2 for i in range(4) for j in range(i))
        np.testing.assert_allclose(each.var(), variance, rtol=1e-10, atol=1e-20)


def test_probes_are_signs_and_each_sample_has_its_own():
    """Their mean over 40,000 is within 5 / sqrt(40,000) of 0: false alarm 6e-7."""
    z = Hutchinson.draw(SampleStreams(3, 4), np.zeros((4, 100, 100), np.float32)).probes
    assert z.shape == (1, 4, 100, 100) and z.dtype == np.float32 and set(np.unique(z)) == {-1, 1}
    assert abs(z.mean()) < 5 / 200
    again = Hutchinson.draw(SampleStreams(3, 4)[1:], np.zeros((3, 100, 100), np.float32), 2).probes
    assert np.array_equal(again[0], z[0, 1:]) and not np.array_equal(again[0], again[1]) and len(again) == 2


@pytest.mark.law(22, "the flow's density with one Hutchinson probe is that with the exact trace, if J is diagonal",
                 source="law 22", tolerance="1e-10: the same sums in another order")
def test_one_probe_is_enough_for_independent_pixels():
    schedule, rng = schedules.cosine(60), np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 2))
    path = times(schedule, 60)
    A = rng.normal(size=(4, 4))
    for cov, same in [(np.diag([0.3, 1.0, 2.0, 0.5]), True), (A @ A.T, False)]:
        denoiser = GaussianDenoiser(schedule, np.zeros((2, 2)), cov)
        exact = log_prob(denoiser, x, path)
        got = log_prob(denoiser, x, path, divergence=Hutchinson.draw(SampleStreams(0, 3), x))
        assert (np.isclose(got, exact, rtol=1e-10) == same).all()


# ---- the derivative that the flow needs ------------------------------------------------------------------------

def by_differences(denoiser, x, t, dy, cond, h):
    """dy^T d x0_hat / d x_t by central differences of fourth order."""
    dx = np.zeros_like(x)
    for i in np.ndindex(x.shape[1:]):
        e = np.zeros_like(x)
        e[(slice(None), *i)] = h
        d = (8 * (denoiser(x + e, t, cond) - denoiser(x - e, t, cond))
             - (denoiser(x + 2 * e, t, cond) - denoiser(x - 2 * e, t, cond))) / (12 * h)
        dx[(slice(None), *i)] = (d * dy).reshape(len(x), -1).sum(1)
    return dx


def some_denoisers(schedule, rng):
    A = rng.normal(size=(4, 4))
    yield GaussianDenoiser(schedule, rng.normal(size=(2, 2)), A @ A.T), None
    yield GaussianDenoiser(schedule, rng.normal(size=(2, 2)), rng.uniform(0.1, 2, size=(2, 2))), None
    mixture = MixtureDenoiser(schedule, rng.dirichlet(np.ones(3)), rng.normal(size=(3, 2, 2)),
                              rng.uniform(0.05, 1, size=(3, 2, 2)))
    yield mixture, None
    yield mixture, (np.array([[True, False, True]] * 3),)
    yield DatasetDenoiser(schedule, rng.normal(size=(5, 2, 2))), None


@pytest.mark.law("11a", "dy^T d E[x_0|x_t] / d x_t = alpha/sigma^2 Cov[x_0|x_t] dy", source="Tweedie, differentiated; "
                 "central differences of fourth order with h = sigma / 1000",
                 tolerance="1e-6 of alpha/sigma times the data's size: 1e-16 / h of rounding, h^4 of truncation")
@few
@given(any_schedule(ends_at_zero=None), seeds)
def test_vjp_of_the_exact_denoisers(schedule, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 3)
    x_0, eps, dy = rng.normal(size=(3, 3, 2, 2))
    x_t, sigma = q_sample(schedule, x_0, t, eps), schedule.sigma(t)
    for denoiser, cond in some_denoisers(schedule, rng):
        x0_hat, dx_t = denoiser.vjp(x_t, t, dy, cond)
        np.testing.assert_allclose(x0_hat, denoiser(x_t, t, cond), rtol=1e-12, atol=1e-12)
        expected = by_differences(denoiser, x_t, t, dy, cond, 1e-3 * sigma.min())
        np.testing.assert_allclose(dx_t, expected, rtol=1e-6, atol=1e-6 / sigma.min())
        assert denoiser.vjp(x_t.astype(np.float32), t, dy.astype(np.float32), cond)[1].dtype == np.float32


@few
@given(any_schedule(), st.sampled_from(PREDICTIONS), seeds)
def test_vjp_of_a_network_whatever_it_predicts(schedule, predicts, seed):
    """Of out = tanh(M x + t), whose derivative is (1 - out^2) M; M is not symmetric."""
    rng = np.random.default_rng(seed)
    M, x, dy = rng.normal(size=(3, 3)), *rng.normal(size=(2, 4, 3))
    t = rng.integers(0, schedule.T, 4)

    def network(x_t, t, cond):
        return np.tanh(x_t @ M.T + t[:, None] / schedule.T)

    def network_vjp(x_t, t, dy, cond):
        out = network(x_t, t, cond)
        return out, ((1 - out**2) * dy) @ M
    denoiser = NetworkDenoiser(schedule, predicts, network, network_vjp=network_vjp)
    x0_hat, dx_t = denoiser.vjp(x, t, dy)
    np.testing.assert_allclose(x0_hat, denoiser(x, t), rtol=1e-12)
    expected = by_differences(denoiser, x, t, dy, None, 1e-3)
    np.testing.assert_allclose(dx_t, expected, rtol=1e-8, atol=1e-8 * abs(expected).max())


def test_vjp_of_the_text_to_image_network():
    """In float64, at random weights, against central differences in 3 random directions, sample by sample."""
    model = tiny.trained_a_little().astype(np.float64)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 28, 28, 1))
    t, cond = np.array([0, 20, 49]), model.encode(["a bold seven", "", "3"])
    denoiser = model.unguided()
    x0_hat, dx = denoiser.vjp(x, t, dy, cond)
    np.testing.assert_allclose(x0_hat, denoiser(x, t, cond), rtol=1e-10, atol=1e-12)
    for _ in range(3):
        e = 1e-4 * rng.normal(size=x.shape)
        d = (8 * (denoiser(x + e, t, cond) - denoiser(x - e, t, cond))
             - (denoiser(x + 2 * e, t, cond) - denoiser(x - 2 * e, t, cond))) / 12
        np.testing.assert_allclose((dx * e).sum((1, 2, 3)), (d * dy).sum((1, 2, 3)), rtol=1e-6, atol=1e-10)
    assert all(p.grad is None for p in model.parameters().values())
