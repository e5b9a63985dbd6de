"""Every system trains and draws with the real CuPy, on a GPU that does not exist; and how many operations that takes.

The stand-in for CuPy, on which the other tests run, may allow what CuPy refuses.  Here CuPy itself is asked, and NVRTC
compiles every kernel.  Nothing is computed: the values are for test_every_system_on_a_gpu.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import null_gpu

from minidiff import systems

pytestmark = pytest.mark.slow

# Of the default model, at batch 8; docs/gpu.md says what they are made of.
MOST_OPERATIONS = {"step in float32": 255, "step in float16": 275}     # launches, matrix products and fills
MOST_UPLOADS = 10                                           # of a step
MOST_OF_AN_EVALUATION = {"launch": 109, "upload": 3}        # of one more call of the UNet in sampling


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    """What every_system.py printed."""
    if reason := null_gpu.why_not():
        pytest.skip(reason)
    tests = Path(__file__).parents[1]
    folder = str(tmp_path_factory.mktemp("kernels"))
    env = {"CUPY_CACHE_DIR": folder} | os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    done = subprocess.run([sys.executable, "-m", "support.null_gpu.every_system"], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def default(lines) -> dict[str, dict[str, int]]:
    """What each work of the default model took, by kind."""
    return {line["work"]: line["seen"] for line in lines if line["system"] == "default model"}


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_it_makes_a_step_of_each_stage_and_draws(lines, name):
    mine = [line for line in lines if line["system"] == name]
    assert not [line["error"] for line in mine if "error" in line]
    assert all(line["seen"]["launch"] > 20 for line in mine)
    trained = [line["seen"].get("adamw", 0) for line in mine if line["work"] != "sample"]
    assert trained and set(trained) == {1}                  # each step updates the weights once
    assert len(mine) - len(trained) == (systems.system_class(name).options() is not None)


@pytest.mark.parametrize("work", MOST_OPERATIONS)
def test_a_step_of_the_default_model_takes_few_operations_and_uploads(default, work):
    seen = default[work]
    assert 200 < sum(seen.get(kind, 0) for kind in ("launch", "product", "fill")) <= MOST_OPERATIONS[work]
    assert 0 < seen["upload"] <= MOST_UPLOADS
    assert "download" not in seen and "wait" not in seen


def test_one_more_evaluation_of_the_unet_takes_few_operations_and_uploads(default):
    two, three = default["sample of 2 steps"], default["sample of 3 steps"]
    for kind, most in MOST_OF_AN_EVALUATION.items():
        assert 0 < three[kind] - two[kind] <= most
    assert three.get("product", 0) == two.get("product", 0) and three["wait"] == two["wait"]
