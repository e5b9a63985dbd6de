// Convolution 2: tiles in shared memory.
//
// Each of the three sums is a product of two matrices, (rows, k) (k, columns), one of which is never stored: its rows
// are the patches of an image, and its numbers are gathered from the image when they are needed.  (Stored, it would be
// kh kw times as large as the image.)  Every column needs the numbers of a row, and every row those of a column.  So a
// block of 32 x 32 threads first copies 32 x 32 numbers of each matrix to shared memory, one for each thread, and then
// each thread computes its 32 products from there: each copied number is used 32 times.
//
//                     rows                            k                          columns
//         forward     pixels (b, i, j) of y           (m, n, c)                  d
//         dx          pixels (b, u, v) of a class     (m, n, d), its taps        c
//         dw          (m, n, c)                       pixels (b, i, j) of y      d
//
//     Which thread does what: a block of 32 warps computes 32 x 32 sums, in tiles of 32 along k.
//
//                       B (k, columns)
//                     +------ 32 ------+
//                     |                |        1. each: one number of A and one of B to shared memory
//                 32  |                |        2. barrier
//                     |                |        3. thread (row, column): sum += A[row, k] B[k, column], for 32 k
//         A           +----------------+        4. barrier, and the next tile
//     +-- 32 ---+     +----------------+
//     |         |     | warp 0         |        a warp reads one number of A, the same for its 32 lanes, and 32
//     |         |     | ...            |        neighbours of B: no two lanes need different words of a bank
//     |         |     | warp 31        |        (word w is in bank w % 32, and a bank serves one word a clock)
//     +---------+     +----------------+
//
//     In shared memory k comes first: (k, row), (k, column).  In the copies there, neighbouring lanes read neighbours:
//         Patches   forward, dx: A   lane = channel k of a pixel.  A warp writes a column of shared memory: rows of 33
//                                    numbers, not 32, put them in 32 different banks
//         Turned    dx: B            the same, from w (c, d) to (d, c)
//         Places    dw: A            lane = channel of a tap, k = the warp's pixel
//         Matrix    forward, dw: B   a plain matrix, (k, column)
//
// Counted, forward, M = B Ho Wo, K = kh kw C:  2 M K D operations; a block reads 2 * 32 K numbers from global memory
// for 32 * 32 K products, one read for 16 products, and two of shared memory for each.  B = 128, 14 x 14, 64 -> 64
// channels, 3 x 3, float32:  1.85 GFLOP; 13 MB of x, w and y if each is moved once; 1568 blocks, which read 231 MB
// through L2.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: now it is shared memory.  Each multiply-add waits for two reads from it; it serves one warp a clock,
// while four could multiply.  So again the best is an eighth of the card's speed, but this time it comes close, also
// for dx.  Between the two barriers of a tile nothing is fetched; a second block hides part of that.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 1024;
constexpr int TILE_M = 32;
constexpr int TILE_N = 32;
constexpr int TILE_K = 32;
constexpr int LONG_M = TILE_M + 1, LONG_N = TILE_N + 1; // a row of the tile in shared memory, see Patches

struct Tiles { Acc a[TILE_K * LONG_M], b[TILE_K * LONG_N]; };

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

// --- from global memory to a register (read), and on to shared memory (write) --------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place k;
    int top, left, at;                                  // the pixel of tap (0, 0)
    T held;

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), k(k0 + threadIdx.x % 32, columns, C) {}

    __device__ __forceinline__ static int row() { return threadIdx.x / 32; }

    __device__ __forceinline__ void set(bool exists, int b, int i, int j) {
        top = exists ? i : -(1 << 30);                  // from there no tap reaches the image
        left = j, at = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void read() {
        held = T{};
        if (inside()) held = image[at + SIGN * (k.m * W + k.n) * C + k.c];
        k.advance(TILE_K, columns, C);
    }
    __device__ __forceinline__ bool inside() const {
        const int i = top + SIGN * k.m, j = left + SIGN * k.n;
        return k.m < taps && unsigned(i) < unsigned(H) && unsigned(j) < unsigned(W);
    }

    __device__ __forceinline__ void write(Acc* a) const {
        a[threadIdx.x % 32 * LONG_M + row()] = wide(held);
    }
};

