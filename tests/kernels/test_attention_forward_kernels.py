"""Attention, every version of kernels/attention_forward_*.cu, run on this CPU."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from support import cuda_on_cpu, fake_cupy
from support.law_tools import alphas_sigmas

from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.schedules import cosine
from minidiff.engine.attention import causal_mask, scaled_dot_product_attention
from minidiff.engine.cuda import attention as attention_cuda
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.tensor import Tensor

pytestmark = fake_cupy.needs_device

# The rounding error of each element type, half a unit in the last place; sums are in float32 or float64.
UNIT = {"float32": 2**-24, "float64": 2**-53, "float16": 2**-11, "bfloat16": 2**-8}
TF32 = 2**-11
VERSIONS = [(number, dtype) for number, source in cuda.versions("attention_forward").items() for dtype in UNIT
            if source.takes_dtype(dtype, tf32=True)]
EACH = pytest.mark.parametrize("version, dtype", VERSIONS)
EACH_ONCE = pytest.mark.parametrize("version, dtype", [(1, "float32"), (2, "float32"), (3, "float32"), (4, "float32"),
                                                       (4, "float16"), (5, "float32"), (5, "float16")])
some = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- the same by float64 NumPy, and how far rounding may lead from it -------------------------------------------

def plain(q, k, v, see, scale):
    """y and lse, with zeros and +inf for queries without keys; see (B, h, N, M)."""
    S = np.where(see, scale * np.einsum("bhnc,bhmc->bhnm", q, k), -np.inf)
    lse = logsumexp(S, axis=3)
    lse[~see.any(axis=3)] = np.inf
    return np.einsum("bhnm,bhme->bhne", np.exp(S - lse[..., None]), v), lse


def where_seen(shape, mask, causal):
    see = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    return see & (np.arange(shape[3]) <= np.arange(shape[2])[:, None]) if causal else see


def check(version, dtype, q, k, v, mask, causal, scale, y, lse) -> None:
    """The errors of y and lse are within the bounds of rounding, and zero for queries without keys.

    A score errs by ds <= ((d + 3) u + 2 u_tf32) scale |q| . |k|, and by 2 u |s| from the conversion to a power of 2.
    A weight errs by its own ds and by that of the sum, 2 max ds in the exponent, then by u for each of M terms, and by
    the rounding of P and v for the tensor cores.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    see = where_seen((*q.shape[:3], k.shape[2]), mask, causal)
    expected, expected_lse = plain(q, k, v, see, scale)
    assert y.dtype == fake_cupy.dtype_of(dtype) and lse.dtype == ("float64" if dtype == "float64" else "float32")
    y, lse = np.asarray(y, np.float64), np.asarray(lse, np.float64)
    nowhere = ~see.any(axis=3)
    assert (y[nowhere] == 0).all() and (lse[nowhere] == np.inf).all()
    if nowhere.all():
        return

    u, u_sum = UNIT[dtype], UNIT["float64" if dtype == "float64" else "float32"]
    u_mma = 0 if version < 4 else TF32 if dtype == "float32" else u
    sizes = scale * np.einsum("bhnc,bhmc->bhnm", abs(q), abs(k))
    ds = ((q.shape[3] + 5) * u_sum + (2.1 * TF32 if version >= 4 and dtype == "float32" else 0)) * sizes
    ds = np.where(see, ds, 0).max(axis=3)                                           # (B, h, N)
    sums = (k.shape[2] + 10) * u_sum
    err = abs(lse[~nowhere] - expected_lse[~nowhere])
    assert (err <= ds[~nowhere] + sums + 4 * u_sum * abs(expected_lse[~nowhere])).all()
    total = np.einsum("bhnm,bhme->bhne", np.exp(np.where(see, scale * np.einsum("bhnc,bhmc->bhnm", q, k), -np.inf)
                                                - expected_lse[..., None]), abs(v))         # sum P |v|
    allowed = total * np.expm1(2 * ds + 2 * sums + 2.1 * u_mma)[..., None] + 1.01 * u * abs(expected)
    allowed += 2**-25 if dtype == "float16" else 1e-37
    wrong = ~(abs(y - expected) <= allowed)                                         # NaN is wrong
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} wrong, the first at {np.argwhere(wrong)[0]}"


