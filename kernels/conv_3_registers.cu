// Convolution 3: register tiles.  Each thread keeps 8 x 8 sums.
//
// In version 2 each product takes two reads from shared memory, and waits for them.  Here a thread reads 8 numbers of A
// and 8 of B for each k, and computes 64 products of them: a quarter of a number for each product, and each read brings
// four numbers.  Global memory is read into registers, four neighbours at a time, while the products of the previous
// tile are still computed.  Shared memory has two buffers, so one barrier for each tile is enough.
//
//     Which thread does what: a block of 4 warps computes 128 x 64 sums, in tiles of 16 along k.
//
//             B (16 x 64)                                one warp, 32 x 64 sums: lane = 8 p + q
//             +--------------+                                     q: 4q..        32 + 4q..
//             |              |                                     +---------------+---------------+
//     A       +--------------+                            p: 4p..  | 4 x 4 sums    | 4 x 4 sums    |  each lane has
//     +---+   +--------------+                                     +---------------+---------------+  4 such squares
//     |   |   | warp 0       |  32                     16 + 4p..   | 4 x 4 sums    | 4 x 4 sums    |
//     | k |   | warp 1       |                                     +---------------+---------------+
//     |   |   | warp 2       |                            A: a warp reads 4 groups of 16 bytes, B: 8, each in
//     |   |   | warp 3       |                            other banks; lanes that read the same are served together
//     +---+   +--------------+
//
//     In shared memory k comes first: (k, row), (k, column).  The copies there read four numbers at a time:
//         Patches   forward, dx: A   thread = (pixel, 4 channels); its 4 numbers go to 4 different k of shared memory,
//                                    where gaps keep a warp's 32 writes in 32 banks
//         Turned    dx: B            the same, from w (c, d) to (d, c)
//         Places    dw: A            thread = (4 channels of a tap, pixel): k comes first in global memory too
//         Matrix    forward, dw: B   a plain matrix, (k, column)
//
// Small images have few tiles and a long k (8 x 8 x 1280 with a batch of 2 has 1 x 20 tiles, and k goes to 11520), and
// so has dw, always.  Then `splits` blocks share k, and each writes partial sums.  The block that finishes a tile last
// adds the tile's parts in order (last_block.cuh); those of dw are added with other layers' (weight_gradients_1.cu).
//
// Counted, forward, M = B Ho Wo, K = kh kw C:  2 M K D operations; a block reads (128 + 64) K numbers from global
// memory for 128 * 64 K products, one read for 43 products, and one 16-byte read of shared memory for 16.  B = 128,
// 14 x 14, 64 -> 64 channels, 3 x 3, float32:  1.85 GFLOP; 13 MB of x, w and y if each is moved once; 196 blocks, which
// read 87 MB through L2.  A tile of k costs a thread 1024 multiply-adds and, as compiled for sm_90, some 200 other
// instructions (64 reads of shared memory, 18 writes, 6 reads of global memory, the rest addresses): at best it reaches
// 83% of the card's speed, 81% for dx and 79% for dw.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: the unit for multiply-adds, with 128 a clock on each multiprocessor.  Half precision is only a
// storage format here, and no faster; version 4 changes that.  Tiles of 8 along k were tried: as compiled for sm_90, 76
// to 80% of the loop's instructions were multiply-adds, and with 16 they are 79 to 83%.  Channels that are not a
// multiple of 4 are read one by one.  The last tile of rows or columns is computed in full: 36 channels cost as much as
// 64. float64 would need 128 registers for its sums alone, so it uses version 2.
//
// takes   float32, float16, bfloat16
// needs   sm_75
#include "last_block.cuh"

constexpr int THREADS = 128;
constexpr int TILE_M = 128;
constexpr int TILE_N = 64;
constexpr int TILE_K = 16;
constexpr int BLOCKS = 3;                               // on a multiprocessor at a time: 168 registers a thread
constexpr int GROUPS = TILE_K / 4, LINES = THREADS / GROUPS;     // groups of 4 along k; pixels or channels
constexpr int READS_A = TILE_M * TILE_K / 4 / THREADS;  // of 4 numbers: those of a thread for each tile
constexpr int READS_B = TILE_N * TILE_K / 4 / THREADS;

