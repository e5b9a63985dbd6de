"""Every op on a GPU: the same inputs on the stand-in for CuPy give the same results, and the results are there.

NumPy computes on both sides, so the results agree to rounding; they differ only where the CPU takes a faster algorithm
for convolution or sums in another order.  The tests show that every line asks for the right library.
"""

import numpy as np
import pytest
from support import every_op
from support.every_op import EVERY_OP
from support.fake_cupy import assert_same, install, of_the_stand_in, one_sentence, watch_launches
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.engine.attention import causal_mask, scaled_dot_product_attention
from minidiff.engine.backend import to_device
from minidiff.engine.conv import conv_transpose2d
from minidiff.engine.tensor import Tensor, gradients, record


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def masks(cupy, monkeypatch):
    """Moves the masks that the ops of every_op.py use to the device; ids and labels stay, since CuPy accepts them."""
    for name in ("SOME", "LOOK"):
        monkeypatch.setattr(every_op, name, cupy.asarray(getattr(every_op, name)))


every = pytest.mark.parametrize("name", EVERY_OP)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_op(cupy, masks, monkeypatch, name, dtype):
    op, dy = EVERY_OP[name], None
    results = []
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.undo()
        leaves = [Tensor(to_device(x, device) if device == "cuda" else x, requires_grad=True)
                  for x in op.inputs(dtype)]
        y = op.f(*leaves)
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        results.append([y.data, *gradients(y, leaves, to_device(dy, device) if device == "cuda" else dy)])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


@of_the_stand_in
@pytest.mark.parametrize("name, forward, backward", [
    ("conv2d", ["conv_forward"], ["conv_dx", "conv_dw", "weight_gradients"]),
    ("conv2d, strided", ["conv_forward"], ["conv_dx", "conv_dw"]),
    ("conv_transpose2d", ["conv_dx"], ["conv_forward", "conv_dw", "weight_gradients"]),
    ("linear", ["linear"], ["linear_dx", "weight_gradients"]),
    ("silu", ["silu_forward"], ["silu_backward"]),
    ("gelu", ["gelu"], ["gelu_backward"]),
    ("embedding", [], ["embedding_backward"]),
    ("modulated_group_norm", ["group_norm_forward"], ["group_norm_backward"]),
    ("attention_of_pairs, causal", ["attention_forward"], ["attention_dq", "attention_dkv"]),
    ("scaled_dot_product_attention", ["attention_forward"], ["attention_dq", "attention_dkv"]),
    ("group_norm", ["group_norm_forward"], ["group_norm_backward", "weight_gradients"]),
    ("layer_norm", ["layer_norm_forward"], ["layer_norm_backward"]),
])
def test_ops_take_their_kernels(cupy, monkeypatch, name, forward, backward):
    """Forward and backward; the stand-in would also compute the op with CuPy's own functions."""
    leaves = [Tensor(cupy.asarray(x), requires_grad=True) for x in EVERY_OP[name].inputs(np.float32)]
    launched = watch_launches(monkeypatch)
    y = EVERY_OP[name].f(*leaves)
    assert launched == forward
    gradients(y, leaves, cupy.ones_like(y.data))
    assert launched == forward + backward


@pytest.mark.slow
@every
def test_gradient(cupy, masks, name):
    """Central differences, as on the CPU (test_every_op.py): the checker is on the host, the op on the device."""
    def across(x: Tensor, there: str, back: str) -> Tensor:
        return record(to_device(x.data, there), (x,), lambda dy: (to_device(dy, back),))

    op = EVERY_OP[name]
    check_gradients(lambda *xs: across(op.f(*(across(x, "cuda", "cpu") for x in xs)), "cpu", "cuda"), *op.inputs())


@every
def test_op_refuses_two_devices(cupy, masks, name):
    op = EVERY_OP[name]
    inputs = op.inputs()
    for i in range(len(inputs)):
        if len(inputs) > 1:
            mixed = [Tensor(x if i == j else cupy.asarray(x)) for j, x in enumerate(inputs)]
            with pytest.raises(TypeError) as error:
                op.f(*mixed)
            one_sentence(error)


