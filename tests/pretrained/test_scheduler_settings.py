"""Every setting of scheduler_config.json is honoured as diffusers honours it, or refused in a sentence.

support/scheduler_settings.py is the table.  scheduler_settings.npz has the ends of diffusers' runs of six steps
(`PYTHONPATH=.:tests python tests/parity/test_parity_scheduler_settings.py` makes it).  Other numbers of steps are
compared where diffusers is installed.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.scheduler_settings import EQUAL, EULER, LEADING, OURS, SETTINGS, SOLVER, close, named, ours

from minidiff.errors import UserError
from minidiff.pretrained.spreads import beta_spread, exponential_spread


@cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("scheduler_settings.npz")) as file:
        return dict(zip(file["names"].tolist(), file["ends"], strict=True))


def distance(name, options) -> float:
    expected = goldens()[named(name, options)]
    return float(np.abs(ours(name, options, 6) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name, options, verdict", SETTINGS, ids=lambda v: str(v)[-60:])
def test_a_setting(name, options, verdict):
    if isinstance(verdict, str):
        with pytest.raises(UserError, match=verdict) as caught:
            ours(name, options, 6)
        assert "\n" not in str(caught.value)
    elif verdict is EQUAL:
        assert distance(name, options) <= close(name, options)
    else:
        assert verdict is OURS and distance(name, options) > 1e-3


def test_the_settings_make_a_difference():
    """Else the comparison would not see one that is ignored: euler's end, and its noise at the start."""
    plain = goldens()[EULER]
    for options in (LEADING, {"final_sigmas_type": "sigma_min"}, {"use_karras_sigmas": True},
                    {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}):
        assert np.abs(goldens()[named(EULER, options)] - plain).max() > 2e-4 * np.abs(plain).max(), options
    low = {"final_sigmas_type": "sigma_min"}
    assert np.abs(goldens()[named(SOLVER, low)] - goldens()[named(SOLVER, low | {"lower_order_final": False})]
                  ).max() > 1e-3


def test_spread_levels_by_hand():
    assert np.allclose(exponential_spread(16, 1, 5), [16, 8, 4, 2, 1])
    found = beta_spread(12, 2, 101)                         # the distribution is symmetric: 7 is its middle
    assert np.allclose([found[0], found[50], found[-1]], [12, 7, 2]) and np.allclose(found + found[::-1], 14)
    assert (np.diff(found) < 0).all() and found[0] - found[1] < (found[50] - found[51]) / 3
