"""The classifier of clean images, and the perceptual distance that its feature maps give."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig, perceptual_distance

TINY = ImageClassifierConfig(shape=(4, 8, 3), classes=5, widths=(4, 8), groups=2, features=6)


def classifier(config: ImageClassifierConfig = TINY) -> ImageClassifier:
    return ImageClassifier(config, np.random.default_rng(0)).astype(np.float64)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_gradients_through_every_layer():
    net = classifier()
    check_gradients(lambda x, *_: net(x), normal(2, 4, 8, 3), *net.parameters().values(), directions=2)


def test_maps_features_and_logits_follow_from_one_another():
    net, x = classifier(), normal(2, 4, 8, 3)
    maps = net.maps(Tensor(x))
    assert [m.shape for m in maps] == [(2, 2, 4, 4)] * 2 + [(2, 1, 2, 8)] * 2
    features = ops.silu(net.features_in(maps[-1].reshape(2, -1))).data
    np.testing.assert_array_equal(net.features(Tensor(x)).data, features)
    np.testing.assert_allclose(net(Tensor(x)).data, features @ net.logits.w.data + net.logits.b.data, rtol=1e-12)


def test_read_gives_features_and_the_likeliest_class_of_each_image_alone():
    net, x = classifier(), normal(300, 4, 8, 3).clip(-1, 1)
    features, classes = net.read(x)
    assert features.shape == (300, 6) and classes.shape == (300,) and len(set(classes)) > 1
    np.testing.assert_array_equal(classes, net(Tensor(x)).data.argmax(axis=1))
    np.testing.assert_allclose(net.read(x[257:259])[0], features[257:259], rtol=1e-12)


def test_the_names_of_its_parameters_are_those_of_the_files():
    net = ImageClassifier(ImageClassifierConfig(), np.random.default_rng(0))
    shapes = {name: p.shape for name, p in net.parameters().items()}
    assert shapes["conv1.w"] == (3, 3, 4, 32) and shapes["downsample.w"] == (128, 64)
    assert shapes["features_in.w"] == (7 * 7 * 64, 64) and shapes["logits.w"] == (64, 10)
    assert {name.split(".")[0] for name in shapes} == {
        *(f"{part}{i}" for part in ("conv", "norm") for i in (1, 2, 3, 4)), "downsample", "features_in", "logits"}


@pytest.mark.parametrize("changes, message", [
    ({"shape": (30, 28, 1)}, "ImageClassifierConfig: shape must be"), ({"shape": (28, 28, 5)}, "C 1 to 4"),
    ({"widths": (32,)}, "widths takes two multiples of groups"), ({"classes": 1}, "classes must be at least 2"),
    ({"features": 0}, "features at least 1"),
])
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifierConfig(**changes)


def test_the_smallest_configuration_classifies():
    smallest = ImageClassifierConfig((4, 4, 1), classes=2, widths=(1, 1), groups=1, features=1)
    assert classifier(smallest)(Tensor(normal(3, 4, 4, 1))).shape == (3, 2)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(B, 4, 8, 3\), not \(2, 8, 4, 3\)"):
        classifier()(Tensor(normal(2, 8, 4, 3)))


# ---- the perceptual distance -----------------------------------------------------------------------------

def test_the_perceptual_distance_is_zero_between_equals_and_its_gradient_goes_to_the_copy():
    net = classifier()
    x, y = normal(2, 1, 4, 8, 3)
    assert perceptual_distance(net, x, Tensor(x)).item() == 0
    assert perceptual_distance(net, x, Tensor(y)).item() > 0.01
    check_gradients(lambda y: perceptual_distance(net, x, y), y, directions=2)


def test_the_perceptual_distance_compares_directions_of_feature_maps():
    """Each of four layers adds at most 4, the distance of opposite unit vectors; 0 to 2 where they are orthogonal."""
    class Fake:
        device, dtype = "cpu", np.float64

        def maps(self, x):
            return [x]
    e1, e2 = np.zeros((2, 1, 2, 2, 3))
    e1[..., 0], e2[..., 1] = 5, 7
    for y, expected in ((e1, 0), (3 * e1, 0), (e2, 2), (-e1, 4)):
        assert perceptual_distance(Fake(), e1, Tensor(y)).item() == pytest.approx(expected, abs=1e-5)
