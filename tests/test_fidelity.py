"""Improved precision and recall: against brute force, and in cases whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff import fidelity
from minidiff.fidelity import precision_recall


def by_hand(real, fake, k):
    """Eq. 1 and 2, one pair of points after another."""
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
def test_it_is_the_papers_equations(seed, k, D, whole):
    """On whole numbers, too, where points coincide and distances tie."""
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(rng.integers(k + 1, 14), D)), 0.5 + rng.normal(size=(rng.integers(k + 1, 14), D))
    if whole:
        real, fake = np.round(real), np.round(fake)
    assert precision_recall(real, fake, k) == pytest.approx(by_hand(real.tolist(), fake.tolist(), k), abs=1e-12)


def test_in_pieces_or_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(41, 4)), rng.normal(size=(30, 4)) * 0.8
    at_once = precision_recall(real, fake)
    monkeypatch.setattr(fidelity, "ROWS", 7)
    assert precision_recall(real, fake) == at_once


@pytest.mark.parametrize("k", [1, 3])
def test_closed_cases(k):
    rng = np.random.default_rng(1)
    real = rng.normal(size=(50, 8))
    assert precision_recall(real, real, k) == (1, 1)                                # identical
    assert precision_recall(real, real[rng.permutation(50)].copy(), k) == (1, 1)
    assert precision_recall(real, real + 1e3, k) == (0, 0)                          # far apart
    one = np.repeat(real[:1], 50, axis=0)                                           # collapsed to one real image,
    assert precision_recall(real, one, k) == (1, 1 / 50)                            # which alone is recalled
    nearly = real[:1] + 1e-6 * rng.normal(size=(50, 8))
    assert precision_recall(real, nearly, k)[0] == 1 and precision_recall(real, nearly, k)[1] <= 1 / 50


def test_half_of_the_modes_costs_half_of_the_recall_and_no_precision():
    """Two balls 100 apart: who draws only one of them misses the other, and nothing that he draws is wrong."""
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 2))
    real[:200, 0] += 100
    # one ball again, and more densely: the same points, and those half way to a neighbour's
    fake = np.concatenate([real[200:], real[200:] * (1 - 1e-9)])
    assert precision_recall(real, fake) == (1, 0.5)
    assert precision_recall(fake, real) == (0.5, 1)                                 # the roles exchanged


def test_the_two_are_one_another_with_the_sets_exchanged_and_move_with_no_rotation():
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(60, 5)), 1.2 * rng.normal(size=(60, 5))
    precision, recall = precision_recall(real, fake)
    assert 0 < precision < 1 and (recall, precision) == precision_recall(fake, real)
    Q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert precision_recall(7 * real @ Q + 3, 7 * fake @ Q + 3) == pytest.approx((precision, recall), abs=1e-12)


def test_distances_far_from_the_origin_are_exact():
    """||a||^2 + ||b||^2 - 2 a.b would lose every digit here."""
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
def test_what_makes_no_sense_is_refused(real, fake, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        precision_recall(real, fake, k)
