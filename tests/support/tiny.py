"""A model small enough to train in a test, and its training data."""

from dataclasses import replace
from functools import cache

import numpy as np

from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.nn.unet import UNetConfig
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer
from minidiff.training.trainer import TrainConfig, Trainer

CONFIG = TextToImageConfig(T=50, text=TextEncoderConfig(width=8, layers=1, heads=2),
                           unet=UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16, text=8))


def images(count: int = 200) -> mnist.Images:
    packed = mnist.packed()
    return mnist.Images(packed.images[:count], packed.labels[:count], "a few of MNIST's images")


@cache
def digits(count: int = 200) -> Digits:
    return Digits.of(images(count))


@cache
def tokenizer() -> Tokenizer:
    return TextToImage.new(digits(), config=CONFIG).tokenizer


def trainer(seed: int = 0, *, data: Digits | None = None, drop: float = 0.1, **options) -> Trainer:
    """A trainer of the tiny text-to-image system."""
    config = TrainConfig(**{"steps": 20, "batch": 6, "warmup": 2, "seed": seed} | options)
    model = TextToImage(replace(CONFIG, drop_caption=drop), tokenizer(), np.random.default_rng(seed))
    stage = next(model.stages(data or digits()))
    return Trainer(stage, config, description=model.describe() | {"data": digits().fingerprint, "stage": stage.name})


def trained_a_little(seed: int = 0) -> TextToImage:
    """A model whose output is no longer zero."""
    t = trainer(seed)
    rng = np.random.default_rng(seed)
    for p in t.parameters.values():
        p.data = p.data + 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    return t.stage.module
