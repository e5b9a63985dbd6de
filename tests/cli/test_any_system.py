"""Any system on the command line, used well and badly."""

import re

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.command_line import call
from support.toy import Toy

from minidiff import systems
from minidiff.data import mnist
from minidiff.training import loop, run
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _toy_trained(tmp_path, monkeypatch, toy):
    """One more system, whose weights are in runs/toy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    toy.new(tiny.digits(50)).save(tmp_path / "runs" / "toy" / "model.safetensors")


def test_sample_draws_what_the_system_draws(tmp_path, capsys):
    assert call("sample", "--system", "toy", "a 3", "--count", 4, "--seed", 5, "--scale", 0, "--set", "best=2") == 0
    printed = capsys.readouterr().out
    assert "4 x 'a 3'" in printed and "by toy (runs/toy/model.safetensors)" in printed
    with Image.open(tmp_path / "sample.png") as image:
        grey = np.asarray(image.convert("L"))
    assert (np.abs(grey.astype(int) - 128) <= 1).mean() > 0.3                       # scale 0 is grey


def test_evaluate_judges_it(capsys):
    assert call("evaluate", "--system", "toy", "--images", 4, "--scale", "1.5") == 0
    assert "scale 1.5, best 1, seed 0" in capsys.readouterr().out


def test_train_can_be_stopped_and_resumed_by_the_command_that_it_prints(tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def interrupted(self):
        if self.number == 2 and self.n == 1:
            raise loop.Interrupted("stopped after step 1 of 5, saved as x")
        return step(self)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert call("train", "--system", "toy", "--out", "run", "--seed", 3, "--images", 0) == 1
    command = capsys.readouterr().err.rpartition("continue with: minidiff ")[2].split()
    monkeypatch.setattr(Trainer, "step", step)
    assert call(*command) == 0
    assert "--model run/model.safetensors" in capsys.readouterr().out
    straight = run.run(tmp_path / "straight", Toy, tiny.digits(50), TrainOptions(seed=3), quiet=True).system
    assert all((w == straight.state_dict()[name]).all()
               for name, w in Toy.load(tmp_path / "run" / "model.safetensors").state_dict().items())
    assert call("train", "--system", "toy", "--out", "run") == 2 and "--resume" in capsys.readouterr().err


BAD = {
    "no such system": (["sample", "--system", "dall-e", "3"], "no system 'dall-e'"),
    "no such system to train": (["train", "--system", "sora"], "no system 'sora'"),
    "no weights": (["sample", "--system", "toy", "--model", "gone.safetensors", "3"],
                   "gone.safetensors does not exist"),
    "another system's weights": (["sample", "--system", "imagen", "--model", "runs/toy/model.safetensors", "3"],
                                 "holds 'toy', and --system asks for 'imagen'"),
    "another system for these weights": (["sample", "--system", "toy", "--model", str(systems.system_class(
        "text-to-image").shipped()), "3"], "holds 'text-to-image', and --system asks for 'toy'"),
    "an option that it has not": (["sample", "--system", "toy", "3", "--steps", "4"],
                                  "toy has no option 'steps': its options are scale 2.0, best 1"),
    "an option of another type": (["sample", "--system", "toy", "3", "--set", "best=many"],
                                  "best takes a value like 1, not 'many'"),
    "a value that it refuses": (["sample", "--system", "toy", "3", "--set", "best=0"], "best must be at least 1"),
    "a value that it refuses, evaluated": (["evaluate", "--system", "toy", "--images", "4", "--set", "best=0"],
                                           "best must be at least 1"),
    "too large a number": (["sample", "--system", "toy", "3", "--set", "scale=1e308"], "from -1000 to 1000"),
    "no number": (["sample", "--system", "toy", "3", "--set", "scale=NaN"], "from -1000 to 1000"),
    "an option given twice": (["sample", "--system", "toy", "3", "--scale", "3", "--set", "scale=2"], "given twice"),
    "a value without end": (["sample", "--system", "toy", "3", "--set", "scale=" + "[" * 100_000], "takes a value"),
    "the default system into another's run": (["train", "--out", "begun"],
                                              "begun/run.json does not say how this run was started"),
    "effort beyond measure": (["train", "--system", "toy", "--effort", "101"], "at most 100"),
    "a trajectory": (["sample", "--system", "toy", "3", "--trajectory", "a.gif"], "toy has no trajectory: it does not"),
    "a device": (["sample", "--system", "toy", "3", "--device", "cuda"], ""),
    "an option that the default has not": (["sample", "3", "--set", "best=2"], "text-to-image has no option 'best'"),
    "the same for evaluate": (["evaluate", "--set", "best=2"], "text-to-image has no option 'best'"),
    "the likelihood": (["evaluate", "--system", "toy", "--likelihood"], "toy has no likelihood: it has no denoiser"),
    "effort of 0": (["train", "--system", "toy", "--effort", "0"], "above 0"),
    "pictures without captions": (["evaluate", "--system", "ddpm"], "ddpm draws without captions, so no judge"),
    "too few pictures to evaluate": (["evaluate", "--system", "toy", "--images", "3"], "--images must be from 4"),
    "a field set twice": (["train", "--set", "T=50", "--set", "T=60"], "--set: T was given twice"),
    "a schedule set twice": (["train", "--schedule", "cosine", "--set", "schedule=linear"], "schedule was given twice"),
    "needs given twice": (["train", "--system", "glide", "--needs", "text-to-image=a", "--needs", "text-to-image=b"],
                          "--needs: text-to-image was given twice"),
    "a rate beyond reason": (["train", "--system", "toy", "--lr", "900"], "lr must be within 1e-12 and 10, not 900"),
    "a device for a model": (["sample", "3", "--model", "/dev/null"], "/dev/null is a device"),
    "nothing to resume": (["train", "--system", "toy", "--resume", "--out", "empty"], "no run to resume"),
}


@pytest.mark.parametrize("arguments, says", BAD.values(), ids=BAD)
def test_a_mistake_is_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    def trains(*args, **options):
        raise AssertionError("it was not refused before the training")
    monkeypatch.setattr("minidiff.training.run._train", trains)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    assert call(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if line.strip() and not re.search(r"%\||batch/s", line)]        # a bar had begun
    assert len(said) == 1 and said[0].startswith("minidiff: ") and says in said[0]


@pytest.mark.parametrize("name", [name for name in systems.SYSTEMS if systems.system_class(name).options() is None])
def test_what_draws_no_pictures_of_captions_names_its_example(name, capsys):
    from support.examples import EXAMPLES
    for command in (["sample", "3"], ["evaluate", "--images", "4"]):
        assert call(*command, "--system", name) == 2
        said = capsys.readouterr().err
        assert f"{name} draws no pictures of captions: python examples/" in said
        assert (EXAMPLES / said.split("examples/")[1].split()[0]).exists()
