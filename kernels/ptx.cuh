// The machine instructions that C++ cannot express, one function for each.
//
// This is the only file with assembly.  tests/support/cuda_on_cpu/ptx.cuh has the same functions in plain C++, so every
// kernel also runs on a CPU.  The instructions have the names of NVIDIA's manual "PTX ISA", which also has the layouts
// in the pictures below ("Matrix Fragments for mma.m16n8k8", "...m16n8k16", "ldmatrix", "cp.async").
#ifndef PTX_CUH                                              // the replacement in tests/ has the same guard
#define PTX_CUH

// --- half precision --------------------------------------------------------------------------------------------

__device__ __forceinline__ float float16_value(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ unsigned short float16_bits(float x) {     // to the nearest; infinity from 65520 on
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// The upper half of a float32, rounded to the nearest, and to even in case of a tie; NaN stays NaN.
__device__ __forceinline__ unsigned short bfloat16_bits(float x) {
#if __CUDA_ARCH__ >= 800
    unsigned short half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    const unsigned bits = unsigned(__float_as_int(x));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#if __CUDA_ARCH__ >= 800

// TF32: the upper 19 bits of a float32: the sign, 8 bits of exponent, 10 of fraction.  The tensor cores ignore the
// other bits.  This rounds to the nearest TF32, and ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// Two numbers in one register, `low` in the lower half: the tensor cores take neighbours along k in this form.
__device__ __forceinline__ unsigned pack_f16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// --- the tensor cores ------------------------------------------------------------------------------------------
//
// The lanes of a warp together multiply small matrices: D += A B, with A (16, k), B (k, 8) and D (16, 8).  Each matrix
// is spread over the 32 lanes, with a few numbers in each lane: its fragments.  Let lane l be number t = l % 4 of group
// g = l / 4.  A group of four lanes then has rows g and g+8 of A and of D, and column g of B:
//
//      m16n8k8, TF32, a number a register              D (always float32)
//
//                         B   column g                        column  2t  2t+1
//                    row t    | b0 |                        row g     | d0  d1 |
//                    row t+4  | b1 |                        row g+8   | d2  d3 |
//      A
//         column  t    t+4
//      row g    | a0   a2 |                                 So lane 0 (g 0, t 0) has d[0][0], d[0][1],
//      row g+8  | a1   a3 |                                 d[8][0], d[8][1], and lane 1 columns 2 and 3 of
//                                                           the same two rows.
//
//      m16n8k16, float16 or bfloat16, two numbers a register, the first of them in its lower half
//
//                              B             column g
//                              rows 2t, 2t+1   | b0 |
//                              rows 2t+8, 2t+9 | b1 |
//      A
//         columns  2t,2t+1   2t+8,2t+9
//      row g        | a0        a2 |                        D as above.
//      row g+8      | a1        a3 |
//
// All 32 lanes must call it together.

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- from shared memory to fragments ---------------------------------------------------------------------------
//
// ldmatrix reads squares of 8 rows of 16 bytes, and distributes each row to the four lanes of a group, 4 bytes each:
//
//      lane 8i + r gives the address of row r of square i       (16-byte aligned; the rows may be anywhere)
//      r[i] of lane l becomes 4-byte word l % 4 of row l / 4 of square i
//
//              word      0    1    2    3
//      square i  row 0 | l0   l1   l2   l3  |         a word: one TF32 number, or two half-precision ones
//                row 1 | l4   l5   l6   l7  |
//                  ... |                    |
//                row 7 | l28  l29  l30  l31 |
//
// If rows run along k, this is the layout of A above: if lane l points to row l % 16, byte 16 (l / 16), then squares
// 0..3 are a0..a3, for TF32 and for half precision.
//
// The _trans functions take a square as 8 x 8 half-precision numbers and transpose it: lane l then gets the numbers
// (2t, g) in the lower half and (2t+1, g) in the upper half.  If rows run along n, this is the layout of B.  There is
// no such instruction for 4-byte numbers.

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return unsigned(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* shared_row) {   // lanes 0..15 point
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(shared_row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(shared_row)) : "memory");
}

// --- from global to shared memory, without waiting -------------------------------------------------------------
//
// A thread starts a copy, which does not use registers, and continues.  `commit` closes a group of copies; `wait<N>`
// waits until all groups of this thread but the newest N are complete.  Other threads see the copies after a
// __syncthreads that follows the wait.  If `valid` is false, zeros are written and `global` is never read.  Both
// addresses are multiples of the size.

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 8 : 0) : "memory");
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL                             // Hopper, compiled as sm_90a

