"""The network that reads digits: the judge of evaluate.py and, frozen, what autoencoders call similar.

    pixels --> conv --> conv --down--> conv --> conv --> 64 features --> 10 logits

    d(x, y) = sum_l mean over places of || f_l(x) - f_l(y) ||^2         f_l: layer l's maps, of length 1 at each place

d is the perceptual distance of Zhang et al. 2018 (LPIPS, arXiv 1801.03924, eq. 1) with w_l = 1: two strokes that look
alike are near, though their pixels differ.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minidiff import checkpoint
from minidiff.engine import conv, ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.nn.layers import Conv2d, GroupNorm, Linear
from minidiff.nn.module import Module

JUDGE = Path(__file__).parents[1] / "weights" / "judge.safetensors"


class Classifier(Module):
    """A small convolutional network that reads digits: (B, 28, 28, 1) in [-1, 1] -> logits (B, 10)."""

    def __init__(self, rng: np.random.Generator):
        self.conv1, self.norm1 = Conv2d(4, 32, rng), GroupNorm(32, 8)
        self.conv2, self.norm2 = Conv2d(32, 32, rng), GroupNorm(32, 8)
        self.downsample = Linear(128, 64, rng)
        self.conv3, self.norm3 = Conv2d(64, 64, rng), GroupNorm(64, 8)
        self.conv4, self.norm4 = Conv2d(64, 64, rng), GroupNorm(64, 8)
        self.features_in, self.logits = Linear(7 * 7 * 64, 64, rng), Linear(64, 10, rng)

    @classmethod
    def judge(cls) -> Classifier:
        """The one that comes with minidiff, in the judge's file."""
        return cls.of(checkpoint.load(JUDGE))

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> Classifier:
        """The one in a judge's file; UserError, naming the file, if there is none."""
        if saved.meta.get("system") != "judge":
            raise UserError(f"{saved.path} holds {str(saved.meta.get('system'))[:40]!r}, and a judge was asked for.")
        classifier, prefix = cls(np.random.default_rng(0)), "classifier."
        weights = {name: w for name, w in saved.tensors.items() if name.startswith(prefix)}
        checkpoint.check_shapes({prefix + name: p.shape for name, p in classifier.parameters().items()}, weights,
                                saved.path)
        classifier.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items()})
        return classifier

    def maps(self, x: Tensor) -> list[Tensor]:
        """What each of the four convolutions sees: two of (B, 14, 14, 32), two of (B, 7, 7, 64)."""
        h1 = ops.silu(self.norm1(self.conv1(conv.space_to_depth(x))))               # (B, 14, 14, 32)
        h2 = h1 + ops.silu(self.norm2(self.conv2(h1)))
        h3 = self.downsample(conv.space_to_depth(h2))                                   # (B, 7, 7, 64)
        h3 = h3 + ops.silu(self.norm3(self.conv3(h3)))
        return [h1, h2, h3, h3 + ops.silu(self.norm4(self.conv4(h3)))]

    def features(self, x: Tensor) -> Tensor:
        """What FID compares: (B, 64)."""
        h = self.maps(x)[-1]
        return ops.silu(self.features_in(h.reshape(h.shape[0], 7 * 7 * 64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))

    def read(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 28, 28, 1) in [-1, 1] -> features (N, 64) and digits (N,)."""
        def one(part: slice):
            with no_grad():
                f = self.features(Tensor(images[part]))
                return f.data, self.logits(f).data.argmax(axis=1)
        features, digits = zip(*parallel_map(one, shards(len(images), 256)), strict=True)
        return np.concatenate(features), np.concatenate(digits)


def perceptual_distance(classifier: Classifier, x: np.ndarray, y: Tensor) -> Tensor:
    """d(x, y) of images (B, 28, 28, 1), the mean over the batch, (): its gradient goes to y."""
    with no_grad():
        real = classifier.maps(Tensor(x))
    total = None
    for f, g in zip(real, classifier.maps(y), strict=True):
        d = Tensor(_unit(f).data) - _unit(g)
        # d(x, y) = sum_l mean || f_l(x) - f_l(y) ||^2
        term = ops.mean(ops.sum(d * d, axis=-1))
        total = term if total is None else total + term
    return total


def _unit(f: Tensor) -> Tensor:
    """Of length 1 at each place, (B, H, W, C); where the map is 0 it stays 0."""
    return f / ops.sqrt(ops.sum(f * f, axis=-1, keepdims=True) + 1e-6)
