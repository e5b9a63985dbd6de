"""ptx.cuh on a CPU: every instruction does what NVIDIA's manual ("PTX ISA") says.

The fragment layouts are written here a second time, lane by lane, from the manual's formulas, and small kernels that
use them are compared with NumPy's matrix product.
"""

import numpy as np
import pytest
from support import fake_cupy
from support.cuda_on_cpu import LaunchError, Program

pytestmark = fake_cupy.needs_compiler

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4                     # the manual's groupID and threadID_in_group


def program(text, element="float"):
    return Program('#include "element.cuh"\n' + text, {"ELEMENT": element}, name="test_ptx.cu")


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def floats(x):
    return np.asarray(x, np.uint32).view(np.float32)


def same_numbers(got, want):
    """The same bits, except that all NaNs count as equal."""
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(bits(got)[~nan], bits(want)[~nan])


# --- half precision ---------------------------------------------------------------------------------------

CONVERT = """
extern "C" __global__ void widen(const T* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = wide(x[i]);
}
extern "C" __global__ void round_off(const float* x, T* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = narrow(x[i]);
}
extern "C" __global__ void pack_two(const float* x, unsigned* f16, unsigned* bf16, unsigned* tf32, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        f16[i] = pack_f16(x[2 * i], x[2 * i + 1]);
        bf16[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        tf32[i] = to_tf32(x[2 * i]);
    }
}
"""
EVERY_HALF = np.arange(65536, dtype=np.uint16)


def convert(element, kernel, x, y):
    program(CONVERT, element)[kernel](1, 64, [x, y, np.int32(x.size)])
    return y


def around(numbers):
    """float32 numbers at and next to each of `numbers`, and half way to the next one."""
    x = np.float32(numbers)
    x = np.sort(x[np.isfinite(x)])
    half_way = ((x[1:].astype(np.float64) + x[:-1]) / 2).astype(np.float32)
    with np.errstate(over="ignore"):
        near = [np.nextafter(m, np.float32(s)) for m in (x, half_way) for s in (-np.inf, np.inf)]
    odd = np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45])
    return np.concatenate([x, half_way, *near, odd])


def nearest(x, kept, tie):
    """x with `kept` bits of a float32: the nearer of its two neighbours, compared in float64; NaN stays NaN."""
    ordinary, step = np.where(np.isfinite(x), x, np.float32(0)), np.uint32(1 << (32 - kept))
    lower = np.abs(ordinary).view(np.uint32) // step * step
    upper = np.where(lower + step == 0x7f800000, np.float64(2.0**128), floats(np.minimum(lower + step, 0x7f7fffff)))
    past_middle = np.abs(ordinary, dtype=np.float64) * 2 - floats(lower) - upper
    up = (past_middle > 0) | (past_middle == 0) & (lower // step % 2 == 1 if tie == "even" else True)
    return np.where(np.isfinite(x), np.copysign(floats(lower + step * up), x), x).astype(np.float32)


def test_float16_is_numpys_over_all_65536_patterns():
    halves = EVERY_HALF.view(np.float16)
    same_numbers(convert("float16", "widen", EVERY_HALF, np.empty(65536, np.float32)), halves.astype(np.float32))
    x = around(halves)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    got = convert("float16", "round_off", x, np.empty(x.size, np.uint16)).view(np.float16)
    same_numbers(got.astype(np.float32), want.astype(np.float32))


def test_bfloat16_is_the_upper_half_of_a_float32_rounded_to_the_nearest_even_one():
    every = floats(EVERY_HALF.astype(np.uint32) << 16)
    same_numbers(convert("bfloat16", "widen", EVERY_HALF, np.empty(65536, np.float32)), every)
    x = around(every)
    got = convert("bfloat16", "round_off", x, np.empty(x.size, np.uint16))
    same_numbers(floats(got.astype(np.uint32) << 16), nearest(x, 16, "even"))


def test_pairs_are_packed_low_half_first_and_tf32_keeps_nineteen_bits():
    x = around(floats(EVERY_HALF.astype(np.uint32) << 16))
    x = np.concatenate([x, np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32).view(np.float32)])
    pairs = np.stack([x, np.random.default_rng(1).permutation(x)], axis=1)
    f16, bf16, tf32 = np.empty((3, len(x)), np.uint32)
    program(CONVERT)["pack_two"](1, 64, [pairs, f16, bf16, tf32, np.int32(len(x))])
    for i, shift in enumerate((0, 16)):
        with np.errstate(over="ignore", invalid="ignore"):
            want = pairs[:, i].astype(np.float16).astype(np.float32)
        half = (f16 >> shift & 0xffff).astype(np.uint16)
        same_numbers(half.view(np.float16).astype(np.float32), want)
        same_numbers(floats((bf16 >> shift & 0xffff) << 16), nearest(pairs[:, i], 16, "even"))
    same_numbers(floats(tf32), nearest(x, 19, "away"))
    assert not np.any(tf32[~np.isnan(x)] & 0x1fff)


