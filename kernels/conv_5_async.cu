// Convolution 5: asynchronous copies.  Four tiles are in use at once, and none of them is in registers.
//
// In version 4 a tile goes through registers, one ahead of the products, and a warp must wait for it before it can
// store it.  cp.async copies 16 bytes from global to shared memory by itself: the thread starts the copy and continues.
// So shared memory becomes a ring of 4 stages.  While the products of one tile are computed, the next two are arriving
// and the copy of the third starts; so a wait is for copies that started three tiles ago.  The barrier of each tile
// ensures two things: all copies of this tile are complete, and no thread still uses the stage that is filled next.
//
//     tile           0     1     2     3     4     5
//     stage          0     1     2     3     0     1              4 * 15 KiB, dynamic: a launch must request more
//     started      | start | start | start | t 0 | t 1 | t 2     than 48 KiB explicitly
//     wait, barrier  t 0   t 1   t 2   t 3   t 4   t 5            while the products of tile t are computed,
//                                                                 tiles t+1 .. t+3 are in transit
//
//     Which thread does what: as in version 4, a block of 4 warps computes 128 x 64 sums, and a warp 64 x 32 of them,
//     as 4 x 4 matrices of 16 x 8.
//
//             B (64 columns)                           one matrix of 16 x 8 sums: lane = 4 g + t
//             +-------+-------+                              2t 2t+1
//             |       |       |                         g    | 0  1 |
//     A       +-------+-------+                         g+8  | 2  3 |
//     +---+   +-------+-------+
//     |   |   | warp 0| warp 2|  64
//     | k |   +-------+-------+
//     |   |   | warp 1| warp 3|
//     +---+   +-------+-------+
//
//     A tile has the same order in shared memory as in global memory, and the copies produce the zeros of the padding:
//     a copy that is not valid writes zeros and reads nothing.
//         Along     (row, k)   Patches, Turned   rows of 64 bytes with gaps of 16: 8 rows begin in 8 different groups
//                                                of 4 banks, which ldmatrix reads at once
//         Across    (k, row)   Places, Matrix    gaps of 8 numbers between rows: for TF32, lanes (g, t) read 4 rows 8
//                                                banks apart; for half precision ldmatrix transposes squares of 8 x 8
//
// The copies do not go through registers, so float32 is rounded to TF32 later, in the fragments: 24 more instructions
// for 16 mma.
//
// The number of stages depends on the card, so it is a macro that the launch sets.  While a block waits at a barrier,
// only another block can use the tensor cores.  So two blocks must fit on a multiprocessor, and on the smaller cards
// they fit with 3 stages.  The system adds 1 KiB to each block.
//
//                            shared memory of    blocks with 4 stages    with 3        the launch takes
//                            a multiprocessor    (61 KiB each)           (46 KiB)
//     sm_80                     164 KiB                2                   3           4 stages
//     sm_86, sm_89, sm_120      100 KiB                1                   2           3
//     sm_90, sm_100             228 KiB                3                   4           4
//
// Counted: as version 4.  All stages but one are in transit, 12 KiB each: on an H100, with 132 multiprocessors of three
// blocks of 4 stages, 15 MB; on an RTX 4090, with 128 of two blocks of 3 stages, 6 MB.  To keep the memory busy, 2.7 MB
// (3.35 TB/s times 0.8 us) and 0.8 MB (1.01 TB/s times 0.8 us) would be enough.  The 0.8 us are estimated.
//
// measured  not yet (benchmarks/kernels.py)
//
// What did not work: adding 0x1000 to the bits also rounds to TF32, since the tensor cores ignore the lower 13 bits,
// and costs less than cvt.  But it turns the NaN 0x7fffffff, which GPUs produce, into -0.  Without rounding, as in some
// libraries, numbers are truncated towards zero: each factor makes a product too small, by 2^-11 on average.
//
// What limits it: shared memory, as in version 4: on an H100, reading a warp's fragments takes longer than multiplying
// them.  64 x 64 sums for each warp would halve that, but tiles of 128 x 128 are too few for small images, and 64
// channels fill only half of one.  mma.sync reaches about two thirds of a Hopper's peak; the rest requires wgmma.
// cp.async copies 4, 8 or 16 bytes, and here only 16: if channels are not a multiple of that, a thread reads and writes
// numbers one by one, and waits for them.
//
// takes   tf32, float16, bfloat16
// needs   sm_80
#include "last_block.cuh"