struct alignas(16) Quad { Acc at[4]; };

// Shared memory: k comes first.  There is a gap after every fourth k, so the lanes of a warp, which write to GROUPS
// different k at a time and to 32 / GROUPS neighbouring rows, use 32 different banks.
constexpr int GAP = 32 / GROUPS;
__device__ __forceinline__ int at_a(int k, int row)    { return k * TILE_M + k / 4 * GAP + row; }
__device__ __forceinline__ int at_b(int k, int column) { return k * TILE_N + k / 4 * GAP + column; }
struct alignas(16) Tiles { Acc a[TILE_K * TILE_M + GROUPS * GAP], b[TILE_K * TILE_N + GROUPS * GAP]; };

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

// --- from global memory to registers (read), and on to shared memory (write) ---------------------------------

// A of forward (SIGN = 1) and dx (SIGN = -1): pixels of an image, at k = (m, n, c) moved by SIGN (m, n).
template <int SIGN>
struct Patches {
    const T* image;
    int H, W, C, taps, columns;                         // of the image, and the kernel's rows and columns
    Place k;
    int top[READS_A], left[READS_A], at[READS_A];       // the pixels of tap (0, 0), for `row` of the tile
    Four held[READS_A];

    __device__ __forceinline__ Patches(const T* image, int H, int W, int C, int taps, int columns, int k0)
        : image(image), H(H), W(W), C(C), taps(taps), columns(columns), k(k0 + threadIdx.x % GROUPS * 4, columns, C) {}

    __device__ __forceinline__ static int row(int r) { return threadIdx.x / GROUPS + r * LINES; }

    __device__ __forceinline__ void set(int r, bool exists, int b, int i, int j) {
        top[r] = exists ? i : -(1 << 30);               // from there no tap reaches the image
        left[r] = j, at[r] = ((b * H + i) * W + j) * C;
    }

    __device__ __forceinline__ void read() {
        if (C % 4 == 0) {
            const int moved = moved_by(k);
            #pragma unroll
            for (int r = 0; r < READS_A; ++r) {
                held[r] = Four{};
                if (inside(r, k)) held[r] = *(const Four*)(image + (at[r] + moved));
            }
        } else {
            Place place = k;
            #pragma unroll
            for (int q = 0; q < 4; ++q) {
                #pragma unroll
                for (int r = 0; r < READS_A; ++r) {
                    held[r].at[q] = T{};
                    if (inside(r, place)) held[r].at[q] = image[at[r] + moved_by(place)];
                }
                place.advance(1, columns, C);
            }
        }
        k.advance(TILE_K, columns, C);
    }
    __device__ __forceinline__ int moved_by(const Place& k) const { return SIGN * (k.m * W + k.n) * C + k.c; }
    __device__ __forceinline__ bool inside(int r, const Place& k) const {
        const int i = top[r] + SIGN * k.m, j = left[r] + SIGN * k.n;
        return k.m < taps && unsigned(i) < unsigned(H) && unsigned(j) < unsigned(W);
    }

    __device__ __forceinline__ void write(Acc* a) const {
        #pragma unroll
        for (int r = 0; r < READS_A; ++r)
            #pragma unroll
            for (int q = 0; q < 4; ++q) a[at_a(threadIdx.x % GROUPS * 4 + q, row(r))] = wide(held[r].at[q]);
    }
};

// A of dw: the rows are q = (m, n, c), and k counts the pixels (b, i, j) of dy.
struct Places {
    const T* x;
    int H, W, C, Ho, Wo, pixels, kh, kw, stride, padding;
    Place q;                                            // the first of the thread's four rows
    int k, b, i, j;
    Four held[READS_A];

