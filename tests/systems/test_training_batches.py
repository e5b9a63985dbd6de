"""What batches and losses share: which images, whose captions, and the mean squared error in closed form."""

import numpy as np
import pytest
from scipy import stats

from minidiff.data import digit_captions
from minidiff.diffusion.schedules import cosine
from minidiff.engine.tensor import Tensor
from minidiff.systems.training_batches import denoising_loss, random_captions, random_indices


def test_all_images_are_equally_likely(data):
    """Pearson's test at a false alarm of 1e-6; the images are drawn with replacement, in the shape asked for."""
    drawn = random_indices(data, np.random.default_rng(0), (40, 500))
    assert drawn.shape == (40, 500)
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=len(data))).pvalue > 1e-6
    assert random_indices(data, np.random.default_rng(0), 7).shape == (7,)


def test_an_image_says_nothing_of_the_next_one(data):
    """The difference of neighbours is any number, modulo the number of images: Pearson's test, false alarm 1e-6."""
    first, second = random_indices(data, np.random.default_rng(1), (10000, 2)).T
    assert stats.chisquare(np.bincount((second - first) % len(data), minlength=len(data))).pvalue > 1e-6


def test_each_caption_is_of_its_image(data):
    indices = np.arange(len(data))[::-1]
    said = [digit_captions.parse(c)[0] for c in random_captions(data, indices, np.random.default_rng(0))]
    assert said == data.labels[indices].tolist()


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_captions_are_dropped_independently(data, drop):
    """The count of 4000, and that of neighbours dropped together; each beyond 6 sigmas with probability 2e-9."""
    captions = random_captions(data, [0] * 4000, np.random.default_rng(0), drop)
    dropped = np.array([caption == "" for caption in captions])
    assert abs(dropped.sum() - 4000 * drop) <= 6 * (4000 * drop * (1 - drop)) ** 0.5
    both = drop * drop
    assert abs((dropped[::2] & dropped[1::2]).sum() - 2000 * both) <= 6 * (2000 * both * (1 - both)) ** 0.5


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_mean_squared_error_at_x_t(predicts):
    """The network gives 0.3 x_t: the loss in closed form, in float64."""
    schedule, rng = cosine(50), np.random.default_rng(0)
    x_0, eps = rng.standard_normal((2, 5, 4, 4, 1)).astype(np.float32)
    t = np.array([0, 7, 20, 33, 49])
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    target = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0}[predicts]
    expected = ((target - 0.3 * (alpha * x_0 + sigma * eps)) ** 2).mean()
    loss = denoising_loss(schedule, predicts, lambda x_t: Tensor(x_t) * 0.3, x_0, t, eps)
    assert loss.shape == () and loss.dtype == np.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert denoising_loss(schedule, predicts, lambda x_t: Tensor((0.3 * x_t).astype(np.float16)), x_0, t,
                          eps).dtype == np.float32
