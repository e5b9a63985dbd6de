"""Multiplying a reverse chain by r(x): against exact conditioning, on Gaussians, where every chain is a linear map."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad, solve_ivp
from support.law_tools import Noise, fitted_order

from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.posterior import Nudged, Observed, posterior, reconstruction
from minidiff.diffusion.samplers import beta_tilde, ddpm, sample
from minidiff.diffusion.schedules import cosine, linear, log_snr_linear
from minidiff.engine.random import SampleStreams


def moments(denoiser, factor, D, **options):
    """Mean and covariance of what the chain ends at, exactly: it is affine in x_T and in each step's noise."""
    T = denoiser.schedule.T
    inputs = D * T                                          # x_T, and T-1 noises
    x_T = np.zeros((1 + inputs, D))
    x_T[1:1 + D] = np.eye(D)

    def noise(k):                                           # the k-th draw: ones for rows 1 + k D ... alone
        z = np.zeros((1 + inputs, D))
        z[1 + k * D:1 + (k + 1) * D] = np.eye(D)
        return z
    out = sample(posterior(denoiser, x_T, list(range(T))[::-1], factor, streams=Noise(len(x_T), given=noise),
                           **options))
    columns = out[1:] - out[0]
    return out[0], columns.T @ columns


S = np.array([[1.3, 0.8, -0.2], [0.8, 0.9, 0.1], [-0.2, 0.1, 0.4]])
MU, Y, KNOWN, NOISE = np.array([0.3, -0.2, 0.1]), np.array([1.1, -0.4, 0.0]), np.array([True, False, True]), 0.2


def conditioned():
    """Mean and covariance of x_0 ~ N(MU, S) given Y = x_0 + noise at the known coordinates."""
    H = np.eye(3)[KNOWN]
    gain = S @ H.T @ np.linalg.inv(H @ S @ H.T + NOISE * np.eye(2))
    return MU + gain @ H @ (Y - MU), S - gain @ H @ S


