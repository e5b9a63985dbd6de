"""Gumbel noise: Gumbel-max draws from the softmax, and its relaxation has the limits and gradients that it should."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor
from minidiff.nn.gumbel import gumbel, gumbel_max, gumbel_softmax, kl_to_uniform

FALSE_ALARM = 1e-7                                          # of each statistical test
LOGITS = np.array([1.5, 0.0, -1.0, 0.3, 2.0])


def some_logits(shape):
    return hnp.arrays(np.float64, shape, elements=st.floats(-6, 6))


def test_the_noise_is_gumbels():
    g = gumbel(np.random.default_rng(0), (50_000,))
    assert g.dtype == np.float32 and np.isfinite(g).all()
    assert scipy.stats.kstest(g, scipy.stats.gumbel_r.cdf).pvalue > FALSE_ALARM


def test_a_draw_of_zero_gives_finite_noise():
    class Zeros:
        def standard_exponential(self, shape, dtype):
            return np.zeros(shape, dtype)
    assert np.isfinite(gumbel(Zeros(), (3,))).all()


def test_gumbel_max_draws_with_the_softmaxs_probabilities():
    """Chi-square with 4 degrees of freedom over 50,000 draws; false alarms: 1e-7."""
    n = 50_000
    g = gumbel(np.random.default_rng(1), (n, 5))
    seen = np.bincount(gumbel_max(np.broadcast_to(LOGITS, g.shape), g), minlength=5)
    assert scipy.stats.chisquare(seen, n * scipy.special.softmax(LOGITS)).pvalue > FALSE_ALARM


@settings(max_examples=50, deadline=None)
@given(some_logits((3, 5)), st.floats(0.05, 20), st.integers(0, 2**32))
def test_the_relaxed_sample_is_a_probability_vector_whose_largest_entry_is_the_sample(logits, tau, seed):
    g = gumbel(np.random.default_rng(seed), (3, 5)).astype(np.float64)
    y = gumbel_softmax(Tensor(logits), g, tau).data
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-12)
    drawn = gumbel_max(logits, g)
    assert (y[np.arange(3), drawn] == y.max(axis=1)).all()


def test_at_low_temperature_it_is_one_hot_and_at_high_temperature_uniform():
    g = gumbel(np.random.default_rng(2), (100, 5)).astype(np.float64)
    logits = np.broadcast_to(LOGITS, g.shape)
    cold = gumbel_softmax(Tensor(logits), g, 1e-12).data
    assert np.array_equal(cold, np.eye(5)[gumbel_max(logits, g)])
    # y_k = 1/K + (s_k - mean s)/(K tau) + O(1/tau^2),   s = l + g: so far from uniform, and no farther
    tau, s = 1e5, logits + g
    first = 1 / 5 + (s - s.mean(axis=1, keepdims=True)) / (5 * tau)
    np.testing.assert_allclose(gumbel_softmax(Tensor(logits), g, tau).data, first, atol=1e-7)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_of_two_codes_it_is_the_logistic_of_a_logistic(tau):
    """K = 2: y_0 = sigmoid((l_0 - l_1 + s)/tau), s = g_0 - g_1 logistic (Maddison et al. 2017, eq. 16).
    Kolmogorov-Smirnov over 20,000 draws; false alarms: 1e-7."""
    g = gumbel(np.random.default_rng(3), (20_000, 2)).astype(np.float64)
    y = gumbel_softmax(Tensor(np.broadcast_to([0.7, -0.2], g.shape)), g, tau).data[:, 0]
    def cdf(y):
        return scipy.stats.logistic.cdf(tau * scipy.special.logit(y) - 0.9)
    assert scipy.stats.kstest(y, cdf).pvalue > FALSE_ALARM


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_with_equal_logits_every_code_has_the_same_mean(tau):
    """E y_k = 1/K at every temperature, by symmetry.  0 <= y <= 1 gives a spread of at most 1/2: the mean of n = 20,000
    lies within 5.5/(2 sqrt(n)) of 1/K, with false alarms below 4e-7 for all 4 of them (normal, and Hoeffding's bound
    is 2e-6)."""
    n, K = 20_000, 4
    g = gumbel(np.random.default_rng(4), (n, K)).astype(np.float64)
    y = gumbel_softmax(Tensor(np.full((n, K), 3.0)), g, tau).data
    np.testing.assert_allclose(y.mean(axis=0), 1 / K, atol=5.5 / (2 * np.sqrt(n)))


def test_gradients_pass_through_the_draw():
    rng = np.random.default_rng(5)
    logits, g = rng.standard_normal((2, 3, 5)), rng.gumbel(size=(2, 3, 5))
    for tau in (0.4, 1.0, np.array([0.3, 2.0])[:, None, None]):
        check_gradients(lambda x, tau=tau: gumbel_softmax(x, g, tau), logits)


def test_each_row_has_its_own_temperature():
    rng = np.random.default_rng(6)
    logits, g = rng.standard_normal((2, 5)), rng.gumbel(size=(2, 5))
    y = gumbel_softmax(Tensor(logits), g, np.array([[0.5], [3.0]])).data
    for i, tau in enumerate((0.5, 3.0)):
        np.testing.assert_allclose(y[i], scipy.special.softmax((logits[i] + g[i]) / tau), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(some_logits((2, 3, 7)))
def test_the_kl_to_uniform_is_log_k_less_the_entropy(logits):
    expected = np.log(7) - scipy.stats.entropy(scipy.special.softmax(logits, axis=-1), axis=-1)
    np.testing.assert_allclose(kl_to_uniform(Tensor(logits)).data, expected, rtol=1e-9, atol=1e-12)


def test_the_ends_of_the_kl():
    assert kl_to_uniform(Tensor(np.full(8, 2.5))).data == pytest.approx(0, abs=1e-12)
    sure = Tensor(np.array([0, 1e4, 0, 0], np.float32))
    assert kl_to_uniform(sure).data == pytest.approx(np.log(4), rel=1e-6)


def test_the_gradient_of_the_kl():
    check_gradients(kl_to_uniform, np.random.default_rng(7).standard_normal((3, 5)))


def test_wrong_arguments_are_refused():
    l, g = Tensor(np.zeros((2, 3), np.float32)), np.zeros((2, 3), np.float32)  # noqa: E741
    for tau in (0, -1.0, float("nan"), np.array([1.0, 0.0])[:, None]):
        with pytest.raises(ValueError, match="tau must be above 0"):
            gumbel_softmax(l, g, tau)
    with pytest.raises(ValueError, match=r"g must be of the logits' shape \(2, 3\), not \(3,\)"):
        gumbel_softmax(l, g[0], 1.0)
    with pytest.raises(ValueError, match="g must be of"):
        gumbel_max(l.data, g.T)
