"""The numbers of an evaluation of any pictures, on models and a CLIP whose right numbers are known by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.linalg import sqrtm
from support import small_systems

from minidiff.data.own_pictures import OwnPictures
from minidiff.engine.random import generator
from minidiff.errors import UserError
from minidiff.evaluation import evaluate, takes_data
from minidiff.evaluation.pictures import caption_ranks, clip_of, evaluate_pictures

LEVELS = 24


def made(count: int = LEVELS, test: OwnPictures | None = None) -> OwnPictures:
    """Picture i is of one grey level, 10 i, and its caption says so."""
    pixels = np.broadcast_to((10 * np.arange(count))[:, None, None, None], (count, 4, 4, 1)).astype(np.uint8)
    return OwnPictures(pixels.copy(), [(f"level {i}",) for i in range(count)], f"{count} pictures of made", test=test)


def angle(level) -> np.ndarray:
    """Unit rows, of an angle that the level decides."""
    a = np.asarray(level) / LEVELS * np.pi / 2
    return np.stack([np.cos(a), np.sin(a)], axis=-1)


class Judge:
    """A CLIP that sees the grey level of a picture, and reads it in a caption."""

    def embed_images(self, images):
        return angle((images[:, 0, 0, 0] + 1) * 127.5 / 10)

    def embed_captions(self, captions):
        return angle([int(c.split()[1]) for c in captions])


class Model:
    """Draws the level that is asked for, or what `drawn` makes of it."""

    name, notes, reads_captions = "made", {"dataset": "pictures"}, True
    config = SimpleNamespace(shape=(4, 4, 1))

    def __init__(self, drawn=lambda i: i):
        self.drawn, self.asked = drawn, []

    def options(self):
        return {"scale": 2.0}

    def sample(self, captions, *, streams, scale):
        self.asked += captions
        levels = np.array([self.drawn(int(c.split()[1])) for c in captions])
        return np.broadcast_to((10 * levels / 127.5 - 1)[:, None, None, None], (len(levels), 4, 4, 1))


def test_a_perfect_model():
    report = evaluate_pictures(Model(), data=made(), judge=Judge(), count=LEVELS)
    assert report.r1 == report.r5 == report.real_r1 == report.real_r5 == 1
    assert (report.images, report.captions, report.compared) == (LEVELS, LEVELS, LEVELS // 2)
    assert report.precision > 0.5 and report.recall == 1    # a picture may lie outside the balls of one half


def test_ranks_by_hand():
    """Each level is drawn two levels too high: nearer are the captions of 2, 1 and 3 levels more, where there are."""
    report = evaluate_pictures(Model(lambda i: i + 2), data=made(), judge=Judge(), count=LEVELS)
    # level i is drawn as i + 2: i + 1 .. i + 3 are nearer, and i + 4 ties: rank 4, but 3, 2, 1 and 0 at the end
    assert report.r1 == 1 / LEVELS and report.r5 == 1 and report.real_r1 == 1
    ranks = caption_ranks(angle([2, 2]), angle([0, 1, 2, 3, 4]), np.array([0, 3]))
    assert ranks.tolist() == [4, 2]


def test_one_picture_for_all_finds_one_caption():
    report = evaluate_pictures(Model(lambda i: 7), data=made(), judge=Judge(), count=LEVELS)
    assert report.r1 == 1 / LEVELS and report.r5 == 5 / LEVELS       # 7; 6 and 8; 5 and 9, each behind four
    assert report.recall == 0
    # drawn as 7.2: 7, 8, 6, 9 and 5 are the nearest five, without a tie
    assert evaluate_pictures(Model(lambda i: 7.2), data=made(), judge=Judge(), count=LEVELS).r5 == 5 / LEVELS


def test_fid_against_an_independent_formula():
    model, data, judge = Model(lambda i: i + 1), made(), Judge()
    report = evaluate_pictures(model, data=data, judge=judge, count=10, seed=5)
    order = generator(5, "real pictures of an evaluation").permutation(LEVELS)
    real, others = angle(order[:12]), angle(order[12:][:10])
    fake = angle([int(c.split()[1]) + 1 for c in model.asked])

    def distance(a, b):
        S, R = np.cov(a.T), np.cov(b.T)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S + R - 2 * sqrtm(S @ R).real)
    assert report.fid == pytest.approx(distance(fake, real), abs=1e-6)
    assert report.fid_floor == pytest.approx(distance(others, real), abs=1e-6)


def test_more_pictures_than_captions_repeat_them():
    model = Model()
    report = evaluate_pictures(model, data=made(8), judge=Judge(), count=20)
    assert report.images == 20 and report.captions == 8
    assert sorted(model.asked.count(c) for c in set(model.asked)) == [2] * 4 + [3] * 4


def test_test_pictures_are_the_real_ones():
    model = Model()
    data = made(4, test=made(12))
    assert evaluate_pictures(model, data=data, judge=Judge(), count=12).compared == 6
    assert len(set(model.asked)) == 12


def test_the_report_names_the_file_of_its_judge():
    judge = Judge()
    assert evaluate_pictures(Model(), data=made(), judge=judge, count=10).judge == ""
    judge.file = Path("a") / "clip.safetensors"
    assert evaluate_pictures(Model(), data=made(), judge=judge, count=10).judge == str(judge.file)


def test_the_report_says_what_was_done():
    report = evaluate_pictures(Model(), data=made(), judge=Judge(), count=10, options={"scale": 3.0}, seed=2)
    shown = dict(report.rows())
    assert shown["images"] == "10 of 10 captions, compared with 12 real ones, scale 3, seed 2"
    assert shown["caption found: R@1"] == "100.0 % +- 0.0  (real pictures 100.0 %)"
    assert report.as_dict()["options"] == {"scale": 3.0}
    other = Model()
    evaluate_pictures(other, data=made(), judge=Judge(), count=10, seed=3)
    first = Model()
    evaluate_pictures(first, data=made(), judge=Judge(), count=10, seed=2)
    assert first.asked != other.asked


# --- which judge, and what is refused -------------------------------------------------------------------------

def clip_file(folder, data, source=None, shape=None):
    config = small_systems.CONFIGS["clip"]
    config = replace(config, image=replace(config.image, shape=shape or data.shape))
    small_systems.new("clip", config).save(folder / "clip.safetensors",
                                           notes={"dataset": data.name, "data": source or data.source})
    return folder / "clip.safetensors"


def test_the_users_own_clip_is_found_where_it_is_of_the_same_pictures(tmp_path, monkeypatch):
    data = made()
    monkeypatch.setattr("minidiff.systems.weights_of", lambda name: None)
    with pytest.raises(UserError, match="a CLIP of the same pictures judges, and there is none: train one with "
                                        "minidiff train --system clip --data FOLDER$"):
        clip_of(None, data)
    path = clip_file(tmp_path, data)
    monkeypatch.setattr("minidiff.systems.weights_of", lambda name: path)
    assert clip_of(None, data).file == path
    with pytest.raises(UserError, match="was not trained on 8 pictures of made: train one .*, or name one with --jud"):
        clip_of(None, made(8))
    assert clip_of(path, made(8)).file == path


def test_a_clip_of_another_shape_is_refused(tmp_path):
    path = clip_file(tmp_path, made(), shape=(8, 8, 1))
    with pytest.raises(UserError, match=r"reads pictures of shape \(8, 8, 1\), not \(4, 4, 1\)"):
        clip_of(path, made())


def test_without_the_pictures_nothing_is_judged():
    with pytest.raises(UserError, match="on pictures that minidiff does not have: name them with"):
        evaluate(Model(), count=10)
    with pytest.raises(UserError, match="there are 7 real pictures to compare with: at least 8 are needed"):
        evaluate(Model(), data=made(7), count=10)


def test_pictures_of_another_shape_are_refused():
    model = Model()
    model.config = SimpleNamespace(shape=(8, 8, 3))
    with pytest.raises(UserError, match=r"draws pictures of shape \(8, 8, 3\), and those of the data are \(4, 4, 1"):
        evaluate(model, data=made(), count=10)


def test_which_judges_compare_with_the_data():
    assert takes_data("pictures") and takes_data("emoji") and not takes_data("digits")
