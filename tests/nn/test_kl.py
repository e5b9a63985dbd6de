"""The divergence of learned Gaussians, against the plain one and by central differences."""

import numpy as np
from support.gradcheck import check_gradients

from minidiff.diffusion.gaussian import kl_gaussian
from minidiff.engine.tensor import Tensor
from minidiff.nn.kl import kl


def test_it_is_the_plain_one_and_has_its_gradients():
    m1, l1, m2, l2 = np.random.default_rng(0).standard_normal((4, 3, 5))
    np.testing.assert_allclose(kl(m1, l1, Tensor(m2), l2).data, kl_gaussian(m1, np.exp(l1), m2, np.exp(l2)), rtol=1e-12)
    np.testing.assert_allclose(kl(m1, l1[:1], m2, Tensor(l2)).data, kl_gaussian(m1, np.exp(l1[:1]), m2, np.exp(l2)))
    check_gradients(kl, m1, l1, m2, l2)
