"""The preview of every stage: the pictures that this stage's networks draw, each above what was asked for."""

import numpy as np
import pytest
from support import small_systems

from minidiff import pictures, systems
from minidiff.systems.stage import Step

PREVIEWS = {"text-to-image": ["diffusion"], "ddpm": ["diffusion"], "vdm": ["diffusion"],
            "adm": ["classifier"], "dalle": ["dvae", "prior"],
            "dalle2": ["decoder", "prior", "codes"], "imagen": ["pixels-7", "pixels-14", "pixels-28"],
            "autoencoder-kl": ["autoencoder"], "autoencoder-vq": ["autoencoder"],
            "latent": ["autoencoder", "diffusion"], "dit": ["diffusion"], "consistency": ["distillation"],
            "dpm": ["reverse", "schedule"]}
LONG = ("adm", "imagen", "text-to-image", "ddpm", "vdm")          # many steps, or networks
DRAWN = [pytest.param(name, stage, marks=[pytest.mark.slow] if name in LONG else [])
         for name, stages in PREVIEWS.items() for stage in stages if name != "dpm"]
RECONSTRUCTED = {("dalle", "dvae"), ("autoencoder-kl", "autoencoder"), ("autoencoder-vq", "autoencoder"),
                 ("latent", "autoencoder")}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_the_stages_with_a_preview_are_these(name, data):
    system = small_systems.new(name)
    assert [stage.name for stage in system.stages(data if name != "dpm" else None) if stage.picture] == \
        PREVIEWS.get(name, [])


def stage_of(system, data, wanted: str):
    """The stage of this name, after those before it were as good as trained."""
    for number, stage in enumerate(system.stages(data), start=1):
        if stage.name == wanted:
            return stage, number
        small_systems.moved(stage.module, by=0.02)
    raise AssertionError(wanted)


@pytest.mark.parametrize("name, wanted", DRAWN, ids=lambda value: value)
def test_a_preview_shows_what_its_own_stage_has_learned(name, wanted, data, monkeypatch):
    """Other weights of its module give other pictures; as many as there are captions, which are the data's prompts;
    and reconstructions stand with their images."""
    system, sheets = small_systems.new(name), []
    monkeypatch.setattr(pictures, "sheet", lambda images, labels=None, **more: sheets.append(
        (np.array(images), labels, more)))
    stage, number = stage_of(system, data, wanted)
    stage.batch(Step(0, number, 0, 10, 4))
    for seed in (1, 2):
        small_systems.moved(stage.module, seed, by=0.3)
        stage.picture()
    (first, labels, _), (second, *_) = sheets
    assert first.shape == second.shape and not np.array_equal(first, second) and np.isfinite(first).all()
    if (name, wanted) in RECONSTRUCTED:
        n = len(first) // 2
        known = data.images(np.arange(n))
        shown = first[:n] if name == "dalle" else first[0::2]
        np.testing.assert_array_equal(shown, known)
        drawn = second[n:] if name == "dalle" else second[1::2]
        if name == "dalle":
            expected = system.vae.images(system.vae.tokens(known))
        else:
            expected = (system.autoencoder if name == "latent" else system).reconstruct(known)
        np.testing.assert_allclose(drawn, expected, atol=1e-5)
    elif labels is not None:
        assert len(labels) == len(first)
        prompts = [p or "(no caption)" for p in data.prompts]
        kept = labels[::4] if name == "adm" else labels     # four pictures of each prompt
        assert kept == prompts[:len(kept)] and len(kept) >= 6