def test_an_array_that_goes_with_an_op_must_be_beside_it(cupy):
    x, SOME = Tensor(cupy.ones((2, 3))), every_op.SOME
    with pytest.raises(TypeError, match="two devices"):
        ops.where(SOME, x, x)
    with pytest.raises(TypeError, match="two devices"):
        ops.where(cupy.asarray(SOME), Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3))))
    q = Tensor(cupy.ones((2, 1, 3, 4)))
    with pytest.raises(TypeError):
        scaled_dot_product_attention(q, q, q, np.ones((3, 3), bool))
    there, here = Tensor(cupy.ones((2, 1, 3, 4))), Tensor(np.ones((2, 1, 3, 4)))
    for qkv in ((here, there, there), (there, here, there), (there, there, here)):
        with pytest.raises(TypeError, match="two devices"):
            scaled_dot_product_attention(*qkv)
    images, w = np.ones((1, 2, 2, 3)), np.ones((4, 4, 2, 3))
    for pair in ((Tensor(images), Tensor(cupy.asarray(w))), (Tensor(cupy.asarray(images)), Tensor(w))):
        with pytest.raises(TypeError, match="two devices"):
            conv_transpose2d(*pair, stride=2)
    with pytest.raises(TypeError):
        ops.embedding(Tensor(np.ones((5, 2))), cupy.asarray(every_op.IDS))
    with pytest.raises(TypeError):
        x + np.ones(3)
    assert_same(causal_mask(3, cupy), np.tri(3, dtype=bool))


def test_ids_and_labels_of_the_device(cupy):
    table, ids = np.arange(10.0).reshape(5, 2), cupy.asarray(every_op.IDS)
    assert_same(ops.embedding(Tensor(cupy.asarray(table)), ids).data, table[every_op.IDS])
    assert_same(ops.getitem(Tensor(cupy.asarray(table)), ids).data, table[every_op.IDS])
    logits = np.random.default_rng(0).standard_normal((3, 4))
    loss = ops.cross_entropy(Tensor(cupy.asarray(logits)), cupy.asarray(every_op.LABELS))
    assert_same(loss.data, ops.cross_entropy(Tensor(logits), every_op.LABELS).data)
    with pytest.raises(IndexError):
        ops.embedding(Tensor(cupy.asarray(table)), ids + 1)


@pytest.mark.parametrize("M, C, D", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (2**14, 64, 512)])
def test_a_linear_layer_of_nothing_and_one_too_large_for_the_kernel(cupy, monkeypatch, M, C, D):
    """These are matrix products, and the bias is added after them."""
    x, w, b = np.ones((M, C), np.float32), np.ones((C, D), np.float32), np.ones(D, np.float32)
    launched = watch_launches(monkeypatch)
    leaves = [Tensor(cupy.asarray(a), requires_grad=True) for a in (x, w, b)]
    y = ops.linear(*leaves)
    assert "conv_forward" not in launched and (y.data.get() == C + 1).all() and y.shape == (M, D)
    if y.size < 100:
        assert [dx.shape for dx in gradients(y, leaves, cupy.ones_like(y.data))] == [(M, C), (C, D), (D,)]


def test_operators_numbers_and_leaves_without_a_part_in_the_result(cupy):
    x = Tensor(cupy.asarray(np.array([1.0, 2.0], np.float32)), requires_grad=True)
    unused = Tensor(cupy.ones(3), requires_grad=True)
    y = (2 * x - 1) / 4 + np.float32(3) + cupy.ones(2, np.float32) * x
    y.backward(np.ones(2, np.float32))                      # a cotangent is moved to y's device
    assert_same(x.grad, np.full(2, 1.5, np.float32))
    assert_same(y.data, np.array([4.25, 5.75], np.float32))
    loss = ops.sum(x)
    assert loss.item() == 3
    assert_same(gradients(loss, [unused])[0], np.zeros(3))
