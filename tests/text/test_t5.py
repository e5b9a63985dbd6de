"""The encoder-decoder that learns from text alone: which tokens depend on which, its loss, its gradients."""

import math

import numpy as np
import pytest
from support.gradcheck import check_gradients, moved

from minidiff.engine.tensor import Tensor, no_grad
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.span_corruption import restore
from minidiff.text.t5 import AttentionPooling, DecoderBlock, EncoderDecoder
from minidiff.text.tokenizer import BOS, EOS

CONFIG = TextEncoderConfig(vocab=30, length=16, width=8, layers=1, heads=2)


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    return moved(EncoderDecoder(TextEncoder(CONFIG, rng), 2, 12, 5, rng))


def batch(model, B=4, seed=1):
    rng = np.random.default_rng(seed)
    *arrays, weight = model.batch([list(rng.integers(3, 25, n)) for n in rng.integers(6, 14, B)], rng)
    return *arrays, weight.astype(np.float64)


def test_a_batch_holds_whole_texts(model):
    rng = np.random.default_rng(1)
    texts = [list(rng.integers(3, 25, n)) for n in (6, 14, 9, 30)]
    ids, mask, target_ids, weight = model.batch(texts, rng)
    assert list(model.sentinels) == [29, 28, 27, 26, 25]
    for i, text in enumerate(texts):
        left, target = ids[i][mask[i]].tolist(), target_ids[i][weight[i] > 0].tolist()
        assert (left[0], left[-1]) == (BOS, EOS)
        assert restore(left[1:-1], target, model.sentinels) == text[:14]        # the encoder reads 14 and both ends
    np.testing.assert_allclose(weight.sum(), len(texts), rtol=1e-6)
    assert (ids.dtype, mask.dtype, target_ids.dtype, weight.dtype) == (np.int32, bool, np.int32, np.float32)


def test_the_loss_is_the_cross_entropy_of_a_token(model):
    """Against probabilities by hand; and the mean over shards, weighted by their samples, is that of the batch."""
    ids, mask, target_ids, weight = arrays = batch(model)
    with no_grad():
        logits = model(ids, mask, target_ids).data
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        whole, parts = model.loss(*arrays), [model.loss(*(a[part] for a in arrays)) for part in (slice(3), slice(3, 4))]
    each = [-log_p[b, m, target_ids[b, m]] for b, m in zip(*np.nonzero(weight), strict=True)]
    assert whole.item() == pytest.approx(np.mean(each), rel=1e-5)
    assert (3 * parts[0].item() + parts[1].item()) / 4 == pytest.approx(whole.item(), rel=1e-9)


def test_equal_logits_cost_log_vocab(model):
    arrays = batch(model)
    model.encoder.embedding.table.data[:] = 0                                   # all logits are 0
    assert model.loss(*arrays).item() == pytest.approx(math.log(30), rel=1e-6)


def test_a_token_depends_on_earlier_tokens_and_the_input_only(model):
    ids, mask, target_ids, _ = batch(model)
    with no_grad():
        before = model(ids, mask, target_ids).data
        later = target_ids.copy()
        later[:, 2:] = 3
        assert np.array_equal(model(ids, mask, later).data[:, :3], before[:, :3])
        later[:, 1] = 3
        assert not np.allclose(model(ids, mask, later).data[:, 2], before[:, 2])
        later[:, 0] = 3
        assert np.array_equal(model(ids, mask, later).data[:, 0], before[:, 0])
        other = np.where(mask, ids, 7)                                          # what padding holds
        np.testing.assert_allclose(model(other, mask, target_ids).data, before, atol=1e-12)
        other[:, 1] = 11
        assert not np.allclose(model(other, mask, target_ids).data[:, 0], before[:, 0])


def test_gradients(model):
    arrays = batch(model, B=2)
    parameters = {n: p for n, p in model.parameters().items() if not n.startswith("encoder.norm_pooled")}
    check_gradients(lambda *_: model.loss(*arrays), *parameters.values(),
                    directions=2, rtol=1e-5)


def test_gradients_of_the_block_and_of_the_pooling():
    rng = np.random.default_rng(0)
    mask = np.array([[True, True, False], [True] * 3])
    block, pool = moved(DecoderBlock(4, 2, rng)), moved(AttentionPooling(4, 2, rng))
    x, context = (Tensor(rng.standard_normal((2, n, 4)), True) for n in (5, 3))
    check_gradients(lambda *_: block(x, context, mask[:, None, None]), x, context, *block.parameters().values(),
                    directions=2)
    check_gradients(lambda *_: pool(context, mask), context, *pool.parameters().values(), directions=2)


def test_pooling_does_not_see_padding():
    rng = np.random.default_rng(0)
    pool, x = moved(AttentionPooling(4, 2, rng)), rng.standard_normal((2, 3, 4))
    mask = np.array([[True, True, False], [True, False, False]])
    other = np.where(mask[:, :, None], x, 5.0)
    np.testing.assert_allclose(pool(Tensor(other), mask).data, pool(Tensor(x), mask).data, atol=1e-12)
    short = pool(Tensor(x[1:, :1]), mask[1:, :1]).data
    np.testing.assert_allclose(pool(Tensor(x), mask).data[1:], short, atol=1e-12)


@pytest.mark.parametrize("layers, targets, sentinels", [(0, 4, 4), (1, 0, 4), (1, 4, 0), (1, 4, 31)])
def test_wrong_sizes_are_refused(layers, targets, sentinels):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="sentinels"):
        EncoderDecoder(TextEncoder(CONFIG, rng), layers, targets, sentinels, rng)