# --- sizes, layouts and masks that are awkward ------------------------------------------------------------------

LENGTHS = [1, 2, 5, 13, 15, 16, 17, 63, 64, 65, 79, 127, 128, 131]         # primes, and around tiles of 16 and 64
LAYOUTS = ["contiguous", "heads", "part", "aligned part", "turned"]


def on_device(cupy, a, layout: str):
    """The array (B, h, N, d) on the device, in one of these layouts."""
    B, h, N, d = a.shape
    if layout == "heads":                                   # (B, N, h, d), as it comes from a linear layer
        return cupy.asarray(np.ascontiguousarray(a.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
    if layout.endswith("part"):                             # parts of wider rows, which may be unaligned
        before, after = (4, 4) if layout == "aligned part" else (2, 1)
        wider = np.full((B, N, h, before + d + after), np.nan, a.dtype)
        wider[..., before:before + d] = a.transpose(0, 2, 1, 3)
        return cupy.asarray(wider)[..., before:before + d].transpose(0, 2, 1, 3)
    if layout == "turned":                                  # the last axis is not contiguous
        return cupy.asarray(np.ascontiguousarray(a.swapaxes(2, 3))).swapaxes(2, 3)
    return cupy.asarray(np.ascontiguousarray(a))


@st.composite
def cases(draw, head_dim: int):
    low = 1 if head_dim == 16 else head_dim - 15
    B, h, N, M = draw(st.integers(1, 2)), draw(st.integers(1, 3)), *draw(st.tuples(*[st.sampled_from(LENGTHS)] * 2))
    d, e = draw(st.sampled_from([low, low + 6, low + 7, head_dim - 4, head_dim])), draw(st.integers(1, head_dim))
    if draw(st.booleans()):
        d, e = e, d
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = None
    shape = draw(st.sampled_from([None, (B, 1, 1, M), (B, h, N, M), (N, M), (1, h, N, 1), (B, 1, N, M)]))
    if shape:
        mask = rng.random(shape) < draw(st.sampled_from([0, 0.1, 0.5, 0.9]))
    q, k = 2 * rng.standard_normal((B, h, N, d)), rng.standard_normal((B, h, M, d))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3))
    return q, k, rng.standard_normal((B, h, M, e)), mask, draw(st.booleans()), layouts


def check_case(cupy, version, dtype, case):
    q, k, v, mask, causal, layouts = case
    q, k, v = (a.astype(fake_cupy.dtype_of(dtype)) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[3])
    y, lse = attention_cuda.forward(*(on_device(cupy, a, layout) for a, layout in zip((q, k, v), layouts, strict=True)),
                                    None if mask is None else cupy.asarray(mask), causal, scale, version=version)
    check(version, dtype, q, k, v, mask, causal, scale, y.get(), lse.get())


@EACH
@some
@given(cases(16))
def test_every_version_against_numpy(cupy, version, dtype, case):
    check_case(cupy, version, dtype, case)


@pytest.mark.slow
@EACH_ONCE
@some
@given(cases(48))
def test_every_version_with_larger_heads(cupy, version, dtype, case):
    """48 columns: an odd multiple of the 16 that one instruction of a tensor core takes."""
    check_case(cupy, version, dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 160])
@EACH
@settings(some, max_examples=4)
@given(data=st.data())
def test_every_version_with_every_head(cupy, version, dtype, head_dim, data):
    check_case(cupy, version, dtype, data.draw(cases(head_dim)))


@pytest.mark.slow
@pytest.mark.parametrize("N, M, d", [(196, 196, 64), (784, 784, 32), (49, 77, 64), (256, 256, 40), (64, 77, 160)])
@EACH
def test_shapes_of_our_networks(cupy, version, dtype, N, M, d):
    rng = np.random.default_rng(N + d)
    q, k, v = (rng.standard_normal((1, 2, n, d)) for n in (N, M, M))
    check_case(cupy, version, dtype, (q, k, v, None, False, ("heads",) * 3))


