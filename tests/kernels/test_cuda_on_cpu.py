"""CUDA on a CPU computes what CUDA defines, and reports the errors of a kernel with their lines."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import fake_cupy
from support.cuda_on_cpu import LaunchError, Program

pytestmark = fake_cupy.needs_compiler

SOURCE = """\
extern "C" __global__ void where(int* x) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    x[block * blockDim.x * blockDim.y * blockDim.z + thread] = thread + 1000 * block;
}
extern "C" __global__ void reverse(const float* x, float* y, int shift) {
    __shared__ float tile[64];
    extern __shared__ float4 dynamic_shared[];
    float* more = reinterpret_cast<float*>(dynamic_shared);
    tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    more[threadIdx.x] = tile[threadIdx.x];
    BARRIER
    y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x] + more[63 - threadIdx.x + shift];
}
extern "C" __global__ void shuffles(const int* x, int* y) {
    const int i = threadIdx.x, n = blockDim.x;
    y[i] = __shfl_sync(0xffffffffu, x[i], 5);
    y[n + i] = __shfl_xor_sync(0xffffffffu, x[i], 3);
    y[2 * n + i] = __shfl_down_sync(0xffffffffu, x[i], 2);
    y[3 * n + i] = __shfl_up_sync(0xffffffffu, x[i], 2);
    y[4 * n + i] = __shfl_xor_sync(0xffffffffu, x[i], 4, 8);
    y[5 * n + i] = int(__ballot_sync(0xffffffffu, x[i] > 10));
    y[6 * n + i] = __any_sync(0xffffffffu, x[i] == 3) + 2 * __all_sync(0xffffffffu, x[i] > 0);
    if (i % 32 < 16) y[7 * n + i] = __shfl_xor_sync(0x0000ffffu, x[i], 1);
    else y[7 * n + i] = __shfl_xor_sync(0xffff0000u, x[i], 2);
}
extern "C" __global__ void total(const float* x, float* sum) {
    atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
}
extern "C" __global__ void unwritten(float* y) {
    __shared__ float tile[32];
    if (threadIdx.x) tile[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void some_stay_away(float* y) {
    if (threadIdx.x < 3) __syncthreads();
    else y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
}
extern "C" __global__ void two_barriers() {
    if (threadIdx.x < 3) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void beyond(float* y) {
    extern __shared__ float4 dynamic_shared[];
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    tile[threadIdx.x + 1] = 0;
}
extern "C" __global__ void blocks_meet(float* y) { if (threadIdx.x == 0) y[0] = blockIdx.x; }
"""
LINES = {text.strip(): number for number, text in enumerate(SOURCE.splitlines(), start=1)}


def program(*, barrier: str = "__syncthreads();", sanitize: str | None = None) -> Program:
    return Program(SOURCE, {"BARRIER": barrier}, name="lesson.cu", sanitize=sanitize)


def test_two_threads_may_launch():
    """One launch waits for the other, since the threads of both would use the same stacks."""
    reverse, x = program()["reverse"], np.arange(64 * 50, dtype=np.float32)
    expected = 2 * x.reshape(50, 64)[:, ::-1].ravel()

    def launches(_):
        y = np.zeros_like(x)
        for _ in range(20):
            reverse(50, 64, [x, y, np.int32(0)], shared=256)
        return y
    with ThreadPoolExecutor(2) as pool:
        for y in pool.map(launches, range(2)):
            np.testing.assert_array_equal(y, expected)


@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
def test_every_thread_of_every_block_runs_once(grid, block):
    x = np.full(np.prod(grid) * np.prod(block), -1, np.int32)
    program()["where"](grid, block, [x])
    blocks, threads = np.indices((np.prod(grid), np.prod(block)))
    np.testing.assert_array_equal(x, (threads + 1000 * blocks).ravel())


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_shared_memory_and_a_barrier(order):
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    y = np.empty_like(x)
    program()["reverse"](3, 64, [x, y, np.int32(0)], shared=256, order=order)
    np.testing.assert_array_equal(y, 2 * x[:, ::-1])


@pytest.mark.parametrize("n", [32, 96])
def test_shuffles_and_votes(n):
    x = np.random.default_rng(0).permutation(n).astype(np.int32)
    y = np.empty((8, n), np.int32)
    program()["shuffles"](1, n, [x, y])
    i = np.arange(n)
    warps, lane = x.reshape(-1, 32), i % 32
    np.testing.assert_array_equal(y[0], x[i - lane + 5])
    np.testing.assert_array_equal(y[1], x[i ^ 3])
    np.testing.assert_array_equal(y[2], np.where(lane < 30, x[np.minimum(i + 2, n - 1)], x))
    np.testing.assert_array_equal(y[3], np.where(lane >= 2, x[i - 2], x))
    np.testing.assert_array_equal(y[4], x[i ^ 4])
    votes = ((warps > 10).astype(np.int64) << np.arange(32)).sum(axis=1)
    np.testing.assert_array_equal(y[5].view(np.uint32), np.repeat(votes, 32))
    np.testing.assert_array_equal(y[6], np.repeat((warps == 3).any(axis=1) + 2 * (warps > 0).all(axis=1), 32))
    np.testing.assert_array_equal(y[7], np.where(lane < 16, x[i ^ 1], x[i ^ 2]))


def test_atomics_add_up_over_blocks():
    x, total = np.arange(96, dtype=np.float32), np.zeros(1, np.float32)
    program()["total"](3, 32, [x, total])
    assert total[0] == x.sum()


# --- what it shows of a kernel that is wrong ----------------------------------------------------------------

def test_a_read_of_shared_memory_that_nobody_wrote_is_nan():
    y = np.zeros(32, np.float32)
    for _ in range(2):                                      # the values of an earlier block are gone, too
        program()["unwritten"](1, 32, [y])
        np.testing.assert_array_equal(np.isnan(y), [True] + [False] * 31)


def test_a_missing_barrier_shows_in_another_order():
    x, forward, back = np.arange(64, dtype=np.float32), np.empty(64, np.float32), np.empty(64, np.float32)
    for y, order in ((forward, 0), (back, 1)):
        program(barrier="")["reverse"](1, 64, [x, y, np.int32(0)], shared=256, order=order)
    assert (forward != back).any()


def test_blocks_that_meet_show_in_another_order():
    y = np.empty((2, 1), np.float32)
    for order in (0, 1):
        program()["blocks_meet"](3, 32, [y[order]], order=order)
    np.testing.assert_array_equal(y, [[2], [0]])


def refused(kernel: str, *args, sanitize: str | None = None, barrier: str = "__syncthreads();", **more) -> str:
    with pytest.raises(LaunchError) as error:
        program(sanitize=sanitize, barrier=barrier)[kernel](1, 64, args, **more)
    return str(error.value)


def test_a_deadlock_names_who_waits_and_where():
    said = refused("some_stay_away", np.zeros(64, np.float32))
    shuffle = LINES["else y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);"]
    assert "deadlock in block (0, 0, 0)" in said
    assert f"thread (0, 0, 0) waits for the block in line {shuffle - 1}" in said
    assert f"thread (3, 0, 0) waits for its warp in line {shuffle}" in said


def test_two_barriers_are_not_one():
    line = LINES["extern \"C\" __global__ void two_barriers() {"]
    assert f"different __syncthreads(), in lines {line + 1} and {line + 3}" in refused("two_barriers")


def test_a_write_past_the_dynamic_shared_memory():
    assert "past the dynamic shared memory" in refused("beyond", np.zeros(1, np.float32), shared=256)


def test_a_block_of_too_many_threads_and_a_wrong_argument():
    with pytest.raises(LaunchError, match="at most 1024 threads"):
        program()["blocks_meet"](1, 1025, [np.zeros(1, np.float32)])
    with pytest.raises(TypeError, match="not int"):
        program()["reverse"](1, 64, [3])
    with pytest.raises(KeyError, match="no kernel 'sideways', only where, reverse"):
        program()["sideways"]


def test_what_does_not_compile_is_said_with_its_line():
    with pytest.raises(SyntaxError, match=r"wrong\.cu:2"):
        Program('extern "C" __global__ void f() {\n  oops;\n}', name="wrong.cu")["f"](1, 1, [])


# --- the sanitizers -----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_sanitizers_find_nothing_where_nothing_is_wrong():
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    for sanitize in ("address", "thread", "debug"):
        y = np.zeros_like(x)
        program(sanitize=sanitize)["reverse"](3, 64, [x, y, np.int32(0)], shared=256)
        np.testing.assert_array_equal(y, 2 * x[:, ::-1])


def test_the_address_sanitizer_names_the_line():
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    load = LINES["tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];"]
    store = LINES["y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x] + more[63 - threadIdx.x + shift];"]
    for args, line, what in (((x[:60], y, 0), load, "heap-buffer-overflow"), ((x, y[:60], 0), store, "WRITE"),
                             ((x, y, 1), store, "use-after-poison")):          # of dynamic shared memory
        said = refused("reverse", *args[:2], np.int32(args[2]), sanitize="address", shared=256)
        assert f"lesson.cu:{line}" in said and what in said


def test_the_thread_sanitizer_names_the_line_of_a_race():
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    said = refused("reverse", x, y, np.int32(0), sanitize="thread", barrier="", shared=256)
    store = LINES["y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x] + more[63 - threadIdx.x + shift];"]
    assert "data race" in said and f"lesson.cu:{store}" in said


def test_a_launch_in_a_debugger(tmp_path):
    """What docs/cuda_on_cpu.md shows, without the debugger: a program, and a file with one launch."""
    case = tmp_path / "launch"
    debug = program(sanitize="debug")
    debug.write_launch(case, "reverse", 1, 64, [np.ones(64, np.float32), np.zeros(64, np.float32), np.int32(0)], 256)
    assert subprocess.run([debug.path, case]).returncode == 0
    assert np.frombuffer(Path(case).read_bytes()[-64 * 4 - 20:-20], np.float32).tolist() == [2.0] * 64
    done = subprocess.run([debug.path, tmp_path / "no such launch"], capture_output=True, text=True)
    assert done.returncode == 2 and "no launch" in done.stderr
