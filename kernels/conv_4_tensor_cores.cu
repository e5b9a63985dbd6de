// Convolution 4: tensor cores.  A warp multiplies a 16 x 8 matrix with an 8 x 8 one in a single instruction.
//
// In version 3 each thread needs one instruction for each multiply-add.  Here one instruction of a warp, mma.sync, adds
// 16 x 8 x 8 products (TF32) or 16 x 8 x 16 (half precision) to sums in float32.  The tiles are filled as before, from
// global memory through registers.  Two things change: the layout of shared memory, which must suit the tensor cores
// (ptx.cuh has the pictures), and the places of the sums, since each lane gets a few of each small matrix.
//
// float32 is rounded to TF32 when it is written to shared memory: 10 bits of fraction instead of 23, an error of at
// most 2^-11 in each factor.  So float32 arrays use this version only on request.
//
//     Which thread does what: a block of 4 warps computes 128 x 64 sums, in tiles of 64 bytes (16 or 32 numbers) along
//     k; a warp computes 64 x 32 of them, as 4 x 4 matrices of 16 x 8.
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
//     A tile has the same order in shared memory as in global memory, so 16 bytes are moved at a time:
//         Along     (row, k)   Patches, Turned   rows of 64 bytes with gaps of 16: 8 rows begin in 8 different groups
//                                                of 4 banks, which ldmatrix reads at once
//         Across    (k, row)   Places, Matrix    gaps of 8 numbers between rows: for TF32, lanes (g, t) read 4 rows 8
//                                                banks apart; for half precision ldmatrix transposes squares of 8 x 8
//
// Counted, forward, M = B Ho Wo, K = kh kw C:  2 M K D operations, and the same reads as in version 3: (128 + 64) K
// numbers through L2 for 128 * 64 * K products.  For 16 mma a warp reads 64 + 32 rows of 32 bytes of shared memory,
// 24 clocks at 128 bytes a clock.  Those are 16 384 multiply-adds of TF32, or 32 768 of half precision: 32 clocks of an
// A100's multiprocessor, 16 of an H100's.  B = 128, 14 x 14, 64 -> 64 channels, 3 x 3, TF32:  1.85 GFLOP, 13 MB if
// each array is moved once;  196 blocks, three to a multiprocessor, a warp's 1152 mma in 36 tiles of k.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: latency.  The products of a tile take a fraction of their time in version 3, so they hide less of the
// latency of the next tile's reads, and between the barriers of a tile a warp has only 32 mma.  Version 5 keeps several
// tiles in transit.  Next comes shared memory: on an H100, reading a warp's fragments takes longer than multiplying
// them, and only 64 x 64 sums for each warp would change that.  Channels that are not a multiple of 16 bytes (4 or 8
// numbers) are read one by one.
//
// takes   tf32, float16, bfloat16
// needs   sm_80
#include "last_block.cuh"

constexpr int THREADS = 128;
constexpr int TILE_M = 128;
constexpr int TILE_N = 64;
constexpr int TILE_K = 32;
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

__device__ __forceinline__ float    to_tensor(float x)    { return __uint_as_float(to_tf32(x)); }
__device__ __forceinline__ float16  to_tensor(float16 x)  { return x; }
__device__ __forceinline__ bfloat16 to_tensor(bfloat16 x) { return x; }

__device__ __forceinline__ void put_piece(Piece piece, T* to) {
    #pragma unroll
    for (int q = 0; q < PER; ++q) piece.at[q] = to_tensor(piece.at[q]);
    *(Piece*)to = piece;
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
    }
    __device__ __forceinline__ static void fragments(const T* tile, int column, int k, unsigned (&b)[2][2]) {
        const int lane = threadIdx.x % 32;
        unsigned r[4];
        ldmatrix_x4(r, tile + (column + lane / 16 * 8 + lane % 8) * LONG + k + lane / 8 % 2 * PER);
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
        }
    }
};

