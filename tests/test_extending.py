"""What a stranger adds goes through the whole command line, with no file of minidiff/ changed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import outside
from support.command_line import call

import minidiff
from minidiff.data.dataset import DATASETS, check_dataset
from minidiff.diffusion.densities import DENSITIES
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.errors import UserError
from minidiff.systems import SYSTEMS
from minidiff.systems.text_to_image import TextToImage

ENTRIES = ((SAMPLERS, "euler-ancestral"), (SCHEDULES, "sigmoid"), (DATASETS, "stripes"), (SYSTEMS, "independent"))


@pytest.fixture
def entered():
    """The four parts, entered by calls."""
    minidiff.register_sampler("euler-ancestral", outside.euler_ancestral, order=1, noise=True)
    minidiff.register_schedule("sigmoid", outside.sigmoid)
    minidiff.register_dataset("stripes", outside.load_stripes)
    minidiff.register_system("independent", outside.Independent)
    yield
    for registry, name in ENTRIES:
        registry.unregister(name)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_schedule_with_a_parameter(entered, folder, capsys):
    assert call("verify", "--schedule", "sigmoid") == 0
    assert call("verify", "--schedule", "sigmoid:tau=0.7,end=2.5") == 0
    assert "sigmoid" in capsys.readouterr().out
    assert call("verify", "--schedule", "sigmoid:beta=3") == 2
    assert "'beta' is not a parameter; the parameters of sigmoid are: start=-3.0, end=3.0, tau=1.0" \
        in capsys.readouterr().err


@pytest.mark.slow
def test_a_stochastic_sampler_keeps_the_laws_and_a_broken_one_does_not(entered, folder, capsys):
    assert call("verify", "--schedule", "cosine") == 0
    assert "euler-ancestral" in capsys.readouterr().out
    assert call("verify", "--scheduler", "minidiff:euler-ancestral") == 0
    minidiff.register_sampler("without-noise", outside.ancestral_without_noise, order=1, noise=True)
    try:
        assert call("verify", "--schedule", "cosine") == 1
        assert "without-noise" in capsys.readouterr().out
        assert call("verify", "--scheduler", "minidiff:without-noise") == 1
    finally:
        SAMPLERS.unregister("without-noise")


def test_a_data_set_of_colour_and_no_square_is_trained_on_and_drawn(entered, folder, capsys):
    """By the default system, on the stranger's schedule, with the stranger's sampler."""
    assert call("train", "--data", "stripes", "--schedule", "sigmoid:tau=0.9", "--steps", 2, "--batch", 2,
                "--images", 0) == 0
    path = folder / "runs" / "text-to-image" / "model.safetensors"
    model = TextToImage.load(path)
    assert model.config.shape == (16, 12, 3) and model.config.schedule == "sigmoid:tau=0.9"
    assert model.notes["dataset"] == "stripes"
    assert np.array_equal(model.schedule.alpha_bar, outside.sigmoid(tau=0.9).alpha_bar)
    with Image.open(folder / "runs" / "text-to-image" / "1-diffusion" / "samples.png") as preview:
        assert preview.mode == "RGB"
    assert call("sample", "stripes down", "--sampler", "euler-ancestral", "--steps", 3, "--count", 2, "-o", "s.png",
                "--trajectory", "way.png") == 0
    assert (folder / "s.png").exists() and (folder / "way.png").exists()
    capsys.readouterr()
    assert call("evaluate", "--images", 4) == 2
    error = capsys.readouterr().err
    assert "stripes" in error and "judge" in error and error.count("\n") == 1


@pytest.mark.parametrize("system", ["ddpm", "clip", "autoencoder-vq", "dalle"])
@pytest.mark.slow
def test_other_systems_train_on_it_too(entered, folder, monkeypatch, system):
    assert call("train", "--system", system, "--data", "stripes", "--steps", 2, "--batch", 2, "--images", 0,
                *(("--set", "perceptual=0.0") if system == "autoencoder-vq" else ())) == 0
    kind = SYSTEMS[system]
    assert kind.load(folder / "runs" / system / "model.safetensors").notes["dataset"] == "stripes"


def test_a_system(entered, folder, capsys):
    assert call("train", "--system", "independent", "--data", "stripes", "--images", 0, "--effort", 0.5) == 0
    assert call("train", "--system", "independent", "--data", "stripes", "--images", 0) == 2    # it is there already
    assert "--resume" in capsys.readouterr().err
    assert call("sample", "--system", "independent", "any", "--set", "temperature=0.5", "--count", 3,
                "-o", "i.png") == 0
    assert (folder / "i.png").exists()
    capsys.readouterr()
    for arguments, says in [(["sample", "any", "--sampler", "ddim"], "has no option 'sampler'"),
                            (["sample", "any", "--trajectory", "way.gif"], "does not draw its pictures step by step"),
                            (["evaluate", "--likelihood"], "it is no diffusion model"),
                            (["evaluate", "--images", "4"], "judge")]:
        assert call(*arguments, "--system", "independent") == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


def test_info_lists_all_four(entered, folder, capsys):
    assert call("info") == 0
    out = capsys.readouterr().out
    assert all(name in out for _, name in ENTRIES)


@pytest.mark.slow
def test_an_installed_package_enters_them_by_entry_points(folder):
    """A package that is installed, in a process that has never called `register`."""
    info = folder / "site" / "outside_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[minidiff.samplers]\neuler-ancestral = support.outside:EULER_ANCESTRAL\n"
        "[minidiff.schedules]\nsigmoid = support.outside:sigmoid\n"
        "[minidiff.datasets]\nstripes = support.outside:STRIPES\n"
        "[minidiff.systems]\nindependent = support.outside:Independent\n"
        "broken = no_such_package:Thing\n")
    here = Path(__file__).parent
    path = os.pathsep.join([str(folder / "site"), str(here), str(here.parent)])

    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "minidiff", *arguments], cwd=folder, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": path})
    done = run("train", "--system", "independent", "--data", "stripes", "--images", "0")
    assert done.returncode == 0, done.stderr
    done = run("verify", "--schedule", "sigmoid:tau=0.8")
    assert done.returncode == 0 and "euler-ancestral" in done.stdout, done.stderr
    done = run("train", "--system", "broken")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be loaded" in done.stderr


@pytest.mark.slow
def test_a_density_of_times_is_drawn_by_training(folder, monkeypatch):
    """A stranger's density of the last two times, half and half with one of minidiff's, and no others."""
    minidiff.register_density("late", lambda schedule: np.arange(schedule.T) >= schedule.T - 2)
    seen, loss = [], TextToImage.loss
    monkeypatch.setattr(TextToImage, "loss", lambda self, x_0, ids, mask, t, eps: seen.extend(t.tolist()) or loss(
        self, x_0, ids, mask, t, eps))
    try:
        assert call("train", "--data", "digits", "--set", "times=0.5*late + 0.5*power", "--steps", 2, "--batch", 8,
                    "--images", 0) == 0
        model = TextToImage.load(folder / "runs/text-to-image/model.safetensors")
    finally:
        DENSITIES.unregister("late")
    assert len(seen) == 16 and sum(t >= 998 for t in seen) >= 8
    assert model.config.times == "0.5*late + 0.5*power"


def test_names_that_are_taken_or_are_no_names_are_refused(entered):
    with pytest.raises(ValueError, match="there is already a sampler 'ddim'"):
        minidiff.register_sampler("ddim", outside.euler_ancestral, order=1, noise=True)
    with pytest.raises(ValueError, match="takes letters, digits"):
        minidiff.register_schedule("a schedule:", outside.sigmoid)
    with pytest.raises(ValueError, match="there is already a density of times 'normal'"):
        minidiff.register_density("normal", lambda schedule: np.ones(schedule.T))
    with pytest.raises(TypeError, match="function must be a function .schedule"):
        minidiff.register_density("x", None)
    with pytest.raises(TypeError, match="whose name is 'other'"):
        minidiff.register_system("other", outside.Independent)
    with pytest.raises(TypeError, match="load must be a function"):
        minidiff.register_dataset("x", None)


def test_images_that_are_not_8_bit_values_are_refused():
    class Between(outside.Stripes):
        def images(self, indices):
            return super().images(indices) * np.float32(0.99)
    check_dataset(outside.Stripes())
    with pytest.raises(UserError, match="8-bit values"):
        check_dataset(Between())


def test_a_sampler_whose_entry_contradicts_its_function_is_refused():
    with pytest.raises(ValueError, match="the function of the sampler 'a' needs streams=, so it draws noise: register"):
        minidiff.register_sampler("a", outside.euler_ancestral, order=1)
    with pytest.raises(ValueError, match="the sampler 'a' draws noise .noise=True., so its function must take str"):
        minidiff.register_sampler("a", lambda denoiser, x_T, times, cond=None: iter(()), order=1, noise=True)
    assert "a" not in SAMPLERS
