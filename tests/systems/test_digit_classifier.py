"""The classifier of digits: what it learns from, the statistics that FID compares with, and its file."""

from copy import copy

import numpy as np
import pytest
from scipy.special import log_softmax
from support import small_systems

from minidiff.data import mnist
from minidiff.data.dataset import Dataset
from minidiff.data.pixels import to_float
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.systems.digit_classifier import SHIFT, DigitClassifier, DigitClassifierConfig
from minidiff.systems.stage import Step
from minidiff.training import run

CONFIG = small_systems.CONFIGS["digit-classifier"]


@pytest.fixture(scope="module")
def model() -> DigitClassifier:
    return small_systems.small("digit-classifier")


# ---- training ------------------------------------------------------------------------------------------------

def test_a_batch_has_images_shifted_by_up_to_two_pixels_and_their_labels(model, data):
    """Each image is one of the data set's, moved by one of 25 shifts, with black where there was nothing.

    All shifts are equally likely: of 2500 images 100 each, within 6 standard deviations, 10 each; false alarm 5e-8.
    """
    x, labels = next(model.stages(data)).batch(Step(0, 1, 0, 10, size=2500))
    images = data.images(range(len(data)))
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=-1)
    known = {}                                              # shifts of equal images may coincide: all origins count
    for i in range(2 * SHIFT + 1):
        for j in range(2 * SHIFT + 1):
            for label, image in zip(data.labels, padded[:, i:i + 28, j:j + 28], strict=True):
                known.setdefault(image.tobytes(), []).append((label, (i, j)))
    assert x.dtype == np.float32 and labels.dtype == np.int64 and x.shape == (2500, 28, 28, 1)
    found = [known[image.tobytes()] for image in x]
    assert all(label in {k for k, _ in origins} for label, origins in zip(labels, found, strict=True))
    shifts = np.array([5 * i + j for origins in found for _, (i, j) in origins[:1]])
    assert (np.abs(np.bincount(shifts, minlength=25) - 100) < 60).all()


def test_the_loss_is_the_cross_entropy_of_the_labels(model, data):
    stage = next(model.stages(data))
    x, labels = stage.batch(Step(1, 1, 0, 10, size=7))
    with no_grad():
        log_p = log_softmax(stage.module(Tensor(x)).data.astype(np.float64), axis=1)
    expected = -log_p[np.arange(7), labels].mean()
    assert stage.loss(stage.module, x, labels).item() == pytest.approx(expected, rel=1e-5)


def test_a_run_ends_with_the_statistics_of_the_averaged_weights(tmp_path, data):
    """Of the test images, where the data set has them, and else of its own; the file gives them back in float64."""
    tests = copy(data)
    tests.pixels, tests.labels, tests.words, tests.source = data.pixels[:50], data.labels[:50], data.words[:50], "tests"
    with_tests = copy(data)
    with_tests.load_test = lambda: tests
    for name, given, measured in (("a", data, data), ("b", with_tests, tests)):
        trained = run.run(tmp_path / name, DigitClassifier, given, run.TrainOptions(steps=2, batch=4), config=CONFIG,
                          quiet=True).system
        features, read = trained.read(measured.images(range(len(measured))))
        np.testing.assert_allclose(trained.mean.data, features.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(trained.cov.data, np.cov(features.T.astype(np.float64)), rtol=1e-6, atol=1e-9)
        loaded = DigitClassifier.load(tmp_path / name / "model.safetensors")
        assert loaded.notes["accuracy"] == (read == measured.labels).mean()
        assert loaded.notes["measured on"] == measured.source
        assert loaded.mean.dtype == loaded.cov.dtype == np.float64
        np.testing.assert_array_equal(loaded.cov.data, trained.cov.data)
        np.testing.assert_array_equal(loaded.read(data.images(range(3)))[0], trained.read(data.images(range(3)))[0])


def test_a_file_in_half_precision_keeps_the_statistics(model, data, tmp_path):
    model.measure(data)
    model.save(tmp_path / "m.safetensors", dtype=np.float16)
    loaded = DigitClassifier.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(loaded.mean.data, model.mean.data)
    np.testing.assert_array_equal(loaded.cov.data, model.cov.data)


class Unlabelled(Dataset):
    """A data set without labels."""

    name, shape = "unlabelled", (28, 28, 1)


def test_a_data_set_without_labels_is_refused(model):
    with pytest.raises(UserError, match="'unlabelled' has no labels"):
        next(model.stages(Unlabelled()))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        DigitClassifierConfig(steps=0)


def test_the_default_network_reads_the_data_sets_images():
    assert DigitClassifier.config_for((16, 20, 3)).network.shape == (16, 20, 3)


# ---- what it reads -------------------------------------------------------------------------------------------

def test_what_is_read_of_an_image_does_not_depend_on_its_batch(model, data):
    features, digits = model.read(data.images(range(6)))
    assert features.shape == (6, CONFIG.network.features) and features.dtype == np.float32 and digits.shape == (6,)
    for i in range(6):
        alone, digit = model.read(data.images([i]))
        np.testing.assert_allclose(alone[0], features[i], atol=1e-5)
        assert digit[0] == digits[i]


def test_the_shipped_weights_read_the_digits_and_know_their_statistics():
    """Packed training images: nearly all are read right, and their features' mean is near that of the test images."""
    shipped, packed = DigitClassifier.load(), mnist.packed()
    features, digits = shipped.read(to_float(packed.images[:500])[..., None])
    assert (digits == packed.labels[:500]).mean() > 0.98
    std = np.sqrt(shipped.cov.data.diagonal())
    # the mean of 500 differs from that of all by std / sqrt(500), about; it was trained on these
    assert (np.abs(features.mean(axis=0) - shipped.mean.data) < 10 * std / np.sqrt(500)).all()
    np.testing.assert_allclose(shipped.cov.data, shipped.cov.data.T)
    assert np.linalg.eigvalsh(shipped.cov.data).min() > -1e-9
