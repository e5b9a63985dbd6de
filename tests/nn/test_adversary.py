"""The patch adversary: each side's loss moves that side only, with the derivatives of the hinge."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.adversary import PatchDiscriminator, discriminator_loss, frozen, generator_loss
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