    __device__ __forceinline__ Places(const T* x, int H, int W, int C, int Ho, int Wo, int pixels, int kh, int kw,
                                      int stride, int padding, int m0, int k0)
        : x(x), H(H), W(W), C(C), Ho(Ho), Wo(Wo), pixels(pixels), kh(kh), kw(kw), stride(stride), padding(padding),
          q(m0 + threadIdx.x % 32 * 4, kw, C), k(k0 + threadIdx.x / 32) {
        b = k / (Ho * Wo), i = k / Wo % Ho, j = k % Wo;
    }

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < READS_A; ++r) {
            const int top = i * stride - padding, left = j * stride - padding;
            held[r] = Four{};
            if (C % 4 == 0) {
                if (inside(top, left, q)) held[r] = *(const Four*)(x + address(top, left, q));
            } else {
                Place place = q;
                #pragma unroll
                for (int l = 0; l < 4; ++l) {
                    if (inside(top, left, place)) held[r].at[l] = x[address(top, left, place)];
                    place.advance(1, kw, C);
                }
            }
            k += 4, j += 4;                             // the next pixel of the warp
            while (j >= Wo) {
                j -= Wo;
                if (++i == Ho) i = 0, ++b;
            }
        }
    }
    __device__ __forceinline__ bool inside(int top, int left, const Place& q) const {
        return k < pixels && q.m < kh && unsigned(top + q.m) < unsigned(H) && unsigned(left + q.n) < unsigned(W);
    }
    __device__ __forceinline__ int address(int top, int left, const Place& q) const {
        return ((b * H + top + q.m) * W + left + q.n) * C + q.c;
    }

    __device__ __forceinline__ void write(Acc* a) const {
        #pragma unroll
        for (int r = 0; r < READS_A; ++r) {
            Quad quad;
            for (int l = 0; l < 4; ++l) quad.at[l] = wide(held[r].at[l]);
            *(Quad*)(a + at_a(threadIdx.x / 32 + 4 * r, threadIdx.x % 32 * 4)) = quad;
        }
    }
};

// B of forward and dw: a matrix (K, N), stored as such.
struct Matrix {
    const T* matrix;
    int K, N, k, n;
    Four held[READS_B];

    __device__ __forceinline__ Matrix(const T* matrix, int K, int N, int k0, int n0)
        : matrix(matrix), K(K), N(N), k(k0 + threadIdx.x / 16), n(n0 + threadIdx.x % 16 * 4) {}

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < READS_B; ++r, k += 8) {
            held[r] = Four{};
            if (N % 4 == 0) {
                if (k < K && n < N) held[r] = *(const Four*)(matrix + (k * N + n));
            } else {
                #pragma unroll
                for (int q = 0; q < 4; ++q)
                    if (k < K && n + q < N) held[r].at[q] = matrix[k * N + n + q];
            }
        }
    }

    __device__ __forceinline__ void write(Acc* b) const {
        #pragma unroll
        for (int r = 0; r < READS_B; ++r) {
            Quad quad;
            for (int q = 0; q < 4; ++q) quad.at[q] = wide(held[r].at[q]);
            *(Quad*)(b + at_b(threadIdx.x / 16 + 8 * r, threadIdx.x % 16 * 4)) = quad;
        }
    }
};

// B of dx: k = (m, n, d) over the taps of the class, columns c; w is stored as (kh, kw, C, D), d last.
struct Turned {
    const T* w;
    int C, D, taps, columns, kw, stride, c;
    Place k;
    Four held[READS_B];

    __device__ __forceinline__ Turned(const T* w, int C, int D, int taps, int columns, int kw, int stride, int k0,
                                      int n0)
        : w(w), C(C), D(D), taps(taps), columns(columns), kw(kw), stride(stride), c(n0 + threadIdx.x / GROUPS),
          k(k0 + threadIdx.x % GROUPS * 4, columns, D) {}

