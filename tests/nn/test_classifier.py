"""The classifier of noisy images: gradients, batches, and questions that are not asked."""

from dataclasses import replace

import numpy as np
import pytest
from support.gradcheck import STEP, check_gradients

from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.classifier import NOT_ASKED, NoisyClassifier
from minidiff.nn.unet import UNetConfig

TINY = UNetConfig(widths=(4, 8), attention=(False, True), heads=2, groups=2, embedding=6)
CLASSES = (4, 2, 3)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def classifier(**changes) -> NoisyClassifier:
    """In float64, every parameter moved off its first value, so that no branch is zero."""
    net, rng = NoisyClassifier(replace(TINY, **changes), CLASSES, np.random.default_rng(0)), np.random.default_rng(9)
    for p in net.astype(np.float64).parameters().values():
        p.data += 0.2 * rng.standard_normal(p.shape)
    return net


T, Y = np.array([3, 700, 400]), np.array([[0, 1, NOT_ASKED], [3, NOT_ASKED, 2], [NOT_ASKED] * 3])


@pytest.mark.parametrize("changes", [{}, {"blocks": 2, "widths": (4, 6, 4), "attention": (False, False, True)},
                                     {"widths": (4,), "attention": (False,), "patch": 1, "channels": 3}])
def test_gradients(changes):
    """Of the logits, to the image and to every parameter."""
    net = classifier(**changes)
    x = Tensor(normal(2, net.config.multiple, 2 * net.config.multiple, net.config.channels), True)
    check_gradients(lambda *_: net(x, T[:2]), x, *net.parameters().values(), directions=1)


def test_the_gradient_that_guides_is_that_of_log_prob():
    """grad_log_prob in every pixel, by central differences of log p, sample by sample."""
    net, x = classifier(), normal(3, 4, 4, 1)
    g = net.grad_log_prob(x, T, Y)
    assert g.shape == x.shape and not g[2].any() and g[:2].all()        # the third is asked nothing
    with no_grad():                                         # one sample stays in this thread: it asks for a gradient
        np.testing.assert_allclose(net.grad_log_prob(x[:1], T[:1], Y[:1]), g[:1], rtol=1e-9, atol=1e-12)

    def log_p(x):
        with no_grad():
            return net.log_prob(Tensor(x), T, Y).data
    for i in np.ndindex(4, 4):
        step = np.zeros((1, 4, 4, 1))
        step[0, *i] = STEP
        np.testing.assert_allclose(g[:, *i, 0], (log_p(x + step) - log_p(x - step)) / (2 * STEP), rtol=1e-5, atol=1e-8)


def test_log_prob_is_the_sum_over_the_questions_that_are_asked():
    """Against the probabilities of `read`, which have the sum 1 for each question."""
    net, x = classifier(), normal(3, 4, 8, 1)
    p = net.read(x, T)
    assert [a.shape for a in p] == [(3, K) for K in CLASSES]
    np.testing.assert_allclose([a.sum(axis=1) for a in p], 1, rtol=1e-12)
    expected = [np.log(p[0][0, 0]) + np.log(p[1][0, 1]), np.log(p[0][1, 3]) + np.log(p[2][1, 2]), 0]
    np.testing.assert_allclose(net.log_prob(Tensor(x), T, Y).data, expected, rtol=1e-10, atol=1e-12)
    # and over all joint answers it sums to 1
    every = np.stack(np.meshgrid(*map(np.arange, CLASSES), indexing="ij"), -1).reshape(-1, len(CLASSES))
    copies = np.repeat(x[:1], len(every), axis=0)
    total = np.exp(net.log_prob(Tensor(copies), np.full(len(every), 3), every).data).sum()
    assert total == pytest.approx(1, rel=1e-10)


def test_an_answer_does_not_depend_on_the_batch():
    """Each image alone, in another order, or among others: its probabilities and its gradient."""
    net, x = classifier(), normal(3, 8, 4, 1)
    together, slopes = net.read(x, T), net.grad_log_prob(x, T, Y)
    for rows in ([2, 0, 1], [1], [0, 0, 2, 1]):
        for alone, among in zip(net.read(x[rows], T[rows]), together, strict=True):
            np.testing.assert_allclose(alone, among[rows], rtol=1e-10)
        np.testing.assert_allclose(net.grad_log_prob(x[rows], T[rows], Y[rows]), slopes[rows], rtol=1e-9, atol=1e-13)


def test_it_depends_on_the_time():
    net, x = classifier(), normal(1, 4, 4, 1)
    assert np.abs(net.read(x, np.array([3]))[0] - net.read(x, np.array([700]))[0]).max() > 1e-3


def test_attention_pooling_starts_as_the_mean():
    """Its branch starts at 0, so that shuffling the pixels of the last level changes nothing; after training it may."""
    net = NoisyClassifier(replace(TINY, widths=(4,), attention=(False,), patch=1), CLASSES, np.random.default_rng(0))
    x = normal(1, 3, 5, 1).astype(np.float32)
    kernel = net.conv_in.w.data
    kernel[[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0      # each pixel sees only itself
    shuffled = np.random.default_rng(1).permutation(x.reshape(-1)).reshape(x.shape)
    np.testing.assert_allclose(net.read(x, T[:1])[0], net.read(shuffled, T[:1])[0], rtol=1e-5)
    assert np.abs(net.read(x, T[:1])[0] - net.read(x**2, T[:1])[0]).max() > 1e-3    # the mean itself matters


@pytest.mark.parametrize("config, classes", [(replace(TINY, text=3), CLASSES), (TINY, ()), (TINY, (3, 1))])
def test_configurations_that_are_refused(config, classes):
    with pytest.raises(ValueError, match="config must have text = 0, and classes numbers of at least 2"):
        NoisyClassifier(config, classes, np.random.default_rng(0))


@pytest.mark.parametrize("x, t", [((2, 4, 4), 2), ((2, 4, 6, 1), 2), ((2, 4, 4, 2), 2), ((2, 4, 4, 1), 3)])
def test_images_of_a_wrong_shape_are_refused(x, t):
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 1\) with H and W multiples of 4, and t \(B,\)"):
        classifier()(Tensor(normal(*x)), np.zeros(t, int))


@pytest.mark.parametrize("y", [Y[:2], Y[:, :2], Y * 1.0, Y - 1, Y + 1])
def test_answers_that_are_not_classes_are_refused(y):
    with pytest.raises(ValueError, match=r"y must be whole numbers \(3, 3\), a class each of \(4, 2, 3\) or -1"):
        classifier().log_prob(Tensor(normal(3, 4, 4, 1)), T, y)
