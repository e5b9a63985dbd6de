"""Every network computes in half precision: its loss and gradients are float32's, rounded."""

import numpy as np
import pytest
from support.every_network import NETWORKS

from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Linear
from minidiff.nn.precision import as_float32, as_input, dtype_of, in_precision

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}            # the largest relative error of rounding to it
half = pytest.mark.parametrize("precision", EPS)
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def the(precision: str) -> np.dtype:
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs the package ml_dtypes")
    return dtype_of(precision)


def loss_and_gradients(network, module, computing) -> tuple[Tensor, np.ndarray]:
    """The loss of `computing`, and its gradients by the parameters of `module`, as one vector."""
    loss = network.loss(computing)
    grads = gradients(loss, list(module.parameters().values()))
    assert loss.shape == () and all(g.dtype == np.float32 for g in grads)
    return loss, np.concatenate([g.ravel() for g in grads])


@half
@every_network
def test_the_loss_and_its_gradients_in_half_precision(network, precision):
    """The loss itself is float32.  It and its gradients differ from those of float32 by some tens of roundings."""
    module, dtype = network.new(), the(precision)
    twin = in_precision(module, dtype)
    assert twin.dtype == dtype and module.dtype == np.float32
    (exact, g), (loss, half_g) = (loss_and_gradients(network, module, m) for m in (module, twin))
    assert exact.dtype == loss.dtype == np.float32
    assert loss.item() != exact.item() and loss.item() == pytest.approx(exact.item(), rel=30 * EPS[precision])
    assert np.linalg.norm(half_g - g) < 60 * EPS[precision] * np.linalg.norm(g)


# --- what a loss brings to a network, and takes from it ---------------------------------------------------

@half
def test_inputs_come_in_the_modules_dtype_and_results_in_float32(precision):
    layer, x = Linear(3, 2, np.random.default_rng(0)), np.ones((4, 3), np.float32)
    twin = in_precision(layer, the(precision))
    given = as_input(twin, x)
    assert given.dtype == the(precision) and as_float32(twin(given)).dtype == np.float32
    np.testing.assert_array_equal(as_float32(given).data, x)
    leaf = Tensor(x, requires_grad=True)
    dx, = gradients(as_float32(twin(as_input(twin, leaf))), [leaf], np.ones((4, 2), np.float32))
    np.testing.assert_allclose(dx, np.tile(twin.w.data.astype(np.float32).sum(axis=1), (4, 1)), rtol=4 * EPS[precision])


def test_what_has_the_right_dtype_stays_itself():
    """No copy, so that float64 stays float64 in gradient checks."""
    layer = Linear(3, 2, np.random.default_rng(0)).astype(np.float64)
    x = Tensor(np.ones((4, 3)))
    assert as_input(layer, x) is x and as_float32(x) is x and as_input(layer, x.data).data is x.data
    single = Tensor(np.ones(2, np.float32))
    assert as_float32(single) is single