# --- what is true of attention ---------------------------------------------------------------------------------

def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(fake_cupy.dtype_of(dtype))


def forward(cupy, version, q, k, v, mask=None, causal=False, scale=1.0):
    found = attention_cuda.forward(*map(cupy.asarray, (q, k, v)), None if mask is None else cupy.asarray(mask), causal,
                                   scale, version=version)
    return tuple(a.get() for a in found)


@EACH
def test_extreme_scores(cupy, version, dtype):
    """Scores of +-10,000: the largest takes all; of two as large, each takes half."""
    q, k = np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 70, 2))
    q[0, 0, :, 0] = 100, -100
    k[0, 0, :, 0] = np.linspace(-80, 80, 70)
    k[0, 0, [3, 69], 0] = 100
    k[0, 0, 5, 0] = -100
    v = np.arange(70.0).reshape(1, 1, 70, 1)
    y, lse = forward(cupy, version, *(a.astype(fake_cupy.dtype_of(dtype)) for a in (q, k, v)))
    assert y.astype(float).ravel().tolist() == [36.0, 5.0]
    np.testing.assert_allclose(lse[0, 0], [10_000 + math.log(2), 10_000], rtol=2**-22)


@EACH
def test_a_constant_added_to_all_scores_changes_nothing(cupy, version, dtype):
    """The constant is a column of ones in q and of constants in k; only lse grows, by the constant."""
    q, k, v = normal(1, 2, 5, 8, dtype=dtype), normal(1, 2, 70, 8, seed=1, dtype=dtype), normal(1, 2, 70, 3, seed=2)
    v, q[..., 7] = v.astype(q.dtype), 1
    k[..., 7] = 0
    y, lse = forward(cupy, version, q, k, v)
    k[..., 7] = 8
    shifted, shifted_lse = forward(cupy, version, q, k, v)
    bound = 1e-13 if dtype == "float64" else 1e-5 + 4 * UNIT[dtype]
    np.testing.assert_allclose(shifted.astype(float), y.astype(float), rtol=0, atol=bound)
    np.testing.assert_allclose(shifted_lse, lse + 8, rtol=0, atol=2e-14 if dtype == "float64" else 2e-5)


@EACH
def test_the_order_of_keys_does_not_matter(cupy, version, dtype):
    q, k, v = (normal(1, 2, n, c, seed=n, dtype=dtype) for n, c in ((5, 8), (70, 8), (70, 3)))
    order = np.random.default_rng(1).permutation(70)
    (y, lse), (y1, lse1) = forward(cupy, version, q, k, v), forward(cupy, version, q, k[:, :, order], v[:, :, order])
    unit = max(UNIT[dtype], TF32) if version >= 5 else UNIT[dtype]      # P is rounded relative to the largest so far
    bound = 1e-14 if dtype == "float64" else (8 if version >= 4 else 2) * unit + 1e-6
    np.testing.assert_allclose(y1.astype(float), y.astype(float), rtol=0, atol=2 * bound)
    np.testing.assert_allclose(lse1, lse, rtol=0, atol=1e-14 if dtype == "float64" else 2e-6)


@EACH
def test_what_is_masked_has_no_influence(cupy, version, dtype):
    """Masked keys may have any values: the result is the same to the last bit."""
    q, k, v = (normal(2, 2, n, c, seed=n, dtype=dtype) for n, c in ((67, 8), (70, 8), (70, 3)))
    mask = np.random.default_rng(0).random((2, 1, 1, 70)) < 0.5
    y, lse = forward(cupy, version, q, k, v, mask)
    k = np.where(mask[:, :, 0, :, None], k, np.array(1000, k.dtype))
    v = np.where(mask[:, :, 0, :, None], v, np.array(-1000, v.dtype))
    again, lse_again = forward(cupy, version, q, k, v, mask)
    assert np.array_equal(again, y) and np.array_equal(lse_again, lse)


