// Convolution 7: roles.  Tiles of 256 x 128, which 8 warps only multiply and 4 warps only copy.
//
// Version 6 waits for the L2 cache.  A tile of M x N sums needs M + N numbers for each k, and does M N multiply-adds
// with them, so a larger tile does more with each byte:
//
//         tile                       operations a byte     at 5.5 TB/s, the L2 cache of an H100 (estimated)
//         128 x  64   (version 6)           43                   235 TFLOP/s
//         128 x 128                         64                   352
//         256 x 128   (here)                85                   469
//
// But 256 x 128 sums take half of a multiprocessor's registers, and their stages most of its shared memory: only one
// block fits.  While all its warps wait at a barrier, no other block uses the tensor cores.  So the work is divided:
// some warps only copy, ahead of the others, and the others only multiply.
//
//     Which thread does what: a block has three warpgroups of 4 warps.
//
//                          B (128 columns)             rows of squares 0 and 1: warpgroup 0, threads   0 .. 127
//                       +-----+-----+                                  2 and 3: warpgroup 1, threads 128 .. 255
//                    64 |     |     |                  copies of A and B:       warpgroup 2, threads 256 .. 383
//            A          +-----+-----+
//         +-----+       +-----------+                  a square is 64 x 64 numbers, 8 KiB; a tile has four of A and
//      64 |     |       |     0     |  i = 0           two of B, side by side
//         +-----+       +-----------+
//      64 |     |       |     0     |  i = 1           one wgmma: 64 x 16 of A by 16 x 128 of B, so that B's two
//         +-----+       +-----------+                  squares are one operand, and a thread has 2 x 64 sums
//      64 |     |       |     1     |  i = 0
//         +-----+       +-----------+                  per tile and warpgroup: 2 x 4 steps of 16 along k = 8 wgmma
//      64 |     |       |     1     |  i = 1
//         +-----+       +-----------+
//
// In place of __syncthreads, each of the 4 stages has two barriers that count (ptx.cuh): the 128 threads that copy
// arrive at `full`, and the 256 that multiply arrive at `empty`.
//
//     copy, tile t      wait for empty of t - 4 | start the copies of t | wait for own copies of t - 2 | full of t - 2
//     multiply, tile t  wait for full of t      | start 8 wgmma of t    | wait for those of t - 1      | empty of t - 1
//
//     stages            t is multiplied, and t + 1 becomes complete meanwhile; t + 2 and t + 3 are in transit
//
// The tensor cores have work while a thread waits: the wgmma of tile t are in their queue before those of t - 1 end.
//
// Counted, for each tile of 64 along k on an H100, in clocks of a multiprocessor:
//     tensor cores       2 097 152 multiply-adds at 2048 a clock                                      1024
//     shared memory      16 wgmma read 6 KiB each, and the copies write 48 KiB, at 128 bytes a clock  1152
//     L2 cache           48 KiB at 23 bytes a clock (5.5 TB/s for 132 multiprocessors, estimated)     2140
//     instructions       24 copies a thread, about 20 instructions each (estimated), on each of the
//                        four schedulers                                                               480
// A thread has at most 168 registers, and uses 154 to 161 (tests/kernels/compile_all.py).
//
// measured  not yet (benchmarks/kernels.py)
//
// What did not work: sums that begin before the roles part.  The threads that copy then hold 128 zeros, and spill up to
// 376 bytes.  One warp that copies would start 96 copies a lane for each tile, about 1900 instructions, in hardly
// fewer clocks than a tile takes; so four warps copy.
//
// Why cp.async and not TMA: TMA (cp.async.bulk.tensor) would copy a box of an image with one instruction of one thread,
// padding included.  But the layout of its descriptor is not documented; the driver makes it on the host
// (cuTensorMapEncodeIm2col), which needs one more package.  So nothing here could prove it on a CPU.
//
// What limits it: the L2 cache still, at about half of the tensor cores' peak.  Two blocks of a cluster could share a
// tile of A or of B, which TMA sends to both.  At the end of a block the sums are written while nothing is copied; a
// block that goes on to a second tile would hide that.  There are a quarter as many tiles as in version 6, each with
// four times the work, so small images leave much of the card empty.  And 64 columns fill half of a tile.  Where the
// count says so, the launch takes version 6 (minidiff/engine/cuda/conv.py).
//
// takes   float16, bfloat16
// needs   sm_90a
#include "last_block.cuh"

