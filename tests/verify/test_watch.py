"""Pictures of one image while noise is added to it, and plots of a schedule."""

import math
import zlib

import numpy as np
import pytest
from PIL import Image
from support.verifying import call

from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.errors import UserError
from minidiff.verify import watch


def test_zero_has_no_minus_sign():
    assert [watch._fixed(a, 4) for a in (-1e-9, -0.0, 0.0, 1e-9, -0.00006, -1.5, 0.99999)] == \
        ["0.0000", "0.0000", "0.0000", "0.0000", "-0.0001", "-1.5000", "1.0000"]
    schedule, x_0 = schedules.flow_matching(3), np.array([[[-1e-9], [0.0]]])
    assert "-0.00000" not in watch.table(watch.watch(schedule, x_0, 2)[:1])


def test_the_stated_errors_are_standard_errors():
    """Over 1500 runs on a small image, mean and deviation of the statistics agree within 6 standard errors."""
    x_0 = np.random.default_rng(0).uniform(-1, 1, (4, 5, 1))
    schedule, n = schedules.cosine(10), 1500
    walks = [watch.watch(schedule, x_0, 3, seed=seed) for seed in range(n)]
    for i in (1, 2):
        states = [walk[i] for walk in walks]
        for measured, expected, error in (("mean", "expected_mean", "mean_error"),
                                          ("variance", "expected_variance", "variance_error")):
            a = np.array([getattr(w, measured) for w in states])
            said = getattr(states[0], error)
            assert abs(a.mean() - getattr(states[0], expected)) < 6 * said / math.sqrt(n)
            # chi squared with 19 degrees of freedom has excess kurtosis < 1: its deviation has an error < 0.9 / sqrt(n)
            assert abs(a.std() / said - 1) < 6 * 0.9 / math.sqrt(n)
    assert walks[0][0].mean == x_0.mean() and walks[0][0].variance_bound == 0
    assert all(row.passed for row in watch.rows(walks[0], 0))


def test_watch_draws_an_animation(here, image, monkeypatch):
    tabled = []
    monkeypatch.setattr(watch, "table", lambda states: tabled.append([state.t for state in states]) or "")
    assert call("--schedule", "cosine", "-T", 60, "--watch", image, "-o", "w.gif") == 0
    (times,) = tabled                                       # ten of the 37, from the picture to the last noise
    assert len(times) == 10 and times[0] == -1 and times[-1] == 59 and times == sorted(times)
    with Image.open("w.gif") as animation:
        assert animation.format == "GIF" and animation.n_frames == 37


@pytest.mark.parametrize("name", [*SCHEDULES, "one"])
def test_every_schedule_can_be_drawn(name):
    T = 1 if name == "one" else 3
    schedule = schedules.schedule_from("flow_matching" if name == "one" else name, T, allow_signal=True)
    assert watch.plot(schedule).height > 100
    states = watch.watch(schedule, np.zeros((1, 2, 1)))
    assert [w.t for w in states] == list(range(-1, T)) and watch.picture(schedule, states).width > 100


def test_a_wrong_step_breaks_the_law_of_watch(here, image, monkeypatch, capsys):
    right = gaussian.q_step
    monkeypatch.setattr(gaussian, "q_step", lambda *a: (right(*a)[0], 0.8 * right(*a)[1]))
    assert call("-T", 40, "--watch", image) == 1
    assert "BROKEN  watch: variance over the pixels" in capsys.readouterr().out


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3),
                                            ("CMYK", 3), ("I;16", 1)])
def test_pictures_of_every_kind_are_read(tmp_path, mode, channels):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16)).save(path)
        np.testing.assert_array_equal(watch.load_image(path)[..., 0] > 0, [[False, True], [True, False]])
    else:
        Image.new("L", (300, 200), 255).convert(mode).save(path)
        x = watch.load_image(path)
        assert x.shape == (85, 128, channels) and (x == 1).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_transparency_hid_stays_hidden(tmp_path, mode):
    """The left half is transparent, and holds a checkerboard: on white, as viewers show it, nothing of it is seen."""
    grey = np.full((4, 4), 40, np.uint8)
    grey[:, :2] = [[0, 0]] * 4 if mode in ("P", "L", "RGB") else [[0, 200]] * 4
    picture, options = Image.fromarray(grey), {}
    if mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(np.repeat([[0, 0, 255, 255]], 4, axis=0).astype(np.uint8)))
    else:                                                   # one colour or palette entry is the transparent one
        picture = picture.convert(mode)
        options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    picture.save(tmp_path / "x.png", **options)
    x = watch.load_image(tmp_path / "x.png")
    assert (x[:, :2] == 1).all() and np.allclose(x[:, 2:], 40 / 127.5 - 1)
    assert x.shape[2] == (1 if mode in ("LA", "L") else 3)


@pytest.mark.parametrize("damage, sentence", [
    (lambda path: Image.new("L", (1, 1)).save(path), "a single grey pixel"),
    (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read as a picture"),
    (lambda path: path.write_bytes(b""), "not a readable picture"),
    (lambda path: Image.new("1", (9000, 9000)).save(path), "at most 25 million"),
    (lambda path: path.write_bytes(path.read_bytes()[:16] + b"\x00\x00\x90\x00" * 2 + path.read_bytes()[24:29]
                                   + zlib.crc32(b"IHDR" + b"\x00\x00\x90\x00" * 2 + path.read_bytes()[24:29])
                                   .to_bytes(4, "big") + path.read_bytes()[33:]), "too many pixels"),
    (lambda path: Image.new("I", (4, 4)).save(path, "TIFF"), "PNG, JPEG, GIF, BMP and WEBP are read"),
    (lambda path: Image.new("RGB", (4, 4)).save(path, "EPS"), "PNG, JPEG, GIF, BMP and WEBP are read"),  # Ghostscript
])
def test_unusable_pictures_are_refused(image, damage, sentence):
    damage(image)
    with pytest.raises(UserError, match=sentence) as caught:
        watch.load_image(image)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_plot(here, monkeypatch, capsys):
    (here / "out.png").write_bytes(b"the old picture")
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert call("-T", 20, "--schedule", "cosine", "--plot", "out.png") == 2
    assert "No space left" in capsys.readouterr().err and (here / "out.png").read_bytes() == b"the old picture"
