"""A model so small that tests can train it, and data to train it on."""

from dataclasses import replace
from functools import cache

import numpy as np

from minidiff.data import mnist
from minidiff.nn.unet import UNetConfig
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer
from minidiff.training.main_job import CaptionedDigits, TrainConfig, Trainer, new_model

CONFIG = TextToImageConfig(T=50, text=TextEncoderConfig(width=8, layers=1, heads=2),
                           unet=UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16, text=8))


def images(count: int = 200) -> mnist.Images:
    packed = mnist.packed()
    return mnist.Images(packed.images[:count], packed.labels[:count], "a few of MNIST's images")


@cache
def _data_and_tokenizer() -> tuple[CaptionedDigits, Tokenizer]:
    data = CaptionedDigits.of(images())
    return data, new_model(data, CONFIG, 0).tokenizer


def trainer(seed: int = 0, **options) -> Trainer:
    data, tokenizer = _data_and_tokenizer()
    data = replace(data, x_0=data.x_0.copy())
    config = TrainConfig(**{"steps": 20, "batch": 6, "warmup": 2, "seed": seed} | options)
    return Trainer(TextToImage(CONFIG, tokenizer, np.random.default_rng(seed)), data, config)


def trained_a_little(seed: int = 0):
    """A model whose output is no longer zero."""
    t = trainer(seed)
    rng = np.random.default_rng(seed)
    for p in t.parameters.values():
        p.data = p.data + 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    return t.model
