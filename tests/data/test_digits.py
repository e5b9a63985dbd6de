"""MNIST's digits as a data set: which are kept, what is said of each, and what a classifier of them is asked."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from minidiff.data import attributes, digits, mnist
from minidiff.data.attributes import VOCABULARY, Words
from minidiff.data.digit_captions import DIGITS, paragraph, parse, phrasings
from minidiff.data.digits import NOT_ASKED, PROMPTS, DigitQuestions, Digits, classes
from minidiff.data.pixels import to_float

COUNT = 120


@pytest.fixture(scope="module")
def packed() -> mnist.Images:
    real = mnist.packed()
    return mnist.Images(real.images[:COUNT], real.labels[:COUNT], "some images")


def test_held_out_combinations_are_left_out_unless_they_are_asked_for(packed):
    words = attributes.name(attributes.measure(packed.images))
    held = [(int(d), w.thickness, w.slant) in attributes.HELD_OUT for d, w in zip(packed.labels, words, strict=True)]
    kept, everything = Digits.of(packed), Digits.of(packed, held_out=True)
    assert 0 < sum(held) < 20 and len(kept) == COUNT - sum(held) and len(everything) == COUNT
    rows = np.flatnonzero(~np.array(held))
    np.testing.assert_array_equal(kept.images(np.arange(len(kept))), to_float(packed.images[rows])[..., None])
    np.testing.assert_array_equal(kept.labels, packed.labels[rows])
    assert kept.words == [words[i] for i in rows] and everything.words == words
    assert (kept.name, kept.shape, kept.source, kept.prompts) == ("digits", (28, 28, 1), "some images", PROMPTS)
    digest = hashlib.sha256(packed.images.tobytes() + packed.labels.tobytes()).hexdigest()
    assert kept.fingerprint == everything.fingerprint == digest


def test_test_images_come_from_where_they_were_promised(packed):
    tests = Digits.of(packed)
    assert Digits.of(packed, load_test=lambda: tests).test() is tests and Digits.of(packed).test() is None

    def nowhere():
        raise mnist.NotThere("no test images")
    assert Digits.of(packed, load_test=nowhere).test() is None


@pytest.mark.parametrize("folder", [None, Path("here")])
def test_both_splits_are_loaded_from_the_same_folder_and_the_test_images_whole(folder, packed, monkeypatch):
    asked = []
    monkeypatch.setattr(mnist, "load", lambda *a: asked.append(a) or packed)
    train = digits.load(folder)
    assert asked == [(folder, "train")] and len(train) < COUNT
    assert len(train.test()) == COUNT and asked[1:] == [(folder, "test")]
    assert len(digits.load(folder, "test")) == COUNT and asked[2:] == [(folder, "test")]


def test_a_caption_is_of_its_image(packed):
    data, rng = Digits.of(packed), np.random.default_rng(0)
    for i in range(100):
        digit, words = parse(data.caption(i, rng))
        assert digit == data.labels[i] and all(a in ("", b) for a, b in zip(words, data.words[i], strict=True))


def test_questions_and_their_answers(packed):
    data, questions = Digits.of(packed), DigitQuestions()
    answers = questions.labels(data, np.arange(50))
    for i, (digit, *rest) in enumerate(answers):
        assert digit == data.labels[i]
        assert Words(*("" if not k else v[k - 1] for k, v in zip(rest, VOCABULARY, strict=True))) == data.words[i]
    assert questions.asked(["a thin seven", "", "leaning left"]).tolist() == [
        [7, 1, NOT_ASKED, NOT_ASKED], [NOT_ASKED] * 4, [NOT_ASKED, NOT_ASKED, 1, NOT_ASKED]]
    none = questions.asked([])
    assert none.shape == (0, 4) and none.dtype == answers.dtype == np.int64
    assert classes(None, Words(), 5) == [5] * 4 and classes(0, Words("bold", "right", "wide"), 0) == [0, 2, 3, 2]


def test_a_text_is_five_captions_of_one_imagined_digit_and_all_digits_and_words_occur(packed):
    """400 texts: a digit is missing with probability 10 x 0.9^400 = 5e-18; a word of 4, 12 x 0.75^400 at most."""
    rng, digits_seen, words_seen, silent = np.random.default_rng(0), set(), set(), []
    data = Digits.of(packed)
    for text in [data.text(rng) for _ in range(200)] + [paragraph(rng) for _ in range(200)]:
        said = [parse(caption) for caption in text.split(". ")]
        assert len(said) == 5 and len({digit for digit, _ in said}) == 1
        for k in range(3):
            assert len({words[k] for _, words in said if words[k]}) <= 1
            words_seen |= {words[k] for _, words in said}
        digits_seen.add(said[0][0])
        silent += [k for k in range(3) if not any(words[k] for _, words in said)]
    # Of 400 at least a fourth have no word, and of the others .35^5 do not mention theirs: 100 of standard deviation 9,
    # where a mistake leaves 2.  60 is 4.6 deviations below: a false alarm in 400,000
    assert min(silent.count(k) for k in range(3)) > 60
    assert digits_seen == set(range(10)) and words_seen == {"", *(word for row in VOCABULARY for word in row)}


def test_phrasings_name_each_digit_once_in_each_pattern():
    found = phrasings(("the {word}", "{figure}!"))
    assert found == [[f"the {word}", f"{k}!"] for k, word in enumerate(DIGITS)]
    for wrong in ((), ("the digit",), ("{word}", "number")):
        with pytest.raises(ValueError, match="^patterns must each hold {word} or {figure}, not "):
            phrasings(wrong)
