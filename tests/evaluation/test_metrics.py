"""Improved precision and recall: against brute force, and in cases whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.pixels import to_float
from minidiff.evaluation import metrics as fidelity
from minidiff.evaluation.judge import Judge
from minidiff.evaluation.metrics import precision_recall


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


# ---- pictures and their captions -----------------------------------------------------------------------------------


def test_measure_is_what_the_judge_and_the_ruler_say():
    """Real images with their own captions, one of them with a wrong digit and one with a wrong word."""
    real, judge = mnist.packed(), Judge.load()
    images = to_float(real.images[:60])[..., None]
    words = attributes.name(attributes.measure(real.images[:60]))
    features, digits = judge.classifier.read(images)
    rng = np.random.default_rng(0)
    asked = [captions.caption(rng, int(d), w, keep=1.0) for d, w in zip(digits, words, strict=True)]
    others, _ = judge.classifier.read(to_float(real.images[60:120])[..., None])
    found = fidelity.measure(images, asked, others, judge)
    assert (found.digit, found.agreement) == (1, 1) and found.fid == judge.fid(features)
    assert (found.precision, found.recall) == precision_recall(others, features)

    one = next(i for i in range(1, 60) if words[i] == ("", "upright", ""))
    asked[0] = captions.caption(rng, (int(digits[0]) + 1) % 10, words[0], keep=1.0)
    asked[one] = f"a left-leaning {digits[one]}"
    wrong = fidelity.measure(images, asked, others, judge)
    said = sum(bool(word) for w in words for word in w)
    assert wrong.digit == pytest.approx(59 / 60) and wrong.agreement == pytest.approx((said - 1) / said)
    assert fidelity.measure(images, ["seven"] * 60, others, judge).digit == pytest.approx((digits == 7).mean())


def test_a_caption_that_asks_nothing_is_not_held_against_a_picture():
    judge, images = Judge.load(), to_float(mnist.packed().images[:5])[..., None]
    features, digits = judge.classifier.read(images)
    nothing = fidelity.measure(images, [""] * 5, features, judge)
    assert (nothing.digit, nothing.agreement) == (1, 1)
    asked = ["", "", f"{digits[2]}", f"{(digits[3] + 1) % 10}", ""]
    assert fidelity.measure(images, asked, features, judge).digit == 0.5


def test_a_row_of_the_table():
    assert fidelity.Fidelity(0.987, 0.5, 12.34, 1.0, 0.0).row() == "98.7 % | 50.0 % | 12.3 | 100.0 % | 0.0 %"


def test_captions_must_be_as_many_as_pictures():
    with pytest.raises(ValueError, match="asked must be one caption for each of the 5 images, not 4"):
        fidelity.measure(np.zeros((5, 28, 28, 1), np.float32), ["3"] * 4, np.zeros((5, 64)), Judge.load())
