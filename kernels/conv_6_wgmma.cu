// Convolution 6: wgmma.  Four warps multiply 64 x 16 by 16 x 64 in one instruction, directly from shared memory.
//
// In version 5 a warp reads each fragment from shared memory into registers, and on an H100 that takes longer than the
// multiplication.  wgmma reads both factors from shared memory itself: no fragments, and one instruction for 65 536
// multiply-adds.  It is asynchronous as well: while the tensor cores multiply a tile, the threads start the copies of a
// later one.  In return the layout is fixed: squares of 64 lines of 128 bytes, swizzled (ptx.cuh has the picture).  A
// tile of A is two squares, and one of B is one square; a tile is 64 numbers deep, and there are three stages.
//
//     Which thread does what: a block is one warpgroup of 4 warps; it computes two matrices of 64 x 64 sums.
//
//                       B                              rows 16 w .. 16 w + 15 of each square belong to warp w, with the
//                    +-----+                           sums in the same places as those of mma: lane = 4 g + t
//                    |     | 64                                  8 j + 2t   8 j + 2t + 1
//           A        +-----+                              g    |   4 j        4 j + 1    |   of sum[i][32]
//        +-----+     +-----+                              g+8  |   4 j + 2    4 j + 3    |
//     64 |     |     |  0  |  i
//        +-----+     +-----+                           per tile: 2 matrices x 4 steps of 16 along k = 8 wgmma
//     64 |     |     |  1  |
//        +-----+     +-----+
//
//     tile t:  wait for its copies | barrier | start 8 wgmma | start copying tile t + 2 | wait for the 8 wgmma
//
//     In shared memory:
//         Along     a line is a row, 64 numbers along k          Patches, Turned
//         Across    a line is one k, 64 rows: `turned`           Places, Matrix
//     Eight threads copy the 8 pieces of a line, 128 bytes side by side in global memory if the channels allow it.
//
// cp.async makes the copies, and wgmma reads shared memory by another path than loads and stores: therefore
// wgmma_see_writes comes before the barrier.
//
// Counted: as version 5.  A tile is 24 KiB of shared memory for 524 288 multiply-adds.  wgmma reads its square of B
// again for each 64 x 64: 32 KiB in all, 256 clocks at 128 bytes a clock, and 256 clocks of an H100's tensor cores at
// 2048 multiply-adds a clock.  The copies write 24 KiB, 192 clocks more.  Three blocks of 73 KiB fit on a
// multiprocessor.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: the L2 cache.  A tile takes 24 KiB from it for 1 048 576 operations, 43 a byte; at 5.5 TB/s, which is
// an estimate, that is 235 TFLOP/s, a quarter of the tensor cores' peak.  Shared memory is the next limit: 128 columns
// would read three quarters as much, but 64 channels fill only half of them.  There is a barrier between the last wgmma
// of a tile and the first of the next; the other two blocks on the multiprocessor must fill that gap.  TMA
// (cp.async.bulk) would copy whole boxes of an image with one thread, including the padding, while here each thread
// computes addresses; it needs descriptors from the host.  No TF32: wgmma takes 4-byte numbers only if k runs along the
// line, as in Patches and Turned; Places and Matrix would have to be transposed during the copy.
//
// takes   float16, bfloat16
// needs   sm_90a
#include "last_block.cuh"

constexpr int THREADS = 128;
constexpr int TILE_M = 128;
constexpr int TILE_N = 64;
constexpr int TILE_K = 64;
constexpr int STAGES = 3;
constexpr int SHARED = 74752;                           // STAGES tiles of A and of B, and 1024 bytes to align them
constexpr int PER = 16 / sizeof(T);                     // numbers in 16 bytes
constexpr int SQUARE = 64 * 64;                         // numbers: 64 lines of 128 bytes

struct alignas(16) Piece { T at[PER]; };
struct alignas(16) Tiles { T a[2 * SQUARE], b[SQUARE]; };

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

