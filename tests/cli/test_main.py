"""The command line, used well and badly: a mistake is one sentence, exit status 2, and nothing lost."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import fake_cupy, tiny
from support.command_line import call

from minidiff.cli.main import _parser
from minidiff.cli.sample import peak_memory
from minidiff.data import mnist
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.systems.text_to_image import TextToImage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.trained_a_little().save(path, notes={"train": {"steps": 1, "batch": 2, "seed": 0}})
    return path


SHIPPED = TextToImage.shipped()


# --- used well --------------------------------------------------------------------------------------------

def test_sample_draws_a_sheet(model, tmp_path, capsys):
    out = tmp_path / "seven.png"
    assert call("sample", "a bold seven leaning left", "--model", model, "--count", 4, "--steps", 3, "-o", out) == 0
    with Image.open(out) as image:
        assert image.width > 150 and len(image.getcolors(1 << 20)) > 20
    assert "seven.png" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind", [("way.gif", "GIF"), ("way.png", "PNG")])
def test_trajectory(model, tmp_path, name, kind):
    assert call("sample", "3", "--model", model, "--count", 2, "--steps", 4, "-o", tmp_path / "s.png",
                "--trajectory", tmp_path / name) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and getattr(image, "n_frames", 1) == (5 if kind == "GIF" else 1)


def test_the_same_seed_gives_the_same_picture(model, tmp_path):
    pictures = []
    for i, seed in enumerate((1, 1, 2)):
        assert call("sample", "3", "--model", model, "--count", 2, "--steps", 2, "--seed", seed,
                    "-o", tmp_path / f"{i}.png") == 0
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_shipped_weights_sample_right_after_install(tmp_path):
    assert call("sample", "a bold seven leaning left", "--count", 2, "--steps", 8, "-o", tmp_path / "s.png") == 0


def test_evaluate_prints_a_table_and_writes_json(model, tmp_path, capsys):
    assert call("evaluate", "--model", model, "--images", 10, "--steps", 2, "--json", tmp_path / "r.json") == 0
    printed, saved = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    for word in ("prompt accuracy", "attribute agreement", "held-out", "FID", "floor", "ceiling",
                 f"model: text-to-image ({model})", "judge: digit-classifier ("):
        assert word in printed
    assert saved["images"] == 10 and 0 <= saved["digit_accuracy"] <= 1


def test_info(model, capsys):
    assert call("info", "--model", model) == 0 and call("info") == 0
    assert "parameters" in capsys.readouterr().out


def test_train_ends_with_everything_promised(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TextToImage, "config_for", classmethod(lambda cls, shape: tiny.CONFIG))
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images())
    out = tmp_path / "run"
    assert call("train", "--out", out, "--steps", 3, "--batch", 4, "--images", 10) == 0
    names = {str(p.relative_to(out)) for p in out.rglob("*.*")}
    assert names >= {"sheet.png", "model.safetensors", "results.json", "1-diffusion/samples.png",
                     "1-diffusion/loss.png"}
    printed = capsys.readouterr().out
    for word in ("prompt accuracy", "attribute agreement", "FID", "in all", "minidiff sample"):
        assert word in printed
    results = json.loads((out / "results.json").read_text())
    assert results["system"] == "text-to-image" and results["evaluation"]["images"] == 10
    assert results["loss"].keys() == results["seconds"].keys() == {"diffusion"}
    assert call("train", "--out", out, "--steps", 3) == 2 and "--resume" in capsys.readouterr().err


def test_train_takes_fields_of_the_configuration_and_a_schedule(tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, "config_for", classmethod(lambda cls, shape: tiny.CONFIG))
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images())
    assert call("train", "--out", tmp_path / "run", "--steps", 1, "--batch", 2, "--images", 0,
                "--set", "drop_caption=0", "--set", "T=30", "--schedule", "cosine:offset=0.02") == 0
    config = TextToImage.load(tmp_path / "run" / "model.safetensors").config
    assert (config.drop_caption, config.T, config.schedule) == (0.0, 30, "cosine:offset=0.02")


def test_every_argument_has_a_help_text():
    """A phrase that begins small, or with the name of whom it is for; words are one space apart."""
    (commands,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert list(commands) == ["train", "sample", "evaluate", "verify", "check", "info", "play"]
    for command, parser in commands.items():
        for action in parser._actions:
            text, place = action.help or "", (command, action.dest)
            assert re.fullmatch(r"((Stable Diffusion|SDXL): )?[a-z0-9].*[^. ]", text) and "  " not in text, place


def test_the_help_names_the_schedules(capsys):
    assert call("verify", "--help") == 0
    assert ", ".join(SCHEDULES) + " (else cosine)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the only number there is")
def test_the_peak_of_memory_is_at_least_what_is_held_now_in_gib():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.9 * now <= peak_memory() < now + 8


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["evaluate"], ["verify"], ["check"], ["info"]])
def test_help(command, capsys):
    assert call(*command, "--help") == 0
    assert "usage: minidiff" in capsys.readouterr().out


# --- used badly -------------------------------------------------------------------------------------------

BAD = {
    "no command": [],
    "an unknown command": ["draw"],
    "scale of NaN": ["sample", "3", "--scale", "nan"],
    "infinite scale": ["evaluate", "--scale", "inf"],
    "scale of letters": ["sample", "3", "--scale", "big"],
    "count of 0": ["sample", "3", "--count", "0"],
    "negative count": ["sample", "3", "--count", "-4"],
    "steps of 0": ["sample", "3", "--steps", "0"],
    "steps beyond the schedule": ["sample", "3", "--steps", "1001"],
    "training steps of 0": ["train", "--steps", "0"],
    "batch of 0": ["train", "--batch", "0"],
    "lr of 0": ["train", "--lr", "0"],
    "an unknown precision": ["train", "--precision", "float8"],
    "negative seed": ["sample", "3", "--seed", "-1"],
    "unknown sampler": ["sample", "3", "--sampler", "euler"],
    "an output folder that is not there": ["sample", "3", "-o", "nowhere/s.png"],
    "an output that is a folder": ["sample", "3", "-o", "."],
    "an output of unknown kind": ["sample", "3", "-o", "s.txt"],
    "no output name": ["sample", "3", "-o", ""],
    "a trajectory that cannot be written": ["sample", "3", "--trajectory", "nowhere/s.gif"],
    "a model that is not there": ["sample", "3", "--model", "nowhere.safetensors"],
    "a model that is no model": ["sample", "3", "--model", __file__],
    "a folder for a model": ["info", "--model", "."],
    "a device that is not there": ["sample", "3", "--device", "cuda"],
    "an unknown device": ["train", "--device", "tpu"],
    "data that is not there": ["train", "--data", "nowhere"],
    "nothing to resume": ["train", "--resume", "--out", "empty"],
    "json that cannot be written": ["evaluate", "--json", "nowhere/r.json"],
    "one image to evaluate": ["evaluate", "--images", "1"],
    "too few images after training": ["train", "--images", "3"],
    "a configuration that it has not": ["train", "--set", "depth=3"],
    "a field of another type": ["train", "--set", "T=many"],
    "a field out of range": ["train", "--set", "drop_caption=2"],
    "no such schedule": ["train", "--schedule", "sine"],
    "a schedule's parameter that it has not": ["train", "--schedule", "cosine:beta=3"],
    "a schedule that keeps its signal": ["train", "--schedule", "linear", "--set", "T=100"],
    "needs that it has not": ["train", "--needs", "clip=x.safetensors"],
    "needs without a file": ["train", "--system", "latent", "--needs", "clip"],
    "a system that it needs, of another kind": ["train", "--system", "latent", "--needs", f"clip={SHIPPED}"],
    "a configuration on resuming": ["train", "--resume", "--set", "T=50"],
    "the likelihood with a scale": ["evaluate", "--likelihood", "--scale", "2"],
    "one file for two pictures": ["sample", "3", "-o", "s.png", "--trajectory", "s.png"],
    "data that the judge does not read": ["evaluate", "--data", "."],
    "a scale beyond reason": ["sample", "3", "--scale", "1e300"],
    "a file where the run's folder should be": ["train", "--out", __file__],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", mnist.load if "--data" in arguments else lambda *a, **k: tiny.images())
    if "cuda" in arguments:
        monkeypatch.setitem(sys.modules, "cupy", None)      # as where CuPy is not installed
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minidiff: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    if arguments[:1] == ["train"]:
        assert "training" not in said.out and not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("error, says", [
    (fake_cupy.OutOfMemoryError("Out of memory allocating 512 bytes"), "out of memory: ask for fewer images"),
    (type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda.api.runtime"})("illegal address"),
     "the GPU failed: illegal address; start the command again"),
])
def test_a_gpu_that_fails_under_way_is_a_sentence(monkeypatch, capsys, error, says):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr("minidiff.systems.text_to_image.TextToImage.trajectory", fail)
    assert call("sample", "3") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", "   ", "7" * 10_000,
                                    "\u202eseven \U0001f600 \u0645\u0631\u062d\u0628\u0627 七", "a\x00b", "\ud800"])
def test_odd_prompts_are_drawn_all_the_same(model, tmp_path, prompt):
    out = tmp_path / "s.png"
    assert call("sample", prompt, "--model", model, "--count", 1, "--steps", 2, "-o", out) == 0
    assert out.exists()


def test_a_model_with_damaged_weights_is_a_sentence(tmp_path, capsys):
    damaged = tiny.trained_a_little()
    for p in damaged.parameters().values():
        p.data = p.data * 0 + np.float32(3e38)
    damaged.save(tmp_path / "m.safetensors")
    assert call("sample", "3", "--model", tmp_path / "m.safetensors", "--count", 1, "--steps", 1,
                "-o", tmp_path / "s.png") == 2
    assert "weights are damaged" in capsys.readouterr().err and not (tmp_path / "s.png").exists()


def test_a_long_prompt_is_cut_with_a_message(model, tmp_path, capsys):
    call("sample", "seven " * 2000, "--model", model, "--count", 1, "--steps", 1, "-o", tmp_path / "s.png")
    err = capsys.readouterr().err
    assert "12000 characters" in err and "tokens were kept" in err


def test_a_full_disk_is_a_sentence_and_leaves_the_old_picture(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.png"
    out.write_bytes(b"the old picture")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert call("sample", "3", "--model", model, "--count", 1, "--steps", 1, "-o", out) == 2
    assert "No space left" in capsys.readouterr().err and out.read_bytes() == b"the old picture"
    assert list(tmp_path.iterdir()) == [out]


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "minidiff", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("minidiff ")


def test_importing_minidiff_loads_no_heavy_package():
    """What makes an import slow is what it loads: SciPy, Pillow and tqdm wait until they are needed."""
    code = ("import minidiff, minidiff.cli, sys;"
            "print([m for m in ('scipy', 'PIL', 'tqdm', 'safetensors') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