    __device__ __forceinline__ void read() {
        #pragma unroll
        for (int r = 0; r < READS_B; ++r) {
            held[r] = Four{};
            if (D % 4 == 0) {
                if (inside(r, k)) held[r] = *(const Four*)(w + address(r, k));
            } else {
                Place place = k;
                #pragma unroll
                for (int q = 0; q < 4; ++q) {
                    if (inside(r, place)) held[r].at[q] = w[address(r, place)];
                    place.advance(1, columns, D);
                }
            }
        }
        k.advance(TILE_K, columns, D);
    }
    __device__ __forceinline__ bool inside(int r, const Place& k) const { return k.m < taps && c + r * LINES < C; }
    __device__ __forceinline__ int address(int r, const Place& k) const {
        return ((k.m * kw + k.n) * stride * C + c + r * LINES) * D + k.c;
    }

    __device__ __forceinline__ void write(Acc* b) const {
        #pragma unroll
        for (int r = 0; r < READS_B; ++r)
            #pragma unroll
            for (int q = 0; q < 4; ++q)
                b[at_b(threadIdx.x % GROUPS * 4 + q, threadIdx.x / GROUPS + r * LINES)] = wide(held[r].at[q]);
    }
};

// --- the products ---------------------------------------------------------------------------------------------

// The lane's rows and columns of the tile: those of its four squares in the picture.
__device__ __forceinline__ int tile_row(int r) {
    return threadIdx.x / 32 * 32 + r / 4 * 16 + threadIdx.x % 32 / 8 * 4 + r % 4;
}
__device__ __forceinline__ int tile_column(int q) { return q / 4 * 32 + threadIdx.x % 8 * 4 + q % 4; }