@EACH
@pytest.mark.parametrize("N, M", [(67, 130), (130, 67)])
def test_causal_is_a_mask(cupy, version, dtype, N, M):
    """To the last bit: the skipped tiles would have added zeros."""
    q, k, v = (normal(1, 2, n, c, seed=n, dtype=dtype) for n, c in ((N, 8), (M, 8), (M, 3)))
    below = np.arange(M) <= np.arange(N)[:, None]
    for mask in (None, np.random.default_rng(0).random((1, 1, 1, M)) < 0.5):
        found = forward(cupy, version, q, k, v, mask, causal=True)
        same = forward(cupy, version, q, k, v, below if mask is None else below & mask)
        assert all(map(np.array_equal, found, same))


@pytest.mark.parametrize("version, dtype", [pair for pair in VERSIONS if pair[1] in ("float32", "float64")])
def test_the_data_set_denoiser_is_one_call(cupy, version, dtype):
    """Law 14: Q = alpha x/sigma^2, K = V = data, and -alpha^2 ||x_i||^2 / 2 sigma^2 as one more column of Q and K."""
    rng = np.random.default_rng(0)
    schedule, data, t = cosine(100), rng.uniform(-1, 1, size=(70, 8)), np.array([20, 40, 60, 80, 99])
    alpha, sigma = alphas_sigmas(schedule, t, np.zeros((5, 8)))
    x = alpha * data[:5] + sigma * rng.standard_normal((5, 8))
    Q = np.concatenate([alpha * x, -(alpha**2)], axis=1) / sigma**2
    K = np.concatenate([data, (data**2).sum(axis=1, keepdims=True) / 2], axis=1)
    x0_hat, _ = forward(cupy, version, *(a[None, None].astype(dtype) for a in (Q, K, data)))
    bound = 1e-9 if dtype == "float64" else 0.05 if version >= 4 else 1e-4        # scores of a hundred, rounded
    np.testing.assert_allclose(x0_hat[0, 0], DatasetDenoiser(schedule, data)(x, t), rtol=0, atol=bound)


@fake_cupy.of_the_stand_in
# --- what is true of the kernels -------------------------------------------------------------------------------

@EACH
def test_the_order_of_threads_does_not_matter(cupy, version, dtype, monkeypatch):
    """The same bits with the threads of a block run forward, in reverse and shuffled: there is no race."""
    q, k, v = (normal(1, 2, n, c, seed=n, dtype=dtype) for n, c in ((67, 16), (131, 16), (131, 5)))
    found = []
    for order in (0, 1, 2):
        monkeypatch.setattr(fake_cupy, "launch", lambda program, kernel, grid, block, args, shared, order=order:
                            program.launch(kernel, grid, block, args, shared, order))
        found.append(forward(cupy, version, q, k, v, causal=True))
    assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def sanitized(monkeypatch, sanitize: str) -> None:
    monkeypatch.setattr(fake_cupy, "launch", lambda program, kernel, grid, block, args, shared: cuda_on_cpu.Program(
        program.source, dict(define[2:].split("=") for define in program.defines), name=program.name, sanitize=sanitize
    ).launch(kernel, grid, block, args, shared))


def awkward_cases(dtype):
    """Tiles that are not full, unaligned rows, NaN around them, masked or causal or neither; at last, aligned rows."""
    q, k, v = (normal(2, 2, n, c, seed=n, dtype=dtype) for n, c in ((67, 13), (131, 13), (131, 5)))
    for mask in (None, np.random.default_rng(0).random((2, 1, 67, 131)) < 0.5):
        for causal in (False, True):
            yield 2 * q, k, v, mask, causal, ("part",) * 3
    q, k, v = (normal(1, 1, n, c, seed=n, dtype=dtype) for n, c in ((67, 16), (131, 16), (131, 8)))
    yield q, k, v, None, False, ("heads",) * 3              # version 5 copies these asynchronously


