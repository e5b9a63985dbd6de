"""Weights in 8 bits: the error of rounding, what is kept, and a system that is saved and loaded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_systems
from support.law_tools import quickly

from minidiff import checkpoint, systems
from minidiff.errors import UserError
from minidiff.nn.int8 import SCALE, from_int8, quantised, to_int8
from minidiff.systems.text_to_image import TextToImage


@quickly
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=2, max_size=4), st.floats(-20, 20))
def test_the_error_is_at_most_half_a_step_of_each_channel(seed, shape, magnitude):
    """Bugs: one scale for all channels; truncation for rounding; channels along another axis."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0 ** magnitude)
    w[..., 0] *= 1000                                       # a channel that is much larger than the others
    q, scale = quantised(w)
    assert q.dtype == np.int8 and q.shape == w.shape and scale.shape == (shape[-1],) and scale.dtype == np.float32
    for c in range(shape[-1]):
        largest = float(np.abs(w[..., c]).max())
        error = np.abs(w[..., c].astype(np.float64) - q[..., c] * scale[c].astype(np.float64))
        assert error.max() <= largest / 254 * (1 + 1e-5)
        assert np.abs(q[..., c]).max() == 127               # the whole range is used


def test_a_channel_of_zeros_stays_zero():
    q, scale = quantised(np.zeros((3, 2), np.float32))
    assert not q.any() and not scale.any()
    assert not from_int8({"w": q, "w" + SCALE: scale})["w"].any()


def test_vectors_and_statistics_are_kept():
    arrays = {"w": np.eye(3, dtype=np.float32), "b": np.array([0.1, 2.0], np.float32), "n": np.array([[1.5]]),
              "s": np.float32(0.3).reshape(())}
    kept = to_int8(arrays)
    assert {name: a.dtype.name for name, a in kept.items()} == {
        "w": "int8", "w" + SCALE: "float32", "b": "float16", "n": "float64", "s": "float16"}
    again = from_int8(kept)
    assert again.keys() == arrays.keys()
    np.testing.assert_allclose(again["w"], arrays["w"], rtol=1e-6)
    np.testing.assert_allclose(again["b"], arrays["b"], rtol=1e-3)
    assert again["n"] is arrays["n"]


def test_a_system_is_saved_in_a_quarter_of_its_size_and_draws_nearly_the_same(tmp_path):
    model = small_systems.small("text-to-image")
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    model.save(wide)
    model.save(narrow, dtype=np.int8)
    again, before = TextToImage.load(narrow).state_dict(), model.state_dict()
    assert again.keys() == before.keys() and all(a.dtype == np.float32 for a in again.values())
    for name, w in before.items():
        step = np.abs(w).max(axis=tuple(range(w.ndim - 1)), keepdims=True) / 254 if w.ndim > 1 else 1e-3 * np.abs(w)
        assert (np.abs(again[name] - w) <= step * (1 + 1e-5) + 1e-7).all(), name
    header = checkpoint.read_header(narrow)
    assert sum(int(np.prod(e.shape)) * e.dtype.itemsize for e in header.arrays.values()) < sum(
        a.nbytes for a in before.values()) / 2              # many small vectors here; 0.253 of the emoji's


@pytest.mark.parametrize("change, sentence", [
    (lambda a, n: a.pop(n + SCALE), "lacks the tensor .*:scale"),
    (lambda a, n: a.update({n + SCALE: np.ones(a[n].shape[-1] + 1, np.float32)}), "in shape"),
    (lambda a, n: a.update({"b" + SCALE: np.ones(3, np.float32)}), "does not have"),
    (lambda a, n: a.update({n + SCALE: np.full(a[n].shape[-1], np.nan, np.float32)}), "finite|NaN"),
    *((lambda a, n, scale=scale: a.update({n + SCALE: np.full(a[n].shape[-1], scale)}), "must be float32 numbers")
      for scale in (np.float32(3e38), np.float16(6e4), np.float32(-1), np.float64(1), np.int8(2), np.True_)),
])
def test_a_file_whose_scales_are_wrong_is_refused(change, sentence, tmp_path):
    model = small_systems.small("text-to-image")
    arrays = to_int8(model.state_dict())
    change(arrays, next(name for name in arrays if name + SCALE in arrays))
    path = tmp_path / "wrong.safetensors"
    with pytest.raises((UserError, ValueError), match=sentence):
        checkpoint.save(path, arrays, model.describe())
        TextToImage.load(path)


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(TypeError, match="dtype must be int8 or a floating dtype"):
        small_systems.small("text-to-image").save(tmp_path / "x.safetensors", dtype=np.int16)


# ---- models by the name that minidiff gave them ------------------------------------------------------------------

def test_a_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
    """A file or folder here of the same name is taken before it."""
    monkeypatch.chdir(tmp_path)
    assert systems.model_path("emoji").name == "emoji.safetensors" and systems.model_path("emoji").is_file()
    (tmp_path / "emoji").mkdir()
    assert systems.model_path("emoji").is_dir()
    assert not systems.model_path("../weights/emoji").exists()
    with pytest.raises(UserError, match="none does not exist here, and no weights of this name .* clip, .*emoji"):
        systems.model_path("none")


def test_a_mistyped_folder_is_no_name_at_hugging_face(monkeypatch):
    monkeypatch.setattr("minidiff.pretrained.hub.fetched", lambda name: pytest.fail(f"{name} is fetched"))
    with pytest.raises(UserError, match="runs/mine does not exist"):
        systems.load_system("text-to-image", "runs/mine")


@pytest.mark.slow
def test_the_shipped_emoji_are_those_that_their_names_ask_for():
    """Of 20 names that training saw, and 20 that it never saw.  docs/own_pictures.md has 98 and 93 %: fewer than 15 of
    20 would be right with a probability of 2e-3 at the lower rate; the seed is fixed."""
    from minidiff.evaluation.emoji import evaluate_emoji
    model = systems.load_system("text-to-image", "emoji")
    report = evaluate_emoji(model, count=20, options={"steps": 15})
    assert report.r1 >= 0.75 and report.held_out_r1 >= 0.75