constexpr int THREADS = 384;                            // 3 warpgroups: two multiply, the last one copies
constexpr int GROUP = 128;                              // threads of a warpgroup
constexpr int MULTIPLY = 256;                           // threads that multiply
constexpr int TILE_M = 256;
constexpr int TILE_N = 128;
constexpr int TILE_K = 64;
constexpr int STAGES = 4;
constexpr int BEHIND = 2;                               // tiles in transit while the copies of another start
constexpr int SHARED = 197632;                          // STAGES tiles of A and of B, and 1024 bytes to align them
constexpr int FILL = 1;                                 // blocks that fill a multiprocessor
constexpr int STEP_COST = 3;                            // clocks of a tile, in those of version 6's (estimated)
constexpr int PER = 16 / sizeof(T);                     // numbers in 16 bytes
constexpr int SQUARE = 64 * 64;                         // numbers: 64 lines of 128 bytes

struct alignas(16) Piece { T at[PER]; };
struct alignas(16) Tiles { T a[4 * SQUARE], b[2 * SQUARE]; };

// The place that k stands for: tap (m, n) and channel c, where k = (m columns + n) channels + c.
struct Place {
    int m, n, c;
    __device__ __forceinline__ Place(int k, int columns, int channels) {
        c = k % channels, k /= channels;
        n = k % columns, m = k / columns;
    }
    __device__ __forceinline__ void advance(int by, int columns, int channels) {
        c += by;
        while (c >= channels) {                         // without a division: repeats at most once if channels >= by
            c -= channels;
            if (++n == columns) n = 0, ++m;
        }
    }
};

// One axis of conv_dx, for the pixels of x with (i + padding) mod stride = r: only the taps with m mod stride = r
// reach them.  Pixel first + stride u and tap r + stride m belong to row u + shift - m of dy.
struct Class {
    int first, pixels, taps, shift;
    __device__ __forceinline__ Class(int r, int size, int k, int stride, int padding) {
        first = ((r - padding) % stride + stride) % stride;
        pixels = first < size ? (size - first + stride - 1) / stride : 0;
        taps = r < k ? (k - r + stride - 1) / stride : 0;
        shift = (first + padding - r) / stride;
    }
};

// --- squares in shared memory -----------------------------------------------------------------------------------

__device__ __forceinline__ int in_group() { return threadIdx.x % GROUP; }              // the thread's place in it

// The place of the piece of line l that begins with its number i: swizzled.
__device__ __forceinline__ int in_square(int l, int i) { return l * 64 + (i / PER ^ l % 8) * PER; }

// A line is a row and runs along k.
struct Along {
    static constexpr int TURNED = 0;
    static constexpr int STEP_16 = 16;                  // numbers to the next 16 along k
    static constexpr int LEADING = 16;                  // not used

    __device__ __forceinline__ static int row(int r) { return in_group() / 8 + r * 16; }
    __device__ __forceinline__ static int k()        { return in_group() % 8 * PER; }
    __device__ __forceinline__ static int at(int r)  { return in_square(row(r), k()); }      // the next square follows
};

// A line is one k and runs along 64 rows; ROWS of them.
template <int ROWS>
struct Across {
    static constexpr int TURNED = 1;
    static constexpr int STEP_16 = 16 * 64;
    static constexpr int LEADING = SQUARE * sizeof(T);  // bytes to the next 64 rows
    static constexpr int PIECES = ROWS / PER;           // pieces of a k: one for each thread,
    static constexpr int STEP = GROUP / PIECES;         // and a thread's next k is this many further

    __device__ __forceinline__ static int row()     { return in_group() % PIECES * PER; }
    __device__ __forceinline__ static int k(int r)  { return in_group() / PIECES + r * STEP; }
    __device__ __forceinline__ static int at(int r) { return row() / 64 * SQUARE + in_square(k(r), row() % 64); }
};

