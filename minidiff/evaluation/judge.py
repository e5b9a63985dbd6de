"""The judge: a frozen classifier of clean digits, whose features FID compares.

It is the system `digit-classifier` (systems/digit_classifier.py).  Its file also holds its accuracy on MNIST's test
images, and the mean and covariance of their features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minidiff import systems
from minidiff.engine.backend import to_numpy
from minidiff.errors import UserError
from minidiff.evaluation.metrics import frechet_distance, mean_cov
from minidiff.systems.digit_classifier import DigitClassifier


def load_judge(path: str | Path | None = None) -> DigitClassifier:
    """The digit classifier in a file, or without a path the user's own or the one that comes with minidiff.

    UserError where it was never measured on real images, so that FID has nothing to compare with.
    """
    judge = systems.load_system("digit-classifier", path)
    mean, cov = to_numpy(judge.mean.data), to_numpy(judge.cov.data)
    unmeasured = not mean.any() and (cov == np.eye(len(cov))).all()
    if unmeasured or not isinstance(judge.notes.get("accuracy"), float):
        raise UserError(f"{path or 'this digit-classifier'} cannot judge pictures: its features were never measured on "
                        "real images (train it to the end with minidiff train --system digit-classifier)")
    return judge


def fid(judge: DigitClassifier, features: np.ndarray) -> float:
    """FID between the judge's features (N, D) of pictures and those of the images that it was measured on."""
    return frechet_distance(*mean_cov(features), to_numpy(judge.mean.data), to_numpy(judge.cov.data))
