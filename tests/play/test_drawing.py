"""What the page draws is what `minidiff sample` draws; options are those that the systems declare."""

import base64
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image, ImageSequence
from support import tiny
from support.command_line import call
from support.play import PACED, TINY, last, run_of

from minidiff import systems
from minidiff.play import attention, drawing, offer
from minidiff.play.offer import Offer
from minidiff.systems import SYSTEMS
from minidiff.systems.attention_maps import attention_maps

SD = "stable-diffusion (eps)"


def pixels(data) -> np.ndarray:
    """Of a PNG: its bytes, its base64 or its path."""
    data = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return np.asarray(image)


def frames(source) -> list[np.ndarray]:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


# --- the command --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", [
    {"system": "text-to-image", "prompt": "it's \"7\" $HOME", "count": 2, "seed": 5,
     "options": {"scale": 3, "steps": 3, "sampler": "ddpm"}},
    {"system": TINY, "prompt": "-7", "options": {"scale": -1.5, "steps": 2}},
    {"system": "latent", "prompt": "a thin three", "options": {"steps": 2}},
    {"system": "dalle", "prompt": "three", "options": {"temperature": 0.5, "top_k": 3}},
    {"system": "ddpm", "prompt": "", "options": {"steps": 2, "variance": "beta"}},
    {"system": SD, "prompt": "a cat", "options": {"steps": 3, "negative": "-dog", "size": "48x40", "second": None}},
], ids=lambda run: run["system"] + run["prompt"][:2])
def test_the_command_makes_the_same_pixels(client, run, tmp_path, monkeypatch):
    done = last(client.draw({"count": 1, "seed": 1} | run))
    assert done["event"] == "done", done
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(done["commands"][0])
    assert program == "minidiff" and call(*words) == 0
    status, headers, png = client.ask("GET", f"/api/result/{done['result']}/0.png")
    assert status == 200 and headers["content-disposition"] == 'attachment; filename="picture.png"'
    assert np.array_equal(pixels(png), pixels(tmp_path / "picture.png"))
    status, _, gif = client.ask("GET", f"/api/result/{done['result']}/0.gif")
    if (tmp_path / "picture.gif").exists():
        ours, theirs = frames(gif), frames(tmp_path / "picture.gif")
        assert len(ours) == len(theirs) > 1 and all(map(np.array_equal, ours, theirs))
    elif run["system"] == SD:                               # its states are previews, which the command does not write
        assert len(frames(gif)) == 2
    else:
        assert status == 400 and "has no animation" in json.loads(gif)["message"]


def test_the_command_quotes_what_would_be_read_as_json():
    assert [drawing._as_setting(v) for v in ("learned", "7", "True", 0.5, True)] == ["learned", '"7"', '"True"', "0.5",
                                                                                    "true"]


def test_other_settings_make_other_pictures(client):
    one = {"system": TINY, "options": {"steps": 2}}
    events = client.draw(one, one | {"options": {"steps": 2, "scale": 9}})
    first, second = ([e for e in events if e["event"] == "state" and e["run"] == r] for r in (0, 1))
    assert first[0]["x_t"] == second[0]["x_t"] and first[-1]["x_t"] != second[-1]["x_t"]


# --- the states ---------------------------------------------------------------------------------------------

def test_the_states_are_those_of_the_trajectory(client):
    run = {"system": TINY, "prompt": "seven", "count": 2, "seed": 3, "options": {"steps": 3}}
    shown = [e for e in client.draw(run) if e["event"] == "state"]
    states = list(tiny.trained_a_little().trajectory(["seven"] * 2, steps=3, seed=3))
    assert [(e["step"], e["t"]) for e in shown] == [(s.step, s.t) for s in states] and shown[0]["x0_hat"] is None
    for event, state in zip(shown, states, strict=True):
        for name in ("x_t", "x0_hat"):
            if event[name] is not None:
                expected = [((x[..., 0].clip(-1, 1) + 1) * 127.5).round() for x in getattr(state, name)]
                assert all(np.abs(pixels(a) - b).max() <= 1 for a, b in zip(event[name], expected, strict=True))


def test_a_long_run_shows_sixty_of_its_states_and_counts_all(client):
    events = [e for e in client.draw({"options": {"steps": 200}}) if e["event"] == "state"]
    with_pictures = [e["index"] for e in events if e["x_t"]]
    assert [e["step"] for e in events] == list(range(201)) and len(with_pictures) == drawing.MOST_SHOWN
    assert with_pictures[0] == 0 and with_pictures[-1] == 200


