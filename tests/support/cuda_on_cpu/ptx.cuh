// The replacement of kernels/ptx.cuh on a CPU: the same functions in plain C++, as the manual describes them.
//
// An instruction of a whole warp becomes one warp_gather: each lane gives its registers, waits for the other 31, and
// takes its results from theirs.  The layouts are those in the pictures of kernels/ptx.cuh; tests/kernels/test_ptx.py
// compares with NumPy.
//
// It does not reproduce how the tensor cores round inside a sum (here: in float32, one product after another).
#ifndef PTX_CUH
#define PTX_CUH                                             // so that kernels/ptx.cuh, included later, is skipped
#include "cuda_on_cpu.h"

#include <deque>
#include <vector>

namespace ptx_twin {

inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

constexpr unsigned ALL = 0xffffffffu;
inline int lane() { return cuda_on_cpu::lane_of(); }

inline void insist_aligned(const void* address, int bytes, const char* what, int line) {
    if (uintptr_t(address) % unsigned(bytes) == 0) return;
    snprintf(cuda_on_cpu::failure, sizeof cuda_on_cpu::failure,
             "line %d: %s, in thread (%u, %u, %u) of block (%u, %u, %u), must be a multiple of %d bytes", line, what,
             threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, bytes);
    cuda_on_cpu::wait(cuda_on_cpu::DONE, line);
}

}  // namespace ptx_twin

// --- half precision --------------------------------------------------------------------------------------------

inline float float16_value(unsigned short bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
    if (exponent == 0)                                                          // zero and the subnormal numbers
        return ptx_twin::as_float(sign | ptx_twin::as_bits(float(fraction) * 0x1p-24f));
    return ptx_twin::as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

inline unsigned short float16_bits(float x) {
    const uint32_t all = ptx_twin::as_bits(x), sign = (all >> 16) & 0x8000u, bits = all & 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fffu;                                     // NaN
    const float size = ptx_twin::as_float(bits);
    if (size >= 65520.f) return (unsigned short)(sign | 0x7c00u);               // half way past 65504: infinity
    if (size < 0x1p-14f)                                                        // subnormal: a multiple of 2^-24
        return (unsigned short)(sign | uint32_t(nearbyintf(size * 0x1p24f)));
    const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);               // half way: to the even one
    return (unsigned short)(sign | (rounded - (112u << 23)) >> 13);
}

inline unsigned short bfloat16_bits(float x) {
    const uint32_t bits = ptx_twin::as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;                     // NaN
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);      // half way: to the even one
}

inline unsigned to_tf32(float x) {
    const uint32_t bits = ptx_twin::as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;                 // NaN
    return (bits + 0x1000u) & 0xffffe000u;                                      // half way: away from zero
}

inline unsigned pack_f16(float low, float high) {
    return float16_bits(low) | unsigned(float16_bits(high)) << 16;
}

inline unsigned pack_bf16(float low, float high) {
    return bfloat16_bits(low) | unsigned(bfloat16_bits(high)) << 16;
}

// --- the tensor cores ------------------------------------------------------------------------------------------

namespace ptx_twin {

inline float tf32_value(unsigned bits) { return as_float(bits & 0xffffe000u); }       // the lower 13 bits are ignored
inline float bfloat16_value(unsigned short bits) { return as_float(uint32_t(bits) << 16); }

// The registers of one lane as numbers: register by register, the lower half first.
template <int K> struct Fragments { float a[K / 2], b[K / 4]; };

// d += A B.  A register holds `per` neighbours along k, so the four lanes of a group hold 4 per of them, and the next
// register of the same row (of the same column, for B) continues from there.
template <int K>
inline void multiply(float (&d)[4], const Fragments<K>& mine, int line) {
    constexpr int per = K / 8;
    const auto of = cuda_on_cpu::warp_gather(ALL, mine, line);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? g : g + 8, column = 2 * t + i % 2;
        for (int k = 0; k < K; ++k) {
            const int across = k % (4 * per) / per, along = k / (4 * per), half = k % per;
            d[i] += of[row % 8 * 4 + across].a[(row / 8 + 2 * along) * per + half]
                  * of[column * 4 + across].b[along * per + half];
        }
    }
}

