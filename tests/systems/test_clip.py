"""CLIP: its temperature, its towers, and what is read from embeddings. The loss itself is proved in tests/laws."""

import dataclasses
import math
from copy import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.examples import load
from support.small_systems import moved

from minidiff.data import digit_captions, mnist
from minidiff.data.digit_captions import DIGITS
from minidiff.data.pixels import to_float
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.nn.image_tower import ImageTowerConfig
from minidiff.systems.clip import CLIP, CLIPConfig
from minidiff.systems.stage import Step
from minidiff.systems.system import as_read
from minidiff.text.clip import FIRST_LOG_SCALE, capped, clip_loss, recall_at
from minidiff.text.encoder import TextEncoderConfig

CONFIG = CLIPConfig(pairs=6, image=ImageTowerConfig(widths=(8, 8), groups=4, last=2),
                    text=TextEncoderConfig(width=8, layers=1, heads=2))
CAPTIONS = ["7", "a bold seven leaning left", "", "an image of the thin number 3"]


@pytest.fixture(scope="module")
def model(data) -> CLIP:
    """An untrained model in which no weight is 0."""
    return moved(CLIP.new(data, config=CONFIG))


# ---- the temperature ---------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.floats(-3, math.log(100)), st.integers(0, 2**32))
def test_the_gradient_of_the_log_scale_is_the_expected_minus_the_observed_logit(N, log_scale, seed):
    """d L / d log_scale = mean over both directions of E_softmax[logit] - logit of the pair."""
    rng = np.random.default_rng(seed)
    I_e, T_e = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, N, 4)))
    logits = math.exp(log_scale) * I_e @ T_e.T
    expected = 0.0
    for rows in (logits, logits.T):
        p = np.exp(rows - np.logaddexp.reduce(rows, axis=1)[:, None])
        expected += ((p * rows).sum(axis=1) - rows.diagonal()).mean() / 2
    leaf = Tensor(np.array(log_scale), requires_grad=True)
    dx, = gradients(clip_loss(Tensor(I_e), Tensor(T_e), capped(leaf)), [leaf])
    assert dx == pytest.approx(expected, rel=1e-9, abs=1e-9)                        # logits of up to 100 at 1e-14


def test_the_scale_never_passes_100():
    rng = np.random.default_rng(0)
    I_e, T_e = (Tensor(x) for x in rng.normal(size=(2, 5, 4)))
    at_cap = clip_loss(I_e, T_e, Tensor(np.array(math.log(100)))).item()
    for log_scale in (math.log(100) + 1e-9, 5.0, 50.0):
        leaf = Tensor(np.array(log_scale), requires_grad=True)
        loss = clip_loss(I_e, T_e, capped(leaf))
        assert loss.item() == pytest.approx(at_cap, rel=1e-12) and gradients(loss, [leaf])[0] == 0
    below = Tensor(np.array(math.log(100) - 1e-6), requires_grad=True)
    assert gradients(clip_loss(I_e, T_e, capped(below)), [below])[0] != 0
    assert pytest.approx(1 / 0.07) == math.exp(FIRST_LOG_SCALE)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_images_that_share_a_caption_raise_the_loss_by_the_log_of_their_number(copies):
    """Perfect embeddings of K captions, each m times in the batch, have the loss log m, as the page says."""
    K, scale = 4, 100.0
    I_e = np.repeat(np.eye(K), copies, axis=0)
    # every wrong one of the K - 1 other captions adds m e^-100
    assert clip_loss(Tensor(I_e), Tensor(I_e), Tensor(np.array(math.log(scale)))).item() == \
        pytest.approx(math.log(copies), abs=1e-12)


# ---- the towers --------------------------------------------------------------------------------------------

def test_an_embedding_depends_on_its_own_image_or_caption_only(model, data):
    images = data.images(range(5))
    I_e, T_e = model.embed_images(images), model.embed_captions(CAPTIONS)
    assert I_e.dtype == T_e.dtype == np.float32 and I_e.shape == (5, 8) and T_e.shape == (4, 8)
    for rows in (I_e, T_e):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    for i, caption in enumerate(CAPTIONS):                  # alone, with no padding; in a batch, padded to the longest
        np.testing.assert_allclose(model.embed_captions([caption]), T_e[i:i + 1], atol=1e-5)
    for i in range(5):
        np.testing.assert_allclose(model.embed_images(images[i:i + 1]), I_e[i:i + 1], atol=1e-5)
    np.testing.assert_allclose(model.embed_images(images[::-1]), I_e[::-1], atol=1e-5)
    assert np.ptp(I_e, axis=0).max() > 1e-2 and np.ptp(T_e, axis=0).max() > 1e-2        # and does depend on it


