"""How well pictures fit their captions, and how real they look: the numbers of metrics.py, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.evaluation.judge import fid
from minidiff.evaluation.metrics import attribute_matches, digits_right, precision_recall, share
from minidiff.systems.digit_classifier import DigitClassifier


@dataclass(frozen=True)
class Fidelity:
    """The result of `measure`; all but FID are shares of 1."""

    digit: float                            # of the captions that name a digit: the judge reads it in the picture
    agreement: float                        # of all the attributes asked for: they measure as asked
    fid: float                              # of the judge's features, against MNIST's test images
    precision: float
    recall: float

    def row(self) -> str:
        """The five as cells of a table."""
        rates = [f"{100 * value:.1f} %" for value in (self.digit, self.agreement, self.precision, self.recall)]
        return " | ".join([*rates[:2], f"{self.fid:.1f}", *rates[2:]])


def measure(images: np.ndarray, asked: Sequence[str], real: np.ndarray, judge: DigitClassifier) -> Fidelity:
    """How well images (M, H, W, 1) in [-1, 1] fit their M captions, and real images.

    real: the judge's features (N, D) of real images, for precision and recall; choose N = M.  ValueError unless there
    are as many captions as images.
    """
    if len(images) != len(asked):
        raise ValueError(f"asked must be one caption for each of the {len(images)} images, not {len(asked)}")
    features, digits = judge.read(images)
    matches, wanted = attribute_matches(asked, images)
    return Fidelity(share(digits_right(asked, digits)), share(matches[wanted]), fid(judge, features),
                    *precision_recall(real, features))
