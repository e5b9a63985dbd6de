"""From prompt, picture and mask to the picture, as diffusers' own pipelines go, with the same weights and noise.

whole_pipelines.npz was made by tests/parity/test_parity_whole_pipelines.py with diffusers 0.42.1: the last latents,
every 25th number of the picture, and the shapes of the weights of pipelines that are not in checkpoints/.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.whole_pipelines import CASES, CHECKPOINTS, HERE, close, compared, make, ours

from minidiff.errors import UserError
from minidiff.systems.stable_diffusion import StableDiffusion

EVERY = 25


@cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("whole_pipelines.npz")) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    @cache
    def load(kind: str) -> StableDiffusion:
        if kind in CHECKPOINTS:
            return StableDiffusion.load(HERE / kind)
        shapes = json.loads(goldens()["shapes"].tobytes())[kind]
        return StableDiffusion.load(make(kind, shapes, tmp_path_factory.mktemp("odd") / "model"))
    return load


@pytest.mark.parametrize("kind, run", CASES)
def test_a_run(model, kind, run):
    m = model(kind)
    z, picture = ours(m, run)
    assert close(z, goldens()[f"{kind}: {run}"])
    found = compared(picture, run, m.vae.factor, m.form.sees_mask).ravel()[::EVERY]
    assert close(found, goldens()[f"{kind}: {run}, picture"], 1)


def test_strength_spreads_the_steps_of_a_latent_consistency_model(model):
    """Its own pipeline makes all steps, at times of the share that strength says; in-painting makes the last steps."""
    m, image, mask = model("consistency"), np.zeros((16, 16, 3), np.float32), np.ones((16, 16), bool)
    options = {"image": image, "strength": 0.5, "steps": 4}
    # of 49, 99, ..., 999 the first half
    assert [s.t for s in m.trajectory(["a"], **options)] == [399, 249, 149, -1]
    assert [s.t for s in m.trajectory(["a"], mask=mask, **options)] == [249, -1]
    assert m.steps_made(options) == 4 and m.steps_made(options | {"mask": mask}) == 2
    for other, sampler in ((m, "ddim"), (model("narrow"), "lcm")):
        assert len(list(other.trajectory(["a"], sampler=sampler, **options))) == 2
    with pytest.raises(UserError, match="strength 0.1 leaves 2; 4 steps do not fit: take fewer, or a larger strength"):
        m.sample(["a"], image=image, strength=0.1, steps=4)


@pytest.mark.parametrize("kind", ["inpaint", "v in-painting"])
def test_a_speck_that_the_network_does_not_see_is_refused(model, kind):
    """It reads one pixel of each latent, as other programs and its training do."""
    m = model(kind)
    f, image = m.vae.factor, np.zeros((8 * m.vae.factor, 8 * m.vae.factor, 3), np.float32)
    mask = np.zeros(image.shape[:2], bool)
    mask[1:f] = True
    with pytest.raises(UserError, match=f"one pixel of each {f}x{f}, and mask is white in none of them: make"):
        m.sample(["a"], image=image, mask=mask, steps=2)
    mask[f, f] = True
    m.sample(["a"], image=image, mask=mask, steps=1)
