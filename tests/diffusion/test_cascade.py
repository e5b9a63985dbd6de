"""Cascades on Gaussian data, where every model of them is exact: the images are distributed as the data, at every level
of augmentation, and what the level changes is what linear-Gaussian conditioning says.

An exact denoiser of Gaussian data is affine, and so is a whole cascade of them: run on the unit vectors of all its
noise, it shows its matrix M and offset b, and its images have mean b and covariance M M^t.  Nothing is drawn, so that
no alarm is by chance; what is left is the sampler's error.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.law_tools import covariance, quickly

from minidiff.diffusion import cascade as cascades
from minidiff.diffusion.cascade import Conditioned, augmented, cascade, noise_time, resized
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.schedules import cosine

SCHEDULE = cosine(300)
HALVE = np.kron(np.eye(2), [[0.5, 0.5]])                    # (2, 4)
P = np.kron(HALVE, HALVE)                                   # (4, 16): the means of the squares of a 4 x 4 image
U = 4 * P.T                                                 # (16, 4): each pixel four times


@dataclass
class Shifted:
    """Exact for N(m_i, C), with a mean for each sample: m (B, 16)."""

    centred: GaussianDenoiser
    m: np.ndarray
    schedule = SCHEDULE
    predicts = "x0"

    def __call__(self, x_t, t, cond=None):
        alpha = SCHEDULE.alpha(t)[:, None, None, None]
        m = self.m.reshape(x_t.shape)
        return m + self.centred(x_t - alpha * m, t)


class Units:
    """A substitute for streams: the successive draws of a sample are the entries of its row."""

    def __init__(self, count):
        self.rows, self.used = np.concatenate([np.zeros((1, count)), np.eye(count)]), 0

    def __len__(self):
        return len(self.rows)

    def normal(self, shape, dtype):
        start, self.used = self.used, self.used + int(np.prod(shape))
        return self.rows[:, start:self.used].reshape(-1, *shape).astype(dtype)


class Data:
    """x ~ N(mu, S) of 4 x 4 pixels, and what conditioning says of it and of y = A x + sigma e,  A = alpha U P."""

    def __init__(self, seed, s):
        rng = np.random.default_rng(seed)
        self.mu, self.S = rng.normal(size=16), covariance(rng, 16) / 16 + 0.1 * np.eye(16)
        self.alpha, self.sigma = float(SCHEDULE.alpha(s)), float(SCHEDULE.sigma(s))
        A = self.alpha * U @ P
        self.V = A @ self.S @ A.T + self.sigma**2 * np.eye(16)
        self.G = self.S @ A.T @ np.linalg.pinv(self.V, rcond=1e-10)     # E[x | y] = mu + G (y - A mu)
        self.C = self.S - self.G @ A @ self.S                           # Cov[x | y]
        self.C, self.A = (self.C + self.C.T) / 2, A

    def run(self, s, mean=None, cov=None):
        """b and M of the small and of the large images; mean, cov: what the base draws, if not what it should."""
        mean, cov = P @ self.mu if mean is None else mean, P @ self.S @ P.T if cov is None else cov
        base = GaussianDenoiser(SCHEDULE, mean.reshape(2, 2, 1), cov)
        centred = GaussianDenoiser(SCHEDULE, np.zeros((4, 4, 1)), _psd(self.C))

        def finer(y, at):
            assert (at == s).all() and at.shape == (len(y),)
            return Shifted(centred, self.mu + (y.reshape(-1, 16) - self.A @ self.mu) @ self.G.T)
        streams = Units(4 + 16 + 16)
        small, large = cascade(base, [finer], ((2, 2, 1), (4, 4, 1)), streams, s=s, steps=(300, 300), dtype=np.float64)
        assert streams.used == 36
        small, large = small.reshape(37, 4), large.reshape(37, 16)
        return small[0], (small[1:] - small[0]).T, large[0], (large[1:] - large[0]).T


def _psd(C):
    values, vectors = np.linalg.eigh(C)
    return vectors * values.clip(0) @ vectors.T


LEVELS = [-1, 0, 30, 150, 299]
CLOSE = dict(rtol=0, atol=3e-3)                             # of numbers around 1: the sampler's error in 300 steps


@pytest.mark.law(
    "27a", "a cascade of exact models, p(x^1) p(x^2 | y_s): x^2 has the mean and covariance of the data, at every s",
    source="linear-Gaussian conditioning; the cascade's own matrix, from the unit vectors of its noise",
    tolerance="3e-3: the sampler's error in 300 steps; nothing is drawn")
@pytest.mark.parametrize("s", LEVELS)
def test_the_large_images_are_distributed_as_the_data_at_every_level(s):
    data = Data(1, s)
    b_small, M_small, b, M = data.run(s)
    np.testing.assert_allclose(b_small, P @ data.mu, **CLOSE)
    np.testing.assert_allclose(M_small @ M_small.T, P @ data.S @ P.T, **CLOSE)
    np.testing.assert_allclose(b, data.mu, **CLOSE)
    np.testing.assert_allclose(M @ M.T, data.S, **CLOSE)


@pytest.mark.law(
    "27b", "Cov(P x^2, x^1) = P G alpha_s U Cov(x^1), G of E[x^2 | y_s]: all of Cov(x^1) at s = -1, nothing at T-1",
    source="linear-Gaussian conditioning", tolerance="3e-3: the sampler's error in 300 steps; nothing is drawn")
@pytest.mark.parametrize("s", LEVELS)
def test_the_level_decides_how_closely_an_image_follows_its_small_one(s):
    """Cov(P x, z) = P G alpha U Cov(z): all of Cov(z) without noise, next to nothing at the last level."""
    data = Data(2, s)
    _, M_small, _, M = data.run(s)
    small = P @ data.S @ P.T
    expected = P @ data.G @ (data.alpha * U) @ small
    np.testing.assert_allclose((P @ M) @ M_small.T, expected, **CLOSE)
    if s == -1:
        np.testing.assert_allclose(expected, small, atol=1e-9)
    if s == 299:
        assert np.abs(expected).max() < 1e-3 * np.abs(small).max()


@pytest.mark.law(
    "27c", "of a base that draws N(m', S'): x^2 ~ N(mu + G alpha U (m' - m), G V' G^t + C), KL(x^2) <= KL(y_s)",
    source="linear-Gaussian conditioning; data processing", tolerance="3e-3: the sampler's error; nothing is drawn")
@pytest.mark.parametrize("s", [0, 30, 150])
def test_the_effect_of_a_wrong_base(s):
    """The mean and covariance are those of G y + ... for the y of the wrong base; and the large images' divergence
    from the data is at most that of the noised small ones, which are all that the second model sees."""
    data = Data(3, s)
    rng = np.random.default_rng(4)
    mean, cov = P @ data.mu + rng.normal(size=4), 0.3 * np.eye(4) + P @ data.S @ P.T
    _, _, b, M = data.run(s, mean, cov)
    V = data.alpha**2 * U @ cov @ U.T + data.sigma**2 * np.eye(16)
    y_mean = data.alpha * U @ mean
    np.testing.assert_allclose(b, data.mu + data.G @ (y_mean - data.A @ data.mu), **CLOSE)
    np.testing.assert_allclose(M @ M.T, data.G @ V @ data.G.T + data.C, **CLOSE)
    assert _kl(b, M @ M.T, data.mu, data.S) < _kl(y_mean, V, data.A @ data.mu, data.V)


def test_more_augmentation_reduces_the_effect_of_a_wrong_base():
    found = []
    for s in (0, 60, 150, 240, 299):
        data = Data(3, s)
        _, _, b, M = data.run(s, P @ data.mu + 1)
        found.append(_kl(b, M @ M.T, data.mu, data.S))
    assert found == sorted(found, reverse=True) and found[0] > 0.5 and found[-1] < 0.01


def _kl(m1, S1, m2, S2):
    d, inverse = m2 - m1, np.linalg.inv(S2)
    return 0.5 * (np.trace(inverse @ S1) + d @ inverse @ d - len(d) + np.linalg.slogdet(S2)[1]
                  - np.linalg.slogdet(S1)[1])


def test_the_check_sees_noise_that_was_added_before_enlarging(monkeypatch):
    """Like the known bug: noise at 2 x 2, then enlarged, is not the y of the second model."""
    def wrong(schedule, small, size, s, eps):
        return resized(augmented(schedule, small, small.shape[1], s, eps[:, ::2, ::2]), size)
    monkeypatch.setattr(cascades, "augmented", wrong)
    data = Data(1, 150)
    with pytest.raises(AssertionError):
        _, _, _, M = data.run(150)
        np.testing.assert_allclose(M @ M.T, data.S, **CLOSE)


# ---- sizes and noise -----------------------------------------------------------------------------------------

@quickly
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32))
def test_resizing_is_the_mean_of_squares_and_its_right_inverse(small, factor, seed):
    x = np.random.default_rng(seed).normal(size=(2, small * factor, small * factor, 3))
    blocks = [[x[:, i * factor:(i + 1) * factor, j * factor:(j + 1) * factor].mean(axis=(1, 2)) for j in range(small)]
              for i in range(small)]
    np.testing.assert_allclose(resized(x, small), np.array(blocks).transpose(2, 0, 1, 3), atol=1e-12)
    y = x[:, :small, :small]
    assert np.array_equal(resized(y, small * factor), np.repeat(np.repeat(y, factor, 1), factor, 2))
    np.testing.assert_allclose(resized(resized(y, small * factor), small), y, atol=1e-12)


def test_images_need_not_be_square():
    x = np.arange(16.0).reshape(1, 2, 8, 1)
    assert resized(x, 1)[0, ..., 0].tolist() == [[4.5, 6.5, 8.5, 10.5]]               # of 2 x 2 pixels each
    assert resized(x, 2).tolist() == x.tolist()
    assert np.array_equal(resized(x, 4), x.repeat(2, 1).repeat(2, 2))
    with pytest.raises(ValueError, match=r"of the image's 4 pixels, or divide it \(and its width of 6 alike\), not 1"):
        resized(np.zeros((1, 4, 6, 1)), 1)


def test_half_precision_is_averaged_in_float32():
    x = np.full((1, 64, 64, 1), 100, np.float16)            # a sum of 409,600 overflows float16
    assert resized(x, 1).dtype == np.float16 and resized(x, 1).item() == 100


@pytest.mark.parametrize("size", [0, 3, 6, -2])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="height must be"):
        resized(np.zeros((1, 4, 4, 1)), size)


def test_the_noise_of_a_level():
    """Each sample its own level: y - alpha U x is sigma eps, to the bit of float32; and no noise at s = -1."""
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(3, 2, 2, 1)).astype(np.float32), rng.normal(size=(3, 4, 4, 1)).astype(np.float32)
    s = np.array([-1, 100, 299])
    y = augmented(SCHEDULE, x, 4, s, eps)
    alpha = np.sqrt(np.append(SCHEDULE.alpha_bar, 1.0))[s][:, None]
    expected = alpha * (x.reshape(3, 4) @ U.T) + np.sqrt(1 - alpha**2) * eps.reshape(3, 16)
    np.testing.assert_allclose(y.reshape(3, 16), expected, atol=1e-6)
    assert np.array_equal(y[0], resized(x, 4)[0])


def test_levels():
    assert [noise_time(SCHEDULE, a) for a in (0, 0.1, 0.5, 1)] == [-1, 29, 149, 299]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="aug_level"):
            noise_time(SCHEDULE, wrong)


def test_a_cascade_needs_as_many_of_each():
    base = GaussianDenoiser(SCHEDULE, np.zeros((2, 2, 1)), np.ones((2, 2, 1)))
    two = ((2, 2, 1), (4, 4, 1))
    for finer, shapes, steps in (([], two, (1, 1)), ([None], two, (1,)), ([], (), ())):
        with pytest.raises(ValueError, match="finer, shapes and steps"):
            cascade(base, finer, shapes, Units(4), s=-1, steps=steps)


def test_a_fixed_condition_replaces_that_of_the_call():
    """`Conditioned` passes its condition to the denoiser, and ignores that of the call."""
    class Asked:
        schedule, predicts = SCHEDULE, "x0"

        def __call__(self, x_t, t, cond=None):
            return x_t * cond[0]
    x, t = np.ones((2, 1)), np.zeros(2, int)
    settled = Conditioned(ClassifierFree(Asked(), 3.0, (np.array([1.0, 2.0])[:, None],)), (np.array([[2.0], [5.0]]),))
    assert settled.schedule is SCHEDULE and settled.predicts == "x0"
    assert np.array_equal(settled(x, t, None), [[1 + 3 * (2 - 1)], [2 + 3 * (5 - 2)]])