// --- from global to shared memory ----------------------------------------------------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches : Along {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place place;
    int top[16], left[16], origin[16];                  // the pixel of tap (0, 0), for the thread's sixteen rows

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), place(k0 + k(), columns, C) {}

    __device__ __forceinline__ void set(int r, bool exists, int b, int i, int j) {
        top[r] = exists ? i : -(1 << 30);               // from there no tap reaches the image
        left[r] = j, origin[r] = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void copy(T* a) {
        if (C % PER == 0) {
            #pragma unroll
            for (int r = 0; r < 16; ++r) {
                const bool valid = inside(r, place);
                copy_async_16(a + at(r), image + (valid ? address(r, place) : 0), valid);
            }
        } else {
            #pragma unroll
            for (int r = 0; r < 16; ++r) {
                Piece piece = {};
                Place one = place;
                #pragma unroll
                for (int q = 0; q < PER; ++q) {
                    if (inside(r, one)) piece.at[q] = image[address(r, one)];
                    one.advance(1, columns, C);
                }
                *(Piece*)(a + at(r)) = piece;
            }
        }
        place.advance(TILE_K, columns, C);
    }
    __device__ __forceinline__ bool inside(int r, const Place& k) const {
        return k.m < taps && unsigned(top[r] + SIGN * k.m) < unsigned(H)
               && unsigned(left[r] + SIGN * k.n) < unsigned(W);
    }
    __device__ __forceinline__ int address(int r, const Place& k) const {
        return origin[r] + SIGN * (k.m * W + k.n) * C + k.c;
    }
};

// A of dw: the rows are q = (m, n, c), and k counts the pixels (b, i, j) of dy.
struct Places : Across<TILE_M> {
    const T* x;
    int H, W, C, Ho, Wo, pixels, kh, kw, stride, padding;
    Place q;                                            // the first of the thread's rows
    int pixel, b, i, j;

    __device__ __forceinline__ Places(const T* x, int H, int W, int C, int Ho, int Wo, int pixels, int kh, int kw,
                                      int stride, int padding, int m0, int k0)
        : x(x), H(H), W(W), C(C), Ho(Ho), Wo(Wo), pixels(pixels), kh(kh), kw(kw), stride(stride), padding(padding),
          q(m0 + row(), kw, C), pixel(k0 + k(0)) {
        b = pixel / (Ho * Wo), i = pixel / Wo % Ho, j = pixel % Wo;
    }

    __device__ __forceinline__ void copy(T* a) {
        #pragma unroll
        for (int r = 0; r < 16; ++r) {
            const int top = i * stride - padding, left = j * stride - padding;
            if (C % PER == 0) {
                const bool valid = inside(top, left, q);
                copy_async_16(a + at(r), x + (valid ? address(top, left, q) : 0), valid);
            } else {
                Piece piece = {};
                Place one = q;
                #pragma unroll
                for (int l = 0; l < PER; ++l) {
                    if (inside(top, left, one)) piece.at[l] = x[address(top, left, one)];
                    one.advance(1, kw, C);
                }
                *(Piece*)(a + at(r)) = piece;
            }
            pixel += STEP, j += STEP;
            while (j >= Wo) {
                j -= Wo;
                if (++i == Ho) i = 0, ++b;
            }
        }
    }
    __device__ __forceinline__ bool inside(int top, int left, const Place& q) const {
        return pixel < pixels && q.m < kh && unsigned(top + q.m) < unsigned(H) && unsigned(left + q.n) < unsigned(W);
    }
    __device__ __forceinline__ int address(int top, int left, const Place& q) const {
        return ((b * H + top + q.m) * W + left + q.n) * C + q.c;
    }
};

// B of forward and dw: a matrix (K, N), stored as such.
struct Matrix : Across<TILE_N> {
    const T* matrix;
    int K, N, k0, n;

    __device__ __forceinline__ Matrix(const T* matrix, int K, int N, int k0, int n0)
        : matrix(matrix), K(K), N(N), k0(k0), n(n0 + row()) {}

    __device__ __forceinline__ void copy(T* b) {
        #pragma unroll
        for (int r = 0; r < 8; ++r) {
            const int first = (k0 + k(r)) * N + n;
            const bool valid = k0 + k(r) < K && n < N;
            if (N % PER == 0) {
                copy_async_16(b + at(r), matrix + (valid ? first : 0), valid);
            } else {
                Piece piece = {};
                #pragma unroll
                for (int q = 0; q < PER; ++q)
                    if (valid && n + q < N) piece.at[q] = matrix[first + q];
                *(Piece*)(b + at(r)) = piece;
            }
        }
        k0 += TILE_K;
    }
};

// B of dx: k = (m, n, d) over the taps of the class, columns c; w is stored as (kh, kw, C, D), d last.
struct Turned : Along {
    const T* w;
    int C, D, taps, columns, kw, stride, n0;
    Place place;

    __device__ __forceinline__ Turned(const T* w, int C, int D, int taps, int columns, int kw, int stride, int k0,
                                      int n0)
        : w(w), C(C), D(D), taps(taps), columns(columns), kw(kw), stride(stride), n0(n0), place(k0 + k(), columns, D) {}

