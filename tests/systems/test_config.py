"""Configurations from files of strangers: complete, of the right types and sizes, or refused."""

import dataclasses
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_systems import CONFIGS

from minidiff.nn.layers import TooManyWeights, Unfilled, parameter
from minidiff.systems.config import LARGEST, LONGEST, LONGEST_TEXT, check_shape, config_from, with_changes
from minidiff.systems.dpm import DPM, DPMConfig
from minidiff.systems.latent import LatentConfig


@dataclass(frozen=True)
class Inner:
    heads: int = 2
    shape: tuple[int, ...] = (8, 8, 1)


@dataclass(frozen=True)
class Outer:
    T: int = 10
    drop: float = 0.1
    name: str = "cosine"
    wide: bool = False
    widths: tuple[int, ...] = (8, 16)
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_survives_a_file(name):
    config = CONFIGS[name]
    assert config_from(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_field_that_is_left_out_takes_its_default():
    assert config_from(Outer, {"T": 3, "inner": {}}) == Outer(T=3)
    assert config_from(Outer, {"widths": [4], "inner": {"heads": 1}}) == Outer(widths=(4,), inner=Inner(1))


@pytest.mark.parametrize("values, error, message", [
    ([], TypeError, "Outer must be a dict, not list"),
    ({"inner": 3}, TypeError, "Inner must be a dict, not int"),
    ({"depth": 3}, ValueError, "Outer has no 'depth'"),
    ({"inner": {"depth": 3}}, ValueError, "Inner has no 'depth'"),
    ({"T": 3.0}, ValueError, "T takes a value like 10, not '3.0'"),
    ({"T": True}, ValueError, "T takes a value like 10, not 'True'"),
    ({"wide": 1}, ValueError, "wide takes a value like False, not '1'"),
    ({"T": -1}, ValueError, "T must be a whole number from 0 to 4096, not -1"),
    ({"T": LARGEST + 1}, ValueError, "T must be a whole number from 0 to 4096, not 4097"),
    ({"drop": "0.1"}, ValueError, "drop takes a value like 0.1, not '0.1'"),
    ({"drop": math.nan}, ValueError, "drop must be finite, not nan"),
    ({"drop": math.inf}, ValueError, "drop must be finite, not inf"),
    ({"name": "x" * (LONGEST_TEXT + 1)}, ValueError, "name takes at most 200 characters, not 201"),
    ({"widths": [8, "16"]}, ValueError, "widths takes a value like 8, not '16'"),
    ({"widths": [8, LARGEST + 1]}, ValueError, "widths must be a whole number from 0 to 4096, not 4097"),
    ({"widths": 8}, ValueError, "widths takes a value like"),
    ({"widths": []}, ValueError, "widths takes 1 to 16 values, not 0"),
    ({"widths": [8] * 17}, ValueError, "widths takes 1 to 16 values, not 17"),
])
def test_anything_else_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        config_from(Outer, values)


@pytest.mark.parametrize("changes, message", [
    ({"T": 5000}, "T must be a whole number from 0 to 4096, not 5000"),
    ({"T": 3.5}, "T takes a value like 10, not '3.5'"),
    ({"drop": math.nan}, "drop must be finite"),
    ({"name": "x" * 201}, "name takes at most 200 characters"),
    ({"widths": [8, 5000]}, "widths must be a whole number from 0 to 4096"),
    ({"widths": [8.5]}, "widths takes a value like 8, not '8.5'"),
    ({"widths": []}, "widths takes 1 to 16 values, not 0"),
    ({"widths": [8] * 17}, "widths takes 1 to 16 values, not 17"),
    ({"widths": 8}, r"widths takes a value like \[8, 16\], not '8'"),
    ({"inner": {"heads": 1}}, "its configuration has no inner: it has T"),
    ({"depth": 1}, r"its configuration has no depth: it has T \(10\), .*, inner.heads \(2\)$"),
    ({"inner.depth": 1}, "its configuration has no inner.depth: it has T"),
    ({"T.heads": 1}, "its configuration has no T.heads: it has T"),
    ({"inner.": 1}, "its configuration has no inner.: it has T"),
    ({"inner.heads": 2.5}, "inner.heads takes a value like 2, not '2.5'"),
    ({"inner.heads": 5000}, "heads must be a whole number from 0 to 4096"),
    ({"inner.shape": [4, 4, 1]}, "its configuration has no inner.shape"),
])
def test_a_change_that_a_file_could_not_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_changes(Outer(), changes)


def test_fields_of_parts_change_together():
    changed = with_changes(LatentConfig(), {"clip.text.width": 96, "unet.text": 96, "unet.widths": [16],
                                            "clip.image.last": 8, "steps": 7})
    assert (changed.clip.text.width, changed.unet.text, changed.unet.widths, changed.steps) == (96, 96, (16,), 7)
    assert changed.clip.text.layers == LatentConfig().clip.text.layers and changed.shape == LatentConfig().shape
    with pytest.raises(ValueError, match=r"unet.text \(96\) clip.width \(64\)"):
        with_changes(LatentConfig(), {"unet.text": 96})


@given(T=st.integers(0, LARGEST), drop=st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 9),
       widths=st.lists(st.integers(0, LARGEST), min_size=1, max_size=LONGEST), name=st.text(max_size=LONGEST_TEXT))
def test_a_changed_configuration_survives_a_file(T, drop, widths, name):
    changed = with_changes(Outer(), {"T": T, "drop": drop, "widths": widths, "name": name})
    assert changed == Outer(T, float(drop), name, False, tuple(widths))
    assert config_from(Outer, json.loads(json.dumps(dataclasses.asdict(changed)))) == changed


def test_unfilled_weights_take_no_memory_and_are_no_more_than_allowed():
    rng = Unfilled(arrays=2, weights=10**15)
    assert parameter((10**4, 10**4, 10**6), 1.0, rng).shape == (10**4, 10**4, 10**6)
    parameter((3,), 0, rng)
    for used_up in (rng, Unfilled(arrays=5, weights=6)):
        with pytest.raises(TooManyWeights, match="more weights than there may be"):
            parameter((7,), 0, used_up)


@pytest.mark.parametrize("shape", [(28, 28, 1), (256, 4, 3), (4, 8, 3)])
def test_shapes_of_images(shape):
    check_shape(shape, 4)


@pytest.mark.parametrize("shape", [(28, 28), (30, 28, 1), (28, 30, 1), (0, 28, 1), (28, 260, 1), (28, 28, 0),
                                   (28, 28, 5), (28, 28, 1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4 of at most 256 and 1 channel or 3"):
        check_shape(shape, 4)


@pytest.mark.parametrize("change", [{"steps": 2 * 10**9}, {"T": 4097}, {"hidden": 64.0}])
def test_a_configuration_that_no_file_could_give_back_makes_no_system(change):
    """Without this, a model would be trained and saved, and its own file refused."""
    with pytest.raises(ValueError, match=f"^{next(iter(change))} "):
        DPM(replace(DPMConfig(), **change), None, np.random.default_rng(0))
