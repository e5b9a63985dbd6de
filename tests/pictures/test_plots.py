"""Plots: the axes show the given values, any title is drawn, and refusals are sentences."""

import logging
import math
import os
import subprocess
import sys
import threading
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from minidiff import pictures
from minidiff.pictures import plots

X = [1, 2, 3]


def panel(series, **options):
    return plots.Panel("t", "x", "y", series, **options)


def settings():
    return dict(matplotlib.rcParams), list(warnings.filters), logging.getLogger("matplotlib").level


def test_drawing_in_two_threads_leaves_the_processs_settings_as_they_were():
    """The second begins while the first draws, and ends after it: what it found must not be what the first had set."""
    before, second = settings(), threading.Event()

    def draw():
        with plots._figure(1, 1):
            second.set()
    with plots._figure(1, 1):
        thread = threading.Thread(target=draw)
        thread.start()
        assert not second.wait(0.2)
    thread.join()
    assert second.is_set() and settings() == before


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are drawn, in their order."""
    figures, image = [], plots._image
    monkeypatch.setattr(plots, "_image", lambda figure: figures.append(figure) or image(figure))
    return figures


def ink(image, colour: str) -> np.ndarray:
    """(row, column) of the pixels of about that colour, "#rrggbb"."""
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(np.asarray(image).astype(int) - rgb).sum(axis=2) < 40)


# --- panels -----------------------------------------------------------------------------------------------

def test_each_panel_has_its_series_labels_and_scales(drawn):
    plots.panels([panel([("a", X, [1, 4, 2], "-"), ("b", X, [2, 2, 2], "o")]),
                  plots.Panel("u", "v", "w", [("c", [1, 1000], [0.1, 10], "--")], log_x=True, log_y=True)])
    ((left, right),) = (figure.axes for figure in drawn)
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 1], [2, 4], [3, 2]], [[1, 2], [2, 2], [3, 2]]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]
    assert (left.get_xscale(), left.get_yscale(), right.get_xscale(), right.get_yscale()) == ("linear", "linear",
                                                                                             "log", "log")
    assert (right.get_title("left"), right.get_xlabel(), right.get_ylabel()) == ("u", "v", "w")


def test_labels_have_different_colours_and_no_label_is_grey_and_not_in_the_legend(drawn):
    plots.panels([panel([("", X, X, "--"), *((f"{k}", X, X, "-") for k in range(6))])])
    (axes,) = drawn[0].axes
    assert [line.get_color() for line in axes.lines] == [plots.GREY, *plots.COLOURS] and len(set(plots.COLOURS)) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list("012345")


def test_the_numbers_of_a_logarithmic_axis_are_plain(drawn):
    """Over several powers of ten those alone; within one of them also numbers between."""
    plots.panels([panel([("", [0.01, 100], [0.22, 0.31], "-")], log_x=True, log_y=True)])
    (axes,) = drawn[0].axes
    across = [text.get_text() for text in axes.get_xticklabels()]
    up = [text.get_text() for text in axes.get_yticklabels(which="both") if text.get_text()]
    assert {"0.01", "0.1", "1", "10", "100"} <= set(across)
    assert len([text for text in up if 0.2 < float(text) < 0.35]) >= 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_no_axis_can_show_changes_nothing(bad):
    clean = plots.panels([panel([("a", X, [1, 4, 2], "-")])])
    assert clean == plots.panels([panel([("a", [1, 2, 9, 3], [1, 4, bad, 2], "-"), ("b", [1], [bad], "o")])])
    assert clean == plots.panels([panel([("a", [1, 2, bad, 3], [1, 4, 9, 2], "-")])])


NOTHING = "series has no value that the axes of 't' can show; a panel takes at least one."


@pytest.mark.parametrize(("series", "sentence"), [
    ([], NOTHING),
    ([("a", [], [], "-")], NOTHING),
    ([("a", [1, 2], [0, -1], "o")], NOTHING),               # on a logarithmic axis
    ([("a", [1], [1], "-"), ("b", [1, 2], [1], "-")],
     "x and y of 'b' have shapes (2,) and (1,); they take one length (n,)."),
    ([("a", 1, 1, "o")], "x and y of 'a' have shapes () and (); they take one length (n,)."),
])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(series, sentence):
    with pytest.raises(ValueError) as caught:
        plots.panels([panel(series, log_y=True)])
    assert str(caught.value) == sentence


def test_no_panels_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="row has no panels; it takes at least one"):
        plots.panels([])


# --- points -----------------------------------------------------------------------------------------------

def test_points_are_in_the_square_of_their_row_and_column(drawn):
    points = np.random.default_rng(0).normal(size=(2, 3, 10, 2))
    plots.scatter([("p", points[0]), ("q", points[1])], ["t = 0", "t = 1", "t = 2"])
    axes = np.array(drawn[0].axes).reshape(2, 3)
    for i in range(2):
        assert axes[i, 0].get_ylabel() == "pq"[i]
        for j in range(3):
            np.testing.assert_array_equal(axes[i, j].lines[0].get_xydata(), points[i, j])
            assert axes[i, j].get_xlim() == axes[i, j].get_ylim() == (-3, 3)
    assert [a.get_title() for a in axes[0]] == ["t = 0", "t = 1", "t = 2"]


def test_there_may_be_more_rows_than_colours(drawn):
    plots.scatter([(str(i), [np.zeros((1, 2))]) for i in range(8)], ["t"])
    assert [len(axes.lines) for axes in drawn[0].axes] == [1] * 8


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the row 'p' has 1 arrays for 2 titles"):
        plots.scatter([("p", [np.zeros((3, 2))])], ["a", "b"])


# --- the loss ---------------------------------------------------------------------------------------------

def test_an_exponential_falls_in_a_straight_line():
    """log y is linear in the step for y = exp(-a step): on a logarithmic axis its line is straight."""
    steps = np.arange(2000)
    image = plots.loss_curve(steps, np.exp(-steps / 400))
    curve = ink(image, plots.BLUE)
    inside = curve[(curve[:, 1] > 0.15 * image.width) & (curve[:, 1] < 0.85 * image.width)
                   & (curve[:, 0] > 0.1 * image.height)]
    slope, offset = np.polyfit(inside[:, 1], inside[:, 0], 1)
    assert slope > 0.3
    assert np.abs(inside[:, 0] - slope * inside[:, 1] - offset).max() < 3


def test_the_curve_smooths_by_a_mean():
    y = np.random.default_rng(0).uniform(0.5, 1.5, 1000)
    at, smooth = plots.running_mean(y)
    assert at.tolist() == list(range(1000))
    for i, (a, b) in {0: (0, 1), 5: (0, 11), 500: (480, 521), 990: (970, 1000), 999: (979, 1000)}.items():
        assert smooth[i] == pytest.approx(y[a:b].mean())
    assert plots.running_mean(y[:30])[1] == pytest.approx(y[:30])
    at, few = plots.running_mean(y, 37)
    assert len(few) == 37 and (at[0], at[-1]) == (0, 999)
    np.testing.assert_allclose(few, smooth[at])


@pytest.mark.parametrize("huge", (1e17, 1e99))
def test_a_huge_loss_changes_the_mean_around_it_alone(huge):
    """A difference of running sums would be 0 or noise in all that follows."""
    y = np.ones(1000)
    y[100] = huge
    _, smooth = plots.running_mean(y)
    assert (smooth[80:121] > huge / 50).all()
    np.testing.assert_array_equal(np.delete(smooth, slice(80, 121)), 1)


def test_the_curve_shows_the_losses_and_their_mean(drawn):
    y = np.random.default_rng(0).uniform(0.5, 1.5, 200)
    pictures.loss_curve(range(1, 201), y)
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), y)
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), plots.running_mean(y)[1])
    assert axes.get_title("right") == f"{plots.running_mean(y)[1][-1]:.4g} at the end"


@pytest.mark.parametrize(("steps", "losses"), [
    ([5], [0.3]),
    ([0, 1], [1, 1]),
    ([0, 1, 2, 3], [1, np.nan, 0, -1]),
    (range(1, 40), np.geomspace(1e-30, 1e30, 39)),
    (range(3), [0.1, 0.1000001, 0.1]),
    ([0, 10**9], [1e300, 1e-300]),
    ([0.1, 0.2], [0.5, 0.4]),
    ([7], [-2.0]),
    ([7], [0.0]),
    ([0, 1, 2], [0.0, -1.0, np.inf]),
    (range(5), [-3.0] * 5),
    ([0, 1], [-1e300, 1e300]),
])
def test_odd_curves_are_drawn(steps, losses):
    assert len(ink(plots.loss_curve(steps, losses), plots.BLUE)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("title", ["", "日本語 " * 100, "w" * 500, "\ud800\0\n\t", "$x^", "سبعة", "🙂👍🏽", "100 %"])
def test_any_title_is_drawn(title):
    assert plots.loss_curve(X, X, title).size == plots.loss_curve(X, X).size


def test_the_axis_follows_the_losses(drawn):
    """A loss below 0, such as a density's, has no logarithm, and leaving it out would hide the end of the curve."""
    for losses, scale, shown in (([3, 2, 1], "log", 3), ([3, 0, 1], "log", 2), ([-np.inf, 1, 2], "log", 2),
                                 ([2, 0.5, -1], "linear", 3), ([-1, -2, np.nan], "linear", 2), ([0, 0], "linear", 2)):
        plots.loss_curve(range(len(losses)), losses)
        (axes,) = drawn[-1].axes
        assert axes.get_yscale() == scale and len(axes.lines[0].get_ydata()) == shown
        low, high = axes.get_ylim()
        assert low < min(axes.lines[1].get_ydata()) and max(axes.lines[1].get_ydata()) < high


