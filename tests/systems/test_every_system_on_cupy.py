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

# Of the default model, at batch 8: docs/gpu.md has a row for each.
MOST = {"step in float32": (249, 1), "step in float16": (265, 1)}      # launches, matrix products and fills; uploads
MOST_LAUNCHES_OF_AN_EVALUATION = 93                         # what one more call of the UNet adds to a sample


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of the processes that have a null GPU."""
    if reason := null_gpu.why_not():
        pytest.skip(reason)
    tests = Path(__file__).parents[1]
    folder = str(tmp_path_factory.mktemp("kernels"))
    return {"CUPY_CACHE_DIR": folder} | os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}


@pytest.fixture(scope="module")
def lines(environment) -> list[dict]:
    """What every_system.py printed."""
    done = subprocess.run([sys.executable, "-m", "support.null_gpu.every_system"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def default(lines) -> dict[str, dict[str, int]]:
    """What each work of the default model took, by kind."""
    assert not [line["error"] for line in lines if line["system"] == "default model" and "error" in line]
    return {line["work"]: line["seen"] for line in lines if line["system"] == "default model"}


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_it_makes_a_step_of_each_stage_and_draws(lines, name):
    mine = [line for line in lines if line["system"] == name]
    assert not [line["error"] for line in mine if "error" in line]
    assert all(line["seen"]["launch"] > 20 for line in mine)
    trained = [line["seen"].get("adamw", 0) for line in mine if line["work"] != "sample"]
    assert trained and set(trained) == {1}                  # each step updates the weights once
    assert len(mine) - len(trained) == (systems.system_class(name).options() is not None)


@pytest.mark.parametrize("work", MOST)
def test_a_step_of_the_default_model_takes_few_operations_and_uploads(default, work):
    seen, (operations, uploads) = default[work], MOST[work]
    assert 200 < sum(seen.get(kind, 0) for kind in ("launch", "product", "fill")) <= operations
    assert 0 < seen["upload"] <= uploads
    assert "download" not in seen and "wait" not in seen


@pytest.mark.parametrize("work", MOST)
def test_a_step_of_the_default_model_can_be_captured(default, work):
    """All of it but the batch: its noise, and the copy to the GPU."""
    step, captured = default[work], default[f"captured {work}"]
    assert captured["graph"] == captured["upload"] == captured["normal"] == 1
    assert captured["launch"] == step["launch"] and captured["fill"] == step["fill"]
    assert "product" not in captured and "library" not in captured and "wait" not in captured


def test_one_more_evaluation_of_the_unet_takes_few_launches(default):
    two, three = default["sample of 2 steps"], default["sample of 3 steps"]
    assert 60 < three["launch"] - two["launch"] <= MOST_LAUNCHES_OF_AN_EVALUATION
    assert three.get("product", 0) == two.get("product", 0) and three["wait"] == two["wait"]
    assert three["upload"] <= two["upload"] + 2             # the embedding of t, and alpha and sigma


# what a GPU refuses
SCRIPT = """
from support import null_gpu
null_gpu.install()
import cupy
import numpy as np
SOURCE = r'extern "C" __global__ void __launch_bounds__(256) f(float* x) { __shared__ float y[3000]; '
SOURCE += 'y[threadIdx.x] = x[0]; __syncthreads(); x[threadIdx.x] = y[threadIdx.x ^ 7]; }'
x, f = cupy.zeros(64, np.float32), cupy.RawKernel(SOURCE, "f")
assert cupy.asarray(np.arange(6.0)).get().tolist() == [0, 1, 2, 3, 4, 5]
with null_gpu.watching() as seen:
    f((2, 3), (256,), (x,))
    f.max_dynamic_shared_size_bytes = 232448 - 12000
    f((1,), (32,), (x,), shared_mem=232448 - 12000)
assert seen == {"launch": 2, "f": 2}, seen
for error, wrong in ((RuntimeError, lambda: f((1,), (257,), (x,))), (RuntimeError, lambda: f((1, 65536), (32,), (x,))),
                     (RuntimeError, lambda: setattr(f, "max_dynamic_shared_size_bytes", 232448 - 11999)),
                     (RuntimeError, lambda: f((1,), (32,), (x,), shared_mem=232448)),
                     (RuntimeError, lambda: cupy.RawModule(code=SOURCE).get_function("g")),
                     (cupy.cuda.compiler.CompileException, lambda: cupy.RawModule(code="f( {").compile()),
                     (TypeError, lambda: x + np.ones(64)), (TypeError, lambda: cupy.exp([1.0]))):
    try:
        wrong()
    except error as refused:
        print(type(refused).__name__)
    else:
        raise SystemExit("not refused")
"""


def test_the_null_gpu_refuses_what_a_gpu_refuses(environment):
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 8


# what a GPU refuses while a stream is captured; after that, there is no graph
CAPTURE = """
from support import null_gpu
null_gpu.install()
import cupy
import numpy as np
pool, stream, other = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
cupy.cuda.set_allocator(pool.malloc)
with stream:
    x = cupy.zeros((64, 64), np.float32)
    y, kept = x + x, x.copy()
    del y
    stream.begin_capture()
    with null_gpu.watching() as seen:
        y = x + x
        kept[...] = x
    graph = stream.end_capture()
    assert (seen["launch"], seen["copy"]) == (1, 1), seen
    with null_gpu.watching() as seen:
        graph.launch(stream)
    assert seen == {"graph": 1}, seen

def on_another_stream():
    with other:
        x.fill(1)

for wrong, by_cupy in ((lambda: cupy.asarray(np.ones(3)), True), (x.get, True), (lambda: x @ x, True),
                       (stream.synchronize, False), (on_another_stream, False), (lambda: cupy.empty(2**22), False)):
    with stream:
        cupy.empty(3), cupy.empty_like(x)                   # memory for what the first ones make, free again
        stream.begin_capture()
        try:
            wrong()
        except (RuntimeError, NotImplementedError) as error:
            print(type(error).__name__)
        try:
            stream.end_capture()
        except RuntimeError as error:
            assert "the capture failed" in str(error) and not by_cupy, error
        else:
            assert by_cupy
"""


def test_the_null_gpu_refuses_what_a_capture_refuses(environment):
    done = subprocess.run([sys.executable, "-c", CAPTURE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(done.stdout.split()) == 6