// A of dw: the rows are q = (m, n, c), and k counts the pixels (b, i, j) of dy.
struct Places {
    const T* x;
    int H, W, C, Ho, Wo, pixels, kh, kw, stride, padding;
    Place q;
    int k, b, i, j;
    T held;

    __device__ __forceinline__ Places(const T* x, int H, int W, int C, int Ho, int Wo, int pixels, int kh, int kw,
                                      int stride, int padding, int m0, int k0)
        : x(x), H(H), W(W), C(C), Ho(Ho), Wo(Wo), pixels(pixels), kh(kh), kw(kw), stride(stride), padding(padding),
          q(m0 + threadIdx.x % 32, kw, C), k(k0 + threadIdx.x / 32) {
        b = k / (Ho * Wo), i = k / Wo % Ho, j = k % Wo;
    }

    __device__ __forceinline__ void read() {
        const int top = i * stride - padding, left = j * stride - padding;
        held = T{};
        if (inside(top, left)) held = x[((b * H + top + q.m) * W + left + q.n) * C + q.c];
        k += TILE_K, j += TILE_K;                       // the next pixel of the warp
        while (j >= Wo) {
            j -= Wo;
            if (++i == Ho) i = 0, ++b;
        }
    }
    __device__ __forceinline__ bool inside(int top, int left) const {
        return k < pixels && q.m < kh && unsigned(top + q.m) < unsigned(H) && unsigned(left + q.n) < unsigned(W);
    }

    __device__ __forceinline__ void write(Acc* a) const {
        a[threadIdx.x / 32 * LONG_M + threadIdx.x % 32] = wide(held);
    }
};

// B of forward and dw: a matrix (K, N), stored as such.
struct Matrix {
    const T* matrix;
    int K, N, k, n;
    T held;

    __device__ __forceinline__ Matrix(const T* matrix, int K, int N, int k0, int n0)
        : matrix(matrix), K(K), N(N), k(k0 + threadIdx.x / 32), n(n0 + threadIdx.x % 32) {}

    __device__ __forceinline__ void read() {
        held = T{};
        if (k < K && n < N) held = matrix[k * N + n];
        k += TILE_K;
    }

    __device__ __forceinline__ void write(Acc* b) const {
        b[threadIdx.x / 32 * LONG_N + threadIdx.x % 32] = wide(held);
    }
};

// B of dx: k = (m, n, d) over the taps of the class, columns c; w is stored as (kh, kw, C, D), d last.
struct Turned {
    const T* w;
    int C, D, taps, columns, kw, stride, c;
    Place k;
    T held;

    __device__ __forceinline__ Turned(const T* w, int C, int D, int taps, int columns, int kw, int stride, int k0,
                                      int n0)
        : w(w), C(C), D(D), taps(taps), columns(columns), kw(kw), stride(stride), c(n0 + threadIdx.x / 32),
          k(k0 + threadIdx.x % 32, columns, D) {}

    __device__ __forceinline__ void read() {
        held = T{};
        if (k.m < taps && c < C) held = w[((k.m * kw + k.n) * stride * C + c) * D + k.c];
        k.advance(TILE_K, columns, D);
    }

    __device__ __forceinline__ void write(Acc* b) const {
        b[threadIdx.x % 32 * LONG_N + threadIdx.x / 32] = wide(held);
    }
};

// --- the products ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int tile_row()    { return threadIdx.x / TILE_N; }
__device__ __forceinline__ int tile_column() { return threadIdx.x % TILE_N; }