// sum += A B over `tiles` tiles of k.
template <typename A, typename B>
__device__ __forceinline__ void multiply(A& a, B& b, int tiles, Tiles* shared, Acc (&sum)[8][8]) {
    a.read(), b.read();
    a.write(shared[0].a), b.write(shared[0].b);
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile) {
        Tiles &now = shared[tile % 2], &next = shared[(tile + 1) % 2];
        if (tile + 1 < tiles) a.read(), b.read();       // in transit while the products below are computed
        #pragma unroll
        for (int k = 0; k < TILE_K; ++k) {
            Quad u[2], v[2];
            for (int half = 0; half < 2; ++half) {
                u[half] = *(const Quad*)(now.a + at_a(k, tile_row(4 * half)));
                v[half] = *(const Quad*)(now.b + at_b(k, tile_column(4 * half)));
            }
            #pragma unroll
            for (int r = 0; r < 8; ++r)
                #pragma unroll
                for (int q = 0; q < 8; ++q) sum[r][q] += u[r / 4].at[r % 4] * v[q / 4].at[q % 4];
        }
        if (tile + 1 < tiles) a.write(next.a), b.write(next.b);
        __syncthreads();
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

// Writes four sums side by side to a row of N numbers, the first at column n.
template <typename Out>
__device__ __forceinline__ void put_four(const Acc* sum, Out* row, int n, int N) {
    if (N % 4 == 0) {
        struct alignas(4 * sizeof(Out)) { Out at[4]; } four;
        for (int q = 0; q < 4; ++q) put(sum[q], &four.at[q]);
        if (n < N) *(decltype(four)*)(row + n) = four;
    } else {
        #pragma unroll
        for (int q = 0; q < 4; ++q)
            if (n + q < N) put(sum[q], &row[n + q]);
    }
}

// --- y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d] --------------------------------------

__device__ __forceinline__ void forward_sums(const T* x, const T* w, int B, int H, int W, int C, int Ho, int Wo, int D,
                                             int kh, int kw, int stride, int padding, int m0, int n0, Share share,
                                             Tiles* shared, Acc (&sum)[8][8]) {
    Patches<1> a(x, H, W, C, kh, kw, share.k0);
    #pragma unroll
    for (int r = 0; r < READS_A; ++r) {
        const int pixel = m0 + a.row(r);
        const int i = pixel / Wo % Ho, j = pixel % Wo;
        a.set(r, pixel < B * Ho * Wo, pixel / (Ho * Wo), i * stride - padding, j * stride - padding);
    }
    Matrix b(w, kh * kw * C, D, share.k0, n0);
    multiply(a, b, share.tiles, shared, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Acc sum[8][8] = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, 0, 1),
                 shared, sum);
    #pragma unroll
    for (int q = 0; q < 8; ++q) {
        const int d = n0 + tile_column(q);
        const Acc bias_d = bias && d < D ? wide(bias[d]) : Acc(0);
        #pragma unroll
        for (int r = 0; r < 8; ++r) {
            sum[r][q] += bias_d;
            if (activate) sum[r][q] = silu(sum[r][q]);
        }
    }
    #pragma unroll
    for (int r = 0; r < 8; ++r) {
        const int pixel = m0 + tile_row(r);
        if (pixel >= B * Ho * Wo) continue;
        for (int q = 0; q < 8; q += 4) put_four(&sum[r][q], y + pixel * D, n0 + tile_column(q), D);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_forward_part(const T* x, const T* w, const T* bias, Acc* partial, unsigned int* done, T* y,
                  int B, int H, int W, int C, int Ho, int Wo, int D, int kh, int kw, int stride, int padding,
                  int activate, int splits) {
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    Acc sum[8][8] = {};
    forward_sums(x, w, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, m0, n0, Share(kh * kw * C, blockIdx.z, splits),
                 shared, sum);
    Acc* part = partial + blockIdx.z * (B * Ho * Wo * D);
    #pragma unroll
    for (int r = 0; r < 8; ++r) {
        const int pixel = m0 + tile_row(r);
        if (pixel >= B * Ho * Wo) continue;
        for (int q = 0; q < 8; q += 4) put_four(&sum[r][q], part + pixel * D, n0 + tile_column(q), D);
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
    Acc sum[8][8] = {};
    if (share.tiles > 0) {
        Patches<-1> a(dy, Ho, Wo, D, rows.taps, columns.taps, share.k0);
        #pragma unroll
        for (int r = 0; r < READS_A; ++r) {
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
    for (int r = 0; r < 8; ++r) {
        const int pixel = m0 + tile_row(r);
        if (pixel >= pixels) continue;
        const int row = at(pixel) * C;
        for (int q = 0; q < 8; q += 4)
            if (PARTS) put_four(&sum[r][q], part + row, n0 + tile_column(q), C);
            else       put_four(&sum[r][q], dx + row, n0 + tile_column(q), C);
    }
    if (PARTS && is_last(done + z * gridDim.x + blockIdx.x, splits))
        add_parts<TILE_M, TILE_N>(partial, B * H * W * C, splits, nullptr, dx, m0, n0, pixels, C, 0, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    __shared__ Tiles shared[2];
    dx_tile<false>(dy, w, nullptr, nullptr, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z, 0, 1,
                   shared);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_dx_part(const T* dy, const T* w, Acc* partial, unsigned int* done, T* dx, int B, int H, int W, int C,
             int Ho, int Wo, int D, int kh, int kw, int stride, int padding, int splits) {
    __shared__ Tiles shared[2];
    dx_tile<true>(dy, w, partial, done, dx, B, H, W, C, Ho, Wo, D, kh, kw, stride, padding, blockIdx.z / splits,
                  blockIdx.z % splits, splits, shared);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    __shared__ Tiles shared[2];
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int m0 = blockIdx.x / tiles_n * TILE_M, n0 = blockIdx.x % tiles_n * TILE_N;
    const int rows = kh * kw * C, pixels = B * Ho * Wo;
    const Share share(pixels, blockIdx.z, splits);
    Acc sum[8][8] = {};
    Places a(x, H, W, C, Ho, Wo, pixels, kh, kw, stride, padding, m0, share.k0);
    Matrix b(dy, pixels, D, share.k0, n0);
    multiply(a, b, share.tiles, shared, sum);
    partial += blockIdx.z * (rows * D);
    #pragma unroll
    for (int r = 0; r < 8; ++r) {
        const int row = m0 + tile_row(r);
        if (row >= rows) continue;
        for (int q = 0; q < 8; q += 4) put_four(&sum[r][q], partial + row * D, n0 + tile_column(q), D);
    }
}
