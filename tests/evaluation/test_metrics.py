"""FID, precision and recall: against brute force, and in cases whose answer is known; which captions are right."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.data import attributes, digit_captions, mnist
from minidiff.data.pixels import to_float
from minidiff.evaluation import metrics
from minidiff.evaluation.metrics import (
    attribute_matches,
    dark_shares,
    digits_right,
    frechet_distance,
    mean_cov,
    precision_recall,
    share,
)

# --- FID --------------------------------------------------------------------------------------------------

@pytest.mark.law(
    34, "FID in one dimension is (m1 - m2)^2 + (s1 - s2)^2",
    source="Heusel et al. 2017, eq. 6; commuting roots",
    tolerance="1e-7: the square root of s1^2 s2^2, rounded at 1e-16, where s is 0")
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 4), st.floats(0, 4))
def test_in_one_dimension_the_distance_is_that_of_means_and_deviations(m1, m2, s1, s2):
    """Law 34: (m1 - m2)^2 + (s1 - s2)^2."""
    found = frechet_distance(np.array([m1]), np.array([[s1**2]]), np.array([m2]), np.array([[s2**2]]))
    assert found == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-7)


@pytest.mark.law(
    34, "FID between Gaussians is ||mu1 - mu2||^2 + Tr(S1 + S2 - 2 (S1 S2)^{1/2}); it is 0 between equals, and "
        "symmetric",
    source="Heusel et al. 2017, eq. 6; scipy's matrix square root",
    tolerance="1e-7: a root of a matrix that is not symmetric, of condition up to 1e4")
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_against_a_general_matrix_square_root(D, seed):
    rng = np.random.default_rng(seed)
    (m1, m2), (a, b) = rng.standard_normal((2, D)), rng.standard_normal((2, D, D))
    S1, S2 = a @ a.T + 0.01 * np.eye(D), b @ b.T + 0.01 * np.eye(D)
    root = scipy.linalg.sqrtm(S1 @ S2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1 + S2 - 2 * root)
    assert frechet_distance(m1, S1, m2, S2) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    assert frechet_distance(m1, S1, m1, S1) == pytest.approx(0, abs=1e-9 * np.trace(S1))
    assert frechet_distance(m2, S2, m1, S1) == pytest.approx(frechet_distance(m1, S1, m2, S2), rel=1e-7, abs=1e-7)


def test_the_mean_and_covariance_are_over_samples_in_float64():
    features = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32) + 1000
    mean, cov = mean_cov(features)
    wide = features.astype(np.float64)
    centred = wide - wide.sum(axis=0) / 7
    np.testing.assert_allclose(mean, wide.sum(axis=0) / 7, rtol=1e-14)
    np.testing.assert_allclose(cov, centred.T @ centred / 6, rtol=1e-9)


# --- precision and recall ---------------------------------------------------------------------------------

def by_hand(real, fake, k):
    """Kynkaanniemi et al. 2019, eq. 1 and 2, one pair of points after another."""
    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    def f(phi, Phi):
        for i, other in enumerate(Phi):
            radius = sorted(distance(other, Phi[j]) for j in range(len(Phi)) if j != i)[k - 1]
            if distance(phi, other) <= radius:
                return 1
        return 0
    return sum(f(g, real) for g in fake) / len(fake), sum(f(r, fake) for r in real) / len(real)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_it_follows_the_papers_equations(seed, k, D, whole):
    """Also on whole numbers, where points coincide and distances are equal."""
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(rng.integers(k + 1, 14), D)), 0.5 + rng.normal(size=(rng.integers(k + 1, 14), D))
    if whole:
        real, fake = np.round(real), np.round(fake)
    assert precision_recall(real, fake, k) == pytest.approx(by_hand(real.tolist(), fake.tolist(), k), abs=1e-12)


def test_rows_in_pieces_give_the_same_as_all_rows_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(41, 4)), rng.normal(size=(30, 4)) * 0.8
    at_once = precision_recall(real, fake)
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert precision_recall(real, fake) == at_once


@pytest.mark.parametrize("k", [1, 3])
def test_closed_cases(k):
    rng = np.random.default_rng(1)
    real = rng.normal(size=(50, 8))
    assert precision_recall(real, real, k) == (1, 1)                                # identical
    assert precision_recall(real, real[rng.permutation(50)].copy(), k) == (1, 1)
    assert precision_recall(real, real + 1e3, k) == (0, 0)                          # far apart
    one = np.repeat(real[:1], 50, axis=0)                                           # mode collapse to one real image,
    assert precision_recall(real, one, k) == (1, 1 / 50)                            # the only one recalled
    nearly = real[:1] + 1e-6 * rng.normal(size=(50, 8))
    assert precision_recall(real, nearly, k)[0] == 1 and precision_recall(real, nearly, k)[1] <= 1 / 50


def test_half_of_the_modes_costs_half_of_the_recall_and_no_precision():
    """Two balls 100 apart: a generator of one ball misses the other, and each of its points is right."""
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 2))
    real[:200, 0] += 100
    # one ball, with twice as many points: each point, and one right beside it
    fake = np.concatenate([real[200:], real[200:] * (1 - 1e-9)])
    assert precision_recall(real, fake) == (1, 0.5)
    assert precision_recall(fake, real) == (0.5, 1)                                 # the roles exchanged


def test_exchanging_the_sets_exchanges_the_two_and_a_similarity_transform_changes_neither():
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(60, 5)), 1.2 * rng.normal(size=(60, 5))
    precision, recall = precision_recall(real, fake)
    assert 0 < precision < 1 and (recall, precision) == precision_recall(fake, real)
    Q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert precision_recall(7 * real @ Q + 3, 7 * fake @ Q + 3) == pytest.approx((precision, recall), abs=1e-12)


def test_distances_far_from_the_origin_are_exact():
    """Computed as ||a||^2 + ||b||^2 - 2 a.b they would lose all their digits here."""
    rng = np.random.default_rng(4)
    real, fake = rng.integers(0, 9, (2, 40, 3)).astype(np.float64)
    assert precision_recall(real + 1e9, fake + 1e9) == precision_recall(real, fake)


GOOD = np.zeros((5, 2))


@pytest.mark.parametrize("real, fake, k, sentence", [
    (GOOD, GOOD, 0, "k must be a whole number of at least 1, not 0"),
    (GOOD, GOOD, 2.0, "k must be a whole number"), (GOOD, GOOD, True, "k must be a whole number"),
    (GOOD[:3], GOOD, 3, r"real must be features \(N, D\) with N of more than k = 3, not \(3, 2\)"),
    (GOOD, GOOD[0], 3, "fake must be features"), (GOOD, np.zeros((5, 3)), 3, "as many features each, not 2 and 3"),
    (GOOD, np.full((5, 2), np.nan), 3, "fake must be finite"), (GOOD, GOOD.astype(str), 3, "fake must be numbers"),
])
def test_invalid_features_and_neighbours_are_refused(real, fake, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        precision_recall(real, fake, k)


# --- captions ---------------------------------------------------------------------------------------------

def test_a_caption_without_a_digit_counts_in_no_rate_of_digits():
    right = digits_right(["", "a bold seven", "bold", "3", "an upright 4"], np.array([1, 7, 2, 3, 5]))
    assert right.dtype == bool and right.tolist() == [True, True, False]
    assert digits_right(["", "thin", "3 or 4"], np.array([1, 2, 3])).shape == (0,)


def test_only_the_attributes_that_a_caption_mentions_are_wanted():
    """Real images: each first with its own words, then with one word that is wrong, then with no word."""
    images = mnist.packed().images[:40]
    words = attributes.name(attributes.measure(images))
    rng = np.random.default_rng(0)
    own = [digit_captions.caption(rng, 0, w, keep=1.0) for w in words]
    matches, wanted = attribute_matches(own, images)
    assert matches.shape == wanted.shape == (40, 3) and matches.dtype == wanted.dtype == bool
    assert np.array_equal(attribute_matches(own, to_float(images)), (matches, wanted))
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], where black is -1, not 0 to 255"):
        attribute_matches(own, images.astype(np.float32))
    assert wanted.tolist() == [[bool(word) for word in w] for w in words] and (matches == wanted).all()
    assert 40 < wanted.sum() < 120                          # some images have no word for thickness or width

    others = {"left": "right", "upright": "left", "right": "upright"}
    matches, wanted = attribute_matches([f"a {others[w.slant]}-leaning 0".replace("upright-leaning", "upright")
                                         for w in words], images)
    assert not matches.any() and (wanted == [False, True, False]).all()

    matches, wanted = attribute_matches(["seven"] * 40, images)
    assert not matches.any() and not wanted.any()           # "" equals "" where an image has no word: not a match
    assert [a.shape for a in attribute_matches([], images[:0])] == [(0, 3), (0, 3)]


def test_a_share_of_nothing_is_one():
    assert share(np.array([True, False, False, True])) == 0.5 and share(np.array([], bool)) == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_fid_of_singular_and_of_extreme_covariances(scale):
    """Points on a line: of two equal sets it is 0, and of sets moved apart the square of the distance."""
    rng = np.random.default_rng(0)
    line = scale * rng.standard_normal((50, 1)) @ rng.standard_normal((1, 64))
    mean, cov = mean_cov(line)
    assert frechet_distance(mean, cov, mean, cov) <= 1e-12 * np.trace(cov)
    assert frechet_distance(mean, cov, mean + scale, cov) == pytest.approx(64 * scale**2, rel=1e-6)
    zero = np.zeros_like(cov)
    assert frechet_distance(mean, cov, mean, zero) == pytest.approx(np.trace(cov))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fid_of_features_that_are_not_finite_is_refused(bad):
    mean, cov = np.zeros(2), np.eye(2)
    for wrong in ((np.array([bad, 0]), cov), (mean, np.diag([bad, 1]))):
        with pytest.raises(ValueError, match="^the features must be finite, and at least two: their mean or "
                                             "covariance holds NaN or infinity$"):
            frechet_distance(mean, cov, *wrong)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_precision_and_recall_do_not_depend_on_the_features_scale(scale):
    """The squares of such distances are 0 or infinite."""
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 3)), 0.5 * rng.standard_normal((30, 3)) + 1
    expected = metrics.precision_recall(real, fake)
    assert metrics.precision_recall(scale * real, scale * fake) == expected and 0 < min(expected) < 1


# --- dark pixels ------------------------------------------------------------------------------------------

def test_dark_pixels_are_counted_by_their_level():
    levels = np.array([0, 0, 0, 0, 1, 4, 5, 20, 21, 255], np.uint8).reshape(1, 2, 5, 1)
    assert dark_shares(levels) == pytest.approx({"0": 0.4, "1-4": 0.2, "5-20": 0.2})
    floats = levels / np.float32(127.5) - 1 + np.float32(0.49 / 127.5)              # not half a level too bright
    assert dark_shares(floats.clip(-1, 1)) == dark_shares(levels)


def test_real_digits_have_little_between_black_and_grey():
    shares = dark_shares(mnist.packed().images)
    assert 0.79 < shares["0"] < 0.83 and shares["1-4"] < 0.005 and shares["5-20"] < 0.015
