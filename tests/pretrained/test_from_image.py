"""Image to image and in-painting give diffusers' times and last latents, for each sampler.

from_image.npz was made by tests/parity/make_from_image.py with diffusers 0.42.1; the networks are formulas.  More
strengths and steps are compared where diffusers is installed (tests/parity/test_parity_from_image.py).
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.from_image import METHODS, SD, a_mask, numbers, ours

from minidiff.pretrained.plan import PndmPlan
from minidiff.pretrained.scheduler_classes import FAMILIES


@cache
def goldens():
    with np.load(Path(__file__).with_name("from_image.npz")) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("kind", ["image", "mask4", "mask9"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_an_image(method, kind):
    name, options = METHODS[method]
    z_0, noise = numbers(1, 5)
    for strength in (0.5, 0.8, 1.0):
        given = {} if kind == "image" else {"mask": a_mask()}
        z, times = ours(9 if kind == "mask9" else 4, name, SD | options, noise, z_0, -z_0, strength=strength, steps=5,
                        **given)
        expected = goldens()[f"{method} {strength} {kind}"]
        asked = goldens()[f"{method} {strength} {kind} times"]
        if options.get("final_sigmas_type"):                # theirs is asked once more, for a step that goes nowhere
            asked = asked[:-1]
        np.testing.assert_allclose(times, asked, atol=1e-3)
        assert np.abs(z - expected).max() <= 1e-4 * np.abs(expected).max()


def test_pndm_from_an_image_is_off_by_one_time_as_in_diffusers():
    """It starts a time earlier than ddim, and its second step begins one time later than its first one ended."""
    z_0, noise = numbers(1, 5)
    times = {}
    for method in ("ddim", "plms to clean"):
        name, options = METHODS[method]
        _, times[method] = ours(4, name, SD | options, noise, z_0, strength=0.6, steps=10)
    assert times["ddim"] == [500, 400, 300, 200, 100, 0]
    assert times["plms to clean"] == [600, 500, 400, 300, 200, 100, 0]
    assert FAMILIES["PNDMScheduler"].plan is PndmPlan