constexpr int THREADS = 128;
constexpr int TILE_M = 128;
constexpr int TILE_N = 64;
constexpr int TILE_K = 32;
constexpr int MOST_STAGES = 4;
constexpr int SHARED = 61440;                           // MOST_STAGES tiles of A and of B
#ifndef STAGES                                          // the launch sets a smaller number where the card wants one
#define STAGES MOST_STAGES
#endif
constexpr int PER = 16 / sizeof(T);                     // numbers in 16 bytes; one mma takes twice as many along k
constexpr int DEPTH = 4 * PER;                          // of a tile, along k

struct alignas(16) Piece { T at[PER]; };
struct alignas(16) Tiles { T a[TILE_M * (DEPTH + PER)], b[TILE_N * (DEPTH + PER)]; };         // Across needs less

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

// --- tiles in shared memory, and the fragments of them that mma takes ------------------------------------------

// float32 becomes TF32.
template <int N>
__device__ __forceinline__ void to_tensor(unsigned (&fragment)[N]) {
    if (sizeof(T) == 4)
        for (int r = 0; r < N; ++r) fragment[r] = to_tf32(__uint_as_float(fragment[r]));
}

// (row, k): fragments of 16 rows of A, and of 2 x 8 columns of B.
struct Along {
    static constexpr int LONG = DEPTH + PER;

    // Threads 0..3 take a row's 4 pieces, 4..7 those of the row 4 below: their 128 bytes then use all 32 banks.
    __device__ __forceinline__ static int row(int r) {
        return r * 32 + threadIdx.x / 32 * 8 + threadIdx.x / 4 % 2 * 4 + threadIdx.x / 8 % 4;
    }
    __device__ __forceinline__ static int k() { return threadIdx.x % 4 * PER; }

    __device__ __forceinline__ static void fragments(const T* tile, int row, int k, unsigned (&a)[4]) {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, tile + (row + lane % 16) * LONG + k + lane / 16 * PER);
        to_tensor(a);
    }
    __device__ __forceinline__ static void fragments(const T* tile, int column, int k, unsigned (&b)[2][2]) {
        const int lane = threadIdx.x % 32;
        unsigned r[4];
        ldmatrix_x4(r, tile + (column + lane / 16 * 8 + lane % 8) * LONG + k + lane / 8 % 2 * PER);
        to_tensor(r);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }
};

// (k, row), with ROWS of them.
template <int ROWS>
struct Across {
    static constexpr int LONG = ROWS + 8;
    static constexpr int PIECES = ROWS / PER;           // pieces of a row in shared memory: one for each thread,
    static constexpr int STEP = THREADS / PIECES;       // and a thread continues this many rows further

    __device__ __forceinline__ static int row()    { return threadIdx.x % PIECES * PER; }
    __device__ __forceinline__ static int k(int r) { return threadIdx.x / PIECES + r * STEP; }

    __device__ __forceinline__ static void fragments(const T* tile, int row, int k, unsigned (&a)[4]) {
        const int lane = threadIdx.x % 32;
        if (sizeof(T) == 2) {
            ldmatrix_x4_trans(a, tile + (k + lane / 16 * 8 + lane % 8) * LONG + row + lane / 8 % 2 * 8);
        } else {
            const unsigned* at = (const unsigned*)tile + (k + lane % 4) * LONG + row + lane / 4;
            a[0] = at[0], a[1] = at[8], a[2] = at[4 * LONG], a[3] = at[4 * LONG + 8];
            to_tensor(a);
        }
    }
    __device__ __forceinline__ static void fragments(const T* tile, int column, int k, unsigned (&b)[2][2]) {
        const int lane = threadIdx.x % 32;
        if (sizeof(T) == 2) {
            unsigned r[4];
            ldmatrix_x4_trans(r, tile + (k + lane % 16) * LONG + column + lane / 16 * 8);
            b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
        } else {
            const unsigned* at = (const unsigned*)tile + (k + lane % 4) * LONG + column + lane / 4;
            b[0][0] = at[0], b[0][1] = at[4 * LONG], b[1][0] = at[8], b[1][1] = at[4 * LONG + 8];
            to_tensor(b[0]), to_tensor(b[1]);
        }
    }
};