    __device__ __forceinline__ void copy(T* b) {
        #pragma unroll
        for (int r = 0; r < 8; ++r) {
            const int c = n0 + row(r);
            if (D % PER == 0) {
                const bool valid = c < C && place.m < taps;
                copy_async_16(b + at(r), w + (valid ? address(c, place) : 0), valid);
            } else {
                Piece piece = {};
                Place one = place;
                #pragma unroll
                for (int q = 0; q < PER; ++q) {
                    if (c < C && one.m < taps) piece.at[q] = w[address(c, one)];
                    one.advance(1, columns, D);
                }
                *(Piece*)(b + at(r)) = piece;
            }
        }
        place.advance(TILE_K, columns, D);
    }
    __device__ __forceinline__ int address(int c, const Place& k) const {
        return ((k.m * kw + k.n) * stride * C + c) * D + k.c;
    }
};

// --- the products ---------------------------------------------------------------------------------------------

// sum[i] is row of squares i of the warpgroup's two.  Of its warp's 16 rows each lane has rows g and g + 8 (h = 0, 1),
// and of each 8 columns j the numbers 2t and 2t + 1, at 4 j + 2 h.
using Sums = float[2][64];
__device__ __forceinline__ bool copies() { return threadIdx.x >= MULTIPLY; }
__device__ __forceinline__ int tile_row(int i, int h) {
    return threadIdx.x / GROUP * 128 + i * 64 + in_group() / 32 * 16 + h * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int tile_column(int j) { return j * 8 + threadIdx.x % 4 * 2; }

template <int TURNED_A, int TURNED_B>
__device__ __forceinline__ void wgmma(float (&d)[64], unsigned long long a, unsigned long long b, float16) {
    wgmma_m64n128k16_f16<TURNED_A, TURNED_B>(d, a, b);
}
template <int TURNED_A, int TURNED_B>
__device__ __forceinline__ void wgmma(float (&d)[64], unsigned long long a, unsigned long long b, bfloat16) {
    wgmma_m64n128k16_bf16<TURNED_A, TURNED_B>(d, a, b);
}

// The stages, and two barriers for each.
struct Ring {
    Tiles* stages;                                      // they begin at a multiple of 1024 bytes
    Barrier* full;                                      // all threads that copy: the tile is there
    Barrier* empty;                                     // all threads that multiply: the tile is used
};

// Every thread of the block calls it once.
__device__ __forceinline__ Ring ring_in(float4* shared) {
    __shared__ Barrier barriers[2 * STAGES];
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&barriers[stage], GROUP);
            barrier_init(&barriers[STAGES + stage], MULTIPLY);
        }
    __syncthreads();                                    // the last one before all sums are complete
    return {(Tiles*)((char*)shared + (1024 - shared_address(shared) % 1024) % 1024), barriers, barriers + STAGES};
}

// The threads that copy: A and B of each of `tiles` tiles of k.
template <typename A, typename B>
__device__ __forceinline__ void copy_tiles(A& a, B& b, int tiles, const Ring& ring) {
    for (int tile = 0; tile < tiles + BEHIND; ++tile) {
        if (tile < tiles) {
            const int stage = tile % STAGES, round = tile / STAGES;
            barrier_wait(ring.empty + stage, (round + 1) % 2);          // in the first round it returns at once
            a.copy(ring.stages[stage].a), b.copy(ring.stages[stage].b);
        }
        copy_async_commit();                            // an empty group too: `wait` counts groups
        if (tile < BEHIND) continue;
        copy_async_wait<BEHIND>();                      // this thread's copies of an earlier tile are complete,
        wgmma_see_writes();                             // where wgmma sees them
        barrier_arrive(ring.full + (tile - BEHIND) % STAGES);
    }
}

// The threads that multiply: sum += A B over `tiles` tiles of k.
template <typename A, typename B>
__device__ __forceinline__ void multiply(int tiles, const Ring& ring, Sums& sum) {
    const int first = threadIdx.x / GROUP * 2;          // of the squares of A: a warpgroup has two
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % STAGES, round = tile / STAGES;
        barrier_wait(ring.full + stage, round % 2);
        const Tiles& now = ring.stages[stage];
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < TILE_K / 16; ++k)
            #pragma unroll
            for (int i = 0; i < 2; ++i)
                wgmma<A::TURNED, B::TURNED>(sum[i], wgmma_operand(now.a + (first + i) * SQUARE + k * A::STEP_16),
                                            wgmma_operand(now.b + k * B::STEP_16, B::LEADING), T());
        wgmma_commit();
        wgmma_wait<1>();                                // the products of the tile before are complete:
        if (tile > 0) barrier_arrive(ring.empty + (tile - 1) % STAGES);
    }
    wgmma_wait<0>();
    wgmma_landed(sum[0]), wgmma_landed(sum[1]);
}

