"""Multi-head attention and the transformer block: against einsum, their gradients, and laws 38 and 39."""

import math

import numpy as np
import pytest
import scipy.special
from support.gradcheck import check_gradients, moved

from minidiff.engine.tensor import Tensor
from minidiff.nn.transformer import Attention, TransformerBlock


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def attention_by_einsum(a, x, context):
    C, h = x.shape[-1], a.heads
    q = (x @ a.q.w.data + a.q.b.data).reshape(*x.shape[:2], h, -1)
    k, v = np.split(context @ a.kv.w.data + a.kv.b.data, 2, axis=-1)
    k, v = (z.reshape(*z.shape[:2], h, -1) for z in (k, v))
    P = scipy.special.softmax(np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(C // h), axis=3)
    return np.einsum("bhnm,bmhd->bnhd", P, v).reshape(x.shape) @ a.out.w.data + a.out.b.data


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_self_and_cross_attention(heads):
    x, context = normal(2, 5, 6), normal(2, 3, 4, seed=1)
    attend = moved(Attention(6, heads, np.random.default_rng(0)))
    np.testing.assert_allclose(attend(Tensor(x)).data, attention_by_einsum(attend, x, x), rtol=1e-10)
    cross = moved(Attention(6, heads, np.random.default_rng(0), context=4))
    expected = attention_by_einsum(cross, x, context)
    np.testing.assert_allclose(cross(Tensor(x), Tensor(context)).data, expected, rtol=1e-10)


def test_gradients_of_cross_attention():
    cross = moved(Attention(4, 2, np.random.default_rng(0), context=3))
    x, context = Tensor(normal(2, 3, 4), True), Tensor(normal(2, 5, 3, seed=1), True)
    mask = np.array([[True, True, False, True, False], [True] * 5])[:, None, None]
    check_gradients(lambda *_: cross(x, context, mask), x, context, *cross.parameters().values(), directions=3)


def test_gradients_of_the_block():
    block, x = moved(TransformerBlock(4, 2, np.random.default_rng(0))), Tensor(normal(2, 3, 4), True)
    check_gradients(lambda *_: block(x), x, *block.parameters().values(), directions=3)


@pytest.mark.law(
    39, "a transformer block begins as the identity: its branches end in zeros",
    source="its input", tolerance="exact")
def test_the_block_starts_as_the_identity():
    """Law 39: its branches end in zeros."""
    x = normal(2, 3, 8).astype(np.float32)
    assert np.array_equal(TransformerBlock(8, 2, np.random.default_rng(0))(Tensor(x)).data, x)
    assert not Attention(8, 2, np.random.default_rng(0))(Tensor(x)).data.any()


@pytest.mark.law(
    39, "without positions, permuting the tokens or the batch permutes the results",
    source="the same tokens in another order", tolerance="1e-10: sums in another order")
def test_permuting_the_tokens_permutes_the_results():
    """There are no positions in a block; the same holds for the batch."""
    block, x = moved(TransformerBlock(8, 2, np.random.default_rng(0))), normal(3, 5, 8)
    y = block(Tensor(x)).data
    tokens, batch = [3, 0, 4, 1, 2], [2, 0, 1]
    np.testing.assert_allclose(block(Tensor(x[:, tokens])).data, y[:, tokens], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(block(Tensor(x[batch])).data, y[batch], rtol=1e-10, atol=1e-12)


@pytest.mark.law(
    39, "masked tokens do not count in a transformer block",
    source="other numbers at masked places", tolerance="exact, to the last bit")
def test_masked_tokens_have_no_influence():
    block, x = moved(TransformerBlock(8, 2, np.random.default_rng(0))), normal(2, 5, 8)
    mask = np.array([[True, True, True, False, False], [True, False, True, True, False]])
    y = block(Tensor(x), mask[:, None, None]).data
    x[~mask] = 100
    again = block(Tensor(x), mask[:, None, None]).data
    assert np.array_equal(again[mask], y[mask])
    x[0, 0] += 1
    assert not np.array_equal(block(Tensor(x), mask[:, None, None]).data[0, 2], y[0, 2])


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="6 channels do not divide into 4 heads"):
        Attention(6, 4, np.random.default_rng(0))
