"""Embedding spaces: spherical interpolation, principal components, and codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidiff.nn.embedding_codes import PCA, Buckets, Quantiles, slerp

seeds = st.integers(0, 2**32 - 1)


def unit_rows(rng, n: int, D: int) -> np.ndarray:
    a = rng.normal(size=(n, D))
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle, from the length of the chord and not from the cosine."""
    return 2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1))


# ---- slerp ---------------------------------------------------------------------------------------------------

@given(seeds, st.integers(2, 70), st.integers(2, 9))
def test_slerp_moves_on_the_sphere_by_equal_angles(seed, D, n):
    a, b = unit_rows(np.random.default_rng(seed), 2, D)
    way = slerp(np.tile(a, (n, 1)), np.tile(b, (n, 1)), np.linspace(0, 1, n))
    np.testing.assert_allclose(way[0], a, atol=1e-7)
    np.testing.assert_allclose(way[-1], b, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 1, atol=1e-7)
    np.testing.assert_allclose(angles(way[:-1], way[1:]), angles(a, b) / (n - 1), atol=1e-6)


@given(seeds)
def test_slerp_is_the_rotation_in_the_plane_of_its_ends(seed):
    """Independently: e1 = a, e2 = b made orthogonal to a; the path is cos(theta w) e1 + sin(theta w) e2."""
    rng = np.random.default_rng(seed)
    a, b = unit_rows(rng, 2, 5)
    e2 = b - (a @ b) * a
    e2, w, theta = e2 / np.linalg.norm(e2), np.arctan2(np.linalg.norm(e2), a @ b), rng.uniform()
    expected = np.cos(theta * w) * a + np.sin(theta * w) * e2
    np.testing.assert_allclose(slerp(a, b, theta), expected, atol=1e-6)


def test_slerp_between_parallel_vectors_is_linear_and_float32_stays_float32():
    a = np.array([[0.6, 0.8]], np.float32)
    way = slerp(a, 3 * a, np.array([0.25]))
    assert way.dtype == np.float32
    np.testing.assert_allclose(way, 1.5 * a, rtol=1e-6)


def test_slerp_between_two_noises_is_noise():
    """Two independent N(0, I) in many dimensions are nearly orthogonal, and each point between them is N(0, I) too."""
    a, b = np.random.default_rng(0).normal(size=(2, 20000))
    for theta in (0.2, 0.5, 0.9):
        # the variance of 20000 numbers: its standard error is .01, and .06 are 6 of them (2e-9)
        assert slerp(a, b, theta).var() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("a, b, says", [
    (np.ones(3), np.ones(4), "one shape"), (np.zeros(3), np.ones(3), "direction"),
    (np.ones(3), np.full(3, np.nan), "direction"), (np.ones(3), -np.ones(3), "opposite")])
def test_slerp_refuses_vectors_without_a_shortest_path(a, b, says):
    with pytest.raises(ValueError, match=says):
        slerp(a, b, 0.5)


# ---- PCA -----------------------------------------------------------------------------------------------------

@given(seeds, st.integers(1, 7))
def test_the_error_of_pca_is_the_sum_of_the_eigenvalues_left_out(seed, K):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(40, 7)) @ rng.normal(size=(7, 7)) + rng.normal(size=7)
    pca = PCA(7, K)
    values = pca.fit(z)
    # independent: singular values of the centred data
    singular = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(values, singular**2 / 40, rtol=1e-6, atol=1e-9)
    error = ((z - pca.restore(pca.reduce(z))) ** 2).sum(axis=1).mean()
    assert error == pytest.approx((singular[K:] ** 2).sum() / 40, rel=1e-3, abs=1e-5 * values[0])
    # the components are uncorrelated, of the variances said, largest first
    y = pca.reduce(z)
    np.testing.assert_allclose(np.cov(y, rowvar=False, bias=True).reshape(K, K), np.diag(values[:K]),
                               atol=1e-4 * values[0])


@given(seeds)
def test_no_other_axes_leave_a_smaller_error(seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(30, 6)) * rng.uniform(0.1, 3, 6)
    pca = PCA(6, 2)
    pca.fit(z)
    others, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    centred = z - z.mean(axis=0)

    def error(axes):
        return ((centred - centred @ axes @ axes.T) ** 2).sum()
    assert error(pca.axes.data) <= error(others) * (1 + 1e-5)


# ---- codes ---------------------------------------------------------------------------------------------------

@given(seeds, st.integers(1, 70), st.integers(1, 5))
def test_the_error_of_a_code_is_at_most_half_a_bucket(seed, count, K):
    rng = np.random.default_rng(seed)
    y = (rng.normal(size=(50, K)) * rng.uniform(0.01, 100, K) + rng.normal(size=K)).astype(np.float32)
    buckets = Buckets(K, count)
    buckets.fit(y)
    codes = buckets.quantise(y)
    assert codes.min() >= 0 and codes.max() <= count - 1
    width = (y.max(axis=0) - y.min(axis=0)) / count
    slack = 1e-5 * np.abs(y).max(axis=0)                    # float32
    assert (np.abs(buckets.dequantise(codes) - y) <= width / 2 + slack).all()
    # the middle of a bucket has that bucket's code, and codes rise with the number
    every = np.tile(np.arange(count)[:, None], (1, K))
    np.testing.assert_array_equal(buckets.quantise(buckets.dequantise(every)), every)
    assert (np.diff(np.take_along_axis(codes, y.argsort(axis=0), axis=0), axis=0) >= 0).all()


def test_values_outside_the_range_get_the_last_bucket_and_constants_come_back_exactly():
    buckets = Buckets(2, 8)
    buckets.fit(np.array([[0, 5], [1, 5]], np.float32))
    np.testing.assert_array_equal(buckets.quantise(np.array([[-9, 5], [9, 5]], np.float32)), [[0, 0], [7, 0]])
    np.testing.assert_array_equal(buckets.dequantise(np.array([[0, 3]]))[:, 1], [5])


@given(seeds, st.integers(1, 10))
def test_quantiles_hold_equally_many_and_their_upper_half_lies_above_the_median(seed, half):
    numbers = np.random.default_rng(seed).normal(size=400 * half).astype(np.float32)
    quantiles = Quantiles(2 * half)
    quantiles.fit(numbers)
    codes = quantiles.quantise(numbers)
    np.testing.assert_allclose(np.bincount(codes, minlength=2 * half), 200, atol=2)
    median = np.sort(numbers)[len(numbers) // 2]
    assert (numbers[codes >= half] >= median - 1e-6).all() and (numbers[codes < half] <= median).all()


@pytest.mark.parametrize("call", [
    lambda: PCA(4, 5), lambda: PCA(4, 0), lambda: PCA(4, 2).fit(np.ones((3, 5))),
    lambda: PCA(4, 2).fit(np.ones((0, 4))),
    lambda: Buckets(0, 4), lambda: Buckets(3, 0), lambda: Quantiles(1)])
def test_refusals(call):
    with pytest.raises(ValueError):
        call()