@pytest.mark.parametrize("losses", [[], [np.nan], [np.inf, -np.inf]])
def test_without_a_finite_loss_the_frame_is_empty(losses, drawn):
    plots.loss_curve(range(len(losses)), losses)
    (axes,) = drawn[0].axes
    assert axes.get_title("right") == "no finite loss" and not len(axes.lines[0].get_ydata())


def test_losses_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        plots.loss_curve([1, 2, 3], [1, 2])


# --- matplotlib -------------------------------------------------------------------------------------------

def test_equal_numbers_give_equal_files_whatever_the_users_settings(tmp_path):
    pictures.save(plots.loss_curve(X, X), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "figure.facecolor": "black"}):
        pictures.save(plots.loss_curve(X, X), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30       # which are left as they were
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlibs_log_and_warnings_are_left_as_they_were():
    before = logging.getLogger("matplotlib").level
    filters = list(warnings.filters)
    plots.loss_curve(X, X, "日本語")
    assert logging.getLogger("matplotlib").level == before and warnings.filters == filters
    with pytest.warns(UserWarning, match="[Gg]lyph"):
        Figure().text(0, 0, "日").get_window_extent()


def test_importing_loads_neither_matplotlib_nor_pillow():
    code = "import sys, minidiff.pictures; sys.exit('PIL' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_is_said_on_a_machine_without_a_home(tmp_path):
    """matplotlib would warn that it uses a temporary folder for its settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "XDG_"))}
    (tmp_path / "file").touch()
    environment |= {"HOME": str(tmp_path / "file" / "home"), "TMPDIR": str(tmp_path)}
    code = "from minidiff import pictures; pictures.loss_curve([1, 2], [1, 2])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
