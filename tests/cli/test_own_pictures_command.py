"""A folder of pictures by command, as a user has it: train, resume, sample, info, evaluate."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.command_line import call

from minidiff import checkpoint
from minidiff.data.dataset import load_dataset

SMALL = ("--system", "text-to-image", "--size", "16x8", "--batch", "4", "--images", "0")


def arguments(**given) -> SimpleNamespace:
    """Those of evaluate that --likelihood reads."""
    nothing = dict.fromkeys(("data", "fit", "background", "flip", "captions"))
    return SimpleNamespace(images=4, seed=0, **(nothing | given))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with pictures in colour, red and blue, and their captions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for i in range(6):
            folder = tmp_path / "mine" / split / ("red_ball" if i % 2 else "blue_box")
            folder.mkdir(parents=True, exist_ok=True)
            x = np.zeros((20, 40, 3), np.uint8)
            x[..., 0 if i % 2 else 2] = 200 + 5 * i + (split == "test")
            Image.fromarray(x).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_train_resume_sample_info_and_evaluate(place, capsys):
    assert call("train", "--data", "mine", "--out", "run", "--steps", 3, *SMALL) == 0
    assert "data: 6 pictures of mine/train (6 images)" in capsys.readouterr().out
    model = place / "run" / "model.safetensors"
    meta = checkpoint.read_header(model).meta
    assert meta["config"]["shape"] == [8, 16, 3] and meta["notes"]["dataset"] == "pictures"
    assert (place / "run" / "sheet.png").stat().st_size > 0
    # as if it had been stopped after the second step
    whole = model.read_bytes()
    model.unlink()
    assert call("train", "--data", "mine", "--out", "run", "--resume", "--size", "16x8", "--images", 0) == 0
    assert checkpoint.load(model).tensors.keys() == checkpoint.load(place / "run" / "model.safetensors").tensors.keys()
    assert len(model.read_bytes()) == pytest.approx(len(whole), abs=200)            # its notes hold the seconds
    assert call("sample", "red ball", "--model", model, "-o", "a.png", "--count", 2, "--steps", 2) == 0
    with Image.open("a.png") as image:
        assert image.mode == "RGB"
    assert call("info", "--model", model) == 0 and "pictures of mine/train" in capsys.readouterr().out
    assert call("evaluate", "--likelihood", "--model", model, "--data", "mine", "--images", 4, "--json", "b.json") == 0
    assert json.loads((place / "b.json").read_text())["images"] == 4


@pytest.mark.slow
def test_a_clip_of_the_same_pictures_judges(place, capsys):
    """Without one, and with one of other pictures, a sentence says how to train it."""
    folder = place / "levels"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"level {i}")
    size = ("--size", "8", "--batch", "2", "--steps", 2, "--images", "0")
    assert call("train", "--data", "levels", "--out", "run", *size) == 0
    capsys.readouterr()
    evaluate = ("evaluate", "--model", "run/model.safetensors", "--data", "levels", "--images", 12, "--steps", 2)
    assert call(*evaluate) == 2
    assert "was not trained on 10 pictures of levels: train one with minidiff train --system clip" \
        in capsys.readouterr().err
    assert call("train", "--system", "clip", "--data", "levels", *size) == 0
    capsys.readouterr()
    assert call(*evaluate, "--json", "report.json") == 0
    report = json.loads((place / "report.json").read_text())
    assert report["images"] == 12 and report["captions"] == 10 and report["compared"] == 5
    assert report["judge"].endswith("clip/model.safetensors")
    assert "caption found: R@1" in capsys.readouterr().out


@pytest.mark.slow
def test_other_pictures_or_another_size_are_refused_when_resuming(place, capsys):
    assert call("train", "--data", "mine", "--out", "run", "--steps", 1, *SMALL) == 0
    for words in (("--size", "8x8"), ("--size", "16x8", "--flip")):
        assert call("train", "--data", "mine", "--out", "run", "--resume", "--images", 0, *words) == 2
        assert "was started with other data" in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(place / "mine" / "train" / "red_ball" / "1.png")
    assert call("train", "--data", "mine", "--out", "run", "--resume", "--images", 0, "--size", "16x8") == 2
    assert "was started with other data" in capsys.readouterr().err


def test_the_likelihood_s_test_pictures_have_the_model_s_size(place, monkeypatch):
    """Width and height are those of the model, whatever the default."""
    from minidiff.cli import evaluate
    seen = []
    monkeypatch.setattr("minidiff.evaluation.likelihood.likelihood", lambda model, data, **k: seen.append(data))
    model = SimpleNamespace(config=SimpleNamespace(shape=(8, 16, 3)), notes={}, name="x", likelihood_denoiser=lambda: 0)
    evaluate._likelihood(model, arguments(data="mine"))
    (data,) = seen
    assert data.shape == (8, 16, 3)
    expected = load_dataset(place / "mine" / "test", options={"size": (16, 8)})
    assert np.array_equal(data.images(range(6)), expected.images(range(6)))


@pytest.mark.parametrize("given", [{"fit": "pad"}, {"fit": "pad", "background": (0, 128, 0)}])
def test_the_likelihood_s_test_pictures_are_read_as_asked(place, monkeypatch, given):
    """Wide pictures for a square model: between two borders, in the colour that was given, and not cropped."""
    from minidiff.cli import evaluate
    seen = []
    monkeypatch.setattr("minidiff.evaluation.likelihood.likelihood", lambda model, data, **k: seen.append(data))
    model = SimpleNamespace(config=SimpleNamespace(shape=(8, 8, 3)), notes={}, name="x", likelihood_denoiser=lambda: 0)
    evaluate._likelihood(model, arguments(data="mine", **given))
    x = seen[0].images(range(6))
    border = np.array(given.get("background", (255, 255, 255)), np.float32) / 127.5 - 1
    assert x.shape == (6, 8, 8, 3) and x[:, 3:5].max(axis=3).min() > 0.5            # the picture, red or blue
    np.testing.assert_allclose(x[:, [0, -1]], np.broadcast_to(border, (6, 2, 8, 3)), atol=1e-2)


def test_a_model_of_own_pictures_asks_for_test_pictures(capsys):
    from minidiff.cli import evaluate
    from minidiff.errors import UserError
    model = SimpleNamespace(config=SimpleNamespace(shape=(8, 16, 3)), likelihood_denoiser=lambda: 0,
                            notes={"dataset": "pictures", "data": "6 pictures of mine"})
    with pytest.raises(UserError, match="trained on '6 pictures of mine', which minidiff does not have: name a folder"):
        evaluate._likelihood(model, arguments())


@pytest.mark.parametrize("make, sentence", [
    (lambda folder: None, "holds no pictures"),
    (lambda folder: (folder / "a.png").write_bytes(b"x"), "has no captions"),
    (lambda folder: (folder / "a.txt").write_text("a"), "holds no pictures"),
    (lambda folder: [(folder / "a.png").write_bytes(b"x"), (folder / "a.txt").write_text("a")], "cannot be read")])
def test_a_folder_that_is_refused_leaves_no_run(place, capsys, make, sentence):
    (place / "empty").mkdir()
    make(place / "empty")
    assert call("train", "--data", "empty", "--out", "run") == 2
    assert sentence in capsys.readouterr().err and not (place / "run").exists()


def test_a_size_that_the_network_cannot_have_is_refused(place, capsys):
    assert call("train", "--data", "mine", "--out", "run", "--size", "7") == 2
    said = capsys.readouterr().err
    assert "cannot be trained so" in said and "multiples of" in said
    shutil.rmtree(place / "run", ignore_errors=True)