def test_an_embedding_is_the_projection_of_the_text_states(model):
    tokens, pooled, mask = model.text_states(CAPTIONS)
    assert tokens.shape == (4, 24, 8) and pooled.shape == (4, 8) and mask.shape == (4, 24)
    lengths = [2 + len(model.tokenizer.encode(as_read(c))) for c in CAPTIONS]       # BOS and EOS
    np.testing.assert_array_equal(mask.sum(axis=1), lengths)
    T_e = pooled @ model.text.project.w.data + model.text.project.b.data
    T_e /= np.linalg.norm(T_e, axis=1, keepdims=True)
    np.testing.assert_allclose(T_e, model.embed_captions(CAPTIONS), atol=1e-5)


def test_image_features_are_the_embeddings_and_carry_gradients(model, data):
    x = Tensor(data.images(range(3)), requires_grad=True)
    features = model.image_features(x)
    np.testing.assert_allclose(features.data, model.embed_images(x.data), atol=1e-5)
    dx, = gradients(features, [x], np.ones(features.shape, np.float32))
    assert np.isfinite(dx).all() and (np.abs(dx).max(axis=(1, 2, 3)) > 0).all()


# ---- training ----------------------------------------------------------------------------------------------

def test_the_stages_loss_is_the_mean_of_clip_loss_over_its_batches(model, data):
    stage = next(model.stages(data))
    x_0, ids, mask = stage.batch(Step(3, 1, 0, 10, size=2))
    assert x_0.shape == (2, 6, 28, 28, 1) and ids.shape == mask.shape and ids.shape[:2] == (2, 6)
    assert mask.any(axis=(0, 1)).all()                      # no column of nothing but padding
    each = []
    for x, i, m in zip(x_0, ids, mask, strict=True):
        I_e, T_e = model.embed_images(x), model.text(i, m).data
        each.append(clip_loss(Tensor(I_e), Tensor(T_e), model.log_scale).item())
    assert stage.loss(model, x_0, ids, mask).item() == pytest.approx(np.mean(each), rel=1e-4)      # float32
    parts = [stage.loss(model, *(a[p] for a in (x_0, ids, mask))).item() for p in (slice(0, 1), slice(1, 2))]
    assert parts == pytest.approx(each, rel=1e-4)
    np.testing.assert_array_equal(stage.batch(Step(3, 1, 0, 10, size=2))[1], ids)
    assert not np.array_equal(stage.batch(Step(3, 1, 1, 10, size=2))[0], x_0)               # other pairs at each step


def test_a_pair_is_an_image_and_a_caption_of_it(data):
    """Each image's first pixel names its digit, and so does its caption."""
    clip, marked = CLIP.new(data, config=CONFIG), copy(data)
    marked.pixels = data.pixels.copy()
    marked.pixels[:, 0, 0] = data.labels
    x_0, ids, _ = clip.random_pairs(marked, Step(0, 1, 0, 10, size=4))
    for x, row in zip(x_0.reshape(-1, 28, 28, 1), ids.reshape(24, -1), strict=True):
        digit, words = round((float(x[0, 0, 0]) + 1) * 127.5), clip.tokenizer.decode(row)
        assert str(digit) in words or DIGITS[digit] in words


# ---- what is read from embeddings --------------------------------------------------------------------------

class Perfect(CLIP):
    """Embeds a picture as a corner of a cube, by the digit in its first pixel, and a caption by the digit it names."""

    def embed_images(self, images):
        return np.eye(10, dtype=np.float32)[images[:, 0, 0, 0].astype(int)]

    def embed_captions(self, captions):
        named = [next(k for k, word in enumerate(DIGITS) if word in c or str(k) in c) for c in captions]
        return np.eye(10, dtype=np.float32)[named]


@pytest.mark.parametrize("prompts", [digit_captions.PHRASINGS, ("{word}",), ("a photo of the digit {figure}",)])
def test_zero_shot_on_perfect_embeddings(data, prompts):
    clip, digits = Perfect.new(data, config=CONFIG), np.random.default_rng(0).integers(0, 10, 50)
    images = np.zeros((50, 28, 28, 1), np.float32)
    images[:, 0, 0, 0] = digits
    np.testing.assert_array_equal(clip.zero_shot(images, digit_captions.phrasings(prompts)), digits)


