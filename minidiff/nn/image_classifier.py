"""A classifier of clean images, and the distance between images that its feature maps give.

    pixels --> conv --> conv --down--> conv --> conv --> features --> logits        (FID compares the features)

    d(x, y) = sum_l mean over positions of || f_l(x) - f_l(y) ||^2     f_l: layer l's map, of length 1 at each position

d is the perceptual distance of Zhang et al. 2018 (LPIPS, arXiv 1801.03924, eq. 1) with w_l = 1: two images that look
alike are close, though their pixels differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minidiff.engine import conv, ops
from minidiff.engine.backend import to_numpy
from minidiff.engine.parallel import map_batch
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.image_tower import check_images, check_shape, check_two_halvings
from minidiff.nn.images import clean_images
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input


@dataclass(frozen=True)
class ImageClassifierConfig:
    """ValueError unless height and width are multiples of 4, there are 1 to 4 channels, and widths are two
    multiples of groups."""

    shape: tuple[int, int, int] = (28, 28, 1)   # of an image: (H, W, C)
    classes: int = 10
    widths: tuple[int, ...] = (32, 64)      # channels at half and at a quarter of the resolution
    groups: int = 8
    features: int = 64                      # numbers that the logits are computed from

    def __post_init__(self):
        check_shape("ImageClassifierConfig", self.shape)
        if len(self.widths) != 2 or min(self.groups, *self.widths) < 1 or any(w % self.groups for w in self.widths):
            raise ValueError(f"ImageClassifierConfig: widths takes two multiples of groups ({self.groups}), "
                             f"not {self.widths}")
        check_two_halvings("ImageClassifierConfig", self.shape, self.widths)
        if self.classes < 2 or self.features < 1:
            raise ValueError("ImageClassifierConfig: classes must be at least 2 and features at least 1, "
                             f"not {self.classes} and {self.features}")


class ImageClassifier(Module):
    """Images (B, H, W, C) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, config: ImageClassifierConfig, rng: np.random.Generator):
        (H, W, C), (half, quarter), groups = config.shape, config.widths, config.groups
        self.config = config
        self.conv1, self.norm1 = Conv2d(4 * C, half, rng), GroupNorm(half, groups)
        self.conv2, self.norm2 = Conv2d(half, half, rng), GroupNorm(half, groups)
        self.downsample = Linear(4 * half, quarter, rng)
        self.conv3, self.norm3 = Conv2d(quarter, quarter, rng), GroupNorm(quarter, groups)
        self.conv4, self.norm4 = Conv2d(quarter, quarter, rng), GroupNorm(quarter, groups)
        self.features_in = Linear(H // 4 * (W // 4) * quarter, config.features, rng)
        self.logits = Linear(config.features, config.classes, rng)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The outputs of the four convolutions: two of (B, H/2, W/2, half), two of (B, H/4, W/4, quarter)."""
        check_images(x, self.config.shape)
        h1 = ops.silu(self.norm1(self.conv1(conv.space_to_depth(x))))               # (B, H/2, W/2, half)
        h2 = h1 + ops.silu(self.norm2(self.conv2(h1)))
        h3 = self.downsample(conv.space_to_depth(h2))                               # (B, H/4, W/4, quarter)
        h3 = h3 + ops.silu(self.norm3(self.conv3(h3)))
        return [h1, h2, h3, h3 + ops.silu(self.norm4(self.conv4(h3)))]

    def features(self, x: Tensor) -> Tensor:
        """What FID compares: (B, features)."""
        h = self.maps(x)[-1]
        return ops.silu(self.features_in(h.reshape(h.shape[0], math.prod(h.shape[1:]))))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, C) in [-1, 1] -> features (N, features), and the likeliest classes (N,) of 0..classes-1."""
        def one(x):
            f = self.features(as_input(self, x))
            return as_float32(f), self.logits(f).data.argmax(axis=1)
        images = clean_images(images, self.config.shape)
        features, classes = map(to_numpy, map_batch(one, images, device=self.device, size=256))
        if not np.isfinite(features).all():
            raise ValueError("the classifier's weights must be finite: its features are not")
        return features, classes


def perceptual_distance(classifier: ImageClassifier, x: np.ndarray, y: Tensor) -> Tensor:
    """d(x, y) of images (B, H, W, C), the mean over the batch, ().  Its gradient reaches y and the classifier."""
    with no_grad():
        real = classifier.maps(as_input(classifier, x))
    total = None
    for f, g in zip(real, classifier.maps(as_input(classifier, y)), strict=True):
        d = Tensor(_unit(f).data) - _unit(g)
        # d(x, y) = sum_l mean || f_l(x) - f_l(y) ||^2
        term = ops.mean(ops.sum(d * d, axis=-1))
        total = term if total is None else total + term
    return total


def _unit(f: Tensor) -> Tensor:
    """Of length 1 at each position, (B, H, W, C); where the map is 0 it stays 0."""
    f = as_float32(f)
    square = ops.sum(f * f, axis=-1, keepdims=True) + 1e-6
    one = Tensor(square.data / square.data)                 # NaN where the square is infinite, and f would become 0
    return f / (ops.sqrt(square) * one)
