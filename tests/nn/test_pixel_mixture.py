"""v_hat by Bayes' rule over black, white and between: against quadrature, its derivatives, and its ends in float32."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.pixel_mixture import v_of_mixture


def x0_hat_of(numbers, x_t, alpha, sigma) -> np.ndarray:
    """The estimate of x_0 that v_hat stands for: x0_hat = alpha x_t - sigma v_hat."""
    return alpha * x_t - sigma * v_of_mixture(Tensor(numbers), Tensor(x_t), np.array([alpha]), np.array([sigma])).data


def exact_mean(numbers, x_t, alpha, sigma) -> float:
    """E[x_0 | x_t] of one pixel, where "between" is integrated numerically."""
    black, white, m, s2 = numbers
    m, s = np.tanh(m), np.sqrt(special.expit(s2))

    def normal(x, mean, std):
        return np.exp(-((x - mean) / std) ** 2 / 2) / (std * np.sqrt(2 * np.pi))

    def likelihood(x_0):
        return normal(x_t, alpha * x_0, sigma)
    peak = (m / s**2 + alpha * x_t / sigma**2) / (1 / s**2 + alpha**2 / sigma**2)
    width = 12 / np.sqrt(1 / s**2 + alpha**2 / sigma**2)
    zero, one = (integrate.quad(of, peak - width, peak + width, points=[peak], epsabs=0, epsrel=1e-10, limit=200)[0]
                 for of in (lambda x: normal(x, m, s) * likelihood(x), lambda x: x * normal(x, m, s) * likelihood(x)))
    black, white = np.exp(black) * likelihood(-1), np.exp(white) * likelihood(1)
    return (one - black + white) / (zero + black + white)


@pytest.mark.law("14a", "x0_hat is E[x_0 | x_t] of a pixel that is black, white, or normal between",
                 source="Bayes; compares with quadrature", tolerance="1e-6: quadrature to 1e-10")
@settings(max_examples=40)
@given(st.floats(-4, 4), st.floats(-4, 4), st.floats(-1.5, 1.5), st.floats(-5, 3), st.floats(-1.5, 1.5),
       st.floats(0.05, 1.5))
def test_it_is_the_exact_mean(black, white, m, s2, x_0, angle):
    alpha, sigma = np.cos(angle), np.sin(angle)
    x_t = alpha * x_0 + 0.3 * sigma
    got = x0_hat_of(np.array([[black, white, m, s2]]), np.array([[x_t]]), alpha, sigma)
    assert got[0, 0] == pytest.approx(exact_mean((black, white, m, s2), x_t, alpha, sigma), abs=1e-6)


@pytest.mark.parametrize("C", [1, 3])
def test_its_derivatives(C):
    rng = np.random.default_rng(C)
    alpha, sigma = (f(rng.uniform(0.3, 1.4, 2)) for f in (np.cos, np.sin))
    out, x_t = rng.normal(size=(2, 2, 1, 4 * C)), rng.normal(size=(2, 2, 1, C))
    check_gradients(lambda out, x_t: v_of_mixture(out, x_t, alpha, sigma), out, x_t)


def test_fine_noise_is_removed_in_float32_without_a_word_of_the_network():
    """x_t is magnified 1/sigma times in v.  At sigma = .006 the share of "between" in a black pixel is at most
    sigma / s e^(eps^2 / 2) = .06, of an x0 that is at most 2 sigma off; a grey pixel keeps its value, x_t / alpha."""
    sigma, rng = 0.006, np.random.default_rng(0)
    alpha, eps = np.sqrt(1 - sigma**2), rng.standard_normal((1, 300)).clip(-2, 2)
    silent = np.zeros((1, 1200), np.float32)                # equal shares, m = 0, s^2 = 1/2
    for x_0 in (-1, 1, 0.3):
        x_t = (alpha * x_0 + sigma * eps).astype(np.float32)
        seen = x0_hat_of(silent, x_t, np.float32(alpha), np.float32(sigma))
        assert seen.dtype == np.float32
        np.testing.assert_allclose(seen, x0_hat_of(silent.astype(float), x_t.astype(float), alpha, sigma), atol=1e-6)
        if x_0 == 0.3:
            np.testing.assert_allclose(seen, x_t / alpha, atol=2 * sigma**2)
        else:
            np.testing.assert_allclose(seen, x_0, atol=0.06 * 2 * sigma)


def test_pure_noise_says_nothing_so_the_prior_s_mean_is_the_answer():
    out = np.array([[0.0, 0.0, 0.7, 0.0]])
    np.testing.assert_allclose(x0_hat_of(out, np.array([[1.3]]), 0.0, 1.0), [[np.tanh(0.7) / 3]], rtol=1e-12)


def test_huge_numbers_of_a_network_stay_finite():
    for out in np.array(np.meshgrid(*[[-2000, 2000]] * 4), np.float32).reshape(4, -1).T:
        out = Tensor(out[None], requires_grad=True)
        y = v_of_mixture(out, Tensor(np.float32([[0.9]])), np.array([0.99998]), np.array([0.006]))
        assert np.isfinite(y.data).all() and np.isfinite(gradients(y, [out], np.ones_like(y.data))[0]).all()


@pytest.mark.parametrize("out, x_t", [
    (np.zeros((2, 3, 4)), np.zeros((2, 3, 2))), (np.zeros((2, 4, 4)), np.zeros((2, 3, 1))), (np.zeros(4), np.zeros(1)),
    (np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 1))),
    (np.zeros((2, 3, 4), np.float16), np.zeros((2, 3, 1), np.float16))])
def test_other_arrays_are_refused(out, x_t):
    with pytest.raises(ValueError, match="out must have 4 numbers for each number of x_t"):
        v_of_mixture(Tensor(out), Tensor(x_t), np.ones(2), np.ones(2))


def test_no_noise_is_refused():
    with pytest.raises(ValueError, match="sigma must be positive, for v_hat is divided by it, not 0"):
        v_of_mixture(Tensor(np.zeros((2, 4))), Tensor(np.zeros((2, 1))), np.ones(2), np.array([0.1, 0.0]))
