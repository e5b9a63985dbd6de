"""Each row of support/scheduler_settings.py against diffusers; run as a program it makes the goldens of six steps."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from support.scheduler_settings import (
    CLASSES,
    EQUAL,
    OF_LATENTS,
    OURS,
    SD,
    SETTINGS,
    close,
    named,
    network,
    numbers,
    ours,
)

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from parity.diffusers_runs import end_of_run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")           # other programs' own
OUT = Path(__file__).parents[1] / "pretrained" / "scheduler_settings.npz"
# these change nothing without a setting that is refused, or are given in all rows
WITH_OTHERS = {"dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift", "time_shift_type",
               "shift_terminal", "solver_p", "beta_start", "beta_end"}


def theirs(name: str, options: dict, steps: int) -> np.ndarray:
    scheduler = getattr(diffusers, name)(**(SD | OF_LATENTS.get(name, {}) | options))
    return end_of_run(scheduler, steps, *numbers(steps), network)


@pytest.mark.parametrize("steps", [2, 6, 16])
@pytest.mark.parametrize("name, options", [(name, options) for name, options, verdict in SETTINGS if verdict is EQUAL],
                         ids=lambda v: str(v)[-60:])
def test_a_setting(name, options, steps):
    expected = theirs(name, options, steps)
    assert np.abs(ours(name, options, steps) - expected).max() <= close(name, options) * np.abs(expected).max()


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_of_a_class_has_a_row(name):
    rows = {key for cls, options, _ in SETTINGS if cls == name for key in options}
    assert set(inspect.signature(getattr(diffusers, name)).parameters) - WITH_OTHERS <= rows


if __name__ == "__main__":
    ends = {named(name, options): theirs(name, options, 6) for name, options, verdict in SETTINGS
            if verdict in (EQUAL, OURS)}
    np.savez_compressed(OUT, names=np.array(list(ends)), ends=np.stack(list(ends.values())))