// The tiles of k of split number `split` of `splits`.
struct Share {
    int k0, tiles;
    __device__ __forceinline__ Share(int K, int split, int splits) {
        const int all = (K + TILE_K - 1) / TILE_K, each = (all + splits - 1) / splits, first = min(all, split * each);
        k0 = first * TILE_K, tiles = min(all - first, each);
    }
};

__device__ __forceinline__ void put(Acc x, Acc* to)     { *to = x; }
template <typename Out>
__device__ __forceinline__ void put(Acc x, Out* to)     { narrow(x, to); }

// Writes two sums side by side to a row of N numbers, the first at column n.
template <typename Out>
__device__ __forceinline__ void put_two(const Acc* sum, Out* row, int n, int N) {
    if (N % 2 == 0) {
        struct alignas(2 * sizeof(Out)) { Out at[2]; } two;
        for (int q = 0; q < 2; ++q) put(sum[q], &two.at[q]);
        if (n < N) *(decltype(two)*)(row + n) = two;
    } else {
        #pragma unroll
        for (int q = 0; q < 2; ++q)
            if (n + q < N) put(sum[q], &row[n + q]);
    }
}

// --- y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d] --------------------------------------

// Each kernel has two halves: the threads that copy never have sums, and the others never have addresses of pixels.  So
// the registers of a thread have room for either.

__device__ __forceinline__ void copy_forward(const T* x, const T* w, int B, int H, int W, int C, int Ho, int Wo, int D,
                                             int kh, int kw, int stride, int padding, int m0, int n0, Share share,
                                             const Ring& ring) {
    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    for (int r = 0; r < 16; ++r) {
        const int pixel = m0 + a.row(r);
        const int i = pixel / Wo % Ho, j = pixel % Wo;
        a.set(r, pixel < B * Ho * Wo, pixel / (Ho * Wo), i * stride - padding, j * stride - padding);
    }
    Matrix b(w, kh * kw * C, D, share.k0, n0);
    copy_tiles(a, b, share.tiles, ring);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    extern __shared__ float4 dynamic_shared[];
    const Ring ring = ring_in(dynamic_shared);
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const Share share(kh * kw * C, 0, 1);
    if (copies()) {
        copy_forward(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, share, ring);
        return;
    }
    Sums sum = {};
    multiply<Patches<1>, Matrix>(share.tiles, ring, sum);
    #pragma unroll
    for (int j = 0; j < 16; ++j)
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int d = n0 + tile_column(j) + q;
            const Acc bias_d = bias && d < D ? wide(bias[d]) : Acc(0);
            #pragma unroll
            for (int i = 0; i < 2; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    Acc& s = sum[i][4 * j + 2 * h + q];
                    s += bias_d;
                    if (activate) s = silu(s);
                }
        }
    #pragma unroll
    for (int i = 0; i < 2; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= B * Ho * Wo) continue;
            #pragma unroll
            for (int j = 0; j < 16; ++j) put_two(&sum[i][4 * j + 2 * h], y + pixel * D, n0 + tile_column(j), D);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward_part(const T* x, const T* w, const T* bias, Acc* partial, unsigned int* done, T* y,
                  int B, int H, int W, int C, int Ho, int Wo, int D, int kh, int kw, int stride, int padding,
                  int activate, int splits) {
    extern __shared__ float4 dynamic_shared[];
    const Ring ring = ring_in(dynamic_shared);
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const Share share(kh * kw * C, blockIdx.z, splits);
    if (copies()) {
        copy_forward(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, share, ring);
    } else {
        Sums sum = {};
        multiply<Patches<1>, Matrix>(share.tiles, ring, sum);
        Acc* part = partial + blockIdx.z * (B * Ho * Wo * D);
        #pragma unroll
        for (int i = 0; i < 2; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int pixel = m0 + tile_row(i, h);
                if (pixel >= B * Ho * Wo) continue;
                #pragma unroll
                for (int j = 0; j < 16; ++j)
                    put_two(&sum[i][4 * j + 2 * h], part + pixel * D, n0 + tile_column(j), D);
            }
    }
    if (is_last(done + blockIdx.x, splits))
        add_parts<TILE_M, TILE_N>(partial, B * Ho * Wo * D, splits, bias, y, m0, n0, B * Ho * Wo, D, activate,
                                  [](int pixel) { return pixel; });
}

