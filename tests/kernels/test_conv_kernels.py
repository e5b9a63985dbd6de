"""The three sums of convolution, every version of kernels/conv_*.cu, run on this CPU."""

import functools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import cuda_on_cpu, fake_cupy

from minidiff.engine import conv
from minidiff.engine.cuda import conv as conv_cuda
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.tensor import Tensor, gradients

pytestmark = fake_cupy.needs_device

# The rounding error of each element type, half a unit in the last place; sums are in float32 or float64.
UNIT = {"float32": 2**-24, "float64": 2**-53, "float16": 2**-11, "bfloat16": 2**-8}
TF32 = 2**-11
VERSIONS = [(number, dtype) for number, source in cuda.versions("conv").items() for dtype in UNIT
            if source.takes_dtype(dtype, tf32=True)]


@pytest.fixture
def cupy(monkeypatch, request):
    cupy = fake_cupy.install(monkeypatch)
    version = getattr(request.node, "callspec", None) and request.node.callspec.params.get("version")
    if version:
        source, card = cuda.versions("conv")[version], cupy.cuda.Device().compute_capability
        if not source.runs_on(card):
            pytest.skip(f"{source.path.name} needs {source.needs}, and this card is sm_{card}")
    return cupy


# --- the same sums, an independent calculation ------------------------------------------------------------------

def views(x, w_shape, y_shape, stride, padding):
    """For each tap (m, n), the pixels of the padded x that it takes for the pixels of y: (B, Ho, Wo, C)."""
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for m, n in np.ndindex(w_shape[:2]):
        yield (m, n), padded[:, m:, n:][:, ::stride, ::stride][:, :y_shape[1], :y_shape[2]]


def plain_y(x, w, y_shape, stride, padding):
    w = np.asarray(w, np.float64)
    return sum(np.einsum("bijc,cd->bijd", view, w[tap]) for tap, view in views(x, w.shape, y_shape, stride, padding))


def plain_dx(dy, w, x_shape, stride, padding):
    """By the transpose: each tap adds to the pixels of x that `plain_y` reads."""
    dy, w = np.asarray(dy, np.float64), np.asarray(w, np.float64)
    padded = np.zeros((x_shape[0], x_shape[1] + 2 * padding, x_shape[2] + 2 * padding, x_shape[3]))
    for m, n in np.ndindex(w.shape[:2]):
        padded[:, m:, n:][:, ::stride, ::stride][:, :dy.shape[1], :dy.shape[2]] += dy @ w[m, n].T
    return padded[:, padding:, padding:][:, :x_shape[1], :x_shape[2]]


def plain_dw(x, dy, w_shape, stride, padding):
    dw = np.zeros(w_shape)
    for tap, view in views(x, w_shape, dy.shape, stride, padding):
        dw[tap] = np.einsum("bijc,bijd->cd", view, np.asarray(dy, np.float64))
    return dw


def close(found, expected, sizes, terms: int, dtype: str, tf32: bool = False) -> None:
    """|found - expected| is within the bound of rounding.

    sizes: the sum of the terms' absolute values, an array.  A sum of n products in arithmetic of unit u errs by at most
    (n + 1) u sizes, in any order; rounding both factors to TF32 adds 2 u_tf32; the result is rounded to its type.
    """
    allowed = sizes * ((terms + 2) * UNIT["float64" if dtype == "float64" else "float32"] + (2.1 * TF32 if tf32 else 0))
    allowed += np.abs(expected) * 1.01 * UNIT[dtype] + (2**-25 if dtype == "float16" else 1e-37)
    wrong = ~(np.abs(np.asarray(found, np.float64) - expected) <= allowed)           # NaN is wrong
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, the first at {np.argwhere(wrong)[0]}"


def silu(x):
    return x / (1 + np.exp(-x))


# --- shapes that are awkward -----------------------------------------------------------------------------------

AWKWARD = [                                                 # (x_shape, w_shape, stride, padding), splits
    (((1, 1, 1, 1), (1, 1, 1, 1), 1, 0), None),
    (((2, 5, 6, 12), (3, 3, 12, 20), 1, 1), None),          # channels in fours, several tiles of k
    (((2, 7, 5, 7), (3, 3, 7, 33), 2, 1), 2),               # and not
    (((1, 7, 4, 8), (2, 3, 8, 4), 3, 2), 3),                # no tap reaches some pixels of x
    (((1, 5, 5, 4), (1, 1, 4, 4), 2, 0), None),             # here no tap reaches most of them
    (((3, 3, 1, 3), (3, 1, 3, 5), 1, 0), 20),               # more shares than there are steps of k
    (((1, 2, 3, 56), (3, 3, 56, 72), 1, 1), 1)]             # longer than a ring of stages, more than 64 columns


