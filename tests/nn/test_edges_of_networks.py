"""What networks are made of at the ends of its numbers: right, or refused in one sentence."""

import math

import numpy as np
import pytest

from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.nn.decoding import next_tokens
from minidiff.nn.embedding_codes import PCA, Buckets, Quantiles, slerp
from minidiff.nn.gumbel import gumbel_max, gumbel_softmax, kl_to_uniform
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig, perceptual_distance
from minidiff.nn.kl import kl
from minidiff.nn.layers import sinusoidal_embedding
from minidiff.nn.optim import EMA, AdamW, AdamWConfig, clip_by_norm
from minidiff.nn.precision import LossScale
from minidiff.nn.quantise import Codebook
from minidiff.text.clip import clip_loss, recall_at, unit
from minidiff.text.encoder import TextEncoder, TextEncoderConfig

TOP, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)


# --- clipping, AdamW, the average, the loss scale --------------------------------------------------------------

@pytest.mark.parametrize("size", [1e20, TOP, 1e-25, 1e-40])
def test_the_norm_of_gradients_whose_squares_are_out_of_range(size):
    grads = [np.full(2, size, np.float32), np.full((3, 1), -size, np.float32), np.zeros(4, np.float32)]
    norm = clip_by_norm(grads, 1.0)
    assert norm == pytest.approx(float(np.float32(size)) * 5**0.5, rel=1e-6)
    clipped = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads))
    assert clipped == pytest.approx(min(norm, 1), rel=1e-5)


