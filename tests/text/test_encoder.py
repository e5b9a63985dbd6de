"""The text encoder: its gradients, and captions that depend on their own words and on nothing else."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine import ops
from minidiff.text.encoder import TextEncoder, TextEncoderConfig

CONFIG = TextEncoderConfig(vocab=11, length=7, width=6, layers=2, heads=2)
IDS = np.array([[1, 5, 2, 0, 0], [1, 7, 5, 9, 2], [1, 2, 0, 0, 0]])
MASK = np.array([[True, True, True, False, False], [True] * 5, [True, True, False, False, False]])


@pytest.fixture
def encoder():
    """In float64, with every parameter changed, so that no branch is zero."""
    encoder = TextEncoder(CONFIG, np.random.default_rng(0)).astype(np.float64)
    rng = np.random.default_rng(1)
    for p in encoder.parameters().values():
        p.data += 0.3 * rng.standard_normal(p.shape)
    return encoder


def states(encoder, ids=IDS, mask=MASK):
    text = encoder(ids, mask)
    return text.tokens.data, text.pooled.data


def test_gradients(encoder):
    """To every parameter, from token states and pooled states both."""
    def f(*_):
        text = encoder(IDS, MASK)
        return ops.concat([text.tokens.reshape(-1), text.pooled.reshape(-1)], axis=0)
    check_gradients(f, *encoder.parameters().values(), directions=2)


def test_shapes_and_dtype():
    text = TextEncoder(CONFIG, np.random.default_rng(0))(IDS, MASK)
    assert text.tokens.shape == (3, 5, 6) and text.pooled.shape == (3, 6) and text.mask is MASK
    assert text.tokens.dtype == text.pooled.dtype == np.float32


def test_every_token_state_is_normalised(encoder):
    """Apart from gamma and beta, each has mean 0, and variance 1 but for the eps of 1e-5 beside a variance above .1."""
    tokens, _ = states(encoder)
    x_hat = (tokens - encoder.norm.beta.data) / encoder.norm.gamma.data
    np.testing.assert_allclose(x_hat.mean(axis=2), 0, atol=1e-12)
    np.testing.assert_allclose(x_hat.var(axis=2), 1, atol=1e-4)


def test_pooled_is_the_normalised_mean_over_the_caption(encoder):
    tokens, pooled = states(encoder)
    gamma, beta = encoder.norm_pooled.gamma.data, encoder.norm_pooled.beta.data
    for i, count in enumerate([3, 5, 2]):
        mean = tokens[i, :count].mean(axis=0)
        expected = gamma * (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5) + beta
        np.testing.assert_allclose(pooled[i], expected, rtol=1e-10)


@pytest.mark.law(
    39, "a caption's states do not depend on its padding",
    source="other padding, and more of it", tolerance="exact; 1e-10 with more padding, for sums of another length")
def test_padding_has_no_influence(encoder):
    """Law 39: neither the ids at masked positions nor their number matters."""
    tokens, pooled = states(encoder)
    other_tokens, other_pooled = states(encoder, np.where(MASK, IDS, 10))
    assert np.array_equal(other_tokens[MASK], tokens[MASK]) and np.array_equal(other_pooled, pooled)
    longer_tokens, longer_pooled = states(encoder, np.pad(IDS, ((0, 0), (0, 2))), np.pad(MASK, ((0, 0), (0, 2))))
    np.testing.assert_allclose(longer_tokens[:, :5][MASK], tokens[MASK], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(longer_pooled, pooled, rtol=1e-10, atol=1e-12)


@pytest.mark.law(
    39, "permuting captions permutes their states",
    source="each caption alone, in another order, or twice", tolerance="1e-10: sums in another order")
def test_a_caption_depends_on_its_own_words_only(encoder):
    """Law 39: permuting the batch permutes the states; another caption beside it changes nothing."""
    tokens, pooled = states(encoder)
    for rows in ([2, 0, 1], [1], [0, 0]):
        part_tokens, part_pooled = states(encoder, IDS[rows], MASK[rows])
        np.testing.assert_allclose(part_tokens[MASK[rows]], tokens[rows][MASK[rows]], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(part_pooled, pooled[rows], rtol=1e-10, atol=1e-12)


def test_words_and_their_order_matter(encoder):
    _, pooled = states(encoder)
    swapped, replaced = IDS.copy(), IDS.copy()
    swapped[1, [1, 2]] = IDS[1, [2, 1]]
    replaced[1, 3] = 4
    for ids in (swapped, replaced):
        difference = np.abs(states(encoder, ids)[1] - pooled)
        assert difference[1].max() > 1e-3 and not difference[[0, 2]].any()


@pytest.mark.parametrize("ids, mask, message", [
    (np.zeros((2, 8), int), np.ones((2, 8), bool), r"\(B, N\), N at most 7, not \(2, 8\)"),
    (np.zeros((2, 4), int), np.ones((2, 3), bool), r"not \(2, 4\) and \(2, 3\)"),
    (np.zeros(4, int), np.ones(4, bool), r"not \(4,\)"),
    (np.full((2, 4), 11), np.ones((2, 4), bool), r"ids of 0\.\.10, not 11\.\.11"),
    (np.zeros((2, 4)), np.ones((2, 4), bool), "whole numbers, not float64"),
    (np.zeros((2, 4), int), np.ones((2, 4)), "mask must be boolean"),
])
def test_wrong_arguments_are_refused(encoder, ids, mask, message):
    with pytest.raises((ValueError, IndexError, TypeError), match=message):
        encoder(ids, mask)


def test_a_caption_of_no_tokens_at_all_is_refused(encoder):
    """Even the null caption has its BOS and EOS; the mean over nothing would be NaN."""
    with pytest.raises(ValueError, match="at least one token"):
        encoder(np.zeros((2, 3), int), np.array([[True, True, False], [False, False, False]]))