// --- from global memory to registers (read), and on to shared memory (write) ---------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches : Along {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place place;
    int top[4], left[4], at[4];                         // the pixel of tap (0, 0), for the thread's four rows
    Piece held[4];

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), place(k0 + k(), columns, C) {}

    __device__ __forceinline__ void set(int r, bool exists, int b, int i, int j) {
        top[r] = exists ? i : -(1 << 30);               // from there no tap reaches the image
        left[r] = j, at[r] = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < 4; ++r) held[r] = Piece{};
        if (C % PER == 0) {
            #pragma unroll
            for (int r = 0; r < 4; ++r)
                if (inside(r, place)) held[r] = *(const Piece*)(image + address(r, place));
        } else {
            Place one = place;
            #pragma unroll
            for (int q = 0; q < PER; ++q) {
                #pragma unroll
                for (int r = 0; r < 4; ++r)
                    if (inside(r, one)) held[r].at[q] = image[address(r, one)];
                one.advance(1, columns, C);
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

    __device__ __forceinline__ void write(T* a) const {
        #pragma unroll
        for (int r = 0; r < 4; ++r) put_piece(held[r], a + row(r) * LONG + k());
    }
};

// A of dw: the rows are q = (m, n, c), and k counts the pixels (b, i, j) of dy.
struct Places : Across<TILE_M> {
    const T* x;
    int H, W, C, Ho, Wo, pixels, kh, kw, stride, padding;
    Place q;                                            // the first of the thread's rows
    int pixel, b, i, j;
    Piece held[4];

    __device__ __forceinline__ Places(const T* x, int H, int W, int C, int Ho, int Wo, int pixels, int kh, int kw,
                                      int stride, int padding, int m0, int k0)
        : x(x), H(H), W(W), C(C), Ho(Ho), Wo(Wo), pixels(pixels), kh(kh), kw(kw), stride(stride), padding(padding),
          q(m0 + row(), kw, C), pixel(k0 + k(0)) {
        b = pixel / (Ho * Wo), i = pixel / Wo % Ho, j = pixel % Wo;
    }

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int top = i * stride - padding, left = j * stride - padding;
            held[r] = Piece{};
            if (C % PER == 0) {
                if (inside(top, left, q)) held[r] = *(const Piece*)(x + address(top, left, q));
            } else {
                Place one = q;
                #pragma unroll
                for (int l = 0; l < PER; ++l) {
                    if (inside(top, left, one)) held[r].at[l] = x[address(top, left, one)];
                    one.advance(1, kw, C);
                }
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

    __device__ __forceinline__ void write(T* a) const {
        #pragma unroll
        for (int r = 0; r < 4; ++r) put_piece(held[r], a + k(r) * LONG + row());
    }
};

// B of forward and dw: a matrix (K, N), stored as such.
struct Matrix : Across<TILE_N> {
    const T* matrix;
    int K, N, k0, n;
    Piece held[2];

    __device__ __forceinline__ Matrix(const T* matrix, int K, int N, int k0, int n0)
        : matrix(matrix), K(K), N(N), k0(k0), n(n0 + row()) {}

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = (k0 + k(r)) * N + n;
            held[r] = Piece{};
            if (k0 + k(r) >= K) continue;
            if (N % PER == 0) {
                if (n < N) held[r] = *(const Piece*)(matrix + at);
            } else {
                #pragma unroll
                for (int q = 0; q < PER; ++q)
                    if (n + q < N) held[r].at[q] = matrix[at + q];
            }
        }
        k0 += DEPTH;
    }

    __device__ __forceinline__ void write(T* b) const {
        #pragma unroll
        for (int r = 0; r < 2; ++r) put_piece(held[r], b + k(r) * LONG + row());
    }
};

// B of dx: k = (m, n, d) over the taps of the class, columns c; w is stored as (kh, kw, C, D), d last.
struct Turned : Along {
    const T* w;
    int C, D, taps, columns, kw, stride, n0;
    Place place;
    Piece held[2];

    __device__ __forceinline__ Turned(const T* w, int C, int D, int taps, int columns, int kw, int stride, int k0,
                                      int n0)
        : w(w), C(C), D(D), taps(taps), columns(columns), kw(kw), stride(stride), n0(n0), place(k0 + k(), columns, D) {}

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int c = n0 + row(r);
            held[r] = Piece{};
            if (c >= C) continue;
            if (D % PER == 0) {
                if (place.m < taps) held[r] = *(const Piece*)(w + address(c, place));
            } else {
                Place one = place;
                #pragma unroll
                for (int q = 0; q < PER; ++q) {
                    if (one.m < taps) held[r].at[q] = w[address(c, one)];
                    one.advance(1, columns, D);
                }
            }
        }
        place.advance(DEPTH, columns, D);
    }
    __device__ __forceinline__ int address(int c, const Place& k) const {
        return ((k.m * kw + k.n) * stride * C + c) * D + k.c;
    }

    __device__ __forceinline__ void write(T* b) const {
        #pragma unroll
        for (int r = 0; r < 2; ++r) put_piece(held[r], b + row(r) * LONG + k());
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
__device__ __forceinline__ void multiply(A& a, B& b, int tiles, Tiles* shared, Sums& sum) {
    const int warp = threadIdx.x / 32;
    a.read(), b.read();
    a.write(shared[0].a), b.write(shared[0].b);
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile) {
        const T* now_a = shared[tile % 2].a;
        const T* now_b = shared[tile % 2].b;
        if (tile + 1 < tiles) a.read(), b.read();       // in transit while the products below are computed
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
        if (tile + 1 < tiles) a.write(shared[(tile + 1) % 2].a), b.write(shared[(tile + 1) % 2].b);
        __syncthreads();
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
                                             Tiles* shared, Sums& sum) {
    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    for (int r = 0; r < 4; ++r) {
        const int pixel = m0 + a.row(r);
        const int i = pixel / Wo % Ho, j = pixel % Wo;
        a.set(r, pixel < B * Ho * Wo, pixel / (Ho * Wo), i * stride - padding, j * stride - padding);
    }
    Matrix b(w, kh * kw * C, D, share.k0, n0);
    multiply(a, b, share.tiles, shared, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, 0, 1),
                 shared, sum);
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
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, blockIdx.z, splits),
                 shared, sum);
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
                                        int padding, int z, int split, int splits, Tiles* shared) {
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
        multiply(a, b, share.tiles, shared, sum);
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
    __shared__ Tiles shared[2];
    dx_tile<false>(dy, w, nullptr, nullptr, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z, 0, 1,
                   shared);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx_part(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B, int H, int W, int C,
             int Ho, int Wo, int D, int kh, int kw, int stride, int padding, int splits) {
    __shared__ Tiles shared[2];
    dx_tile<true>(dy, w, partial, done, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z / splits,
                  blockIdx.z % splits, splits, shared);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int rows = kh * kw * C, pixels = B * Ho * Wo;
    const Share share(pixels, blockIdx.z, splits);
    Sums sum = {};
    Places a(x, H, W, C, Ho, Wo, pixels, kh, kw, stride, padding, m0, share.k0);
    Matrix b(dy, pixels, D, share.k0, n0);
    multiply(a, b, share.tiles, shared, sum);
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
