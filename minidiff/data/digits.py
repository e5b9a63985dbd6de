"""Images with what captions are made from: the data of every system that hears text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.attributes import Words
from minidiff.data.pixels import to_float


@dataclass(frozen=True, eq=False)
class CaptionedDigits:
    """Images with what captions are made from."""

    x_0: np.ndarray                         # (N, 28, 28, 1) float32 in [-1, 1]
    digits: np.ndarray                      # (N,)
    words: list[Words]                      # N
    fingerprint: str                        # SHA-256 of all images and labels, so that a run goes on with the same

    @classmethod
    def of(cls, images: mnist.Images) -> CaptionedDigits:
        """Measures the images' attributes, and leaves out the combinations that training must not see."""
        words = attributes.name(attributes.measure(images.images))
        seen = np.flatnonzero(~attributes.held_out(images.labels, words))
        fingerprint = hashlib.sha256(images.images.tobytes() + images.labels.tobytes()).hexdigest()
        return cls(to_float(images.images[seen])[..., None], images.labels[seen], [words[i] for i in seen], fingerprint)

    def caption(self, i: int, rng: np.random.Generator) -> str:
        return captions.caption(rng, int(self.digits[i]), self.words[i])
