"""Cross-attention maps: against a plain calculation from the model's weights, and what watching must not change."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from support import tiny

from minidiff.diffusion.samplers import State
from minidiff.engine.attention import attention_weights
from minidiff.engine.parallel import parallel_map
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.transformer import Attention, watching_attention
from minidiff.nn.unet import SpatialAttention, UNetConfig
from minidiff.systems.attention_maps import END, START, attention_maps, trajectory_maps
from minidiff.systems.text_to_image import TextToImage
from minidiff.text.encoder import TextEncoderConfig

CAPTION, T = "a thin seven", 30
WIDE = UNetConfig(widths=(8, 16), attention=(True, True), heads=2, groups=4, embedding=16, text=8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return tiny.trained_a_little()


@pytest.fixture(scope="module")
def oblong() -> TextToImage:
    """Of pictures that are not square, with attention on two grids, and no weight 0."""
    config = replace(tiny.CONFIG, shape=(8, 16, 1), text=TextEncoderConfig(width=8, layers=1, heads=2), unet=WIDE)
    model = TextToImage(config, tiny.tokenizer(), np.random.default_rng(1))
    for i, p in enumerate(model.parameters().values()):
        p.data = p.data + 0.3 * normal(*p.shape, seed=i)
    return model


def plain_maps(model, x_t, t, caption):
    """The maps from the inputs of each cross-attention layer and its weights, one head and one token at a time."""
    seen, contexts, plain, plain_keys_values = [], {}, Attention._attend, SpatialAttention.keys_values

    def keys_values(self, tokens):
        contexts[self.cross_attention] = self.norm_text(tokens).data[0].astype(float)
        return plain_keys_values(self, tokens)

    def attend(self, x, *args):
        if self in contexts:
            seen.append((self, x.data[0].astype(float), contexts[self]))
        return plain(self, x, *args)
    (ids, mask), (H, W, _) = model.tokens([caption]), x_t.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpatialAttention, "keys_values", keys_values)
        patch.setattr(Attention, "_attend", attend)
        with no_grad():
            model.unet(Tensor(x_t[None]), np.array([t]), model.text(ids, mask))
    n = int(mask.sum())
    maps = []
    for layer, x, context in seen:
        C = x.shape[1]
        d = C // layer.heads
        q, k = x @ layer.q.w.data + layer.q.b.data, (context @ layer.kv.w.data + layer.kv.b.data)[:n, :C]
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            P = scipy.special.softmax(q[:, part] @ k[:, part].T / d**0.5, axis=1)   # (pixels, tokens)
            side = int(round((H * W / len(P)) ** 0.5))
            maps.append([np.kron(P[:, m].reshape(H // side, W // side), np.ones((side, side))) for m in range(n)])
    return np.mean(maps, axis=0), len(seen)


@pytest.mark.parametrize("name, layers, shape", [("model", 3, (28, 28)), ("oblong", 5, (8, 16))])
def test_the_maps_are_those_of_a_plain_calculation(name, layers, shape, request):
    model = request.getfixturevalue(name)
    x_t = normal(*shape, 1)
    names, maps = attention_maps(model, x_t, T, CAPTION)
    expected, count = plain_maps(model, x_t, T, CAPTION)
    assert count == layers and maps.shape == (len(names), *shape)
    np.testing.assert_allclose(maps, expected, rtol=2e-5)
    assert np.ptp(maps, axis=(1, 2)).max() > 0.01           # a pixel is not like another
    np.testing.assert_allclose(maps.sum(axis=0), 1, rtol=1e-6)


def test_the_tokens_are_those_of_the_caption(model):
    names, _ = attention_maps(model, normal(28, 28, 1), T, "A thin  Seven \u00e9")
    assert names[0] == START and names[-1] == END and "".join(names[1:-1]).replace("\ufffd", "") == " a thin  seven "
    assert attention_maps(model, normal(28, 28, 1), T, "")[0] == [START, END]


def test_padding_gets_no_attention():
    q, k = normal(1, 2, 6, 4), normal(1, 2, 5, 4, seed=1)
    mask = np.array([True, True, True, False, False])[None, None, None]
    P = attention_weights(q, k, mask)
    assert P.shape == (1, 2, 6, 5) and not P[..., 3:].any()
    expected = scipy.special.softmax(np.einsum("bhnd,bhmd->bhnm", q, k[:, :, :3]) / 2, axis=3)
    np.testing.assert_allclose(P[..., :3], expected, rtol=1e-5)
    assert not attention_weights(q, k, ~np.ones((1, 1, 1, 5), bool)).any()
    np.testing.assert_allclose(attention_weights(q.astype(np.float16), k.astype(np.float16), mask), P, atol=2e-3)


def test_watching_changes_nothing(model):
    x_t, t, cond = normal(3, 28, 28, 1), np.array([3, 20, 40]), model.encode([CAPTION, "", "bold 8"])
    before, seen = model.predict(x_t, t, cond), []
    with watching_attention(lambda *found: seen.append(found)):
        watched = model.predict(x_t, t, cond)
    # three blocks, each with self-attention and cross-attention, of each shard
    rows = [q.shape[0] for _, q, *_ in seen]
    assert np.array_equal(before, watched) and sum(rows) == 3 * 6
    assert np.array_equal(before, model.predict(x_t, t, cond)) and len(seen) == len(rows)


def test_another_thread_is_not_watched_and_its_map_is():
    attend, x, seen = Attention(4, 2, np.random.default_rng(0)), Tensor(normal(1, 3, 4)), []

    def elsewhere():
        thread = threading.Thread(target=attend, args=(x,))
        thread.start()
        thread.join()

    with watching_attention(lambda layer, *_: seen.append(layer)):
        elsewhere()
        assert not seen
        parallel_map(lambda _: attend(x), range(4))
        assert seen == [attend] * 4
        with watching_attention(lambda *_: None):
            attend(x)
        assert len(seen) == 4
    attend(x)
    assert len(seen) == 4


def test_a_watcher_that_raises_is_forgotten():
    attend, x = Attention(4, 2, np.random.default_rng(0)), Tensor(normal(1, 3, 4))
    with pytest.raises(ZeroDivisionError), watching_attention(lambda *_: 1 / 0):
        attend(x)
    attend(x)


def test_the_maps_of_a_trajectory_are_the_mean_of_those_on_its_way(model):
    states = list(model.trajectory(["", CAPTION], steps=3, seed=5))
    names, maps = trajectory_maps(model, states, CAPTION, sample=1)
    each = [attention_maps(model, s.x_t[1], s.t, CAPTION) for s in states[:-1]]
    assert len(each) == 3 and names == each[0][0]
    np.testing.assert_allclose(maps, sum(m for _, m in each) / 3, rtol=1e-6)
    clean = [State(1, 0, states[0].x_t, None), State(2, -1, states[-1].x_t, None)]         # t = 0 is still noised
    np.testing.assert_array_equal(trajectory_maps(model, clean, CAPTION, sample=1)[1],
                                  attention_maps(model, states[0].x_t[1], 0, CAPTION)[1])


@pytest.mark.parametrize("change, message", [
    ({"x_t": normal(1, 28, 28, 1)}, r"x_t must be one picture of shape \(28, 28, 1\), got \(1, 28, 28, 1\)"),
    ({"t": 50}, r"t must be a time within 0..49, got 50"), ({"t": -1}, "t must be a time within 0..49, got -1")])
def test_wrong_arguments_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(**{"model": model, "x_t": normal(28, 28, 1), "t": T, "caption": CAPTION} | change)
    with pytest.raises(TypeError, match="caption must be a str, got list"):
        attention_maps(model, normal(28, 28, 1), T, [CAPTION])
    with pytest.raises(ValueError, match="states must hold at least one state"):
        trajectory_maps(model, [], CAPTION)