template <typename Value>
inline void multiply_halves(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const Value& value,
                            int line) {
    Fragments<16> mine;
    for (int i = 0; i < 8; ++i) mine.a[i] = value((unsigned short)(a[i / 2] >> 16 * (i % 2)));
    for (int i = 0; i < 4; ++i) mine.b[i] = value((unsigned short)(b[i / 2] >> 16 * (i % 2)));
    multiply(d, mine, line);
}

}  // namespace ptx_twin

inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             int line = __builtin_LINE()) {
    ptx_twin::Fragments<8> mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = ptx_twin::tf32_value(a[i]);
    for (int i = 0; i < 2; ++i) mine.b[i] = ptx_twin::tf32_value(b[i]);
    ptx_twin::multiply(d, mine, line);
}

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             int line = __builtin_LINE()) {
    ptx_twin::multiply_halves(d, a, b, float16_value, line);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              int line = __builtin_LINE()) {
    ptx_twin::multiply_halves(d, a, b, ptx_twin::bfloat16_value, line);
}

// --- from shared memory to fragments ---------------------------------------------------------------------------

namespace ptx_twin {

template <int squares>
inline void ldmatrix(unsigned (&r)[squares], const void* shared_row, bool turned, int line) {
    const auto row = cuda_on_cpu::warp_gather(ALL, static_cast<const char*>(shared_row), line);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < squares; ++i) {
        insist_aligned(row[8 * i + g], 16, "ldmatrix: the address of a row", line);
        if (!turned) {
            memcpy(&r[i], row[8 * i + g] + 4 * t, 4);
            continue;
        }
        unsigned short half[2];
        for (int j = 0; j < 2; ++j) memcpy(&half[j], row[8 * i + 2 * t + j] + 2 * g, 2);
        r[i] = half[0] | unsigned(half[1]) << 16;
    }
}

}  // namespace ptx_twin

inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    ptx_twin::ldmatrix(r, shared_row, false, line);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    ptx_twin::ldmatrix(r, shared_row, true, line);
}
inline void ldmatrix_x2(unsigned (&r)[2], const void* shared_row, int line = __builtin_LINE()) {
    ptx_twin::ldmatrix(r, shared_row, false, line);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* shared_row, int line = __builtin_LINE()) {
    ptx_twin::ldmatrix(r, shared_row, true, line);
}

// --- from global to shared memory, without waiting -------------------------------------------------------------
//
// The machine may write at any time between the request and the wait.  So the request fills the place with NaN, which
// reveals a thread that still reads the old numbers; and the copy happens at the last moment, in the wait, which reveals
// a thread that does not wait.

#ifdef SANITIZED
extern float4 dynamic_shared[];
#else
extern thread_local float4 dynamic_shared[];
#endif

namespace ptx_twin {

struct Copy { char* to; const char* from; int bytes; bool valid; };
struct Product { float* d; unsigned long long a, b; int n; bool turned_a, turned_b; float (*value)(unsigned short); };

// The copies of a thread in transit, in groups, the oldest first; the last group is still open.
struct UnderWay {
    uint3 block;
    std::deque<std::vector<Copy>> copies;
    std::deque<std::vector<Product>> products;
    bool unfenced;                                          // registers, by wgmma_fence
    int seen;                                               // the number of its calls of wgmma_see_writes
};
static UnderWay under_way[cuda_on_cpu::MOST];

// Which copies wgmma does not see yet: for each 16 bytes of dynamic shared memory the thread that copied them last, and
// its number of calls of wgmma_see_writes then.
struct Written { short by; int seen; };
static Written written[(227 << 10) / 16];

inline UnderWay& mine() {
    UnderWay& mine = under_way[cuda_on_cpu::now];
    if (mine.copies.empty() || memcmp(&mine.block, &blockIdx, sizeof(uint3))) {  // forget an earlier block
        mine.block = blockIdx;
        mine.copies.assign(1, {}), mine.products.assign(1, {});
        mine.unfenced = true;
    }
    return mine;
}

inline void landed(const char* to, int bytes) {
    const ptrdiff_t first = to - reinterpret_cast<const char*>(dynamic_shared);
    for (ptrdiff_t at = first / 16; first >= 0 && at < (first + bytes + 15) / 16; at++)
        if (at < ptrdiff_t(sizeof written / sizeof *written)) written[at] = {short(cuda_on_cpu::now + 1), mine().seen};
}

inline void copy_async(void* shared, const void* global, int bytes, bool valid, int line) {
    insist_aligned(shared, bytes, "copy_async: the address in shared memory", line);
    if (valid) insist_aligned(global, bytes, "copy_async: the global address", line);
    memset(shared, 0xff, size_t(bytes));
    mine().copies.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid});
}

}  // namespace ptx_twin