@pytest.mark.parametrize("bad, norm", [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")])
def test_a_gradient_that_is_not_finite_is_not_clipped(bad, norm):
    grads = [np.array([3, bad], np.float32), np.array([4], np.float32)]
    assert str(clip_by_norm(grads, 1.0)) == norm and grads[1][0] == 4
    assert clip_by_norm([np.zeros(3, np.float32)], 1.0) == 0 and clip_by_norm([], 1.0) == 0


def test_the_norm_of_many_float16_numbers_is_summed_in_float32():
    assert clip_by_norm([np.ones(10_000, np.float16)], 1e3) == 100
    assert clip_by_norm([np.full(4, 3e4, np.float16)], 1e9) == pytest.approx(6e4, rel=1e-3)


@pytest.mark.parametrize("max_norm, scale", [(math.nan, 1), (-1, 1), (1, 0), (1, math.nan)])
def test_gradients_are_not_clipped_to_a_norm_that_is_none(max_norm, scale):
    g = np.array([3.0, 4.0])
    with pytest.raises(ValueError, match="max_norm must be at least 0, and scale above 0"):
        clip_by_norm([g], max_norm, scale)
    assert g.tolist() == [3, 4]


def test_adamw_refuses_what_would_stop_it_for_good():
    """The square of 1e20 is infinite in float32, and the weight would never move again: nothing has changed then."""
    for bad, says in ((1e20, "square of the gradient of parameter 'second' overflows: clip"), (-1e20, "overflows"),
                      (math.inf, "gradient of parameter 'second' is not finite"), (math.nan, "is not finite")):
        first, second = (Tensor(np.ones(2, np.float32), requires_grad=True) for _ in range(2))
        adamw = AdamW({"first": first, "second": second})
        before = adamw.state_dict()
        with pytest.raises(FloatingPointError, match=says):
            adamw.step([np.ones(2, np.float32), np.array([0, bad], np.float32)], 0.1)
        assert first.data.tolist() == second.data.tolist() == [1, 1]
        for name, a in adamw.state_dict().items():
            np.testing.assert_array_equal(a, before[name])


def test_adamw_takes_gradients_whose_squares_add_up_to_infinity():
    """Each square is finite: 3 times (1.5e19)^2 is above 3.4e38, float32's largest number, and one is below."""
    p = Tensor(np.zeros(3, np.float32), requires_grad=True)
    AdamW({"p": p}).step([np.full(3, 1.5e19, np.float32)], 0.5)
    np.testing.assert_allclose(p.data, -0.5, rtol=1e-5)


def test_adamw_takes_gradients_in_half_precision():
    """300^2 is infinite in float16: the squares are computed in float32."""
    p = Tensor(np.zeros(2, np.float32), requires_grad=True)
    adamw = AdamW({"p": p})
    adamw.step([np.full(2, 300, np.float16)], 0.5)
    np.testing.assert_allclose(p.data, -0.5, rtol=1e-3)
    np.testing.assert_allclose(adamw.v["p"], 900, rtol=1e-3)


def test_adamw_refuses_other_dtypes_and_options():
    half = Tensor(np.ones(2, np.float16), requires_grad=True)
    for make in (AdamW, EMA):
        with pytest.raises(TypeError, match="takes parameters of float32 or float64"):
            make({"w": half})
    for wrong in ({"b1": 1.0}, {"b2": 1.0}, {"eps": 0.0}, {"decay": -1.0}, {"b2": math.nan}):
        with pytest.raises(ValueError, match="AdamWConfig: b1 and b2 must be"):
            AdamWConfig(**wrong)


def test_adamw_with_gradients_of_subnormal_size():
    """g / (|g| + eps): the square underflows, and eps is what counts."""
    p = Tensor(np.zeros(2, np.float32), requires_grad=True)
    AdamW({"p": p}).step([np.array([1e-30, -1e-25], np.float32)], 1.0)
    np.testing.assert_allclose(p.data, [-1e-22, 1e-17], rtol=1e-5)


def test_an_average_without_memory_is_the_weights_to_the_last_bit():
    p = Tensor(np.array([1e8, -TOP], np.float32), requires_grad=True)
    ema = EMA({"p": p}, decay=0.0)
    p.data = np.array([1, TOP], np.float32)
    ema.step()
    assert np.array_equal(ema.average["p"], p.data)


def test_the_loss_scale_ends_where_a_state_may_hold_it():
    scaling = LossScale(patience=1)
    for _ in range(100):
        scaling.update(finite=True)
    assert scaling.scale == LossScale.MOST == 2.0**60


# --- codes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0, 1e3, 1e6, [1e3, -1e3, 1e3, 1e6]])
def test_the_nearest_code_far_from_0(shift, dtype):
    """Against the differences themselves; two groups of codes, far from each other."""
    rng = np.random.default_rng(0)
    book = Codebook(64, 4, rng)
    book.codes.data = (rng.standard_normal((64, 4)) + shift).astype(dtype)
    book.codes.data[:5] *= -1
    z = (rng.standard_normal((500, 4)) + shift).astype(dtype)
    distances = ((z[:, None].astype(np.longdouble) - book.codes.data) ** 2).sum(axis=2)
    assert np.array_equal(book.nearest(z), distances.argmin(axis=1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_no_code_is_nearest_to_nan():
    book = Codebook(3, 2, np.random.default_rng(0))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="Codebook: z must be finite"):
            book.nearest(np.array([[0, bad]], np.float32))
        assert not np.isfinite(book(Tensor(np.array([[0, bad]], np.float32))).codebook.item())      # in training
    huge = np.array([[1e30, 0], [0, 0]], np.float32)        # its squared error is out of float32's range
    assert book.revive(huge, np.random.default_rng(0), fewest=2) > 0


def test_numbers_that_are_none_have_no_code():
    buckets, quantiles = Buckets(2, 4), Quantiles(3)
    for bad in (np.nan, np.inf):
        for call in (buckets.quantise, buckets.fit):
            with pytest.raises(ValueError, match="Buckets: the numbers must be finite"):
                call(np.array([[0, bad]], np.float32))
        for call in (quantiles.quantise, quantiles.fit):
            with pytest.raises(ValueError, match="Quantiles: the numbers must be finite"):
                call(np.array([0, bad], np.float32))
        with pytest.raises(ValueError, match="PCA: the numbers must be finite"):
            PCA(2, 1).fit(np.array([[0, bad]], np.float32))
        with pytest.raises(ValueError, match="not finite"):
            slerp(np.array([1, bad]), np.array([1.0, 2]), 0.5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_feature_maps_whose_squares_overflow_are_not_alike():
    """A map of 1e20 was divided by infinity, and equal to one of 0."""
    config = ImageClassifierConfig((8, 8, 1), 2, (4, 4), 2, 4)
    classifier = ImageClassifier(config, np.random.default_rng(0))
    classifier.norm1.gamma.data[:] = 1e25
    x, y = np.random.default_rng(1).standard_normal((2, 2, 8, 8, 1)).astype(np.float32)
    assert np.isnan(perceptual_distance(classifier, x, Tensor(y)).item())


# --- choices ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [[0, 0, np.inf], [0, np.nan, 0], [-np.inf] * 3])
def test_no_choice_follows_from_logits_that_say_nothing(row):
    logits = np.array([[0, 0, 0], row], np.float32)
    for options in ({}, {"temperature": 0}, {"top_k": 1}, {"top_k": 2}):
        with pytest.raises(UserError, match="the logits to choose from are not finite"):
            next_tokens(logits, np.full(2, 0.9), **options)
    with pytest.raises(UserError, match="the logits to choose from are not finite"):
        gumbel_max(logits, np.zeros_like(logits))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_choices_at_the_ends(dtype):
    """-inf is never drawn; the largest numbers, and the smallest temperatures, choose the likeliest."""
    top, u = np.finfo(dtype).max, np.array([0.0, 0.999999])
    assert next_tokens(np.array([[-np.inf, 0, -np.inf]] * 2, dtype), u).tolist() == [1, 1]
    assert next_tokens(np.array([[-top, top, 0]] * 2, dtype), u).tolist() == [1, 1]
    assert next_tokens(np.array([[0, 1, 0.5]] * 2, dtype), u, temperature=5e-324).tolist() == [1, 1]
    assert next_tokens(np.array([[0, 100, -top]] * 2, dtype), u, temperature=1e300, top_k=2).tolist() == [0, 1]


def test_gumbel_softmax_at_its_ends():
    logits, g = Tensor(np.array([[0.0, 1]], np.float32)), np.zeros((1, 2), np.float32)
    assert gumbel_softmax(logits, g, 1e-30).data.tolist() == [[0, 1]]
    for tau in (0, -1, math.nan, math.inf, 1e-45, np.array([[1], [0]])):
        with pytest.raises(ValueError, match="tau must be"):
            gumbel_softmax(logits, g, tau)


def test_the_divergence_of_a_certain_choice():
    """0 log 0 = 0."""
    logits = Tensor(np.array([[0, -np.inf], [0, -TOP], [0, 0]], np.float32), requires_grad=True)
    y = kl_to_uniform(logits)
    np.testing.assert_allclose(y.data, [math.log(2), math.log(2), 0], atol=1e-7)
    assert np.isfinite(gradients(y, [logits], np.ones(3))[0]).all()


# --- divergences -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m1, v1, m2, v2", [
    (0, 0, 0, 1e-3), (1, -100, 1, -100), (0, -170, 0, -170), (1e10, 0, 0, 60), (0, -80, 0, 80), (0, 1e-6, 0, 0)])
def test_the_divergence_of_extreme_gaussians(m1, v1, m2, v2):
    """Against the formula in longdouble; log variances."""
    a = [np.array([x], np.float32) for x in (m1, v1, m2, v2)]
    leaves = [Tensor(x, requires_grad=True) for x in a]
    y = kl(*leaves)
    m1, v1, m2, v2 = (x.astype(np.longdouble) for x in a)
    exact = (np.expm1(v1 - v2) - (v1 - v2) + (m1 - m2) ** 2 * np.exp(-v2)) / 2
    np.testing.assert_allclose(y.data.astype(np.longdouble), exact, rtol=1e-3, atol=1e-10)
    assert all(np.isfinite(g).all() for g in gradients(y, leaves, np.ones(1)))


# --- embeddings ------------------------------------------------------------------------------------------------

def test_embeddings_of_large_times():
    """float64's cosine is right up to 10^15, and the angle rounds beyond."""
    t = np.array([0, 1, 999, 10**9, -1])
    found, freq = sinusoidal_embedding(t, 8), 10_000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(found[:, :4], np.cos(t[:, None] * freq), atol=1e-6)
    assert np.abs(sinusoidal_embedding(np.array([2**62]), 8)).max() <= 1


def test_rows_without_a_direction():
    for row in ([0, 0], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(ValueError, match="x must have a direction, and row 1 is 0 or not finite"):
            unit("x", Tensor(np.array([[1, 0], row], np.float32)))
    rows = Tensor(np.array([[3 * TINY, 4 * TINY], [TOP, TOP], [1e-30, 0]], np.float32), requires_grad=True)
    np.testing.assert_allclose(unit("x", rows).data, [[0.6, 0.8], [0.5**0.5] * 2, [1, 0]], rtol=1e-6)
    assert np.isfinite(clip_loss(rows, rows, Tensor(np.float32(4))).item())
    with pytest.raises(ValueError, match="holds NaN"):
        recall_at(1, np.array([[np.nan, 1], [0, 1]]))


def test_nan_in_padding_does_not_reach_a_captions_states():
    encoder = TextEncoder(TextEncoderConfig(vocab=5, length=4, width=8, layers=2, heads=2), np.random.default_rng(0))
    for p in encoder.parameters().values():
        p.data = p.data + np.float32(0.1)
    ids, mask = np.array([[1, 3, 2, 0]]), np.array([[True, True, True, False]])
    before = encoder(ids, mask)
    encoder.embedding.table.data[0] = np.nan                # the row of padding
    after = encoder(ids, mask)
    np.testing.assert_allclose(after.pooled.data, before.pooled.data, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.tokens.data[:, :3], before.tokens.data[:, :3], rtol=1e-5, atol=1e-6)