// The place of the piece of line l that begins with its number i: swizzled.
__device__ __forceinline__ int in_square(int l, int i) { return l * 64 + (i / PER ^ l % 8) * PER; }

// A line is a row and runs along k.
struct Along {
    static constexpr int TURNED = 0;
    static constexpr int STEP_16 = 16;                  // numbers to the next 16 along k

    __device__ __forceinline__ static int row(int r) { return threadIdx.x / 8 + r * 16; }
    __device__ __forceinline__ static int k()        { return threadIdx.x % 8 * PER; }
    __device__ __forceinline__ static int at(int r)  { return in_square(row(r), k()); }      // the next square follows
};

// A line is one k and runs along 64 rows; ROWS of them.
template <int ROWS>
struct Across {
    static constexpr int TURNED = 1;
    static constexpr int STEP_16 = 16 * 64;
    static constexpr int PIECES = ROWS / PER;           // pieces of a k: one for each thread,
    static constexpr int STEP = THREADS / PIECES;       // and a thread's next k is this many further

    __device__ __forceinline__ static int row()     { return threadIdx.x % PIECES * PER; }
    __device__ __forceinline__ static int k(int r)  { return threadIdx.x / PIECES + r * STEP; }
    __device__ __forceinline__ static int at(int r) { return row() / 64 * SQUARE + in_square(k(r), row() % 64); }
};