def test_a_system_without_steps_shows_its_picture(client):
    events = client.draw({"system": "dalle", "prompt": "three"})
    assert [e["event"] for e in events] == ["waiting", "started", "state", "done"] and events[2]["t"] == -1


def test_previews_are_shown_where_decoding_is_dear(client):
    events = [e for e in client.draw({"system": SD, "options": {"steps": 2, "size": "48x40"}}) if e["event"] == "state"]
    assert [(e["x_t"] is None, e["x0_hat"] is None) for e in events][-1] == (False, True)
    assert all(e["x_t"] is None and pixels(e["x0_hat"][0]).shape == (24, 24, 3) for e in events[:-1])
    assert pixels(events[-1]["x_t"][0]).shape == (40, 48, 3)


def test_results_that_take_too_much_memory_go_the_oldest_first(client, monkeypatch):
    first = last(client.draw())["result"]
    monkeypatch.setattr(drawing, "MOST_KEPT", 4 * 28 * 28 * 4 + 1)
    second = last(client.draw())["result"]
    status, _, answer = client.ask("GET", f"/api/result/{first}/0.png")
    assert status == 400 and "no longer kept" in json.loads(answer)["message"]
    assert client.ask("GET", f"/api/result/{second}/0.png")[0] == 200


@pytest.mark.parametrize("path", ["x/0.png", "x/7.gif", "x/0.svg", "x/-1.png", "x/00.png", "x/0.png.gif"])
def test_results_that_are_not_there(client, path):
    status, _, answer = client.ask("GET", f"/api/result/{path}")
    assert status in (400, 404) and json.loads(answer)["message"]


# --- requests -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, said", [
    ({"system": "gan"}, "there is no system 'gan'"), ({"prompt": "a" * 501}, "501 characters"),
    ({"prompt": "a\nb"}, "cannot be printed"), ({"prompt": "a\x00b"}, "cannot be printed"),
    ({"prompt": "\ud800"}, "cannot be printed"), ({"prompt": 7}, "no text"), ({"prompt": None}, "no text"),
    ({"count": 0}, "from 1 to 16"), ({"count": 17}, "from 1 to 16"), ({"count": True}, "no whole number"),
    ({"count": 2.5}, "no whole number"), ({"count": 10 ** 30}, "from 1 to 16"), ({"seed": -1}, "the seed"),
    ({"seed": 2 ** 31 + 1}, "the seed"), ({"seed": None}, "no whole number"), ({"more": 1}, "and no others"),
    ({"options": {"colour": 3}}, "no option 'colour'"), ({"options": {"steps": 5000}}, "from -1000 to 1000"),
    ({"options": {"steps": 0.5}}, "takes a value like 3"), ({"options": {"scale": "much"}}, "takes a value like 1.0"),
    ({"options": {"scale": None}}, "takes a value like 1.0"), ({"options": {"scale": [1]}}, "takes a value like"),
    ({"options": {"scale": 10 ** 400}}, "from -1000 to 1000"), ({"options": {"steps": True}}, "takes a value like 3"),
    ({"options": {"steps": -1}}, "steps must be a whole number from 1"),
    ({"system": "text-to-image", "options": {"steps": 0}}, "steps must be a whole number from 1"),
    ({"system": "dalle2", "options": {"prior_steps": -1}}, "prior_steps must be a whole number from 1"),
    ({"prompt": [7]}, "prompt is [7], which is no text"), ({"count": "7"}, "count is '7', which is no whole number"),
    ({"count": 16, "options": {"steps": 251}}, "pictures times steps may be 4,000"),
    ({"count": 2, "options": {"best": 501}}, "may be 1,000"), ({"options": []}, "no object"),
    ({"options": {"a": 1, "b": 2, "c": 3, "d": 4}}, "4 were given"),
    ({"system": "ddpm", "prompt": "seven"}, "reads no captions"), ({"system": "dalle", "count": 5}, "from 1 to 4"),
    ({"system": "text-to-image", "options": {"sampler": "euler_z"}}, "there is no sampler"),
    ({"system": "text-to-image", "options": {"sampler": "lcm"}}, "consistency models"),
    ({"system": SD, "options": {"size": "4096x4096"}}, "too large"),
    ({"system": SD, "options": {"size": "wide"}}, "size"),
    ({"system": SD, "options": {"image": "cat.png"}}, "is a picture"),
], ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode())
def test_what_is_wrong_or_too_large_is_refused_in_one_sentence(client, changes, said):
    status, _, answer = client.ask("POST", "/api/draw", {"visitor": "me", "runs": [run_of(**changes)]})
    message = json.loads(answer)["message"]
    assert status == 400 and said in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("changes, said", [
    ({"system": "ddpm", "prompt": "", "options": {"variance": "wild"}}, "variance"),
    ({"system": SD, "options": {"size": "47x40"}}, "multiples of"),
])
def test_what_only_the_system_knows_is_one_sentence_too(client, changes, said):
    event = last(client.draw(changes))
    assert event["event"] == "error" and said in event["message"]


