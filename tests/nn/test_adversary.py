"""The patch adversary: each side's loss moves that side only, with the derivatives of the hinge."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.adversary import PatchDiscriminator, discriminator_loss, frozen, generator_loss
from minidiff.nn.digit_classifier import Classifier, perceptual_distance
from minidiff.nn.layers import Linear
from minidiff.nn.module import Module


@pytest.fixture()
def D() -> PatchDiscriminator:
    return PatchDiscriminator(1, 4, np.random.default_rng(0)).astype(np.float64)


def images(B: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, 8, 8, 1))


def test_one_logit_for_each_patch_and_what_it_sees(D):
    assert D(Tensor(images())).shape == (3, 2, 2, 1)
    check_gradients(lambda x, *_: D(x), images(1), *D.parameters().values(), directions=2)


class Constant(Module):
    """A discriminator with one parameter: D(x) = w x."""

    def __init__(self, w: float):
        self.w = Tensor(np.array(w), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def test_the_hinge_by_hand():
    D, x, x_hat = Constant(2.0), np.array([0.1, 3.0]), Tensor(np.array([-2.0, 0.4]), True)
    # real: 1 - .2 and 0; fake: 0 and 1 + .8
    assert discriminator_loss(D, x, x_hat).item() == pytest.approx((0.8 + 0) / 2 + (0 + 1.8) / 2)
    assert generator_loss(D, x_hat).item() == pytest.approx(-2 * (-2 + 0.4) / 2)
    # d/dw: -x where 1 - w x > 0, x_hat where 1 + w x_hat > 0
    assert gradients(discriminator_loss(D, x, x_hat), [D.w])[0] == pytest.approx(-0.1 / 2 + 0.4 / 2)
    np.testing.assert_allclose(gradients(generator_loss(D, x_hat), [x_hat])[0], [-1, -1])


def test_each_loss_moves_its_own_side_only(D):
    x_hat, parameters = Tensor(images(seed=1), True), list(D.parameters().values())
    of_D, of_G = discriminator_loss(D, images(), x_hat), generator_loss(D, x_hat)
    to_x, *to_D = gradients(of_D, [x_hat, *parameters])
    assert not to_x.any() and any(g.any() for g in to_D)
    to_x, *to_D = gradients(of_G, [x_hat, *parameters])
    assert to_x.any() and not any(g.any() for g in to_D)
    # in one sum, each side's gradient is its own loss's
    both = gradients(discriminator_loss(D, images(), x_hat) + 0.5 * generator_loss(D, x_hat), [x_hat, parameters[0]])
    np.testing.assert_allclose(both[0], 0.5 * to_x, rtol=1e-12)
    np.testing.assert_allclose(both[1], gradients(discriminator_loss(D, images(), x_hat), [parameters[0]])[0],
                               rtol=1e-12)


def test_frozen_is_the_same_function_of_the_same_arrays(D):
    twin, x = frozen(D), Tensor(images())
    assert np.array_equal(twin(x).data, D(x).data)
    for name, p in D.parameters().items():
        q = twin.parameters()[name]
        assert q.data is p.data and not q.requires_grad and p.requires_grad
    assert not twin(x).requires_grad


def test_frozen_reaches_lists_of_parts():
    class Chain(Module):
        def __init__(self):
            self.parts = [Linear(2, 2, np.random.default_rng(i)) for i in range(2)]

        def forward(self, x):
            return self.parts[1](self.parts[0](x))
    assert not frozen(Chain())(Tensor(np.ones((1, 2), np.float32))).requires_grad


# ---- what looks alike ------------------------------------------------------------------------------------

def test_the_perceptual_distance_is_zero_at_home_and_its_gradient_goes_to_the_copy():
    judge = Classifier(np.random.default_rng(0)).astype(np.float64)
    x, y = np.random.default_rng(1).normal(size=(2, 1, 28, 28, 1))
    assert perceptual_distance(judge, x, Tensor(x)).item() == 0
    assert perceptual_distance(judge, x, Tensor(y)).item() > 0.01
    check_gradients(lambda y: perceptual_distance(judge, x, y), y, directions=2)


def test_the_perceptual_distance_compares_directions_of_feature_maps():
    """Each of four layers adds at most 4, the distance of opposite unit vectors; 0 to 2 where they are orthogonal."""
    class Fake:
        def maps(self, x):
            return [x]
    e1, e2 = np.zeros((2, 1, 2, 2, 3))
    e1[..., 0], e2[..., 1] = 5, 7
    for y, expected in ((e1, 0), (3 * e1, 0), (e2, 2), (-e1, 4)):
        assert perceptual_distance(Fake(), e1, Tensor(y)).item() == pytest.approx(expected, abs=1e-5)


def test_the_judges_classifier_is_the_one_of_the_weights():
    from minidiff.evaluation.judge import Judge
    x = np.random.default_rng(0).uniform(-1, 1, (3, 28, 28, 1)).astype(np.float32)
    judge = Classifier.judge()
    assert np.array_equal(judge.read(x)[0], Judge.load().classifier.read(x)[0])
    h = judge.maps(Tensor(x))
    assert [m.shape[1:] for m in h] == [(14, 14, 32)] * 2 + [(7, 7, 64)] * 2
    assert np.array_equal(ops.silu(judge.features_in(h[-1].reshape(3, -1))).data, judge.features(Tensor(x)).data)