inline void copy_async_16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    ptx_twin::copy_async(shared, global, 16, valid, line);
}
inline void copy_async_8(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    ptx_twin::copy_async(shared, global, 8, valid, line);
}
inline void copy_async_4(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    ptx_twin::copy_async(shared, global, 4, valid, line);
}

inline void copy_async_commit() { ptx_twin::mine().copies.emplace_back(); }

template <int N>
inline void copy_async_wait() {
    auto& groups = ptx_twin::mine().copies;
    for (; groups.size() > N + 1; groups.pop_front())
        for (const ptx_twin::Copy& copy : groups.front()) {
            if (copy.valid) memcpy(copy.to, copy.from, size_t(copy.bytes));
            else memset(copy.to, 0, size_t(copy.bytes));
            ptx_twin::landed(copy.to, copy.bytes);
        }
}

// --- Hopper: four warps, and operands in shared memory ---------------------------------------------------------
//
// Products, too, are computed at the last moment, in the wait: a thread that reads d earlier gets the old sums, and one
// that overwrites an operand earlier gets wrong ones.  Each thread computes its own sums, directly from shared memory.

namespace ptx_twin {

constexpr unsigned FIRST = 1024;                            // where dynamic shared memory begins, on a Hopper

// The byte of dynamic shared memory where place `i` of line `l` is, located by the descriptor.
inline unsigned place_of(unsigned long long operand, int l, int i) {
    const auto field = [&](int from) { return unsigned(operand >> from & 0x3fff) << 4; };
    const unsigned plain = field(0) + unsigned(l / 8) * field(32) + unsigned(l % 8) * 128
                           + unsigned(i / 64) * field(16) + unsigned(i % 64) * 2;
    return (plain ^ (plain >> 7 & 7) << 4) - FIRST;
}

inline unsigned short half_of(unsigned long long operand, int l, int i) {
    unsigned short bits;
    memcpy(&bits, reinterpret_cast<const char*>(dynamic_shared) + place_of(operand, l, i), 2);
    return bits;
}

inline void make(const Product& p) {
    const int row = cuda_on_cpu::now % 128 / 32 * 16 + lane() / 4, t = lane() % 4, columns = p.n / 4;
    float a[2][16], b[32][16];
    for (int k = 0; k < 16; ++k) {
        for (int h = 0; h < 2; ++h) {
            const int i = row + 8 * h;
            a[h][k] = p.value(p.turned_a ? half_of(p.a, k, i) : half_of(p.a, i, k));
        }
        for (int c = 0; c < columns; ++c) {
            const int j = c / 2 * 8 + 2 * t + c % 2;
            b[c][k] = p.value(p.turned_b ? half_of(p.b, k, j) : half_of(p.b, j, k));
        }
    }
    for (int c = 0; c < columns; ++c)
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k) p.d[c / 2 * 4 + 2 * h + c % 2] += a[h][k] * b[c][k];
}

inline void insist(bool right, const char* sentence, int line) {
    if (right) return;
    snprintf(cuda_on_cpu::failure, sizeof cuda_on_cpu::failure, "line %d: %s", line, sentence);
    cuda_on_cpu::wait(cuda_on_cpu::DONE, line);
}

// Whether the copies of an operand are visible; the 128 threads share its pieces of 16 bytes.
inline bool all_seen(unsigned long long operand, int n, bool turned) {
    for (int piece = cuda_on_cpu::now % 128; piece < 2 * n; piece += 128) {
        const unsigned at = turned ? place_of(operand, piece / (n / 8), piece % (n / 8) * 8)
                                   : place_of(operand, piece / 2, piece % 2 * 8);
        const Written& last = written[at / 16];
        if (last.by && last.seen >= under_way[last.by - 1].seen) return false;
    }
    return true;
}

inline void wgmma(const Product& product, int line) {
    for (unsigned long long operand : {product.a, product.b}) {
        insist(operand >> 62 == 1 && !(operand >> 49 & 7), "wgmma: only lines of 128 bytes are known here", line);
        insist((operand & 0x3f) % 64 < 8, "wgmma: an operand must begin at a multiple of 1024 bytes", line);
    }
    insist(!mine().unfenced, "wgmma: wgmma_fence must come first", line);
    insist(all_seen(product.a, 64, product.turned_a) && all_seen(product.b, product.n, product.turned_b),
           "wgmma: wgmma_see_writes must come between a copy and this", line);
    mine().products.back().push_back(product);
}

}  // namespace ptx_twin

