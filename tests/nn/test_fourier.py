"""Fourier features: their periods on the levels of grey, how they fade in noise, and their derivative."""

import numpy as np
import pytest
from support.gradcheck import check_gradients
from support.law_tools import LEVELS

from minidiff.engine.tensor import Tensor
from minidiff.nn.fourier import FINEST, fourier_features


def of(x, n: list[int], sigma=0.0) -> np.ndarray:
    """(B, 1 + 2 N) of numbers x (B,)."""
    x = np.asarray(x, np.float64).reshape(-1, 1, 1, 1)
    return fourier_features(Tensor(x), np.full(len(x), sigma), n).data[:, 0, 0]


@pytest.mark.parametrize("n", [0, 3, 7, 8])
def test_a_wave_repeats_after_2_to_the_8_minus_n_levels_and_not_before(n):
    period = 2 ** (FINEST - n)
    waves = of(LEVELS, [n])[:, 1:]
    np.testing.assert_allclose(waves[period:], waves[:-period], atol=1e-9)
    if period > 1:
        assert np.abs(waves[period // 2:] - waves[:-(period // 2)]).max() > 1.9     # half a period: the opposite
        assert len(np.unique(waves[:period].round(9), axis=0)) == period
    between = of(LEVELS[:-1] + 1 / 255, [FINEST])[:, 1:]    # and the finest tells where between levels x is
    assert np.abs(between - of(LEVELS[:-1], [FINEST])[:, 1:]).max() > 1.9


def test_noise_fades_a_wave_by_the_mean_that_it_leaves():
    """E sin(f (x + sigma eps)) = exp(-(f sigma)^2 / 2) sin(f x): by 40 nodes of Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    for n, sigma in ((2, 0.05), (4, 0.03), (8, 0.001)):
        noisy = of(0.3 + sigma * nodes, [n])
        np.testing.assert_allclose(weights @ noisy / weights.sum(), of([0.3], [n], sigma)[0], atol=1e-9)
    assert np.abs(of([0.3], [2, 8], 1.0)[0, 1:]).max() < 1e-9


def test_the_channels_are_x_then_sines_then_cosines_of_each_sample_s_noise():
    x = np.random.default_rng(0).normal(size=(2, 3, 1, 2))
    sigma = np.array([0.0, 0.02])
    y = fourier_features(Tensor(x), sigma, [1, 4]).data
    assert y.shape == (2, 3, 1, 10)
    np.testing.assert_array_equal(y[..., :2], x)
    for b in range(2):
        for i, n in enumerate((1, 4)):
            f = np.pi * 2**n * 255 / 256
            for j, wave in ((1 + i, np.sin), (3 + i, np.cos)):
                np.testing.assert_allclose(y[b, ..., 2 * j:2 * j + 2], np.exp(-(f * sigma[b])**2 / 2) * wave(f * x[b]))


def test_its_derivative_and_no_waves():
    rng = np.random.default_rng(0)
    check_gradients(lambda x: fourier_features(x, np.array([0.0, 0.05]), [0, 2, 5]), rng.normal(size=(2, 1, 2, 3)))
    x = rng.normal(size=(2, 2, 2, 1)).astype(np.float32)
    y = fourier_features(Tensor(x), np.ones(2), [])
    assert y.dtype == np.float32 and np.array_equal(y.data, x)