def test_an_ensemble_is_the_mean_of_its_phrasings_directions(model, data):
    """Against the sum of cosines, each with its own phrasing: the mean's length is one number for each class."""
    images, phrasings = data.images(range(20)), digit_captions.phrasings()
    I_e = model.embed_images(images)
    T_e = [[model.embed_captions([caption])[0] for caption in captions] for captions in phrasings]      # 10 times P
    cosines = np.stack([sum(I_e @ row for row in rows) for rows in T_e])                                # (10, B)
    score = cosines / np.linalg.norm([sum(rows) for rows in T_e], axis=1)[:, None]                      # (10, B)
    np.testing.assert_array_equal(model.zero_shot(images, phrasings), score.argmax(axis=0))
    np.testing.assert_allclose(np.linalg.norm(model.embed_classes(phrasings), axis=1), 1, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 2**32))
def test_recall_against_sorting_every_row(N, more, seed):
    similarity = np.random.default_rng(seed).normal(size=(N, N + more))
    for k in range(1, N + more + 1):
        found = [i in sorted(range(N + more), key=lambda j, row=row: -row[j])[:k] for i, row in enumerate(similarity)]
        assert recall_at(k, similarity) == pytest.approx(np.mean(found), abs=1e-12)
    assert recall_at(N + more, similarity) == 1


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda m: m.embed_images(np.zeros((2, 27, 28, 1), np.float32)), r"images must be \(B, 28, 28, 1\)"),
    (lambda m: m.embed_images(np.zeros((2, 28, 28), np.float32)), r"images must be \(B, 28, 28, 1\)"),
    (lambda m: m.zero_shot(np.zeros((1, 28, 28, 1), np.float32), [["a", "b"], ["c"]]), "equally many captions"),
    (lambda m: m.embed_classes([]), "phrasings must be lists"),
    (lambda m: CLIPConfig(pairs=1), "pairs must be at least 2"),
    (lambda m: recall_at(0, np.eye(3)), "k must be within 1 and 3"),
    (lambda m: recall_at(1, np.zeros((3, 2))), "similarity must be"),
    (lambda m: CLIP(CLIPConfig(text=TextEncoderConfig(vocab=300)), m.tokenizer, np.random.default_rng(0)),
     "text.vocab .300. must be at least"),
])
def test_refusals_name_the_argument(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)


def test_captions_are_a_list(model):
    for method in (model.embed_captions, model.text_states):
        with pytest.raises(TypeError, match="captions must be a list of str"):
            method("seven")


def test_a_file_gives_the_same_embeddings_back(model, tmp_path):
    model.save(tmp_path / "clip.safetensors")
    again = CLIP.load(tmp_path / "clip.safetensors")
    np.testing.assert_array_equal(again.embed_captions(CAPTIONS), model.embed_captions(CAPTIONS))
    assert again.log_scale.data.shape == () and again.config == CONFIG


def test_a_clip_of_pictures_of_another_shape_is_refused_in_a_sentence_that_says_what_to_train(model):
    other = CLIP(dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, shape=(32, 32, 3))),
                 model.tokenizer, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"reads pictures of the shape \(28, 28, 1\), and these are \(32, 32, 3\): "
                                        "train one by minidiff train --system clip .* --needs clip=FILE"):
        other.copy_from(model)
    again = CLIP(CONFIG, model.tokenizer, np.random.default_rng(1))
    again.copy_from(model)
    np.testing.assert_array_equal(again.embed_captions(CAPTIONS), model.embed_captions(CAPTIONS))


# ---- the weights that come with minidiff -------------------------------------------------------------------

def test_the_shipped_weights_read_digits_without_having_seen_labels():
    """On packed training images; the page has the share of the test set."""
    packed = mnist.packed()
    read = CLIP.load().zero_shot(to_float(packed.images[:300])[..., None], digit_captions.phrasings())
    assert (read == packed.labels[:300]).mean() > 0.95


def test_the_example(tmp_path, monkeypatch, capsys):
    example = load("03_clip")
    monkeypatch.setattr(example, "load_dataset", lambda *a: tiny.digits(60))
    assert example.main(count=20, nearest=2, out=str(tmp_path / "r.png")) > 0.9
    assert "a caption's own picture among 20: recall @1" in capsys.readouterr().out
    assert (tmp_path / "r.png").stat().st_size > 1000
