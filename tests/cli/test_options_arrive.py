"""What is given on the command line arrives where it is used, all of it and nothing else."""

import json
import shlex
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.command_line import call
from support.spy import ASKED, Numbers, Spy, Stepping, entered

from minidiff import evaluation, pictures, systems
from minidiff.cli import sample as sampling
from minidiff.cli import train
from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.engine.random import SampleStreams
from minidiff.training import loop, run
from minidiff.training.run import Trained, TrainOptions


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Both systems, trained, in a folder of their own; no picture is written, but kept in `sheets`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    with entered(tmp_path):
        yield


@pytest.fixture
def sheets(monkeypatch) -> list:
    kept = []
    monkeypatch.setattr(pictures, "sheet", lambda images, *a, **k: kept.append((np.array(images), a, k)))
    monkeypatch.setattr(pictures, "strip", lambda x, labels: kept.append((np.array(x), labels)))
    monkeypatch.setattr(pictures, "gif", lambda x, path, title: kept.append((np.array(x), path.name, title)))
    monkeypatch.setattr(pictures, "save", lambda picture, path, *a, **k: None)
    return kept


DEFAULTS = {"scale": 2.0, "steps": 3, "sampler": "ddim", "best": 1, "hot": 0.5}
GIVEN = [
    ([], {}),
    (["--scale", "3.5"], {"scale": 3.5}),
    (["--steps", "7"], {"steps": 7}),
    (["--sampler", "heun"], {"sampler": "heun"}),
    (["--scale", "0", "--steps", "1", "--sampler", "ddpm", "--set", "best=4", "--set", "hot=1"],
     {"scale": 0.0, "steps": 1, "sampler": "ddpm", "best": 4, "hot": 1.0}),
    (["--set", "scale=5", "--set", "steps=2", "--set", "sampler=dpm++2m"],
     {"scale": 5.0, "steps": 2, "sampler": "dpm++2m"}),
]


