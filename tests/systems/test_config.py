"""Configurations from files of strangers: complete, of the right types and sizes, or refused."""

import dataclasses
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from support.small_systems import CONFIGS

from minidiff.systems.config import LARGEST, LONGEST, LONGEST_TEXT, ZeroWeights, check_shape, config_from


@dataclass(frozen=True)
class Inner:
    heads: int = 2


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
    ({"T": 3.0}, ValueError, "T is '3.0'"),
    ({"T": True}, ValueError, "T is 'True'"),
    ({"wide": 1}, ValueError, "wide is '1'"),
    ({"T": -1}, ValueError, "T is '-1'"),
    ({"T": LARGEST + 1}, ValueError, "T is '4097'"),
    ({"drop": "0.1"}, ValueError, "drop is '0.1'"),
    ({"name": "x" * (LONGEST_TEXT + 1)}, ValueError, "name is 'x{40}'"),
    ({"widths": [8, "16"]}, ValueError, "widths is '16'"),
    ({"widths": [8, LARGEST + 1]}, ValueError, "widths is '4097'"),
    ({"widths": 8}, TypeError, "not iterable"),
])
def test_anything_else_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        config_from(Outer, values)


def test_tuples_are_cut_at_their_longest():
    assert len(config_from(Outer, {"widths": [8] * 1000}).widths) == LONGEST


def test_a_file_gets_no_more_memory_than_it_holds_weights():
    weights = ZeroWeights(10)
    assert not weights.standard_normal((2, 3), np.float32).any()
    assert weights.standard_normal((4,), np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="more weights than the file holds"):
        weights.standard_normal((1,), np.float32)
    with pytest.raises(ValueError, match="more weights"):       # before any memory is taken
        ZeroWeights(10).standard_normal((10**9, 10**9), np.float32)


@pytest.mark.parametrize("shape", [(28, 28, 1), (256, 4, 4), (4, 8, 3)])
def test_shapes_of_images(shape):
    check_shape(shape, 4)


@pytest.mark.parametrize("shape", [(28, 28), (30, 28, 1), (28, 30, 1), (0, 28, 1), (28, 260, 1), (28, 28, 0),
                                   (28, 28, 5), (28, 28, 1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4 of at most 256 and 1 to 4 channels"):
        check_shape(shape, 4)
