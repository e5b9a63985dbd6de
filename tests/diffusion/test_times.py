"""The times of training batches: their distribution, by exact counts and by chi-squared tests, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.diffusion_strategies import seeds
from support.law_tools import quickly

from minidiff.diffusion.times import stratified_uniform, training_times

POWERS = st.sampled_from([1, 1 / 2, 1 / 3, 0.7])


@pytest.mark.law(
    "20a", "t = floor(T u^power) has P(t < k) = (k/T)^(1/power); stratified: of B times, B (k/T)^(1/power) are below "
           "k, rounded up or down",
    source="VDM appendix I.1; B points spaced by 1/B have floor or ceil of B x in [0, x)",
    tolerance="less than 1 time of the B; 1e-9 more for rounding: exact counts, no false alarm")
@quickly
@given(seeds, st.integers(1, 200), st.integers(1, 60), POWERS)
def test_stratified_times_cover_the_density_evenly(seed, B, T, power):
    """Bugs: u^(1/power); T - 1 times; independent u."""
    t = training_times(np.random.default_rng(seed), B, T, power)
    assert t.shape == (B,) and t.dtype == np.int64 and t.min() >= 0 and t.max() < T
    for k in range(T + 1):
        assert abs((t < k).sum() - B * (k / T) ** (1 / power)) < 1 + 1e-9


@pytest.mark.law(
    "20a", "independent times, of any shape, have the same distribution; each stratified one has it alone",
    source="the difference of P(t < k + 1) and P(t < k), k = 0 .. T-1; 40,000 draws",
    tolerance="chi-squared test at 1e-8: false alarm 8e-8 for eight cases")
@pytest.mark.parametrize("seed", [5])
@pytest.mark.parametrize("power", [1, 1 / 2, 1 / 3, 0.7])
@pytest.mark.parametrize("stratified", [False, True])
def test_every_single_time_has_its_density(power, stratified, seed):
    rng, T, n = np.random.default_rng(seed), 12, 40_000
    if stratified:
        t = np.array([training_times(rng, 3, T, power)[1] for _ in range(n)])
    else:
        t = training_times(rng, (n // 4, 4), T, power, stratified=False)
        assert t.shape == (n // 4, 4)
    expected = n * np.diff((np.arange(T + 1) / T) ** (1 / power))
    found = np.bincount(t.ravel(), minlength=T)
    kept = expected > 5                                     # rarer times, of fewer than 5 draws, are counted together
    groups = [np.append(a[kept], a[~kept].sum()) if (~kept).any() else a for a in (found, expected)]
    chi2 = ((groups[0] - groups[1]) ** 2 / groups[1]).sum()
    assert stats.chi2.sf(chi2, len(groups[0]) - 1) > 1e-8


@quickly
@given(seeds, st.integers(1, 100))
def test_stratified_numbers_are_one_in_each_interval(seed, B):
    u = stratified_uniform(np.random.default_rng(seed), B)
    assert ((0 <= u) & (u < 1)).all()
    np.testing.assert_allclose(np.diff(np.sort(u)), 1 / B, atol=1e-12)


def test_a_u_next_to_1_is_the_last_time():
    """cbrt(1 - 2^-53) rounds to 1, and T times 1 is no time."""
    class Last:
        def random(self, shape=None):
            return np.full(() if shape is None else shape, np.nextafter(1, 0))
    for power in (1, 1 / 2, 1 / 3, 0.01):
        assert training_times(Last(), 1, 1000, power).tolist() == [999]
        assert training_times(Last(), (2,), 1000, power, stratified=False).tolist() == [999, 999]


def test_an_empty_batch_has_no_times():
    assert training_times(np.random.default_rng(0), 0, 10, stratified=False).shape == (0,)


@pytest.mark.parametrize("sentence, arguments, options", [
    ("T must be a whole number of at least 1, not 0", (4, 0), {}),
    ("T must be a whole number of at least 1, not 2.5", (4, 2.5), {}),
    ("T must be a whole number of at least 1, not True", (4, True), {}),
    (r"power must be in \(0, 1\], .* got 0", (4, 10, 0), {}),
    (r"power must be in \(0, 1\], .* got 3", (4, 10, 3), {}),
    (r"power must be in \(0, 1\], .* got nan", (4, 10, float("nan")), {}),
    (r"shape, for stratified times, must be a whole number .* not \(4, 2\)", ((4, 2), 10), {}),
])
def test_what_is_refused(sentence, arguments, options):
    with pytest.raises(ValueError, match=sentence):
        training_times(np.random.default_rng(0), *arguments, **options)
