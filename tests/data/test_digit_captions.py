"""Captions and a second definition of their grammar: a hypothesis strategy and a regular expression."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.data.attributes import VOCABULARY, Words
from minidiff.data.digit_captions import caption, parse

SAID = {                                                    # word: (adjectives, leans), copied from the table
    "thin": ("thin fine light".split(), []),
    "bold": ("bold thick heavy".split(), []),
    "left": (["left-leaning", "left-slanted"], ["leaning left", "tilted left", "slanted to the left"]),
    "upright": (["upright", "straight"], ["standing upright"]),
    "right": (["right-leaning", "right-slanted"], ["leaning right", "tilted right", "slanted to the right"]),
    "narrow": (["narrow", "slim"], []),
    "wide": (["wide", "broad"], []),
}
NAMES = "zero one two three four five six seven eight nine".split()
any_words = st.builds(Words, *(st.sampled_from(("", *words)) for words in VOCABULARY))
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def sentences(draw) -> tuple[str, int, Words]:
    """(a caption of the grammar, its digit, its words)."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    digit, words = draw(st.integers(0, 9)), draw(any_words)
    before, after = [], []
    for word in draw(st.permutations([word for word in words if word])):
        adjectives, leans = SAID[word]
        before.append(pick(*adjectives)) if draw(st.booleans()) else after.append(pick(*adjectives, *leans))
    front = pick(" ", ", ", " and ").join(before) + " " * bool(before)
    number = pick(str(digit), NAMES[digit])
    articled = f"{front}{pick('', 'handwritten ')}{number}"
    an = articled[0] in "aeiou8" and not articled.startswith("one")
    the = f"the {front}{pick('digit', 'number')} {number}"
    noun = pick(f"{front}{number}", f"{'an' if an else 'a'} {articled}", the)
    if re.match("an? |the ", noun):
        noun = pick("", "a picture of ", "an image of ", "a drawing of ") + noun
    if len(after) == 1:
        noun += (" " if " " in after[0] else ", ") + after[0]
    elif after:
        noun += ", " + ", ".join(after[:-1]) + " and " + after[-1]
    return noun, digit, words


def grammar() -> re.Pattern:
    adjective = "|".join(a for adjectives, _ in SAID.values() for a in adjectives)
    lean = "|".join(lean for _, leans in SAID.values() for lean in leans)
    before = rf"(?:(?:{adjective})(?:(?: |, | and )(?:{adjective})){{0,2}} )?"
    number = rf"(?:[0-9]|{'|'.join(NAMES)})"
    article = "(?:an (?=[aeiou8])(?!one)|a (?![aeiou8])|a (?=one))"
    said = rf"(?:{adjective}|{lean})"
    articled = rf"(?:{article}{before}(?:handwritten )?{number}|the {before}(?:digit|number) {number})"
    noun = rf"(?:{before}{number}|(?:a picture of |an image of |a drawing of )?{articled})"
    after = rf"(?: (?:{lean})|, {said}(?:(?:, {said})? and {said})?)?"
    return re.compile(noun + after)


GRAMMAR = grammar()


@settings(deadline=None, max_examples=300)
@given(sentences())
def test_every_sentence_of_the_grammar_is_read_back(sentence):
    text, digit, words = sentence
    assert GRAMMAR.fullmatch(text)
    assert parse(text) == (digit, words)
    assert parse(text.upper() + "!") == (digit, words)


@settings(deadline=None, max_examples=300)
@given(generators, st.integers(0, 9), any_words)
def test_captions_follow_the_grammar_and_are_true(rng, digit, words):
    text = caption(rng, digit, words)
    assert GRAMMAR.fullmatch(text), text
    read, mentioned = parse(text)
    assert read == digit
    assert all(m in ("", w) for m, w in zip(mentioned, words, strict=True))


@settings(deadline=None, max_examples=100)
@given(generators, st.integers(0, 9), any_words)
def test_keep_1_mentions_all_and_keep_0_nothing(rng, digit, words):
    assert parse(caption(rng, digit, words, keep=1)) == (digit, words)
    assert parse(caption(rng, digit, words, keep=0)) == (digit, Words())