@fake_cupy.of_the_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address", "thread"])
@EACH_ONCE
def test_sanitized(cupy, version, dtype, sanitize, monkeypatch):
    """There is no access out of bounds, and no race."""
    sanitized(monkeypatch, sanitize)
    for case in awkward_cases(dtype):
        check_case(cupy, version, dtype, case)


BARRIER = "__syncthreads();                                    // all have read "
PLANTED = [                                                 # version, the right text, the planted text
    (1, "min(M, n + 1)", "min(M, n)"), (1, "- top) / sum", "- top)"), (1, "mask += b * mask_b", "mask += mask_b"),
    (2, BARRIER + "the", "// the"), (2, "sum *= shrink;", ""), (2, "min(M, n0 + TILE_N)", "min(M, n0)"),
    (2, "m0 + m < M && c < d", "m0 + m < M"),
    (3, BARRIER + "v_tile", ""), (3, "other < LANES", "other < LANES / 2"), (3, "sum[i] *= shrink;", ""),
    (3, "* LN_BASE + log_", "+ log_"), (3, "row * mask_n + m * mask_m", "row * mask_m + m * mask_n"),
    (3, "if (c + u < columns)", ""),
    (4, "other < 4", "other < 2"), (4, "sum[i] *= shrink;", ""), (4, "i % 2 * 8", "i / 2 * 8"),
    (4, "to_tf32(p[2]), to_tf32(p[1])", "to_tf32(p[1]), to_tf32(p[2])"), (4, "top[i] * LN_2 + logf", "top[i] + logf"),
    (5, "copy_async_wait<0>();", "copy_async_wait<1>();"), (5, "more = m0 + TILE_M <", "more = m0 + 2 * TILE_M <"),
    (5, "sum[i] *= shrink;", ""), (5, "(tile - 1) % STAGES", "tile % STAGES"), (5, "k_next + 16", "k_next + 8"),
    (5, "if (row < rows && c + u < columns)", ""),
]
RACES = [(3, BARRIER + "k_tile", ""), (4, BARRIER + "the", "// the"),        # fibres happen to run these in order
         (5, "__syncthreads();                                    // everyone's are; and", "// and")]


def plant(monkeypatch, tmp_path, version, old, new) -> None:
    source = cuda.versions("attention_forward")[version]
    for header in source.path.parent.glob("*.cuh"):
        shutil.copy(header, tmp_path)
    text = source.path.read_text()
    assert old in text
    (tmp_path / source.path.name).write_text(text.replace(old, new))
    monkeypatch.setattr(cuda, "pick", lambda *_: replace(source, path=tmp_path / source.path.name))


@fake_cupy.of_the_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("version, old, new", PLANTED)
def test_planted_bugs_are_found(cupy, version, old, new, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, version, old, new)
    with pytest.raises((AssertionError, cuda_on_cpu.LaunchError)):
        for case in awkward_cases("float32"):
            check_case(cupy, version, "float32", case)


@fake_cupy.of_the_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("version, old, new", RACES)
def test_planted_races_are_found(cupy, version, old, new, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, version, old, new)
    sanitized(monkeypatch, "thread")
    with pytest.raises(cuda_on_cpu.LaunchError, match="data race"):
        check_case(cupy, version, "float32", list(awkward_cases("float32"))[-1 if version == 5 else 0])


# --- the host's side -------------------------------------------------------------------------------------------

def test_y_lies_as_a_linear_layer_wants_it(cupy):
    y, _ = attention_cuda.forward(*(cupy.asarray(normal(2, 3, 5, 4, seed=i)) for i in range(3)), None, False, 0.5)
    assert y.shape == (2, 3, 5, 4) and y.transpose(0, 2, 1, 3).flags.c_contiguous