# --- the tensor cores -------------------------------------------------------------------------------------

MMA = """
extern "C" __global__ void multiply(const unsigned* a, const unsigned* b, float* d, int which, int absent) {
    unsigned my_a[4], my_b[2];
    float my_d[4];
    for (int i = 0; i < 4; ++i) my_a[i] = a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) my_b[i] = b[threadIdx.x * 2 + i];
    for (int i = 0; i < 4; ++i) my_d[i] = d[threadIdx.x * 4 + i];
    if (threadIdx.x == absent) return;
    if (which == 0) mma_m16n8k8_tf32(my_d, my_a, my_b);
    if (which == 1) mma_m16n8k16_f16(my_d, my_a, my_b);
    if (which == 2) mma_m16n8k16_bf16(my_d, my_a, my_b);
    for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = my_d[i];
}
"""


def multiply(kind, a, b, d, absent=-1):
    """d += a b, in registers."""
    which = ["tf32", "f16", "bf16"].index(kind)
    program(MMA)["multiply"](1, 32, [a, b, d, np.int32(which), np.int32(absent)])


def fragments_of_d():
    """(row, column) of register i of each lane: (32, 4) each."""
    i = np.arange(4)
    row = np.where(i < 2, GROUP[:, None], GROUP[:, None] + 8)
    return row, IN_GROUP[:, None] * 2 + (i & 1)


