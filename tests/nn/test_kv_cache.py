"""The key-value cache: step by step, in pieces of any size, it gives the same result as all tokens at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.transformer import Attention, KVCache, TransformerBlock

N, C = 9, 8


def moved(module, dtype=np.float64):
    """Changes every parameter, so that no branch is zero."""
    rng = np.random.default_rng(9)
    for p in module.parameters().values():
        p.data = (p.data + 0.3 * rng.standard_normal(p.shape)).astype(dtype)
    return module


def blocks(dtype=np.float64, count=3):
    rng = np.random.default_rng(0)
    return [moved(TransformerBlock(C, 2, rng, causal=True), dtype) for _ in range(count)]


def all_at_once(stack, x):
    h = Tensor(x)
    for block in stack:
        h = block(h)
    return h.data


def in_pieces(stack, x, ends):
    """The tokens x (B, N, C) cut at `ends`, piece by piece through the caches."""
    caches, pieces = [KVCache(x.shape[1]) for _ in stack], []
    with no_grad():
        for piece in np.split(x, ends, axis=1):
            h = Tensor(piece)
            for block, cache in zip(stack, caches, strict=True):
                h = block.step(h, cache)
            pieces.append(h.data)
    return np.concatenate(pieces, axis=1)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, N - 1)), st.integers(1, 4), st.integers(0, 2**32))
def test_pieces_of_any_size_give_the_same_result(ends, B, seed):
    """Up to rounding, since a product of one row adds in another order than one of many.  float64: 1e-12."""
    x = np.random.default_rng(seed).standard_normal((B, N, C))
    np.testing.assert_allclose(in_pieces(STACK, x, sorted(ends)), all_at_once(STACK, x), rtol=1e-11, atol=1e-12)


STACK = blocks()


def test_in_float32_too():
    x = np.random.default_rng(1).standard_normal((4, N, C), dtype=np.float32)
    stack = blocks(np.float32)
    y = in_pieces(stack, x, list(range(1, N)))
    assert y.dtype == np.float32
    expected = all_at_once(stack, x)
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())


def test_attention_by_steps_is_causal_attention():
    x = np.random.default_rng(2).standard_normal((2, N, C))
    attend, cache = moved(Attention(C, 2, np.random.default_rng(0))), KVCache(N)
    with no_grad():
        y = np.concatenate([attend.step(Tensor(x[:, n:n + 1]), cache).data for n in range(N)], axis=1)
    np.testing.assert_allclose(y, attend(Tensor(x), None, None, True).data, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", range(1, N))
def test_an_output_never_depends_on_a_later_token(n):
    """Bit for bit: the products have the same shapes."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, N, C))
    y = all_at_once(STACK, x)
    x[:, n:] = 100 * rng.standard_normal((2, N - n, C))
    again = all_at_once(STACK, x)
    assert np.array_equal(again[:, :n], y[:, :n])
    assert not (again[:, n:] == y[:, n:]).all(axis=(1, 2)).any()


def test_a_cache_keeps_its_entries_in_place():
    rng, cache = np.random.default_rng(4), KVCache(6)
    k, v = rng.standard_normal((2, 2, 3, 6, 4))             # (B, h, M, d)
    for a, b in ((0, 2), (2, 3), (3, 6)):
        held_k, held_v = cache.append(k[:, :, a:b], v[:, :, a:b])
        assert np.array_equal(held_k, k[:, :, :b]) and np.array_equal(held_v, v[:, :, :b])
    with pytest.raises(ValueError, match="room for 6 tokens, and 7 were put in"):
        cache.append(k[:, :, :1], v[:, :, :1])


def test_steps_of_a_block_that_is_not_causal_are_refused():
    with pytest.raises(ValueError, match="step needs causal=True"):
        TransformerBlock(C, 2, np.random.default_rng(0)).step(Tensor(np.zeros((1, 1, C), np.float32)), KVCache(2))


def test_a_step_that_does_not_fit_leaves_the_cache_as_it_was():
    block, cache = STACK[0], KVCache(N)
    x = np.random.default_rng(2).standard_normal((2, 3, C))
    with no_grad():
        block.step(Tensor(x), cache)
        before = cache.M, cache.k.tobytes(), cache.v.tobytes()  # bytes, since the places after M hold anything, NaN too
        for wrong in (x[:1], np.concatenate([x, x]), x[..., :4], x.astype(np.float32), x[0], np.zeros((2, N, C))):
            with pytest.raises((ValueError, TypeError)):
                block.step(Tensor(wrong), cache)
            assert (cache.M, cache.k.tobytes(), cache.v.tobytes()) == before
        for k in (np.zeros((2, 2, 1, 5)), np.zeros((2, 4, 1, 4)), np.zeros((3, 2, 1, 4)), np.zeros((2, 2, 1, 4), "f")):
            with pytest.raises(ValueError, match="KVCache: it holds float64 keys of 2 sequences, 2 heads and 4"):
                cache.append(k, k)
        right = block.step(Tensor(x), cache).data
    np.testing.assert_allclose(right, all_at_once([block], np.concatenate([x, x], axis=1))[:, 3:], rtol=1e-11,
                               atol=1e-12)
