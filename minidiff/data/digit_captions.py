"""Captions: short English phrases that name a digit and mention a random part of its attributes.

The grammar ([] is optional, {} is any number of times, | is or):

    caption    [opening] noun [after]         an opening requires a noun that begins with "a", "an" or "the"
    opening    a picture of | an image of | a drawing of
    noun       [before] numeral                              "thin 7", "seven"
             | a [before] [handwritten] numeral              "a thin, upright three", "an 8"
             | the [before] (digit | number) numeral         "the bold digit two"
    numeral    0 ... 9 | zero ... nine
    before     adjective {joint adjective}                   joint: " " | ", " | " and ", the same in all of a caption
    after      " " lean | ", " list                          "leaning left", ", narrow and thin"
    list       said | said and said | said, said and said
    said       adjective | lean

    word       adjectives                          leans
    thin       thin | fine | light
    bold       bold | thick | heavy
    left       left-leaning | left-slanted         leaning left | tilted left | slanted to the left
    upright    upright | straight                  standing upright
    right      right-leaning | right-slanted       leaning right | tilted right | slanted to the right
    narrow     narrow | slim
    wide       wide | broad

The first choice of a row is taken at least half of the time.  `caption` writes a random sentence of this grammar, and
`parse` reads one.
"""

import re
from collections.abc import Sequence

import numpy as np

from minidiff.data.attributes import VOCABULARY, Words

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = ("a picture of ", "an image of ", "a drawing of ")
JOINTS = (" ", ", ", " and ")
ADJECTIVES = {
    "thin": ("thin", "fine", "light"),
    "bold": ("bold", "thick", "heavy"),
    "left": ("left-leaning", "left-slanted"),
    "upright": ("upright", "straight"),
    "right": ("right-leaning", "right-slanted"),
    "narrow": ("narrow", "slim"),
    "wide": ("wide", "broad"),
}
LEANS = {
    "left": ("leaning left", "tilted left", "slanted to the left"),
    "upright": ("standing upright",),
    "right": ("leaning right", "tilted right", "slanted to the right"),
}


def caption(rng: np.random.Generator, digit: int, words: Words, keep: float = 0.65) -> str:
    """A random caption of the grammar above, for a digit 0..9 with these attributes.

    Each attribute that has a word is mentioned with probability `keep`, independently.  With three words, 4% of the
    captions mention none and 27% mention all.  keep=1 mentions all, keep=0 none.  ValueError for another digit.
    """
    _check_digit(digit)

    def choose(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]

    def say(options: Sequence[str]) -> str:                 # half of the time, the usual word
        return options[0] if rng.random() < 0.5 else choose(options)

    mentioned = [word for word in words if word and rng.random() < keep]
    rng.shuffle(mentioned)

    before, after = [], []
    for word in mentioned:
        if rng.random() < 0.5:
            before.append(say(ADJECTIVES[word]))
        else:
            after.append(say(LEANS[word]) if word in LEANS and rng.random() < 0.8 else say(ADJECTIVES[word]))

    number = str(int(digit)) if rng.random() < 0.5 else DIGITS[digit]
    adjectives = choose(JOINTS).join(before)
    form = rng.random()
    if form < 0.3:
        text = _phrase(adjectives, number)
    elif form < 0.75:
        text = _with_article(_phrase(adjectives, "handwritten" if rng.random() < 0.3 else "", number))
    else:
        text = _phrase("the", adjectives, choose(("digit", "number")), number)
    if form >= 0.3 and rng.random() < 0.3:
        text = choose(OPENINGS) + text

    if not after:
        return text
    if len(after) == 1:
        return f"{text} {after[0]}" if " " in after[0] else f"{text}, {after[0]}"
    return f"{text}, {', '.join(after[:-1])} and {after[-1]}"


def paragraph(rng: np.random.Generator) -> str:
    """Five captions of one imagined digit, without an image.  Each mentions a random part of its attributes."""
    digit = int(rng.integers(0, 10))
    words = Words(*(("", *options)[int(rng.integers(0, len(options) + 1))] for options in VOCABULARY))
    return ". ".join(caption(rng, digit, words) for _ in range(5))


# captions of each digit, for zero-shot classification by CLIP; {word} is "seven", {figure} is "7"
PHRASINGS = ("the digit {word}", "the digit {figure}", "the number {word}", "the number {figure}",
             "a picture of the digit {word}", "an image of the number {figure}", "{word}", "{figure}")


def phrasings(patterns: Sequence[str] = PHRASINGS) -> list[list[str]]:
    """For each digit 0..9 the captions that the patterns give; ValueError for a pattern that names no digit."""
    if not patterns or not all("{word}" in p or "{figure}" in p for p in patterns):
        raise ValueError(f"patterns must each hold {{word}} or {{figure}}, not {list(patterns)}")
    return [[p.format(word=word, figure=k) for p in patterns] for k, word in enumerate(DIGITS)]


def _phrase(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _with_article(phrase: str) -> str:
    """As in: a three, a one; an 8, an eight, an upright three."""
    vowel = phrase[0] in "aeiou8" and not phrase.startswith("one")
    return ("an " if vowel else "a ") + phrase


_MEANING = {token: word for word, tokens in ADJECTIVES.items() for token in tokens}
_MEANING |= {"left": "left", "right": "right"}              # with any words around them, they mean the slant
_ATTRIBUTE = {
    "thin": "thickness", "bold": "thickness",
    "left": "slant", "upright": "slant", "right": "slant",
    "narrow": "width", "wide": "width",
}  # fmt: skip
_VALUE = {text: digit for digit, word in enumerate(DIGITS) for text in (word, str(digit))}


def parse(text: str) -> tuple[int | None, Words]:
    """What a caption asks for: the digit, or None, and the attributes that it mentions.  It never raises.

    Upper and lower case are the same.  Words outside the grammar are ignored.  Where a text contradicts itself ("a thin
    bold 3 or 4"), it asks for nothing.  Negation is not understood: "not bold" asks for bold.
    """
    tokens = re.findall(r"[a-z]+|[0-9]+", text.lower())
    digits = {_VALUE[token] for token in tokens if token in _VALUE}
    asked: dict[str, set[str]] = {"thickness": set(), "slant": set(), "width": set()}
    for token in tokens:
        if token in _MEANING:
            asked[_ATTRIBUTE[_MEANING[token]]].add(_MEANING[token])
    sole = {attribute: found.pop() for attribute, found in asked.items() if len(found) == 1}
    return (digits.pop() if len(digits) == 1 else None), Words(**sole)


def _check_digit(digit: int) -> None:
    if not 0 <= digit <= 9:
        raise ValueError(f"digit is {digit}, but caption takes 0 to 9")
