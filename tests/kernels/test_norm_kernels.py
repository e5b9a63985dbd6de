"""The kernels of the norms, every version, run on this CPU: values, gradients, unusual sizes, hard inputs, errors."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from support import fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine import norm, ops
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda import norm as norm_cuda
from minidiff.engine.cuda import weight_gradients
from minidiff.engine.tensor import Tensor, gradients, record

pytestmark = fake_cupy.needs_device

VERSIONS = sorted(cuda.versions("group_norm"))
ROUNDING = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}       # a few of a result's own


@pytest.fixture(scope="module", autouse=True)
def cupy():
    with pytest.MonkeyPatch.context() as patch:
        yield fake_cupy.install(patch)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_loops(x, groups, gamma, beta, eps, silu):
    """In float64, one group of one image at a time, with NumPy's own mean and variance."""
    z, size = np.empty(x.shape), x.shape[-1] // groups
    for b, g in np.ndindex(len(x), groups):
        part = np.s_[b, ..., g * size:(g + 1) * size]
        z[part] = (x[part] - x[part].mean()) / math.sqrt(x[part].var() + eps)
    gamma, beta = (a.reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1]) for a in (gamma, beta))
    z = gamma * z + beta
    return z * expit(z) if silu else z


def gradients_by_numpy(x, dy, groups, gamma, beta, eps, silu):
    """In float64, by the engine's pullback on the CPU, which tests/engine/test_norm.py checks."""
    leaves = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    y = norm.group_norm(leaves[0], groups, *leaves[1:], eps)
    return gradients(ops.silu(y) if silu else y, leaves, dy)


def by_kernels(x, dy, groups, gamma, beta, eps, silu, version):
    """y, dx, dgamma, dbeta."""
    import cupy
    x, dy, gamma, beta = map(cupy.asarray, (x, dy, gamma, beta))
    y, mean, rstd = norm_cuda.group_norm(x, groups, gamma, beta, eps, silu, version=version)
    return [a.get() for a in (y, *norm_cuda.group_norm_backward(x, dy, groups, gamma, beta, mean, rstd, silu,
                                                                version=version))]


def close(found, expected, rounding):
    for a, b, name in zip(found, expected, ("y", "dx", "dgamma", "dbeta")[:len(found)], strict=True):
        assert a.shape == b.shape
        error, allowed = np.abs(a - b).max(initial=0), rounding * max(1, np.abs(b).max(initial=0))
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def check(case, dtype, version, *, mean=0.0, gentler=1.0):
    B, pixels, groups, size, per_sample, silu = case
    C = groups * size
    shape = (B, C) if per_sample else (C,)
    arrays = [a.astype(dtype) for a in (normal(B, *pixels, C) + mean, normal(B, *pixels, C, seed=1),
                                        normal(*shape, seed=2), normal(*shape, seed=3))]
    x, dy, gamma, beta = arrays
    found = by_kernels(x, dy, groups, gamma, beta, 1e-2, silu, version)
    assert all(a.dtype == dtype for a in found)
    x, dy, gamma, beta = (a.astype(np.float64) for a in arrays)
    expected = [by_loops(x, groups, gamma, beta, 1e-2, silu),
                *gradients_by_numpy(x, dy, groups, gamma, beta, 1e-2, silu)]
    close([a.astype(np.float64) for a in found], expected, gentler * ROUNDING[dtype])
    return found


@st.composite
def cases(draw):
    """(B, pixels, groups, C/G, per sample, silu): one pixel and one channel, primes, and the edges of a slab."""
    pixels = draw(st.sampled_from([(), (1, 1), (2, 3), (7, 1), (31,), (8, 8), (13, 13), (257,)]))
    size = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 10, 16, 33]))
    return draw(st.integers(1, 3)), pixels, draw(st.integers(1, 5)), size, draw(st.booleans()), draw(st.booleans())


def small_card(patch, limit: int, part: int = norm_cuda.PART):
    """A card whose blocks have `limit` bytes of shared memory, and parts of `part` bytes."""
    patch.setattr(cuda, "shared_limit", lambda: limit)
    patch.setattr(norm_cuda, "PART", part)
    norm_cuda.plan.cache_clear()                            # PART is not in its key


@pytest.fixture(autouse=True)
def _own_plans():
    norm_cuda.plan.cache_clear()
    yield
    norm_cuda.plan.cache_clear()


