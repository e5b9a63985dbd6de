"""The numbers of an evaluation of emoji, on models whose right numbers are known by hand."""

import numpy as np
import pytest
from support import small_systems

from minidiff.data.emoji import Emoji, Name
from minidiff.errors import UserError
from minidiff.evaluation import JUDGES
from minidiff.evaluation.emoji import evaluate_emoji, rank_of, squared_errors


def made(count: int = 12, unseen: int = 4, styles: tuple[str, ...] = ("noto",)) -> Emoji:
    """Emoji i is of one grey level, 15 i, in its turn of the styles; the last are held out."""
    pixels = np.broadcast_to((15 * np.arange(count + unseen))[:, None, None, None], (count + unseen, 4, 4, 3))
    names = [Name(f"C{i}", "C", f"level {i}", "x") for i in range(count + unseen)]
    of = [styles[i % len(styles)] for i in range(count + unseen)]

    def those(a, b, held_out=None):
        return Emoji(pixels[a:b].astype(np.uint8), names[a:b], of[a:b], "made", held_out)
    return those(0, count, those(count, count + unseen))


class Model:
    """Draws the level that is asked for, plus an error that depends on the level."""

    def __init__(self, error=lambda i: 0):
        self.error, self.asked = error, []

    def options(self):
        return {"scale": 2.0, "steps": 3}

    def sample(self, captions, *, streams, scale, steps):
        self.asked.append((list(captions), len(streams), scale, steps))
        i = np.array([int(c.split()[-1]) for c in captions])
        levels = 15 * i + np.array([self.error(int(n)) for n in i])
        return np.broadcast_to((levels / 127.5 - 1)[:, None, None, None], (len(i), 4, 4, 3))


def test_a_perfect_model():
    report = evaluate_emoji(Model(), data=made())
    assert (report.images, report.held_out_images, report.among) == (12, 4, 16)
    assert (report.r1, report.r5, report.held_out_r1, report.held_out_r5, report.ceiling) == (1, 1, 1, 1, 1)
    assert report.error < 1e-12 and report.held_out_error < 1e-12


def test_ranks_by_hand():
    """An image 15 k + 1 levels too bright has its true picture behind the 2k nearer ones, or fewer at the end."""
    report = evaluate_emoji(Model(lambda i: 31 if i >= 12 else 16 if i < 3 else 0), data=made())
    # seen: levels 0, 1, 2 are drawn one level too bright: rank 1 or 2, so not R@1, but R@5
    assert report.r1 == 9 / 12 and report.r5 == 1
    # held out: level 12 + 2.07 is nearest to 14, then 15, 13, then 12 (rank 3); 13 -> 15, 14, 13 (rank 2); 14 -> 15, 14
    # (rank 1); 15 -> 15 (rank 0)
    assert report.held_out_r1 == 1 / 4 and report.held_out_r5 == 1
    assert report.error == pytest.approx(3 / 12 * (16 / 127.5) ** 2)
    assert report.held_out_error == pytest.approx((31 / 127.5) ** 2)


def test_five_are_the_nearest_five():
    ranks = rank_of(np.full((7, 1, 1, 3), 0.0), np.arange(7).reshape(7, 1, 1, 1) * np.ones((1, 1, 1, 3)), np.arange(7))
    assert ranks.tolist() == [0, 1, 2, 3, 4, 5, 6]
    report = evaluate_emoji(Model(lambda i: {11: -61, 10: -46}.get(i, 0)), data=made(12, 1))
    # level 11 drawn as 6.93: nearer are 7, 6, 8, 5, 9, 4, 10, 3, so rank 8; level 10 drawn as 6.93: rank 6
    assert report.r5 == 10 / 12


def test_a_tie_counts_against_the_image():
    real = np.zeros((3, 2, 2, 3))
    real[2] = 1
    assert rank_of(real, real, np.arange(3)).tolist() == [1, 1, 0]


def test_equal_pictures_lower_the_ceiling():
    data = made()
    data.pixels = data.pixels.copy()
    data.pixels[1] = data.pixels[0]
    assert evaluate_emoji(Model(), data=data).ceiling == pytest.approx(14 / 16)