@st.composite
def shapes(draw, tile_m: int, tile_n: int, most: int = 30_000):
    """x_shape, w_shape, stride, padding, with about `most` products."""
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (2, 3), (3, 1)]))
    stride, padding = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(0, 2))
    few = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16])
    edges = st.sampled_from([tile_n - 1, tile_n, tile_n + 1])
    C, D = draw(st.tuples(few, edges) | st.tuples(edges, few) | st.tuples(few, few) | st.tuples(few, few))
    pixels = max(8, min(most // (C * D * math.prod(kernel)), 3 * tile_m))
    H = draw(st.integers(max(1, kernel[0] - 2 * padding), max(kernel[0], min(13, math.isqrt(pixels)))))
    W = draw(st.integers(max(1, kernel[1] - 2 * padding), max(kernel[1], min(17, pixels // H))))
    B = draw(st.integers(1, max(1, min(5, pixels // (H * W)))))
    return (B, H, W, C), (*kernel, C, D), stride, padding


def y_shape_of(x_shape, w_shape, stride, padding):
    return (x_shape[0], *((n + 2 * padding - k) // stride + 1
                          for n, k in zip(x_shape[1:3], w_shape[:2], strict=True)), w_shape[3])


def check_all(cupy, version, dtype, x_shape, w_shape, stride, padding, splits=None, seed=0):
    """Every sum of one shape, with and without bias and SiLU, against float64."""
    rng, exact = np.random.default_rng(seed), fake_cupy.dtype_of(dtype)
    x, w, bias = (rng.standard_normal(shape).astype(exact) for shape in (x_shape, w_shape, w_shape[3:]))
    y_shape = y_shape_of(x_shape, w_shape, stride, padding)
    dy = rng.standard_normal(y_shape).astype(exact)
    tf32 = dtype == "float32" and "float32" not in cuda.versions("conv")[version].takes
    way = {"version": version, "splits": splits}
    on_card = [cupy.asarray(a) for a in (x, w, bias, dy)]
    x_, w_, bias_, dy_ = on_card

    y, sizes = (plain_y(f(np.asarray(x, float)), f(np.asarray(w, float)), y_shape, stride, padding)
                for f in (np.asarray, np.abs))
    terms = math.prod(w_shape[:3])
    bound = {"dtype": dtype, "tf32": tf32}
    found = conv_cuda.correlate(x_, w_, stride, padding, **way)
    assert found.dtype == exact and found.shape == y_shape
    close(found.get(), y, sizes, terms, **bound)
    y, sizes = y + np.asarray(bias, float), sizes + np.abs(np.asarray(bias, float))
    # SiLU's slope is at most 1.1, and the fast exp errs by some units
    close(conv_cuda.correlate(x_, w_, stride, padding, bias_, True, **way).get(), silu(y), 1.1 * sizes, terms + 10,
          **bound)

    dx, sizes = (plain_dx(f(np.asarray(dy, float)), f(np.asarray(w, float)), x_shape, stride, padding)
                 for f in (np.asarray, np.abs))
    found = conv_cuda.correlate_dx(dy_, w_, x_shape, stride, padding, **way)
    assert found.dtype == exact and found.shape == x_shape
    close(found.get(), dx, sizes, math.prod(w_shape[:2]) * w_shape[3], **bound)

    dw, sizes = (plain_dw(f(np.asarray(x, float)), f(np.asarray(dy, float)), w_shape, stride, padding)
                 for f in (np.asarray, np.abs))
    found = conv_cuda.correlate_dw(x_, dy_, w_shape, stride, padding, **way)
    assert found.dtype == exact and found.shape == w_shape
    close(found.get(), dw, sizes, math.prod(y_shape[:3]), **bound)


@pytest.mark.slow
@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_every_sum_of_every_version_against_float64(cupy, version, dtype):
    tiles = [cuda.versions("conv")[version].constants[name] for name in ("TILE_M", "TILE_N")]

    @settings(max_examples=6 if dtype == "float32" else 3, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(shapes(*tiles), st.sampled_from([None, None, 1, 2, 3]), st.integers(0, 2**32 - 1))
    def check(shape, splits, seed):
        check_all(cupy, version, dtype, *shape, splits, seed)

    for shape, splits in AWKWARD:
        check_all(cupy, version, dtype, *shape, splits)
    check()


@pytest.mark.slow
@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_every_sum_of_every_version_on_more_shapes(cupy, version, dtype):
    tiles = [cuda.versions("conv")[version].constants[name] for name in ("TILE_M", "TILE_N")]

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(shapes(*tiles, most=400_000), st.sampled_from([None, None, 1, 2, 5]), st.integers(0, 2**32 - 1))
    def check(shape, splits, seed):
        check_all(cupy, version, dtype, *shape, splits, seed)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_shapes_of_our_unets(cupy, version, dtype):
    for size, C, D, stride in (14, 64, 64, 1), (7, 128, 128, 1), (14, 64, 128, 2), (28, 1, 32, 1), (8, 96, 160, 1):
        check_all(cupy, version, dtype, (2, size, size, C), (3, 3, C, D), stride, 1)


# --- through the layers above ------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (3, 0)])
def test_conv2d_and_its_transpose_on_the_gpu_are_those_on_the_cpu(cupy, stride, padding):
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(shape) for shape in ((2, 7, 6, 5), (3, 2, 5, 4), (4,)))
    for f, arrays in (conv.conv2d, (x, w, bias)), (conv.conv_transpose2d, (x[..., :4], w, bias[[0, 1, 2, 3, 0]])):
        results = []
        for place in np.asarray, cupy.asarray:
            leaves = [Tensor(place(a), requires_grad=True) for a in arrays]
            y = f(*leaves, stride=stride, padding=padding)
            y.backward(place(np.random.default_rng(1).standard_normal(y.shape)))
            results.append([y.data, *(leaf.grad for leaf in leaves)])
        for on_cpu, on_gpu in zip(*results, strict=True):
            fake_cupy.assert_same(on_gpu, on_cpu)


def test_conv2d_has_its_bias_from_the_kernel(cupy, monkeypatch):
    launched = []
    call = cuda.Kernel.__call__
    monkeypatch.setattr(cuda.Kernel, "__call__", lambda self, *args, **kwargs: (
        launched.append(self.name), call(self, *args, **kwargs))[1])
    x, w, bias = (Tensor(cupy.zeros(shape, dtype=np.float32)) for shape in ((1, 4, 4, 2), (3, 3, 2, 3), (3,)))
    conv.conv2d(x, w, bias, padding=1)
    assert launched == ["conv_forward"]


@pytest.mark.parametrize("op", [conv.conv2d, conv.conv_transpose2d])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_a_batch_of_no_images_gives_none_and_zeros_for_the_weights(cupy, op, kernel):
    """As on the CPU."""
    results = []
    for place in np.asarray, cupy.asarray:
        x, w, bias = (Tensor(place(np.ones(shape, np.float32)), requires_grad=True)
                      for shape in ((0, 4, 4, 2), (*kernel, 2, 2), (2,)))
        y = op(x, w, bias, stride=2)
        results.append([y.data, *gradients(y, [x, w, bias], place(np.ones(y.shape, np.float32)))])
    for on_cpu, on_gpu in zip(*results, strict=True):
        fake_cupy.assert_same(on_gpu, on_cpu)
    assert not any(np.any(a) for a in results[0])


# --- layouts, order, shares of k ----------------------------------------------------------------------------------

def off_by_one(cupy, a):
    """The same numbers at an address where vector loads are not allowed."""
    return cupy.asarray(np.concatenate([np.zeros(1, a.dtype), a.ravel()]))[1:].reshape(a.shape)


@pytest.mark.parametrize("version", cuda.versions("conv"))
def test_arrays_of_any_strides_and_address(cupy, version):
    rng, dtype = np.random.default_rng(0), cuda.versions("conv")[version].takes[0].replace("tf32", "float32")
    x, w, dy, bias = (rng.standard_normal(shape).astype(dtype)
                      for shape in ((2, 5, 4, 8), (3, 3, 8, 4), (2, 5, 4, 4), (4,)))
    ways = [lambda a: cupy.asarray(a),
            lambda a: off_by_one(cupy, a),
            lambda a: cupy.asarray(a.swapaxes(0, -1).copy()).swapaxes(0, -1),
            lambda a: cupy.asarray(np.repeat(a, 2, axis=-1))[..., ::2],
            lambda a: cupy.asarray(a[::-1].copy())[::-1]]
    results = [(conv_cuda.correlate(way(x), way(w), 1, 1, way(bias), version=version).get(),
                conv_cuda.correlate_dx(way(dy), way(w), x.shape, 1, 1, version=version).get(),
                conv_cuda.correlate_dw(way(x), way(dy), w.shape, 1, 1, version=version).get()) for way in ways]
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert np.array_equal(found, expected)
    assert off_by_one(cupy, x).data.ptr % 16                # otherwise this would show nothing


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("version", cuda.versions("conv"))
def test_the_order_of_threads_changes_no_bit(cupy, monkeypatch, version):
    source = cuda.versions("conv")[version]
    dtype, launch = source.takes[0].replace("tf32", "float32"), cuda_on_cpu.Program.launch
    M, N = (source.constants[name] for name in ("TILE_M", "TILE_N"))
    rng, results = np.random.default_rng(0), []
    C, rows = min(N, 33) + 3, M // 9 + 1
    x, w, dy = (cupy.asarray(rng.standard_normal(shape).astype(dtype))
                for shape in ((1, rows, 9, C), (3, 3, C, 5), (1, rows, 9, 5)))
    for order in 0, 1, 2:
        monkeypatch.setattr(cuda_on_cpu.Program, "launch", lambda self, kernel, grid, block, args, shared=0, _=0,
                            order=order: launch(self, kernel, grid, block, args, shared, order))
        results.append((conv_cuda.correlate(x, w, 1, 1, version=version).get(),
                        conv_cuda.correlate_dx(dy, w, x.shape, 1, 1, version=version).get(),
                        conv_cuda.correlate_dw(x, dy, w.shape, 1, 1, version=version, splits=2).get()))
    for result in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("version", cuda.versions("conv"))
def test_infinity_reaches_its_neighbours_only(cupy, version):
    """Terms beyond the end of a sum must be zero, and 0 inf is NaN: so both factors must be zeros there."""
    dtype = cuda.versions("conv")[version].takes[0].replace("tf32", "float32")
    x, w = np.ones((1, 6, 6, 5), dtype), np.ones((3, 3, 5, 3), dtype)
    x[0, 0, 0, 0] = np.inf
    near = np.zeros((1, 6, 6, 1), bool)
    near[0, :2, :2] = True
    y = conv_cuda.correlate(cupy.asarray(x), cupy.asarray(w), 1, 1, version=version).get()
    assert np.array_equal(y == np.inf, np.broadcast_to(near, y.shape)) and np.isfinite(y[~near[..., 0]]).all()
    dx = conv_cuda.correlate_dx(cupy.asarray(x), cupy.asarray(w.swapaxes(2, 3)), y.shape, 1, 1, version=version).get()
    assert np.array_equal(dx, y)                            # a kernel of ones equals its mirror image
    dy = np.ones(y.shape, dtype)
    dw = conv_cuda.correlate_dw(cupy.asarray(x), cupy.asarray(dy), w.shape, 1, 1, version=version).get()
    assert np.isinf(dw[:2, :2, 0]).all() and np.isfinite(dw[..., 1:, :]).all() and np.isfinite(dw[2]).all()


def planned(kernel: str, version: int | None, x_shape: tuple[int, ...], D: int):
    """The plan of a 3 x 3 convolution in float16 on 132 multiprocessors of 228 KiB, by the version or the best one."""
    sources = conv_cuda._sources("float16", None) if version is None else (cuda.versions("conv")[version],)
    return conv_cuda._plan(kernel, sources, x_shape, (3, 3, x_shape[3], D), 1, 1, None, (132, 228 << 10))


@fake_cupy.of_the_stand_in
def test_a_small_image_with_a_long_sum_is_shared_among_blocks_and_a_large_one_is_not(cupy):
    def plan(kernel, x_shape, D):
        return planned(kernel, 3, x_shape, D)
    small, large = (2, 8, 8, 1280), (16, 64, 64, 320)
    for kernel in "conv_forward", "conv_dx":
        assert plan(kernel, small, 1280).splits > 3 and plan(kernel, small, 1280).kernel == kernel + "_part"
        assert plan(kernel, large, 320).splits == 1 and plan(kernel, large, 320).kernel == kernel
    dw = plan("conv_dw", (128, 14, 14, 64), 64)
    assert 132 <= math.prod(dw.grid) and dw.splits * dw.results <= conv_cuda.MOST_PARTIALS


@fake_cupy.of_the_stand_in
def test_wide_tiles_are_for_sums_that_fill_the_card(cupy):
    """Those of the default model's small images do not, whose tiles of version 6 are four times as many."""
    for kernel in "conv_forward", "conv_dx", "conv_dw":
        for x_shape, D, number in (((8, 7, 7, 128), 128, 6), ((32, 7, 7, 128), 128, 6), ((64, 64, 64, 64), 64, 6),
                                   ((16, 64, 64, 320), 320, 7), ((16, 32, 32, 640), 640, 7)):
            plan, six = planned(kernel, None, x_shape, D), planned(kernel, 6, x_shape, D)
            assert plan.source.number == number and plan.cost <= six.cost, (kernel, x_shape)
    # 1568 rows and 128 columns
    assert math.prod(planned("conv_forward", None, (32, 7, 7, 128), 128).grid) >= 66
    assert [source.number for source in conv_cuda._sources("float16", 7)] == [7]            # as asked
    assert [source.number for source in conv_cuda._sources("float32", None)] == [3]


@fake_cupy.of_the_stand_in
def test_one_block_of_wide_tiles_fills_a_multiprocessor(cupy):
    """132 tiles on 132 multiprocessors: two blocks for each tile would only take turns."""
    plan = planned("conv_forward", 7, (132, 16, 16, 1280), 128)
    assert math.prod(plan.grid) == 132 and plan.splits == 1
    assert conv_cuda.Work(132, 180, plan.results, 132, fill=2).best_splits(512) > 1
    # a step of a block of version 7 is three of the unit: the model's costs are in one currency
    one, three = (conv_cuda.Work(10, 100, 10**6, 132, fill=1, step=step) for step in (1, 3))
    assert three.cost(1) == 3 * one.cost(1) and three.best_splits(512) > one.best_splits(512)


@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", [6, 7])
def test_sums_longer_than_the_ring_of_stages_on_every_square_of_a_tile(cupy, version, splits):
    """Whole numbers, so exact: 162 rows, 72 columns, and k up to 648; the gradient to w has 504 rows."""
    rng, way = np.random.default_rng(0), {"version": version, "splits": splits}
    x, w, dy = (rng.integers(-1, 2, shape) for shape in ((2, 9, 9, 56), (3, 3, 56, 72), (2, 9, 9, 72)))
    x_, w_, dy_ = (cupy.asarray(a.astype(np.float16)) for a in (x, w, dy))
    for found, exact in ((conv_cuda.correlate(x_, w_, 1, 1, **way), plain_y(x, w, dy.shape, 1, 1)),
                         (conv_cuda.correlate_dx(dy_, w_, x.shape, 1, 1, **way), plain_dx(dy, w, x.shape, 1, 1)),
                         (conv_cuda.correlate_dw(x_, dy_, w.shape, 1, 1, **way), plain_dw(x, dy, w.shape, 1, 1))):
        np.testing.assert_array_equal(found.get(), exact)


@pytest.mark.parametrize("multiprocessor, stages", [(164, 4), (228, 4), (100, 3), (64, 2)])
def test_two_blocks_fit_on_a_multiprocessor_with_as_many_stages_as_possible(multiprocessor, stages):
    """sm_80; sm_90 and sm_100; sm_86, sm_89 and sm_120; no card that we know."""
    source = cuda.versions("conv")[5]
    assert source.stages(multiprocessor << 10) == stages
    each = source.shared // source.constants["MOST_STAGES"]
    assert 2 * (each * stages + 1024) <= multiprocessor << 10
    assert stages == 4 or 2 * (each * (stages + 1) + 1024) > multiprocessor << 10
    assert cuda.versions("conv")[6].stages(multiprocessor << 10) == 0


@pytest.mark.slow
@fake_cupy.of_the_stand_in
def test_a_smaller_card_gets_fewer_stages_and_the_same_sums(cupy, monkeypatch):
    """The sum is longer than the ring of stages."""
    monkeypatch.setattr(cuda, "shared_of_multiprocessor", lambda: 100 << 10)
    asked, launch = [], fake_cupy.launch
    monkeypatch.setattr(fake_cupy, "launch", lambda program, *args: (
        asked.append((args[-1], program.defines)), launch(program, *args)))
    conv_cuda._plan.cache_clear()
    try:
        rng = np.random.default_rng(0)
        x, w = rng.integers(-3, 4, (1, 2, 3, 40)), rng.integers(-3, 4, (2, 3, 40, 5))       # k = 240: 8 tiles
        y = conv_cuda.correlate(cupy.asarray(x.astype(np.float16)), cupy.asarray(w.astype(np.float16)), 1, 1, version=5)
        np.testing.assert_array_equal(y.get(), plain_y(x, w, (1, 3, 3, 5), 1, 1))         # whole numbers: exact
    finally:
        conv_cuda._plan.cache_clear()
    (shared, defines), = asked
    assert shared == 3 * 15360 and "-DSTAGES=3" in defines


# --- what is refused ------------------------------------------------------------------------------------------------

def refused(error, call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    fake_cupy.one_sentence(caught)
    return str(caught.value)


def test_shapes_that_do_not_fit(cupy):
    def zeros(*shape, dtype=np.float32):
        return cupy.zeros(shape, dtype=dtype)
    x, w, dy = zeros(1, 4, 4, 2), zeros(3, 3, 2, 5), zeros(1, 4, 4, 5)
    correlate, correlate_dx, correlate_dw = conv_cuda.correlate, conv_cuda.correlate_dx, conv_cuda.correlate_dw
    assert "(B, H, W, C)" in refused(ValueError, correlate, x[0], w, 1, 1)
    assert "(1, 4, 4, 2)" in refused(ValueError, correlate, x, zeros(3, 3, 3, 5), 1, 1)
    assert "bias" in refused(ValueError, correlate, x, w, 1, 1, zeros(4))
    assert "empty" in refused(ValueError, correlate, x[:, :0], w, 1, 1)
    assert "empty" in refused(ValueError, correlate, x, w[..., :0], 1, 1)
    assert "larger" in refused(ValueError, correlate, x, zeros(5, 3, 2, 5), 1, 0)
    assert "stride" in refused(ValueError, correlate, x, w, 0, 1)
    assert "padding" in refused(ValueError, correlate, x, w, 1, -1)
    assert "2^29" in refused(ValueError, correlate, x, w, 2**30, 2**29)
    assert "dy" in refused(ValueError, correlate_dx, dy[:, :3], w, x.shape, 1, 1)
    assert "dy" in refused(ValueError, correlate_dw, x, dy[..., :4], w.shape, 1, 1)
    assert "255" in refused(ValueError, correlate_dx, zeros(1, 1, 1, 5), w, x.shape, 256, 1)
    assert "w must be float32" in refused(TypeError, correlate, x, w.astype(np.float64), 1, 1)
    assert "float32" in refused(TypeError, correlate, x.astype(np.int32), w.astype(np.int32), 1, 1)
    assert "version" in refused(ValueError, correlate, x, w, 1, 1, version=99)
    assert "two devices" in refused(TypeError, correlate, x, np.zeros(w.shape, np.float32), 1, 1)
    fake_cupy.assert_same(correlate(x, w, 1, 1), np.zeros((1, 4, 4, 5), np.float32))         # and the next call works


@pytest.mark.parametrize("x_shape, w_shape, stride, padding, name", [
    ((2**20, 32, 32, 2), (3, 3, 2, 1), 1, 1, "x"),
    ((1, 1, 1, 2**15), (2, 2, 2**15, 2**15), 1, 1, "w"),
    ((2**20, 32, 32, 1), (3, 3, 1, 4), 1, 1, "y"),
    ((1, 2**14, 2**14, 1), (1, 1, 1, 1), 1, 2**15, "y"),
])
def test_more_elements_than_a_kernel_can_count(cupy, x_shape, w_shape, stride, padding, name):
    def huge(shape):
        return cupy.broadcast_to(cupy.zeros(1, dtype=np.float32), shape)
    said = refused(ValueError, conv_cuda.correlate, huge(x_shape), huge(w_shape), stride, padding)
    assert f"{name} (" in said and "parts" in said
    dy = huge(y_shape_of(x_shape, w_shape, stride, padding))
    assert refused(ValueError, conv_cuda.correlate_dx, dy, huge(w_shape), x_shape, stride, padding) == said
    assert refused(ValueError, conv_cuda.correlate_dw, huge(x_shape), dy, w_shape, stride, padding) == said


# --- these tests can fail ---------------------------------------------------------------------------------------------

# version, the right text, the planted text, and what detects it: the sums (None) or AddressSanitizer
PLANTED = [
    (1, "row < 0 || row >= H || column < 0", "row < 0 || row > H || column < 0", "address"),
    (1, "if (pixel >= B * Ho * Wo || d >= D) return;", "if (pixel >= B * Ho * Wo) return;", "address"),
    (1, "ri + stride * m", "ri + m", None),
    (2, "__syncthreads();                                // all is there", "", None),
    (2, "__syncthreads();                                // all is used: the next tile may be written", "", None),
    (2, "k.m < taps && c < C", "c < C", "address"),
    (2, "if (++n == columns) n = 0, ++m;", "++n;", None),
    (2, "const int all = (K + TILE_K - 1) / TILE_K", "const int all = K / TILE_K", None),
    (3, "top[r] = exists ? i : -(1 << 30);", "top[r] = i;", "address"),
    (3, "a.write(next.a), b.write(next.b);", "a.write(now.a), b.write(now.b);", None),
    (3, "while (j >= Wo) {", "if (j >= Wo) {", None),
    (3, "if (n + q < N) put", "if (n + q < N - 1) put", None),
    (3, "if (activate) sum[r][q] = silu(sum[r][q]);", "", None),
    (3, "sum[r][q] += bias_d;", "", None),
    (4, "__syncthreads();\n    }", "}", None),
    (4, "a[2] = at[4 * LONG], a[3] = at[4 * LONG + 8];", "a[3] = at[4 * LONG], a[2] = at[4 * LONG + 8];", None),
    (4, "if (k0 + k(r) >= K) continue;", "", "address"),
    (5, "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();", None),
    (5, "__syncthreads();                                // everyone's have", "// everyone's have", None),
    (5, "const int next = tile + STAGES - 1;", "const int next = tile + STAGES;", None),
    (6, "(i / PER ^ l % 8) * PER", "(i / PER) * PER", None),
    (6, "wgmma_wait<0>();", "", None),
    (6, "wgmma_see_writes();                             // where", "// where", None),
    (6, "row() / 64 * SQUARE + in_square", "in_square", None),
    (7, "barrier_wait(ring.empty + stage, (round + 1) % 2);", "", None),
    (7, "barrier_wait(ring.full + stage, round % 2);", "", None),
    (7, "copy_async_wait<BEHIND>();", "", None),
    (7, "wgmma_see_writes();                             // where", "// where", None),
    (7, "if (tile > 0) barrier_arrive(ring.empty + (tile - 1) % STAGES);",
     "barrier_arrive(ring.empty + tile % STAGES);", None),
    (7, "barrier_init(&barriers[STAGES + stage], MULTIPLY);", "barrier_init(&barriers[STAGES + stage], GROUP);", None),
    (7, "barrier_init(&barriers[stage], GROUP);", "barrier_init(&barriers[stage], 1);", None),
    (7, "wgmma_wait<1>();", "", None),
    (7, "k * B::STEP_16, B::LEADING", "k * B::STEP_16", None),
    (7, "threadIdx.x / GROUP * 2;", "0;", None),
]


@pytest.mark.slow
@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("version, right, wrong, sanitize", PLANTED)
def test_a_planted_error_is_found(cupy, monkeypatch, version, right, wrong, sanitize):
    planted = cuda.versions("conv")[version].path
    text = cuda.Source.text.fget
    assert right in text(cuda.versions("conv")[version]), "the kernel was rewritten: change this planted error"
    monkeypatch.setattr(cuda.Source, "text", property(
        lambda self: text(self).replace(right, wrong) if self.path == planted else text(self)))
    monkeypatch.setattr(cuda_on_cpu, "Program", functools.partial(cuda_on_cpu.Program, sanitize=sanitize))
    dtype = "float16" if version >= 6 else "float32"
    cuda._module.cache_clear(), cuda._compiled.cache_clear()
    try:
        with pytest.raises((AssertionError, cuda_on_cpu.LaunchError)) as caught:
            for shape, _ in AWKWARD:
                check_all(cupy, version, dtype, *shape, splits=1)
        assert not sanitize or "AddressSanitizer" in str(caught.value)
    finally:
        cuda._module.cache_clear(), cuda._compiled.cache_clear()