# --- what is offered ----------------------------------------------------------------------------------------

def test_every_system_that_draws_captions_is_offered_with_its_own_options(client):
    about = json.loads(client.ask("GET", "/api/about")[2])
    offered = {system["key"]: system for system in about["systems"]}
    wanted = {name for name in SYSTEMS if SYSTEMS[name].options() is not None and systems.weights_of(name)}
    assert wanted <= set(offered) and {PACED, SD} <= set(offered) and about["system"] == systems.DEFAULT
    for name in wanted:
        options = {option["name"]: option["default"] for option in offered[name]["options"]}
        assert options == SYSTEMS[name].options() and offered[name]["reads_captions"] == SYSTEMS[name].reads_captions


def test_a_checkpoint_has_a_negative_prompt_and_its_own_samplers(client):
    about = json.loads(client.ask("GET", "/api/about")[2])
    options = {o["name"]: o for o in next(s for s in about["systems"] if s["key"] == SD)["options"]}
    assert options["negative"]["control"] == "text" and "euler" in options["sampler"]["choices"]
    assert not {"image", "mask", "strength"} & set(options)
    own = next(s for s in about["systems"] if s["key"] == "text-to-image")
    samplers = {o["name"]: o for o in own["options"]}["sampler"]
    assert "dpm++2m" in samplers["choices"] and "lcm" not in samplers["choices"]


def test_a_model_that_draws_nothing_is_refused():
    with pytest.raises(ValueError, match="digit-classifier draws no pictures"):
        Offer([str(systems.weights_of("digit-classifier"))])
    with pytest.raises(ValueError):
        Offer(["no/such/file.safetensors"])


# --- attention ----------------------------------------------------------------------------------------------

def test_words_are_the_sums_of_their_tokens():
    texts, maps = ["<start>", " a", " se", "ven", "<end>"], np.arange(5.0).reshape(5, 1, 1)
    words = attention.by_word(texts, maps)
    assert [(text, one.item()) for text, one in words] == [("<start>", 0), ("a", 1), ("seven", 5), ("<end>", 4)]


def test_maps_of_a_drawn_picture(client):
    run = {"system": TINY, "prompt": "a bold seven", "count": 2, "options": {"steps": 2}}
    result = last(client.draw(run))["result"]

    def maps(index, picture=1):
        return last(client.events("attention", {"result": result, "run": 0, "picture": picture, "index": index}))
    one, mean = maps(1), maps(None)
    assert [w["text"] for w in one["words"]] == ["<start>", "a", "bold", "seven", "<end>"]
    assert abs(sum(w["share"] for w in one["words"]) - 1) < 1e-5 and len(mean["times"]) == 2
    model = tiny.trained_a_little()
    states = list(model.trajectory(["a bold seven"] * 2, steps=2, seed=1))
    texts, expected = attention_maps(model, states[1].x_t[1], states[1].t, "a bold seven")
    seven = expected[texts.index(" seven")]
    drawn = pixels(one["words"][3]["map"])
    assert drawn.shape == (28, 28, 4) and np.abs(drawn[..., 3] - 255 * 0.85 * seven / seven.max()).max() <= 1
    assert maps(2)["times"] == [states[1].t]                # the state before stands for the clean picture
    assert "the picture" in maps(1, picture=2)["message"]


def test_other_systems_have_no_maps(client):
    result = last(client.draw())["result"]
    event = last(client.events("attention", {"result": result, "run": 0, "picture": 0, "index": 0}))
    assert "has no maps" in event["message"]


def test_a_system_that_is_registered_appears(toy, tmp_path):
    toy(toy.Config(), None, np.random.default_rng(0)).save(tmp_path / "t.safetensors")
    about = Offer([str(tmp_path / "t.safetensors")]).about()["systems"][-1]
    assert about["key"] == "toy (t.safetensors)" and about["most"] == offer.MOST_IN_ONE_PIECE
    assert [option["name"] for option in about["options"]] == ["scale", "best"]


def test_what_is_not_read_of_a_long_caption_is_said(client):
    events = client.draw({"system": TINY, "prompt": "seven " * 60, "options": {"steps": 2}})
    remarks = [e["message"] for e in events if e["event"] == "remark"]
    assert remarks and "is too long" in remarks[0] and last(events)["event"] == "done"