inline unsigned shared_address(const void* shared) {
    return ptx_twin::FIRST + unsigned(static_cast<const char*>(shared) - reinterpret_cast<const char*>(dynamic_shared));
}

inline unsigned long long wgmma_operand(const void* shared, unsigned leading = 16) {
    return (unsigned long long)((shared_address(shared) & 0x3ffffu) >> 4) | (unsigned long long)(leading >> 4) << 16
           | 64ull << 32 | 1ull << 62;
}

#define TWIN_OF_WGMMA(NAME, N, VALUE)                                                                                  \
    template <int TURNED_A, int TURNED_B>                                                                              \
    inline void NAME(float (&d)[N / 2], unsigned long long a, unsigned long long b, int line = __builtin_LINE()) {     \
        ptx_twin::wgmma({d, a, b, N, TURNED_A, TURNED_B, VALUE}, line);                                                \
    }
TWIN_OF_WGMMA(wgmma_m64n64k16_f16, 64, float16_value)
TWIN_OF_WGMMA(wgmma_m64n64k16_bf16, 64, ptx_twin::bfloat16_value)
TWIN_OF_WGMMA(wgmma_m64n128k16_f16, 128, float16_value)
TWIN_OF_WGMMA(wgmma_m64n128k16_bf16, 128, ptx_twin::bfloat16_value)
#undef TWIN_OF_WGMMA

inline void wgmma_fence()      { ptx_twin::mine().unfenced = false; }
inline void wgmma_commit()     { ptx_twin::mine().products.emplace_back(); }
template <int N> inline void wgmma_landed(float (&)[N]) {}
inline void wgmma_see_writes() { ++ptx_twin::mine().seen; }

template <int N>
inline void wgmma_wait() {
    auto& groups = ptx_twin::mine().products;
    for (; groups.size() > N + 1; groups.pop_front())
        for (const ptx_twin::Product& product : groups.front()) ptx_twin::make(product);
    ptx_twin::mine().unfenced = true;
}

// --- Hopper: barriers that count -------------------------------------------------------------------------------

using Barrier = unsigned long long;

namespace ptx_twin {

// A barrier's 8 bytes.  The phase only ever grows here; the machine keeps its parity.
struct Count { unsigned short mark, count, left, phase; };
constexpr unsigned short MARK = 0xba44;                     // that it was initialised

UNWATCHED inline Count& count_of(Barrier* barrier, int line) {
    Count& count = *reinterpret_cast<Count*>(barrier);
    insist(count.mark == MARK, "a barrier must be initialised first", line);
    return count;
}

UNWATCHED inline void mark(Barrier* barrier, unsigned phase, bool acquire) {            // for ThreadSanitizer
#if defined(__SANITIZE_THREAD__)
    char* at = reinterpret_cast<char*>(barrier) + phase % 2;
    if (acquire) __tsan_acquire(at);
    else __tsan_release(at);
#else
    (void)barrier, (void)phase, (void)acquire;
#endif
}

}  // namespace ptx_twin

UNWATCHED inline void barrier_init(Barrier* barrier, int count) {
    const auto n = (unsigned short)count;
    *reinterpret_cast<ptx_twin::Count*>(barrier) = {ptx_twin::MARK, n, n, 0};
}

UNWATCHED inline void barrier_arrive(Barrier* barrier, int line = __builtin_LINE()) {
    ptx_twin::Count& count = ptx_twin::count_of(barrier, line);
    ptx_twin::mark(barrier, count.phase, false);
    if (--count.left == 0) count.left = count.count, ++count.phase;
}

UNWATCHED inline void barrier_wait(Barrier* barrier, unsigned parity, int line = __builtin_LINE()) {
    ptx_twin::Count& count = ptx_twin::count_of(barrier, line);
    if (count.phase % 2 == parity) {
        cuda_on_cpu::Fibre& me = cuda_on_cpu::fibres[cuda_on_cpu::now];
        me.phase = &count.phase, me.parity = parity;
        cuda_on_cpu::wait(cuda_on_cpu::AT_COUNT, line);
    }
    ptx_twin::mark(barrier, parity, true);
}

#endif