// --- dx[b,i,j,c] = sum_{m,n,d} dy[b, (i + p - m)/s, (j + p - n)/s, d] w[m,n,c,d], where these are whole ------------

// dx, or with PARTS a part of it in `partial`, and dx from the block that finishes the tile last.
template <bool PARTS>
__device__ __forceinline__ void dx_tile(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B,
                                        int H, int W, int C, int Ho, int Wo, int D, int kh, int kw, int stride,
                                        int padding, int z, int split, int splits, const Ring& ring) {
    const int tiles_n = (C + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int ri = z / stride, rj = z % stride;
    const Class rows(ri, H, kh, stride, padding), columns(rj, W, kw, stride, padding);
    const int pixels = B * rows.pixels * columns.pixels;
    if (m0 >= pixels) return;                           // the whole block: this class is smaller than the largest
    const Share share(rows.taps * columns.taps * D, split, splits);
    const auto at = [&](int pixel) {                    // in dx, of a pixel of this class
        const int i = pixel / columns.pixels % rows.pixels * stride + rows.first;
        const int j = pixel % columns.pixels * stride + columns.first;
        return (pixel / (rows.pixels * columns.pixels) * H + i) * W + j;
    };
    if (!copies()) {
        Sums sum = {};
        multiply<Patches<-1>, Turned>(share.tiles, ring, sum);
        Acc* part = partial + split * (B * H * W * C);
        #pragma unroll
        for (int i = 0; i < 2; ++i)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int pixel = m0 + tile_row(i, h);
                if (pixel >= pixels) continue;
                const int row = at(pixel) * C;
                #pragma unroll
                for (int j = 0; j < 16; ++j)
                    if (PARTS) put_two(&sum[i][4 * j + 2 * h], part + row, n0 + tile_column(j), C);
                    else       put_two(&sum[i][4 * j + 2 * h], dx + row, n0 + tile_column(j), C);
            }
    } else if (share.tiles > 0) {
        Patches<-1> a(dy, Ho, Wo, D, rows.taps, columns.taps, share.k0);
        for (int r = 0; r < 16; ++r) {
            const int pixel = m0 + a.row(r);
            a.set(r, pixel < pixels, pixel / (rows.pixels * columns.pixels),
                  pixel / columns.pixels % rows.pixels + rows.shift, pixel % columns.pixels + columns.shift);
        }
        Turned b(w + (ri * kw + rj) * C * D, C, D, rows.taps, columns.taps, kw, stride, share.k0, n0);
        copy_tiles(a, b, share.tiles, ring);
    }
    if (PARTS && is_last(done + z * gridDim.x + blockIdx.x, splits))
        add_parts<TILE_M, TILE_N>(partial, B * H * W * C, splits, nullptr, dx, m0, n0, pixels, C, 0, at);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    extern __shared__ float4 dynamic_shared[];
    const Ring ring = ring_in(dynamic_shared);
    dx_tile<false>(dy, w, nullptr, nullptr, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z, 0, 1,
                   ring);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx_part(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B, int H, int W, int C,
             int Ho, int Wo, int D, int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    const Ring ring = ring_in(dynamic_shared);
    dx_tile<true>(dy, w, partial, done, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z / splits,
                  blockIdx.z % splits, splits, ring);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    const Ring ring = ring_in(dynamic_shared);
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int rows = kh * kw * C, pixels = B * Ho * Wo;
    const Share share(pixels, blockIdx.z, splits);
    if (copies()) {
        Places a(x, H, W, C, Ho, Wo, pixels, kh, kw, stride, padding, m0, share.k0);
        Matrix b(dy, pixels, D, share.k0, n0);
        copy_tiles(a, b, share.tiles, ring);
        return;
    }
    Sums sum = {};
    multiply<Places, Matrix>(share.tiles, ring, sum);
    partial += blockIdx.z * (rows * D);
    #pragma unroll
    for (int i = 0; i < 2; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m0 + tile_row(i, h);
            if (row >= rows) continue;
            #pragma unroll
            for (int j = 0; j < 16; ++j) put_two(&sum[i][4 * j + 2 * h], partial + row * D, n0 + tile_column(j), D);
        }
}