def test_captions_use_the_whole_vocabulary_and_grammar():
    """Each is expected at least 13 times in 20,000 captions: the probability to miss one is below 1e-5."""
    rng = np.random.default_rng(0)
    every = [Words(t, s, w) for t in ("thin", "bold") for s in VOCABULARY.slant for w in ("narrow", "wide")]
    texts = [caption(rng, i % 10, every[i % 12]) for i in range(20_000)]
    phrases = [phrase for kinds in SAID.values() for kind in kinds for phrase in kind]
    phrases += ["a picture of ", "an image of ", "a drawing of ", "handwritten ", "the ", "digit ", "number "]
    phrases += [" and ", ", ", *NAMES, *map(str, range(10))]
    for phrase in phrases:
        assert any(phrase in text for text in texts), phrase
    for pair in ("thin narrow", "thin, narrow", "thin and narrow", "narrow thin"):
        assert any(f"a {pair} " in text for text in texts), pair
    said = [sum(map(bool, parse(text)[1])) for text in texts]
    # of three words each said with probability 0.65; 5 standard errors, so false alarms below 1 in a million
    assert np.mean(said) == pytest.approx(1.95, abs=5 * np.sqrt(3 * 0.65 * 0.35 / 20_000))
    assert set(said) == {0, 1, 2, 3}
    assert len(set(texts)) > 5000


def test_captions_choose_as_often_as_the_grammar_says():
    """Nine shares of 6,000 captions with one word, 5 standard errors each: false alarms below 1 in 100,000."""
    texts = [caption(np.random.default_rng(i), 3, Words("", "left", ""), keep=1) for i in range(6000)]

    def share(part, of=lambda text: True):
        chosen = [bool(part(text)) for text in texts if of(text)]
        return np.mean(chosen), 5 * 0.5 / np.sqrt(len(chosen))

    def opened(text):
        return " of " in text

    def articled(text):                                     # form >= .3: "a ... three", "the ... digit three"
        return re.match(r"(an?|the) ", text) or opened(text)

    def defined(text):
        return re.search(r"\bthe .*(digit|number)", text)
    before = share(lambda text: re.search(r"left-(leaning|slanted) .*(3|three)", text))
    for (found, allowed), expected in (
            (before, 0.5), (share(lambda text: "3" in text), 0.5), (share(articled), 0.7), (share(defined), 0.25),
            (share(opened, of=articled), 0.3),
            (share(lambda text: "handwritten" in text, of=lambda text: articled(text) and not defined(text)), 0.3),
            # behind the number: of 80 % a lean, else an adjective; the usual one half of the time, and a third of the
            # other half for leans, one in two for adjectives
            (share(lambda text: re.search(r"(leaning left|tilted left|slanted to the left)$", text),
                   of=lambda text: re.search(r"(3|three),? \w", text)), 0.8),
            (share(lambda text: text.endswith("leaning left"),
                   of=lambda text: re.search(r"(leaning left|tilted left|slanted to the left)$", text)), 2 / 3),
            (share(lambda text: "left-leaning" in text, of=lambda text: "left-" in text), 3 / 4)):
        assert found == pytest.approx(expected, abs=allowed)


def test_captions_depend_on_the_generator_alone():
    words = Words("thin", "upright", "wide")
    texts = [[caption(np.random.default_rng(seed), 3, words) for seed in range(20)] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 10


def test_labels_of_the_data_are_accepted():
    assert parse(caption(np.random.default_rng(0), np.uint8(8), Words()))[0] == 8
    with pytest.raises(ValueError, match="digit is 10.*0 to 9"):
        caption(np.random.default_rng(0), 10, Words())


@pytest.mark.parametrize(
    ("text", "digit", "words"),
    [
        ("a bold seven leaning left", 7, Words("bold", "left", "")),
        ("7", 7, Words()),
        ("A thin, upright three.", 3, Words("thin", "upright", "")),
        ("the number 4, narrow and fine", 4, Words("thin", "", "narrow")),
        ("", None, Words()),
        ("a horse", None, Words()),
        ("3 or 4", None, Words()),
        ("three, that is 3", 3, Words()),
        ("bold or thin 5, tilted right", 5, Words("", "right", "")),
        ("77 lefties stoned", None, Words()),
        ("\N{FULLWIDTH DIGIT SEVEN} \N{SNOWMAN}\0", None, Words()),
    ],
)
def test_prompts_are_read(text, digit, words):
    assert parse(text) == (digit, words)


@given(st.text())
def test_any_text_can_be_read(text):
    digit, words = parse(text)
    assert digit is None or 0 <= digit <= 9
    assert isinstance(words, Words)


def test_a_lean_alone_follows_without_a_comma():
    """"seven leaning left", but "seven, thin" and "seven, thin and leaning left"."""
    rng, leans = np.random.default_rng(0), [lean for _, row in SAID.values() for lean in row]
    said = [caption(rng, 7, Words("thin", "left", ""), keep=0.7) for _ in range(2000)]
    last = [(text, lean) for text in said for lean in leans if text.endswith(lean)]
    assert sum(text.endswith(f" and {lean}") for text, lean in last) > 50
    alone = [text for text, lean in last if not text.endswith(f" and {lean}")]
    assert len(alone) > 50 and not any(", " in text[text.rindex("7" if "7" in text else "seven"):] for text in alone)
    assert sum(text.endswith((", thin", ", fine", ", light")) for text in said) > 50