// --- Hopper: four warps, and operands in shared memory ---------------------------------------------------------
//
// wgmma multiplies A (64, 16) by B (16, 64), half precision, for the 128 threads of a warpgroup.  Both are in shared
// memory, and D (64, 64) is in registers, 32 for each thread.  Warp w has rows 16 w .. 16 w + 15 of D; there,
// d[4 j + 0..3] have the layout of mma's d, for columns 8 j .. 8 j + 7.  n128 is the same for B (16, 128) and
// D (64, 128), 64 for each thread.
//
// A descriptor of 64 bits gives the address and the layout of an operand.  Here the layout is always lines of 128
// bytes, whose 8 pieces of 16 bytes are swizzled, so the same piece of 8 lines is in 8 different groups of banks:
//
//      piece p of line l is at place p ^ (l % 8)               line 0 | 0 1 2 3 4 5 6 7 |
//                                                              line 1 | 1 0 3 2 5 4 7 6 |   the whole begins at a
//      bits  0-13  address / 16                                line 2 | 2 3 0 1 6 7 4 5 |   multiple of 1024 bytes
//           16-29  "leading offset" / 16                          ... |                 |
//           32-45  "stride offset" / 16: from 8 lines to the next 8, 1024 bytes
//           62-63  1: lines of 128 bytes
//
// A line is a row of A or a column of B, and runs along k; the next 16 along k begin 32 bytes further.  Or, if
// `turned`, a line is one k, and runs along 64 rows or columns; the next 16 begin 16 lines further.  The second 64
// columns of n128 are lines 64 .. 127, or, if turned, begin `leading` bytes further; otherwise `leading` is not used.
//
// It is asynchronous.  fence comes before the first, if other instructions have used d; commit closes a group.  After
// wait<N> all groups but the newest N are complete: then d may be read and the operands overwritten.  landed(d), after
// it, keeps the compiler from reading d earlier.  wgmma reads shared memory by another path than loads and stores:
// each thread that wrote there, also by copy_async, calls see_writes before the barrier.

__device__ __forceinline__ unsigned long long wgmma_operand(const void* shared, unsigned leading = 16) {
    return (unsigned long long)((shared_address(shared) & 0x3ffffu) >> 4) | (unsigned long long)(leading >> 4) << 16
           | 64ull << 32 | 1ull << 62;
}

#define PTX_SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
                      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_SUMS_32(i) PTX_SUMS_8(i), PTX_SUMS_8(i + 8), PTX_SUMS_8(i + 16), PTX_SUMS_8(i + 24)
#define PTX_0_TO_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "  \
                    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_32_TO_63 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                     "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_WGMMA(TYPE, SHORT)                                                                                         \
    template <int TURNED_A, int TURNED_B>                                                                              \
    __device__ __forceinline__ void wgmma_m64n64k16_##SHORT(float (&d)[32], unsigned long long a,                      \
                                                            unsigned long long b) {                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" PTX_0_TO_31 "}, "                \
                     "%32, %33, 1, 1, 1, %34, %35;"                                                                    \
                     : PTX_SUMS_32(0) : "l"(a), "l"(b), "n"(TURNED_A), "n"(TURNED_B));                                 \
    }                                                                                                                  \
    template <int TURNED_A, int TURNED_B>                                                                              \
    __device__ __forceinline__ void wgmma_m64n128k16_##SHORT(float (&d)[64], unsigned long long a,                     \
                                                             unsigned long long b) {                                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" PTX_0_TO_31 ", " PTX_32_TO_63   \
                     "}, %64, %65, 1, 1, 1, %66, %67;"                                                                 \
                     : PTX_SUMS_32(0), PTX_SUMS_32(32) : "l"(a), "l"(b), "n"(TURNED_A), "n"(TURNED_B));                \
    }
PTX_WGMMA("f16", f16)
PTX_WGMMA("bf16", bf16)
#undef PTX_WGMMA
#undef PTX_32_TO_63
#undef PTX_0_TO_31
#undef PTX_SUMS_32
#undef PTX_SUMS_8

__device__ __forceinline__ void wgmma_fence()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

template <int N>
__device__ __forceinline__ void wgmma_landed(float (&d)[N]) {
    #pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}

__device__ __forceinline__ void wgmma_see_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Hopper: barriers that count, in shared memory ("mbarrier") -----------------------------------------------
//
// At __syncthreads all threads of a block wait for each other.  A Barrier separates the two halves of that: a thread
// that arrives is counted and continues, and another thread waits, until `count` threads have arrived.  Then the
// barrier begins to count again, in its next phase:
//
//      phase                      0              1              2              3
//      its parity                 0              1              0              1
//      wait(0) returns in                      phase 1                       phase 3
//      wait(1) returns in      phase 0                       phase 2
//
// So a thread waits for the end of phase p with parity p % 2, and must not be two phases late.  On a new barrier,
// wait(1) returns at once.  A thread that has waited sees what the others wrote before they arrived.  `init`, by one
// thread, comes before a __syncthreads.

using Barrier = unsigned long long;

__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}"
                 :: "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     " selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done);
}

#endif

#endif  // PTX_CUH
