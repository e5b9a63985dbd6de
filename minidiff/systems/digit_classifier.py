"""The classifier of digits: it judges pictures (evaluation/), and autoencoders compare images in its feature maps.

    training    L = -log p(digit | x),   x a clean image of MNIST, shifted by up to two pixels each time it is seen
    measured    its accuracy on MNIST's test images, and the mean and covariance of their features, for FID

The network is nn/image_classifier.py.  Unlike the classifier of systems/adm.py it never sees noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from minidiff.data.dataset import Dataset
from minidiff.engine import ops
from minidiff.engine.backend import to_device
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig
from minidiff.nn.precision import as_float32, as_input
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System

SHIFT = 2                                                   # pixels, at most, each way


@dataclass(frozen=True)
class DigitClassifierConfig:
    """Everything that makes one model; it is saved in the model's file."""

    network: ImageClassifierConfig = field(default_factory=ImageClassifierConfig)
    steps: int = 2800                                       # six times MNIST's 60,000 images

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


class DigitClassifier(System):
    """A classifier of clean images, and what FID compares with: statistics of its features over real images."""

    name, Config, example = "digit-classifier", DigitClassifierConfig, "10_autoencoders.py"

    def __init__(self, config: DigitClassifierConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.classifier = ImageClassifier(config.network, rng)
        features = config.network.features
        self.mean, self.cov = Tensor(np.zeros(features)), Tensor(np.eye(features))  # measured, not trained; float64

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> DigitClassifierConfig:
        return DigitClassifierConfig(ImageClassifierConfig(shape=shape))

    def stages(self, data: Dataset) -> Iterator[Stage]:
        if data.labels is None:
            raise UserError(f"{data.title} has no labels, which a classifier needs: train it on the digits")
        real = data.test() or data
        if len(real) < 2 or real.labels is None:
            raise UserError(f"the classifier is measured on at least two labelled images, and {real.source} has "
                            f"{0 if real.labels is None else len(real)}: add images")
        pad = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
        H, W, _ = data.shape

        def batch(step: Step) -> tuple:
            chosen = step.choose(data)
            padded = np.pad(step.images(data, chosen), pad, constant_values=-1)
            shifts = step.rng.integers(0, 2 * SHIFT + 1, (step.size, 2))
            seen = np.stack([x[i:i + H, j:j + W] for x, (i, j) in zip(padded, shifts, strict=True)])
            return seen, data.labels[chosen].astype(np.int64)
        yield Stage("classifier", self.classifier, batch, self.loss, self.config.steps, batch_size=128)
        self.measure(real)

    def loss(self, classifier: ImageClassifier, x, labels) -> Tensor:
        """The mean of -log p(label | x), (): x (B, H, W, C), labels (B,)."""
        return ops.cross_entropy(as_float32(classifier(as_input(classifier, x))), labels)

    def measure(self, data: Dataset) -> None:
        """Sets the mean and covariance of the features of a data set's images, and notes the accuracy on them."""
        features, read = self.read(data.images(np.arange(len(data))))
        features = features.astype(np.float64)
        self.notes |= {"accuracy": float((read == data.labels).mean()), "measured on": data.source}
        self.mean.data = to_device(features.mean(axis=0), self.device)
        self.cov.data = to_device(np.cov(features, rowvar=False), self.device)

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, C) in [-1, 1] -> features (N, 64) and classes (N,)."""
        return self.classifier.read(images)
