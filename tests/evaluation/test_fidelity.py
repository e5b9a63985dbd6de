"""Pictures and their captions, measured together."""

import numpy as np
import pytest

from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.pixels import to_float
from minidiff.evaluation.fidelity import Fidelity, measure
from minidiff.evaluation.judge import fid, load_judge
from minidiff.evaluation.metrics import precision_recall


def test_real_images_with_their_own_captions_and_with_wrong_ones():
    """First all captions are right; then one has a wrong digit, and one has a wrong word."""
    real, judge = mnist.packed(), load_judge()
    images = to_float(real.images[:60])[..., None]
    words = attributes.name(attributes.measure(real.images[:60]))
    features, digits = judge.read(images)
    rng = np.random.default_rng(0)
    asked = [captions.caption(rng, int(d), w, keep=1.0) for d, w in zip(digits, words, strict=True)]
    others, _ = judge.read(to_float(real.images[60:120])[..., None])
    found = measure(images, asked, others, judge)
    assert (found.digit, found.agreement) == (1, 1) and found.fid == fid(judge, features)
    assert (found.precision, found.recall) == precision_recall(others, features)

    one = next(i for i in range(1, 60) if words[i] == ("", "upright", ""))
    asked[0] = captions.caption(rng, (int(digits[0]) + 1) % 10, words[0], keep=1.0)
    asked[one] = f"a left-leaning {digits[one]}"
    wrong = measure(images, asked, others, judge)
    said = sum(bool(word) for w in words for word in w)
    assert wrong.digit == pytest.approx(59 / 60) and wrong.agreement == pytest.approx((said - 1) / said)
    assert measure(images, ["seven"] * 60, others, judge).digit == pytest.approx((digits == 7).mean())


def test_a_caption_that_asks_for_nothing_counts_in_no_rate():
    judge, images = load_judge(), to_float(mnist.packed().images[:5])[..., None]
    features, digits = judge.read(images)
    nothing = measure(images, [""] * 5, features, judge)
    assert (nothing.digit, nothing.agreement) == (1, 1)
    asked = ["", "", f"{digits[2]}", f"{(digits[3] + 1) % 10}", ""]
    assert measure(images, asked, features, judge).digit == 0.5


def test_a_row_of_the_table():
    assert Fidelity(0.987, 0.5, 12.34, 1.0, 0.0).row() == "98.7 % | 50.0 % | 12.3 | 100.0 % | 0.0 %"


def test_captions_must_be_as_many_as_pictures():
    with pytest.raises(ValueError, match="asked must be one caption for each of the 5 images, not 4"):
        measure(np.zeros((5, 28, 28, 1), np.float32), ["3"] * 4, np.zeros((5, 64)), load_judge())
