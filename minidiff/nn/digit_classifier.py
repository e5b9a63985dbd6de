"""For the time being: the shipped digit classifier, until systems/digit_classifier.py holds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minidiff import checkpoint
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig

SHIPPED = Path(__file__).parents[1] / "weights" / "digit-classifier.safetensors"


def classifier_in(saved: checkpoint.Checkpoint) -> ImageClassifier:
    """The classifier that a file holds; UserError, naming the file, if there is none."""
    classifier, prefix = ImageClassifier(ImageClassifierConfig(), np.random.default_rng(0)), "classifier."
    weights = {name: w for name, w in saved.tensors.items() if name.startswith(prefix)}
    checkpoint.check_shapes({prefix + name: p.shape for name, p in classifier.parameters().items()}, weights,
                            saved.path)
    classifier.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items()})
    return classifier


def shipped() -> ImageClassifier:
    return classifier_in(checkpoint.load(SHIPPED))
