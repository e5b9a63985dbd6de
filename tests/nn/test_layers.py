"""Layers against NumPy, their initial weights, and the embedding of time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import (
    Conv2d,
    Dropout,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    Unfilled,
    parameter,
    sinusoidal_embedding,
)

few = settings(deadline=None, max_examples=25)


def rng(seed=0):
    return np.random.default_rng(seed)


def check_layer(layer, *inputs):
    """Gradients of a layer in float64, by its inputs and all its parameters, none of which has its initial value."""
    parameters = layer.astype(np.float64).parameters().values()
    for p in parameters:
        p.data += rng(7).standard_normal(p.shape)
    inputs = [Tensor(x, requires_grad=True) for x in inputs]
    check_gradients(lambda *_: layer(*inputs), *inputs, *parameters)


def test_weights_that_will_be_loaded_are_parameters_like_any_other():
    """Bug: a loaded model whose weights need no gradient, so that nothing learns when it is trained on."""
    for unfilled in (parameter((2, 3), std, Unfilled(2, 12)) for std in (0, 1.5)):
        assert unfilled.requires_grad and unfilled.shape == (2, 3) and unfilled.data.dtype == np.float32


def test_linear():
    layer, x = Linear(3, 4, rng()), rng(1).standard_normal((2, 5, 3))
    check_layer(layer, x)
    expected = np.einsum("bnc,cd->bnd", x, layer.w.data) + layer.b.data
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, rtol=1e-12)


@pytest.mark.parametrize("layer, x", [
    (Conv2d(2, 3, rng()), (1, 4, 5, 2)), (Conv2d(2, 3, rng(), kernel=2, stride=2, padding=0), (1, 4, 5, 2)),
    (GroupNorm(4, 2), (2, 3, 3, 4)), (LayerNorm(4), (2, 3, 4)),
])
def test_gradients_to_inputs_and_parameters(layer, x):
    check_layer(layer, rng(1).standard_normal(x))


def test_embedding():
    layer, ids = Embedding(5, 3, rng()), np.array([[4, 0], [4, 4]])
    assert np.array_equal(layer(ids).data, layer.table.data[ids])
    table = layer.astype(np.float64).table
    check_gradients(lambda _: layer(ids), table)


@few
@given(st.sampled_from([1, 3, 5]), st.integers(1, 9), st.integers(1, 9))
def test_conv_keeps_the_images_size_at_stride_1(kernel, H, W):
    assert Conv2d(1, 2, rng(), kernel=kernel)(Tensor(np.zeros((1, H, W, 1), np.float32))).shape == (1, H, W, 2)


def test_initial_weights_have_variance_1_over_fan_in():
    """40,000 and 36,000 weights; variance at 5.5 standard errors, sqrt(2/n) each: false alarm 4e-8."""
    for w, fan_in in [(Linear(200, 200, rng()).w.data, 200), (Conv2d(100, 40, rng(), kernel=3).w.data, 900)]:
        assert abs(w.var() * fan_in - 1) < 5.5 * math.sqrt(2 / w.size)
        assert abs(w.mean()) * math.sqrt(fan_in) < 5.5 / math.sqrt(w.size)


def test_initial_weights_are_float32_biases_are_0_and_so_are_zero_layers():
    for layer in (Linear(3, 4, rng()), Conv2d(3, 4, rng())):
        assert not layer.b.data.any() and layer.w.data.all()
    for layer in (Linear(3, 4, rng(), zero=True), Conv2d(3, 4, rng(), zero=True)):
        assert not layer.w.data.any() and not layer.b.data.any()
    for layer in (Linear(3, 4, rng()), Conv2d(3, 4, rng()), GroupNorm(4, 2), LayerNorm(4), Embedding(3, 4, rng())):
        assert all(p.dtype == np.float32 and p.requires_grad for p in layer.parameters().values())
    assert np.array_equal(Linear(3, 4, rng(5)).w.data, Linear(3, 4, rng(5)).w.data)


def test_norms_start_as_plain_normalisation():
    x = 3 * rng().standard_normal((4, 6, 6, 8), dtype=np.float32) + 2
    y = GroupNorm(8, 2)(Tensor(x)).data.reshape(4, 36, 2, 4)
    np.testing.assert_allclose(y.mean(axis=(1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=(1, 3)), 1, rtol=1e-4)
    y = LayerNorm(8)(Tensor(x)).data
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        GroupNorm(8, 3)


def test_dropout_is_for_training_only():
    layer, x = Dropout(0.5), Tensor(np.ones(1000))
    assert layer(x) is x and layer.eval()(x, rng()) is x
    y = layer.train()(x, rng()).data
    assert set(y) == {0.0, 2.0} and np.array_equal(y, layer(x, rng()).data)
    with pytest.raises(ValueError, match="training needs the generator rng"):
        layer(x)
    assert Dropout(0).train()(x) is x
    for p in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            Dropout(p)


# ---- the embedding of time -------------------------------------------------------------------------------


@pytest.mark.law(
    35, "the sinusoidal embedding over t = 0..999 has full rank; t + freq in place of t freq has rank 2",
    source="Vaswani et al. 2017, section 3.5; singular values",
    tolerance="1e-9 of the largest singular value: 1e-16 times 1000")
@pytest.mark.parametrize("dim", [2, 8, 16])
def test_embedding_of_time_has_full_rank(dim):
    """Law 35: over t = 0..999, by its singular values.  With t + freq in place of t freq the rank is 2."""
    t = np.arange(1000)
    singular = np.linalg.svd(sinusoidal_embedding(t, dim, dtype=np.float64), compute_uv=False)
    assert singular.shape == (dim,) and singular[-1] > 1e-9 * singular[0]
    freq = 10_000.0 ** -(np.arange(dim // 2) / (dim // 2))
    bug = np.concatenate([np.cos(t[:, None] + freq), np.sin(t[:, None] + freq)], axis=1)
    assert np.linalg.matrix_rank(bug) == 2


def test_embedding_of_time_is_different_for_all_times():
    e = sinusoidal_embedding(np.arange(1000), 64).astype(float)
    squared = (e**2).sum(axis=1)                            # = 32 for each: (cos, sin) pairs
    np.testing.assert_allclose(squared, 32, rtol=1e-6)
    distance = np.sqrt(np.maximum(2 * 32 - 2 * e @ e.T, 0)) + 99 * np.eye(1000)
    assert distance.min() > 0.5


@pytest.mark.law(
    "35a", "from t to t + s the embedding turns, by one linear map whatever t",
    source="Vaswani et al. 2017, section 3.5; the addition theorems",
    tolerance="1e-9: angles of up to 5000, rounded at 1e-12")
@few
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(0, 500), st.integers(1, 12))
def test_a_shift_of_time_is_a_rotation(times, shift, half):
    """From t to t + s is one linear map, whatever t (section 3.5); freq_0 = 1, the last near 1/max_period."""
    t, freq = np.array(times), 10_000.0 ** -(np.arange(half) / half)
    now, later = (sinusoidal_embedding(a, 2 * half, dtype=np.float64) for a in (t, t + shift))
    cos, sin = np.cos(shift * freq), np.sin(shift * freq)
    c, s = now[:, :half], now[:, half:]
    np.testing.assert_allclose(later, np.concatenate([c * cos - s * sin, s * cos + c * sin], axis=1),
                               rtol=0, atol=1e-9)


@pytest.mark.law(
    35, "the embedding of t does not depend on its place in the batch",
    source="the same times in another order", tolerance="exact")
@few
@given(st.permutations(range(6)), st.integers(1, 6))
def test_embedding_of_time_does_not_depend_on_the_position_in_the_batch(order, count):
    """Law 35 again: a known bug looks it up by position in the batch."""
    t = np.array([0, 999, 3, 3, 500, 17])
    together = sinusoidal_embedding(t, 32)
    assert np.array_equal(sinusoidal_embedding(t[list(order)], 32), together[list(order)])
    assert np.array_equal(sinusoidal_embedding(t[:count], 32), together[:count])
    assert np.array_equal(together[2], together[3]) and together.dtype == np.float32


def test_odd_dimensions_are_refused():
    with pytest.raises(ValueError, match="dim must be even and at least 2, not 7"):
        sinusoidal_embedding(np.arange(3), 7)