// --- from global to shared memory ----------------------------------------------------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches : Along {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place place;
    int top[4], left[4], at[4];                         // the pixel of tap (0, 0), for the thread's four rows

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), place(k0 + k(), columns, C) {}

    __device__ __forceinline__ void set(int r, bool exists, int b, int i, int j) {
        top[r] = exists ? i : -(1 << 30);               // from there no tap reaches the image
        left[r] = j, at[r] = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void copy(T* a) {
        if (C % PER == 0) {
            #pragma unroll
            for (int r = 0; r < 4; ++r) {
                const bool valid = inside(r, place);
                copy_async_16(a + row(r) * LONG + k(), image + (valid ? address(r, place) : 0), valid);
            }
        } else {
            #pragma unroll
            for (int r = 0; r < 4; ++r) {
                Piece piece = {};
                Place one = place;
                #pragma unroll
                for (int q = 0; q < PER; ++q) {
                    if (inside(r, one)) piece.at[q] = image[address(r, one)];
                    one.advance(1, columns, C);
                }
                *(Piece*)(a + row(r) * LONG + k()) = piece;
            }
        }
        place.advance(DEPTH, columns, C);
    }
    __device__ __forceinline__ bool inside(int r, const Place& k) const {
        return k.m < taps && unsigned(top[r] + SIGN * k.m) < unsigned(H)
               && unsigned(left[r] + SIGN * k.n) < unsigned(W);
    }
    __device__ __forceinline__ int address(int r, const Place& k) const {
        return at[r] + SIGN * (k.m * W + k.n) * C + k.c;
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
        for (int r = 0; r < 4; ++r) {
            const int top = i * stride - padding, left = j * stride - padding;
            if (C % PER == 0) {
                const bool valid = inside(top, left, q);
                copy_async_16(a + k(r) * LONG + row(), x + (valid ? address(top, left, q) : 0), valid);
            } else {
                Piece piece = {};
                Place one = q;
                #pragma unroll
                for (int l = 0; l < PER; ++l) {
                    if (inside(top, left, one)) piece.at[l] = x[address(top, left, one)];
                    one.advance(1, kw, C);
                }
                *(Piece*)(a + k(r) * LONG + row()) = piece;
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
        for (int r = 0; r < 2; ++r) {
            const int at = (k0 + k(r)) * N + n;
            const bool valid = k0 + k(r) < K && n < N;
            if (N % PER == 0) {
                copy_async_16(b + k(r) * LONG + row(), matrix + (valid ? at : 0), valid);
            } else {
                Piece piece = {};
                #pragma unroll
                for (int q = 0; q < PER; ++q)
                    if (valid && n + q < N) piece.at[q] = matrix[at + q];
                *(Piece*)(b + k(r) * LONG + row()) = piece;
            }
        }
        k0 += DEPTH;
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
        for (int r = 0; r < 2; ++r) {
            const int c = n0 + row(r);
            if (D % PER == 0) {
                const bool valid = c < C && place.m < taps;
                copy_async_16(b + row(r) * LONG + k(), w + (valid ? address(c, place) : 0), valid);
            } else {
                Piece piece = {};
                Place one = place;
                #pragma unroll
                for (int q = 0; q < PER; ++q) {
                    if (c < C && one.m < taps) piece.at[q] = w[address(c, one)];
                    one.advance(1, columns, D);
                }
                *(Piece*)(b + row(r) * LONG + k()) = piece;
            }
        }
        place.advance(DEPTH, columns, D);
    }
    __device__ __forceinline__ int address(int c, const Place& k) const {
        return ((k.m * kw + k.n) * stride * C + c) * D + k.c;
    }
};

// --- the products ---------------------------------------------------------------------------------------------

// sum[i][j] is the warp's matrix in row i, column j; each lane has its rows g and g + 8 (h = 0, 1), columns 2t, 2t + 1.
using Sums = float[4][4][4];
__device__ __forceinline__ int tile_row(int i, int h) {
    return threadIdx.x / 32 % 2 * 64 + i * 16 + h * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int tile_column(int j) { return threadIdx.x / 64 * 32 + j * 8 + threadIdx.x % 4 * 2; }

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
    mma_m16n8k8_tf32(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float16) {
    mma_m16n8k16_f16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16) {
    mma_m16n8k16_bf16(d, a, b);
}

// sum += A B over `tiles` tiles of k.
template <typename A, typename B>
__device__ __forceinline__ void multiply(A& a, B& b, int tiles, Tiles* stages, Sums& sum) {
    const int warp = threadIdx.x / 32;
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        if (tile < tiles) a.copy(stages[tile].a), b.copy(stages[tile].b);
        copy_async_commit();
    }
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<STAGES - 2>();                  // this thread's copies of the tile are complete,
        __syncthreads();                                // everyone's have; and nobody uses the previous tile
        const int next = tile + STAGES - 1;             // its stage is filled now
        if (next < tiles) a.copy(stages[next % STAGES].a), b.copy(stages[next % STAGES].b);
        copy_async_commit();                            // an empty group too: `wait` counts groups
        const T* now_a = stages[tile % STAGES].a;
        const T* now_b = stages[tile % STAGES].b;
        #pragma unroll
        for (int k = 0; k < DEPTH; k += 2 * PER) {
            unsigned u[4][4], v[2][2][2];
            #pragma unroll
            for (int i = 0; i < 4; ++i) A::fragments(now_a, warp % 2 * 64 + i * 16, k, u[i]);
            #pragma unroll
            for (int j = 0; j < 2; ++j) B::fragments(now_b, warp / 2 * 32 + j * 16, k, v[j]);
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                #pragma unroll
                for (int j = 0; j < 4; ++j) mma(sum[i][j], u[i], v[j / 2][j % 2], T());
        }
    }
}

// The tiles of k of split number `split` of `splits`: whole TILE_K, but for the last.
struct Share {
    int k0, tiles;
    __device__ __forceinline__ Share(int K, int split, int splits) {
        const int all = (K + TILE_K - 1) / TILE_K, each = (all + splits - 1) / splits, first = min(all, split * each);
        k0 = first * TILE_K;
        tiles = max(0, (min(K - k0, each * TILE_K) + DEPTH - 1) / DEPTH);
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

__device__ __forceinline__ void forward_sums(const T* x, const T* w, int B, int H, int W, int C, int Ho, int Wo, int D,
                                             int kh, int kw, int stride, int padding, int m0, int n0, Share share,
                                             Tiles* stages, Sums& sum) {
    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    for (int r = 0; r < 4; ++r) {
        const int pixel = m0 + a.row(r);
        const int i = pixel / Wo % Ho, j = pixel % Wo;
        a.set(r, pixel < B * Ho * Wo, pixel / (Ho * Wo), i * stride - padding, j * stride - padding);
    }
    Matrix b(w, kh * kw * C, D, share.k0, n0);
    multiply(a, b, share.tiles, stages, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = (Tiles*)dynamic_shared;
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, 0, 1),
                 stages, sum);
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        #pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int d = n0 + tile_column(j) + q;
            const Acc bias_d = bias && d < D ? wide(bias[d]) : Acc(0);
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    Acc& s = sum[i][j][2 * h + q];
                    s += bias_d;
                    if (activate) s = silu(s);
                }
        }
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= B * Ho * Wo) continue;
            #pragma unroll
            for (int j = 0; j < 4; ++j) put_two(&sum[i][j][2 * h], y + pixel * D, n0 + tile_column(j), D);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward_part(const T* x, const T* w, const T* bias, Acc* partial, unsigned int* done, T* y,
                  int B, int H, int W, int C, int Ho, int Wo, int D, int kh, int kw, int stride, int padding,
                  int activate, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = (Tiles*)dynamic_shared;
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, blockIdx.z, splits),
                 stages, sum);
    Acc* part = partial + blockIdx.z * (B * Ho * Wo * D);
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= B * Ho * Wo) continue;
            #pragma unroll
            for (int j = 0; j < 4; ++j) put_two(&sum[i][j][2 * h], part + pixel * D, n0 + tile_column(j), D);
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
                                        int padding, int z, int split, int splits, Tiles* stages) {
    const int tiles_n = (C + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int ri = z / stride, rj = z % stride;
    const Class rows(ri, H, kh, stride, padding), columns(rj, W, kw, stride, padding);
    const int pixels = B * rows.pixels * columns.pixels;
    if (m0 >= pixels) return;                           // the whole block: this class is smaller than the largest
    const Share share(rows.taps * columns.taps * D, split, splits);
    Sums sum = {};
    if (share.tiles > 0) {
        Patches<-1> a(dy, Ho, Wo, D, rows.taps, columns.taps, share.k0);
        for (int r = 0; r < 4; ++r) {
            const int pixel = m0 + a.row(r);
            a.set(r, pixel < pixels, pixel / (rows.pixels * columns.pixels),
                  pixel / columns.pixels % rows.pixels + rows.shift, pixel % columns.pixels + columns.shift);
        }
        Turned b(w + (ri * kw + rj) * C * D, C, D, rows.taps, columns.taps, kw, stride, share.k0, n0);
        multiply(a, b, share.tiles, stages, sum);
    }
    const auto at = [&](int pixel) {                    // in dx, of a pixel of this class
        const int i = pixel / columns.pixels % rows.pixels * stride + rows.first;
        const int j = pixel % columns.pixels * stride + columns.first;
        return (pixel / (rows.pixels * columns.pixels) * H + i) * W + j;
    };
    Acc* part = partial + split * (B * H * W * C);
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= pixels) continue;
            const int row = at(pixel) * C;
            #pragma unroll
            for (int j = 0; j < 4; ++j)
                if (PARTS) put_two(&sum[i][j][2 * h], part + row, n0 + tile_column(j), C);
                else       put_two(&sum[i][j][2 * h], dx + row, n0 + tile_column(j), C);
        }
    if (PARTS && is_last(done + z * gridDim.x + blockIdx.x, splits))
        add_parts<TILE_M, TILE_N>(partial, B * H * W * C, splits, nullptr, dx, m0, n0, pixels, C, 0, at);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = (Tiles*)dynamic_shared;
    dx_tile<false>(dy, w, nullptr, nullptr, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z, 0, 1,
                   stages);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx_part(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B, int H, int W, int C,
             int Ho, int Wo, int D, int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = (Tiles*)dynamic_shared;
    dx_tile<true>(dy, w, partial, done, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z / splits,
                  blockIdx.z % splits, splits, stages);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = (Tiles*)dynamic_shared;
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int rows = kh * kw * C, pixels = B * Ho * Wo;
    const Share share(pixels, blockIdx.z, splits);
    Sums sum = {};
    Places a(x, H, W, C, Ho, Wo, pixels, kh, kw, stride, padding, m0, share.k0);
    Matrix b(dy, pixels, D, share.k0, n0);
    multiply(a, b, share.tiles, stages, sum);
    partial += blockIdx.z * (rows * D);
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m0 + tile_row(i, h);
            if (row >= rows) continue;
            #pragma unroll
            for (int j = 0; j < 4; ++j) put_two(&sum[i][j][2 * h], partial + row * D, n0 + tile_column(j), D);
        }
}
