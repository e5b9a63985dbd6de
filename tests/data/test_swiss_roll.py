"""The roll's mean, variance and density."""

import numpy as np
import pytest
from scipy import integrate, stats

from minidiff.data import swiss_roll


def test_its_coordinates_have_mean_0_and_variance_1_exactly():
    """By adaptive quadrature along the roll, where the module has a sum."""
    for power, expected in ((1, 0), (2, 1 - 0.3**2)):
        for i in (0, 1):
            got = integrate.quad(lambda u: swiss_roll._curve(np.array([u]), 0.3)[0, i] ** power, 0, 1)[0]  # noqa: B023
            assert got == pytest.approx(expected, abs=1e-6)


def test_points_follow_the_density():
    """Shares of 20,000 points in a 12 x 12 grid of cells against the density's integral over each: chi squared."""
    noise, x = 0.2, swiss_roll.points(np.random.default_rng(0), 20_000, 0.2)
    assert x.dtype == np.float32
    edges, fine = np.linspace(-3, 3, 13), 4
    middles = (np.arange(12 * fine) + 0.5) / (2 * fine) - 3
    grid = np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1).reshape(-1, 2)
    p = np.exp(swiss_roll.log_prob(grid, noise)) / (2 * fine) ** 2
    assert p.sum() == pytest.approx(1, abs=1e-3)
    p = p.reshape(12, fine, 12, fine).sum((1, 3))
    counts = np.histogram2d(*x.T, bins=[edges, edges])[0]
    used = p * len(x) > 5
    chi2 = ((counts - p * len(x)) ** 2 / (p * len(x)))[used].sum()
    assert chi2 < stats.chi2.isf(1e-7, used.sum())          # a false alarm in 10^7


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_the_density_is_the_integral_along_the_roll(u):
    """At its ends, too, where a shift of the sum's points would show: by adaptive quadrature."""
    noise, x = 0.3, swiss_roll._curve(np.array([u]), 0.3)

    def density(v):
        return stats.multivariate_normal(swiss_roll._curve(np.array([v]), noise)[0], noise**2).pdf(x[0])
    exact = integrate.quad(density, 0, 1, points=[u], epsabs=1e-12, limit=200)[0]
    assert swiss_roll.log_prob(x, noise)[0] == pytest.approx(np.log(exact), abs=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="noise must lie between 0 and 1"):
        swiss_roll.points(np.random.default_rng(0), 3, 1.0)
    with pytest.raises(ValueError, match=r"x must be points \(B, 2\), not \(3,\)"):
        swiss_roll.log_prob(np.zeros(3))