def fragments_of_a(k):
    """(row, column) of number i of each lane, k/2 numbers a lane."""
    i = np.arange(k // 2)
    if k == 8:                                              # .tf32
        row = np.where((i == 0) | (i == 2), GROUP[:, None], GROUP[:, None] + 8)
        return row, np.where(i < 2, IN_GROUP[:, None], IN_GROUP[:, None] + 4)
    row = np.where((i < 2) | ((4 <= i) & (i < 6)), GROUP[:, None], GROUP[:, None] + 8)
    return row, IN_GROUP[:, None] * 2 + (i & 1) + np.where(i >= 4, 8, 0)


def fragments_of_b(k):
    i = np.arange(k // 4)
    column = np.broadcast_to(GROUP[:, None], (32, k // 4))
    if k == 8:
        return np.where(i == 0, IN_GROUP[:, None], IN_GROUP[:, None] + 4), column
    return IN_GROUP[:, None] * 2 + (i & 1) + np.where(i >= 2, 8, 0), column


def registers(numbers, kind):
    """(32, n) float32 -> (32, registers) uint32; halves in pairs, the first in the lower half."""
    if kind == "tf32":
        return bits(numbers)
    halves = numbers.astype(np.float16).view(np.uint16) if kind == "f16" else (bits(numbers) >> 16).astype(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint32)


@pytest.mark.parametrize("kind, k", [("tf32", 8), ("f16", 16), ("bf16", 16)])
def test_mma_is_numpys_product(kind, k):
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-100, 100, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    registers_of_d = d[fragments_of_d()].copy()
    multiply(kind, registers(a[fragments_of_a(k)], kind), registers(b[fragments_of_b(k)], kind), registers_of_d)
    np.testing.assert_array_equal(registers_of_d, (d + a @ b)[fragments_of_d()])          # whole numbers: exact


def test_mma_does_not_see_the_lower_13_bits_of_a_tf32_number():
    a, b = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    b = b[:8]
    d = np.zeros((32, 4), np.float32)
    multiply("tf32", bits(a[fragments_of_a(8)]), bits(b[fragments_of_b(8)]), d)

    def cut(x):
        return floats(bits(x) & np.uint32(0xffffe000)).astype(np.float64)
    np.testing.assert_allclose(d, (cut(a) @ cut(b))[fragments_of_d()], rtol=1e-5, atol=1e-6)
    assert np.abs(d - (a @ b)[fragments_of_d()]).max() > 1e-4


def test_mma_waits_for_all_32_lanes():
    a, b, d = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32)
    with pytest.raises(LaunchError, match="waits for its warp in line 11"):
        multiply("f16", a, b, d, absent=5)


# --- ldmatrix ---------------------------------------------------------------------------------------------

LOAD = """
extern "C" __global__ void load(const unsigned short* x, const int* rows, unsigned* out, int width, int offset,
                                int count, int turned) {
    extern __shared__ float4 dynamic_shared[];
    unsigned short* shared = reinterpret_cast<unsigned short*>(dynamic_shared);
    for (int i = threadIdx.x; i < 32 * width; i += 32) shared[i] = x[i];
    __syncthreads();
    const unsigned short* row = shared + rows[threadIdx.x] * width + offset;
    unsigned four[4] = {}, two[2];
    if (count == 4 && !turned) ldmatrix_x4(four, row);
    if (count == 4 && turned) ldmatrix_x4_trans(four, row);
    if (count == 2 && !turned) ldmatrix_x2(two, row);
    if (count == 2 && turned) ldmatrix_x2_trans(two, row);
    for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = count == 4 ? four[i] : two[i];
}
"""


def load(count, turned, rows, x, offset=0):
    out = np.empty((32, count), np.uint32)
    program(LOAD)["load"](1, 32, [x, rows, out, *map(np.int32, (x.shape[1], offset, count, turned))], shared=x.nbytes)
    return out


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [4, 2])
def test_ldmatrix_deals_each_row_to_a_group_of_four_lanes(count, turned):
    rng = np.random.default_rng(count)
    x = rng.permutation(32 * 24).astype(np.uint16).reshape(32, 24)
    rows = rng.permutation(32).astype(np.int32)             # lane 8 i + r points at row r of square i
    got = load(count, turned, rows, x, offset=8).view(np.uint16).reshape(32, count, 2)
    for i in range(count):
        square = x[rows[8 * i:8 * i + 8], 8:16]
        square = square.T if turned else square
        np.testing.assert_array_equal(got[:, i], square[GROUP[:, None], 2 * IN_GROUP[:, None] + [0, 1]])


def test_ldmatrix_gives_the_fragments_that_mma_takes():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((16, 8)).astype(np.float32)     # TF32: a row is 16 half-words of shared memory
    rows = np.repeat(np.arange(16), 2).reshape(16, 2).T.ravel()                           # row l % 16, chunk l / 16
    shared = np.zeros((32, 8), np.uint16)                   # one chunk of 16 bytes a row, chunk 2 r + c
    shared[:] = a.view(np.uint16).reshape(32, 8)
    got = load(4, False, (2 * rows + LANES // 16).astype(np.int32), shared)
    np.testing.assert_array_equal(got, bits(a[fragments_of_a(8)]))

    b = rng.standard_normal((16, 8)).astype(np.float16)     # float16, rows along n: transposed
    got = load(2, True, (LANES % 16).astype(np.int32), np.vstack([b, b]).view(np.uint16))
    np.testing.assert_array_equal(got, registers(b[fragments_of_b(16)].astype(np.float32), "f16"))


def test_ldmatrix_refuses_a_row_that_is_not_aligned():
    with pytest.raises(LaunchError, match="line 13: ldmatrix.* multiple of 16 bytes"):
        load(2, False, LANES.astype(np.int32), np.zeros((32, 12), np.uint16))


# --- asynchronous copies ----------------------------------------------------------------------------------

COPY = """
extern "C" __global__ void copy(const float* x, float* y, int n, int wait, int late) {
    __shared__ float4 space[32];                            // 16-byte aligned
    float (*shared)[64] = reinterpret_cast<float (*)[64]>(space);
    const int i = threadIdx.x;
    copy_async_4(&shared[0][i], x + i, i < n);
    copy_async_commit();
    if (i % 4 == 0) copy_async_16(&shared[1][i], x + 64 + i, i < n);
    if (i % 2 == 0) copy_async_8(&shared[1][i], x + 64 + i, i < n);
    copy_async_commit();
    if (wait == 0) copy_async_wait<0>();
    if (wait == 1) copy_async_wait<1>();
    __syncthreads();
    if (late && i < 32) copy_async_4(&shared[0][i], x, true);   // the threads after 31 have not read these yet
    y[i] = shared[0][63 - i];
    y[64 + i] = shared[1][63 - i];
}
"""


def copy(wait, n=64, late=0, x=None):
    y = np.zeros((2, 64), np.float32)
    x = np.arange(128, dtype=np.float32) if x is None else x
    program(COPY)["copy"](2, 64, [x, y, *map(np.int32, (n, wait, late))])
    return y[:, ::-1]


def test_a_copy_lands_at_the_wait_and_is_zero_where_it_is_not_valid():
    x = np.arange(128, dtype=np.float32).reshape(2, 64)
    np.testing.assert_array_equal(copy(wait=0), x)
    x[:, 40:] = 0
    np.testing.assert_array_equal(copy(wait=0, n=40), x)


def test_a_wait_that_is_missing_or_too_short_reads_nan():
    assert np.isnan(copy(wait=-1)).all()
    short = copy(wait=1)                                    # all groups but the newest
    np.testing.assert_array_equal(short[0], np.arange(64))
    assert np.isnan(short[1]).all()


def test_a_request_spoils_what_is_still_being_read():
    assert np.isnan(copy(wait=0, late=1)[0, :32]).all()


def test_a_copy_that_is_not_aligned_is_refused():
    x = np.zeros(130, np.float32)
    with pytest.raises(LaunchError, match="line 9: copy_async: the global address.* multiple of 16 bytes"):
        copy(wait=0, x=x[1:] if x.ctypes.data % 16 == 0 else x)


# --- wgmma ------------------------------------------------------------------------------------------------

WGMMA = """
extern "C" __global__ void multiply(const float4* operands, float* d, int which, int a_from, int b_from, int stop) {
    extern __shared__ float4 dynamic_shared[];
    for (int i = threadIdx.x; i < 1024; i += 128) copy_async_16(&dynamic_shared[i], &operands[i], true);
    copy_async_commit();
    copy_async_wait<0>();
    if (stop != 1) wgmma_see_writes();
    __syncthreads();
    float sum[32];
    for (int i = 0; i < 32; ++i) sum[i] = d[threadIdx.x * 32 + i];
    if (stop != 2) wgmma_fence();
    const unsigned long long a = wgmma_operand((const char*)dynamic_shared + a_from);
    const unsigned long long b = wgmma_operand((const char*)dynamic_shared + 8192 + b_from);
    if (which == 0) wgmma_m64n64k16_f16<0, 0>(sum, a, b);
    if (which == 1) wgmma_m64n64k16_f16<0, 1>(sum, a, b);
    if (which == 2) wgmma_m64n64k16_f16<1, 0>(sum, a, b);
    if (which == 3) wgmma_m64n64k16_bf16<1, 1>(sum, a, b);
    wgmma_commit();
    if (stop == 3) wgmma_wait<1>(); else wgmma_wait<0>();
    wgmma_landed(sum);
    for (int i = 0; i < 32; ++i) d[threadIdx.x * 32 + i] = sum[i];
}
"""


def swizzled(square):
    """(64, 64) halves, in lines of 128 bytes: bits 4-6 of a byte's address are XORed with bits 7-9."""
    address = np.arange(8192)
    memory = np.empty(8192, np.uint8)
    memory[address ^ (address >> 7 & 7) << 4] = np.ascontiguousarray(square).view(np.uint8).ravel()
    return memory


def wgmma(which, turned, kind, step=0, stop=0, seed=0):
    """d before, a @ b, and d after; of 64 numbers along k the 16 from 16 step on."""
    rng = np.random.default_rng(seed)
    a, b, d = (rng.integers(-50, 50, (64, 64)).astype(np.float32) for _ in range(3))        # (m, k), (k, n), (m, n)
    half = (lambda x: x.astype(np.float16).view(np.uint16)) if kind == "f16" else (
        lambda x: (bits(np.ascontiguousarray(x)) >> 16).astype(np.uint16))
    operands = np.concatenate([swizzled(half(a.T if turned[0] else a)), swizzled(half(b if turned[1] else b.T))])
    # the manual's "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"
    thread, i = np.arange(128)[:, None], np.arange(32)
    row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    registers_of_d = d[row, column]
    begin = [2048 * step if t else 32 * step for t in turned]
    program(WGMMA)["multiply"](1, 128, [operands, registers_of_d, *map(np.int32, (which, *begin, stop))], shared=16384)
    ab = a[:, 16 * step:16 * step + 16] @ b[16 * step:16 * step + 16]
    return d[row, column], ab[row, column], registers_of_d


@pytest.mark.parametrize("which, turned, kind", [(0, (0, 0), "f16"), (1, (0, 1), "f16"), (2, (1, 0), "f16"),
                                                 (3, (1, 1), "bf16")])
def test_wgmma_is_numpys_product(which, turned, kind):
    for step in range(4):
        before, product, after = wgmma(which, turned, kind, step)
        np.testing.assert_array_equal(after, before + product)                            # whole numbers: exact


WIDE = """
extern "C" __global__ void multiply(const float4* operands, float* d, int turned, int leading) {
    extern __shared__ float4 dynamic_shared[];
    for (int i = threadIdx.x; i < 1536; i += 128) copy_async_16(&dynamic_shared[i], &operands[i], true);
    copy_async_commit();
    copy_async_wait<0>();
    wgmma_see_writes();
    __syncthreads();
    float sum[64];
    for (int i = 0; i < 64; ++i) sum[i] = d[threadIdx.x * 64 + i];
    const unsigned long long a = wgmma_operand(dynamic_shared);
    const unsigned long long b = wgmma_operand((const char*)dynamic_shared + 8192, leading);
    wgmma_fence();
    if (turned) wgmma_m64n128k16_bf16<0, 1>(sum, a, b);
    else        wgmma_m64n128k16_f16<0, 0>(sum, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_landed(sum);
    for (int i = 0; i < 64; ++i) d[threadIdx.x * 64 + i] = sum[i];
}
"""


@pytest.mark.parametrize("turned, leading, right", [(0, 16, True), (1, 8192, True), (1, 16, False)])
def test_wgmma_of_128_columns_is_numpys_product(turned, leading, right):
    """Columns along the lines: the second 64 of them begin `leading` bytes after the first."""
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-50, 50, shape).astype(np.float32) for shape in ((64, 64), (64, 128), (64, 128)))
    half = (lambda x: (bits(np.ascontiguousarray(x)) >> 16).astype(np.uint16)) if turned else (
        lambda x: x.astype(np.float16).view(np.uint16))
    squares = [b[:, :64], b[:, 64:]] if turned else [b[:, :64].T, b[:, 64:].T]
    operands = np.concatenate([swizzled(half(square)) for square in (a, *squares)])
    thread, i = np.arange(128)[:, None], np.arange(64)
    row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    found = d[row, column]
    program(WIDE)["multiply"](1, 128, [operands, found, np.int32(turned), np.int32(leading)], shared=24576)
    assert np.array_equal(found, (d + a[:, :16] @ b[:16])[row, column]) == right


def test_wgmma_is_not_done_before_the_wait():
    before, _, after = wgmma(0, (0, 0), "f16", stop=3)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("stop, sentence", [(1, "wgmma_see_writes must come"), (2, "wgmma_fence must come first")])
def test_wgmma_without_its_fences_is_refused(stop, sentence):
    with pytest.raises(LaunchError, match=sentence):
        wgmma(0, (0, 0), "f16", stop=stop)


def test_a_copy_by_another_thread_must_be_made_visible_by_that_thread():
    """A fence of the thread that multiplies does not help."""
    with pytest.raises(LaunchError, match="line 22: wgmma: wgmma_see_writes must come between"):
        hand_over(see=0)
    np.testing.assert_array_equal(hand_over(see=1), np.zeros((128, 32)))


# --- barriers that count ----------------------------------------------------------------------------------

HAND_OVER = """
extern "C" __global__ void hand_over(const float4* x, float* d, int see) {
    extern __shared__ float4 dynamic_shared[];
    __shared__ Barrier full;
    if (threadIdx.x == 0) barrier_init(&full, 32);
    __syncthreads();
    if (threadIdx.x >= 128) {
        for (int i = threadIdx.x - 128; i < 1024; i += 32) copy_async_16(&dynamic_shared[i], x, false);
        copy_async_commit();
        copy_async_wait<0>();
        if (see) wgmma_see_writes();
        barrier_arrive(&full);
        return;
    }
    barrier_wait(&full, 0);
    float sum[32] = {};
    wgmma_see_writes();
    wgmma_fence();
    const unsigned long long a = wgmma_operand(dynamic_shared);
    const unsigned long long b = wgmma_operand((const char*)dynamic_shared + 8192);
    wgmma_m64n64k16_f16<0, 0>(sum, a, b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 32; ++i) d[threadIdx.x * 32 + i] = sum[i];
}
"""


def hand_over(see):
    d = np.full((128, 32), np.nan, np.float32)
    program(HAND_OVER)["hand_over"](1, 160, [np.zeros(4, np.float32), d, np.int32(see)], shared=16384)
    return d


# One thread writes the numbers 0, 1, 2, ... to one place of shared memory, and 3 others add them up.
TURNS = """
extern "C" __global__ void turns(int* sums, int n, int full_wait, int empty_wait, int arrive, int init) {
    __shared__ int place;
    __shared__ Barrier full, empty;
    if (threadIdx.x == 0 && init) barrier_init(&full, 1), barrier_init(&empty, 3);
    __syncthreads();
    if (threadIdx.x == 3) {
        for (int i = 0; i < n; ++i) {
            if (empty_wait) barrier_wait(&empty, (i + 1) % 2);
            place = i;
            if (arrive) barrier_arrive(&full);
        }
    } else {
        for (int i = 0; i < n; ++i) {
            if (full_wait) barrier_wait(&full, i % 2);
            sums[threadIdx.x] += place;
            barrier_arrive(&empty);
        }
    }
}
"""


def turns(n, full_wait=1, empty_wait=1, arrive=1, init=1, order=0):
    sums = np.zeros(3, np.int32)
    program(TURNS)["turns"](1, 4, [sums, *map(np.int32, (n, full_wait, empty_wait, arrive, init))], order=order)
    return sums


@pytest.mark.parametrize("order", range(4))
def test_two_barriers_hand_a_place_back_and_forth(order):
    for n in 0, 1, 2, 9:
        np.testing.assert_array_equal(turns(n, order=order), [n * (n - 1) // 2] * 3)


def test_a_wait_that_is_missing_is_seen():
    with pytest.raises(LaunchError, match="deadlock.*counting barrier in line 10"):         # arrived too early
        turns(9, full_wait=0)
    with pytest.raises(LaunchError, match="deadlock.*counting barrier in line 16"):         # two phases too late
        turns(9, empty_wait=0)


def test_an_arrival_or_a_beginning_that_is_missing_is_seen():
    with pytest.raises(LaunchError, match=r"deadlock.*counting barrier in line 16;.* in line 10"):
        turns(9, arrive=0)
    with pytest.raises(LaunchError, match="line 16: a barrier must be initialised first"):
        turns(9, init=0)
