"""Every setting of a network's config.json is honoured as diffusers and transformers do, or refused in a sentence.

support/network_settings.py is the table.  network_settings.npz has the shapes of the weights and every 5th number of
diffusers' outputs (`PYTHONPATH=.:tests python tests/parity/test_parity_network_settings.py` makes it).
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.network_settings import EQUAL, LEFT_OUT, SETTINGS, named, ours

from minidiff.errors import UserError

EVERY = 5


@cache
def goldens() -> dict[str, tuple[dict, np.ndarray, float]]:
    """By the name of a row: the shapes of the weights, every 5th number of the outputs, and the largest of all."""
    with np.load(Path(__file__).with_name("network_settings.npz")) as file:
        shapes = json.loads(file["shapes"].tobytes())
        parts = np.split(file["outputs"], np.cumsum(file["sizes"])[:-1])
        return dict(zip(shapes, zip(shapes.values(), parts, file["largest"], strict=True), strict=True))


@pytest.mark.parametrize("part, options, verdict", SETTINGS, ids=lambda value: str(value)[-60:])
def test_a_setting(part, options, verdict, tmp_path):
    if isinstance(verdict, str):
        with pytest.raises(UserError, match=verdict) as caught:
            ours(part, options, goldens()[named(part, {})][0], tmp_path)
        assert "\n" not in str(caught.value)
        return
    assert verdict is EQUAL
    shapes, expected, largest = goldens()[named(part, options)]
    assert np.abs(ours(part, options, shapes, tmp_path)[::EVERY] - expected).max() <= 1e-4 * largest


SAME_SHAPES = [("unet", {"attention_head_dim": 4}), ("unet", {"norm_num_groups": 2}), ("unet", {"norm_eps": 1e-3}),
               ("unet", {"flip_sin_to_cos": False}), ("unet", {"freq_shift": 1}), ("vae", {"norm_num_groups": 2}),
               *(("text_encoder", options) for options in (
                   {"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"num_attention_heads": LEFT_OUT},
                   {"layer_norm_eps": 1e-3}, {"eos_token_id": 7}))]


@pytest.mark.parametrize("part, options", SAME_SHAPES)
def test_a_setting_makes_a_difference(part, options):
    """Else the comparison would not see that it is ignored; the weights are the same."""
    plain, changed = goldens()[named(part, {})], goldens()[named(part, options)]
    assert plain[0] == changed[0] and np.abs(changed[1] - plain[1]).max() > 2e-4 * plain[2]
