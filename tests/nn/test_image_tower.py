"""The image tower: gradients, images that are not square and have several channels, and what it refuses."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor
from minidiff.nn.image_tower import ImageTower, ImageTowerConfig


def tower(shape=(8, 8, 1), D: int = 3) -> ImageTower:
    rng = np.random.default_rng(0)
    made = ImageTower(ImageTowerConfig(shape=shape, widths=(4, 4), groups=2, last=2), D, rng).astype(np.float64)
    for p in made.parameters().values():                    # no weight is 0, so that every branch counts
        p.data = p.data + 0.1 * rng.standard_normal(p.shape)
    return made


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 12, 3), (8, 4, 4)])
def test_gradients_of_images_of_any_shape(shape):
    net, x = tower(shape), np.random.default_rng(1).normal(size=(2, *shape))
    assert net(Tensor(x)).shape == (2, 3)
    check_gradients(lambda x, *_: net(x), x, *net.parameters().values(), directions=2)


def test_every_pixel_and_channel_counts():
    net, x = tower((4, 8, 2)), np.random.default_rng(1).normal(size=(1, 4, 8, 2))
    for i in np.ndindex(4, 8, 2):
        y = x.copy()
        y[(0, *i)] += 1
        assert np.abs(net(Tensor(y)).data - net(Tensor(x)).data).max() > 1e-6, i


def test_the_last_grid_is_a_quarter_of_the_image():
    assert ImageTowerConfig().flat == 7 * 7 * 16
    assert ImageTowerConfig(shape=(8, 20, 3), last=5).flat == 2 * 5 * 5


@pytest.mark.parametrize("shape", [(30, 28, 1), (28, 30, 1), (28, 28, 5), (28, 28, 0), (0, 28, 1), (-4, -4, 1),
                                   (28, 28), (28, 28, 1, 1)])
def test_shapes_that_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape must be \(H, W, C\), H and W multiples of 4 and C 1 to 4, not \("):
        ImageTowerConfig(shape=shape)


@pytest.mark.parametrize("widths, groups, last", [((8,), 8, 1), ((8, 12), 8, 1), ((8, 8), 8, 0), ((8, 8), 0, 1)])
def test_widths_that_are_refused(widths, groups, last):
    with pytest.raises(ValueError, match="widths takes two multiples of groups"):
        ImageTowerConfig(widths=widths, groups=groups, last=last)


@pytest.mark.parametrize("shape", [(2, 8, 4, 3), (2, 4, 8, 1), (4, 8, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 4, 8, 3\), not"):
        tower((4, 8, 3))(Tensor(np.zeros(shape)))
