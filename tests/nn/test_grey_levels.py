"""eps_hat by Bayes' rule over levels: against the exact posterior, its derivatives, fine noise in float32."""

import numpy as np
import pytest
from scipy import special
from support.gradcheck import check_gradients
from support.law_tools import LEVELS

from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.tensor import Tensor
from minidiff.nn.grey_levels import eps_of_levels


def alpha_sigma(gamma) -> tuple[np.ndarray, np.ndarray]:
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt(special.expit(-gamma)), np.sqrt(special.expit(gamma))


@pytest.mark.law("14a", "eps_hat = sum_k p_k e_k is E[eps | x_t] of a pixel whose level k has the prior exp(logit_k)",
                 source="Bayes; compares with the data-set denoiser of levels as data, each as often as its prior says",
                 tolerance="1e-6: x_0 over a sigma of .01")
@pytest.mark.parametrize("gamma", [-9.0, -2.0, 3.0])
def test_it_is_the_exact_answer_for_independent_pixels(gamma):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, 256)
    counts[0] = 40
    exact = DatasetDenoiser(Schedule(special.expit([-gamma])), np.repeat(LEVELS, counts)[:, None])
    (alpha,), (sigma,) = alpha_sigma([gamma])
    x_t = alpha * LEVELS[rng.choice(np.flatnonzero(counts), 50)][:, None] + sigma * rng.normal(size=(50, 1))
    expected = (x_t - alpha * exact(x_t, np.zeros(50, int))) / sigma
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(counts), -1e4)
    got = eps_of_levels(Tensor(np.tile(logits, (50, 1, 1))), Tensor(x_t), *alpha_sigma(np.full(50, gamma)))
    np.testing.assert_allclose(got.data, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("K", [2, 5])
def test_its_derivatives(K):
    rng = np.random.default_rng(K)
    alpha, sigma = alpha_sigma(rng.uniform(-3, 2, 2))
    logits, x_t = rng.normal(size=(2, 2, 1, 2, K)), rng.normal(size=(2, 2, 1, 2))
    check_gradients(lambda logits, x_t: eps_of_levels(logits, x_t, alpha, sigma), logits, x_t)


def test_at_fine_noise_eps_is_right_in_float32():
    """A sixth of a level of noise: the level is certain, and x_t is magnified 775 times (2^-24 / .0013 = 5e-5)."""
    rng = np.random.default_rng(0)
    gamma, levels = np.full(100, -13.3), LEVELS.astype(np.float32)
    alpha, sigma = alpha_sigma(gamma)
    eps = rng.standard_normal((100, 1)).clip(-1, 1).astype(np.float32)
    x_t = (alpha[:, None] * levels[rng.integers(0, 256, (100, 1))] + sigma[:, None] * eps).astype(np.float32)
    logits = rng.normal(size=(100, 1, 256)).astype(np.float32)
    got = eps_of_levels(Tensor(logits), Tensor(x_t), alpha, sigma)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.data, eps, atol=0.01)    # the next level, 6 sigma away, has e^-(5^2 - 1^2)/2
    even = eps_of_levels(Tensor(0 * logits), Tensor(x_t), alpha, sigma)
    np.testing.assert_allclose(even.data, eps, atol=3e-4)
    huge = eps_of_levels(Tensor(1e4 * logits), Tensor(x_t), alpha, sigma)
    assert np.isfinite(huge.data).all()


@pytest.mark.parametrize("logits, x_t", [
    (np.zeros((2, 3, 4)), np.zeros((2, 4))), (np.zeros((2, 3, 1)), np.zeros((2, 3))),
    (np.zeros((2, 3, 4), np.float32), np.zeros((2, 3))),
    (np.zeros((2, 3, 4), np.float16), np.zeros((2, 3), np.float16))])
def test_other_arrays_are_refused(logits, x_t):
    with pytest.raises(ValueError, match="logits must be those of at least two levels for each number of x_t"):
        eps_of_levels(Tensor(logits), Tensor(x_t), np.ones(2), np.ones(2))