# ---- sample --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [Spy, Stepping])
@pytest.mark.parametrize("arguments, options", GIVEN, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_sample_asks_for_every_picture_once_from_its_own_stream(kind, arguments, options, sheets, monkeypatch):
    """Seven of them, three at a time, with the options that were given and the defaults of the others."""
    monkeypatch.setattr(Spy, "at_a_time", 3)
    assert call("sample", "a bold 7", "--system", kind.name, "--count", 7, "--seed", 11, *arguments) == 0
    assert [len(captions) for captions, *_ in ASKED] == [3, 3, 1]
    assert all(captions == ["a bold 7"] * len(captions) for captions, *_ in ASKED)
    assert all(asked == DEFAULTS | options for _, asked, _ in ASKED)
    (images, *_), = sheets
    expected = np.tanh(SampleStreams(11, 7).normal((1, 1, 1))[:, 0, 0, 0])
    np.testing.assert_allclose(images[:, 5, 5, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["way.gif", "way.png"])
def test_a_trajectory_is_every_state_of_the_first_batch(name, sheets, monkeypatch):
    monkeypatch.setattr(Spy, "at_a_time", 3)
    monkeypatch.setattr(sampling, "SHOWN", 2)
    assert call("sample", "3", "--system", "stepping", "--count", 5, "--seed", 2, "--trajectory", name) == 0
    (images, *_), (x, *more) = sheets
    last = np.tanh(SampleStreams(2, 5).normal((1, 1, 1)))
    np.testing.assert_allclose(images[:, 3, 3, 0], last[:, 0, 0, 0], rtol=1e-6)
    assert x.shape[:2] == (3, 2)
    np.testing.assert_allclose(x[:, :, 3, 3, 0], np.stack([last[:2, 0, 0, 0] - k for k in (2, 1, 0)]), rtol=1e-5)
    assert more == ([["t = 9", "t = 4", "clean"]] if name.endswith("png") else ["way.gif", "3"])


# ---- evaluate ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, options", GIVEN, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_evaluate_passes_on_what_was_given(arguments, options, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", lambda model, **k: asked.append((model.name, k)) or Numbers())
    assert call("evaluate", "--system", "spy", "--images", 12, "--seed", 5, "--json", "r.json", *arguments) == 0
    (name, given), = asked
    assert callable(given.pop("progress"))
    assert (name, given) == ("spy", {"data": None, "judge": None, "count": 12, "options": options, "seed": 5})
    with open("r.json", encoding="utf-8") as file:
        assert json.load(file) == {"a": 1}


def test_evaluate_passes_on_the_data_and_the_judge(monkeypatch):
    asked, loaded = [], SimpleNamespace(name="pictures")
    monkeypatch.setattr("minidiff.systems.load_model", lambda kind, path: SimpleNamespace(
        to=lambda device: SimpleNamespace(name="spy", file=path, config=SimpleNamespace(shape=(8, 12, 3)), notes={})))
    monkeypatch.setattr(evaluation, "evaluate", lambda model, **k: asked.append(k) or Numbers())
    monkeypatch.setattr("minidiff.data.dataset.load_dataset", lambda *a, **k: asked.append((a, k)) or loaded)
    assert call("evaluate", "--system", "spy", "--images", 12, "--data", "mine", "--fit", "pad", "--flip",
                "--background", "black", "--judge", "clip.safetensors") == 0
    (data, given), evaluated = asked
    assert data == ("mine",) and given["shape"] == (8, 12, 3)
    assert given["options"] == {"fit": "pad", "background": (0, 0, 0), "flip": True}
    assert evaluated["data"] is loaded and evaluated["judge"] == Path("clip.safetensors")


def test_training_gives_a_judge_that_compares_with_the_data_the_very_data(monkeypatch):
    """So the captions of emoji in two styles name the style."""
    from minidiff.cli import train
    monkeypatch.setattr("minidiff.cli.evaluate.judged", lambda *a: a)
    system = SimpleNamespace(options=lambda: {}, reads_captions=True)
    for name, given in (("emoji", True), ("digits", False)):
        data = SimpleNamespace(name=name)
        assert train._judge(system, data, 5) == (system, 5, {}, 0, data if given else None)


@pytest.mark.parametrize("arguments, sentence", [
    (["--fit", "pad"], "--fit says how pictures are read: name them with --data"),
    (["--likelihood", "--judge", "x"], "--likelihood is judged by the model itself: leave out --judge"),
    (["--data", "digits"], "the judge of digits brings all that it needs: leave out --data"),
    (["--judge", "nowhere.safetensors"], "nowhere.safetensors")])
def test_evaluate_refuses_what_does_not_go_together(arguments, sentence, capsys):
    assert call("evaluate", "--images", 4, *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments, data", [([], "digits"), (["--data", "mine"], "mine")])
def test_the_likelihood_is_of_the_test_images_of_the_data_named_or_of_the_models(arguments, data, monkeypatch):
    asked = []
    monkeypatch.setattr("minidiff.data.dataset.load_dataset", lambda *a, shape: a[:2])
    monkeypatch.setattr("minidiff.evaluation.likelihood.likelihood", lambda model, test, **k: asked.append(
        (model.name, test, k)) or Numbers())
    assert call("evaluate", "--likelihood", "--system", "spy", "--images", 9, "--seed", 4, *arguments) == 0
    (name, test, given), = asked
    given.pop("progress")
    assert (name, test, given) == ("spy", (data, "test"), {"count": 9, "seed": 4})


# ---- train ---------------------------------------------------------------------------------------------------

@pytest.fixture
def runs(monkeypatch, sheets) -> list:
    """The runs that were asked for; each ends at once, with an untrained system."""
    asked = []

    def at_once(folder, kind, data, options, **more):
        asked.append((folder, kind, data, options, more))
        folder.mkdir(parents=True, exist_ok=True)
        system = kind.new(tiny.digits(50))
        return Trained(system, {"first": 125.0, "second": 3.0}, {"first": 0.5, "second": 0.25})
    monkeypatch.setattr(run, "run", at_once)
    monkeypatch.setattr(evaluation, "evaluate",
                        lambda model, **k: ASKED.append(("evaluated", model.name, k)) or Numbers())
    return asked


@pytest.mark.parametrize("option, value", [("seed", 9), ("effort", 0.25), ("steps", 12), ("batch", 6), ("lr", 0.125),
                                           ("precision", "float16")])
def test_each_option_of_training_arrives_in_its_own_place(option, value, runs):
    assert call("train", "--system", "spy", "--out", "run", "--images", 0, f"--{option}", value) == 0
    (folder, kind, data, options, more), = runs
    assert options == TrainOptions(**{option: value})
    assert (str(folder), kind, len(data)) == ("run", Spy, len(tiny.digits(50)))
    assert more == {"changes": {}, "needed": {}, "resume": False, "device": "cpu"}


def test_changes_files_and_the_folder_arrive(runs, monkeypatch):
    loaded = []
    monkeypatch.setattr("minidiff.data.dataset.load_dataset",
                        lambda name, **given: loaded.append((name, given["options"])) or tiny.digits(50))
    (systems.RUNS / "spy" / "model.safetensors").unlink()    # its folder is the default
    assert call("train", "--system", "spy", "--images", 0, "--schedule", "cosine", "--set", "width=5", "--set", "T=40",
                "--needs", "clip=a.safetensors", "--needs", "ddpm=b.safetensors", "--data", "mine") == 0
    (folder, _, _, options, more), = runs
    assert folder == systems.RUNS / "spy"
    assert options == TrainOptions() and loaded == [("mine", {})]
    assert more["changes"] == {"width": 5, "T": 40, "schedule": "cosine"}
    needed = {name: str(path) for name, path in more["needed"].items()}
    assert needed == {"clip": "a.safetensors", "ddpm": "b.safetensors"}


@pytest.mark.parametrize("option, file", [("--data", "run/mine.npz"), ("--prompts", "run/results.json"),
                                          ("--captions", "run/results.json"), ("--needs", "run/model.safetensors")])
def test_no_file_that_a_run_reads_is_one_that_it_writes(option, file, runs, capsys):
    given = [option, f"clip={file}" if option == "--needs" else file]
    status = call("train", "--system", "spy", "--out", "run/mine.npz" if option == "--data" else "run", *given)
    said = capsys.readouterr().err
    assert status == 2 and f"{option}{' clip' if option == '--needs' else ''} and --out" in said.replace(
        "results.json in --out", "--out").replace("model.safetensors in --out", "--out") and "name two files" in said
    assert not runs


def test_training_ends_with_pictures_of_each_prompt_an_evaluation_and_results(runs, sheets, capsys):
    assert call("train", "--system", "spy", "--out", "run", "--images", 8) == 0
    (captions, options, _), evaluated = ASKED
    prompts = tiny.digits(50).prompts
    assert captions == [prompt for prompt in prompts for _ in range(4)] and options == DEFAULTS
    (images, (under,), more), = sheets
    assert len(images) == len(captions) and more == {"columns": 8}
    assert under == [caption or "(no caption)" for caption in captions]
    assert evaluated[:2] == ("evaluated", "spy")
    assert {k: v for k, v in evaluated[2].items() if k != "progress"} == {
        "data": None, "judge": None, "count": 8, "options": {}, "seed": 0}
    with open("run/results.json", encoding="utf-8") as file:
        results = json.load(file)
    assert results.pop("seconds in all") >= 0
    assert results == {"system": "spy", "seconds": {"first": 125.0, "second": 3.0},
                       "loss": {"first": 0.5, "second": 0.25}, "evaluation": {"a": 1}}
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in lines.items()}
    assert rows["training, first"] == "2.1 min" and rows["training, second"] == "3 s" and rows["a"] == "1"
    assert rows["weights"] == "run/model.safetensors" and rows["samples"] == "run/sheet.png"
    assert rows["try"] == f'minidiff sample "{prompts[0]}" --model run/model.safetensors'


def test_the_command_that_resumes_names_all_that_a_run_does_not_remember(monkeypatch, capsys):
    def interrupted(*a, **k):
        raise loop.Interrupted("stopped after step 1 of 5, saved as x")
    monkeypatch.setattr(run, "run", interrupted)
    monkeypatch.setattr("minidiff.data.dataset.load_dataset", lambda *a, **k: tiny.digits(50))
    assert call("train", "--system", "spy", "--out", "a folder", "--data", "mine", "--seed", 3, "--steps", 5,
                "--needs", "clip=c.safetensors", "--needs", "ddpm=d.safetensors", "--images", 40) == 1
    said = capsys.readouterr().err.rpartition("continue with: ")[2].strip()
    assert said == ('minidiff train --system spy --resume --out "a folder" --data mine --needs clip=c.safetensors '
                    "--needs ddpm=d.safetensors --images 40")
    monkeypatch.setattr("minidiff.engine.backend.check_device", lambda device: None)
    assert call("train", "--system", "spy", "--out", "b", "--device", "cuda") == 1
    said = capsys.readouterr().err.rpartition("continue with: ")[2].strip()
    assert said.startswith("minidiff train --system spy --resume --out b ") and "--device cuda" in said


@pytest.mark.parametrize("prompt, words", [
    ("a bold seven", '"a bold seven" --model r/m'), ("seven", "seven --model r/m"), ("", '"" --model r/m'),
    ('a "red" $HOME `id`', """'a "red" $HOME `id`' --model r/m"""), ("-7", "--model r/m -- -7")])
def test_the_command_to_try_is_one_that_a_shell_reads(prompt, words):
    system = SimpleNamespace(options=dict, reads_captions=True)
    said = train._next_command(system, SimpleNamespace(prompts=(prompt,)), Path("r/m"))
    assert said == f"minidiff sample {words}"
    system.reads_captions = False
    assert train._next_command(system, SimpleNamespace(prompts=(prompt,)), Path("m")) == 'minidiff sample "" --model m'
    read = shlex.split(said)
    assert prompt in read and read[read.index("--model") + 1] == "r/m"


def test_options_of_pictures_and_prompts_arrive_and_are_named_for_resuming(monkeypatch, capsys, tmp_path):
    loaded, data = [], Digits.of(tiny.images(50))           # its own: the command gives it other prompts

    def interrupted(folder, kind, data, *a, **k):
        loaded.append(data.prompts)
        raise loop.Interrupted("stopped")
    monkeypatch.setattr(run, "run", interrupted)
    monkeypatch.setattr("minidiff.data.dataset.load_dataset",
                        lambda name, **given: loaded.append((name, given["options"])) or data)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a  robot\n\nflag: Italy\n", encoding="utf-8")
    words = ("--size", "48x32", "--fit", "pad", "--background", "#ff8000", "--flip", "--captions", "c.csv",
             "--prompts", str(prompts), "--images", "0")
    assert call("train", "--system", "spy", "--out", "r", "--data", "mine", *words) == 1
    assert loaded == [("mine", {"size": (48, 32), "fit": "pad", "background": (255, 128, 0), "flip": True,
                                "captions": Path("c.csv")}), ("a robot", "flag: Italy")]
    said = capsys.readouterr().err.rpartition("continue with: ")[2].strip()
    start = ["minidiff", "train", "--system", "spy", "--resume", "--out", "r", "--data", "mine"]
    assert shlex.split(said) == [*start, *words]
    assert call("train", "--data", "mine", "--size", "32") == 1 and loaded[2][1] == {"size": (32, 32)}


@pytest.mark.parametrize("words, sentence", [
    (("--size", "big"), "takes pixels, such as 32 or 48x32"), (("--size", "1x2x3"), "takes pixels"),
    (("--fit", "squeeze"), "invalid choice: 'squeeze'"),
    (("--background", "greenish"), "white, black, grey or #rrggbb"),
    (("--prompts", "gone.txt"), "gone.txt does not exist"),
    (("--prompts", "empty.txt"), "must hold 1 to 100 prompts")])
def test_options_of_pictures_that_are_refused(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    assert call("train", "--system", "spy", "--out", "new", *words) == 2
    assert sentence in capsys.readouterr().err


# ---- verify --------------------------------------------------------------------------------------------------

def test_verify_passes_on_the_schedule_its_length_and_the_seed(monkeypatch):
    from minidiff import verify as laws
    asked = []
    monkeypatch.setattr(laws, "report", lambda schedule, **k: asked.append((schedule, k)) or [])
    monkeypatch.setattr(laws, "table", lambda rows: "")
    monkeypatch.setattr(laws, "as_dict", lambda schedule, rows, **k: asked.append((schedule, k)) or {})
    assert call("verify", "--schedule", "cosine:offset=0.02", "-T", 60, "--seed", 8, "--json", "v.json") == 0
    (schedule, given), (again, meta) = asked
    assert schedule is again and schedule.T == 60 and given == {"betas": None, "seed": 8} and meta["seed"] == 8
    from minidiff.diffusion.schedules import schedule_from
    np.testing.assert_array_equal(schedule.alpha_bar, schedule_from("cosine:offset=0.02", 60).alpha_bar)


def test_the_user_s_code_may_change_the_folder_and_each_file_is_where_it_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    Path("mine.py").write_text("import os\n\ndef betas():\n    os.chdir('elsewhere')\n    return [.1, .5, .9, .999]\n")
    Image.new("L", (8, 8)).save("grey.png")
    files = {"--json": "v.json", "--plot": "p.png", "--out": "w.png"}
    assert call("verify", "--python", "mine:betas", "--watch", "grey.png", *chain(*files.items())) in (0, 1)
    assert all((tmp_path / name).exists() for name in files.values())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_watch_is_drawn_by_the_seed_and_its_rows_are_judged_with_the_others(monkeypatch, capsys):
    from minidiff import verify as laws
    from minidiff.verify import watch
    asked = []
    monkeypatch.setattr(laws, "table", lambda rows: asked.append(("table", list(map(str, rows)))) or "")
    monkeypatch.setattr(watch, "load_image", lambda path: "image")
    monkeypatch.setattr(watch, "watch", lambda schedule, *given, seed: asked.append((*given, seed)) or ["x"])
    monkeypatch.setattr(watch, "table", lambda states: "")
    monkeypatch.setattr(watch, "rows", lambda states, seed: asked.append((states, seed)) or [Row()])
    monkeypatch.setattr(watch, "save", lambda schedule, frames, path: asked.append(path.name))

    class Row(SimpleNamespace):
        verdict = laws.BROKEN

        def __str__(self):
            return "a row of watch"
    monkeypatch.setattr(laws, "report", lambda *a, **k: [SimpleNamespace(verdict="holds")])
    assert call("verify", "--watch", "a.png", "--out", "w.png", "--seed", 8) == 1
    assert asked[:2] == [("image", 10, 8), (["x"], 8)] and asked[2][1][1:] == ["a row of watch"] and asked[3] == "w.png"


@pytest.mark.parametrize("option, file", [("--betas", "b.csv"), ("--alpha-bar", "a.csv")])
def test_verify_reads_a_table_as_what_it_is_named(option, file, tmp_path, monkeypatch):
    from minidiff import verify as laws
    asked = []
    monkeypatch.setattr(laws, "report", lambda schedule, **k: asked.append((schedule, k)) or [])
    monkeypatch.setattr(laws, "table", lambda rows: "")
    betas = np.array([0.1, 0.2, 0.5, 0.9])
    values = betas if option == "--betas" else np.cumprod(1 - betas)
    (tmp_path / file).write_text("\n".join(map(repr, values.tolist())))
    assert call("verify", option, file) == 0
    (schedule, given), = asked
    np.testing.assert_allclose(schedule.alpha_bar, np.cumprod(1 - betas), rtol=1e-12)
    assert (given["betas"] is None) == (option == "--alpha-bar")


def test_verify_runs_a_scheduler_with_its_configuration_and_steps(monkeypatch):
    from minidiff import verify as laws
    from minidiff.verify import scheduler as schedulers
    asked = []
    stand_in = SimpleNamespace(alpha_bar=np.ones(3), predicts="eps")
    monkeypatch.setattr(schedulers, "load", lambda name, config: asked.append((name, dict(config))) or stand_in)
    monkeypatch.setattr(schedulers, "report", lambda *a: asked.append(a[1:]) or [])
    monkeypatch.setattr(laws, "table", lambda rows: "")
    assert call("verify", "--scheduler", "minidiff:ddim", "--scheduler-config", "T=50", "--scheduler-config",
                "spacing=leading", "--steps", 6) == 0
    assert call("verify", "--scheduler", "other:Thing") == 0
    assert call("verify", "--scheduler", "minidiff:heun", "--scheduler-config", "schedule=cosine") == 0
    assert asked == [("minidiff:ddim", {"T": 50, "spacing": "leading", "schedule": "linear"}), ([6],),
                     ("other:Thing", {}), (), ("minidiff:heun", {"schedule": "cosine"}), ()]