# --- values and gradients -----------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=25)
@given(case=cases(), dtype=st.sampled_from(["float32", "float64"]), limit=st.integers(16, 100), part=st.integers(5, 15))
@example(case=(2, (64,), 4, 10, True, True), dtype="float32", limit=48, part=10)       # 4 groups fill 5 sectors
@example(case=(1, (3,), 1, 2500, False, True), dtype="float32", limit=227, part=15)    # more channels than threads
@example(case=(1, (2,), 1, 1031, True, False), dtype="float64", limit=100, part=15)
def test_every_version(version, case, dtype, limit, part):
    """Shared memory too small for a slab, which is then partly read again, and large enough; parts of all lengths."""
    with pytest.MonkeyPatch.context() as patch:
        small_card(patch, limit << 10, 1 << part)
        check(case, dtype, version, gentler=3 if version == 1 else 1)       # it adds 5577 numbers one to another


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision(version, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy knows bfloat16 through ml_dtypes, which is not installed")
    for case in [(2, (7, 7), 2, 8, True, True), (1, (5,), 3, 5, False, True), (3, (2, 2), 4, 10, False, False)]:
        check(case, dtype, version)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_larger(version, dtype):
    for case in [(4, (14, 14), 8, 8, False, True), (2, (14, 14), 8, 24, True, True), (1, (32, 32), 8, 20, False, True),
                 (2, (64, 64), 4, 10, True, False), (3, (16, 16), 2, 80, True, True)]:
        check(case, dtype, version, gentler=3)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_by_central_differences(version, silu):
    """The backward kernels are compared with differences of the forward kernels."""
    import cupy

    def op(groups):
        def group_norm(x, gamma, beta):
            given = [cupy.asarray(a.data) for a in (x, gamma, beta)]
            y, mean, rstd = norm_cuda.group_norm(given[0], groups, *given[1:], 0.1, silu, version=version)

            def pullback(dy):
                back = norm_cuda.group_norm_backward(given[0], cupy.asarray(dy), groups, *given[1:], mean, rstd, silu,
                                                     version=version)
                weight_gradients.ready(*back)               # gamma's and beta's wait for others of the walk
                return tuple(a.get() for a in back)
            return record(y.get(), (x, gamma, beta), pullback)
        return group_norm

    for B, pixels, groups, size, per_sample in [(2, 5, 2, 4, True), (1, 7, 3, 3, False), (3, 1, 1, 2, False)]:
        C = groups * size
        shape = (B, C) if per_sample else (C,)
        check_gradients(op(groups), 2 * normal(B, pixels, C) + 1, normal(*shape, seed=1), normal(*shape, seed=2),
                        directions=3)


# --- hard inputs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
def test_a_large_mean_does_not_swallow_the_variance(version):
    """In float32, compared with float64 of the same rounded x: only the rounding of the mean, 1e3 eps, is allowed."""
    for case in [(2, (14, 14), 2, 4, False, False), (1, (101,), 2, 5, True, True)]:
        check(case, "float32", version, mean=1e3, gentler=1e3 * np.finfo(np.float32).eps / ROUNDING["float32"] * 4)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4, 0.1])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_constant_gives_beta_and_no_gradient(version, value):
    """The variance is exactly 0: any rounding error of the mean would be divided by sqrt(eps)."""
    x = np.full((2, 67, 12), value, np.float32)
    gamma, beta = normal(12).astype(np.float32), normal(12, seed=1).astype(np.float32)
    y, dx, dgamma, dbeta = by_kernels(x, np.ones_like(x), 3, gamma, beta, 1e-5, False, version)
    assert np.array_equal(y, np.broadcast_to(beta, x.shape))
    assert np.array_equal(dgamma, np.zeros(12)) and np.array_equal(dbeta, np.full(12, 134))
    mean_gamma = gamma.reshape(3, 4).mean(axis=1).repeat(4)
    np.testing.assert_allclose(dx[0, 0], (gamma - mean_gamma) / math.sqrt(1e-5), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_values_at_the_ends_of_silu_stay_finite(version):
    x, gamma, beta = normal(1, 16, 8).astype(np.float32), np.full(8, 1e4, np.float32), np.zeros(8, np.float32)
    for a in by_kernels(x, np.ones_like(x), 2, gamma, beta, 1e-5, True, version):
        assert np.isfinite(a).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_sums_what_it_could_not_hold(version):
    """+-10,000 in float16: sums and squares exceed 65,504."""
    x = (1e4 * np.sign(normal(2, 49, 8))).astype(np.float16)
    ones, zeros = np.ones(8, np.float16), np.zeros(8, np.float16)
    y, *back = by_kernels(x, np.ones_like(x), 2, ones, zeros, 1e-5, False, version)
    np.testing.assert_allclose(y, by_loops(x.astype(float), 2, np.ones(8), np.zeros(8), 1e-5, False), atol=2e-3)
    assert all(np.isfinite(a).all() for a in back)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_nan_stays_in_its_group(version):
    x = normal(2, 9, 8).astype(np.float32)
    x[1, 4, 5] = np.nan                                     # image 1, group 2 of 4
    y = by_kernels(x, np.ones_like(x), 4, np.ones(8, np.float32), np.zeros(8, np.float32), 1e-5, True, version)[0]
    assert np.isnan(y[1, :, 4:6]).all() and np.isnan(y).sum() == 18


@pytest.mark.parametrize("version", VERSIONS)
def test_a_group_whose_squares_overflow_is_nan_and_not_beta(version):
    x = normal(2, 9, 8).astype(np.float32)
    x[1, :, 4:6] *= 1e25                                    # image 1, group 2 of 4
    y = by_kernels(x, np.ones_like(x), 4, np.ones(8, np.float32), np.zeros(8, np.float32), 1e-5, False, version)[0]
    assert np.isnan(y[1, :, 4:6]).all() and np.isnan(y).sum() == 18


# --- what else a kernel owes ----------------------------------------------------------------------------------

# limit and part: a slab that fits, one that is partly read again, and several parts (every version's whole ones are in
# test_races_and_bounds.py)
SPLIT = [(48, 10, (2, (37,), 4, 10, True, True)), (20, 6, (1, (5,), 3, 5, False, True))]


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("version", [3, 4])
def test_every_order_of_threads_gives_the_same_bits(version, monkeypatch):
    for limit, part, case in SPLIT:
        small_card(monkeypatch, limit << 10, 1 << part)
        results = []
        for order in (0, 1, 2):
            monkeypatch.setattr(fake_cupy, "launch", lambda program, *args, order=order: program.launch(*args, order))
            results.append(check(case, "float32", version))
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@fake_cupy.of_the_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("version", [3, 4])
def test_sanitized(version, sanitizer, monkeypatch):
    """There is no access out of bounds and no race; the sanitizers would report its line."""
    monkeypatch.setattr(fake_cupy, "launch", lambda program, *args: program.watched(sanitizer).launch(*args))
    for limit, part, case in SPLIT:
        small_card(monkeypatch, limit << 10, 1 << part)
        check(case, "float32", version)


@pytest.mark.parametrize("version", VERSIONS)
def test_views_and_odd_addresses(version):
    """A transposed view is copied; an array that begins at the second element of its memory is read without a copy."""
    import cupy
    memory = cupy.asarray(normal(2 * 6 * 8 + 1).astype(np.float32))
    x = memory[1:].reshape(2, 6, 8)
    turned = cupy.asarray(normal(8, 6, 2).astype(np.float32)).transpose(2, 1, 0)
    gamma, beta = cupy.asarray(normal(8, seed=1).astype(np.float32)), cupy.asarray(np.zeros(8, np.float32))
    for a in (x, turned):
        y = norm_cuda.group_norm(a, 2, gamma, beta, 1e-5, version=version)[0]
        dx = norm_cuda.group_norm_backward(a, a, 2, gamma, beta, *norm_cuda.group_norm(a, 2, gamma, beta, 1e-5)[1:],
                                           version=version)[0]
        wide = [b.get().astype(float) for b in (a, gamma, beta)]
        close([y.get(), dx.get()], [by_loops(wide[0], 2, *wide[1:], 1e-5, False),
                                    gradients_by_numpy(wide[0], wide[0], 2, *wide[1:], 1e-5, False)[0]],
              ROUNDING["float32"])


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_nothing_gives_nothing(shape):
    import cupy
    x, ones = cupy.zeros(shape, np.float32), cupy.ones(6, np.float32)
    y, mean, rstd = norm_cuda.group_norm(x, 2, ones, ones, 1e-5)
    dx, dgamma, dbeta = norm_cuda.group_norm_backward(x, x, 2, ones, ones, mean, rstd)
    assert y.shape == dx.shape == shape and mean.shape == (shape[0], 2)
    assert not dgamma.get().any() and not dbeta.get().any() and dgamma.shape == (6,)


@settings(max_examples=200)
@given(version=st.integers(3, 4), B=st.integers(1, 200), N=st.integers(1, 5000), groups=st.sampled_from([1, 3, 8, 32]),
       size=st.integers(1, 90), itemsize=st.sampled_from([2, 4, 8]), arrays=st.integers(1, 2),
       limit=st.sampled_from([48, 64, 99, 227]))
def test_plans_cover_every_pixel_within_the_card(version, B, N, groups, size, itemsize, arrays, limit):
    plan = norm_cuda.plan(version, B, N, groups * size, groups, itemsize, arrays, limit << 10, 132)
    assert groups % plan.slab == 0 and plan.grid[0] * plan.slab == B * groups
    assert plan.threads % 32 == 0 and 64 <= plan.threads <= cuda.versions("group_norm")[3].constants["MOST_THREADS"]
    assert plan.shared <= limit << 10 and 0 <= plan.kept <= plan.part
    assert (plan.splits - 1) * plan.part < N <= plan.splits * plan.part


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("shape, groups, itemsize, version", [
    ((128, 196, 64), 8, 4, 3), ((16, 1024, 640), 32, 4, 3), ((2, 4096, 320), 32, 4, 4), ((2, 4096, 320), 32, 2, 4),
    ((128, 196, 64), 8, 2, 3),
    ((2, 1024, 640), 32, 2, 4),                             # 16 slabs, which would all fit
    ((2, 16, 640), 32, 2, 3),                               # as many, each of one part
])
def test_which_version_a_shape_gets(shape, groups, itemsize, version):
    """Version 3 if a slab fits in an H100's shared memory and there is work for the whole card, otherwise 4."""
    B, N, C = shape
    source, _ = norm_cuda._choose("float32", None, B, N, C, groups, itemsize, 1)
    assert source.number == version


def test_a_slab_fills_whole_sectors():
    for group_bytes, groups, slab in [(32, 8, 1), (40, 32, 4), (20, 32, 8), (60, 4, 4), (300, 7, 1), (10, 5, 5)]:
        assert norm_cuda._slab(groups, group_bytes, most=1) == slab
    assert norm_cuda._slab(8, 32, most=8) == 4              # a line, where there are blocks to spare


@pytest.mark.parametrize("version", VERSIONS)
def test_another_paths_cotangent_is_added_to_dx(version):
    """Four channels at a time, and one at a time; nothing else changes."""
    import cupy
    for C, pixels in ((12, 7), (10, 7), (12, 90)):
        x, dy, plus = (cupy.asarray(normal(2, pixels, C, seed=s).astype(np.float32)) for s in range(3))
        gamma, beta = (cupy.asarray(normal(C, seed=s).astype(np.float32)) for s in range(2))
        _, *kept = norm_cuda.group_norm(x, 2, gamma, beta, 1e-2, True, version=version)
        plain, more = (norm_cuda.group_norm_backward(x, dy, 2, gamma, beta, *kept, True, added, version=version)
                       for added in (None, plus))
        close([more[0].get()], [plain[0].get() + plus.get()], ROUNDING["float32"])
        assert all(np.array_equal(a.get(), b.get()) for a, b in zip(plain[1:], more[1:], strict=True))


# --- layer norm -----------------------------------------------------------------------------------------------

def check_layer_norm(shape, dtype, *, mean=0.0, gentler=1.0):
    """The norm of each token is the group norm of one group, each token its own sample."""
    import cupy
    C = shape[-1]
    arrays = [a.astype(dtype) for a in (normal(*shape) + mean, normal(*shape, seed=1), normal(C, seed=2),
                                        normal(C, seed=3))]
    x, dy, gamma, beta = map(cupy.asarray, arrays)
    y, *kept = norm_cuda.layer_norm(x, gamma, beta, 1e-2)
    found = [a.get() for a in (y, *norm_cuda.layer_norm_backward(x, dy, gamma, *kept))]
    assert all(a.dtype == dtype for a in found)
    x, dy, gamma, beta = (a.astype(np.float64) for a in arrays)
    rows = x.reshape(-1, C)
    expected = [by_loops(rows, 1, gamma, beta, 1e-2, False),
                *gradients_by_numpy(rows, dy.reshape(-1, C), 1, gamma, beta, 1e-2, False)]
    expected[:2] = [a.reshape(shape) for a in expected[:2]]
    close([a.astype(np.float64) for a in found], expected, gentler * ROUNDING[dtype])


@settings(max_examples=25)
@given(leading=st.lists(st.sampled_from([1, 2, 3, 7, 9, 33]), max_size=2),
       dtype=st.sampled_from(["float32", "float64"]),
       C=st.sampled_from([1, 2, 3, 4, 31, 32, 33, 64, 127, 128, 132, 257]))
@example(leading=[2, 140], dtype="float32", C=20)           # several parts of rows
def test_layer_norm(leading, dtype, C):
    check_layer_norm((*leading, C), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_norm_in_half_precision(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy knows bfloat16 through ml_dtypes, which is not installed")
    for shape in [(2, 5, 24), (3, 35)]:
        check_layer_norm(shape, dtype)


def test_layer_norm_of_a_large_mean_and_of_a_constant():
    import cupy
    check_layer_norm((40, 101), "float32", mean=1e3, gentler=120)               # 1e3 eps, as above
    x = cupy.asarray(np.full((3, 1003), 0.1, np.float32))
    gamma, beta = (cupy.asarray(normal(1003, seed=s).astype(np.float32)) for s in (0, 1))
    y = norm_cuda.layer_norm(x, gamma, beta, 1e-5)[0]
    assert np.array_equal(y.get(), np.broadcast_to(beta.get(), (3, 1003)))
    rows = normal(3, 1003).astype(np.float32) * np.array([[1], [1e25], [1]], np.float32)
    y = norm_cuda.layer_norm(cupy.asarray(rows), gamma, beta, 1e-5)[0].get()
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]             # its squares overflow: not beta


@pytest.mark.parametrize("C", [12, 35])
def test_another_paths_cotangent_is_added_to_a_layer_norms_dx(C):
    import cupy
    x, dy, plus = (cupy.asarray(normal(19, C, seed=s).astype(np.float32)) for s in range(3))
    gamma = cupy.asarray(normal(C).astype(np.float32))
    _, *kept = norm_cuda.layer_norm(x, gamma, gamma, 1e-2)
    plain, more = (norm_cuda.layer_norm_backward(x, dy, gamma, *kept, added) for added in (None, plus))
    close([more[0].get()], [plain[0].get() + plus.get()], ROUNDING["float32"])
    assert all(np.array_equal(a.get(), b.get()) for a, b in zip(plain[1:], more[1:], strict=True))


def test_layer_norms_gradients_by_central_differences():
    import cupy

    def layer_norm(x, gamma, beta):
        given = [cupy.asarray(a.data) for a in (x, gamma, beta)]
        y, *kept = norm_cuda.layer_norm(*given, 0.1)

        def pullback(dy):
            return tuple(a.get() for a in norm_cuda.layer_norm_backward(given[0], cupy.asarray(dy), given[1], *kept))
        return record(y.get(), (x, gamma, beta), pullback)

    for shape in [(3, 5, 8), (2, 37), (4, 1)]:
        check_gradients(layer_norm, 2 * normal(*shape) + 1, normal(shape[-1], seed=1), normal(shape[-1], seed=2),
                        directions=3)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_layer_norm_of_nothing(shape):
    import cupy
    x, ones = cupy.zeros(shape, np.float32), cupy.ones(shape[-1], np.float32)
    y, *kept = norm_cuda.layer_norm(x, ones, ones, 1e-5)
    dx, dgamma, dbeta = norm_cuda.layer_norm_backward(x, x, ones, *kept)
    assert y.shape == dx.shape == shape and not dgamma.get().any() and not dbeta.get().any()


# --- the ops on the GPU ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("silu", [False, True])
def test_the_op_takes_the_kernels(silu, monkeypatch):
    import cupy
    launched = fake_cupy.watch_launches(monkeypatch)
    x, gamma, beta, dy = (a.astype(np.float32) for a in (normal(2, 5, 5, 12), normal(2, 12, seed=1),
                                                         normal(2, 12, seed=2), normal(2, 5, 5, 12, seed=3)))
    results = []
    for place in (lambda a: a, cupy.asarray):
        leaves = [Tensor(place(a), requires_grad=True) for a in (x, gamma, beta)]
        y = norm.group_norm(leaves[0], 3, *leaves[1:], silu=silu)
        found = [y.data, *gradients(y, leaves, place(dy))]
        results.append([a if place is not cupy.asarray else a.get() for a in found])
    close(results[1], results[0], 1e-5)
    assert fake_cupy.REAL or launched == ["group_norm_forward", "group_norm_backward"]


def test_the_layer_norm_op_takes_the_kernels(monkeypatch):
    import cupy
    launched = fake_cupy.watch_launches(monkeypatch)
    x, gamma, beta, dy = (a.astype(np.float32) for a in (normal(2, 5, 12), normal(12, seed=1), normal(12, seed=2),
                                                         normal(2, 5, 12, seed=3)))
    results = []
    for place in (lambda a: a, cupy.asarray):
        leaves = [Tensor(place(a), requires_grad=True) for a in (x, gamma, beta)]
        y = norm.layer_norm(*leaves)
        found = [y.data, *gradients(y, leaves, place(dy))]
        results.append([a if place is not cupy.asarray else a.get() for a in found])
    close(results[1], results[0], 1e-5)
    assert fake_cupy.REAL or launched == ["layer_norm_forward", "layer_norm_backward"]


# --- refusals -------------------------------------------------------------------------------------------------

def float32(*shape):
    import cupy
    return cupy.asarray(np.zeros(shape, np.float32))


@pytest.mark.parametrize("refused, kind, message", [
    (lambda: norm_cuda.group_norm(float32(2, 4), 3, float32(4), float32(4), 1e-5), ValueError,
     r"C a multiple of 3 groups, not \(2, 4\)"),
    (lambda: norm_cuda.group_norm(float32(2, 4), 0, float32(4), float32(4), 1e-5), ValueError, "multiple of 0 groups"),
    (lambda: norm.group_norm(Tensor(float32(2, 4)), 1.0, Tensor(float32(4)), Tensor(float32(4))), ValueError,
     "groups must be a whole number"),
    (lambda: norm_cuda.group_norm(float32(4), 2, float32(4), float32(4), 1e-5), ValueError, r"\(B, ..., C\)"),
    (lambda: norm_cuda.group_norm(float32(2, 4), 2, float32(3), float32(4), 1e-5), ValueError, "gamma and beta must"),
    (lambda: norm_cuda.group_norm(float32(2, 4), 2, float32(4).astype("float64"), float32(4), 1e-5), TypeError,
     "gamma must be float32, not float64"),
    (lambda: norm_cuda.group_norm(float32(2, 4).astype("int32"), 2, float32(4), float32(4), 1e-5), TypeError, "int32"),
    (lambda: norm_cuda.group_norm(float32(2, 4), 2, float32(4), float32(4), 1e-5, version=99), ValueError,
     "version must be one of"),
    (lambda: norm_cuda.group_norm_backward(float32(2, 4), float32(2, 3), 2, float32(4), float32(4), float32(2, 2),
                                           float32(2, 2)), ValueError, r"dy must have x's shape \(2, 4\)"),
    (lambda: norm_cuda.group_norm_backward(float32(2, 4), float32(2, 4), 2, float32(4), float32(4), float32(2, 2),
                                           float32(2, 1)), ValueError, r"must be \(2, 2\), not"),
    (lambda: norm_cuda.layer_norm_backward(float32(2, 4), float32(2, 4), float32(4), float32(2), float32(3)),
     ValueError, r"mean and rstd \(2,\), not"),
    (lambda: norm_cuda.layer_norm(float32(2, 4), float32(3), float32(4), 1e-5), ValueError, r"must be \(4,\)"),
    (lambda: norm_cuda.layer_norm_backward(float32(2, 4), float32(2, 4), float32(4), float32(2), float32(2),
                                           float32(2, 3)), ValueError, "layer_norm: plus must have x's shape"),
    (lambda: norm_cuda.layer_norm_backward(float32(2, 4), float32(2, 3), float32(4), float32(2), float32(2)),
     ValueError, r"dy must have x's shape \(2, 4\)"),
    (lambda: norm_cuda.group_norm(float32(1, 1, 30000), 1, float32(30000), float32(30000), 1e-5, version=3), ValueError,
     "30000 channels .* version 2"),
])
def test_refused_in_a_sentence(refused, kind, message):
    with pytest.raises(kind, match=message) as error:
        refused()
    fake_cupy.one_sentence(error)


def test_a_group_too_wide_for_shared_memory_takes_version_2():
    """Automatically, since the sums of 30,000 channels do not fit."""
    check((1, (2,), 1, 30000, False, True), "float32", None)