// --- from global to shared memory ----------------------------------------------------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches : Along {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place place;
    int top[8], left[8], origin[8];                         // the pixel of tap (0, 0), for the thread's eight rows

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), place(k0 + k(), columns, C) {}

    __device__ __forceinline__ void set(int r, bool exists, int b, int i, int j) {
        top[r] = exists ? i : -(1 << 30);               // from there no tap reaches the image
        left[r] = j, origin[r] = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void copy(T* a) {
        if (C % PER == 0) {
            #pragma unroll
            for (int r = 0; r < 8; ++r) {
                const bool valid = inside(r, place);
                copy_async_16(a + at(r), image + (valid ? address(r, place) : 0), valid);
            }
        } else {
            #pragma unroll
            for (int r = 0; r < 8; ++r) {
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
        for (int r = 0; r < 8; ++r) {
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
        for (int r = 0; r < 4; ++r) {
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
        for (int r = 0; r < 4; ++r) {
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

// sum[i] is square i of the tile.  Of its warp's 16 rows each lane has rows g and g + 8 (h = 0, 1), and of each 8
// columns j the numbers 2t and 2t + 1, at 4 j + 2 h.
using Sums = float[2][32];
__device__ __forceinline__ int tile_row(int i, int h) {
    return i * 64 + threadIdx.x / 32 * 16 + h * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int tile_column(int j) { return j * 8 + threadIdx.x % 4 * 2; }

template <int TURNED_A, int TURNED_B>
__device__ __forceinline__ void wgmma(float (&d)[32], unsigned long long a, unsigned long long b, float16) {
    wgmma_m64n64k16_f16<TURNED_A, TURNED_B>(d, a, b);
}
template <int TURNED_A, int TURNED_B>
__device__ __forceinline__ void wgmma(float (&d)[32], unsigned long long a, unsigned long long b, bfloat16) {
    wgmma_m64n64k16_bf16<TURNED_A, TURNED_B>(d, a, b);
}

// The stages begin at a multiple of 1024 bytes.
__device__ __forceinline__ Tiles* aligned(float4* shared) {
    return (Tiles*)((char*)shared + (1024 - shared_address(shared) % 1024) % 1024);
}

// sum += A B over `tiles` tiles of k.
template <typename A, typename B>
__device__ __forceinline__ void multiply(A& a, B& b, int tiles, Tiles* stages, Sums& sum) {
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        if (tile < tiles) a.copy(stages[tile].a), b.copy(stages[tile].b);
        copy_async_commit();
    }
    for (int tile = 0; tile < tiles; ++tile) {
        copy_async_wait<STAGES - 2>();                  // this thread's copies of the tile are complete,
        wgmma_see_writes();                             // where wgmma sees them,
        __syncthreads();                                // everyone's have; and nobody uses the previous tile
        const Tiles& now = stages[tile % STAGES];       // this tile; another stage is filled below
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < TILE_K / 16; ++k)
            #pragma unroll
            for (int i = 0; i < 2; ++i)
                wgmma<A::TURNED, B::TURNED>(sum[i], wgmma_operand(now.a + i * SQUARE + k * A::STEP_16),
                                            wgmma_operand(now.b + k * B::STEP_16), T());
        wgmma_commit();
        const int next = tile + STAGES - 1;             // its copies start while the tensor cores work
        if (next < tiles) a.copy(stages[next % STAGES].a), b.copy(stages[next % STAGES].b);
        copy_async_commit();                            // an empty group too: `wait` counts groups
        wgmma_wait<0>();
        wgmma_landed(sum[0]), wgmma_landed(sum[1]);
    }
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

__device__ __forceinline__ void forward_sums(const T* x, const T* w, int B, int H, int W, int C, int Ho, int Wo, int D,
                                             int kh, int kw, int stride, int padding, int m0, int n0, Share share,
                                             Tiles* stages, Sums& sum) {
    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    for (int r = 0; r < 8; ++r) {
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
    Tiles* stages = aligned(dynamic_shared);
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, 0, 1),
                 stages, sum);
    #pragma unroll
    for (int j = 0; j < 8; ++j)
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
            for (int j = 0; j < 8; ++j) put_two(&sum[i][4 * j + 2 * h], y + pixel * D, n0 + tile_column(j), D);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward_part(const T* x, const T* w, const T* bias, Acc* partial, unsigned int* done, T* y,
                  int B, int H, int W, int C, int Ho, int Wo, int D, int kh, int kw, int stride, int padding,
                  int activate, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = aligned(dynamic_shared);
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Sums sum = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, blockIdx.z, splits),
                 stages, sum);
    Acc* part = partial + blockIdx.z * (B * Ho * Wo * D);
    #pragma unroll
    for (int i = 0; i < 2; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= B * Ho * Wo) continue;
            #pragma unroll
            for (int j = 0; j < 8; ++j) put_two(&sum[i][4 * j + 2 * h], part + pixel * D, n0 + tile_column(j), D);
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
        for (int r = 0; r < 8; ++r) {
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
    for (int i = 0; i < 2; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int pixel = m0 + tile_row(i, h);
            if (pixel >= pixels) continue;
            const int row = at(pixel) * C;
            #pragma unroll
            for (int j = 0; j < 8; ++j)
                if (PARTS) put_two(&sum[i][4 * j + 2 * h], part + row, n0 + tile_column(j), C);
                else       put_two(&sum[i][4 * j + 2 * h], dx + row, n0 + tile_column(j), C);
        }
    if (PARTS && is_last(done + z * gridDim.x + blockIdx.x, splits))
        add_parts<TILE_M, TILE_N>(partial, B * H * W * C, splits, nullptr, dx, m0, n0, pixels, C, 0, at);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = aligned(dynamic_shared);
    dx_tile<false>(dy, w, nullptr, nullptr, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z, 0, 1,
                   stages);
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx_part(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B, int H, int W, int C,
             int Ho, int Wo, int D, int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = aligned(dynamic_shared);
    dx_tile<true>(dy, w, partial, done, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z / splits,
                  blockIdx.z % splits, splits, stages);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    extern __shared__ float4 dynamic_shared[];
    Tiles* stages = aligned(dynamic_shared);
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
    for (int i = 0; i < 2; ++i)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m0 + tile_row(i, h);
            if (row >= rows) continue;
            #pragma unroll
            for (int j = 0; j < 8; ++j) put_two(&sum[i][4 * j + 2 * h], partial + row * D, n0 + tile_column(j), D);
        }
}
