"""Attention's backward pass: every version of kernels/attention_backward_*.cu, run on this CPU."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_on_cpu, fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine.cuda import attention as attention_cuda
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.tensor import record

pytestmark = fake_cupy.needs_device

# The rounding error of each element type, half a unit in the last place; sums are in float32 or float64.
UNIT = {"float32": 2**-24, "float64": 2**-53, "float16": 2**-11, "bfloat16": 2**-8}
TF32 = 2**-11
SMALLEST = {"float16": 2**-25}                              # numbers below it become zero in half precision
SOURCES = cuda.versions("attention_backward")
VERSIONS = [(number, dtype) for number, source in SOURCES.items() for dtype in UNIT
            if source.takes_dtype(dtype, tf32=True)]
EXACT = [number for number, source in SOURCES.items() if "float64" in source.takes]


def first_dtype(version: int) -> str:
    return SOURCES[version].takes[0].replace("tf32", "float32")


# --- an independent calculation -----------------------------------------------------------------------------------

def weights(q, k, allowed, scale):
    """P (B, h, N, M) and lse (B, h, N) in float64; queries without keys have zeros, and lse +inf."""
    S = np.where(allowed, scale * np.einsum("bhnc,bhmc->bhnm", q, k), -np.inf)
    lse = np.logaddexp.reduce(S, axis=3, initial=-np.inf)
    lse[np.isneginf(lse)] = np.inf
    return np.exp(S - lse[..., None]), lse


def plain(q, k, v, dy, allowed, scale):
    """dq, dk, dv, by the full Jacobian of softmax  dP_im / dS_ij = P_im (delta_mj - P_ij), one query at a time."""
    P, _ = weights(q, k, allowed, scale)
    dq, dk = np.zeros(q.shape), np.zeros(k.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        p = P[b, h, i]
        jacobian = np.diag(p) - np.outer(p, p)                                      # (M, M)
        dS = jacobian @ (v[b, h] @ dy[b, h, i])
        dq[b, h, i] = scale * k[b, h].T @ dS
        dk[b, h] += scale * np.outer(dS, q[b, h, i])
    return dq, dk, np.einsum("bhnm,bhne->bhme", P, dy)


def bounds(q, k, v, dy, y, lse, allowed, scale, dtype, tensor_cores: bool):
    """Bounds of the rounding errors of dq, dk and dv.

    A sum of n products in arithmetic of unit u errs by at most (n + 1) u sum |a b|, in any order.  On tensor cores
    float32 is first rounded to TF32, and P and dS are rounded to TF32 or to the element type.  y is rounded, too.
    """
    u = UNIT["float64" if dtype == "float64" else "float32"]
    factor = 2.1 * TF32 if tensor_cores and dtype == "float32" else 0               # of a product of two inputs
    once = (TF32 if dtype == "float32" else UNIT[dtype]) * 1.01 if tensor_cores else 0      # of P or dS itself
    smallest = SMALLEST.get(dtype, 0) if tensor_cores else 0
    (N, d), (M, e) = q.shape[2:], v.shape[2:]
    P, _ = weights(q, k, allowed, scale)
    S = scale * np.einsum("bhnc,bhmc->bhnm", abs(q), abs(k))
    finite = np.where(np.isfinite(lse), lse, 0)[..., None]
    exponent = S * ((d + 4) * u + factor) + (abs(finite) + S + abs(finite)) * 2 * u + 4 * u    # error of S - lse
    of_P = P * np.expm1(exponent)
    dP = np.einsum("bhne,bhme->bhnm", abs(dy), abs(v))
    delta = np.einsum("bhne,bhne->bhn", abs(dy), abs(y))[..., None]
    dS = P * (dP + delta)
    of_dS = of_P * (dP + delta) + P * (dP * ((e + 4) * u + factor) + delta * ((e + 4) * u + UNIT[dtype] * 1.01))
    of_P, of_dS = of_P + once * P + smallest, of_dS + once * dS + smallest
    more = (max(N, M) + 4) * u + (TF32 if factor else 0)                            # of the last product
    errors = [scale * np.einsum("bhnm,bhmc->bhnc", of_dS + more * dS, abs(k)),
              scale * np.einsum("bhnm,bhnc->bhmc", of_dS + more * dS, abs(q)),
              np.einsum("bhnm,bhne->bhme", of_P + more * P, abs(dy))]
    return [1.05 * error for error in errors]


# --- cases ------------------------------------------------------------------------------------------------------

MASKS = {"none": (), "padding": (0, 2), "pairs": (2, 3), "a head's": (1, 2, 3), "all": (0, 1, 2, 3)}    # axes it has
LAYOUTS = ["plain", "heads last", "a slice", "columns first"]


def allowed_of(mask, causal, shape):
    allowed = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    return allowed & np.tri(*shape[2:], dtype=bool) if causal else allowed


def mask_of(kind: str, shape, rng):
    """A mask that repeats along some axes; if it has an axis of queries, the first query has no keys."""
    if kind == "none":
        return None
    axes = (0, 3) if kind == "padding" else MASKS[kind]
    mask = rng.random([n if axis in axes else 1 for axis, n in enumerate(shape)]) < 0.7
    if 2 in axes:
        mask[:, :, 0] = False
    return mask


def placed(cupy, a, layout: str):
    """a (B, h, N, d) on the device, in this layout; the gaps between its rows are NaN."""
    if layout == "heads last":
        return cupy.asarray(np.ascontiguousarray(a.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
    if layout == "a slice":
        wide = np.full((*a.shape[:3], a.shape[3] + 3), np.nan, a.dtype)
        wide[..., 1:-2] = a
        return cupy.asarray(wide)[..., 1:-2]
    if layout == "columns first":
        return cupy.asarray(np.ascontiguousarray(a.transpose(3, 0, 1, 2))).transpose(1, 2, 3, 0)
    return cupy.asarray(a)


def inputs(shape, dtype: str, seed: int, kind: str = "none", causal=False, size: float = 1.0, alike: bool = False):
    """q, k, v, dy, y, lse, mask and which pairs are allowed; all float64, representable in dtype; y is not rounded.

    size: the scale of q, and so of the scores.  alike: every key is equal to the first.
    """
    B, h, N, M, d, e = shape
    rng, exact = np.random.default_rng(seed), fake_cupy.dtype_of(dtype)
    q, k, v, dy = (rng.standard_normal((B, h, *last)).astype(exact).astype(np.float64)
                   for last in ((N, d), (M, d), (M, e), (N, e)))
    q, k = (q * size).astype(exact).astype(np.float64), k[:, :, [0] * M] if alike else k
    mask = mask_of(kind, (B, h, N, M), rng)
    allowed = allowed_of(mask, causal, (B, h, N, M))
    P, lse = weights(q, k, allowed, d**-0.5)
    return q, k, v, dy, np.einsum("bhnm,bhme->bhne", P, v), lse, mask, allowed


def way_back(cupy, version, dtype, q, k, v, dy, y, lse, mask, causal, scale, layout="plain"):
    """dq, dk, dv, in dtype."""
    exact, acc = fake_cupy.dtype_of(dtype), "float64" if dtype == "float64" else "float32"
    q, k, v, dy, y = (placed(cupy, a.astype(exact), layout) for a in (q, k, v, dy, y))
    found = attention_cuda.backward(q, k, v, None if mask is None else cupy.asarray(mask), causal, scale, y,
                                    cupy.asarray(lse.astype(acc)), dy, version=version)
    for a, like in zip(found, (q, k, v), strict=True):
        assert a.shape == like.shape and a.dtype == exact
    return [a.get() for a in found]


def check(cupy, version, dtype, shape, kind="none", causal=False, layout="plain", seed=0, size=1.0):
    *arrays, mask, allowed = inputs(shape, dtype, seed, kind, causal, size)
    q, k, v, dy, y, lse = arrays
    scale = shape[4] ** -0.5
    found = way_back(cupy, version, dtype, *arrays, mask, causal, scale, layout)
    expected = plain(q, k, v, dy, allowed, scale)
    rounding = bounds(q, k, v, dy, y, lse, allowed, scale, dtype, version >= 4)
    for name, a, b, error in zip(("dq", "dk", "dv"), found, expected, rounding, strict=True):
        error = error + abs(b) * UNIT[dtype] * 1.01 + SMALLEST.get(dtype, 1e-37)
        wrong = ~(abs(a.astype(np.float64) - b) <= error)                           # NaN is wrong
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} wrong, the first at {np.argwhere(wrong)[0]}"


AWKWARD = [                                                 # (B, h, N, M, d, e), mask, causal, layout
    ((1, 1, 1, 1, 32, 32), "none", False, "plain"),
    ((2, 2, 17, 5, 20, 24), "padding", False, "heads last"),
    ((1, 2, 33, 31, 32, 7), "pairs", True, "a slice"),
    ((1, 1, 65, 64, 32, 32), "none", True, "plain"),
    ((1, 1, 16, 67, 1, 17), "all", False, "columns first"),
    ((1, 1, 3, 130, 24, 32), "none", True, "heads last"),       # keys that no query sees
    ((1, 1, 130, 3, 32, 8), "a head's", True, "plain"),
]
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65]


def some_lengths(most):
    return st.tuples(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS)).filter(lambda nm: math.prod(nm) <= most)


def cases(most: int, columns):
    return st.tuples(
        st.builds(lambda bh, nm, de: (*bh, *nm, *de), st.sampled_from([(1, 1), (1, 2), (2, 1)]), some_lengths(most),
                  columns),
        st.sampled_from(sorted(MASKS)), st.booleans(), st.sampled_from(LAYOUTS), st.integers(0, 2**32 - 1),
        st.sampled_from([0.1, 1.0, 1.0, 5.0]))


COLUMNS_OF_32 = st.tuples(st.sampled_from([32, 17, 24]), st.sampled_from([1, 8, 13, 32])).flatmap(
    lambda de: st.sampled_from([de, de[::-1]]))             # one compiled kernel, HEAD_DIM = 32, serves them


@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_every_version_against_float64(cupy, version, dtype):
    @settings(max_examples=8)
    @given(cases(2000, COLUMNS_OF_32))
    def more(case):
        check(cupy, version, dtype, *case)

    for case in AWKWARD:
        check(cupy, version, dtype, *case)
    more()


@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_relative_error(cupy, version, dtype):
    """The bounds above hold for any numbers; these have random errors, so a much smaller bound applies."""
    *arrays, _, allowed = inputs((1, 2, 65, 64, 32, 24), dtype, 1)
    expected = plain(*arrays[:4], allowed, 32**-0.5)
    unit = max(UNIT[dtype], TF32 if version >= 4 else 0)
    units = 1.6 if unit > 2**-20 else 20                    # lse, of about 4.5, is rounded too, and P with it
    for a, b in zip(way_back(cupy, version, dtype, *arrays, None, False, 32**-0.5), expected, strict=True):
        assert np.linalg.norm(a.astype(np.float64) - b) <= units * unit * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("version", SOURCES)
def test_heads_of_80_columns(cupy, version):
    """Wide heads have tiles of their own."""
    check(cupy, version, first_dtype(version), (1, 1, 65, 67, 80, 72), "all", True)


@pytest.mark.slow
@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_every_head_dimension(cupy, version, dtype):
    for columns in (8, 40, 64, 112, 128, 160) if dtype == first_dtype(version) else (64, 160):
        check(cupy, version, dtype, (1, 2, 35, 66, columns, columns), "padding", False, "heads last")
        check(cupy, version, dtype, (1, 1, 66, 66, columns, columns - 5), "pairs", True)


@pytest.mark.slow
@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_more_cases(cupy, version, dtype):
    @settings(max_examples=40)
    @given(cases(5000, st.tuples(st.integers(1, 16), st.integers(1, 16)) | COLUMNS_OF_32))
    def more(case):
        check(cupy, version, dtype, *case)

    more()


# --- against the way there ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", EXACT)
@pytest.mark.parametrize("shape, kind, causal, directions", [
    ((2, 1, 18, 35, 20, 17), "padding", False, 4), ((1, 2, 35, 33, 17, 24), "pairs", True, 4),
    pytest.param((1, 2, 3, 4, 3, 2), "pairs", False, 0, marks=pytest.mark.slow)])
def test_gradients_by_central_differences(cupy, version, shape, kind, causal, directions):
    """Of the forward kernel, in float64, along a random cotangent."""
    q, k, v, *_, mask, _ = inputs(shape, "float64", 3, kind, causal)
    device_mask = None if mask is None else cupy.asarray(mask)
    scale = 0.7                                             # no special number

    def attention(*leaves):
        on_device = [cupy.asarray(leaf.data) for leaf in leaves]
        y, lse = attention_cuda.forward(*on_device, device_mask, causal, scale)

        def pullback(dy):
            found = attention_cuda.backward(*on_device, device_mask, causal, scale, y, lse, cupy.asarray(dy),
                                            version=version)
            return tuple(a.get() for a in found)
        return record(y.get(), leaves, pullback)

    check_gradients(attention, q, k, v, directions=directions)


# --- laws -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version, dtype", VERSIONS)
def test_rows_of_dS_sum_to_zero(cupy, version, dtype):
    """The same number added to a row of S changes no P.  So keys that are all alike give dq = 0, and dk sums to zero:
    sum_j dk_j = scale sum_i q_i sum_j dS_ij."""
    shape, scale = (1, 2, 35, 37, 20, 24), 20**-0.5
    for alike in True, False:
        *arrays, mask, allowed = inputs(shape, dtype, 5, "pairs", alike=alike)
        found = [a.astype(np.float64) for a in way_back(cupy, version, dtype, *arrays, mask, False, scale)]
        of_dq, of_dk, of_dv = (error + abs(a) * UNIT[dtype] * 1.01 + SMALLEST.get(dtype, 0) for a, error in zip(
            found, bounds(*arrays, allowed, scale, dtype, version >= 4), strict=True))
        dq, dk, dv = found
        if alike:
            assert (abs(dq) <= of_dq).all() and abs(dk).max() > 0.1
        assert (abs(dk.sum(axis=2)) <= of_dk.sum(axis=2)).all()
        # and the row of P of a query with keys sums to 1: the dv sum to the sum of those dy
        dy = np.where(allowed.any(axis=3, keepdims=True), arrays[3], 0)
        assert (abs(dv.sum(axis=2) - dy.sum(axis=2)) <= of_dv.sum(axis=2)).all()


@pytest.mark.parametrize("version", SOURCES)
def test_rows_and_columns_that_are_masked_give_exact_zeros_and_touch_nothing(cupy, version):
    dtype, shape = first_dtype(version), (1, 1, 37, 35, 24, 20)
    *arrays, _, _ = inputs(shape, dtype, 7)
    mask = np.ones((1, 1, 37, 35), bool)
    mask[:, :, [0, 17, 36]], mask[..., [0, 16, 34]] = False, False
    P, arrays[5] = weights(*arrays[:2], mask, 0.5)
    arrays[4] = P @ arrays[2]
    assert np.isposinf(arrays[5][0, 0, [0, 17, 36]]).all() and not arrays[4][0, 0, [0, 17, 36]].any()
    first = way_back(cupy, version, dtype, *arrays, mask, False, 0.5)
    dq, dk, dv = first
    assert not dq[:, :, [0, 17, 36]].any() and not dk[:, :, [0, 16, 34]].any() and not dv[:, :, [0, 16, 34]].any()
    for a in arrays[0], arrays[3]:                          # q and dy of queries without keys
        a[:, :, [0, 17, 36]] = 1e3
    for a in arrays[1:3]:                                   # k and v of keys without queries
        a[:, :, [0, 16, 34]] = -1e3
    for a, b in zip(way_back(cupy, version, dtype, *arrays, mask, False, 0.5), first, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("version", SOURCES)
def test_causal_is_its_mask_and_sees_no_later_token(cupy, version):
    dtype, shape = first_dtype(version), (1, 2, 67, 70, 24, 20)
    *arrays, _, allowed = inputs(shape, dtype, 8, causal=True)
    with_word = way_back(cupy, version, dtype, *arrays, None, True, shape[4] ** -0.5)
    with_mask = way_back(cupy, version, dtype, *arrays, allowed, False, shape[4] ** -0.5)
    for a, b in zip(with_word, with_mask, strict=True):
        assert np.array_equal(a, b)
    assert not with_word[1][:, :, 67:].any() and not with_word[2][:, :, 67:].any()


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("version", SOURCES)
def test_the_order_of_threads_changes_no_bit(cupy, monkeypatch, version):
    dtype, launch, results = first_dtype(version), cuda_on_cpu.Program.launch, []
    *arrays, mask, _ = inputs((1, 2, 67, 66, 24, 32), dtype, 9, "all", True)
    for order in 0, 0, 1, 2:
        monkeypatch.setattr(cuda_on_cpu.Program, "launch", lambda self, kernel, grid, block, args, shared=0, _=0,
                            order=order: launch(self, kernel, grid, block, args, shared, order))
        results.append(way_back(cupy, version, dtype, *arrays, mask, True, 0.2))
    for result in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("N, M", [(0, 3), (3, 0), (0, 0)])
def test_nothing_gives_nothing(cupy, N, M):
    *arrays, mask, _ = inputs((2, 1, N, M, 4, 3), "float32", 0)
    found = way_back(cupy, None, "float32", *arrays, mask, False, 0.5)
    assert not any(a.any() for a in found)


# --- which version, and what is refused -----------------------------------------------------------------------------

def test_a_card_with_little_shared_memory_takes_an_earlier_version(cupy, monkeypatch):
    launched = []
    call = cuda.Kernel.__call__
    monkeypatch.setattr(cuda.Kernel, "__call__", lambda self, *args, shared=0: (
        launched.append((self.name, shared)), call(self, *args, shared=shared))[1])
    *arrays, mask, _ = inputs((1, 1, 5, 6, 24, 24), "float32", 0)
    asked = []
    for limit in 227 << 10, 48 << 10, 15 << 10, 1 << 10:
        monkeypatch.setattr(cuda, "shared_limit", lambda limit=limit: limit)
        launched.clear()
        way_back(cupy, None, "float32", *arrays, mask, False, 0.5)
        assert [name for name, _ in launched] == ["attention_dq", "attention_dkv"]
        asked.append(launched[1][1])
        assert asked[-1] <= limit
    assert asked == sorted(asked, reverse=True) and asked[0] > 48 << 10 and asked[-1] == 0


def test_refusals(cupy):
    def backward(dtype, d, **kwargs):
        q, lse = cupy.zeros((1, 1, 2, d), dtype=dtype), cupy.zeros((1, 1, 2), dtype="float32")
        return attention_cuda.backward(q, q, q, None, False, 1.0, q, lse, q, **kwargs)
    for error, word, args in ((ValueError, "160", ("float32", 161)), (TypeError, "int32", ("int32", 8)),
                              (TypeError, "lse must be float64", ("float64", 8))):
        with pytest.raises(error, match=word) as caught:
            backward(*args)
        fake_cupy.one_sentence(caught)
    q, lse = cupy.zeros((1, 1, 2, 8), dtype="float32"), cupy.zeros((1, 1, 2), dtype="float32")
    for y, of, dy in (q[..., :5], lse, q), (q, lse[..., :1], q), (q, lse, q[:, :, :1]):
        with pytest.raises(ValueError, match="dy and y of") as caught:
            attention_cuda.backward(q, q, q, None, False, 1.0, y, of, dy)
        fake_cupy.one_sentence(caught)
    with pytest.raises(TypeError, match="not float64"):
        backward("float64", 8, version=4)
    assert not backward("float32", 8)[0].any()              # and the next call works


# --- these tests can fail ---------------------------------------------------------------------------------------------

BARRIER = "__syncthreads();                                   "
# version, the right text, the planted text, and what detects it: the numbers (None) or a sanitizer
PLANTED = [
    (1, "if (i >= N) return;\n    q ", "if (i > N) return;\n    q ", "address"),
    (1, "causal ? min(M, i + 1) : M", "causal ? min(M, i) : M", None),
    (1, "if (mask && !mask[i * mask_n]) continue;", "", None),
    (1, "if (c < d) dk[c]", "if (c < HEAD_DIM) dk[c]", "address"),
    (2, "P * (dP - delta_i)", "P * dP", None),
    (2, f"{BARRIER} // the scores are whole\n        accumulate(sum", "accumulate(sum", None),
    (2, f"{BARRIER} // nobody reads P any more", "", None),
    (2, "r < rows && c < columns ?", "r < rows ?", None),
    (3, "__syncwarp();                                           // these are whole", "", None),
    (3, "__syncwarp();                                           // nobody reads the last ones any more", "", "thread"),
    (3, "(columns | step) % 4 == 0", "columns % 4 == 0", "address"),
    (3, "j0 / COLUMNS * COLUMNS", "j0 / COLUMNS * COLUMNS + COLUMNS", None),
    (3, "distance = 4; distance", "distance = 2; distance", None),
    (4, "n / 2 + n % 2 * 2]);         // 0, 2, 1, 3", "n]);", None),
    (4, "S[n][u] *= dP[n][u] - delta_tile[8 * n + lane % 4 * 2 + u % 2]",
     "S[n][u] *= dP[n][u] - delta_tile[8 * n + lane % 4 * 2]", None),
    (4, "i0 + n < N ? lse[i0 + n] : POS_INF", "lse[i0 + n]", "address"),
    (4, f"{BARRIER} // nobody reads the tiles any more\n    }}\n    dk +=", "}\n    dk +=", "thread"),
    (4, "r < rows && c < columns) to[", "c < columns) to[", "address"),
    (5, f"copy_async_wait<0>();\n        {BARRIER} // the q tile", f"{BARRIER} // the q tile", None),
    (5, f"{BARRIER} // nobody reads dy any more", "", None),
    (5, "v + next * v_m, M - next", "v + j0 * v_m, M - j0", None),
    (5, "if (r < rows && c + u < columns)", "if (r < rows)", None),
    (5, f"{BARRIER} // the next v tile", "// the next v tile", "thread"),
]


@fake_cupy.of_the_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("version, right, wrong, sanitize", PLANTED)
def test_a_planted_error_is_found(cupy, monkeypatch, version, right, wrong, sanitize):
    text = SOURCES[version].text
    assert right in text, "the kernel was rewritten: change the text of this planted error"
    monkeypatch.setattr(cuda.Source, "text", property(lambda self: text.replace(right, wrong)))
    monkeypatch.setattr(cuda_on_cpu, "Program", functools.partial(cuda_on_cpu.Program, sanitize=sanitize))
    cuda._module.cache_clear(), cuda._compiled.cache_clear()
    try:
        with pytest.raises((AssertionError, cuda_on_cpu.LaunchError)) as caught:
            for case in AWKWARD[1:]:
                check(cupy, version, "float32", *case)
        assert not sanitize or caught.type is cuda_on_cpu.LaunchError
    finally:
        cuda._module.cache_clear(), cuda._compiled.cache_clear()