// The sum of A B over `tiles` tiles of k, for this thread's row and column.
template <typename A, typename B>
__device__ __forceinline__ Acc multiply(A& a, B& b, int tiles, Tiles& shared) {
    Acc sum = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        a.read(), b.read();
        a.write(shared.a), b.write(shared.b);
        __syncthreads();                                // all is there
        #pragma unroll
        for (int k = 0; k < TILE_K; ++k)
            sum += shared.a[k * LONG_M + tile_row()] * shared.b[k * LONG_N + tile_column()];
        __syncthreads();                                // all is used: the next tile may be written
    }
    return sum;
}

// The tiles of k of split number `split` of `splits`.
struct Share {
    int k0, tiles;
    __device__ __forceinline__ Share(int K, int split, int splits) {
        const int all = (K + TILE_K - 1) / TILE_K, each = (all + splits - 1) / splits, first = min(all, split * each);
        k0 = first * TILE_K, tiles = min(all - first, each);
    }
};

// --- y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d] --------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    __shared__ Tiles shared;
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const Share share(kh * kw * C, 0, 1);

    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    int pixel = m0 + a.row();
    a.set(pixel < B * Ho * Wo, pixel / (Ho * Wo), pixel / Wo % Ho * stride - padding, pixel % Wo * stride - padding);
    Matrix b(w, kh * kw * C, D, share.k0, n0);
    Acc sum = multiply(a, b, share.tiles, shared);

    pixel = m0 + tile_row();
    const int d = n0 + tile_column();
    if (pixel >= B * Ho * Wo || d >= D) return;
    if (bias) sum += wide(bias[d]);
    y[pixel * D + d] = narrow(activate ? silu(sum) : sum);
}

// --- dx[b,i,j,c] = sum_{m,n,d} dy[b, (i + p - m)/s, (j + p - n)/s, d] w[m,n,c,d], where these are whole ------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    __shared__ Tiles shared;
    const int tiles_n = (C + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int ri = blockIdx.z / stride, rj = blockIdx.z % stride;
    const Class rows(ri, H, kh, stride, padding), columns(rj, W, kw, stride, padding);
    const int pixels = B * rows.pixels * columns.pixels;
    if (m0 >= pixels) return;                           // the whole block: this class is smaller than the largest
    const Share share(rows.taps * columns.taps * D, 0, 1);

    Acc sum = 0;
    int pixel = m0 + Patches<-1>::row();
    if (share.tiles > 0) {                              // with a stride beyond the kernel, some pixels meet no tap
        Patches<-1> a(dy, Ho, Wo, D, rows.taps, columns.taps, share.k0);
        a.set(pixel < pixels, pixel / (rows.pixels * columns.pixels), pixel / columns.pixels % rows.pixels + rows.shift,
              pixel % columns.pixels + columns.shift);
        Turned b(w + (ri * kw + rj) * C * D, C, D, rows.taps, columns.taps, kw, stride, share.k0, n0);
        sum = multiply(a, b, share.tiles, shared);
    }

    pixel = m0 + tile_row();
    const int c = n0 + tile_column();
    if (pixel >= pixels || c >= C) return;
    const int i = pixel / columns.pixels % rows.pixels * stride + rows.first;
    const int j = pixel % columns.pixels * stride + columns.first;
    dx[((pixel / (rows.pixels * columns.pixels) * H + i) * W + j) * C + c] = narrow(sum);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    __shared__ Tiles shared;
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int rows = kh * kw * C, pixels = B * Ho * Wo;
    const Share share(pixels, blockIdx.z, splits);

    Places a(x, H, W, C, Ho, Wo, pixels, kh, kw, stride, padding, m0, share.k0);
    Matrix b(dy, pixels, D, share.k0, n0);
    const Acc sum = multiply(a, b, share.tiles, shared);

    const int row = m0 + tile_row(), d = n0 + tile_column();
    if (row < rows && d < D) partial[(int(blockIdx.z) * rows + row) * D + d] = sum;
}