def test_what_is_asked_and_how_often():
    model = Model()
    report = evaluate_emoji(model, data=made(), count=5, seed=3, options={"scale": 4.0})
    (prompts, streams, scale, steps), = model.asked
    assert len(prompts) == len(set(prompts)) == streams == 9 and (scale, steps) == (4.0, 3)
    assert all(int(p.split()[1]) < 12 for p in prompts[:5]) and all(int(p.split()[1]) >= 12 for p in prompts[5:])
    other = Model()
    evaluate_emoji(other, data=made(), count=5, seed=4)
    assert other.asked[0][0] != prompts
    assert report.options == {"scale": 4.0, "steps": 3} and report.as_dict()["images"] == 5
    shown = dict(report.rows())
    assert shown["seen names: R@1"] == "100.0 % +- 0.0" and "5 + 4 held-out, among 16 real" in shown["images"]


def test_batches_keep_the_order(monkeypatch):
    monkeypatch.setattr("minidiff.evaluation.report.BATCH", 3)
    seen = []
    report = evaluate_emoji(Model(), data=made(), progress=lambda batches: seen.append(len(batches)) or batches)
    assert report.r1 == report.held_out_r1 == 1 and seen == [6]


def test_errors_are_of_each_image():
    x = np.zeros((2, 2, 2, 3))
    x[1, 0] = 1
    assert squared_errors(x, np.zeros_like(x)).tolist() == [0, 0.5]


def test_it_is_the_judge_of_emoji():
    assert JUDGES["emoji"] is evaluate_emoji


# --- two styles, and CLIP's features ----------------------------------------------------------------------------

def test_each_style_is_compared_with_itself():
    """Every level is drawn one level too bright, which is another style's: among its own it is the nearest."""
    assert evaluate_emoji(Model(lambda i: 15), data=made()).r1 == 0
    report = evaluate_emoji(Model(lambda i: 14), data=made(styles=("noto", "twemoji")))
    assert report.r1 == 1 and report.held_out_r1 == 1 and report.among == 16


class Dark:
    """A CLIP that sees which of two halves of the levels a picture is of, and how bright it is, a little."""

    file = "dark.safetensors"

    def embed_images(self, images):
        level = (images[:, 0, 0, 0] + 1) * 127.5 / 15
        return np.stack([level >= 8, 0.001 * level], axis=1)


def test_clip_s_ranks_are_of_its_features():
    """A picture drawn three levels too bright is nearer to others in pixels and in features, by its half first."""
    report = evaluate_emoji(Model(lambda i: -31 if 8 <= i < 10 else 0), data=made(), judge=Dark())
    # levels 8 and 9 are drawn as 5.93 and 6.93, in the lower half: the eight of it are nearer
    assert report.clip == {"r1": 10 / 12, "r5": 10 / 12, "held_out_r1": 1, "held_out_r5": 1, "file": "dark.safetensors"}
    assert report.r1 == 10 / 12 and report.r5 == 1          # in pixels 8 is the fourth nearest to 5.93
    shown = dict(report.rows())
    assert shown["seen names: R@1, R@5 by CLIP's features"].startswith("83.3 % +- 10.8, 83.3 %")
    assert shown["held-out: R@1, R@5 by CLIP's features"] == "100.0 % +- 0.0, 100.0 % +- 0.0"


class Bright:
    """A CLIP that sees how bright a picture is, and is of no file."""

    def embed_images(self, images):
        return (images[:, :1, 0, 0] + 1) * 127.5 / 15


def test_clip_compares_each_style_with_itself_too():
    """Every level is drawn nearly one too bright, which is another style's: among its own it is the nearest."""
    assert evaluate_emoji(Model(lambda i: 14), data=made(), judge=Bright()).clip["r1"] == 0
    report = evaluate_emoji(Model(lambda i: 14), data=made(styles=("noto", "twemoji")), judge=Bright())
    assert report.clip["r1"] == report.clip["held_out_r1"] == 1 and report.clip["file"] == ""


def test_without_a_clip_nothing_is_said_of_features():
    report = evaluate_emoji(Model(), data=made())
    assert report.clip is None and not any("CLIP" in what for what, _ in report.rows())


def test_a_judge_of_emoji_is_a_clip_of_their_shape(tmp_path):
    small_systems.small("clip").save(tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"reads pictures of shape \(28, 28, 1\), not \(4, 4, 3\)"):
        evaluate_emoji(Model(), data=made(), judge=tmp_path / "clip.safetensors")
