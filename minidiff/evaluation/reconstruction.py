"""How well an autoencoder's reconstructions match their images, and how many bits the code takes.

    MSE         mean (x - x_hat)^2,  pixels in [-1, 1]
    PSNR        10 log10(peak^2 / MSE),  peak = 1 - (-1)
    accuracy    the share of reconstructions in which the classifier reads the image's digit
    rate        bits of an image's code: KL(q(z|x) || N(0, I)) / log 2, or the number of codes times log2 K
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minidiff.nn.images import clean_images
from minidiff.systems.autoencoder import Autoencoder
from minidiff.systems.digit_classifier import DigitClassifier


@dataclass(frozen=True)
class Reconstruction:
    """The result of `measure`."""

    mse: float
    psnr: float                             # in dB
    accuracy: float
    bits: float                             # for an image
    perplexity: float = math.nan            # of a codebook: how many codes, used equally often, would be as varied
    alive: float = math.nan                 # the share of a codebook's codes that are used


def measure(autoencoder: Autoencoder, images: np.ndarray, digits: np.ndarray, judge: DigitClassifier) -> Reconstruction:
    """How well images (N, H, W, C) in [-1, 1] with these digits (N,) are reconstructed, and at what rate.

    ValueError where there is no image.
    """
    if not len(images):
        raise ValueError("images must hold at least one image, whose reconstruction is measured")
    images = clean_images(images)
    reconstructed = autoencoder.reconstruct(images)
    mse = float(np.mean((images - reconstructed) ** 2, dtype=np.float64))
    # PSNR = 10 log10(peak^2 / MSE)
    psnr = 10 * math.log10(4 / max(mse, 1e-12))             # at most 126 dB
    _, read = judge.read(reconstructed)
    return Reconstruction(mse, psnr, float((read == digits).mean()), **autoencoder.rate(images))
