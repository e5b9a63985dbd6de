"""What is measured of an autoencoder's reconstructions: against formulas, and for copies."""

import math

import numpy as np
import pytest
from support import small_systems

from minidiff import systems
from minidiff.data.digits import Digits
from minidiff.evaluation.reconstruction import measure


@pytest.fixture(scope="module")
def data() -> Digits:
    return small_systems.data()


@pytest.mark.parametrize("name", ["autoencoder-kl", "autoencoder-vq"])
def test_the_error_and_the_rate_are_those_of_the_reconstructions(name, data):
    autoencoder, judge = small_systems.small(name), small_systems.small("digit-classifier")
    x, digits = data.images(range(6)), data.labels[:6]
    x_hat = autoencoder.reconstruct(x)
    found = measure(autoencoder, x, digits, judge)
    assert found.mse == pytest.approx(((x_hat - x) ** 2).mean(), rel=1e-5)
    assert found.psnr == pytest.approx(20 * math.log10(2 / math.sqrt(found.mse)))
    assert found.accuracy == (judge.read(x_hat)[1] == digits).mean()
    assert {"bits": found.bits} == pytest.approx({"bits": autoencoder.rate(x)["bits"]})
    assert math.isnan(found.perplexity) == math.isnan(found.alive) == (name == "autoencoder-kl")


class Copies:
    """In an autoencoder's place: it gives the images back, at a rate of 3 bits."""

    def reconstruct(self, x):
        return x

    def rate(self, x):
        return {"bits": 3.0}


def test_perfect_copies_measure_as_the_images_do(data):
    """By the classifier that comes with minidiff."""
    judge, x, digits = systems.load_system("digit-classifier"), data.images(range(100)), data.labels[:100]
    found = measure(Copies(), x, digits, judge)
    assert found.mse == 0 and found.psnr > 100 and found.accuracy >= 0.97 and found.bits == 3
    assert measure(Copies(), x, (digits + 1) % 10, judge).accuracy <= 0.03
    np.testing.assert_allclose(measure(Dark(), x, digits, judge).mse, ((x + 1) ** 2).mean(), rtol=1e-5)


class Dark(Copies):
    """Every reconstruction is black."""

    def reconstruct(self, x):
        return np.full_like(x, -1)