def test_it_converges_to_exact_conditioning_with_order_1_in_beta():
    """r_t(x_t) = E[r(x_0) | x_t], known here.  The order of 1/T, which beta is proportional to, measured over T."""
    H = np.eye(3)[KNOWN]
    errors = []
    for T in (32, 64, 128, 256):
        schedule = log_snr_linear(T, log_snr_max=12, log_snr_min=-16)
        denoiser = GaussianDenoiser(schedule, MU, S)

        def grad(x, s, schedule=schedule, denoiser=denoiser):
            # r_s(x) = N(y; x0_hat(x), Cov[x_0 | x] + noise) at the known coordinates
            a, b = schedule.abar(s), 1 - schedule.abar(s)
            C = S - a * S @ np.linalg.inv(a * S + b * np.eye(3)) @ S
            t = np.full(len(x), s)
            pull = (Y - denoiser(x, t)) @ H.T @ np.linalg.inv(H @ C @ H.T + NOISE * np.eye(2)) @ H
            return denoiser.vjp(x, t, pull)[1]
        mean, cov = moments(denoiser, Nudged(grad), 3)
        true_mean, true_cov = conditioned()
        errors.append(abs(mean - true_mean).max() + abs(cov - true_cov).max())
    assert errors[-1] < 0.05
    assert fitted_order(errors, (32, 64, 128, 256)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("v", [0.3, 2.0])
def test_the_same_r_for_all_t_counts_the_observation_twice(v):
    """p = N(0, 1), r(x_t) = N(y; x_t, v).  The reverse process in the limit is dx = -(x/2 + (x - y)/v) beta + noise of
    power beta, an Ornstein-Uhlenbeck process around y / (1 + v/2), of variance v / (2 + v); exact are y / (1 + v) and
    v / (1 + v)."""
    # small betas to the end, so that the last state is the stationary one
    denoiser = GaussianDenoiser(linear(1500, 0.01, 0.004), np.zeros(1), np.ones(1))
    mean, cov = moments(denoiser, Nudged(lambda x, s: (1.7 - x) / v), 1,
                        variance=lambda schedule, t, s: float(schedule.betas[t]))
    assert mean[0] == pytest.approx(1.7 / (1 + v / 2), rel=0.02)
    assert cov[0, 0] == pytest.approx(v / (2 + v), rel=0.02)
    assert abs(mean[0] - 1.7 / (1 + v)) > 0.1


def test_a_product_of_gaussians_against_their_densities():
    schedule, grid = log_snr_linear(10), np.linspace(-6, 6, 4001)
    y, noise, s = 0.7, 0.15, 4
    a, b = schedule.abar(s), 1 - schedule.abar(s)
    factor = Observed(schedule, np.array([[y]]), np.array([[True]]), noise)
    mean, var = factor(np.array([[-0.4]]), np.array([[0.3]]), s)
    product = stats.norm.pdf(grid, -0.4, math.sqrt(0.3))
    product *= stats.norm.pdf(grid, math.sqrt(a) * y, math.sqrt(a * noise + b))
    product /= product.sum()
    assert mean.item() == pytest.approx((product * grid).sum(), abs=1e-9)
    assert var.item() == pytest.approx((product * grid**2).sum() - mean.item() ** 2, abs=1e-9)


def test_observed_is_exact_in_the_limit_of_wide_data():
    """Its r_t is E[r | x_t] under a flat p: here the data have a deviation of 100, and the noise 0.5."""
    errors = []
    for T in (100, 200, 400):
        denoiser = GaussianDenoiser(log_snr_linear(T, 14, -24), np.zeros(1), np.full(1, 1e4))
        mean, cov = moments(denoiser, Observed(denoiser.schedule, Y[:1], np.array([True]), 0.25), 1)
        errors.append(abs(mean[0] - Y[0]) + abs(cov[0, 0] - 0.25))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.05


def test_without_noise_known_values_stay_and_hidden_ones_follow_the_model():
    denoiser = GaussianDenoiser(log_snr_linear(20), np.zeros(4), np.array([1., 2, 0.5, 0.1]))   # independent pixels
    known, y = np.array([True, False, True, False]), np.array([[0.3, 9, -0.6, 9]])
    x_T, path = SampleStreams(0, 5).normal((4,), np.float64), range(19, -1, -1)
    x_0 = sample(posterior(denoiser, x_T, path, Observed(denoiser.schedule, y, known), streams=SampleStreams(1, 5)))
    free = sample(ddpm(denoiser, x_T, path, streams=SampleStreams(1, 5)))
    np.testing.assert_array_equal(x_0[:, known], np.broadcast_to(y[:, known], (5, 2)))
    np.testing.assert_array_equal(x_0[:, ~known], free[:, ~known])


def test_nothing_known_is_the_sampler_itself():
    denoiser = GaussianDenoiser(log_snr_linear(12), MU, S)
    x_T, nothing = SampleStreams(0, 3).normal((3,), np.float64), np.zeros(3, bool)
    expected = sample(ddpm(denoiser, x_T, [11, 7, 2], streams=SampleStreams(1, 3)))
    for factor in (Observed(denoiser.schedule, Y, nothing), reconstruction(denoiser, Y, nothing),
                   Nudged(lambda x, s: np.zeros_like(x))):
        got = sample(posterior(denoiser, x_T, [11, 7, 2], factor, streams=SampleStreams(1, 3), variance=beta_tilde))
        np.testing.assert_array_equal(got, expected)


def test_reconstruction_is_the_exact_gradient_on_unit_gaussians_and_conditions_exactly():
    errors = []
    for T in (64, 128, 256):
        denoiser = GaussianDenoiser(log_snr_linear(T, 12, -16), np.zeros(2), np.ones(2))
        factor = reconstruction(denoiser, Y[:2], KNOWN[:2], NOISE)
        x, s = np.array([[0.4, 0.9]]), T // 2
        a = denoiser.schedule.abar(s)
        # p(x_t, y) is Gaussian: y | x_t ~ N(alpha x_t, sigma^2 + noise)
        expected = math.sqrt(a) * (Y[0] - math.sqrt(a) * 0.4) / (1 - a + NOISE)
        np.testing.assert_allclose(factor.grad_log_r(x, s), [[expected, 0]], rtol=1e-12)
        mean, cov = moments(denoiser, factor, 2)
        errors.append(abs(mean - [Y[0] / (1 + NOISE), 0]).max() + abs(cov - np.diag([NOISE / (1 + NOISE), 1])).max())
    assert fitted_order(errors, (64, 128, 256)) == pytest.approx(1, abs=0.1)


# ---- two correlated numbers, the first known: both choices of r are biased, by known amounts ------------------

def limit_of_observed(rho: float) -> tuple[float, float]:
    """Mean and variance of the hidden number, a = 1, in the limit of small beta: of the reverse process in u = alpha^2,
    u dx/du = x/2 - V^-1 x + (sqrt(u) - x_1, 0) / (1 - u) + noise,  V = I but for u rho beside the diagonal, solved
    from its resting point at u = 0."""
    def slopes(u, z):
        m, C = z[:2], z[2:].reshape(2, 2)
        A = np.eye(2) / 2 - np.linalg.inv([[1, u * rho], [u * rho, 1]]) - np.diag([1 / (1 - u), 0])
        return np.concatenate([A @ m + [math.sqrt(u) / (1 - u), 0], (A @ C + C @ A.T + np.eye(2)).ravel()]) / u
    u = 1e-8
    z = solve_ivp(slopes, (u, 1 - 1e-7), [math.sqrt(u) / 2, 0, 1 / 3, 0, 0, 1], "LSODA", rtol=1e-8, atol=1e-10).y[:, -1]
    return z[1], z[5]


def limit_of_reconstruction(rho: float) -> tuple[float, float]:
    """The same by the martingale that posterior.py names: a - E X = D(u), in closed form; the rest is quadrature."""
    def c(u):
        return (1 - rho**2 * u) / (1 - rho**2 * u**2)

    def d(u):
        return rho * (1 - u) / (1 - rho**2 * u**2)

    def D(u):                                               # exp(-integral of (c^2 + d^2) / (1 - u)), over 1 - u
        w = 1 - rho**2 * u**2
        return math.exp(-rho**2 * u * (1 - u) / w) / math.sqrt(w)

    def K(u):                                               # what E Y still gains after u
        return quad(lambda v: 2 * c(v) * d(v) * D(v), u, 1)[0]

    def variance(u):                                        # noise in X is answered by -R of itself in Y
        R = K(u) / (D(u) * (1 - u))
        return (c(u)**2 + d(u)**2) * (1 + R**2) - 4 * c(u) * d(u) * R
    return K(0), quad(variance, 0, 1)[0]


def hidden(schedule, rho: float, which) -> tuple[float, float]:
    denoiser = GaussianDenoiser(schedule, np.zeros(2), np.array([[1, rho], [rho, 1]]))
    y, known = np.array([1.0, 0]), np.array([True, False])
    mean, cov = moments(denoiser, which(denoiser, y, known), 2)
    return mean[1], cov[1, 1]


def observed(denoiser, y, known):
    return Observed(denoiser.schedule, y, known)


@pytest.mark.parametrize("rho", [0.8, -0.5])
@pytest.mark.parametrize("which, limit", [(observed, limit_of_observed), (reconstruction, limit_of_reconstruction)])
def test_on_correlated_data_both_have_a_known_bias(which, limit, rho):
    """The error falls as 1/T to the limit, which is not that of conditioning; two T give it by extrapolation."""
    Ts, limits = (64, 128, 256), np.array(limit(rho))
    found = np.array([hidden(cosine(T), rho, which) for T in Ts])
    for k in range(2):
        assert fitted_order(abs(found[:, k] - limits[k]), Ts) == pytest.approx(1, abs=0.15)
    np.testing.assert_allclose(2 * found[2] - found[1], limits, atol=1.5e-3)
    # nor is it the schedule's doing
    other = [np.array(hidden(log_snr_linear(T, 12, -12), rho, which)) for T in (128, 256)]
    np.testing.assert_allclose(2 * other[1] - other[0], limits, atol=8e-3)
    # too little is heard, and too much freedom left
    assert 0 < limits[0] / rho < 1 and 1 - rho**2 < limits[1] < 1


def test_the_biases_that_the_docstring_states():
    for which, limit, at_256, ever in ((observed, limit_of_observed, (0.365, 0.577), (0.369, 0.586)),
                                       (reconstruction, limit_of_reconstruction, (0.760, 0.372), (0.763, 0.380))):
        np.testing.assert_allclose(hidden(cosine(256), 0.8, which), at_256, atol=6e-4)
        np.testing.assert_allclose(limit(0.8), ever, atol=6e-4)


def test_of_a_weak_correlation_observed_keeps_a_third_and_reconstruction_all():
    """The hidden mean over rho.  To first order it is for Observed the integral of u p, sqrt(u) p being the known
    one's mean, u p = 1 + (1 - u) log(1 - u) / u: 2 - pi^2/6; for reconstruction that of 2 c d / rho = 2 (1 - u): 1."""
    for which, share in ((observed, 2 - math.pi**2 / 6), (reconstruction, 1)):
        half, whole = (hidden(cosine(T), 1e-3, which)[0] / 1e-3 for T in (128, 256))
        assert 2 * whole - half == pytest.approx(share, abs=1e-3)


def test_refusals():
    denoiser = GaussianDenoiser(log_snr_linear(4), MU, S)
    with pytest.raises(TypeError, match="known must be an array of booleans"):
        Observed(denoiser.schedule, Y, np.ones(3))
    with pytest.raises(ValueError, match="noise must be a finite number of at least 0, not -1"):
        reconstruction(denoiser, Y, KNOWN, -1)
    with pytest.raises(ValueError, match="streams must be one for each of the 2 samples, not 3"):
        list(posterior(denoiser, np.zeros((2, 3)), [3, 1], None, streams=SampleStreams(0, 3)))
    with pytest.raises(ValueError, match="times must be integers that fall strictly within 3..0"):
        list(posterior(denoiser, np.zeros((2, 3)), [1, 3], None, streams=SampleStreams(0, 2)))
