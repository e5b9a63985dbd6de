"""The numbers of the noise and of the schedules are those of independent calculations."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.interpolate import PchipInterpolator
from support.play import last

from minidiff.data import download
from minidiff.diffusion import schedules
from minidiff.errors import UserError
from minidiff.play import judging, noise

pytestmark = pytest.mark.usefixtures("few")
NOISE = {"schedule": "cosine", "T": 40, "data": "few", "index": 7, "seed": 1}
FALLING = [[0, 1], [0.5, 0.6], [1, 0.001]]


def test_predicted_and_measured_numbers(client):
    event = last(client.events("noise", NOISE))
    x_0, caption = noise.image_of("few", 7)
    assert [s["t"] for s in event["states"]] == list(range(-1, 40)) and event["caption"] == caption
    m_0, v_0, n = x_0.mean(dtype=np.float64), x_0.var(ddof=1, dtype=np.float64), x_0.size
    u = np.arange(41) / 40
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2        # Improved DDPM eq. 17
    for state, abar in zip(event["states"], f / f[0], strict=True):
        if abar > 1e-4:                                     # the schedule holds beta below 1 at its end
            assert math.isclose(state["mean"][0], math.sqrt(abar) * m_0, rel_tol=1e-6)
            assert math.isclose(state["std"][0], math.sqrt(abar * v_0 + 1 - abar), rel_tol=1e-6)
            assert math.isclose(state["noise"][0], math.sqrt(1 - abar), abs_tol=1e-6)
        assert abs(state["mean"][2] - state["mean"][0]) <= 5.6 * state["mean"][1] + 1e-7
        assert abs(state["noise"][2] - state["noise"][0]) <= 6 * state["noise"][1] + 1e-6
        assert math.isclose(state["noise"][1], math.sqrt((1 - abar) / (2 * (n - 1))), abs_tol=1e-4)
    assert {row["verdict"] for row in event["rows"]} == {"kept"}


def test_the_pictures_are_the_noisy_image_and_its_mean(client):
    state = last(client.events("noise", NOISE))["states"][20]
    x_0, _ = noise.image_of("few", 7)
    drawn, mean = (np.asarray(Image.open(io.BytesIO(base64.b64decode(state[name]))), np.float64) / 127.5 - 1
                   for name in ("x_t", "mean_picture"))
    assert np.abs(mean - state["alpha"] * x_0[..., 0]).max() < 0.01
    inside = np.abs(drawn) < 0.99                           # the rest is clipped
    assert 0.5 < np.std((drawn - mean)[inside]) / state["sigma"] < 1.2


def test_a_drawn_picture_can_be_drowned(client):
    result = last(client.draw({"prompt": "two", "count": 2}))["result"]
    event = last(client.events("noise", NOISE | {"data": f"drawn:{result}:0", "index": 3}))
    assert event["event"] == "noised" and event["caption"] == "two"
    status, _, answer = client.ask("POST", "/api/noise", {"visitor": "me"} | NOISE | {"data": "drawn:gone:0"})
    assert status == 400 and "no longer kept" in json.loads(answer)["message"]


def test_colour_pictures_too(client):
    assert last(client.events("noise", NOISE | {"data": "emoji"}))["numbers"] == 32 * 32 * 3


@pytest.mark.parametrize("changes, said", [
    ({"schedule": "steep"}, "there is no schedule 'steep'"), ({"schedule": "cosine:offset=big"}, "finite number"),
    ({"schedule": "x" * 300}, "short text"), ({"T": 1}, "T must be"), ({"T": 1001}, "T must be"),
    ({"index": -1}, "index must be"), ({"seed": -1}, "seed must be"), ({"T": "ten"}, "no whole number")])
def test_what_is_wrong_is_one_sentence(client, changes, said):
    status, _, answer = client.ask("POST", "/api/noise", {"visitor": "me"} | NOISE | changes)
    assert status == 400 and said in json.loads(answer)["message"]


def test_an_unknown_data_set_is_one_sentence(client):
    event = last(client.events("noise", NOISE | {"data": "/etc/passwd"}))
    assert "there is no data set '/etc/passwd'" in event["message"]


def test_nothing_is_downloaded_within_offline(monkeypatch, tmp_path):
    def receive(*_):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(download, "_receive", receive)
    with download.offline(), pytest.raises(UserError, match="nothing is downloaded now"):
        download.fetch(["https://example.org/a"], tmp_path / "a", lambda data: None, largest=10)
    with pytest.raises(AssertionError, match="network was asked"):
        download.fetch(["https://example.org/a"], tmp_path / "a", lambda data: None, largest=10)


# --- schedules ----------------------------------------------------------------------------------------------

def test_a_named_schedule_as_a_table(client):
    table = json.loads(client.ask("POST", "/api/schedule", {"schedule": "linear", "T": 1000})[2])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert len(table["t"]) == 201 and table["t"][0] == 0 and table["t"][-1] == 999
    assert np.allclose(table["alpha_bar"], alpha_bar[table["t"]], rtol=1e-12)
    assert np.allclose(table["log_snr"], np.log10(alpha_bar / (1 - alpha_bar))[table["t"]], rtol=1e-9)


def test_snr_0_is_no_number_in_json(client):
    table = json.loads(client.ask("POST", "/api/schedule", {"schedule": "flow_matching", "T": 10})[2])
    assert table["log_snr"][-1] is None and None not in table["log_snr"][:-1]


def test_a_curve_by_hand_is_the_monotone_cubic_through_its_points():
    points = [[0, 1], [0.2, 0.9], [0.5, 0.4], [1, 0]]
    drawn = judging.by_hand(points, 50)
    assert np.allclose(drawn.alpha_bar, PchipInterpolator(*zip(*points, strict=True))(np.arange(1, 51) / 50))
    assert drawn.alpha_bar[24] == pytest.approx(0.4)


def test_a_good_curve_keeps_every_law(client):
    events = client.events("judge", {"points": FALLING, "T": 20})
    end = last(events)
    assert end["event"] == "judged" and end["kept"] > 40
    rows = [row for event in events if event["event"] == "rows" for row in event["rows"]]
    assert len(rows) == end["of"] and {row["verdict"] for row in rows} <= {"kept", "skipped"}
    assert next(e for e in events if e["event"] == "table")["table"]["T"] == 20


def test_a_curve_that_keeps_signal_breaks_the_law_of_its_end(client):
    events = client.events("judge", {"points": [[0, 1], [1, 0.1]], "T": 20})
    broken = [row for e in events if e["event"] == "rows" for row in e["rows"] if row["verdict"] == "BROKEN"]
    assert [row["law"] for row in broken] == ["4 ends in noise"]


@pytest.mark.parametrize("points", [
    [], [[0, 1]], [[0, 1], [1, 1]], [[0, 1], [1, 2]], [[0, 1], [0, 0.5], [1, 0]], [[0, 0.9], [1, 0]],
    [[0, 1], [0.9, 0]],
    [[0, 1], [0.5, 0.2], [0.6, 0.3], [1, 0]], [[0, 1], [1, None]], [[0, 1], [1, "0"]], [[0, 1], [1]], [[0, 1], 1],
    [[0, True], [1, 0]], [[i / 50, 1 - i / 50] for i in range(51)], [[0, 1], [1, -0.1]]], ids=str)
def test_a_curve_that_is_no_schedule_is_one_sentence(client, points):
    status, _, answer = client.ask("POST", "/api/judge", {"visitor": "me", "points": points, "T": 20})
    assert status == 400 and "the curve" in json.loads(answer)["message"]


def test_the_laws_one_by_one_are_those_of_a_report():
    from minidiff import verify
    schedule = schedules.cosine(12, allow_signal=True)
    assert [row for rows in verify.law_by_law(schedule, seed=3) for row in rows] == verify.report(schedule, seed=3)
