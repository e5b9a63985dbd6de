"""MNIST's digits with captions made from what can be measured in them: the data set that minidiff trains on by default.

    image --attributes.measure--> thin, leaning left, ... --digit_captions.caption--> "a thin seven leaning left"

Some combinations of a digit and its attributes are left out of training (`attributes.HELD_OUT`), so that evaluation can
ask for what a model has never seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minidiff.data import attributes, digit_captions, mnist
from minidiff.data.attributes import VOCABULARY, Words
from minidiff.data.dataset import Dataset, DatasetEntry
from minidiff.data.pixels import to_float
from minidiff.errors import UserError

PROMPTS = ("a bold seven leaning left", "the digit seven", "a thin, upright three", "3", "a wide zero", "0",
           "a narrow, right-leaning 5", "a heavy four", "one", "a fine 8 leaning right", "nine, bold", "")
NOT_ASKED = -1                                              # the class of a question that a caption does not answer


class Digits(Dataset):
    """MNIST's images, less the held-out combinations, with their digits and attributes."""

    name = "digits"
    prompts = PROMPTS

    def __init__(self, images: np.ndarray, labels: np.ndarray, words: list[Words], source: str, fingerprint: str,
                 load_test: Callable[[], Digits] | None = None):
        """images (N, H, W) uint8; labels (N,) the digits; words: N times what is said of an image."""
        self.pixels, self.labels, self.words = images, labels, words
        self.shape, self.source, self.fingerprint = (*images.shape[1:], 1), source, fingerprint
        self.load_test = load_test

    @classmethod
    def of(cls, data: mnist.Images, *, held_out: bool = False,
           load_test: Callable[[], Digits] | None = None) -> Digits:
        """Measures the images' attributes.  held_out: keep the combinations that training must not see.

        load_test: how to get the test images, if they are wanted.
        """
        words = attributes.name(attributes.measure(data.images))
        kept = np.arange(len(data)) if held_out else np.flatnonzero(~attributes.held_out(data.labels, words))
        fingerprint = hashlib.sha256(data.images.tobytes() + data.labels.tobytes()).hexdigest()
        return cls(data.images[kept], data.labels[kept], [words[i] for i in kept], data.source, fingerprint,
                   load_test)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices) -> np.ndarray:
        return to_float(self.pixels[indices])[..., None]                            # (B, H, W, 1)

    def test(self) -> Digits | None:
        """MNIST's test images, all of them; None where there are none.  UserError if they are damaged."""
        try:
            return self.load_test() if self.load_test else None
        except mnist.NotThere:
            return None

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return digit_captions.caption(rng, int(self.labels[i]), self.words[i])

    def text(self, rng: np.random.Generator) -> str:
        """Five captions of one imagined digit.  Each mentions what it likes; none is of an image."""
        return digit_captions.paragraph(rng)


class DigitQuestions:
    """Which digit is it, how thick are its strokes, how does it lean, how wide is it?"""

    classes = (10, *(1 + len(words) for words in VOCABULARY))                       # class 0 of a word: nothing to say

    def labels(self, data: Digits, indices: np.ndarray) -> np.ndarray:
        return _rows(classes(data.labels[i], data.words[i], 0) for i in indices)

    def asked(self, captions: Sequence[str]) -> np.ndarray:
        return _rows(classes(*digit_captions.parse(caption), NOT_ASKED) for caption in captions)


def _rows(answers: Iterable[list[int]]) -> np.ndarray:
    return np.array(list(answers), np.int64).reshape(-1, len(DigitQuestions.classes))


def classes(digit: int | None, words: Words, silent: int) -> list[int]:
    """Digit, thickness, slant and width as classes; `silent` where there is no digit or no word."""
    return [silent if digit is None else int(digit),
            *(1 + known.index(word) if word else silent for known, word in zip(VOCABULARY, words, strict=True))]


def load(folder: Path | None, split: str = "train") -> Digits:
    """The digits in a folder with MNIST's files, or without one from where mnist.py finds them."""
    if split == "test":
        return Digits.of(mnist.load(folder, split), held_out=True)
    data = Digits.of(found := mnist.load(folder, split), load_test=partial(load, folder, "test"))
    if not len(data):
        raise UserError(f"all {len(found)} images of {found.source} are of combinations that training leaves out, such "
                        "as a thin 0 leaning right: add other images")
    return data


ENTRY = DatasetEntry(load, DigitQuestions(), reads=mnist.holds_any)