@pytest.mark.parametrize("B, N, M", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_look_at(cupy, B, N, M):
    q, k = normal(B, 2, N, 4), normal(B, 2, M, 4)
    y, lse = forward(cupy, None, q, k, k)
    assert y.shape == (B, 2, N, 4) and not y.any() and (lse == np.inf).all()


def test_a_head_too_large_is_refused(cupy):
    q, v = cupy.ones((1, 1, 2, 161), dtype="float32"), cupy.ones((1, 1, 2, 4), dtype="float32")
    with pytest.raises(ValueError, match="attention on the GPU takes heads of up to 160 columns, not 161") as error:
        attention_cuda.forward(q, q, v, None, False, 1.0)
    fake_cupy.one_sentence(error)


@pytest.mark.parametrize("q, k, v, mask, message", [
    ((2, 3, 5, 4), (2, 3, 7, 8), (2, 3, 7, 4), None, "attention takes q"),
    ((2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4), None, "attention takes q"),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 2, 7, 4), None, "attention takes q"),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 6, 4), None, "attention takes q"),
    ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4), None, "at least one column"),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (2, 1, 1, 6), "mask must broadcast to"),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (1, 2, 3, 5, 7), "mask must broadcast to"),
])
def test_shapes_that_would_be_read_beyond_their_end_are_refused(cupy, q, k, v, mask, message):
    q, k, v = (cupy.zeros(shape, dtype="float32") for shape in (q, k, v))
    mask = None if mask is None else cupy.ones(mask, dtype=bool)
    y, lse = cupy.zeros((2, 3, 5, 4), dtype="float32"), cupy.zeros((2, 3, 5), dtype="float32")
    for call in (lambda: attention_cuda.forward(q, k, v, mask, False, 1.0),
                 lambda: attention_cuda.backward(q, k, v, mask, False, 1.0, y, lse, y),
                 lambda: scaled_dot_product_attention(*map(Tensor, (q, k, v)), mask)):
        with pytest.raises(ValueError, match=message) as error:
            call()
        fake_cupy.one_sentence(error)


def test_a_card_with_little_shared_memory_gets_an_older_version(cupy, monkeypatch):
    """This applies to the automatic choice; a version requested by number raises an error."""
    used = []
    monkeypatch.setattr(cuda, "shared_limit", lambda: 64 << 10)
    monkeypatch.setattr(cuda, "kernel", lambda source, *_, **__: used.append(source.number) or (lambda *_, **__: None))
    for d in (64, 96):
        q = cupy.ones((1, 1, 2, d), dtype="float32")
        attention_cuda.forward(q, q, q, None, False, 1.0)
    assert used == [3, 2]
    monkeypatch.undo()


def test_the_engine_on_the_gpu(cupy):
    """With a mask and `causal` it equals that of the CPU; and a mask must be on q's device."""
    q, k, v = (normal(2, 2, n, c, seed=n, dtype="float64") for n, c in ((5, 8), (7, 8), (7, 3)))
    mask = np.random.default_rng(0).random((2, 1, 1, 7)) < 0.5
    for arguments in ({}, {"mask": mask}, {"causal": True}, {"mask": mask, "causal": True}):
        there = {name: cupy.asarray(a) if name == "mask" else a for name, a in arguments.items()}
        y = scaled_dot_product_attention(*(Tensor(cupy.asarray(a)) for a in (q, k, v)), **there).data
        fake_cupy.assert_same(y, scaled_dot_product_attention(*map(Tensor, (q, k, v)), **arguments).data)
    with pytest.raises(TypeError, match="two devices"):
        scaled_dot_product_attention(*(Tensor(cupy.asarray(a)) for a in (q, k, v)), mask)


@pytest.mark.parametrize("N, M", [(5, 5), (4, 7), (7, 4)])
def test_causal_on_the_cpu(N, M):
    q, k, v = (Tensor(normal(2, 2, n, c, seed=n, dtype="float64")) for n, c in ((N, 8), (M, 8), (M, 3)))
    below = causal_mask(7, np)[:N, :M]
    mask = np.random.default_rng(0).random((2, 1, 1, M)) < 0.5
    for given_mask, same in ((None, below), (mask, below & mask)):
        y = scaled_dot_product_attention(q, k, v, given_mask, causal=True)
        assert np.array_equal(y.data, scaled_dot_product_attention(q, k, v, same).data)


